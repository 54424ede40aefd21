"""What a backend is: a record of row functions on logits, and nothing about losses or models."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SHIFT = 16.0  # an anchor stands this many nats above the label's logit
REACH = 50.0  # a row whose maximum stands higher than this above its anchor is anchored there


class Backend(NamedTuple):
    """Row functions for some devices and dtypes. The reference backend defines what they compute.

    Adding one is a module with a ``BACKEND`` and an entry in the table of ``backends``.
    ``gemm(hidden, weight, bias, labels, anchor, out, **scaling) -> Exps`` is a matrix product whose
    epilogue does what ``exps_`` does, so that no logits are written.
    """

    name: str
    devices: tuple[str, ...] | None  # None: any
    dtypes: tuple[torch.dtype, ...]  # of the logits
    panels: bool  # on a CPU the caller hands over panels of columns that fit its cache
    why_unavailable: Callable[[], str | None]  # None where it can be used, else why and what to do
    row_stats: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    exps_: Callable[..., Exps]
    dlogits_: Callable[..., Tensor]
    sequence_coef: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    gemm: Callable[..., Exps] | None = None
    gemm_dtypes: tuple[torch.dtype, ...] = ()  # of the operands

    def fits(self, device: torch.device, dtype: torch.dtype) -> bool:
        return (self.devices is None or device.type in self.devices) and dtype in self.dtypes


class Exps(NamedTuple):
    """Sums over the given columns of each row, each (n,), of z relative to ``anchor``."""

    anchor: Tensor  # the one that was used
    rest: Tensor  # sum over v != label of exp(z - anchor)
    deviation: Tensor  # sum over v != label of exp(z - anchor) (z - anchor)
    max_logit: Tensor  # max z, the label's included
    target_logit: Tensor  # z[label], -inf where the label is not among the columns
    slope: Tensor  # dz/dx at the label, 0 where it is not among the columns


class RowStats(NamedTuple):
    """The statistics of a row, each (n,)."""

    logps: Tensor  # log softmax(z)[label], without cancellation where it is near 0
    lse: Tensor
    expected_logit: Tensor
    max_logit: Tensor
    target_logit: Tensor
    slope: Tensor  # dz/dx at the label
    rest: Tensor  # 1 - softmax(z)[label], without cancellation
    share: Tensor  # softmax(z)[v] dz/dx = share E[v] for v != label


def statistics(sums: Exps) -> RowStats:
    """What the sums over whole rows say of them."""
    base = torch.maximum(sums.target_logit, sums.anchor)
    mine, fall = (sums.target_logit - base).exp(), (sums.anchor - base).exp()
    rest = sums.rest * fall
    total = rest + mine
    lse = base + total.log()
    lse = lse.masked_fill(lse == torch.inf, torch.nan)  # a row with +inf is spoilt, and says so
    logps = torch.where(mine > rest, -torch.log1p(rest / mine), sums.target_logit - lse)
    others = fall * (sums.deviation + sums.rest * (sums.anchor - base))
    own = mine * (sums.target_logit - base)
    deviation = torch.where(fall == 0, 0.0, others) + torch.where(mine == 0, 0.0, own)
    return RowStats(
        logps=logps + 0.0 * lse,  # nan where the row is spoilt
        lse=lse,
        expected_logit=base + deviation / total,
        max_logit=sums.max_logit,
        target_logit=sums.target_logit,
        slope=sums.slope,
        rest=rest / total,
        share=fall / total,
    )
