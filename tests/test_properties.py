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
from lolkernels.backends import TABLE

BACKENDS = {"cpu": torch.float32, "reference": torch.float64}
TOL = {torch.float32: 2e-5, torch.float64: 1e-12}
each_backend = pytest.mark.parametrize("backend", list(BACKENDS))
WITH_ADVANTAGES = (
    objectives.a_lol,
    objectives.a_lol_seq,
    objectives.a_lol_ref_free,
    objectives.r_lol,
    objectives.wbc,
    objectives.r_gold,
)


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
def batches(draw: st.DrawFn, backend: str = "reference", softcap: bool = True) -> Batch:
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
        softcap=draw(st.sampled_from((None, 15.0))) if softcap else None,
        logit_scale=draw(st.sampled_from((1.0, 0.5))),
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    logps = score(problem, backend).logps
    drift = draw(st.sampled_from((0.01, 0.3, 2.0)))
    ref = (logps + drift * torch.randn(len(logps), generator=generator, dtype=dtype)).clamp(max=0)
    advantages = torch.rand(len(lengths), generator=generator, dtype=dtype) + 0.05
    return Batch(problem, lengths, ref, advantages, backend)


def searched(**strategy: Any) -> Callable[[Callable[..., None]], Any]:
    """The property over random batches, for each backend."""

    def decorate(check: Callable[..., None]) -> Any:
        @pytest.mark.parametrize("backend", list(BACKENDS))
        @given(data=st.data())
        def test(backend: str, data: st.DataObject) -> None:
            batch = data.draw(batches(backend, **strategy))
            check(batch, data)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


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


# --- rows -----------------------------------------------------------------------------------------


@searched()
def test_permuting_rows_permutes_results(batch: Batch, data: st.DataObject) -> None:
    p = batch.problem
    order = torch.randperm(len(p.labels))
    plain = score(p, batch.backend)
    mixed = score(p, batch.backend, hidden=p.hidden[order], labels=p.labels[order])
    for a, b in zip(plain, mixed, strict=True):
        assert near(a[order], b, batch.tol)


@searched()
def test_log_probs_are_a_distribution(batch: Batch, data: st.DataObject) -> None:
    """logp <= 0 for every class, and the probabilities of all classes sum to one."""
    p = batch.problem
    v = min(p.weight.shape[0], 130)
    if p.weight.shape[0] > v:
        p = Problem(p.hidden, p.weight[:v], p.labels % v, None, **p.options)
    row = p.hidden[:1].expand(v, -1)
    logps = score(p, batch.backend, hidden=row, labels=torch.arange(v)).logps
    assert bool((logps <= 0).all())
    assert abs(float(logps.double().exp().sum()) - 1) <= batch.tol


@searched(softcap=False)
def test_a_constant_on_all_logits_changes_nothing(batch: Batch, data: st.DataObject) -> None:
    p = batch.problem
    shift = data.draw(st.sampled_from((-20.0, 0.5, 30.0)))
    bias = torch.zeros(p.weight.shape[0], dtype=p.hidden.dtype) if p.bias is None else p.bias
    a, b = (score(p, batch.backend, bias=t) for t in (bias, bias + shift))
    assert near(a.logps, b.logps, batch.tol, 30) and near(a.entropy, b.entropy, batch.tol, 60)
    moved = shift * p.logit_scale / p.temperature
    assert near(b.lse - a.lse, torch.full_like(a.lse, moved), batch.tol, 60)


@searched()
def test_temperature_divides_hidden_states(batch: Batch, data: st.DataObject) -> None:
    """Without bias and softcap; and logit_scale multiplies them."""
    p = batch.problem
    free: dict[str, Any] = {"bias": None, "softcap": None}
    t = data.draw(st.sampled_from((0.25, 0.7, 3.0)))
    warm = score(p, batch.backend, **free, temperature=t, logit_scale=1.0)
    divided = score(p, batch.backend, **free, temperature=1.0, logit_scale=1.0, hidden=p.hidden / t)
    multiplied = score(p, batch.backend, **free, temperature=1.0, logit_scale=1 / t)
    for a, b, c in zip(warm, divided, multiplied, strict=True):
        size = float(warm.max_logit.abs().max())
        assert near(a, b, batch.tol, size) and near(a, c, batch.tol, size)


