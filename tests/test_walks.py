"""The walk over whole rows beside the walk over panels, its checks that do not wait, and memory.

The reference backend stands in for a GPU's: it is told to take whole rows. The first tests walk
with the CUDA kernels too, as g++ compiles them. (What kernels compute is in test_backends_*.py.)
"""

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lolkernels as lk
from lolkernels import deferred, gemm, memory, objectives, step, walk_cpu, walk_gpu
from lolkernels.backends import TABLE
from lolkernels.backends.contract import Exps
from lolkernels.packing import plan_blocks
from lolkernels.walk import Coefficients

N, D, V = 40, 24, 2100  # more than one panel, not a multiple of 16
LENGTHS = [7, 0, 12, 1, 20]
INF = math.inf


@pytest.fixture
def whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "reference", TABLE["reference"]._replace(panels=False))


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Values are checked as on a GPU."""
    monkeypatch.setattr(deferred, "immediate", lambda device: False)
    monkeypatch.setattr(deferred, "check_values", lambda name, value: None)
    yield
    deferred._flags.clear()


def problem(dtype: torch.dtype = torch.float32, *, frozen: bool = False, bias: bool = False) -> Any:
    hidden = torch.randn(N, D).to(dtype).requires_grad_()
    weight = (torch.randn(V, D) * 0.3).to(dtype).requires_grad_(not frozen)
    b = torch.randn(V).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(V, (N,))
    leaves = [t for t in (hidden, weight, b) if t is not None and t.requires_grad]
    return SimpleNamespace(hidden=hidden, weight=weight, bias=b, labels=labels, leaves=leaves)


def a_lol(
    p: Any, lengths: list[int] = LENGTHS, backend: str = "reference", **options: Any
) -> tuple[Any, ...]:
    seq = lk.Sequences.from_lengths(lengths)
    advantages = torch.tensor([1.0, 0.5, -1.0, 2.0, 0.7])[: len(lengths)]
    out = lk.linear_loss(
        objectives.a_lol,
        p.hidden,
        p.weight,
        p.labels,
        seq,
        bias=p.bias,
        ref_logps=torch.linspace(-9, -5, sum(lengths)),
        advantages=advantages,
        backend=backend,
        return_outputs=True,
        **options,
    )
    results = [*out[:-1], *out.metrics.values()]
    return results, torch.autograd.grad(out.loss, p.leaves)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    scale = float(want.double().nan_to_num().abs().max()) or 1.0
    torch.testing.assert_close(
        got.double(), want.double(), rtol=0, atol=tolerance * scale, equal_nan=True
    )


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# bytes of logits: a row or two, a few groups, everything
BUDGETS = {"rows": 2 * V * 4, "groups": 14 * V * 4, "default": None}


WALKERS = [
    pytest.param(backend, dtype, id=f"{backend}-{dtype}")
    for backend in ("reference", "cuda_host")
    for dtype in TOLERANCE
    if dtype in TABLE[backend].dtypes
]


@pytest.mark.parametrize(("backend", "dtype"), WALKERS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_linear_loss_is_that_of_the_panels(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    dtype: torch.dtype,
    frozen: bool,
    bias: bool,
    budget: str,
) -> None:
    p = problem(dtype, frozen=frozen, bias=bias)
    options = {"memory_budget": BUDGETS[budget], "softcap": 20.0, "temperature": 0.8}
    want, want_grads = a_lol(p, **options)
    monkeypatch.setitem(TABLE, "reference", TABLE["reference"]._replace(panels=False))
    got, got_grads = a_lol(p, backend=backend, **options)
    for a, b in zip(got, want, strict=True):
        close(a, b, min(TOLERANCE[dtype], 1e-5))  # the forward rounds nothing
    for a, b in zip(got_grads, want_grads, strict=True):
        assert a.dtype == b.dtype
        close(a, b, TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "dtype"), WALKERS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_linear_logprob_is_that_of_the_panels(
    monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype, budget: str
) -> None:
    p = problem(dtype, bias=True)
    mask = torch.rand(N) < 0.7

    def run(backend: str) -> list[Tensor]:
        out = lk.linear_logprob(
            p.hidden,
            p.weight,
            p.labels,
            bias=p.bias,
            mask=mask,
            backend=backend,
            memory_budget=BUDGETS[budget],
        )
        total = out.logps.sum() + 0.3 * out.entropy.sum() - 0.2 * out.lse.sum()
        return [*out, *torch.autograd.grad(total, p.leaves)]

    want = run("reference")
    monkeypatch.setitem(TABLE, "reference", TABLE["reference"]._replace(panels=False))
    got = run(backend)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        close(a, b, min(TOLERANCE[dtype], 1e-5) if i < 4 else TOLERANCE[dtype])


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_operands_of_two_dtypes_are_multiplied_in_fp32(
    whole_rows: None, hidden_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    p = problem()
    hidden, weight = p.hidden.detach().to(hidden_dtype), p.weight.detach().to(weight_dtype)
    out = lk.linear_logprob(hidden, weight, p.labels, backend="reference")
    truth = torch.log_softmax(hidden.double() @ weight.double().T, 1)[range(N), p.labels]
    close(out.logps, truth, 1e-5)


def test_without_fp32_products_of_half_precision_the_panels_serve(
    whole_rows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem(torch.bfloat16)
    monkeypatch.setattr(gemm, "has_fp32_output", lambda device, dtype: False)
    calls = []
    monkeypatch.setattr(
        walk_cpu,
        "matmul",
        lambda a, b, out, **k: (calls.append(a.dtype), gemm.matmul(a, b, out, **k)),
    )
    a_lol(p)
    assert calls and set(calls) == {torch.float32}


@pytest.mark.parametrize("backend", ["reference", "cuda_host"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_where_the_exponentials_of_whole_rows_lie(
    whole_rows: None,
    monkeypatch: pytest.MonkeyPatch,
    frozen: bool,
    dtype: torch.dtype,
    backend: str,
) -> None:
    """Those that are kept apart; the others over the beginnings of the rows of logits."""
    seen = []

    def spy(x: Tensor, *args: Any, out: Tensor, **options: Any) -> Any:
        assert out.dtype == dtype and out.shape == x.shape == (x.shape[0], V)
        assert x.dtype == torch.float32 and x.stride(0) % 16 == 0
        assert (out.data_ptr() == x.data_ptr()) is frozen
        assert not frozen or out.stride() == (2 * x.stride(0), 1)
        seen.append(x.shape[0])
        return real(x, *args, out=out, **options)

    real = TABLE[backend].exps_
    monkeypatch.setitem(TABLE, backend, TABLE[backend]._replace(exps_=spy))
    a_lol(problem(dtype, frozen=frozen), backend=backend)
    assert sum(seen) == 28  # the tokens of sequences with an advantage


@pytest.mark.parametrize("size", [1e-4, 1e-6, 1e-8])
def test_small_coefficients_survive_fp16(
    whole_rows: None, monkeypatch: pytest.MonkeyPatch, size: float
) -> None:
    p = problem(torch.float16)

    def errors() -> list[float]:
        logps = lk.linear_logprob(p.hidden, p.weight, p.labels, backend="reference").logps
        by_logprob = torch.autograd.grad(logps.double() @ torch.full((N,), size).double(), p.leaves)
        seq = lk.Sequences.from_lengths([N]).with_totals(num_tokens=round(1 / size))
        loss = lk.linear_loss(
            objectives.nll, p.hidden, p.weight, p.labels, seq, reduction="token-mean",
            backend="reference", memory_budget=20 * V * 2,  # several blocks
        )  # fmt: skip
        # The upstream gradient of a loss scaler: fp16 could not hold these gradients otherwise.
        by_loss = torch.autograd.grad(loss * (1 / size), p.leaves)
        h, w = (t.detach().double().requires_grad_() for t in p.leaves)
        truth = torch.log_softmax(h @ w.T, 1)[range(N), p.labels].sum()
        want = torch.autograd.grad(truth, (h, w))
        found = []
        for a, b, c in zip(by_logprob, by_loss, want, strict=True):
            top = float(c.abs().max())
            if size > 1e-5:  # what fp16 gradients can hold
                found.append(float((a.double() / size - c).abs().max()) / top)
            found.append(float((-b.double() - c).abs().max()) / top)
        return found

    assert max(errors()) <= (0.02 if size > 1e-5 else 2e-3)
    monkeypatch.setattr(walk_gpu, "_power_of_two", torch.ones_like)
    assert size > 1e-5 or max(errors()) > 0.01


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_coefficients_of_all_sizes_survive_fp16(
    whole_rows: None, budget: str, frozen: bool
) -> None:
    """Rewards over nine orders of magnitude: each row of dhidden keeps its own digits."""
    p = problem(torch.float16, frozen=frozen, bias=not frozen)
    seq, rewards = lk.Sequences.from_lengths([10, 10, 10, 10]), torch.tensor([1e5, 1e2, 1.0, 1e-4])

    def grads(p: Any, backend: str) -> Any:
        loss = lk.linear_loss(
            objectives.wbc,
            p.hidden,
            p.weight,
            p.labels,
            seq,
            bias=p.bias,
            rewards=rewards,
            backend=backend,
            memory_budget=BUDGETS[budget],
        )
        return torch.autograd.grad(loss * 1e-3, p.leaves)

    exact = SimpleNamespace(
        **{k: None if v is None else v.detach() for k, v in vars(p).items() if k != "leaves"}
    )
    exact.hidden, exact.weight = exact.hidden.double(), exact.weight.double()
    exact.bias = None if exact.bias is None else exact.bias.double()
    exact.leaves = [getattr(exact, k) for k in ("hidden", "weight", "bias")][: len(p.leaves)]
    for leaf in exact.leaves:
        leaf.requires_grad_()
    for got, want in zip(grads(p, "reference"), grads(exact, "reference"), strict=True):
        assert got.isfinite().all()
        close(got, want, 3e-3)
        if got.shape == p.hidden.shape:
            for rows in (slice(0, 10), slice(10, 20), slice(20, 30)):
                close(got[rows], want[rows], 3e-3)


def test_an_all_zero_upstream_gradient_gives_zeros_in_fp16(whole_rows: None) -> None:
    p = problem(torch.float16)
    logps = lk.linear_logprob(p.hidden, p.weight, p.labels, backend="reference").logps
    for grad in torch.autograd.grad((logps * 0).sum(), p.leaves):
        assert torch.equal(grad, torch.zeros_like(grad))


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("confident", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("backend", "dtype", "bound"),
    [
        ("reference", torch.bfloat16, 2e-3),  # bf16 itself rounds by 1.7e-3 in the mean
        ("cuda_host", torch.bfloat16, 2e-3),
        ("cpu", torch.bfloat16, 2e-3),
        ("cpu", torch.float32, 2e-5),
    ],
)
def test_the_gradients_of_labels_near_one_keep_their_digits(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    dtype: torch.dtype,
    bound: float,
    confident: float,
) -> None:
    """1 - p down to 1e-9: lse - z_y in fp32 has no digit left there, the sum of the others has."""
    if backend == "reference":
        monkeypatch.setitem(TABLE, backend, TABLE[backend]._replace(panels=False))
    n, d, v, sure = 96, 256, 2500, int(96 * confident)
    w, h = torch.randn(v, d, dtype=torch.float64), torch.randn(n, d, dtype=torch.float64) * 0.2
    labels = torch.randint(v, (n,))
    own = w[labels[:sure]]
    gap = torch.linspace(13, 34, sure, dtype=torch.float64) / own.square().sum(1)
    h[:sure] = own * gap[:, None] + 0.05 * torch.randn(sure, d)
    h, w = h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (h, w)]
    truth = torch.log_softmax(exact[0] @ exact[1].T, 1)[range(n), labels]
    assert confident == 0 or float(-truth[:sure].detach().expm1().max()) < 1e-8
    coef = torch.rand(n) + 0.5
    want = torch.autograd.grad(truth @ coef.double(), exact)
    got = torch.autograd.grad(lk.linear_logprob(h, w, labels, backend=backend).logps @ coef, (h, w))
    for a, b in zip(got, want, strict=True):
        assert float((a.double() - b).norm() / b.norm()) <= bound
    worst = (got[0].double() - want[0]).norm(dim=1) / want[0].norm(dim=1)
    assert float(worst.max()) <= 3 * bound


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("op", ["linear_loss", "linear_logprob"])
def test_half_operands_of_fp32_masters(
    whole_rows: None, monkeypatch: pytest.MonkeyPatch, op: str, frozen: bool
) -> None:
    """What autocast asks for: statistics and the master's gradient stay fp32."""
    p = problem(frozen=frozen)
    half = [t.detach().bfloat16().double().requires_grad_() for t in (p.hidden, p.weight)]
    seq = lk.Sequences.from_lengths([10, 30])

    def run(h: Tensor, w: Tensor, leaves: list[Tensor]) -> Any:
        logps = lk.linear_logprob(h, w, p.labels, backend="reference").logps
        loss = logps.square().sum() / 9
        if op == "linear_loss":
            loss = lk.linear_loss(objectives.nll, h, w, p.labels, seq, backend="reference")
        return logps, torch.autograd.grad(loss, leaves)

    want, want_grads = run(*half, half[: len(p.leaves)])
    for name in ("lolkernels.logprob", "lolkernels.loss"):
        monkeypatch.setattr(sys.modules[name], "operand", lambda *_: torch.bfloat16)
    got, grads = run(p.hidden, p.weight, p.leaves)
    assert got.dtype == torch.float32
    close(got, want, 2e-6)
    for a, b in zip(grads, want_grads, strict=True):
        assert a.dtype == torch.float32
        close(a, b, 5e-3)


