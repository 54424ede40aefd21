"""The tokenised dataset: rows packed end to end, with what is known about each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lolrl.data import read_records
from lolrl.encoding import (
    completion_text,
    encode,
    encode_prompt,
    head_rows,
    model_eos_ids,
    prefix_ids,
    prompt_text,
)
from lolrl.rows import Bad, DataError, Record

__all__ = [
    "LoLDataset",
    "as_dataset",
    "completion_text",
    "encode",
    "encode_prompt",
    "head_rows",
    "model_eos_ids",
    "prefix_ids",
    "prompt_text",
]


class LoLDataset(Dataset[dict[str, Any]]):
    """Tokenised rows, packed end to end, with what is known about each.

    Row i is `ids[offsets[i]:offsets[i + 1]]`; its first `prompt_lengths[i]` tokens are the prompt.

    Attributes:
        ids: (sum of lengths,) int64.  offsets: (n + 1,) int64.  prompt_lengths: (n,) int64.
        rewards, values, advantages: (n,) float64 or None.
        ref_logps: list of n float32 tensors, one log-prob (nats) per completion token, or None.
        records: the n rows the tokens came from.
        skipped: errors of the rows left out.
    """

    def __init__(
        self,
        rows: Sequence[list[int]],
        prompt_lengths: Sequence[int],
        records: Sequence[Record],
        *,
        rewards: Tensor | None = None,
        values: Tensor | None = None,
        advantages: Tensor | None = None,
        ref_logps: Sequence[Tensor] | None = None,
        skipped: Sequence[DataError] = (),
    ) -> None:
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        self.ids = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
        self.prompt_lengths = torch.tensor(list(prompt_lengths), dtype=torch.int64)
        self.records = list(records)
        self.rewards, self.values, self.advantages = rewards, values, advantages
        self.ref_logps = None if ref_logps is None else list(ref_logps)
        self.skipped = list(skipped)
        self._check()

    def _check(self) -> None:
        n = len(self)
        for name in ("rewards", "values", "advantages", "ref_logps", "records"):
            column = getattr(self, name)
            if column is not None and len(column) != n:
                raise ValueError(f"{name} has {len(column)} entries for {n} rows")
        if self.ref_logps is not None:
            for i, (logps, count) in enumerate(
                zip(self.ref_logps, self.completion_lengths.tolist(), strict=True)
            ):
                if logps.shape != (count,):
                    raise self.records[i].error(
                        "ref_logps",
                        f"has {logps.numel()} entries for {count} completion tokens",
                        "score the rows with the tokenizer and length limits of the training",
                    )

    @classmethod
    def from_records(
        cls,
        records: Sequence[Record],
        tokenizer: Any,
        *,
        max_prompt_length: int | None = None,
        max_completion_length: int | None = None,
        vocab_size: int | None = None,
        eos_ids: Sequence[int] | None = None,
        on_bad: str = "error",
    ) -> LoLDataset:
        """Tokenise records.

        A column is None unless every row has it. `vocab_size` is the number of rows of the model's
        head: a larger id would read outside of it. For the other arguments see `encode`.

        Raises:
            DataError: for a row whose tokens cannot be trained on, naming file, line and field.
        """
        skipped = list(getattr(records, "skipped", ()))
        bad = Bad(on_bad, skipped)
        rows, lengths, kept = [], [], []
        prefix = prefix_ids(tokenizer)
        for record in records:
            try:
                ids, length = encode(
                    tokenizer,
                    record.prompt,
                    record.completion,
                    max_prompt_length=max_prompt_length,
                    max_completion_length=max_completion_length,
                    eos_ids=eos_ids,
                    prefix=prefix,
                )
                _check_row(record, ids, length, tokenizer, vocab_size)
            except DataError as error:
                bad(error)
                continue
            rows.append(ids)
            lengths.append(length)
            kept.append(record)
        if not rows:
            source = getattr(records, "source", "rows")
            raise DataError(source, 0, "*", "holds no usable row", "give at least one row")
        logps = [r.ref_logps for r in kept]
        return cls(
            rows,
            lengths,
            kept,
            rewards=_column([r.reward for r in kept]),
            values=_column([r.value for r in kept]),
            advantages=_column([r.advantage for r in kept]),
            ref_logps=None
            if any(row is None for row in logps)
            else [torch.tensor(row, dtype=torch.float32) for row in logps],
            skipped=skipped,
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> Tensor:
        """(n,) tokens of each row."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def completion_lengths(self) -> Tensor:
        """(n,) completion tokens of each row, EOS included."""
        return self.lengths - self.prompt_lengths

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {
            "input_ids": self.ids[self.offsets[index] : self.offsets[index + 1]],
            "prompt_length": int(self.prompt_lengths[index]),
            "index": int(index),
        }
        for name, key in (("rewards", "reward"), ("values", "value"), ("advantages", "advantage")):
            column = getattr(self, name)
            if column is not None:
                row[key] = float(column[index])
        if self.ref_logps is not None:
            row["ref_logps"] = self.ref_logps[index]
        return row

    def select(self, indices: Sequence[int]) -> LoLDataset:
        """The given rows, in the given order."""
        picked = [int(i) for i in indices]
        index = torch.tensor(picked, dtype=torch.int64)

        def pick(column: Tensor | None) -> Tensor | None:
            return None if column is None else column[index]

        return LoLDataset(
            [self.ids[self.offsets[i] : self.offsets[i + 1]].tolist() for i in picked],
            [int(self.prompt_lengths[i]) for i in picked],
            [self.records[i] for i in picked],
            rewards=pick(self.rewards),
            values=pick(self.values),
            advantages=pick(self.advantages),
            ref_logps=None if self.ref_logps is None else [self.ref_logps[i] for i in picked],
            skipped=self.skipped,
        )

    def with_columns(self, **columns: Any) -> LoLDataset:
        """The same tokens with `rewards`, `values`, `advantages` or `ref_logps` replaced."""
        result = object.__new__(LoLDataset)
        result.__dict__.update(self.__dict__)
        for name, column in columns.items():
            if name not in ("rewards", "values", "advantages", "ref_logps"):
                raise ValueError(f"{name!r} is not a column of LoLDataset")
            setattr(result, name, column)
        result._check()
        return result


