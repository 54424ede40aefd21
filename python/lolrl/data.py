"""Rows of offline data: reading, checking, and naming what is wrong with them.

A row is what TRL's users know: `prompt` and `completion` (strings, or lists of
`{"role", "content"}` messages) with a `reward`; or `prompt`, `chosen`, `rejected` with
`reward_chosen` and `reward_rejected`, which become two rows. `advantage`, `value` and
`ref_logps` may come with it. Every other column is kept and handed to the reward functions.
Tokens are made elsewhere (`tokens.py`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 8 << 20
MAX_SHOWN = 60

Messages = list[dict[str, Any]]
Text = str | Messages


class DataError(ValueError):
    """A row that cannot be used.

    Attributes:
        source: file name, or the kind of object the row came from.
        line: line in the file, or index in the object; both count from 1. 0 for the whole source.
        field: column at fault.
        fix: what to change.
    """

    def __init__(self, source: str, line: int, field: str, problem: str, fix: str) -> None:
        self.source, self.line, self.field, self.fix = source, line, field, fix
        where = f"{source}, line {line}" if line else source
        super().__init__(f"{where}, field {field!r}: {problem}; {fix}")


@dataclass
class Record:
    """One prompt with one completion and what is known about it.

    `reward`, `advantage` and `value` are floats in the reward's unit or None; `ref_logps` holds one
    log-prob (nats) for each completion token, or None.
    """

    prompt: Text
    completion: Text
    reward: float | None = None
    advantage: float | None = None
    value: float | None = None
    ref_logps: list[float] | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    source: str = "rows"
    line: int = 0

    def error(self, field: str, problem: str, fix: str) -> DataError:
        """A `DataError` that points at this row."""
        return DataError(self.source, self.line, field, problem, fix)


class RecordList(list[Record]):
    """Records, the errors of the rows that were skipped (`on_bad="skip"`), and the source's name."""

    def __init__(self, records: Iterable[Record] = (), *, source: str = "rows") -> None:
        super().__init__(records)
        self.source = source
        self.skipped: list[DataError] = []


class Bad:
    """What happens to a malformed row: raise its error, or keep it in a list and go on."""

    def __init__(self, on_bad: str, skipped: list[DataError]) -> None:
        if on_bad not in ("error", "skip"):
            raise ValueError(f"on_bad={on_bad!r} must be 'error' or 'skip'")
        self.skip, self.skipped = on_bad == "skip", skipped

    def __call__(self, error: DataError) -> None:
        if not self.skip:
            raise error
        self.skipped.append(error)


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
        return _RowParser(row, name, line, columns, weights, require_reward).records()

    return _read(source, parse, on_bad)


def read_prompts(source: Any, *, on_bad: str = "error") -> RecordList:
    """Records that need only `prompt`; the completion is empty. Arguments as in `read_records`."""

    def parse(row: Mapping[str, Any], name: str, line: int) -> list[Record]:
        parser = _RowParser(row, name, line, ("reward",), (1.0,), False)
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
                DataError("rows", index, "*", f"is a {_kind(row)}", "give a mapping of columns"),
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
        return DataError(name, line, "*", f"is a {_kind(row)}", "put one JSON object on a line")
    return row


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "boolean",
        int: "number",
        float: "number",
        str: "string",
        list: "list",
        dict: "mapping",
    }
    return names.get(type(value), type(value).__name__)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


