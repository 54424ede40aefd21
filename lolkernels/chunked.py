"""The GEMM driver: logits tile by tile, never ``tokens x vocabulary`` at once.

Three walks over the tiles of ``logits = hidden W^T + bias``:

* :func:`tile_stats`: the row statistics. One GEMM. Scoring, and the forward of ``linear_logprob``.
* :func:`tile_grads`: gradients for known ``lse`` and (a, b, c). Three GEMMs (two with a frozen
  operand).
* :func:`loss_and_grads`: a whole objective in 3 GEMMs (2): chunks of whole groups, whose logits
  rows are held until the coefficient is known.

On a CPU tiles are column panels, so that the row sweeps find the logits in cache and weights stored
in bf16 or fp16 are multiplied in fp32 panel by panel (CPUs without matrix units run bf16 GEMMs at
half the fp32 rate). On a GPU a tile is as wide as the vocabulary: bf16 and fp16 operands are
multiplied as they are, with fp32 logits, and the gradients of the logits are rounded to their dtype
over the first half of the fp32 rows. Nothing here waits for the device.

The extra memory of each is stated by :func:`lolkernels.planner.extra_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import planner
from .backends.contract import Backend
from .gemm import HALF, has_fp32_output, matmul
from .planner import PANEL, Piece, chunk_index

# log-probs of a chunk's rows, its pieces, where the rows stand -> d loss / d logp of each row
Step = Callable[[Tensor, list[Piece], "slice | Tensor"], Tensor]


class Scaling(NamedTuple):
    """z = softcap(scale * x) / temperature; softcap 0 means none."""

    scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0


class RowStats(NamedTuple):
    target_logit: Tensor  # (n,)
    lse: Tensor  # (n,)
    expected_logit: Tensor  # (n,)
    max_logit: Tensor  # (n,)


class Head:
    """``x = h W^T + bias`` by tiles, computed and returned in fp32 (fp64 for fp64 operands)."""

    def __init__(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        labels: Tensor,  # (N,)
        scaling: Scaling,
        backend: Backend,
        *,
        poison: Tensor | None = None,  # (N,) zero, nan where a row is spoilt
    ) -> None:
        self.hidden, self.weight, self.bias, self.labels = hidden, weight, bias, labels
        self.options = scaling._asdict()
        self.backend = backend
        self.poison = poison
        self.dtype = accumulation_dtype(hidden, weight)
        self.vocab = weight.shape[0]
        self.whole_rows, self.operand = walk(hidden.device, hidden.dtype, weight.dtype, backend)
        self.width = self.vocab if self.whole_rows else min(PANEL, self.vocab)
        self._panel: Tensor | None = None

    def panels(self) -> Iterator[tuple[int, int]]:
        for v0 in range(0, self.vocab, self.width):
            yield v0, min(v0 + self.width, self.vocab)

    def weight_panel(self, v0: int, v1: int) -> Tensor:
        panel = self.weight[v0:v1]
        if panel.dtype == self.operand:
            return panel
        if self._panel is None:
            self._panel = self.empty(self.width, panel.shape[1])
        return self._panel[: v1 - v0].copy_(panel)

    def rows(self, index: slice | Tensor) -> Tensor:
        picked = (
            self.hidden[index] if isinstance(index, slice) else self.hidden.index_select(0, index)
        )
        return picked.to(self.operand)

    def chunk_rows(self, width: int, memory_budget: int | None) -> int:
        return planner.chunk_rows(width, self.dtype.itemsize, memory_budget, self.hidden.device)

    def held_rows(self, memory_budget: int | None) -> int:
        """Rows that a chunk of whole groups may have."""
        return self.chunk_rows(self.vocab, memory_budget)

    def empty(self, *shape: int) -> Tensor:
        return self.hidden.new_empty(shape, dtype=self.dtype)

    def empty_logits(self, rows: int, width: int) -> Tensor:
        """(rows, width). Whole rows start at multiples of 16 elements, whatever the vocabulary."""
        stride = planner.padded(width) if self.whole_rows else width
        return self.hidden.new_empty(rows, stride, dtype=self.dtype)[:, :width]

    def empty_stats(self, n: int) -> RowStats:
        return RowStats(*(self.empty(n) for _ in RowStats._fields))

    def logits(self, h: Tensor, w: Tensor, v0: int, v1: int, out: Tensor) -> Tensor:
        matmul(h, w.T, out)
        return out if self.bias is None else out.add_(self.bias[v0:v1])

    def row_stats(self, x: Tensor, labels: Tensor) -> RowStats:
        return RowStats(*self.backend.row_stats(x, labels, **self.options))

    def poisoned(self, stats: RowStats, index: slice | Tensor) -> RowStats:
        """A spoilt row has nan for lse, hence for its log-prob and all its gradients."""
        if self.poison is None:
            return stats
        return stats._replace(lse=stats.lse + self.poison[index])

    def dlogits_(self, x: Tensor, labels: Tensor, lse: Tensor, abc: tuple[Tensor, ...]) -> Tensor:
        """In the dtype that the next GEMMs take, in the memory of ``x``."""
        rounded = None if self.operand == x.dtype else x.view(self.operand)[:, : x.shape[1]]
        return self.backend.dlogits_(x, labels, lse, *abc, **self.options, out=rounded)


class Grads:
    """Accumulators, one for each operand that needs a gradient; the others are empty.

    They are fp32 (fp64), so that many chunks lose nothing. ``round_weight`` stores dweight in the
    weight's own dtype: for :func:`tile_grads` alone, which finishes a panel before it rounds it.

    ``scale_to`` tells about the largest coefficient (a, b, c) there will be (None: there are none).
    It is asked for fp16 operands only, whose range is small: a mean over 8192 tokens would put the
    gradients of the logits under its smallest number. Each row of them is made for coefficients
    divided by a power of two near their size, which its dhidden is multiplied by in fp32, and its
    hidden state before dweight is made; dweight is in units of that size until the end.
    """

    def __init__(
        self,
        head: Head,
        need_hidden: bool,
        need_weight: bool,
        need_bias: bool,
        *,
        round_weight: bool = False,
        scale_to: Callable[[], Tensor | None] = lambda: None,  # ()
    ) -> None:
        self.need_hidden, self.need_weight, self.need_bias = need_hidden, need_weight, need_bias
        n, d = head.hidden.shape
        dtype = head.weight.dtype if round_weight else head.dtype
        self.hidden = head.empty(n if need_hidden else 0, d).zero_()
        self.weight = head.weight.new_empty((head.vocab if need_weight else 0, d), dtype=dtype)
        self.bias = head.empty(head.vocab if need_bias else 0)
        self.written = False
        self.unit: Tensor | None = None
        size = scale_to() if head.operand == torch.float16 else None
        if size is not None:
            self.unit = _power_of_two(size.to(head.dtype))

    def rows_in_range(
        self, h: Tensor, abc: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor]:
        """(a, b, c), the factor of dhidden's rows (None: one), and the rows that dweight takes."""
        if self.unit is None:
            return abc, None, h
        size = _power_of_two(torch.stack(abc).abs().amax(0))
        return tuple(t / size for t in abc), size, (h * (size / self.unit)[:, None]).to(h.dtype)

    def from_units_(self, value: Tensor) -> Tensor:
        return value if self.unit is None else value.mul_(self.unit)

    @property
    def any(self) -> bool:
        return self.need_hidden or self.need_weight or self.need_bias

    def add_bias(self, dx: Tensor, size: Tensor | None, v0: int, v1: int, first: bool) -> None:
        if not self.need_bias:
            return
        if size is None or self.unit is None:
            total = dx.sum(0, dtype=self.bias.dtype)
        else:
            total = torch.empty_like(self.bias[v0:v1])
            matmul(dx.T, (size / self.unit).to(dx.dtype)[:, None], total[:, None])
        self.bias[v0:v1] = total if first else self.bias[v0:v1] + total

    def store_rows(self, index: slice | Tensor, dh: Tensor) -> None:
        if isinstance(index, slice):
            self.hidden[index] = dh
        else:
            self.hidden.index_copy_(0, index, dh)

    def finish(self) -> None:
        """Where no row was computed the gradients are zero."""
        if not self.written:
            self.weight.zero_()
            self.bias.zero_()
            return
        self.from_units_(self.bias)
        if self.weight.dtype == self.bias.dtype:  # tile_grads has rounded it otherwise
            self.from_units_(self.weight)


