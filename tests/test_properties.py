"""Properties that hold for every input, searched by hypothesis, for each backend.

In float64 (reference) to 1e-12 of the largest entry; in float32 (cpu) to its rounding; bit for bit
where the text says so.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from judges import Problem, peaky
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives

BACKENDS = {"cpu": torch.float32, "reference": torch.float64}
TOL = {torch.float32: 2e-5, torch.float64: 1e-12}
FILTERED = (objectives.a_lol, objectives.a_lol_seq, objectives.a_lol_ref_free)
WITH_ADVANTAGES = (*FILTERED, objectives.r_lol, objectives.wbc, objectives.r_gold)


class Batch(NamedTuple):
    problem: Problem
    lengths: list[int]
    ref_logps: Tensor  # (N,)
    advantages: Tensor  # (S,) > 0
    backend: str

    @property
    def seq(self) -> lk.Sequences:
        return lk.Sequences.from_lengths(self.lengths)

    @property
    def tol(self) -> float:
        return TOL[self.problem.hidden.dtype]


@st.composite
def batches(draw: st.DrawFn, backend: str) -> Batch:
    lengths = draw(st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(sum))
    seed = draw(st.integers(0, 10_000))
    dtype = BACKENDS[backend]
    problem = peaky(
        sum(lengths),
        draw(st.integers(1, 9)),
        draw(st.sampled_from((2, 3, 17, 130, 2100))),
        dtype=dtype,
        bias=draw(st.booleans()),
        std=draw(st.floats(1, 4)),
        lift=draw(st.floats(0, 6)),
        temperature=draw(st.sampled_from((1.0, 0.7, 1.6))),
        softcap=draw(st.sampled_from((None, 15.0))),
        logit_scale=draw(st.sampled_from((1.0, 0.5))),
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    logps = score(problem, backend).logps
    drift = draw(st.sampled_from((0.01, 0.3, 2.0)))
    ref = (logps + drift * torch.randn(len(logps), generator=generator, dtype=dtype)).clamp(max=0)
    advantages = torch.rand(len(lengths), generator=generator, dtype=dtype) + 0.05
    return Batch(problem, lengths, ref, advantages, backend)


def searched(check: Callable[..., None]) -> Any:
    """The property over random batches, for each backend."""

    @pytest.mark.parametrize("backend", list(BACKENDS))
    @given(data=st.data())
    def test(backend: str, data: st.DataObject) -> None:
        check(data.draw(batches(backend)), data)

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test


def score(p: Problem, backend: str, **changed: Any) -> lk.LogprobOutput:
    call = {"hidden": p.hidden, "weight": p.weight, "labels": p.labels, "bias": p.bias}
    return lk.linear_logprob(**{**call, "backend": backend, **p.options, **changed})


class Result(NamedTuple):
    loss: Tensor
    hidden: Tensor
    weight: Tensor


def loss_of(
    batch: Batch,
    objective: Callable[..., Tensor] = objectives.a_lol,
    *,
    seq: lk.Sequences | None = None,
    **changed: Any,
) -> Result:
    """The fused loss with its gradients; what is given replaces the batch's own."""
    p = batch.problem
    own = {"hidden": p.hidden, "weight": p.weight, "labels": p.labels, "bias": p.bias, **p.options}
    side = {"ref_logps": batch.ref_logps, "advantages": batch.advantages}
    call = {**own, **side, "backend": batch.backend, **changed}
    call["rewards"] = call["advantages"]
    for name in {"ref_logps", "advantages", "rewards"} - set(lk.side_inputs(objective)):
        del call[name]
    leaves = [call[k].detach().clone().requires_grad_() for k in ("hidden", "weight")]
    call |= {"hidden": leaves[0], "weight": leaves[1]}
    loss = lk.linear_loss(objective, seq=batch.seq if seq is None else seq, **call)
    return Result(loss.detach(), *torch.autograd.grad(loss, leaves))


def near(a: Tensor, b: Tensor, tol: float, scale: float = 0.0) -> bool:
    if a.numel() == 0:
        return a.shape == b.shape
    top = max(1.0, scale, float(b.abs().max()))
    return a.shape == b.shape and float((a - b).abs().max()) <= tol * top


def magnitude(batch: Batch) -> float:
    """The size of what may cancel in a gradient: weights, hidden states, rows, ratios."""
    p = batch.problem
    rows = max(1, len(p.labels))
    return float(p.weight.abs().max() * 4 + p.hidden.abs().max() * rows) * 2


