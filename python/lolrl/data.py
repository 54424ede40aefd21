"""Rows of offline data: reading, checking, and naming what is wrong with them.

A row is what TRL's users know: `prompt` and `completion` (strings, or lists of
`{"role", "content"}` messages) with a `reward`; or `prompt`, `chosen`, `rejected` with
`reward_chosen` and `reward_rejected`, which become two rows. `advantage`, `value` and
`ref_logps` may come with it. Every other column is kept and handed to the reward functions.
Tokens are made elsewhere (`tokens.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lolrl.rows import Bad, DataError, Messages, Record, RecordList, RowParser, Text, kind_of

__all__ = ["Bad", "DataError", "Messages", "Record", "RecordList", "Text"]
__all__ += ["read_prompts", "read_records"]

MAX_LINE_BYTES = 8 << 20


def read_records(
    source: Any,
    *,
    reward_columns: Sequence[str] = ("reward",),
    reward_weights: Sequence[float] | None = None,
    require_reward: bool = False,
    on_bad: str = "error",
) -> RecordList:
    """Records of a JSON Lines file, a list of dictionaries, or a `datasets.Dataset`.

    The reward is `sum_i reward_weights[i] * row[reward_columns[i]]` (weights default to one), or
    None where the row has none of the columns and `require_reward` is False.

    Args:
        source: path, iterable of mappings, or an object with rows that are mappings.
        reward_columns: columns summed into the reward; `c_chosen` and `c_rejected` for pairs.
        reward_weights: one finite weight for each of them.
        require_reward: a row without reward is malformed.
        on_bad: "error" raises at the first malformed row, "skip" leaves it out and counts it.

    Raises:
        DataError: (a `ValueError`) naming file, line, field and fix.
        TypeError: if `source` is none of the above.
    """
    columns = tuple(reward_columns)
    weights = tuple(1.0 for _ in columns) if reward_weights is None else tuple(reward_weights)
    if not columns or len(weights) != len(columns):
        raise ValueError(
            f"reward_weights has {len(weights)} entries for {len(columns)} reward_columns; "
            "give one for each"
        )

    def parse(row: Mapping[str, Any], name: str, line: int) -> list[Record]:
        return RowParser(row, name, line, columns, weights, require_reward).records()

    return _read(source, parse, on_bad)


def read_prompts(source: Any, *, on_bad: str = "error") -> RecordList:
    """Records that need only `prompt`; the completion is empty. Arguments as in `read_records`."""

    def parse(row: Mapping[str, Any], name: str, line: int) -> list[Record]:
        parser = RowParser(row, name, line, ("reward",), (1.0,), False)
        extra = {key: value for key, value in row.items() if key != "prompt"}
        prompt = parser.text("prompt", parser.required("prompt"))
        return [Record(prompt, "", columns=extra, source=name, line=line)]

    return _read(source, parse, on_bad)


def _read(
    source: Any, parse: Callable[[Mapping[str, Any], str, int], list[Record]], on_bad: str
) -> RecordList:
    if isinstance(source, RecordList):
        return source
    if isinstance(source, (str, os.PathLike)):
        name, rows = str(source), _lines(Path(source))
    elif isinstance(source, Mapping):
        raise TypeError("data is a single mapping; give a list of rows, a path or a Dataset")
    elif isinstance(source, Iterable) or hasattr(source, "__getitem__"):
        name, rows = "rows", _objects(source)
    else:
        raise TypeError(
            f"data is a {type(source).__name__}; give a path to a .jsonl file, a list of "
            "dictionaries or a datasets.Dataset"
        )
    result = RecordList(source=name)
    bad = Bad(on_bad, result.skipped)
    for line, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            result.extend(parse(row, name, line))
        except DataError as error:
            bad(error)
    if not result:
        skipped = f" ({len(result.skipped)} malformed)" if result.skipped else ""
        raise DataError(name, 0, "*", f"holds no usable row{skipped}", "give at least one row")
    return result


def _objects(source: Any) -> Iterator[tuple[int, Any]]:
    rows = source if isinstance(source, Iterable) else (source[i] for i in range(len(source)))
    for index, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            yield (
                index,
                DataError("rows", index, "*", f"is a {kind_of(row)}", "give a mapping of columns"),
            )
        else:
            yield index, row


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and parsed object (or `DataError`) of each line that is not blank."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(
            str(path), 0, "*", f"cannot be opened ({error.strerror})", "give a readable .jsonl file"
        ) from error
    with file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                while not raw.endswith(b"\n") and (raw := file.readline(MAX_LINE_BYTES)):
                    pass
                yield (
                    number,
                    DataError(
                        str(path),
                        number,
                        "*",
                        f"is longer than {MAX_LINE_BYTES} bytes",
                        "put one row on a line, and split or shorten it",
                    ),
                )
            elif raw.strip():
                yield number, _parse_line(str(path), number, raw)


def _parse_line(name: str, line: int, raw: bytes) -> Any:
    def refuse_constant(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON; leave the row out or give a finite number")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(name, line, twice, "is given twice", "keep one of the two")
        return result

    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
        row = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=no_duplicates)
    except DataError as error:
        return error
    except UnicodeDecodeError as error:
        return DataError(
            name, line, "*", f"is not UTF-8 ({error.reason})", "save the file as UTF-8"
        )
    except RecursionError:
        return DataError(name, line, "*", "is nested too deeply", "give a flat object")
    except ValueError as error:
        return DataError(name, line, "*", f"is not JSON ({error})", "put one JSON object on a line")
    if not isinstance(row, dict):
        return DataError(name, line, "*", f"is a {kind_of(row)}", "put one JSON object on a line")
    return row
