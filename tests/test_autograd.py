"""The autograd contract: gradcheck, repeated and scaled backward, who requires grad, dtypes."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import judges
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cases import BACKENDS, DTYPES, HALF, calls, each_backend
from judges import eager, peaky
from torch import Tensor
from torch.autograd import gradcheck

import lolkernels as lk
from lolkernels import objectives
from lolkernels.backends import TABLE
from lolkernels.objectives import PerSequence

LENGTHS = [2, 3, 1]
N, D, V = 6, 3, 7
EXACT = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-3, "nondet_tol": 0.0}
NARROW = {b: HALF if b == "reference" else DTYPES[b] for b in BACKENDS}


def smooth_objective(
    logps: Tensor, rewards: PerSequence, seq: lk.Sequences, *, power: float = 0.5
) -> Tensor:
    return -rewards * torch.tanh(power * seq.mean(logps)) + 0.1 * seq.sum(logps.square())


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# --- gradcheck ------------------------------------------------------------------------------------

# The ratio of A-LoL is detached: its loss is not the integral of its gradient, and gradcheck, which
# differentiates the loss, sees another function. ref_logps tells it apart: where every weight lies
# outside the clip it is constant, and the two agree. With floor = 1 r_gold's weight is one.
GRADCHECKED: list[tuple[str, Callable[..., Tensor], dict[str, Any]]] = [
    ("nll", objectives.nll, {}),
    ("wbc", objectives.wbc, {}),
    ("r_gold, floor 1", objectives.r_gold, {"floor": 1.0}),
    ("r_lol above the clip", objectives.r_lol, {"clip": 0.5, "drift": -9.0}),
    ("r_lol below the clip", objectives.r_lol, {"clip": 0.5, "drift": 9.0}),
    ("a_lol above the clip", objectives.a_lol, {"clip": 0.9, "drift": -9.0}),
    ("a_lol below the clip", objectives.a_lol, {"clip": 0.9, "drift": 9.0}),
    ("a_lol_seq above the clip", objectives.a_lol_seq, {"clip": 0.2, "drift": -9.0}),
    ("a_lol_seq below the clip", objectives.a_lol_seq, {"clip": 0.2, "drift": 9.0}),
    ("a_lol_ref_free", objectives.a_lol_ref_free, {}),
    ("a_lol_kl", objectives.a_lol_kl, {"beta": 0.4}),
    ("r_lol_kl", objectives.r_lol_kl, {"beta": 0.4}),
    ("a user's", smooth_objective, {"power": 0.7}),
]
SCALINGS: list[dict[str, Any]] = [{}, {"softcap": 3.0}, {"temperature": 0.7, "logit_scale": 1.3}]
REDUCTIONS = ("seq-mean", "token-mean", "seq-mean-token-mean", "sum")


def side_inputs(objective: Callable[..., Tensor], drift: float) -> dict[str, Tensor]:
    side = {
        "ref_logps": (drift - torch.rand(N, dtype=torch.float64) * 3).clamp(max=0),
        "advantages": torch.tensor([0.5, -0.2, 1.5], dtype=torch.float64),
        "rewards": torch.tensor([0.5, 0.2, 1.5], dtype=torch.float64),
    }
    return {k: t for k, t in side.items() if k in lk.side_inputs(objective)}


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "softcap", "scaled"])
@pytest.mark.parametrize("rows_held", [4, 100])
@pytest.mark.parametrize(("name", "objective", "options"), GRADCHECKED)
def test_gradcheck_of_linear_loss(
    name: str,
    objective: Callable[..., Tensor],
    options: dict[str, Any],
    rows_held: int,
    scaling: dict[str, Any],
) -> None:
    options = dict(options)
    side = side_inputs(objective, options.pop("drift", 0.0))
    labels = torch.randint(V, (N,))
    seq = lk.Sequences.from_lengths(LENGTHS)
    # Every reduction and both bias choices come up over the configurations.
    turn = GRADCHECKED.index(next(g for g in GRADCHECKED if g[0] == name)) + len(scaling)
    bias = doubles(V).requires_grad_() if turn % 2 else None

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return lk.linear_loss(
            objective,
            hidden,
            weight,
            labels,
            seq,
            bias=bias,
            reduction=REDUCTIONS[turn % 4],
            memory_budget=rows_held * V * 8,
            **scaling,
            **side,
            **options,
        )

    leaves = (doubles(N, D).requires_grad_(), doubles(V, D).requires_grad_(), bias)
    assert gradcheck(loss, leaves, **EXACT)


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "softcap", "scaled"])
@pytest.mark.parametrize("output", ["logps", "lse", "entropy", "all"])
@pytest.mark.parametrize("op", ["logprob", "linear_logprob", "with bias"])
def test_gradcheck_of_log_probs(output: str, op: str, scaling: dict[str, Any]) -> None:
    labels, mask = torch.randint(V, (N,)), torch.tensor([True] * 4 + [False, True])

    def scored(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Any:
        if weight is None:
            out = lk.logprob(x, labels, **scaling)
        else:
            held = {"bias": bias, "mask": mask, "memory_budget": 2 * V * 8}
            out = lk.linear_logprob(x, weight, labels, **held, **scaling)
        return out[:3] if output == "all" else getattr(out, output)

    leaves = [2 * doubles(N, V)] if op == "logprob" else [doubles(N, D), doubles(V, D), doubles(V)]
    leaves = [t.requires_grad_() for t in leaves][: 2 if op == "linear_logprob" else 3]
    assert gradcheck(scored, leaves, **EXACT)


def test_gradcheck_sees_a_wrong_gradient() -> None:
    """The canary of this file: an unclipped detached ratio is not the derivative of its loss."""
    labels, seq = torch.randint(V, (N,)), lk.Sequences.from_lengths(LENGTHS)
    side = side_inputs(objectives.r_lol, 0.0)
    weight = doubles(V, D)

    def loss(hidden: Tensor) -> Tensor:
        return lk.linear_loss(objectives.r_lol, hidden, weight, labels, seq, clip=None, **side)

    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        gradcheck(loss, (doubles(N, D).requires_grad_(),), eps=1e-6, atol=1e-5, rtol=1e-3)


# --- calls with one backward ----------------------------------------------------------------------

NAMES = ["logprob", "linear_logprob", "a_lol"]
each_call = pytest.mark.parametrize(
    ("name", "backend", "dtype"),
    [(n, b, d) for n in NAMES for b in BACKENDS for d in NARROW[b]],
    ids=str,
)


@each_call
def test_a_second_backward_gives_the_same_gradient_bit_for_bit(
    name: str, backend: str, dtype: torch.dtype
) -> None:
    """Gradients scaled in place in the first backward give .5 and .25 of them in the next."""
    call, leaves = calls(backend, dtype)[name]
    before = [t.detach().clone() for t in leaves]
    out = call()
    upstream = torch.randn_like(out) * 0.5
    runs = [torch.autograd.grad(out, leaves, upstream, retain_graph=True) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    assert all(float(g.abs().max()) > 0 for g in runs[0])
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, leaves, strict=True))


@each_call
def test_backward_is_linear_in_the_upstream_gradient(
    name: str, backend: str, dtype: torch.dtype
) -> None:
    """loss * 2 and loss / 4 scale the gradients exactly: powers of two round nothing."""
    call, leaves = calls(backend, dtype)[name]

    def grads(factor: float) -> tuple[Tensor, ...]:
        return torch.autograd.grad((call() * factor).sum(), leaves)

    unit = grads(1.0)
    doubled, quarter = grads(2.0), grads(0.25)
    for u, twice, less in zip(unit, doubled, quarter, strict=True):
        # float16 rounds what falls below its normal range.
        atol = 1.2e-7 if dtype == torch.float16 else 0.0
        assert float((twice - 2 * u).abs().max()) <= atol
        assert float((less - u / 4).abs().max()) <= atol
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    (scaled,) = torch.autograd.grad(scaler.scale(call().sum()), leaves[:1])
    assert float((scaled - 8 * unit[0]).abs().max()) <= 5 * atol


@pytest.mark.parametrize("name", ["logprob", "linear_logprob"])
@each_backend
def test_upstream_gradients_of_any_layout(name: str, backend: str) -> None:
    """A scalar load of a vector upstream gradient multiplies every row by its first entry."""
    call, leaves = calls(backend, torch.float32)[name]
    values = torch.randn(12)
    one_hot, late = torch.zeros(12), values.clone()
    one_hot[7], late[0] = 1.0, 0.0
    wide, matrix = torch.randn(24), torch.randn(3, 4)
    layouts = {
        "randn": values,
        "stride 0": torch.tensor(1.5).expand(12),
        "every second": wide[::2],
        "transposed": matrix.t().reshape(12),
        "one-hot": one_hot,
        "first is zero": late,
        "zeros": torch.zeros(12),
    }
    for layout, upstream in layouts.items():
        got = torch.autograd.grad(call(), leaves, upstream)
        want = torch.autograd.grad(call(), leaves, upstream.clone().contiguous())
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), layout
        rows = got[0].abs().amax(1) > 0
        assert torch.equal(rows, upstream != 0), layout


PATTERNS = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(b, d, marks=pytest.mark.slow if (b, d) == ("triton", torch.float16) else ())
        for b in BACKENDS
        for d in NARROW[b]
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize(
    "pattern", PATTERNS, ids=lambda p: "".join("hwb"[i] for i in range(3) if p[i]) or "none"
)
def test_every_requires_grad_pattern(
    name: str, backend: str, dtype: torch.dtype, pattern: tuple[bool, ...]
) -> None:
    """Gradients exist exactly where they are asked for, and do not depend on who else asks."""
    call, leaves = calls(backend, dtype)[name]
    full = torch.autograd.grad(call().sum(), leaves)
    for leaf, wanted in zip(leaves, pattern, strict=True):
        leaf.requires_grad_(wanted)
    out = call()
    assert out.requires_grad == any(pattern)
    if any(pattern):
        out.sum().backward()
    for leaf, wanted, whole in zip(leaves, pattern, full, strict=True):
        if not wanted:
            assert leaf.grad is None
        elif name == "a_lol":  # another path may form the same gradient in another order
            # Over whole rows the gradients of half-precision logits are rounded on the way.
            size = 100.0 if not TABLE[backend].panels and dtype != torch.float32 else 10.0
            judges.accept_gradient(leaf.grad, whole, whole.double(), size=size)
        else:
            assert torch.equal(leaf.grad, whole)


@each_call
def test_no_grad_and_inference_mode_give_the_same_values(
    name: str, backend: str, dtype: torch.dtype
) -> None:
    call, _ = calls(backend, dtype)[name]
    recorded = call()
    with torch.no_grad():
        silent = call()
    with torch.inference_mode():
        inference = call()
    assert recorded.requires_grad and not silent.requires_grad and not inference.requires_grad
    # linear_loss scores without holding rows when nothing is to be differentiated.
    tol = 1e-5 if name == "a_lol" else 0.0
    for other in (silent, inference):
        assert float((recorded - other).detach().abs().max()) <= tol


def test_tensors_made_in_inference_mode_work_outside() -> None:
    with torch.inference_mode():
        h, w, labels = torch.randn(4, 3), torch.randn(5, 3), torch.arange(4)
    out = lk.linear_logprob(h, w, labels)
    assert bool(out.logps.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_raises(name: str) -> None:
    call, leaves = calls("cpu", torch.float32)[name]
    out = call().sum()
    with pytest.raises(NotImplementedError, match=r"second derivative"):
        grads = torch.autograd.grad(out, leaves, create_graph=True)
        sum(g.square().sum() for g in grads).backward()


# --- a buffer of the caller's for weight's gradient -----------------------------------------------


@pytest.mark.parametrize("rows", [3, 100])  # held: the others are gone through again
@pytest.mark.parametrize(
    ("name", "backend", "dtype"),
    [
        (n, b, d)
        for n in (*NAMES[1:], "with_entropy")
        for b in ("cpu", "reference", "cuda_host")
        for d in NARROW[b]
    ],
    ids=str,
)
def test_every_backward_adds_to_the_buffer(
    name: str, backend: str, dtype: torch.dtype, rows: int
) -> None:
    call, leaves = calls(backend, dtype)[name]
    hidden, weight, bias = leaves
    want = torch.autograd.grad(call().sum(), leaves, torch.tensor(-0.5))
    for kind in {torch.float32, dtype}:
        start = torch.randn(weight.shape).to(kind)
        buffer = start.clone()
        more = {"entropy_grad": True} if name == "linear_logprob" and rows == 3 else {}
        out = call(accumulate_into=buffer, memory_budget=rows * 300 * 4, **more).sum()
        for times in (1, 2):
            out.backward(torch.tensor(-0.5), retain_graph=True)
            expected = start.double() + times * want[1].double()
            rounding = torch.finfo(kind).eps * times * expected.abs()
            known = 4 * torch.finfo(dtype).eps * float(want[1].abs().max()) + 1e-5
            assert bool(((buffer.double() - expected).abs() <= rounding + known).all())
            for leaf, g in ((hidden, want[0]), (bias, want[2])):
                scale = 4 * torch.finfo(dtype).eps * float(g.abs().max()) + 1e-5
                assert float((leaf.grad - times * g).abs().max()) <= 2 * scale
        assert weight.grad is None
        hidden.grad = bias.grad = None


def test_the_buffer_is_added_to_where_weight_grad_would_be() -> None:
    for name in ("linear_logprob", "a_lol"):
        call, (hidden, weight, bias) = calls("cpu", torch.float32)[name]
        buffer = torch.zeros_like(weight, requires_grad=False)
        with torch.no_grad():
            call(accumulate_into=buffer)
        call(accumulate_into=buffer).sum().backward(inputs=[hidden, bias])
        torch.autograd.grad(call(accumulate_into=buffer).sum(), [hidden])
        with pytest.raises(RuntimeError, match=r"which accumulate_into takes: call backward"):
            torch.autograd.grad(call(accumulate_into=buffer).sum(), [weight])
        with (
            pytest.raises(NotImplementedError, match="second derivative"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of the reference cycle
            call(accumulate_into=buffer).sum().backward(create_graph=True)
        assert not buffer.any()
        outs = [call(accumulate_into=buffer).sum() for _ in range(2)]
        for out in outs:  # the first backward writes into what the second call was given
            out.backward()
        (want,) = torch.autograd.grad(call().sum(), [weight])
        assert weight.grad is None
        assert float((buffer - 2 * want).abs().max()) <= 1e-5 and bool(want.any())


def test_a_tied_weight_adds_both_gradients_to_its_own() -> None:
    table = torch.randn(30, 8, requires_grad=True)
    ids, labels = torch.randint(30, (10,)), torch.randint(30, (10,))
    seq = lk.Sequences.from_lengths([10])

    def loss(**more: Any) -> Tensor:
        return lk.linear_loss(objectives.nll, F.embedding(ids, table), table, labels, seq, **more)

    (want,) = torch.autograd.grad(loss(), [table])
    table.grad = torch.zeros_like(table)
    for times in (1, 2):
        loss(accumulate_into=table.grad).backward()
        assert float((table.grad - times * want).abs().max()) <= 1e-6


@pytest.mark.parametrize("name", ["linear_logprob", "a_lol"])
def test_a_compiled_call_adds_to_the_buffer(name: str) -> None:
    torch._dynamo.reset()
    call, (_, weight, _) = calls("cpu", torch.float32)[name]
    (want,) = torch.autograd.grad(call().sum(), [weight])
    compiled = torch.compile(call, backend="aot_eager")
    buffer = torch.zeros_like(weight, requires_grad=False)
    for times in (1, 2):
        compiled(accumulate_into=buffer).sum().backward()
        assert float((buffer - times * want).abs().max()) <= 1e-5
    assert weight.grad is None


# --- what stands before and after the ops ---------------------------------------------------------


@each_backend
@pytest.mark.parametrize("producer", [torch.tanh, lambda t: t.softmax(-1), torch.sigmoid])
def test_a_producer_that_saved_its_output_gets_the_right_gradient(
    backend: str, producer: Callable[[Tensor], Tensor]
) -> None:
    """Writing gradients over an input corrupts the op before it, which saved that tensor."""
    base, labels = torch.randn(9, 30), torch.randint(30, (9,))
    for op in ("logprob", "linear_loss"):
        x = base.clone().requires_grad_()
        y = producer(x)
        if op == "logprob":
            loss = -lk.logprob(y, labels, backend=backend).logps.sum()
        else:
            seq = lk.Sequences.from_lengths([4, 5])
            loss = lk.linear_loss(
                objectives.nll, y, torch.eye(30), labels, seq, reduction="sum", backend=backend
            )
        kept = y.detach().clone()
        loss.backward()
        assert torch.equal(kept, y.detach())
        z = base.double().requires_grad_()
        F.cross_entropy(producer(z), labels, reduction="sum").backward()
        assert float((x.grad - z.grad).abs().max()) <= 1e-6


def test_gradients_are_handed_over_and_added_up() -> None:
    """Those made in the forward: writing into what was handed over must not reach the graph."""
    call, leaves = calls("cpu", torch.float32)["a_lol"]
    loss = call()
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in leaves]
    for t in leaves:
        t.grad.zero_()
    for times in (1, 2):
        loss.backward(retain_graph=True)
        assert all(torch.equal(t.grad, times * g) for t, g in zip(leaves, once, strict=True))


def test_a_tied_weight_gets_both_gradients() -> None:
    table = torch.randn(30, 8, requires_grad=True)
    ids, labels = torch.randint(30, (10,)), torch.randint(30, (10,))
    seq = lk.Sequences.from_lengths([10])
    h = F.embedding(ids, table)
    lk.linear_loss(objectives.nll, h, table, labels, seq, reduction="sum").backward()
    other = table.detach().double().requires_grad_()
    F.cross_entropy(F.embedding(ids, other) @ other.T, labels, reduction="sum").backward()
    assert float((table.grad - other.grad).abs().max()) <= 1e-5


GRID = [(h, w) for h in HALF for w in HALF]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("hidden_dtype", "weight_dtype"), GRID, ids=str)
def test_every_pair_of_dtypes_works_forward_and_backward(
    hidden_dtype: torch.dtype, weight_dtype: torch.dtype, autocast: bool
) -> None:
    p = peaky(20, 8, 60, dtype=hidden_dtype, weight_dtype=weight_dtype)
    seq = lk.Sequences.from_lengths([8, 12])
    truth = eager(p.double()).logps
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        h, w = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
        out = lk.linear_logprob(h, w, p.labels)
        judges.accept_logprobs(out.logps, truth)
        by_op = torch.autograd.grad(out.logps.sum(), (h, w))
        loss = lk.linear_loss(objectives.nll, h, w, p.labels, seq, reduction="sum")
        by_loss = torch.autograd.grad(-loss, (h, w))
    for leaf, a, b in zip((h, w), by_op, by_loss, strict=True):
        assert a.dtype == b.dtype == leaf.dtype
        judges.accept_gradient(a, b, b.double(), size=10.0)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "which", ["linear_logprob", "logprob", "linear_loss", "side input", "low rank"]
)
def test_forward_mode_raises_instead_of_giving_zero(which: str) -> None:
    h, w, labels = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([0, 6, 2, 1])
    seq, ref = lk.Sequences.from_lengths([3, 1]), -torch.ones(4)

    def call(x: Tensor) -> Tensor:
        if which == "linear_logprob":
            return lk.linear_logprob(x, w, labels).logps
        if which == "logprob":
            return lk.logprob(x @ w.T, labels).logps
        if which == "linear_loss":
            return lk.linear_loss(objectives.nll, x, w, labels, seq)
        if which == "low rank":
            both = torch.ones(4, 1), x.sum() * torch.ones(7, 1)
            return lk.linear_logprob(h, w, labels, low_rank=both).logps
        side = {"ref_logps": ref * x.square().sum(), "advantages": torch.ones(2)}
        return lk.linear_loss(objectives.a_lol, h, w, labels, seq, **side)

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(call, (h,), (torch.ones_like(h),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(h, torch.ones_like(h))
        with pytest.raises(NotImplementedError, match="has a forward-mode tangent"):
            call(dual)
