"""The order in which rows are trained on: a pure function of seed, epoch and place.

Nothing draws from the global generator, and no state has to be replayed: update u of epoch e is
drawn by a generator seeded from (seed, e, u), so a resumed run sees the rows it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler


def _generator(*key: int | str) -> torch.Generator:
    digest = hashlib.sha256(":".join(str(part) for part in key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class UpdateSampler(Sampler[int]):
    """Row indices, one update's worth after another.

    With weights, each update of `update_batch_size` rows is drawn by successive sampling: the first
    row with probability w_i / sum w, the next likewise among those left, and so on; so no row is
    twice in an update, and updates are independent. Rows of weight zero are never drawn; if fewer
    rows than an update have weight, an update is all of them. Without weights an epoch is a
    permutation.

    An epoch has as many draws as there are rows with weight (all rows without weights), the last
    update being shorter where the numbers do not divide.

    Args:
        weights: (n,) finite, >= 0, with at least one > 0; or None.
        num_rows: n.
        update_batch_size: rows of one update over all devices and accumulation steps, so that
            1 x 8, 2 x 4 and 8 x 1 see the same rows.
        seed: any integer.
        lengths: (n,) tokens of each row; the rows of one update then come longest first, so that
            its micro-batches hold rows of like length and little padding. The update is the same.
        group_size: consecutive rows that stay together and in order, drawn as one (without weights
            only); it divides n and update_batch_size.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        weights: Tensor | None,
        num_rows: int,
        *,
        update_batch_size: int,
        seed: int,
        lengths: Tensor | None = None,
        group_size: int = 1,
    ) -> None:
        if num_rows < 1:
            raise ValueError(f"num_rows={num_rows} must be at least 1")
        if update_batch_size < 1:
            raise ValueError(f"update_batch_size={update_batch_size} must be at least 1")
        if weights is not None:
            weights = torch.as_tensor(weights).detach().to("cpu", torch.float64)
            if weights.shape != (num_rows,):
                raise ValueError(
                    f"weights has shape {tuple(weights.shape)}, expected ({num_rows},)"
                )
            if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
                raise ValueError("weights must be finite and >= 0")
            if not bool((weights > 0).any()):
                raise ValueError(
                    "weights are all zero: no row has a positive advantage; check the value head, "
                    "or train with sampling='uniform' and advantage_filter='none'"
                )
        if lengths is not None and lengths.shape != (num_rows,):
            raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected ({num_rows},)")
        if num_rows % group_size or update_batch_size % group_size:
            raise ValueError(
                f"group_size={group_size} must divide num_rows={num_rows} and "
                f"update_batch_size={update_batch_size}"
            )
        if group_size > 1 and weights is not None:
            raise ValueError("weights are of rows, and groups are drawn: sampling must be uniform")
        self.weights, self.num_rows, self.seed = weights, num_rows, seed
        self.group_size = group_size
        self.lengths = lengths
        self.length = num_rows if weights is None else int((weights > 0).sum())
        self.update_batch_size = min(update_batch_size, self.length)
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that iteration gives."""
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[int]:
        permutation: list[int] = []
        if self.weights is None:
            generator = _generator(self.seed, self.epoch, "permutation")
            size = self.group_size
            groups = torch.randperm(self.num_rows // size, generator=generator).tolist()
            permutation = [size * group + i for group in groups for i in range(size)]
        for update, start in enumerate(range(0, self.length, self.update_batch_size)):
            stop = min(start + self.update_batch_size, self.length)
            rows = permutation[start:stop] or self.draw(update, stop - start)
            if self.lengths is not None:
                rows = self._longest_first(rows, self.lengths)
            yield from rows

    def _longest_first(self, rows: list[int], lengths: Tensor) -> list[int]:
        size = self.group_size
        groups = [rows[i : i + size] for i in range(0, len(rows), size)]
        groups.sort(key=lambda group: (-max(int(lengths[row]) for row in group), group[0]))
        return [row for group in groups for row in group]

    def draw(self, update: int, count: int) -> list[int]:
        """The `count` rows of one update of the current epoch, in the order drawn."""
        assert self.weights is not None
        generator = _generator(self.seed, self.epoch, update)
        # The order of exponential clocks with rates w is exactly successive sampling by w.
        # Logarithms keep tiny weights apart from zero ones, whose clocks never ring.
        clocks = torch.empty(self.num_rows, dtype=torch.float64).exponential_(generator=generator)
        times = clocks.log() - self.weights.log()
        return torch.topk(times, count, largest=False, sorted=True).indices.tolist()

    def fingerprint(self) -> dict[str, Any]:
        """What determines the stream of rows; kept in checkpoints and compared on resume."""
        digest = "uniform"
        if self.weights is not None:
            digest = hashlib.sha256(self.weights.numpy().tobytes()).hexdigest()
        return {
            "seed": self.seed,
            "num_rows": self.num_rows,
            "update_batch_size": self.update_batch_size,
            "weights": digest,
            "by_length": self.lengths is not None,
            **({"group_size": self.group_size} if self.group_size > 1 else {}),
        }