@searched()
def test_classes_at_minus_infinity_do_not_exist(batch: Batch, data: st.DataObject) -> None:
    p = batch.problem
    more = data.draw(st.sampled_from((1, 5, 2050)))
    dtype = p.hidden.dtype
    weight = torch.cat([p.weight, torch.randn(more, p.weight.shape[1]).to(dtype)])
    own = torch.zeros(p.weight.shape[0], dtype=dtype) if p.bias is None else p.bias
    bias = torch.cat([own, torch.full((more,), -math.inf, dtype=dtype)])
    if p.softcap is not None:  # the cap would lift -inf to a number
        p = Problem(p.hidden, p.weight, p.labels, p.bias, p.temperature, None, p.logit_scale)
    plain, padded = score(p, batch.backend), score(p, batch.backend, weight=weight, bias=bias)
    for a, b in zip(plain, padded, strict=True):
        assert near(a, b, batch.tol, float(plain.max_logit.abs().max()))


@searched(softcap=False)
def test_the_gradient_of_the_weight_sums_to_zero_over_the_vocabulary(
    batch: Batch, data: st.DataObject
) -> None:
    got = loss_of(batch)
    total = got.weight.double().sum(0)
    assert float(total.abs().max()) <= batch.tol * magnitude(batch)


# --- sequences ------------------------------------------------------------------------------------


@searched()
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
    padded = loss_of(
        batch,
        objective,
        hidden=hidden,
        labels=labels,
        ref_logps=ref,
        seq=lk.Sequences.from_mask(mask),
    )
    assert torch.equal(packed.loss, padded.loss) and torch.equal(packed.weight, padded.weight)
    assert torch.equal(packed.hidden, padded.hidden[mask])
    assert bool((padded.hidden[~mask] == 0).all())

    total, start, grads = 0.0, 0, []
    for i, n in enumerate(lengths):
        part = slice(start, start + n)
        start += n
        alone = loss_of(
            batch,
            objective,
            hidden=p.hidden[part],
            labels=p.labels[part],
            ref_logps=batch.ref_logps[part],
            advantages=batch.advantages[i : i + 1],
            seq=lk.Sequences.from_lengths([n]).with_totals(num_sequences=rows),
        )
        total += alone.loss.item()
        grads.append(alone)
    size = magnitude(batch)
    assert abs(total - packed.loss.item()) <= batch.tol * max(1.0, size)
    assert near(torch.cat([g.hidden for g in grads]), packed.hidden, batch.tol, size)
    assert near(sum(g.weight for g in grads), packed.weight, batch.tol, size)


@searched()
def test_chunks_of_any_size_give_the_same(batch: Batch, data: st.DataObject) -> None:
    p = batch.problem
    objective = data.draw(st.sampled_from(WITH_ADVANTAGES))
    rows = data.draw(st.sampled_from((1, 2, 3, 4, 7, 13, len(p.labels))))
    budget = rows * p.weight.shape[0] * p.hidden.dtype.itemsize
    whole, chunked = loss_of(batch, objective), loss_of(batch, objective, memory_budget=budget)
    size = magnitude(batch)
    for a, b in zip(whole, chunked, strict=True):
        assert near(a, b, batch.tol, size)
    a, b = score(p, batch.backend), score(p, batch.backend, memory_budget=budget)
    assert all(near(x, y, batch.tol, 30) for x, y in zip(a, b, strict=True))


@searched()
def test_a_sequences_log_prob_adds_up_over_any_split(batch: Batch, data: st.DataObject) -> None:
    logps = score(batch.problem, batch.backend).logps.double()
    whole = batch.seq.sum(logps)
    pieces = [data.draw(st.integers(0, n)) for n in batch.lengths]
    split = [m for n, k in zip(batch.lengths, pieces, strict=True) for m in (k, n - k)]
    parts = lk.Sequences.from_lengths(split).sum(logps).view(-1, 2).sum(1)
    assert near(whole, parts, 1e-12)


@searched()
def test_no_advantage_no_gradient(batch: Batch, data: st.DataObject) -> None:
    """Bit for bit zero, for an advantage of zero and, under A-LoL's filter, a negative one."""
    objective = data.draw(
        st.sampled_from((objectives.a_lol, objectives.a_lol_seq, objectives.a_lol_ref_free))
    )
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