def _column(values: list[float | None]) -> Tensor | None:
    if any(value is None for value in values):
        return None
    return torch.tensor(values, dtype=torch.float64)


def _check_row(
    record: Record, ids: list[int], length: int, tokenizer: Any, vocab_size: int | None
) -> None:
    if length == 0:
        raise record.error(
            "prompt",
            "leaves no token before the completion, so nothing predicts its first token",
            "give a prompt that ends at a token boundary, or use a tokenizer that adds BOS",
        )
    tail = ids[length:]
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if not [i for i in tail if i != eos and i != pad]:
        raise record.error(
            "completion", "has no token but padding and EOS", "give a response that says something"
        )
    if vocab_size is not None and (largest := max(ids)) >= vocab_size:
        raise record.error(
            "completion" if max(tail) >= vocab_size else "prompt",
            f"holds token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but the model "
            f"has {vocab_size} rows",
            "use the model's tokenizer, or resize the model's embeddings",
        )
    if record.ref_logps is not None and len(record.ref_logps) != len(tail):
        raise record.error(
            "ref_logps",
            f"has {len(record.ref_logps)} entries for {len(tail)} completion tokens",
            "score the rows with the tokenizer and length limits of the training",
        )


def as_dataset(data: Any, tokenizer: Any, model: Any, config: Any) -> LoLDataset:
    """A `LoLDataset` of whatever `read_records` takes, by the limits and policies of `config`."""
    if isinstance(data, LoLDataset):
        return data
    records = read_records(
        data,
        reward_columns=config.reward_columns,
        reward_weights=config.reward_weights,
        on_bad=config.on_bad,
    )
    return LoLDataset.from_records(
        records,
        tokenizer,
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        vocab_size=head_rows(model),
        eos_ids=model_eos_ids(model),
        on_bad=config.on_bad,
    )
