"""Special values: the truth table of infinities and NaN, overflow, masked poison, no rows."""

import math
from typing import Any

import pytest
import torch
from cases import each_backend, each_dtype
from judges import peaky
from torch import Tensor

import lolkernels as lk
from lolkernels import deferred, objectives

INF, NAN = math.inf, math.nan
# Triton's interpreter is slow: its longest tables belong to the exhaustive run.
patient = pytest.mark.parametrize(
    "backend", ["cpu", pytest.param("triton", marks=pytest.mark.slow), "reference"]
)


# --- rows of logits -------------------------------------------------------------------------------

# name: (row, label, logp, lse, entropy, max_logit), "finite" where softmax gives the number
ROWS: dict[str, tuple[list[float], int, Any, Any, Any, Any]] = {
    "one class": ([3.0], 0, 0.0, 3.0, 0.0, 3.0),
    "two equal": ([1.0, 1.0], 1, -math.log(2), 1 + math.log(2), math.log(2), 1.0),
    "one class at -inf": ([2.0, -INF], 0, 0.0, 2.0, 0.0, 2.0),
    "label at -inf": ([2.0, -INF], 1, -INF, 2.0, 0.0, 2.0),
    "all -inf": ([-INF, -INF], 0, NAN, -INF, NAN, -INF),
    "only class at -inf": ([-INF], 0, NAN, -INF, NAN, -INF),
    "+inf elsewhere": ([0.0, INF], 0, NAN, NAN, NAN, INF),
    "+inf at the label": ([INF, 0.0], 0, NAN, NAN, NAN, INF),
    "NaN elsewhere": ([0.0, NAN, 1.0], 0, NAN, NAN, NAN, NAN),
    "NaN at the label": ([NAN, 0.0, 1.0], 0, NAN, NAN, NAN, NAN),
    "very large": ([6e4, 0.0], 0, 0.0, 6e4, 0.0, 6e4),
    "very large, other label": ([6e4, 0.0], 1, -6e4, 6e4, 0.0, 6e4),
    "very negative": ([-6e4, -6e4], 0, -math.log(2), -6e4 + math.log(2), math.log(2), -6e4),
    "shifted by 100": ([100.0, 101.0], 1, -math.log1p(math.exp(-1)), "finite", "finite", 101.0),
    "shifted by -100": ([-100.0, -101.0], 0, -math.log1p(math.exp(-1)), "finite", "finite", -100.0),
    "zeros": ([0.0] * 7, 3, -math.log(7), math.log(7), math.log(7), 0.0),
}


def agrees(got: Tensor, want: Any, atol: float) -> bool:
    value = got.item()
    if want == "finite":
        return math.isfinite(value)
    if math.isnan(want):
        return math.isnan(value)
    if math.isinf(want):
        return value == want
    return abs(value - want) <= atol


def is_nan_row(name: str) -> bool:
    """+inf and NaN spoil their row: lse must not look usable."""
    return "+inf" in name or "NaN" in name


@each_backend
@each_dtype
@pytest.mark.parametrize("name", list(ROWS))
def test_the_truth_table_of_rows(name: str, dtype: torch.dtype, backend: str) -> None:
    row, label, *want = ROWS[name]
    logits = torch.tensor([row, row]).to(dtype)
    out = lk.logprob(logits, torch.tensor([label, label]), backend=backend)
    # Rounded logits are the inputs: 6e4 is not a bfloat16.
    if name.startswith("very"):
        x = logits.double()[0]
        lse = float(torch.logsumexp(x, 0))
        want = [float(x[label]) - lse, lse, want[2], float(x.max())]
    finite = logits[logits.isfinite()].abs()
    atol = 2e-5 + 1.2e-7 * (float(finite.max()) if finite.numel() else 0.0)  # lse is float32
    for field, got, expected in zip(out._fields, out, want, strict=True):
        if is_nan_row(name) and field == "max_logit":
            continue  # whatever max gives; lse says that the row is spoilt
        for r in range(2):
            assert agrees(got[r], expected, atol), f"{field} is {got[r].item()}, not {expected}"