class _RowParser:
    """Checks one row and turns it into its records."""

    def __init__(
        self,
        row: Mapping[str, Any],
        source: str,
        line: int,
        reward_columns: tuple[str, ...],
        reward_weights: tuple[float, ...],
        require_reward: bool,
    ) -> None:
        self.row, self.source, self.line = row, source, line
        self.reward_columns, self.reward_weights = reward_columns, reward_weights
        self.require_reward = require_reward

    def error(self, field: str, problem: str, fix: str) -> DataError:
        return DataError(self.source, self.line, field, problem, fix)

    def required(self, field: str) -> Any:
        # `datasets` fills columns a row does not have with None.
        if self.row.get(field) is None:
            what = "is null" if field in self.row else "is missing"
            raise self.error(field, what, "give it as a string or a list of messages")
        return self.row[field]

    def records(self) -> list[Record]:
        row = self.row
        paired = row.get("chosen") is not None or row.get("rejected") is not None
        if not paired:
            return [self._record("completion", "", self.text("prompt", self.required("prompt")))]
        if row.get("completion") is not None:
            raise self.error(
                "completion", "is given beside chosen/rejected", "keep one of the two forms"
            )
        chosen, rejected = self.required("chosen"), self.required("rejected")
        if row.get("prompt") is not None:
            prompt = self.text("prompt", row["prompt"])
        else:
            prompt = self._shared_prompt(chosen, rejected)
        return [
            self._record("chosen", "_chosen", prompt),
            self._record("rejected", "_rejected", prompt),
        ]

    def _shared_prompt(self, chosen: Any, rejected: Any) -> Text:
        """The messages both sides begin with, when a conversational pair has no `prompt`."""
        if not isinstance(chosen, list) or not isinstance(rejected, list):
            raise self.error("prompt", "is missing", "give it as a string or a list of messages")
        count = 0
        while count < min(len(chosen), len(rejected)) - 1 and chosen[count] == rejected[count]:
            count += 1
        if not count:
            raise self.error(
                "prompt", "is missing and chosen and rejected share no message", "give a prompt"
            )
        return self.text("prompt", chosen[:count])

    def _record(self, field: str, suffix: str, prompt: Text) -> Record:
        completion = self.text(field, self.required(field))
        if isinstance(prompt, list) and isinstance(completion, list):
            if suffix and completion[: len(prompt)] == prompt:
                completion = completion[len(prompt) :]
        elif isinstance(prompt, list) != isinstance(completion, list):
            raise self.error(
                field,
                f"is a {_kind(completion)} but prompt is a {_kind(prompt)}",
                "give both as strings or both as lists of messages",
            )
        if not completion or (isinstance(completion, str) and not completion.strip()):
            raise self.error(
                field, "is empty", "give a response with at least one visible character"
            )
        used = {"prompt", "completion", "chosen", "rejected"}
        used |= {f"{name}{suffix}" for name in ("advantage", "value", "ref_logps")}
        used |= {
            f"{column}{end}" for column in self.reward_columns for end in ("_chosen", "_rejected")
        }
        used |= {f"{column}{suffix}" for column in self.reward_columns}
        return Record(
            prompt,
            completion,
            reward=self._reward(suffix),
            advantage=self._number(f"advantage{suffix}"),
            value=self._number(f"value{suffix}"),
            ref_logps=self._logps(f"ref_logps{suffix}"),
            columns={key: value for key, value in self.row.items() if key not in used},
            source=self.source,
            line=self.line,
        )

    def text(self, field: str, value: Any) -> Text:
        """A string, or a list of messages with string `role` and `content`."""
        if isinstance(value, str):
            self._encodable(field, value)
            return value
        if not isinstance(value, list):
            raise self.error(
                field,
                f"is a {_kind(value)} ({_show(value)})",
                "give a string or a list of messages",
            )
        if not value:
            raise self.error(field, "is an empty list", "give at least one message")
        for index, message in enumerate(value):
            where = f"{field}[{index}]"
            if not isinstance(message, Mapping):
                raise self.error(
                    where, f"is a {_kind(message)}", 'give {"role": ..., "content": ...}'
                )
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    problem = f"is a {_kind(message[key])}" if key in message else "is missing"
                    raise self.error(f"{where}.{key}", problem, "give it as a string")
                self._encodable(f"{where}.{key}", message[key])
            if not message["role"].strip():
                raise self.error(f"{where}.role", "is empty", "give user, assistant or system")
        if field in ("completion", "chosen", "rejected") and not value[-1]["content"].strip():
            raise self.error(
                f"{field}[{len(value) - 1}].content",
                "is empty",
                "give a response that says something",
            )
        return [dict(message) for message in value]

    def _encodable(self, field: str, value: str) -> None:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error(
                field, "holds a lone surrogate (not a character)", "repair the text's encoding"
            ) from error

    def _number(self, field: str, *, required: bool = False) -> float | None:
        value = self.row.get(field)
        if value is None:
            if required:
                what = "is null" if field in self.row else "is missing"
                raise self.error(field, what, "give a finite number")
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(field, f"is a {_kind(value)} ({_show(value)})", "give a finite number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.error(field, f"is {_show(value)}", "give a finite number")
        return number

    def _reward(self, suffix: str) -> float | None:
        names = [f"{column}{suffix}" for column in self.reward_columns]
        present = [name for name in names if self.row.get(name) is not None]
        if not present and not self.require_reward:
            return None
        total = 0.0
        for name, weight in zip(names, self.reward_weights, strict=True):
            number = self._number(name, required=True)
            assert number is not None
            total += weight * number
        if not math.isfinite(total):
            raise self.error(names[0], "and its weight overflow", "scale the reward down")
        return total

    def _logps(self, field: str) -> list[float] | None:
        value = self.row.get(field)
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            raise self.error(field, f"is {_show(value)}", "give one log-prob per completion token")
        result = []
        for index, item in enumerate(value):
            if isinstance(item, bool) or not isinstance(item, (int, float)):
                raise self.error(f"{field}[{index}]", f"is a {_kind(item)}", "give a finite number")
            if not math.isfinite(item) or item > 0:
                raise self.error(f"{field}[{index}]", f"is {item!r}", "give a finite number <= 0")
            result.append(float(item))
        return result
