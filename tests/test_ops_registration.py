"""The torch ops: opcheck on every op, torch.compile without graph breaks, dynamic shapes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import with_entropy
from judges import Problem, eager, peaky
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import lolkernels as lk
from lolkernels import objectives, step
from lolkernels.objectives import PerSequence

CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)

# (N, D, V, dtype of hidden, of weight, bias, masked rows, softcap, backend, requires grad)
f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SAMPLES: list[tuple[Any, ...]] = [
    (6, 4, 11, f32, f32, True, True, 0.0, "cpu", True),
    (6, 4, 11, f32, f32, False, False, 5.0, "cpu", True),
    (1, 1, 1, f32, f32, True, False, 0.0, "cpu", True),
    (9, 3, 2100, f32, f32, True, True, 0.0, "cpu", True),
    (5, 8, 40, bf16, bf16, True, True, 0.0, "cpu", True),
    (5, 8, 40, bf16, f32, False, True, 30.0, "cpu", True),
    (5, 8, 40, f16, f16, True, False, 0.0, "cpu", True),
    (5, 8, 40, f32, bf16, True, True, 0.0, "cpu", True),
    (6, 4, 11, f32, f32, True, True, 0.0, "cpu", False),
    (6, 4, 11, f64, f64, True, True, 5.0, "reference", True),
    (6, 4, 11, f32, f32, True, True, 0.0, "reference", True),
    (5, 8, 40, bf16, bf16, False, True, 0.0, "reference", True),
    (3, 2, 2049, f64, f64, False, False, 0.0, "reference", True),
    (2, 16, 129, f16, f32, True, False, 2.0, "reference", True),
]
samples = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: "-".join(map(str, s)))


def tensors(sample: tuple[Any, ...]) -> tuple[Problem, Tensor | None]:
    n, d, v, hidden_dtype, weight_dtype, bias, masked, _, _, grad = sample
    p = peaky(n, d, v, dtype=hidden_dtype, weight_dtype=weight_dtype, bias=bias)
    for t in (p.hidden, p.weight, p.bias):
        if t is not None:
            t.requires_grad_(grad)
    return p, (torch.arange(n) % 3 != 1) if masked else None


def widened(p: Problem, sample: tuple[Any, ...], low: bool) -> tuple[Tensor, Tensor | None]:
    """hidden and up: a low-rank part of two columns beside a frozen weight, or none."""
    if not low:
        return p.hidden, None
    p.weight.requires_grad_(False)
    hidden = torch.cat([p.hidden, torch.randn(sample[0], 2).to(p.hidden.dtype)], 1).detach()
    up = torch.randn(sample[2], 2).to(p.weight.dtype)
    return hidden.requires_grad_(sample[-1]), up.requires_grad_(sample[-1])


OPS = torch.ops.lolkernels


def check(op: Any, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(op, arguments, test_utils=CHECKS)


@samples
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("hold", [False, True])
def test_opcheck_linear_logprob(sample: tuple[Any, ...], hold: bool, low: bool) -> None:
    p, _ = tensors(sample)
    n, _, v, *_, softcap, backend, grad = sample
    operand = f64 if f64 in sample else f32
    common = ((1.5, softcap, 0.8), backend, 3 * v * operand.itemsize, operand)
    need = [grad, grad, grad and hold]
    hidden, up = widened(p, sample, low)
    arguments = (hidden, p.weight, p.labels, p.bias, up, False, *common, need, None)
    check(OPS.linear_logprob_v4.default, arguments)

    with torch.no_grad():
        logps, lse, _, _, slope, rest, share, _, kept = OPS.linear_logprob_v4(*arguments)
    g = torch.randn_like(lse)
    c = g if n % 2 else None
    stats = [logps, lse, slope, rest, share]
    bias = None if p.bias is None else p.bias.detach()
    up = None if up is None else up.detach()
    more = (hidden.detach(), p.weight.detach(), p.labels, bias, up, *common, need[2])
    needs = [hold, True, p.bias is not None]
    arguments = ([g, -g], None, c, stats, kept, *more, needs)
    check(OPS.linear_gradients_v3.default, arguments)
    check(
        OPS.linear_add_gradients_v4.default,
        (torch.ones_like(more[1 if up is None else 4]), *arguments),
    )


@samples
@pytest.mark.parametrize("inplace", [False, True])
def test_opcheck_logprob(sample: tuple[Any, ...], inplace: bool) -> None:
    p, _ = tensors(sample)
    common = ((1.5, sample[7], 0.8), sample[8])
    logits = (p.hidden.detach().double() @ p.weight.detach().double().T).to(sample[3])
    x = logits.clone()
    if inplace:
        check(OPS.logprob_exps_v3_.default, (x, p.labels, *common))
    sums = list(OPS.logprob_exps_v3_(x, p.labels, *common)) if inplace else []
    x = x.requires_grad_(sample[-1] and not inplace)
    check(OPS.logprob_v3.default, (x, p.labels, False, sums, *common))
    logps, lse, *_ = OPS.logprob_v3(x.detach(), p.labels, False, sums, *common)
    if inplace:
        own = (torch.randn_like(lse), torch.randn_like(lse))
        check(OPS.logprob_gradient_v3_.default, (x.detach(), p.labels, *own))
    else:
        abc = [torch.randn_like(lse) for _ in range(3)]
        arguments = (abc, lse, logps, x.detach(), p.labels, *common)
        check(OPS.logprob_gradient_v3.default, arguments)


def length_normalised(logps: Tensor, rewards: PerSequence, seq: lk.Sequences) -> Tensor:
    return -rewards * torch.tanh(seq.mean(logps))


LOSSES = [objectives.a_lol, objectives.wbc, with_entropy, length_normalised]


@samples
@pytest.mark.parametrize("rows", [2, 1000])  # kept: several blocks, and one
@pytest.mark.parametrize("low", [False, True])
def test_opcheck_linear_loss(sample: tuple[Any, ...], rows: int, low: bool) -> None:
    p, _ = tensors(sample)
    n = sample[0]
    objective = LOSSES[n % 4]
    cu = torch.tensor([0, n // 2, n // 2, n])
    seq = lk.Sequences.from_cu_seqlens(cu)
    wide = f64 if f64 in sample else f32
    side = {
        "ref_logps": -torch.ones(n, dtype=wide),
        "advantages": torch.tensor([1.0, 0.5, 2.0], dtype=wide),
        "rewards": torch.tensor([1.0, 0.5, 2.0], dtype=wide),
    }
    needed = {k: side[k] for k in lk.side_inputs(objective) if k in side}
    options = (("clip", 0.5),) if "clip" in lk.side_inputs(objective) else ()
    spec = tuple((k, kind) for k, kind in lk.side_inputs(objective).items() if k in side)
    scaling, budget = (1.5, sample[7], 0.8), rows * sample[2] * wide.itemsize
    call = step.bind(objective, options, spec, sample[8], wide)
    parts = [seq.cu_seqlens, seq.lengths, seq.token_to_sequence, seq.totals]
    weights = objectives.reduction_weights(seq, "seq-mean")
    need = [sample[-1], sample[-1], sample[-1] and p.bias is not None, *[False] * len(needed)]
    hidden, up = widened(p, sample, low)
    arguments = (hidden, p.weight, p.labels, p.bias, up, parts, list(needed.values()), weights)
    check(OPS.linear_loss_v4.default, (*arguments, scaling, budget, call, need, None))


def test_fake_tensors_never_reach_a_kernel() -> None:
    """Shapes and dtypes follow from shapes and dtypes alone: V is far beyond any memory."""
    with FakeTensorMode():
        h = torch.empty(10**6, 4096, dtype=bf16, requires_grad=True)
        w = torch.empty(10**6, 4096, dtype=bf16, requires_grad=True)
        labels = torch.empty(10**6, dtype=torch.int64)
        out = lk.linear_logprob(h, w, labels)
        assert [tuple(t.shape) for t in out] == [(10**6,)] * 4
        assert {t.dtype for t in out} == {f32}
        gh, gw = torch.autograd.grad(out.logps.sum(), (h, w))
        assert gh.shape == h.shape and gw.shape == w.shape and gw.dtype == bf16
        logits = torch.empty(10**6, 10**6, dtype=bf16, requires_grad=True)
        out = lk.logprob(logits, labels)
        (g,) = torch.autograd.grad(out.logps.sum(), logits)
        assert g.shape == logits.shape and g.dtype == bf16 and out.lse.dtype == f32


# --- torch.compile --------------------------------------------------------------------------------


def functions() -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """Functions of (hidden, weight, labels, lengths, ref_logps, advantages) to a scalar."""

    def by_logprob(h: Tensor, w: Tensor, y: Tensor, seq: Any, ref: Tensor, adv: Tensor) -> Tensor:
        out = lk.linear_logprob(h, w, y, softcap=9.0)
        return (out.logps * ref).sum() + out.entropy.mean() + out.lse.square().mean()

    def by_logits(h: Tensor, w: Tensor, y: Tensor, seq: Any, ref: Tensor, adv: Tensor) -> Tensor:
        return (lk.logprob(h @ w.T, y, temperature=0.7).logps * ref).sum()

    def by_a_lol(h: Tensor, w: Tensor, y: Tensor, seq: Any, ref: Tensor, adv: Tensor) -> Tensor:
        return lk.linear_loss(
            objectives.a_lol, h, w, y, seq, ref_logps=ref, advantages=adv, clip=0.5
        )

    def by_wbc(h: Tensor, w: Tensor, y: Tensor, seq: Any, ref: Tensor, adv: Tensor) -> Tensor:
        return 2 * lk.linear_loss(objectives.wbc, h, w, y, seq, rewards=adv, reduction="token-mean")

    def by_users(h: Tensor, w: Tensor, y: Tensor, seq: Any, ref: Tensor, adv: Tensor) -> Tensor:
        return lk.linear_loss(length_normalised, h, w, y, seq, rewards=adv, reduction="sum")

    for f in (by_logprob, by_logits, by_a_lol, by_wbc, by_users):
        yield f.__name__, f


FUNCTIONS = dict(functions())


def inputs(lengths: list[int]) -> tuple[Any, ...]:
    p = peaky(sum(lengths), 8, 60)
    ref = (eager(p).logps + 0.1 * torch.randn(sum(lengths))).clamp(max=0)
    return (
        p.hidden,
        p.weight,
        p.labels,
        lk.Sequences.from_lengths(lengths),
        ref,
        torch.rand(len(lengths)),
    )


def gradients(f: Callable[..., Tensor], arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    h, w = (t.detach().clone().requires_grad_() for t in arguments[:2])
    loss = f(h, w, *arguments[2:])
    return (loss.detach(), *torch.autograd.grad(3 * loss, (h, w)))


@pytest.mark.parametrize(
    ("name", "compiler"),
    [(name, "aot_eager") for name in FUNCTIONS]
    + [(name, "inductor") for name in ("by_logprob", "by_logits", "by_a_lol", "by_users")],
)
def test_compile_as_one_graph_forward_and_backward(name: str, compiler: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend=compiler)
    for lengths in ([3, 5, 2], [4, 4, 1, 7]):
        arguments = inputs(lengths)
        got, want = gradients(compiled, arguments), gradients(FUNCTIONS[name], arguments)
        for a, b in zip(got, want, strict=True):
            assert float((a - b).abs().max()) <= 1e-6 * max(1, float(b.abs().max()))
            assert float(b.abs().max()) > 0


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_fifty_lengths_take_at_most_three_compilations(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, dynamic=True, backend=counter)
    for i in range(50):
        arguments = inputs([2 + i % 7, 3 + i, 1 + i // 2])
        with torch.no_grad():
            got = compiled(*arguments)
            assert abs(got.item() - FUNCTIONS[name](*arguments).item()) <= 1e-5 * max(
                1, abs(got.item())
            )
    assert 1 <= counter.frame_count <= 3


def test_a_compiled_model_with_the_loss_inside() -> None:
    torch._dynamo.reset()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 60)

        def forward(self, x: Tensor, y: Tensor, seq: lk.Sequences, adv: Tensor) -> Tensor:
            return lk.linear_loss(
                objectives.a_lol_ref_free,
                torch.tanh(self.body(x)),
                self.head.weight,
                y,
                seq,
                bias=self.head.bias,
                advantages=adv,
            )

    model = Model()
    x, y = torch.randn(9, 8), torch.randint(60, (9,))
    seq, adv = lk.Sequences.from_lengths([4, 5]), torch.tensor([1.0, 2.0])
    model(x, y, seq, adv).backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x, y, seq, adv).backward()
    for p, g in zip(model.parameters(), want, strict=True):
        assert float((p.grad - g).abs().max()) <= 1e-6 and float(g.abs().max()) > 0
