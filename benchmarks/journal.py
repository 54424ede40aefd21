"""The journal of a run on a card: one line of JSON for each thing that happened.

A line is appended whole, by whoever has something to say, so that no crash loses what finished
before. Every line has `at` (epoch seconds), `run` and `kind`:

    header   identity, environment, plan: what a run measures, where, and what it means to do
    begin    job, task, limit (seconds): what is lost if the process dies now
    result   job, task, seconds, and what was found
    fault    job, task, reason, text (the process's last words)
    left     job, why: what there was no time for

Nothing but the standard library is imported here.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAME = "journal.jsonl"
Line = dict[str, Any]


class Journal:
    def __init__(self, folder: Path, run: str) -> None:
        self.path, self.run = folder / NAME, run
        self._lock, self._lines, self._end = threading.Lock(), list[Line](), 0

    def write(self, kind: str, **more: Any) -> None:
        line = {"at": round(time.time(), 2), "run": self.run, "kind": kind, **more}
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:  # one write: lines of several processes do not mix
            os.write(file, (json.dumps(line) + "\n").encode())
        finally:
            os.close(file)

    def lines(self) -> list[Line]:
        """All so far; only what is new is read. A line that was cut off is left out."""
        with self._lock:
            if self.path.exists():
                with self.path.open("rb") as file:
                    file.seek(self._end)
                    whole = file.read().rpartition(b"\n")[0]
                self._end += len(whole) + bool(whole)
                self._lines += filter(None, map(parse, whole.splitlines()))
            return list(self._lines)

    def settled(self) -> set[str]:
        """Tasks that need no second look: a sound result of the same code on the same device, or
        whatever this very run found."""
        lines = self.lines()
        here, found = same_as(lines, self.run), set()
        for line in lines:
            sound = line["kind"] == "result" and not line.get("wrong") and line["run"] in here
            mine = line["kind"] in ("result", "fault") and line["run"] == self.run
            if "task" in line and (sound or mine):
                found.add(line["task"])
        return found


def parse(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and {"kind", "run", "at"} <= set(line) else None


def bad(line: Line) -> bool:
    """A fault, a wrong result or a failed test. A peer that fails is no fault."""
    return line["kind"] == "fault" or bool(line.get("wrong"))


def same_as(lines: Iterable[Line], run: str) -> set[str]:
    """The runs with the identity of ``run``, itself included."""
    known = {line["run"]: line["identity"] for line in lines if line["kind"] == "header"}
    return {other for other, identity in known.items() if identity == known.get(run)} | {run}


def mend(folder: Path) -> None:
    """Ends a line that was cut off, so that the next one stands alone."""
    path = folder / NAME
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:
            file.write("\n")