@searched
def test_packed_padded_and_one_by_one_are_the_same(batch: Batch, data: st.DataObject) -> None:
    """Whatever the length of the padding and its side, and whatever it holds (bit for bit)."""
    p, lengths = batch.problem, batch.lengths
    objective = data.draw(st.sampled_from(WITH_ADVANTAGES))
    packed = loss_of(batch, objective)
    rows, width = len(lengths), max(lengths) + data.draw(st.integers(0, 3))
    left = data.draw(st.booleans())
    mask = torch.zeros(rows, width, dtype=torch.bool)
    for i, n in enumerate(lengths):
        mask[i, width - n : width] = left
        mask[i, :n] |= not left
    poison = data.draw(st.sampled_from((0.0, math.nan, math.inf, 1e10)))
    dtype = p.hidden.dtype
    hidden = torch.full((rows, width, p.hidden.shape[1]), poison, dtype=dtype)
    labels = torch.full((rows, width), 10**9)
    ref = torch.full((rows, width), poison, dtype=dtype)
    hidden[mask], labels[mask], ref[mask] = p.hidden, p.labels, batch.ref_logps
    seq = lk.Sequences.from_mask(mask)
    padded = loss_of(batch, objective, hidden=hidden, labels=labels, ref_logps=ref, seq=seq)
    assert torch.equal(packed.loss, padded.loss) and torch.equal(packed.weight, padded.weight)
    assert torch.equal(packed.hidden, padded.hidden[mask])
    assert bool((padded.hidden[~mask] == 0).all())

    total, start, grads = 0.0, 0, []
    for i, n in enumerate(lengths):
        part = slice(start, start + n)
        start += n
        own = {"hidden": p.hidden[part], "labels": p.labels[part]}
        own |= {"ref_logps": batch.ref_logps[part], "advantages": batch.advantages[i : i + 1]}
        seq = lk.Sequences.from_lengths([n]).with_totals(num_sequences=rows)
        alone = loss_of(batch, objective, seq=seq, **own)
        total += alone.loss.item()
        grads.append(alone)
    size = magnitude(batch)
    assert abs(total - packed.loss.item()) <= batch.tol * max(1.0, size)
    assert near(torch.cat([g.hidden for g in grads]), packed.hidden, batch.tol, size)
    assert near(sum(g.weight for g in grads), packed.weight, batch.tol, size)


@searched
def test_no_advantage_no_gradient(batch: Batch, data: st.DataObject) -> None:
    """Bit for bit zero, for an advantage of zero and, under A-LoL's filter, a negative one."""
    objective = data.draw(st.sampled_from(FILTERED))
    off = torch.tensor([data.draw(st.booleans()) for _ in batch.lengths])
    value = data.draw(st.sampled_from((0.0, -0.0, -3.0)))
    advantages = torch.where(off, value, batch.advantages)
    got = loss_of(batch, objective, advantages=advantages)
    rows = batch.seq.expand(off)
    assert bool((got.hidden[rows] == 0).all())
    kept = loss_of(batch, objective)
    assert near(got.hidden[~rows], kept.hidden[~rows], batch.tol, magnitude(batch))
    if bool(off.all()):
        assert got.loss.item() == 0.0 and bool((got.weight == 0).all())


@searched
def test_linear_in_the_advantage(batch: Batch, data: st.DataObject) -> None:
    """Bit for bit for powers of two."""
    objective = data.draw(st.sampled_from(WITH_ADVANTAGES))
    k = data.draw(st.sampled_from((0.25, 0.5, 2.0, 8.0)))
    scaled = loss_of(batch, objective, advantages=k * batch.advantages)
    for a, b in zip(loss_of(batch, objective), scaled, strict=True):
        assert torch.equal(k * a, b)


@searched
def test_a_row_that_does_not_count_changes_nothing_for_the_others(batch, data) -> None:
    """One mask for numerator and denominator: dropping masked rows beforehand is the same."""
    p = batch.problem
    keep = torch.tensor([data.draw(st.booleans()) for _ in p.labels])
    out = score(p, batch.backend, mask=keep)
    alone = score(p, batch.backend, hidden=p.hidden[keep], labels=p.labels[keep])
    for a, b in zip(out, alone, strict=True):
        assert torch.equal(a[keep], b)
        assert bool((a[~keep] == 0).all())


# --- the clip -------------------------------------------------------------------------------------


@given(
    drifts=st.lists(st.floats(-3, 3), min_size=2, max_size=8),
    clip=st.one_of(st.none(), st.floats(0.01, 0.99), st.floats(1.0, 5.0)),
)
def test_the_weight_is_monotone_and_constant_outside_the_clip(drifts, clip) -> None:
    seq = lk.Sequences.from_lengths([2] * len(drifts))
    ref = -torch.ones(seq.num_tokens, dtype=torch.float64)
    d = torch.tensor(sorted(drifts), dtype=torch.float64)
    logps = ref + seq.expand(d) / 2
    weight = objectives.sequence_ratio(logps, ref, seq, clip)
    assert bool((weight.diff() >= 0).all())
    unclipped = objectives.sequence_ratio(logps, ref, seq, None)
    if clip is None:
        assert near(unclipped, d.exp(), 1e-12)
        return
    inside = (unclipped > 1 - clip) & (unclipped < 1 + clip)
    assert near(weight[inside], unclipped[inside], 1e-12)
    outside = weight[~inside]
    assert bool(
        ((outside - (1 + clip)).abs() <= 1e-12)
        .logical_or((outside - (1 - clip)).abs() <= 1e-12)
        .all()
    )
    # Outside, the reference has no effect: moving it a little leaves the coefficient as it was.
    far = ((d - math.log1p(clip)).abs() > 0.01) & (~inside)
    if clip < 1:
        far &= (d - math.log1p(-clip)).abs() > 0.01
    nudged = objectives.sequence_ratio(logps, ref + 0.001, seq, clip)
    assert torch.equal(nudged[far], weight[far])
    wide = objectives.sequence_ratio(logps, ref, seq, 1e6)
    assert near(wide, unclipped, 1e-12)
