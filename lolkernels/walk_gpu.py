"""The walk on a GPU: chunks of whole rows, operands multiplied as they are stored.

    sweep      for a chunk of rows:
                   x = h W^T + bias, fp32                            GEMM 1
                   E = exp(x - anchor), sums                         one read, one narrower write
                   unit = E W                                        GEMM 2
    gradients  dweight = E^T (b share h) + the labels' rows          GEMM 3, all kept rows at once

A backend with a GEMM of its own leaves E and the sums in that GEMM's epilogue. The narrow dlogits
of rows that were not kept lie over the first half of their fp32 logits.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from . import memory
from .backends.contract import SHIFT, RowStats
from .backends.finish import at_label
from .gemm import matmul
from .walk import Coefficients, Grads, Walk, blocks


class RowWalk(Walk):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.more = None
        bias = self.bias
        # Kernels add it to the logits as they read them.
        self.bias = None if bias is None else bias.to(self.dtype).contiguous()
        self.scaling = {**self.options, "bias": self.bias}
        taken = self.operand in self.backend.gemm_dtypes
        self.gemm = self.backend.gemm if taken else None

    @cached_property
    def table(self) -> Tensor:
        """A copy under autocast and beside a low-rank part only."""
        whole = self.weight if self.up is None else torch.cat([self.weight, self.up], 1)
        return whole.to(self.operand)

    def block(self, start: int, stop: int) -> Walk:
        _ = self.table  # made once, for all blocks
        return super().block(start, stop)

    def chunk_rows(self, n: int) -> int:
        return memory.chunk_rows(n, self.vocab, self.budget, self.hidden.device)

    def empty_rows(self, n: int, dtype: torch.dtype) -> Tensor:
        """(n, V). Rows start at multiples of 16 elements, whatever the vocabulary."""
        return self.hidden.new_empty(n, memory.padded(self.vocab), dtype=dtype)[:, : self.vocab]

    def narrow(self, x: Tensor) -> Tensor:
        """Elements of the operands' dtype over the beginnings of the rows of x."""
        return x if x.dtype == self.operand else x.view(self.operand)[:, : self.vocab]

    def anchors(self, h: Tensor, labels: Tensor) -> Tensor:
        """z_y + SHIFT by a product of its own, before the logits are made."""
        picked = self.table.index_select(0, labels.clamp(0, self.vocab - 1))
        x = (h.to(self.dtype) * picked.to(self.dtype)).sum(1)
        if self.bias is not None:
            x = x + self.bias[labels.clamp(0, self.vocab - 1)]
        x = x * self.options["scale"]
        if cap := self.options["softcap"]:
            x = cap * torch.tanh(x / cap)
        z: Tensor = x / self.options["temperature"]
        return z + SHIFT

    def sweep(
        self, kept: Tensor | None = None, unit: Tensor | None = None, *, hold: bool = False
    ) -> RowStats:
        n = self.n
        k = 0 if kept is None else kept.shape[0]
        size = self.chunk_rows(n)
        own = self.operand if self.gemm is not None and not hold else self.dtype
        in_place = kept is not None and kept.dtype == own and not hold  # no other chunk is needed
        buffer = self.empty_rows(min(size, n - k if in_place else n), own)
        stats = self.empty_stats()
        for i, j in [*blocks(0, k, size), *blocks(k, n, size)]:
            h, labels = self.rows(i, j), self.labels[i:j]
            held = kept[i:j] if kept is not None and i < k else None
            if hold or (held is None and unit is None and self.gemm is None):  # nothing is written
                x = buffer[: j - i] if held is None else held
                matmul(h, self.table.T, x)
                if self.half_range:  # anchored as where they are kept: statistics of the same bits
                    e = self.narrow(buffer[: j - i])
                    sums = self.backend.exps_(x, labels, None, **self.scaling, out=e)
                else:
                    sums = self.backend.sums(x, labels, **self.scaling)
            elif self.gemm is not None:
                e = buffer[: j - i] if held is None else held
                out = None if held is None and unit is None else e  # scoring writes none
                anchor = self.anchors(h, labels)
                sums = self.gemm(h, self.table, self.bias, labels, anchor, out, **self.options)
            else:
                x = held if held is not None and in_place else buffer[: j - i]
                matmul(h, self.table.T, x)
                e = self.narrow(x) if held is None else held
                sums = self.backend.exps_(x, labels, None, **self.scaling, out=e)
            into = None if unit is None else unit[i:j]
            if into is not None:
                matmul(e, self.table, into)
            here = stats.at(slice(i, j))
            self.backend.finish(sums, labels, self.vocab, here, self.flags, into, self.table)
        return stats

    def gradients(
        self,
        stats: RowStats,
        coef: Coefficients,
        grads: Grads,
        kept: Tensor | None = None,
        dh: Tensor | None = None,
        *,
        hold: bool = False,
    ) -> None:
        n, labels = self.n, self.labels
        k = 0 if kept is None else kept.shape[0]
        if k and not hold and kept is not None:
            h = self.trained(self.rows(0, k))
            self.add(grads, kept, h, (coef.b * stats.share)[:k])
            a, both, here = coef.a[:k], coef.both, stats.at(slice(0, k))
            both = None if both is None else both[:k]
            if grads.unit is not None:
                a, both = a / grads.unit, None if both is None else both / grads.unit
            if grads.weight is not None:
                self.backend.add_labels(grads.weight, labels[:k], h, a, both, here)
            if grads.bias is not None:
                owners = labels[:k].clamp(0, self.vocab - 1)
                grads.bias.index_put_((owners,), at_label(a, both, here), accumulate=True)
        size, start = self.chunk_rows(n), 0 if hold else k
        if start == n:
            return
        buffer = self.empty_rows(min(size, n - start), self.dtype)
        abc = (coef.a, coef.b, torch.zeros_like(coef.a) if coef.c is None else coef.c)
        largest = _power_of_two(torch.stack(abc).abs().amax(0)) if self.half_range else None
        for i, j in [*blocks(start, k, size), *blocks(k, n, size)]:
            h = self.rows(i, j)
            x = buffer[: j - i]
            if kept is not None and i < k:
                x = kept[i:j]
            else:
                matmul(h, self.table.T, x)
            dx = self.narrow(buffer[: j - i])
            some = [t[i:j] for t in abc]
            if largest is not None:  # each row in its own range, which its products leave again
                some = [t / largest[i:j] for t in some]
            options = {**self.scaling, "logps": stats.logps[i:j]}
            self.backend.dlogits_(x, labels[i:j], stats.lse[i:j], *some, **options, out=dx)
            if dh is not None:
                matmul(dx, self.table, dh[i:j])
                if largest is not None:
                    dh[i:j] *= largest[i:j, None]
            self.add(grads, dx, self.trained(h), None if largest is None else largest[i:j])

    def trained(self, h: Tensor) -> Tensor:
        """The columns that stand beside those of the head's gradient."""
        return h[:, self.first :].contiguous() if self.first else h

    @property
    def half_range(self) -> bool:
        return self.operand == torch.float16

    def add(self, grads: Grads, x: Tensor, h: Tensor, factor: Tensor | None) -> None:
        """dweight += x^T (factor h), dbias += x^T factor."""
        if not grads.any:
            return
        if factor is not None and self.half_range:
            unit = _power_of_two(factor.abs().amax())
            if grads.unit is not None:
                unit = torch.maximum(unit, grads.unit)
                for t in (grads.weight, grads.bias):
                    if t is not None:
                        t.mul_(grads.unit / unit)
            grads.unit, factor = unit, factor / unit
        if grads.weight is not None:
            rows = h if factor is None else torch.empty_like(h)
            if factor is not None:
                torch.mul(h, factor[:, None], out=rows)
            matmul(x.T, rows, grads.weight, accumulate=grads.written)
        if grads.bias is not None:
            total = self._column_sums(x, factor)
            grads.bias.copy_(grads.bias + total if grads.written else total)
        grads.written = True

    def _column_sums(self, x: Tensor, factor: Tensor | None) -> Tensor:
        """x^T factor, the factor as a half-precision number and its rest: one narrow product."""
        if factor is None:
            return x.sum(0, dtype=self.dtype)
        near = factor.to(self.operand)
        pair = torch.stack([near, (factor - near).to(self.operand)], 1)
        total = self.empty(self.vocab, 2)
        matmul(x.T, pair, total)
        return total.sum(1)


def _power_of_two(size: Tensor) -> Tensor:
    """At most ``size``; 1 where that is 0, inf or nan."""
    power = torch.exp2(torch.floor(torch.log2(size)))
    return torch.where(power.isfinite() & (power > 0), power, torch.ones_like(power))
