"""Whether what an objective declares about itself is true."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import reference
from .objectives import (
    DIFFERENTIABLE,
    NO_RATIO,
    Evaluated,
    Objective,
    defaults,
    evaluate,
    name_of,
    side_inputs,
    statistics,
    traits,
)
from .sequences import Sequences

LENGTHS = (4, 2, 3, 1, 5, 2)
SPREADS = (0.05, 1.5)  # of log-ratios: within every clip, and beyond
STEP = 1e-6


class Findings(NamedTuple):
    """What :func:`check_objective` has seen, declared or not."""

    statistics: tuple[str, ...]
    token_local: bool
    gradient_error: float | None  # the largest, relative; None where it was not compared


class _Problem(NamedTuple):
    name: str
    fn: Objective
    seq: Sequences
    stats: dict[str, Tensor]
    kinds: dict[str, str]  # of the side tensors: token, sequence or whole
    side: dict[str, Any]
    weights: Tensor  # (G,)

    def on(self, sequences: slice, rows: slice, lengths: list[int]) -> Evaluated:
        """The objective on a part of the batch, as a block of a larger call sees it."""
        size = self.seq.group_size
        pick = {"token": rows, "sequence": sequences}
        side = {
            k: v[pick[d]] if (d := self.kinds.get(k)) in pick else v for k, v in self.side.items()
        }
        groups = slice(sequences.start // size, sequences.stop // size)
        part = self.seq.part(sequences, rows, lengths)
        stats = {k: v[rows] for k, v in self.stats.items()}
        return evaluate(self.fn, stats, part, self.weights[groups], side)

    def whole(self, **replaced: Tensor) -> Evaluated:
        stats = {k: replaced.get(k, v) for k, v in self.stats.items()}
        side = {k: replaced.get(k, v) for k, v in self.side.items()}
        return evaluate(self.fn, stats, self.seq, self.weights, side)


def check_objective(
    fn: Objective,
    seq: Sequences | None = None,
    *,
    group_size: int = 1,
    finite_differences: bool = True,
    seed: int = 0,
    **side: Any,
) -> Findings:
    """Hold an objective to what it declares, on small random problems in float64.

    * It returns one loss per group, the same at every call, and leaves its inputs alone.
    * The gradient of each statistic that it names (and of each tensor in ``side`` that requires
      one) is that of finite differences. A family with a ratio, which is detached, is compared with
      its declared form instead.
    * The loss of a group does not depend on the other groups of the batch.
    * ``token_local``: a sequence cut into pieces gives the same gradient, and losses that add up.
    * ``family``: the declared form gives the loss and gradient of the function's body.

    Args:
        fn: the objective.
        seq: the batch; default three groups of short sequences.
        group_size: of the default batch: 2 for a loss on pairs, K for ranked lists.
        finite_differences: False for a loss with a detached weight, which is no derivative.
        seed: of the statistics and of the side inputs that are drawn.
        **side: options, and side tensors in float64. Those annotated PerToken or PerSequence are
            drawn where they are not given.

    Returns:
        what was found: also that an objective is token-local without saying so.

    Raises:
        AssertionError: naming the declaration that is not true, where, and by how much.
        TypeError: a side input is missing and of unknown shape.
    """
    if seq is None:
        count = 3 * group_size
        seq = Sequences.from_lengths(
            [LENGTHS[i % len(LENGTHS)] for i in range(count)], group_size=group_size
        )
    mark, named = traits(fn), statistics(fn)
    with_ratio, local, worst = False, True, None
    for spread in SPREADS:
        p = _draw(fn, seq, side, spread, seed)
        _check_purity(p)
        _check_groups(p)
        if mark.family is not None:
            with_ratio = _check_family(p)
        if finite_differences and not with_ratio:
            worst = max(worst or 0.0, _check_gradients(p))
        fault = next(_cut_faults(p), None)
        local = local and fault is None
        if mark.token_local and fault is not None:
            raise AssertionError(f"{p.name} is declared token_local, but {fault}")
    return Findings(named, local, worst)


def _draw(
    fn: Objective, seq: Sequences, side: dict[str, Any], spread: float, seed: int
) -> _Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    n, s = seq.num_tokens, seq.num_sequences
    z = 2 * normal(n, 6)
    log_p, target = z.log_softmax(1), z[:, 0]
    every = {
        "logps": log_p[:, 0],
        "lse": z.logsumexp(1),
        "entropy": -(log_p.exp() * log_p).sum(1),
        "target_logit": target,
        "max_logit": z.amax(1),
    }
    kinds: dict[str, str] = {}
    values: dict[str, Any] = dict(defaults(fn))
    for name, kind in side_inputs(fn).items():
        if name in side:
            values[name] = side[name]
            if isinstance(side[name], Tensor):
                kinds[name] = kind if kind in ("token", "sequence") else _kind(side[name], n, s)
        elif kind == "tensor":
            raise TypeError(
                f"{name} is missing and of unknown shape: pass {name}=..., or annotate the "
                "parameter with lolkernels.objectives.PerToken or PerSequence"
            )
        elif kind in ("token", "sequence"):
            kinds[name] = kind
            drawn = normal(n if kind == "token" else s)
            if kind == "token" and name.endswith("logps"):  # near the policy's
                drawn = every["logps"] * (spread * drawn).exp()
            values[name] = drawn
    weights = torch.linspace(0.5, 1.5, seq.num_groups, dtype=torch.float64)
    stats = {k: every[k] for k in statistics(fn)}
    unknown = sorted(side.keys() - values.keys())
    if unknown:
        raise TypeError(f"{unknown[0]} is not an input of {name_of(fn)}")
    return _Problem(name_of(fn), fn, seq, stats, kinds, values, weights)


def _kind(value: Tensor, n: int, s: int) -> str:
    if value.shape == (n,):
        return "token"
    return "sequence" if value.shape == (s,) else "whole"


def _error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest entry or one; infinite where one is nan."""
    if got.numel() == 0:
        return 0.0
    error = float((got - want).abs().max()) / max(1.0, float(want.abs().max()))
    return math.inf if math.isnan(error) else error


