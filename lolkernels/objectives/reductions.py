"""From unreduced losses to a scalar, and the weight that this gives to each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sequences import Sequences

REDUCTIONS = ("seq-mean", "token-mean", "seq-mean-token-mean", "sum")


def reduction_weights(
    seq: Sequences, reduction: str, dtype: torch.dtype = torch.float64
) -> Tensor:  # (num_groups,)
    """The factor of each loss value: ``aggregate(loss) = sum_g weight_g loss_g``."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    groups = max(1.0, seq.total_sequences / seq.group_size)
    total = {"sum": 1.0, "token-mean": seq.total_tokens}.get(reduction, groups)
    weights = torch.full((seq.num_groups,), 1.0 / total, device=seq.device, dtype=dtype)
    if reduction != "seq-mean-token-mean":
        return weights
    return weights / seq.lengths.view(seq.num_groups, seq.group_size).sum(1).clamp(min=1)


def aggregate(loss: Tensor, seq: Sequences, reduction: str = "seq-mean") -> Tensor:
    """Reduce ``(S,)`` losses (one per group, where ``seq.group_size`` > 1) to a scalar.

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
