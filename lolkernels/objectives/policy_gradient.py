"""Clipped policy gradients: the ratio rho = exp(l_t - l^old_t) carries a gradient and PPO's minimum
takes it away where the clip binds (A-LoL's clip keeps it). Advantages are whitened before the call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..sequences import Sequences
from .registry import PerSequence, PerToken, objective
from .values import bounded_exp, clip_bounds, number, positive


@objective(token_local=True)
def ppo(
    logps: PerToken,
    entropy: PerToken,
    old_logps: PerToken,
    advantages: PerToken,
    values: PerToken,
    old_values: PerToken,
    returns: PerToken,
    seq: Sequences,
    *,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
    entropy_coef: float = 0.01,
) -> Tensor:
    """PPO: sum_t [max(-A_t rho_t, -A_t clip(rho_t)) + value_coef v_t - entropy_coef H_t], with
    v_t = max((V_t - G_t)^2, (V^c_t - G_t)^2) / 2 for returns G and V^c the values V clipped to
    V^old +- value_clip  (Schulman et al., 2017, eq. 9). Reduce by "token-mean".

    ``values`` is the value head's prediction: where it requires a gradient, it gets one.
    """
    width = positive("value_clip", value_clip)
    near = old_values + (values - old_values).clamp(-width, width)
    value = 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)
    policy = _clipped(bounded_exp(logps - old_logps), advantages, clip, clip)
    bonus = number("entropy_coef", entropy_coef) * entropy
    return seq.sum(policy + number("value_coef", value_coef) * value - bonus)


@objective(token_local=True)
def grpo(
    logps: PerToken,
    old_logps: PerToken,
    ref_logps: PerToken,
    advantages: PerSequence,
    seq: Sequences,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    beta: float = 0.04,
    length_normalised: bool = True,
) -> Tensor:
    """GRPO: mean_t [max(-A rho_t, -A clip(rho_t)) + beta k3_t], with the KL estimate
    k3_t = exp(d_t) - d_t - 1, d_t = l^r_t - l_t  (Shao et al., 2024, eq. 3).

    ``clip_high`` is the upper bound's own width (DAPO). ``length_normalised=False`` sums over
    tokens instead (Dr. GRPO; DAPO with "token-mean").
    """
    d = ref_logps - logps
    k3 = bounded_exp(d) - d - 1
    policy = _clipped(bounded_exp(logps - old_logps), seq.expand(advantages), clip, clip_high)
    reduce = seq.mean if length_normalised else seq.sum
    return reduce(policy + number("beta", beta) * k3)


@objective()
def gspo(
    logps: PerToken,
    old_logps: PerToken,
    advantages: PerSequence,
    seq: Sequences,
    *,
    clip: float = 3e-4,
    clip_high: float | None = 4e-4,
) -> Tensor:
    """GSPO: max(-A s, -A clip(s)) with s = exp(mean_t (l_t - l^old_t)), one ratio per sequence
    (Zheng et al., 2025). ``clip_high=None``: as wide as ``clip``.
    """
    return _clipped(bounded_exp(seq.mean(logps - old_logps)), advantages, clip, clip_high)


def _clipped(ratio: Tensor, advantages: Tensor, clip: float, clip_high: float | None) -> Tensor:
    """max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip_high)), PPO's pessimistic bound."""
    low, high = clip_bounds(clip)[0], clip_bounds(clip if clip_high is None else clip_high)[1]
    near = ratio.clamp(math.exp(low), math.exp(high))
    return torch.maximum(-advantages * ratio, -advantages * near)