def _check_purity(p: _Problem) -> None:
    before = {k: v.detach().clone() for k, v in p.side.items() if isinstance(v, Tensor)}
    first, second = p.whole(), p.whole()
    for name, value in before.items():
        if not torch.equal(value, p.side[name].detach()):
            raise AssertionError(f"{p.name} changes its input {name} in place")
    if not bool(first.seq_loss.isfinite().all()):
        raise AssertionError(f"{p.name} is not finite: {first.seq_loss.tolist()}")
    same = torch.equal(first.seq_loss, second.seq_loss)
    if not same or any(not torch.equal(g, second.grads[k]) for k, g in first.grads.items()):
        raise AssertionError(f"{p.name} gives another result at a second call: it keeps a state")


def _check_groups(p: _Problem) -> None:
    whole, size = p.whole(), p.seq.group_size
    offsets = p.seq.cu_seqlens.tolist()
    for g in range(p.seq.num_groups):
        members = slice(g * size, (g + 1) * size)
        rows = slice(offsets[members.start], offsets[members.stop])
        alone = p.on(members, rows, p.seq.cu_seqlens.diff()[members].tolist())
        advice = (
            "what couples the batch (whitening, seq.num_sequences, batch means) is computed before "
            "the call, or the loss goes through linear_logprob"
        )
        if _error(alone.seq_loss, whole.seq_loss[g : g + 1]) > 1e-9:
            raise AssertionError(
                f"{p.name} looks across groups: the loss of group {g} is "
                f"{float(whole.seq_loss[g]):.6g} in the batch and {float(alone.seq_loss):.6g} "
                f"alone; {advice}"
            )
        for k, grad in alone.grads.items():
            if _error(grad, whole.grads[k][rows]) > 1e-9:
                raise AssertionError(
                    f"{p.name} looks across groups: d loss / d {k} of group {g} differs between "
                    f"the batch and the group alone; {advice}"
                )