def test_the_operands_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
    monkeypatch.setattr(gemm, "has_fp32_output", lambda device, dtype: True)

    def operands(hidden: torch.dtype, weight: torch.dtype, panels: bool = False) -> torch.dtype:
        h, w = (SimpleNamespace(device=torch.device("cuda"), dtype=d) for d in (hidden, weight))
        return gemm.operand_dtype(h, w, panels=panels)  # type: ignore[arg-type]

    assert [operands(d, d) for d in (f32, bf16, f16, f64)] == [f32, bf16, f16, f64]
    assert operands(bf16, f32) == operands(f32, bf16) == f32
    assert operands(bf16, bf16, panels=True) == f32 and operands(f64, f64, panels=True) == f64
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: bf16)
    assert operands(f32, f32) == operands(bf16, f32) == operands(f16, f16) == bf16
    assert operands(f64, f64) == f64


@pytest.mark.parametrize("flag", ["high", "medium"])
def test_no_flag_reaches_fp32_products(flag: str) -> None:
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    seen: list[tuple[str, ...]] = []
    real = TABLE["cpu"].exps_

    def spy(*args: Any, **options: Any) -> Any:
        seen.append(tuple(s.fp32_precision for s in settings))
        return real(*args, **options)

    p = problem()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(flag)
        asked = tuple(s.fp32_precision for s in settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(TABLE, "cpu", TABLE["cpu"]._replace(exps_=spy))
            got = a_lol(p, backend="cpu")
        assert tuple(s.fp32_precision for s in settings) == asked  # as the caller left them
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {("ieee", "ieee")} and asked != ("ieee", "ieee")
    want = a_lol(p, backend="cpu")
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


# --- checks that do not wait ----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [V, -1, 2**40])
def test_a_bad_label_spoils_its_row_and_raises_at_the_next_call(
    whole_rows: None, unhurried: None, bad: int
) -> None:
    p = problem()
    labels = p.labels.clone()
    labels[3] = bad
    out = lk.linear_logprob(p.hidden, p.weight, labels, backend="reference")
    good = torch.arange(N) != 3
    truth = torch.log_softmax(p.hidden.double() @ p.weight.double().T, 1)[range(N), p.labels]
    close(out.logps[good], truth[good], 1e-5)
    assert out.logps[3].isnan() and out.lse[3].isnan() and out.entropy[3].isnan()
    (grad,) = torch.autograd.grad(out.logps[3], p.hidden)
    assert grad[3].isnan().all() and not grad[good].isnan().any()
    with pytest.raises(ValueError, match=r"labels held an id outside \[0, vocab\).*mask"):
        lk.linear_logprob(p.hidden, p.weight, p.labels, backend="reference")
    lk.linear_logprob(p.hidden, p.weight, p.labels, backend="reference")  # raised once


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("objective", [objectives.nll, objectives.a_lol])
def test_a_bad_label_spoils_the_loss_and_the_gradients(
    whole_rows: None, unhurried: None, objective: Any, budget: str, frozen: bool
) -> None:
    p = problem(frozen=frozen)
    labels = p.labels.clone()
    labels[3] = V
    side = (
        {}
        if objective is objectives.nll
        else {"ref_logps": torch.zeros(N), "advantages": torch.ones(1)}
    )
    loss = lk.linear_loss(
        objective,
        p.hidden,
        p.weight,
        labels,
        lk.Sequences.from_lengths([N]),
        backend="reference",
        memory_budget=BUDGETS[budget],
        **side,
    )
    assert loss.isnan()
    for grad in torch.autograd.grad(loss, p.leaves):
        assert grad.isnan().any()
    with pytest.raises(ValueError, match="labels held"):
        lk.check_errors()
    lk.check_errors()


def test_existing_logits_with_a_bad_label(unhurried: None) -> None:
    logits = torch.randn(5, 9, requires_grad=True)
    labels = torch.tensor([1, 9, 2, 3, 4])
    out = lk.logprob(logits, labels, backend="reference")
    (grad,) = torch.autograd.grad(out.logps.sum(), logits)
    spoilt = torch.tensor([False, True, False, False, False])
    assert torch.equal(out.logps.isnan(), spoilt) and torch.equal(grad.isnan().any(1), spoilt)
    with pytest.raises(ValueError, match="labels held"):
        lk.logprob(logits, labels, backend="reference")


def test_a_nan_advantage_raises_later(whole_rows: None, unhurried: None) -> None:
    p = problem()
    seq = lk.Sequences.from_lengths([N])
    side = {"ref_logps": torch.zeros(N), "advantages": torch.tensor([math.nan])}
    call = (objectives.a_lol, p.hidden, p.weight, p.labels, seq)
    assert lk.linear_loss(*call, backend="reference", **side).isnan()
    with pytest.raises(ValueError, match="objective was nan"):
        lk.linear_loss(*call, backend="reference", **side)


def test_two_faults_are_both_named(unhurried: None) -> None:
    there = torch.device("cpu")
    deferred.note(deferred.LABEL, torch.tensor([True]))
    deferred.note(deferred.LABEL, torch.tensor([False]))  # a good call does not clear the flag
    deferred.note(deferred.NAN, torch.tensor([False, True]))
    deferred.send(there)
    with pytest.raises(ValueError, match=r"labels held.*objective was nan"):
        deferred.raise_noted(there)
    deferred.raise_noted(there)


def test_strict_mode_raises_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not deferred.immediate(torch.device("cuda"))
    monkeypatch.setenv("LOLKERNELS_STRICT", "1")
    assert deferred.immediate(torch.device("cuda"))


@pytest.mark.parametrize("poison", [1.0, math.nan, INF])
def test_masked_rows_take_part_as_zeros(
    whole_rows: None, monkeypatch: pytest.MonkeyPatch, poison: float
) -> None:
    p = problem(bias=True)
    labels = p.labels.clone()
    mask = torch.rand(N) < 0.6
    labels[~mask] = -100
    with torch.no_grad():
        p.hidden[~mask] = poison

    def run() -> list[Tensor]:
        out = lk.linear_logprob(p.hidden, p.weight, labels, bias=p.bias, backend="reference")
        upstream = torch.where(mask, 1.0, math.nan)
        return [*out, *torch.autograd.grad(out.logps, p.leaves, upstream)]

    want = run()
    monkeypatch.setattr(deferred, "immediate", lambda device: False)
    got = run()
    for a, b in zip(got, want, strict=True):
        assert not b.isnan().any()
        close(a, b, 1e-6)
    for a in got[:5]:
        assert not a[~mask].any()
    deferred.check_errors()


def test_a_chunk_of_sequences_needs_nothing_from_the_host() -> None:
    """Pieces that follow one another are views and arithmetic of what stands on the device."""
    seq = lk.Sequences.from_lengths([3, 0, 4, 2]).with_totals(num_sequences=9, num_tokens=50)
    for which, rows, lengths in (
        (slice(0, 4), slice(0, 9), [3, 0, 4, 2]),
        (slice(1, 3), slice(3, 7), [0, 4]),
        (slice(0, 3), slice(1, 5), [2, 0, 2]),  # both ends cut
        ([0, 3], torch.tensor([0, 1, 2, 7, 8]), [3, 2]),
    ):
        part = seq.part(which, rows, lengths)
        want = lk.Sequences.from_lengths(lengths)
        for name in ("cu_seqlens", "token_to_sequence", "offsets"):
            assert torch.equal(getattr(part, name), getattr(want, name)), name
        assert part.lengths.tolist() == seq.lengths[which].tolist()  # of the whole sequences
        assert (part.num_sequences, part.num_tokens) == (want.num_sequences, want.num_tokens)
        assert (part.total_sequences, part.total_tokens) == (9, 50)


# --- memory ---------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """The peak of the bytes of all storages made under it."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.inputs = {StorageWeakRef(t.untyped_storage()).cdata for t in inputs}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                ref = StorageWeakRef(storage)
                if ref.cdata not in self.inputs:
                    self.made.setdefault(ref.cdata, (ref, storage.nbytes()))
        self.made = {k: (r, n) for k, (r, n) in self.made.items() if not r.expired()}
        self.peak = max(self.peak, sum(n for _, n in self.made.values()))
        return out


def step_of(
    op: str,
    h: Tensor,
    w: Tensor,
    seq: Any,
    budget: int | None,
    frozen: bool,
    into: Any,
    low: Tensor | None,
    up: Tensor | None,
) -> Any:
    """Forward and backward through the bodies of the ops: a dispatch mode sees inside no op."""
    ops = {m: sys.modules[f"lolkernels.{m}"] for m in ("linear", "logprob", "loss")}
    h = h if low is None else torch.cat([h, low], 1)
    n, y = h.shape[0], torch.zeros(h.shape[0], dtype=torch.int64)
    operand = ops["linear"].operand(h, w, "reference")
    common = ((1.0, 0.0, 1.0), "reference", budget, operand)

    def dweight(coef: list[Tensor], both: Any, stats: list[Tensor], kept: Tensor) -> Tensor:
        body = ops["linear"]._gradients
        return body(
            *(into, coef, both, None, stats, kept, h, w, y, None, up, *common),
            *(False, [False, True, False]),
        )[1]

    if op == "linear_loss":
        call = step.bind(objectives.nll, (), (), "reference", operand)
        parts = [seq.cu_seqlens, seq.lengths, seq.token_to_sequence, seq.totals]
        weights, need = torch.ones(seq.num_sequences), [True, not frozen, False]
        out = ops["loss"]._op._init_fn(
            h, w, y, None, up, parts, [], weights, common[0], budget, call, need, into
        )
        g = torch.ones(())
        dh = (out[7] * g).to(h.dtype)
        if frozen:
            return [dh]
        if out[11].shape[0]:
            a, b, both, slope, rest, share = out[11]
            stats = [out[2], out[3], slope, rest, share]
            return [dh, dweight([a * g, b * g], both * g, stats, out[10])]
        made, out[8] = out[8], None
        return [dh, ops["loss"]._scaled(made, g, h.dtype)]
    need = [op != "score", op != "score" and not frozen, False]
    out = ops["logprob"]._op._init_fn(h, w, y, None, up, False, *common, need, into)
    if op == "score":
        return []
    logps, lse, entropy, _, slope, rest, share, unit, kept = out
    coef = Coefficients.of(lse, entropy, {"logps": torch.ones(n)})
    dh = (unit * -coef.b[:, None]).to(h.dtype)
    if frozen:
        return [dh]
    return [dh, dweight([coef.a, coef.b], None, [logps, lse, slope, rest, share], kept)]


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("op", "head"),
    [
        (op, head)
        for op in ("linear_loss", "linear_logprob")
        for head in ("frozen", "trained", "added", "added in float32", "low rank")
    ]
    + [("score", "trained")],
)
@pytest.mark.parametrize(
    ("n", "rows", "length"),
    [(300, None, 100), (2048, 300, 100), (2000, 900, 100), (2000, None, 1000)],
)
def test_the_memory_formula(
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
    dtype: torch.dtype,
    op: str,
    head: str,
    n: int,
    rows: int | None,
    length: int,  # of a sequence: 1,000 rows are more than a CPU keeps otherwise
) -> None:
    """Kernels and products that allocate nothing stand in: what is left is the walks' own."""
    d, v, device = 96, 20_001, "cuda" if gpu else "cpu"
    there = torch.device(device)
    budget = None if rows is None else rows * v * 4
    held = memory.kept_rows
    card = 2**36  # stands for a card that is not here

    def kept(
        v: int, d: int, size: int, budget: Any, device: Any = None, longest: Any = None
    ) -> int:
        return held(v, d, size, budget, there, longest, card)

    def sums(x: Tensor, labels: Tensor, anchor: Any = None, **options: Any) -> Exps:
        return Exps(*(x.new_zeros(x.shape[0], dtype=torch.float32) for _ in range(6)))

    def dlogits(x: Tensor, *args: Any, out: Tensor, **options: Any) -> Tensor:
        return out

    stand_in = TABLE["reference"]._replace(
        panels=device == "cpu",
        exps_=sums,
        sums=sums,
        dlogits_=dlogits,
        finish=lambda *args: None,
        add_labels=lambda *args: None,
    )
    monkeypatch.setitem(TABLE, "reference", stand_in)
    monkeypatch.setattr(memory, "kept_rows", kept)
    for walk in (walk_cpu, walk_gpu):
        monkeypatch.setattr(walk, "matmul", lambda a, b, out, **options: None)
    hidden, weight = torch.zeros(n, d, dtype=dtype), torch.zeros(v, d, dtype=dtype)
    seq = lk.Sequences.from_lengths([length] * (n // length) + [n % length])
    into = None
    if head.startswith("added"):
        into = torch.zeros_like(weight, dtype=torch.float32 if "32" in head else dtype)
    rank = 32 if head == "low rank" else 0
    parts = [torch.zeros(size, rank, dtype=dtype) for size in (n, v)] if rank else [None, None]
    with LiveBytes(*(t for t in (hidden, weight, into, *parts) if t is not None)) as live:
        made = step_of(op, hidden, weight, seq, budget, head == "frozen", into, *parts)
    gradients = sum(g.numel() * g.element_size() for g in made)
    size = dtype.itemsize if device == "cuda" else 4
    monkeypatch.setattr(memory, "kept_rows", held)
    most = held(v, d, size, budget, there, length, card)
    plan = plan_blocks(seq.cu_seqlens.tolist(), most)
    stated = memory.extra_bytes(
        op,
        num_rows=n,
        hidden_size=d,
        vocab=v,
        longest_block=max(b.stop - b.start for b in plan),
        hidden_bytes=dtype.itemsize,
        weight_bytes=dtype.itemsize,
        frozen_weight=head == "frozen",
        memory_budget=budget,
        device=device,
        card=card,
        buffer_bytes=None if into is None else into.itemsize,
        rank=rank,
    )
    assert abs((live.peak - gradients) / stated - 1) <= 0.05, (live.peak - gradients, stated)
