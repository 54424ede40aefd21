"""Labels outside the vocabulary and masked rows: nothing is read or written outside, nothing waits.

On a GPU a bad label spoils its row with nan and raises at the next call; LOLKERNELS_STRICT=1 raises
at once.
"""

import math
from collections.abc import Callable

import judges
import pytest
import torch
from judges import Problem
from on_device import (
    DEVICE,
    ON_GPU,
    RedZones,
    each_backend,
    each_dtype,
    leaves,
    needs_gpu,
    peaky,
    same,
    score,
    size,
)
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives

N, D, V = 24, 32, size(2049, 131)
LENGTHS = [5, 0, 12, 7]
ROW = 6
BAD = [V, V + 3, -1, -7, 2**31, 2**40, -(2**63)]
bad_labels = pytest.mark.parametrize("bad", BAD)
pytestmark = pytest.mark.usefixtures("unhurried")


def zoned(p: Problem, zones: RedZones) -> Problem:
    return Problem(
        zones.place("hidden", p.hidden).requires_grad_(),
        zones.place("weight", p.weight).requires_grad_(),
        zones.place("labels", p.labels),
    )


def spoilt(p: Problem, bad: int) -> Problem:
    labels = p.labels.clone()
    labels[ROW] = bad
    return Problem(p.hidden, p.weight, labels)


def raises_once(call: Callable[[], object]) -> None:
    if ON_GPU:
        torch.cuda.synchronize()  # so that the host has heard
    with pytest.raises(ValueError, match=r"labels held an id outside \[0, vocab\)"):
        call()
    call()


@each_backend
@each_dtype
@bad_labels
@pytest.mark.parametrize("given", ["hidden", "logits"])
def test_log_probs(given: str, bad: int, dtype: torch.dtype, backend: str) -> None:
    """The row is nan, its gradient too, every other is what it was; the next call raises."""
    p, zones = peaky(N, D, V, dtype=dtype), RedZones()
    good = torch.arange(N, device=DEVICE) != ROW
    if given == "hidden":
        q = zoned(spoilt(p, bad), zones)
        out, leaf = score(q, backend=backend), q.hidden
        truth = judges.eager(p.double()).logps
    else:
        logits = (p.hidden @ p.weight.T).detach()
        leaf = zones.place("logits", logits).requires_grad_()
        labels = zones.place("labels", spoilt(p, bad).labels)
        out = lk.logprob(leaf, labels, backend=backend)
        truth = logits.double().log_softmax(1).gather(1, p.labels[:, None]).squeeze(1)
    judges.accept_logprobs(out.logps[good], truth[good])
    assert all(t[ROW].isnan() for t in (out.logps, out.lse, out.entropy))
    (grad,) = torch.autograd.grad(out.logps.sum(), leaf)
    assert torch.equal(grad.isnan().any(1), ~good)
    assert given == "logits" or grad[ROW].isnan().all()
    zones.check()
    raises_once(lambda: score(p, backend=backend))


@each_backend
@bad_labels
@pytest.mark.parametrize("budget", [None, 4 * V * 5], ids=["whole", "chunks"])
@pytest.mark.parametrize("objective", [objectives.nll, objectives.a_lol], ids=lambda f: f.__name__)
def test_linear_loss(objective: object, budget: int | None, bad: int, backend: str) -> None:
    p = peaky(N, D, V)
    zones = RedZones()
    q = zoned(spoilt(p, bad), zones)
    side = {"ref_logps": torch.zeros(N), "advantages": torch.ones(4)}
    side = {k: v.to(DEVICE) for k, v in side.items() if objective is objectives.a_lol}
    loss = lk.linear_loss(
        objective, q.hidden, q.weight, q.labels, lk.Sequences.from_lengths(LENGTHS).to(DEVICE),
        backend=backend, memory_budget=budget, **side,
    )  # fmt: skip
    grads = torch.autograd.grad(loss, (q.hidden, q.weight))
    assert loss.isnan() and all(g.isnan().any() for g in grads)
    assert not grads[0][:5].isnan().any()  # another sequence
    zones.check()
    raises_once(lk.check_errors)


@each_backend
def test_a_flag_survives_later_good_calls(backend: str) -> None:
    p = peaky(N, D, V)
    score(spoilt(p, V), backend=backend)
    with pytest.raises(ValueError, match="labels held"):
        for _ in range(3):  # in one of them, or here
            score(p, backend=backend)
        lk.check_errors()
    lk.check_errors()


@each_backend
@pytest.mark.parametrize("value", [pytest.param(math.nan, marks=needs_gpu), 0.5])
def test_a_nan_advantage_is_named(value: float, backend: str) -> None:
    p = peaky(N, D, V)
    seq = lk.Sequences.from_lengths([N]).to(DEVICE)
    side = {"ref_logps": torch.zeros(N, device=DEVICE)}
    side["advantages"] = torch.full((1,), value, device=DEVICE)
    call = (objectives.a_lol, p.hidden, p.weight, p.labels, seq)
    loss = lk.linear_loss(*call, backend=backend, **side)
    if value == value:
        lk.check_errors()
        return
    assert loss.isnan()
    with pytest.raises(ValueError, match="an input of the objective was nan"):
        lk.check_errors()


@each_backend
@bad_labels
def test_strict_mode_raises_at_once(
    bad: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the dry run's own way of checking
    monkeypatch.setenv("LOLKERNELS_STRICT", "1")
    p = spoilt(peaky(N, D, V), bad)
    seq = lk.Sequences.from_lengths([N]).to(DEVICE)
    for call in (
        lambda: score(p, backend=backend),
        lambda: lk.logprob(p.hidden @ p.weight.T, p.labels, backend=backend),
        lambda: lk.linear_loss(objectives.nll, p.hidden, p.weight, p.labels, seq, backend=backend),
    ):
        with pytest.raises(ValueError, match=rf"labels\[{ROW}\] = {bad} is outside"):
            call()
    lk.check_errors()


@each_backend
@each_dtype
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_masked_rows_hold_changes_no_bit(
    poison: float, dtype: torch.dtype, backend: str
) -> None:
    p, wanted = leaves(peaky(N, D, V, dtype=dtype, bias=True))
    mask = torch.arange(N, device=DEVICE) % 3 > 0
    labels = p.labels.masked_fill(~mask, -100)

    def run(value: float) -> list[Tensor]:
        with torch.no_grad():
            p.hidden[~mask] = value
        out = lk.linear_logprob(p.hidden, p.weight, labels, bias=p.bias, mask=mask, backend=backend)
        upstream = torch.where(mask, 1.0, value)
        return [*out, *torch.autograd.grad(out.logps, wanted, upstream)]

    want, got = run(0.0), run(poison)
    same(got, want)
    assert not any(t[~mask].any() for t in got[:5]) and all(t.isfinite().all() for t in got)
    lk.check_errors()