def _cut_faults(p: _Problem) -> Iterator[str]:
    """Where a sequence in two pieces differs from the whole one."""
    if p.seq.group_size > 1:
        yield f"a group couples {p.seq.group_size} sequences"
        return
    whole, offsets = p.whole(), p.seq.cu_seqlens.tolist()
    for s in range(p.seq.num_sequences):
        start, stop = offsets[s], offsets[s + 1]
        for cut in range(start + 1, stop):
            pieces = [
                p.on(slice(s, s + 1), slice(a, b), [b - a]) for a, b in ((start, cut), (cut, stop))
            ]
            total = pieces[0].seq_loss + pieces[1].seq_loss
            place = f"sequence {s} cut after {cut - start} of {stop - start} tokens"
            if _error(total, whole.seq_loss[s : s + 1]) > 1e-9:
                yield f"{place} has losses that add up to {float(total):.6g} instead of " + (
                    f"{float(whole.seq_loss[s]):.6g}"
                )
            for k, grad in whole.grads.items():
                cat = torch.cat([piece.grads[k] for piece in pieces])
                if _error(cat, grad[start:stop]) > 1e-9:
                    yield f"{place} has another d loss / d {k}"


def _check_family(p: _Problem) -> bool:
    """Raises where the declared form is not the body's; True where it holds a detached ratio."""
    family = traits(p.fn).family
    assert family is not None
    fam = family(seq=p.seq, **p.side)
    ref = p.side.get("ref_logps") if fam.uses_ref else None
    loss, coef, _, _ = reference.sequence_coef(
        p.stats["logps"],
        ref,
        p.seq.offsets,
        fam.weight,
        ratio=fam.ratio,
        log_low=fam.log_low,
        log_high=fam.log_high,
        beta=fam.beta,
    )
    body = p.whole()
    coef = coef * p.seq.expand(p.weights)
    for what, got, want in (
        ("loss", loss, body.seq_loss),
        ("d loss / d logps", coef, body.grads["logps"]),
    ):
        if _error(got, want) > 1e-9:
            at = int((got - want).abs().argmax())
            raise AssertionError(
                f"the family that {p.name} declares is not its body: {what}[{at}] is "
                f"{float(got[at]):.6g} by the family and {float(want[at]):.6g} by the function"
            )
    return fam.ratio != NO_RATIO


def _check_gradients(p: _Problem) -> float:
    """The largest relative difference between autograd and central differences."""
    out = p.whole()
    inputs = {k: v for k, v in p.stats.items() if k in DIFFERENTIABLE}
    inputs |= {k: p.side[k] for k in out.side_grads}
    worst = 0.0
    for name, value in inputs.items():
        grad = {**out.grads, **out.side_grads}[name].reshape(-1)
        scale = max(1.0, float(grad.abs().max()) if grad.numel() else 0.0)
        for i in range(value.numel()):
            sums = []
            for step in (STEP, -STEP):
                moved = value.detach().clone()
                moved.view(-1)[i] += step
                sums.append(float((p.whole(**{name: moved}).seq_loss * p.weights).sum()))
            slope = (sums[0] - sums[1]) / (2 * STEP)
            error = abs(slope - float(grad[i])) / scale
            worst = max(worst, error)
            if not error <= 1e-5:
                raise AssertionError(
                    f"{p.name}: d loss / d {name}[{i}] is {float(grad[i]):.6g} by autograd and "
                    f"{slope:.6g} by finite differences: a statistic was detached or taken out of "
                    "torch; where a detached weight is meant, pass finite_differences=False"
                )
    return worst
