"""What the two walks over tiles of logits share: the operands, the sums, the coefficients.

A walk has two steps. ``sweep`` makes a row's statistics and, where asked, leaves what gradients are
made of: the exponentials of the first rows (``kept``), and d logp / d hidden of all (``unit``).
``gradients`` turns them into gradients once the coefficients of the loss are known. Nothing here
sees a loss, a sequence or a model, and nothing waits for a GPU.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .backends.contract import Backend, RowStats
from .backends.finish import gather_labels
from .gemm import HALF, accumulation_dtype


class Scaling(NamedTuple):
    """z = softcap(scale * x) / temperature; softcap 0 means none."""

    scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0


class Coefficients(NamedTuple):
    """dz_v = a [v == label] + softmax(z)_v (b + c z_v), each (n,).

    ``both`` is a + b. It and ``c`` are None where they are zero by construction.
    """

    a: Tensor
    b: Tensor
    c: Tensor | None = None
    both: Tensor | None = None

    @staticmethod
    def of(lse: Tensor, entropy: Tensor, grads: dict[str, Tensor]) -> Coefficients:
        """From d loss / d (logps, lse, entropy, target_logit), where they are there.

        logp = z_y - lse gives a = g, b = -g; dlse/dz_v = p_v; dH/dz_v = p_v (E[z] - z_v).
        """
        a = grads["logps"] if "logps" in grads else torch.zeros_like(lse)
        b, c, both = -a, None, None
        for g in (grads[k] for k in ("lse", "target_logit") if k in grads):
            both = g if both is None else both + g
        if both is not None:
            a = a + grads["target_logit"] if "target_logit" in grads else a
            b = b + grads["lse"] if "lse" in grads else b
        if "entropy" in grads:
            c = -grads["entropy"]
            b = b + c * (entropy - lse)
        return Coefficients(a, b, c, both)

    def at(self, rows: slice) -> Coefficients:
        return Coefficients(*(None if t is None else t[rows] for t in self))  # type: ignore[arg-type]


class Grads:
    """Gradients of the head, added to by one or more calls. None where not needed.

    They are fp32 (fp64), so that many products lose nothing; ``weight`` has the weight's own dtype
    where one call makes it whole. ``written``: they hold what is added to. ``unit`` is a power of
    two in which both are held while fp16 operands, whose range is small, are multiplied.
    """

    def __init__(
        self, weight: Tensor | None, bias: Tensor | None, *, written: bool = False
    ) -> None:
        self.weight, self.bias = weight, bias
        self.written = written
        self.unit: Tensor | None = None

    @property
    def any(self) -> bool:
        return self.weight is not None or self.bias is not None

    def finish(self) -> None:
        """Where no row was multiplied the gradients are zero."""
        for t in (self.weight, self.bias):
            if t is not None and not self.written:
                t.zero_()
            elif t is not None and self.unit is not None:
                t.mul_(self.unit)


class Walk(ABC):
    """``x = hidden W^T + bias`` by tiles, computed and returned in fp32, or fp64 for fp64."""

    def __init__(
        self,
        hidden: Tensor,  # (N, D), or with up (N, D + r)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        up: Tensor | None,  # (V, r) more columns of the weight, which then is frozen
        labels: Tensor,  # (N,)
        scaling: Scaling,
        backend: Backend,
        operand: torch.dtype,
        memory_budget: int | None = None,
        flags: Tensor | None = None,  # () int32: labels are not checked yet, see ``finish``
    ) -> None:
        self.hidden, self.weight, self.bias, self.labels = hidden, weight, bias, labels
        self.options = scaling._asdict()
        self.backend, self.operand, self.flags = backend, operand, flags
        self.budget = memory_budget
        self.dtype = accumulation_dtype(hidden, weight)
        self.vocab = weight.shape[0]
        self.up, self.more = up, up  # ``more``: columns that ``table`` lacks
        self.first = 0 if up is None else weight.shape[1]  # column with a gradient

    @property
    def n(self) -> int:
        return self.labels.shape[0]

    @property
    @abstractmethod
    def table(self) -> Tensor:
        """The weight as it is multiplied."""

    def block(self, start: int, stop: int) -> Walk:
        """The same walk over the rows start:stop."""
        walk = copy.copy(self)
        walk.hidden, walk.labels = self.hidden[start:stop], self.labels[start:stop]
        return walk

    def rows(self, i: int, j: int) -> Tensor:
        return self.hidden[i:j].to(self.operand)

    def empty(self, *shape: int) -> Tensor:
        return self.hidden.new_empty(shape, dtype=self.dtype)

    def empty_stats(self) -> RowStats:
        return RowStats(*(self.empty(self.n) for _ in RowStats._fields))

    def dhidden(self, unit: Tensor, stats: RowStats, coef: Coefficients) -> None:
        """d logp / d hidden -> -b d logp / d hidden + (a + b) dz_y/dx W_y, in place; c is none."""
        unit.mul_((coef.a if coef.both is None else -coef.b)[:, None])
        if coef.both is not None:
            gather_labels(unit, self.labels, coef.both * stats.slope, self.table, self.more)

    @abstractmethod
    def sweep(
        self,
        kept: Tensor | None = None,  # (k, V), k <= n: E of the first k rows is left here
        unit: Tensor | None = None,  # (n, D): d logp / d hidden is left here
        *,
        hold: bool = False,  # leave the logits in ``kept``, not their exponentials
    ) -> RowStats:
        """The statistics of all rows."""

    @abstractmethod
    def gradients(
        self,
        stats: RowStats,
        coef: Coefficients,
        grads: Grads,
        kept: Tensor | None = None,  # (k, V) of ``sweep``
        dh: Tensor | None = None,  # (n, D), of the rows whose logits are gone through again
        *,
        hold: bool = False,  # ``kept`` holds logits
    ) -> None:
        """Add to the head's gradients. Rows that were not kept have their logits made again.

        Rows kept as exponentials have their dhidden from ``unit``; that of the others is put into
        ``dh``, where it is given.
        """


def blocks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for i in range(start, stop, size):
        yield i, min(i + size, stop)


def takes_panels(hidden: Tensor, weight: Tensor, backend: Backend, operand: torch.dtype) -> bool:
    """Whether tiles are panels of columns: on a CPU, and where the weight has to be converted.

    Under autocast the operands are half and the weight is converted as a whole.
    """
    if hidden.device.type == "cpu" and backend.panels:
        return True
    return operand != weight.dtype and operand not in HALF
