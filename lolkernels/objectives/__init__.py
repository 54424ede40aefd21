"""Objectives: pure functions from ``(N,)`` row statistics to unreduced losses, one per group.

An objective names what it reads: any of the statistics ``logps``, ``lse``, ``entropy``,
``target_logit`` (differentiable) and ``max_logit`` (not), each ``(N,)``; then its side inputs,
``seq``, and its options. It returns ``(G,)`` losses, one per group of ``seq.group_size`` sequences,
or ``(losses, {name: (G,) metric})``. ``aggregate`` reduces the losses; nothing here does.

Notation: l_t = log pi(y_t), l^r_t the same under the frozen reference, S = sum_t l_t, S^r = sum_t
l^r_t, n the number of tokens, R reward, A advantage, A+ = max(A, 0), sg[.] no gradient, sigma the
logistic function. All log-probs are natural (nats). Every sum over t runs over the tokens of a
sequence.

``REGISTRY`` maps names to functions; ``@objective(...)`` fills it and declares traits.
"""

from .a_lol import (
    a_lol,
    a_lol_kl,
    a_lol_ref_free,
    a_lol_seq,
    family_metrics,
    family_report,
    nll,
    r_gold,
    r_lol,
    r_lol_kl,
    sequence_ratio,
    warn_unlearned,
    wbc,
)
from .gradients import Evaluated, call, evaluate, loss_and_coef
from .policy_gradient import grpo, gspo, ppo
from .preference import dpo, ipo, kto, pro, simpo
from .reductions import REDUCTIONS, aggregate, reduction_weights
from .registry import (
    DIFFERENTIABLE,
    NO_RATIO,
    REGISTRY,
    SEQUENCE_RATIO,
    STATISTICS,
    TOKEN_RATIO,
    Family,
    Objective,
    PerSequence,
    PerToken,
    Traits,
    defaults,
    name_of,
    objective,
    side_inputs,
    statistics,
    traits,
)
from .soft_q import g_learning, psi_learning, q_learning
from .values import check_side, clip_bounds

__all__ = [
    "DIFFERENTIABLE",
    "NO_RATIO",
    "REDUCTIONS",
    "REGISTRY",
    "SEQUENCE_RATIO",
    "STATISTICS",
    "TOKEN_RATIO",
    "Evaluated",
    "Family",
    "Objective",
    "PerSequence",
    "PerToken",
    "Traits",
    "a_lol",
    "a_lol_kl",
    "a_lol_ref_free",
    "a_lol_seq",
    "aggregate",
    "call",
    "check_side",
    "clip_bounds",
    "defaults",
    "dpo",
    "evaluate",
    "family_metrics",
    "family_report",
    "g_learning",
    "grpo",
    "gspo",
    "ipo",
    "kto",
    "loss_and_coef",
    "name_of",
    "nll",
    "objective",
    "ppo",
    "pro",
    "psi_learning",
    "q_learning",
    "r_gold",
    "r_lol",
    "r_lol_kl",
    "reduction_weights",
    "sequence_ratio",
    "side_inputs",
    "simpo",
    "statistics",
    "traits",
    "warn_unlearned",
    "wbc",
]
