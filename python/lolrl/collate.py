"""Rows to a batch, padded on either side or packed: the same positions, so the same log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Of a batch, what a fused model takes whatever the objective.
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "completion_mask", "cu_seqlens")


class LoLCollator:
    """Pads rows of a `LoLDataset` into one batch.

    Args:
        pad_token_id: id at padded places; it may equal EOS, the mask is made from lengths.
        padding_side: "right" or "left".
        pad_to_multiple_of: round the padded length up to a multiple of this.

    Returns (when called with B rows) a dictionary:
        input_ids, attention_mask, position_ids: (B, T) int64; positions count real tokens from 0.
        completion_mask: (B, T) bool, True at completion tokens, EOS included.
        ref_logps: (B, T) float32 nats, zero outside the completion, if every row has them.
        advantages, rewards: (B,) float32, if every row has them.
    """

    def __init__(
        self,
        pad_token_id: int,
        *,
        padding_side: str = "right",
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side={padding_side!r} must be 'right' or 'left'")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of!r} must be at least 1")
        self.pad_token_id = int(pad_token_id)
        self.padding_side = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if not rows:
            raise ValueError("rows is empty; a batch needs at least one row")
        count, width = len(rows), max(len(row["input_ids"]) for row in rows)
        step = self.pad_to_multiple_of
        if step is not None:
            width = (width + step - 1) // step * step
        batch = {
            "input_ids": torch.full((count, width), self.pad_token_id, dtype=torch.int64),
            "attention_mask": torch.zeros(count, width, dtype=torch.int64),
            "position_ids": torch.zeros(count, width, dtype=torch.int64),
            "completion_mask": torch.zeros(count, width, dtype=torch.bool),
        }
        if all("ref_logps" in row for row in rows):
            batch["ref_logps"] = torch.zeros(count, width, dtype=torch.float32)
        for b, row in enumerate(rows):
            ids = torch.as_tensor(row["input_ids"], dtype=torch.int64)
            start = width - len(ids) if self.padding_side == "left" else 0
            stop = start + len(ids)
            first = start + int(row["prompt_length"])
            batch["input_ids"][b, start:stop] = ids
            batch["attention_mask"][b, start:stop] = 1
            batch["position_ids"][b, start:stop] = torch.arange(len(ids))
            batch["completion_mask"][b, first:stop] = True
            if "ref_logps" in batch:
                batch["ref_logps"][b, first:stop] = torch.as_tensor(row["ref_logps"])
        return batch | _per_row(rows)


class PackingCollator:
    """Packs rows of a `LoLDataset` one behind the other into one row, without padding.

    A fused model (`lk.fuse_lm_head`) takes the batch as it is: attention keeps sequences apart
    whose positions start again, in flash attention's varlen kernels or a block-diagonal mask. The
    first such call tries whether the model's does. The mask of SDPA and eager attention is
    (T, T). There is no attention_mask, on purpose: with one
    transformers would not look at the positions.

    Returns (when called with S rows of T tokens together) a dictionary:
        input_ids, position_ids: (1, T) int64; positions count from 0 in every sequence.
        completion_mask: (1, T) bool, True at completion tokens, EOS included.
        cu_seqlens: (S + 1,) int64, where the sequences begin and end.
        ref_logps: (1, T) float32 nats, zero outside the completions, if every row has them.
        advantages, rewards: (S,) float32, if every row has them.
    """

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        if not rows:
            raise ValueError("rows is empty; a batch needs at least one row")
        apart = [LoLCollator(0)([row]) for row in rows]
        names = ["input_ids", "position_ids", "completion_mask"]
        if all("ref_logps" in row for row in rows):
            names.append("ref_logps")
        lengths = torch.tensor([0, *(one["input_ids"].shape[1] for one in apart)])
        batch = {name: torch.cat([one[name] for one in apart], 1) for name in names}
        batch["cu_seqlens"] = lengths.cumsum(0)
        return batch | _per_row(rows)


def _per_row(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        name: torch.tensor([row[key] for row in rows], dtype=torch.float32)
        for key, name in (("advantage", "advantages"), ("reward", "rewards"))
        if all(key in row for row in rows)
    }