@each_backend
@each_dtype
@pytest.mark.parametrize("v", [2, 129, 2048, 4099])
@pytest.mark.parametrize("where", ["first tile", "middle", "last tile", "all but the label"])
def test_whole_tiles_of_minus_infinity(
    where: str, v: int, dtype: torch.dtype, backend: str
) -> None:
    """exp(-inf - -inf) in an online log-sum-exp is NaN when the first tile holds nothing else."""
    n = 5
    logits = torch.randn(n, v)
    labels = torch.full((n,), v // 2)
    columns = torch.arange(v)
    blocked = {
        "first tile": columns < v // 2,
        "middle": (columns > v // 4) & (columns < v // 2),
        "last tile": columns > v // 2,
        "all but the label": columns != v // 2,
    }[where]
    logits[:, blocked] = -INF
    logits = logits.to(dtype)
    x = logits.clone().requires_grad_()
    out = lk.logprob(x, labels, backend=backend)
    want = torch.log_softmax(logits.double(), -1)
    p = want.exp()
    entropy = -torch.where(p == 0, 0.0, p * want.clamp(min=-1e300)).sum(-1)
    assert float((out.logps.detach() - want[:, v // 2]).abs().max()) <= 2e-5
    assert float((out.entropy.detach() - entropy).abs().max()) <= 2e-5
    (grad,) = torch.autograd.grad((out.logps + 0.5 * out.entropy + out.lse).sum(), x)
    assert bool(grad.isfinite().all()) and bool((grad[:, blocked] == 0).all())
    if where == "all but the label":
        assert bool((out.logps == 0).all()) and bool((out.entropy == 0).all())


@each_backend
@pytest.mark.parametrize("v", [3000, 5000])
def test_a_bias_of_minus_infinity_switches_classes_off(v: int, backend: str) -> None:
    """Whole column panels of the head without a live class, as padding of the vocabulary is."""
    p = peaky(6, 8, v)
    live = torch.arange(v) >= 2048
    labels = p.labels % (v - 2048) + 2048
    bias = torch.where(live, 0.0, -INF)
    h, w = p.hidden.requires_grad_(), p.weight.requires_grad_()
    seq = lk.Sequences.from_lengths([6])
    outcomes = []
    for switched in (True, False):
        head = (w, labels, bias) if switched else (w[live], labels - 2048, None)
        out = lk.linear_logprob(h, head[0], head[1], bias=head[2], backend=backend)
        loss = lk.linear_loss(
            objectives.nll, h, head[0], head[1], seq, bias=head[2], backend=backend
        )
        total = out.logps.sum() + out.entropy.sum() + loss
        outcomes.append((out.logps, out.entropy, loss, *torch.autograd.grad(total, (h, w))))
    for a, b in zip(*outcomes, strict=True):
        assert bool(a.isfinite().all())
        assert float((a - b).detach().abs().max()) <= 1e-5


@each_backend
def test_a_row_that_is_spoilt_spoils_no_other(backend: str) -> None:
    x = torch.randn(40, 700)
    labels = torch.randint(700, (40,))
    clean = lk.logprob(x, labels, backend=backend)
    spoilt = x.clone()
    spoilt[3], spoilt[17, 5], spoilt[31, 600] = NAN, INF, -INF
    out = lk.logprob(spoilt.requires_grad_(), labels, backend=backend)
    kept = torch.ones(40, dtype=torch.bool)
    kept[[3, 17, 31]] = False
    for a, b in zip(out, clean, strict=True):
        assert torch.equal(a[kept], b[kept])
    assert bool(out.lse[[3, 17]].isnan().all()) and bool(out.lse[31].isfinite())
    (grad,) = torch.autograd.grad(out.logps.sum(), spoilt)
    assert bool(grad[kept].isfinite().all()) and bool(grad[[3, 17]].isnan().any())


# --- what stands at a masked place reaches nothing ------------------------------------------------


@each_backend
@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1e10])
def test_masked_places_cannot_affect_any_result(poison: float, backend: str) -> None:
    b, t, d, v = 4, 9, 8, 50
    h0, w0 = torch.randn(b, t, d), torch.randn(v, d)
    labels0 = torch.randint(v, (b, t))
    mask = torch.rand(b, t) < 0.5
    mask[:, 3] = True
    ref0 = -torch.rand(b, t)
    seq = lk.Sequences.from_mask(mask)
    advantages = torch.rand(b)
    outcomes = []
    for poisoned in (False, True):
        h, ref, labels = h0.clone(), ref0.clone(), labels0.clone()
        if poisoned:
            h[~mask], ref[~mask], labels[~mask] = poison, poison, -(2**40)
        h.requires_grad_()
        w = w0.clone().requires_grad_()
        out = lk.linear_logprob(h, w, labels, mask=mask, backend=backend)
        by_op = torch.autograd.grad(out.logps.sum() + out.entropy.sum(), (h, w))
        side = {"ref_logps": ref, "advantages": advantages, "return_outputs": True}
        full = lk.linear_loss(objectives.a_lol_seq, h, w, labels, seq, backend=backend, **side)
        by_loss = torch.autograd.grad(full.loss, (h, w))
        outcomes.append([*out, *by_op, *full[:-1], *full.metrics.values(), *by_loss])
        assert all(bool((g[~mask] == 0).all()) for g in (by_op[0], by_loss[0]))
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


# --- ratios that overflow -------------------------------------------------------------------------


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are refused on a CPU, but reach the kernels on a GPU."""
    monkeypatch.setattr(deferred, "check_values", lambda name, value: None)


LOG_RATIOS = [50.0, -50.0, 88.7, -88.7, 89.0, -89.0, 200.0, -200.0, 1e4, -1e4, INF, -INF]


@patient
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("log_ratio", LOG_RATIOS)
@pytest.mark.parametrize("clip", [0.9, 0.2, 1.5, None])
@pytest.mark.parametrize("name", ["a_lol", "a_lol_seq", "r_lol"])
def test_a_ratio_that_overflows_lands_on_its_side_of_the_clip(
    name: str, clip: float | None, log_ratio: float, sign: float, backend: str
) -> None:
    """exp overflows float32 at 88.72 nats; 0.043 nat a token are enough over 2,048 tokens."""
    objective = getattr(objectives, name)
    p = peaky(6, 4, 9)
    h, w = p.hidden.requires_grad_(), p.weight.requires_grad_()
    seq = lk.Sequences.from_lengths([6])
    logps = lk.linear_logprob(h, w, p.labels).logps.detach()
    ref = logps - (log_ratio if name == "a_lol_seq" else log_ratio / 6)
    weight = "rewards" if name == "r_lol" else "advantages"
    side = {"ref_logps": ref, weight: torch.tensor([sign])}
    out = lk.linear_loss(
        objective, h, w, p.labels, seq, clip=clip, backend=backend, return_outputs=True, **side
    )
    grads = torch.autograd.grad(out.loss, (h, w))
    assert bool(out.loss.isfinite()) and all(bool(g.isfinite().all()) for g in grads)
    effective = sign if name == "r_lol" else max(sign, 0.0)
    if clip is None:  # exp's own range
        assert (float(grads[0].abs().max()) > 1e6) == (log_ratio > 20 and effective != 0)
        return
    low = 1 - clip if clip < 1 else math.exp(log_ratio if log_ratio < 0 else 0)  # no lower bound
    bound = 1 + clip if log_ratio > 0 else low
    want = -effective * bound * float(logps.double().sum())
    assert abs(out.loss.item() - want) <= 1e-4 * max(1.0, abs(want))
    _, coef, _ = lk.loss_and_coef(objective, logps, seq, clip=clip, **side)
    assert float((coef + effective * bound).abs().max()) <= 1e-5
    if effective * bound > 1e-3 or effective == 0:
        assert all((float(g.abs().max()) == 0) == (effective == 0) for g in grads)


def test_masking_comes_before_exp() -> None:
    """where(mask, exp(x), 0) has a NaN gradient at an infinite x; selection has none."""
    seq = lk.Sequences.from_lengths([2])
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    ref = torch.tensor([-1.0, -INF])
    loss = objectives.a_lol_seq(logps, ref, torch.ones(1), seq, clip=0.9)
    loss.sum().backward()
    assert torch.allclose(logps.grad, torch.tensor([-1.0, -1.9]))


# --- the smallest shapes --------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("v", [1, 2, 3])
@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_the_smallest_shapes(n: int, d: int, v: int, backend: str) -> None:
    h = torch.randn(n, d, requires_grad=True)
    w = torch.randn(v, d, requires_grad=True)
    labels = torch.randint(v, (n,))
    want = torch.log_softmax(h.double() @ w.double().T, -1).gather(-1, labels[:, None]).squeeze(-1)
    true = torch.autograd.grad(want.sum(), (h, w))
    out = lk.linear_logprob(h, w, labels, backend=backend)
    seq, options = lk.Sequences.from_lengths([n]), {"reduction": "sum", "backend": backend}
    loss = lk.linear_loss(objectives.nll, h, w, labels, seq, **options)
    assert abs(loss.item() + want.sum().item()) <= 1e-5
    for call in (out.logps.sum(), -loss):
        for g, t in zip(torch.autograd.grad(call, (h, w)), true, strict=True):
            assert g.shape == t.shape and float((g - t).abs().sum()) <= 1e-5