def _power_of_two(size: Tensor) -> Tensor:
    """At most ``size``; 1 where that is 0, inf or nan."""
    power = torch.exp2(torch.floor(torch.log2(size)))
    return torch.where(power.isfinite() & (power > 0), power, torch.ones_like(power))


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def walk(
    device: torch.device, hidden: torch.dtype, weight: torch.dtype, backend: Backend
) -> tuple[bool, torch.dtype]:
    """Whether tiles are as wide as the vocabulary, and the dtype of the GEMMs' operands.

    Whole rows need operands that can be multiplied as they are stored.
    """
    wide = torch.float64 if torch.float64 in (hidden, weight) else torch.float32
    alike = hidden == weight and (hidden not in HALF or has_fp32_output(device, hidden))
    whole_rows = (device.type != "cpu" or not backend.panels) and (alike or weight == wide)
    return whole_rows, hidden if whole_rows and alike else wide


def merge_stats(parts: list[RowStats]) -> RowStats:
    """The statistics of a row from those of its column panels (or vocabulary shards)."""
    if len(parts) == 1:
        return parts[0]
    target, lse, expected, largest = (torch.stack(column) for column in zip(*parts, strict=True))
    total = torch.logsumexp(lse, 0)
    share = torch.softmax(lse, 0)  # sums to one, which exp(lse - total) does to lse's rounding only
    # A panel that is all -inf has no expectation (nan) and no share.
    mean = torch.where(share == 0, 0.0, share * expected).sum(0)
    return RowStats(target.amax(0), total, mean, largest.amax(0))


