"""The walk on a CPU: panels of columns, swept while they are in cache.

    sweep      for a tile of rows, for a panel of columns:
                   x = h W_panel^T + bias                            GEMM 1
                   E = exp(x - anchor), sums                         one read, one write, in place
                   unit += E W_panel                                 GEMM 2
    gradients  for a panel of columns:
                   dweight_panel = E^T (b share h) + the label's     GEMM 3

Weights stored in bf16 or fp16 are multiplied in fp32, converted panel by panel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import memory
from .backends.contract import Exps, RowStats
from .backends.finish import at_label, finish
from .gemm import matmul
from .walk import Coefficients, Grads, Walk, blocks


class PanelWalk(Walk):
    _panel: Tensor | None = None

    @property
    def table(self) -> Tensor:
        return self.weight

    @property
    def width(self) -> int:
        return min(memory.PANEL, self.vocab)

    def tile_rows(self) -> int:
        return memory.tile_rows(self.width, self.dtype.itemsize, self.budget)

    def panels(self) -> Iterator[tuple[int, int]]:
        return blocks(0, self.vocab, self.width)

    def weight_panel(self, v0: int, v1: int) -> Tensor:
        panel = self.weight[v0:v1]
        if panel.dtype == self.dtype and self.up is None:
            return panel
        if self._panel is None:
            self._panel = self.empty(self.width, self.hidden.shape[1])
        whole, d = self._panel[: v1 - v0], panel.shape[1]
        whole[:, :d].copy_(panel)
        if self.up is not None:
            whole[:, d:].copy_(self.up[v0:v1])
        return whole

    def logits(self, h: Tensor, w: Tensor, v0: int, out: Tensor) -> None:
        matmul(h, w.T, out)
        if self.bias is not None:
            out.add_(self.bias[v0 : v0 + w.shape[0]])

    def sweep(
        self, kept: Tensor | None = None, unit: Tensor | None = None, *, hold: bool = False
    ) -> RowStats:
        n = self.n
        k = 0 if kept is None else kept.shape[0]
        size = self.tile_rows()
        buffer = self.empty(min(size, n if hold else n - k), self.width)
        stats = self.empty_stats()
        for i, j in [*blocks(0, k, size), *blocks(k, n, size)]:
            h, labels = self.rows(i, j), self.labels[i:j]
            held = kept[i:j] if kept is not None and i < k else None
            into = None if unit is None else unit[i:j]
            sums = self._sweep_tile(h, labels, held, buffer, into, hold)
            here = stats.at(slice(i, j))
            finish(sums, labels, self.vocab, here, self.flags, into, self.table, self.more)
        return stats

    def _sweep_tile(
        self,
        h: Tensor,  # (m, D)
        labels: Tensor,
        held: Tensor | None,  # (m, V)
        buffer: Tensor,
        unit: Tensor | None,  # (m, D)
        hold: bool,
    ) -> Exps:
        """The sums of whole rows, in fp64.

        The anchor of a row is its maximum over the first panel, raised where a later panel stands
        far above it: what has been summed and stored by then shrinks.
        """
        m = labels.shape[0]
        anchor = h.new_full((m,), -torch.inf)  # the kernel takes the maximum then
        rest, deviation, slope = (h.new_zeros(m, dtype=torch.float64) for _ in range(3))
        largest, target = (h.new_full((m,), -torch.inf) for _ in range(2))
        for v0, v1 in self.panels():
            x = buffer[:m, : v1 - v0] if held is None else held[:, v0:v1]
            w = self.weight_panel(v0, v1)
            self.logits(h, w, v0, x)
            out = buffer[:m, : v1 - v0].copy_(x) if hold and held is not None else x
            sums = self.backend.exps_(out, labels - v0, anchor, **self.options)
            if v0 and not torch.equal(sums.anchor, anchor):
                fall = (anchor - sums.anchor).double()
                shrink = fall.exp()
                deviation = shrink * torch.where(rest == 0, 0.0, deviation + rest * fall)
                rest *= shrink
                factor = shrink[:, None].to(x.dtype)
                if unit is not None:
                    unit *= factor
                if held is not None and not hold:
                    held[:, :v0] *= factor
            rest += sums.rest
            deviation += sums.deviation
            slope += sums.slope
            largest = torch.maximum(largest, sums.max_logit)
            target = torch.maximum(target, sums.target_logit)
            # Until a column counts there is nothing to stand on.
            anchor = sums.anchor.masked_fill(rest == 0, -torch.inf)
            if unit is not None:
                matmul(x, w, unit, accumulate=v0 > 0)
        # Where no other column counts the label stands alone.
        anchor = torch.where((rest == 0) & target.isfinite(), target, sums.anchor).double()
        return Exps(anchor, rest, deviation, largest.double(), target.double(), slope)

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
        n, h, labels = self.n, self.rows(0, self.n), self.labels
        trained = h[:, self.first :]
        k = 0 if kept is None else kept.shape[0]
        size = self.tile_rows()
        buffer = self.empty(min(size, n if hold else n - k), self.width)
        abc = (coef.a, coef.b, torch.zeros_like(coef.a) if coef.c is None else coef.c)
        tiles = list(blocks(k, n, size))
        if k and hold:
            tiles = [*blocks(0, k, size), *tiles]
        else:
            share = coef.b[:k] * stats.share[:k]
            scaled = trained[:k] * share[:, None]
            owners, own = labels[:k], at_label(coef.a, coef.both, stats)[:k]
        table = grads.weight
        rounded = table is not None and table.dtype != self.dtype
        dw = self.empty(self.width, trained.shape[1]) if rounded else table
        for v0, v1 in self.panels():
            w = self.weight_panel(v0, v1) if tiles else self.weight
            into = None if dw is None else dw[: v1 - v0] if rounded else dw[v0:v1]
            more = grads.written and not rounded
            if kept is not None and k and not hold:
                x = kept[:, v0:v1]
                mine = ((owners >= v0) & (owners < v1)).nonzero().squeeze(1)
                columns = owners[mine] - v0
                if into is not None:
                    matmul(x.T, scaled, into, accumulate=more)
                    into.index_add_(0, columns, trained[mine] * own[mine, None])
                if grads.bias is not None:
                    total = (x.T @ share).index_add_(0, columns, own[mine])
                    _put(grads.bias[v0:v1], total, more)
                more = True
            for i, j in tiles:
                out = buffer[: j - i, : v1 - v0]
                if kept is not None and i < k:
                    x = kept[i:j, v0:v1]
                else:
                    x = out
                    self.logits(h[i:j], w, v0, out)
                vectors = (t[i:j] for t in (stats.lse, *abc))
                options = {**self.options, "logps": stats.logps[i:j]}
                self.backend.dlogits_(x, labels[i:j] - v0, *vectors, **options, out=out)
                if dh is not None:
                    matmul(out, w, dh[i:j], accumulate=v0 > 0)
                if into is not None:
                    matmul(out.T, trained[i:j], into, accumulate=more)
                if grads.bias is not None:
                    _put(grads.bias[v0:v1], out.sum(0), more)
                more = True
            if rounded and more and table is not None and into is not None:
                _put(table[v0:v1], into, grads.written)
        grads.written = grads.written or n > 0


def _put(into: Tensor, value: Tensor, more: bool) -> None:
    if more:
        into.add_(value)
    else:
        into.copy_(value)
