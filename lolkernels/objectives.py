"""Objectives: pure functions from ``(N,)`` log-probs to ``(S,)`` losses, one value a sequence.

Notation: l_t = log pi(y_t), l^r_t the same under the frozen reference, S = sum_t l_t, S^r = sum_t
l^r_t, R reward, A advantage, A+ = max(A, 0), sg[.] no gradient. All log-probs are natural (nats).
Every sum runs over the tokens of a sequence. ``aggregate`` reduces the losses; nothing here does.

A-LoL and its baselines: Baheti et al., "Leftover-Lunch: Advantage-based Offline Reinforcement
Learning for Language Models", ICLR 2024. The ratio is pi / pi_ref of the *whole* completion (exp of
the summed log-ratio), detached and clamped on both sides: a clipped sequence keeps a constant,
non-zero gradient. It is not GSPO's exp of the mean log-ratio, nor PPO's min.

An objective's side inputs are its parameters between ``logps`` and ``seq``; its options follow
``seq``.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from .sequences import Sequences

PerToken = Annotated[Tensor, "token"]  # (N,)
PerSequence = Annotated[Tensor, "sequence"]  # (S,)

Objective = Callable[..., Tensor]

NO_RATIO, SEQUENCE_RATIO, TOKEN_RATIO = 0, 1, 2


class Family(NamedTuple):
    """A loss of the A-LoL family, as the fused step takes it.

    loss_s = -weight_s sum_t w_t l_t + beta sum_t (l_t - l^r_t) and d loss_s / d l_t = -(weight_s
    w_t - beta), with w_t one, the clipped sequence ratio, or the clipped token ratio.
    """

    weight: Tensor  # (S,)
    ratio: int = NO_RATIO
    log_low: float = -math.inf
    log_high: float = math.inf
    beta: float = 0.0
    uses_ref: bool = True


class Traits(NamedTuple):
    """What the driver may rely on. Without traits: each sequence (group) whole, none skipped."""

    token_local: bool = False  # d loss / d l_t depends on token t alone, so sequences may be cut
    family: Callable[..., Family] | None = None


def objective(
    *, token_local: bool = False, family: Callable[..., Family] | None = None
) -> Callable[[Objective], Objective]:
    """Declare the traits of an objective (see :class:`Traits`)."""

    def mark(fn: Objective) -> Objective:
        fn.traits = Traits(token_local, family)  # type: ignore[attr-defined]
        return fn

    return mark


def traits(fn: Objective) -> Traits:
    found = getattr(fn, "traits", None)
    return found if isinstance(found, Traits) else Traits()


# --- the A-LoL family -----------------------------------------------------------------------------


@objective(token_local=True, family=lambda seq, **_: Family(_ones(seq)))
def nll(logps: PerToken, seq: Sequences) -> Tensor:
    """Behaviour cloning: -S."""
    return -seq.sum(logps)


@objective(token_local=True, family=lambda rewards, **_: Family(rewards))
def wbc(logps: PerToken, rewards: PerSequence, seq: Sequences) -> Tensor:
    """Reward-weighted behaviour cloning: -R S."""
    return -rewards * seq.sum(logps)


@objective(
    token_local=True,
    family=lambda rewards, floor, **_: Family(
        rewards, TOKEN_RATIO, math.log(_floor(floor)), math.inf, uses_ref=False
    ),
)
def r_gold(logps: PerToken, rewards: PerSequence, seq: Sequences, *, floor: float = 0.1) -> Tensor:
    """Offline GOLD with a sequence reward: -R sum_t sg[max(pi_t, floor)] l_t (Pang, He 2021)."""
    weight = logps.detach().clamp(min=math.log(_floor(floor))).exp()
    return -rewards * seq.sum(weight * logps)


@objective(
    family=lambda rewards, clip, **_: Family(rewards, SEQUENCE_RATIO, *clip_bounds(clip)),
)
def r_lol(
    logps: PerToken,
    ref_logps: PerToken,
    rewards: PerSequence,
    seq: Sequences,
    *,
    clip: float | None = 0.9,
) -> Tensor:
    """R-LoL: -R w S with w = sg[clip(exp(S - S^r), 1 - clip, 1 + clip)]."""
    return -rewards * sequence_ratio(logps, ref_logps, seq, clip) * seq.sum(logps)


@objective(
    family=lambda advantages, clip, **_: Family(
        advantages.clamp(min=0), SEQUENCE_RATIO, *clip_bounds(clip)
    ),
)
def a_lol(
    logps: PerToken,
    ref_logps: PerToken,
    advantages: PerSequence,
    seq: Sequences,
    *,
    clip: float | None = 0.9,
) -> Tensor:
    """A-LoL: -A+ w S with w = sg[clip(exp(S - S^r), 1 - clip, 1 + clip)]  (Baheti et al., 2024).

    ``clip=None`` switches the clip off. A clipped sequence keeps the gradient -A+ (1 -+ clip).
    """
    return -advantages.clamp(min=0) * sequence_ratio(logps, ref_logps, seq, clip) * seq.sum(logps)


@objective(
    token_local=True,
    family=lambda advantages, clip, **_: Family(
        advantages.clamp(min=0), TOKEN_RATIO, *clip_bounds(clip)
    ),
)
def a_lol_seq(
    logps: PerToken,
    ref_logps: PerToken,
    advantages: PerSequence,
    seq: Sequences,
    *,
    clip: float | None = 0.9,
) -> Tensor:
    """A-LoL sequence: -A+ sum_t w_t l_t, per-*token* ratio w_t = sg[clip(exp(l_t - l^r_t))].

    The paper's name: the completion is a sequence of token actions, each with its own ratio.
    """
    weight = _clipped_exp(logps.detach() - ref_logps, clip)
    return -advantages.clamp(min=0) * seq.sum(weight * logps)


@objective(token_local=True, family=lambda advantages, **_: Family(advantages.clamp(min=0)))
def a_lol_ref_free(logps: PerToken, advantages: PerSequence, seq: Sequences) -> Tensor:
    """A-LoL without a reference: -A+ S (the ratio is one)."""
    return -advantages.clamp(min=0) * seq.sum(logps)


@objective(
    token_local=True,
    family=lambda advantages, beta, **_: Family(advantages.clamp(min=0), beta=finite("beta", beta)),
)
def a_lol_kl(
    logps: PerToken,
    ref_logps: PerToken,
    advantages: PerSequence,
    seq: Sequences,
    *,
    beta: float = 0.1,
) -> Tensor:
    """A-LoL with a KL penalty instead of the ratio: -A+ S + beta (S - S^r).

    A sequence with A+ < beta is un-learned: its likelihood is pushed down without a bound.
    """
    penalty = finite("beta", beta) * seq.sum(logps - ref_logps)
    return -advantages.clamp(min=0) * seq.sum(logps) + penalty


@objective(
    token_local=True,
    family=lambda rewards, beta, **_: Family(rewards, beta=finite("beta", beta)),
)
def r_lol_kl(
    logps: PerToken,
    ref_logps: PerToken,
    rewards: PerSequence,
    seq: Sequences,
    *,
    beta: float = 0.1,
) -> Tensor:
    """R-LoL with a KL penalty instead of the ratio: -R S + beta (S - S^r). See :func:`a_lol_kl`."""
    return -rewards * seq.sum(logps) + finite("beta", beta) * seq.sum(logps - ref_logps)


# --- the ratio and its clip -----------------------------------------------------------------------


def clip_bounds(clip: float | None) -> tuple[float, float]:
    """Log-space bounds of a ratio clipped to [1 - clip, 1 + clip]; clip >= 1 leaves no lower bound.

    With ``clip=None`` nothing is clipped but exp's own range: +-60 nats keeps the loss finite in
    float32.
    """
    if clip is None:
        return -60.0, 60.0
    if isinstance(clip, bool) or not isinstance(clip, (int, float)) or not clip > 0:
        raise ValueError(
            f"clip must be None (off) or a number > 0, got {clip!r}; "
            "for a weight of one use a_lol_ref_free or nll"
        )
    if not math.isfinite(clip):
        raise ValueError(f"clip must be finite, got {clip!r}; for no clip pass clip=None")
    return (math.log1p(-clip) if clip < 1 else -math.inf), math.log1p(clip)


def sequence_ratio(
    logps: Tensor,  # (N,)
    ref_logps: Tensor,  # (N,)
    seq: Sequences,
    clip: float | None = 0.9,
) -> Tensor:  # (S,)
    """sg[clip(exp(S - S^r))], clamped in log space so that a long sequence cannot overflow."""
    return _clipped_exp(seq.sum(logps.detach() - ref_logps), clip)


def _clipped_exp(log_ratio: Tensor, clip: float | None) -> Tensor:
    low, high = clip_bounds(clip)
    return log_ratio.clamp(low, high).exp()


def finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _floor(floor: float) -> float:
    if not 0 < finite("floor", floor) <= 1:
        raise ValueError(f"floor must lie in (0, 1], got {floor!r}: it is a probability")
    return floor


def _ones(seq: Sequences) -> Tensor:
    return torch.ones(seq.num_sequences, device=seq.device)


# --- what an objective needs, and reductions ------------------------------------------------------


def side_inputs(fn: Objective) -> dict[str, str]:
    """The inputs an objective needs beyond ``logps`` and ``seq``, from its signature.

    Returns:
        name -> "token" ((N,) tensor), "sequence" ((S,) tensor), "tensor" (a required input whose
        kind its
        shape tells: (N,), (S,) or ()) or "option" (has a default).

    Raises:
        TypeError: not callable, no ``logps`` or ``seq`` parameter, or *args.
    """
    if not callable(fn):
        raise TypeError(f"objective must be a callable (logps, ..., seq, ...), got {fn!r}")
    try:
        return dict(_signature(fn))
    except TypeError as error:
        if "unhashable" in str(error):
            return dict(_signature.__wrapped__(fn))
        raise


@lru_cache(maxsize=256)
def _signature(fn: Objective) -> tuple[tuple[str, str], ...]:
    parameters = inspect.signature(fn).parameters
    name = getattr(fn, "__name__", repr(fn))
    if "logps" not in parameters or "seq" not in parameters:
        raise TypeError(
            f"objective {name} must take parameters named logps and seq, "
            f"got ({', '.join(parameters)})"
        )
    try:
        hints = typing.get_type_hints(fn, include_extras=True)
    except (NameError, TypeError):
        hints = {}
    found: list[tuple[str, str]] = []
    for parameter in parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"objective {name} must name its inputs: no *args or **kwargs")
        if parameter.name in ("logps", "seq"):
            continue
        kinds = getattr(hints.get(parameter.name), "__metadata__", ())
        if kinds and kinds[0] in ("token", "sequence"):
            found.append((parameter.name, kinds[0]))
        elif parameter.default is parameter.empty:
            found.append((parameter.name, "tensor"))
        else:
            found.append((parameter.name, "option"))
    return tuple(found)


def defaults(fn: Objective) -> dict[str, Any]:
    """Options of an objective with their default values."""
    return {
        p.name: p.default
        for p in inspect.signature(fn).parameters.values()
        if p.default is not p.empty and p.name not in ("logps", "seq")
    }


REDUCTIONS = ("seq-mean", "token-mean", "seq-mean-token-mean", "sum")


def reduction_weights(seq: Sequences, reduction: str) -> Tensor:  # (num_groups,)
    """The factor of each loss value: ``aggregate(loss) = sum_g weight_g loss_g``."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    ones = torch.ones(seq.num_groups, device=seq.device, dtype=torch.float64)
    if reduction == "sum":
        return ones
    if reduction == "token-mean":
        return ones / seq.total_tokens
    groups = max(1.0, seq.total_sequences / seq.group_size)
    if reduction == "seq-mean":
        return ones / groups
    tokens = seq.lengths.view(seq.num_groups, seq.group_size).sum(1).clamp(min=1)
    return ones / groups / tokens