def _blocks(rows: slice | Tensor, n: int, size: int) -> Iterator[tuple[int, int, slice | Tensor]]:
    """(i, j, index): rows i:j of the picked ones, and where they stand in hidden."""
    for i in range(0, n, size):
        j = min(i + size, n)
        here = rows[i:j] if isinstance(rows, Tensor) else slice(rows.start + i, rows.start + j)
        yield i, j, here


# --- by tiles: nothing wider than a panel is held -------------------------------------------------


def tile_stats(head: Head, rows: slice | Tensor, n: int, memory_budget: int | None) -> RowStats:
    """Row statistics, each (n,): one GEMM."""
    size = head.chunk_rows(head.width, memory_budget)
    buffer = head.empty_logits(min(size, n), head.width)
    out = head.empty_stats(n)
    for i, j, index in _blocks(rows, n, size):
        h, labels = head.rows(index), head.labels[index]
        parts = []
        for v0, v1 in head.panels():
            x = head.logits(h, head.weight_panel(v0, v1), v0, v1, buffer[: j - i, : v1 - v0])
            parts.append(head.row_stats(x, labels - v0))
        for into, value in zip(out, head.poisoned(merge_stats(parts), index), strict=True):
            into[i:j] = value
    return out


def tile_grads(
    head: Head,
    rows: slice | Tensor,
    n: int,
    lse: Tensor,  # (n,)
    abc: tuple[Tensor, Tensor, Tensor],  # each (n,)
    grads: Grads,
    memory_budget: int | None,
) -> None:
    """Add the gradients of rows whose statistics and coefficients are known: 3 GEMMs (2)."""
    size = head.chunk_rows(head.width, memory_budget)
    buffer = head.empty_logits(min(size, n), head.width)
    hidden, labels = head.rows(rows), head.labels[rows]
    scaled, sizes, weighted = grads.rows_in_range(hidden, abc)
    # Adjacent rows are written where they belong; picked ones are gathered first.
    in_place = grads.need_hidden and isinstance(rows, slice)
    dh = (
        grads.hidden[rows]
        if in_place
        else head.empty(n if grads.need_hidden else 0, hidden.shape[1])
    )
    rounded = grads.need_weight and grads.weight.dtype != head.dtype
    dw = head.empty(head.width if rounded else 0, hidden.shape[1])
    for v0, v1 in head.panels():
        w = head.weight_panel(v0, v1)
        for i, j, _ in _blocks(rows, n, size):
            h = hidden[i:j]
            x = head.logits(h, w, v0, v1, buffer[: j - i, : v1 - v0])
            dx = head.dlogits_(x, labels[i:j] - v0, lse[i:j], tuple(t[i:j] for t in scaled))
            if grads.need_hidden:
                matmul(dx, w, dh[i:j], accumulate=v0 > 0)
            first = i == 0 and not grads.written
            if grads.need_weight:
                into = dw[: v1 - v0] if rounded else grads.weight[v0:v1]
                matmul(dx.T, weighted[i:j], into, accumulate=not first)
            grads.add_bias(dx, None if sizes is None else sizes[i:j], v0, v1, first)
        if rounded:
            grads.weight[v0:v1] = grads.from_units_(dw[: v1 - v0])
    if n and grads.need_hidden:
        if sizes is not None:
            dh.mul_(sizes[:, None])
        if not in_place:
            grads.store_rows(rows, dh)
    grads.written = grads.written or n > 0


# --- by chunks: whole rows are held until their coefficient is known ------------------------------


