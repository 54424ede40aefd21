"""One row: what it may hold, and the error that names what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
    """Records, the errors of rows left out (`on_bad="skip"`), and the source's name."""

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


def kind_of(value: Any) -> str:
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


def show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


class RowParser:
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
                f"is a {kind_of(completion)} but prompt is a {kind_of(prompt)}",
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
                f"is a {kind_of(value)} ({show(value)})",
                "give a string or a list of messages",
            )
        if not value:
            raise self.error(field, "is an empty list", "give at least one message")
        for index, message in enumerate(value):
            where = f"{field}[{index}]"
            if not isinstance(message, Mapping):
                raise self.error(
                    where, f"is a {kind_of(message)}", 'give {"role": ..., "content": ...}'
                )
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    problem = f"is a {kind_of(message[key])}" if key in message else "is missing"
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
            raise self.error(
                field, f"is a {kind_of(value)} ({show(value)})", "give a finite number"
            )
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.error(field, f"is {show(value)}", "give a finite number")
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
            raise self.error(field, f"is {show(value)}", "give one log-prob per completion token")
        result = []
        for index, item in enumerate(value):
            if isinstance(item, bool) or not isinstance(item, (int, float)):
                raise self.error(
                    f"{field}[{index}]", f"is a {kind_of(item)}", "give a finite number"
                )
            if not math.isfinite(item) or item > 0:
                raise self.error(f"{field}[{index}]", f"is {item!r}", "give a finite number <= 0")
            result.append(float(item))
        return result