@searched()
def test_linear_in_the_advantage(batch: Batch, data: st.DataObject) -> None:
    """Bit for bit for powers of two."""
    objective = data.draw(st.sampled_from(WITH_ADVANTAGES))
    k = data.draw(st.sampled_from((0.25, 0.5, 2.0, 8.0)))
    one, scaled = (
        loss_of(batch, objective),
        loss_of(batch, objective, advantages=k * batch.advantages),
    )
    for a, b in zip(one, scaled, strict=True):
        assert torch.equal(k * a, b)


@searched()
def test_a_ratio_to_oneself_is_one(batch: Batch, data: st.DataObject) -> None:
    """ref_logps = the policy's own: a_lol, a_lol_seq and a_lol_ref_free are one loss."""
    own = score(batch.problem, batch.backend).logps
    free = loss_of(batch, objectives.a_lol_ref_free)
    size = magnitude(batch) * 10  # exp of a sum of rounding errors
    for objective in (objectives.a_lol, objectives.a_lol_seq):
        for a, b in zip(loss_of(batch, objective, ref_logps=own), free, strict=True):
            assert near(a, b, batch.tol, size)


@searched()
def test_a_row_twice_at_half_weight_is_the_row_once(batch: Batch, data: st.DataObject) -> None:
    p = batch.problem
    objective = data.draw(st.sampled_from(WITH_ADVANTAGES))
    twice = loss_of(
        batch,
        objective,
        hidden=torch.cat([p.hidden, p.hidden]),
        labels=torch.cat([p.labels, p.labels]),
        ref_logps=torch.cat([batch.ref_logps, batch.ref_logps]),
        advantages=torch.cat([batch.advantages, batch.advantages]) / 2,
        seq=lk.Sequences.from_lengths(batch.lengths * 2).with_totals(
            num_sequences=len(batch.lengths)
        ),
    )
    once, size = loss_of(batch, objective), magnitude(batch)
    assert near(twice.loss, once.loss, batch.tol, size)
    assert near(twice.weight, once.weight, batch.tol, size)
    first, second = twice.hidden.chunk(2)
    assert near(first + second, once.hidden, batch.tol, size)


@searched()
def test_a_row_that_does_not_count_changes_nothing_for_the_others(
    batch: Batch, data: st.DataObject
) -> None:
    """One mask for numerator and denominator: dropping masked rows beforehand is the same."""
    p = batch.problem
    keep = torch.tensor([data.draw(st.booleans()) for _ in p.labels])
    out = score(p, batch.backend, mask=keep)
    alone = score(p, batch.backend, hidden=p.hidden[keep], labels=p.labels[keep])
    for a, b in zip(out, alone, strict=True):
        assert torch.equal(a[keep], b)
        assert bool((a[~keep] == 0).all())


# --- the clip -------------------------------------------------------------------------------------


@each_backend
@given(
    drifts=st.lists(st.floats(-3, 3), min_size=2, max_size=8),
    clip=st.one_of(st.none(), st.floats(0.01, 0.99), st.floats(1.0, 5.0)),
)
def test_the_weight_is_monotone_and_constant_outside_the_clip(
    backend: str, drifts: list[float], clip: float | None
) -> None:
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


@each_backend
@given(drift=st.floats(-0.2, 0.2), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_the_ratio_of_a_constant_drift_is_exp_of_length_times_drift(
    backend: str, drift: float, lengths: list[int]
) -> None:
    dtype = BACKENDS[backend]
    seq = lk.Sequences.from_lengths(lengths)
    ref = -torch.linspace(0.5, 3, seq.num_tokens, dtype=dtype)
    want = (drift * seq.lengths.double()).exp()
    ratio = objectives.sequence_ratio(ref + drift, ref, seq, None)
    assert near(ratio.double() / want, torch.ones_like(want), 50 * TOL[dtype])
    from_kernel, _, log_ratio, _ = TABLE[backend].sequence_coef(
        ref + drift,
        ref,
        seq.cu_seqlens,
        torch.ones(len(lengths), dtype=dtype),
        ratio=1,
        log_low=-60.0,
        log_high=60.0,
    )
    assert near(log_ratio.double(), drift * seq.lengths.double(), 50 * TOL[dtype])
    loss = -want * seq.sum(ref.double() + drift)
    assert near(from_kernel.double() / loss, torch.ones_like(loss), 50 * TOL[dtype])