def _chunk_stats(
    head: Head, h: Tensor, labels: Tensor, x: Tensor, index: slice | Tensor
) -> RowStats:
    """Fill ``x`` (n, V) with logits and take their statistics while each panel is in cache."""
    parts = []
    for v0, v1 in head.panels():
        tile = head.logits(h, head.weight_panel(v0, v1), v0, v1, x[:, v0:v1])
        parts.append(head.row_stats(tile, labels - v0))
    return head.poisoned(merge_stats(parts), index)


def _chunk_grads(
    head: Head,
    h: Tensor,
    labels: Tensor,
    x: Tensor,
    lse: Tensor,
    coef: Tensor,
    grads: Grads,
) -> Tensor:
    """Overwrite ``x`` by dlogits, add dweight and dbias, return dhidden (n, D)."""
    dh = head.empty(h.shape[0] if grads.need_hidden else 0, h.shape[1])
    abc, sizes, weighted = grads.rows_in_range(h, (coef, -coef, torch.zeros_like(coef)))
    for v0, v1 in head.panels():
        dx = head.dlogits_(x[:, v0:v1], labels - v0, lse, abc)
        if grads.need_hidden:
            matmul(dx, head.weight_panel(v0, v1), dh, accumulate=v0 > 0)
        if grads.need_weight:
            matmul(dx.T, weighted, grads.weight[v0:v1], accumulate=grads.written)
        grads.add_bias(dx, sizes, v0, v1, not grads.written)
    grads.written = True
    return dh if sizes is None or not grads.need_hidden else dh.mul_(sizes[:, None])


def loss_and_grads(
    head: Head,
    chunks: list[list[Piece]],
    step: Step,
    grads: Grads,
    stats: RowStats,  # each (N,): filled in for the rows that are computed
    memory_budget: int | None,
) -> None:
    """Run ``step`` over all chunks and accumulate the gradients: 3 GEMMs, 2 with a frozen operand.

    A chunk of more rows than the budget holds is one long group. Frozen head: dhidden is made with
    coefficient one, and its rows are rescaled when the group ends (2 GEMMs still). Trainable head:
    its statistics come first and its logits twice (4 GEMMs for that group). Without a gradient to
    compute: statistics only.
    """
    max_rows = head.held_rows(memory_budget)
    placed = [(pieces, *chunk_index(pieces, head.hidden.device)) for pieces in chunks]
    longest = min(max_rows, max((n for *_, n in placed), default=0))
    held = longest if _holds_rows(grads, placed, max_rows) else 0
    buffer = head.empty_logits(held, head.vocab)
    for pieces, index, n in placed:
        if grads.any and n <= max_rows:
            h, labels, x = head.rows(index), head.labels[index], buffer[:n]
            part = _chunk_stats(head, h, labels, x, index)
            coef = step(part.target_logit - part.lse, pieces, index)
            dh = _chunk_grads(head, h, labels, x, part.lse, coef, grads)
            if grads.need_hidden:
                grads.store_rows(index, dh)
        elif grads.any and not (grads.need_weight or grads.need_bias):
            part, dh = _unit_grads(head, index, n, buffer, grads)
            coef = step(part.target_logit - part.lse, pieces, index)
            grads.store_rows(index, dh.mul_(coef[:, None]))
        else:
            part = tile_stats(head, index, n, memory_budget)
            coef = step(part.target_logit - part.lse, pieces, index)
            if grads.any:
                abc = (coef, -coef, torch.zeros_like(coef))
                tile_grads(head, index, n, part.lse, abc, grads, memory_budget)
        for into, value in zip(stats, part, strict=True):
            if isinstance(index, slice):
                into[index] = value
            else:
                into.index_copy_(0, index, value)
    grads.finish()


def _holds_rows(grads: Grads, placed: list[Any], max_rows: int) -> bool:
    """Whether any chunk takes a path that holds full-width logits."""
    only_hidden = not (grads.need_weight or grads.need_bias)
    return grads.any and any(n <= max_rows or only_hidden for *_, n in placed)


def _unit_grads(
    head: Head, rows: slice | Tensor, n: int, buffer: Tensor, grads: Grads
) -> tuple[RowStats, Tensor]:
    """Statistics and dhidden for d loss / d logp = 1, a buffer of rows at a time."""
    out, dh = head.empty_stats(n), head.empty(n, head.hidden.shape[1])
    for i, j, index in _blocks(rows, n, buffer.shape[0]):
        h, labels, x = head.rows(index), head.labels[index], buffer[: j - i]
        part = _chunk_stats(head, h, labels, x, index)
        ones = torch.ones_like(part.lse)
        dh[i:j] = _chunk_grads(head, h, labels, x, part.lse, ones, grads)
        for into, value in zip(out, part, strict=True):
            into[i:j] = value
    return out, dh