def aggregate(loss: Tensor, seq: Sequences, reduction: str = "seq-mean") -> Tensor:
    """Reduce ``(S,)`` losses (one a group, where ``seq.group_size`` > 1) to a scalar.

    * ``"seq-mean"``: sum_s loss_s / total_sequences, the paper's reduction.
    * ``"token-mean"``: sum_s loss_s / total_tokens.
    * ``"seq-mean-token-mean"``: mean over sequences of loss_s / length_s.
    * ``"sum"``, and ``"none"``, which returns the losses as they are.

    The denominators come from ``seq`` (see ``Sequences.with_totals``).
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a tensor, got {type(loss).__name__}")
    if not isinstance(seq, Sequences):
        raise TypeError(f"seq must be a Sequences, got {type(seq).__name__}")
    if loss.shape != (seq.num_groups,):
        raise ValueError(f"loss must have shape ({seq.num_groups},), got {tuple(loss.shape)}")
    if reduction == "none":
        return loss
    return (loss * reduction_weights(seq, reduction).to(loss.dtype)).sum()


def loss_and_coef(
    fn: Objective, logps: Tensor, seq: Sequences, reduction: str = "seq-mean", **side: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced loss, its coefficients and the unreduced losses, by autograd on a leaf.

    Returns:
        loss ``()``; coef ``(N,)``, d loss / d logps; seq_loss ``(S,)``. All detached.
    """
    return weighted_loss_and_coef(fn, logps, seq, reduction_weights(seq, reduction), **side)


def weighted_loss_and_coef(
    fn: Objective, logps: Tensor, seq: Sequences, weights: Tensor, **side: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`loss_and_coef` with the reduction given as one weight a loss value."""
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        seq_loss = fn(logps=leaf, seq=seq, **side)
    name = getattr(fn, "__name__", repr(fn))
    if not isinstance(seq_loss, Tensor) or seq_loss.shape != (seq.num_groups,):
        got = tuple(seq_loss.shape) if isinstance(seq_loss, Tensor) else type(seq_loss).__name__
        raise ValueError(
            f"objective {name} must return unreduced losses of shape ({seq.num_groups},), got {got}"
        )
    weights = weights.to(seq_loss.dtype)
    if seq_loss.requires_grad:
        (coef,) = torch.autograd.grad(seq_loss, leaf, weights, allow_unused=True)
    else:
        coef = None
    coef = torch.zeros_like(logps) if coef is None else coef
    seq_loss = seq_loss.detach()
    return (seq_loss * weights).sum(), coef, seq_loss
