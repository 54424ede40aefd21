"""The A-LoL family: losses -weight sum_t w_t l_t + beta sum_t (l_t - l^r_t), and what they report.

Baheti et al., "Leftover-Lunch: Advantage-based Offline Reinforcement Learning for Language
Models", ICLR 2024. The ratio is pi / pi_ref of the *whole* completion (exp of the summed
log-ratio), detached and clamped on both sides: a clipped sequence keeps a constant, non-zero
gradient. It is not GSPO's exp of the mean log-ratio, nor PPO's min.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ..sequences import Sequences
from .registry import (
    SEQUENCE_RATIO,
    TOKEN_RATIO,
    Family,
    Objective,
    PerSequence,
    PerToken,
    Traits,
    name_of,
    objective,
)
from .values import clip_bounds, number

# The paper's recipe: sequences with an advantage <= 0 are dropped, the rest drawn in proportion.
RECIPE: dict[str, Any] = {"positive_only": True, "sampling": "advantage"}


@objective(token_local=True, family=lambda seq, **_: Family(_ones(seq)))
def nll(logps: PerToken, seq: Sequences) -> Tensor:
    """Behaviour cloning: -S."""
    return -seq.sum(logps)


@objective(token_local=True, family=lambda rewards, **_: Family(rewards), metrics=("unlearned",))
def wbc(logps: PerToken, rewards: PerSequence, seq: Sequences) -> Tensor:
    """Reward-weighted behaviour cloning: -R S. A negative reward un-learns its sequence."""
    return -rewards * seq.sum(logps)


@objective(
    token_local=True,
    family=lambda rewards, floor, **_: Family(
        rewards, TOKEN_RATIO, math.log(_floor(floor)), math.inf, uses_ref=False
    ),
    metrics=("clipped", "unlearned"),
)
def r_gold(logps: PerToken, rewards: PerSequence, seq: Sequences, *, floor: float = 0.1) -> Tensor:
    """Offline GOLD with a sequence reward: -R sum_t sg[max(pi_t, floor)] l_t (Pang, He 2021)."""
    weight = logps.detach().clamp(min=math.log(_floor(floor))).exp()
    return -rewards * seq.sum(weight * logps)


@objective(
    family=lambda rewards, clip, **_: Family(rewards, SEQUENCE_RATIO, *clip_bounds(clip)),
    metrics=("log_ratio", "clipped", "unlearned"),
)
def r_lol(
    logps: PerToken,
    ref_logps: PerToken,
    rewards: PerSequence,
    seq: Sequences,
    *,
    clip: float | None = 0.9,
) -> Tensor:
    """R-LoL: -R w S with w = sg[clip(exp(S - S^r), 1 - clip, 1 + clip)].

    A negative reward un-learns its sequence: the loss has no lower bound there.
    """
    return -rewards * sequence_ratio(logps, ref_logps, seq, clip) * seq.sum(logps)


@objective(
    family=lambda advantages, clip, **_: Family(
        advantages.clamp(min=0), SEQUENCE_RATIO, *clip_bounds(clip)
    ),
    metrics=("log_ratio", "clipped"),
    **RECIPE,
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
    metrics=("log_ratio", "clipped"),
    **RECIPE,
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


@objective(
    token_local=True, family=lambda advantages, **_: Family(advantages.clamp(min=0)), **RECIPE
)
def a_lol_ref_free(logps: PerToken, advantages: PerSequence, seq: Sequences) -> Tensor:
    """A-LoL without a reference: -A+ S (the ratio is one)."""
    return -advantages.clamp(min=0) * seq.sum(logps)


@objective(
    token_local=True,
    family=lambda advantages, beta, **_: Family(advantages.clamp(min=0), beta=number("beta", beta)),
    metrics=("log_ratio", "unlearned"),
    **RECIPE,
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
    penalty = number("beta", beta) * seq.sum(logps - ref_logps)
    return -advantages.clamp(min=0) * seq.sum(logps) + penalty


@objective(
    token_local=True,
    family=lambda rewards, beta, **_: Family(rewards, beta=number("beta", beta)),
    metrics=("log_ratio", "unlearned"),
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
    return -rewards * seq.sum(logps) + number("beta", beta) * seq.sum(logps - ref_logps)


# --- the ratio and its clip -----------------------------------------------------------------------


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


def _floor(floor: float) -> float:
    if not 0 < number("floor", floor) <= 1:
        raise ValueError(f"floor must lie in (0, 1], got {floor!r}: it is a probability")
    return float(floor)


def _ones(seq: Sequences) -> Tensor:
    return torch.ones(seq.num_sequences, device=seq.device)


# --- what the family reports ----------------------------------------------------------------------


def family_metrics(
    fam: Family,
    logps: Tensor,  # (N,)
    ref_logps: Tensor | None,  # (N,)
    seq: Sequences,
) -> dict[str, Tensor]:  # each (S,)
    """What ``sequence_coef`` learns on the way, in plain torch.

    * ``log_ratio``: sum_t (l_t - l^r_t) in nats; sum_t l_t without a reference.
    * ``clipped``: 1 where the sequence's ratio lies outside its bounds; for a ratio per token the
      share of these tokens.
    """
    d = logps.detach() if ref_logps is None else logps.detach() - ref_logps
    log_ratio = seq.sum(d)
    if fam.ratio == TOKEN_RATIO:
        clipped = seq.mean(((d < fam.log_low) | (d > fam.log_high)).to(d.dtype))
    elif fam.ratio == SEQUENCE_RATIO:
        clipped = ((log_ratio < fam.log_low) | (log_ratio > fam.log_high)).to(log_ratio.dtype)
        clipped = clipped * (seq.lengths > 0)
    else:
        clipped = torch.zeros_like(log_ratio)
    return {"log_ratio": log_ratio, "clipped": clipped}


def family_report(
    mark: Traits,
    fam: Family,
    log_ratio: Tensor,  # (S,)
    clipped: Tensor,  # (S,)
) -> dict[str, Tensor]:  # each (S,)
    """The metrics that an objective of the family declares, for the caller's outputs.

    ``log_ratio`` and ``clipped`` are those of :func:`family_metrics`; ``unlearned`` is 1 where the
    loss pushes a sequence's likelihood down without a bound (weight < beta).
    """
    known = {"log_ratio": log_ratio, "clipped": clipped}
    return {
        name: (fam.weight < fam.beta).to(log_ratio.dtype) if name == "unlearned" else known[name]
        for name in mark.metrics
    }


_warned: set[str] = set()


def warn_unlearned(fn: Objective, fam: Family) -> None:
    """Warn once for each objective whose weights on the CPU are negative: it un-learns these rows.

    Their loss -weight S has no lower bound: the likelihood falls until training diverges.
    """
    name = name_of(fn)
    if name in _warned or fam.weight.device.type != "cpu" or not bool((fam.weight < 0).any()):
        return
    _warned.add(name)
    warnings.warn(
        f"{name} got negative rewards and pushes the likelihood of their sequences down without a "
        "bound: shift the rewards, drop these rows, or use advantages (a_lol)",
        stacklevel=2,
    )
