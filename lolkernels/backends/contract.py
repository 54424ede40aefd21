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

    ``**scaling``, which is ``scale=1.0, softcap=0.0, temperature=1.0`` where it is left out, makes
    z = softcap(scale x) / temperature of the logits x; a softcap of 0 is none. ``bias=`` among it,
    (V,) of the accumulation dtype, is added to x first; on a CPU it stands in the panels already.

    Adding one is a module with a ``BACKEND`` and an entry in the table of ``backends``.
    ``gemm(hidden, weight, bias, labels, anchor, out, **scaling) -> Exps`` is a matrix product whose
    epilogue does what ``exps_`` does, so that no logits are written. ``finish`` and ``add_labels``
    are for whole rows; what they do is defined in ``backends.finish``.
    """

    name: str
    devices: tuple[str, ...] | None  # None: any
    dtypes: tuple[torch.dtype, ...]  # of the logits
    panels: bool  # on a CPU the caller hands over panels of columns that fit its cache
    why_unavailable: Callable[[], str | None]  # None where it can be used, else why and what to do
    exps_: Callable[..., Exps]
    sums: Callable[..., Exps]  # of exps_, which are not written
    dlogits_: Callable[..., Tensor]
    sequence_coef: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    finish: Callable[..., None]
    add_labels: Callable[..., None]
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
    entropy: Tensor
    max_logit: Tensor
    target_logit: Tensor
    slope: Tensor  # dz/dx at the label
    rest: Tensor  # 1 - softmax(z)[label], without cancellation
    share: Tensor  # softmax(z)[v] dz/dx = share E[v] for v != label

    def at(self, rows: slice) -> RowStats:
        return RowStats(*(t[rows] for t in self))
