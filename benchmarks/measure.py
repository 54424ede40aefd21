"""Time and peak memory of contestants: interleaved rounds here, memory in a fresh process each.

Run as a script, this file is that process: it reads one entry as JSON and prints its bytes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import peers
import torch
from shapes import Inputs, Shape, gate, make_inputs, summed_error, truth

from lolkernels import planner

GATED_TOKENS = 2048  # float64 truth above this takes longer than the measurement
SLOW_SECONDS = 4.0  # a contestant slower than this gets three rounds, not all
MIB = 2**20


@dataclass(frozen=True)
class Entry:
    """One contestant at one shape; `label` names it inside its case."""

    label: str
    contestant: str
    op: str
    shape: Shape
    frozen_head: bool = False
    memory: bool = False

    @property
    def ours(self) -> bool:
        return self.contestant in ("lolkernels", "reference")


@dataclass
class Row:
    """What was measured for one entry. Times in milliseconds, memory in bytes, errors in nat."""

    label: str
    contestant: str
    op: str
    shape: str
    tokens: int
    frozen_head: bool
    times_ms: list[float]
    median_ms: float
    sum_error_nat: float | None
    extra_bytes: int | None = None
    formula_bytes: int | None = None


def documented_bytes(entry: Entry) -> int | None:
    """The library's own statement of the memory a call takes beyond inputs and gradients."""
    shape = entry.shape
    if entry.contestant != "lolkernels" or entry.op == "logprob":
        return None
    scored = shape.scored // shape.sequences
    held = planner.chunk_rows(shape.vocab, 4, None)
    per_chunk = max(1, held // scored) if scored else 1
    return planner.extra_bytes(
        entry.op,
        longest_chunk=min(per_chunk, shape.sequences) * scored,
        num_rows=shape.scored,
        hidden_size=shape.hidden,
        vocab=shape.vocab,
        hidden_bytes=shape.itemsize,
        weight_bytes=shape.itemsize,
        frozen_weight=entry.frozen_head,
    )


def check_and_time(entries: Iterable[Entry], rounds: int) -> list[Row]:
    """Builds all entries, passes ours through the gate, then times them in interleaved rounds.

    Raises:
        RuntimeError: a result of ours is wrong; nothing is timed.
    """
    entries = list(entries)
    made: dict[tuple[Shape, bool], Inputs] = {}
    for entry in entries:
        key = (entry.shape, entry.frozen_head)
        if key not in made:
            made[key] = make_inputs(entry.shape, frozen_head=entry.frozen_head)
    calls = {
        entry.label: peers.build(entry.contestant, entry.op, made[entry.shape, entry.frozen_head])
        for entry in entries
    }
    errors: dict[str, float | None] = {}
    by_truth: dict[tuple[str, Shape, bool], list[Entry]] = {}
    for entry in entries:
        by_truth.setdefault((entry.op, entry.shape, entry.frozen_head), []).append(entry)
    for same in by_truth.values():
        errors |= _gate(same, made[same[0].shape, same[0].frozen_head], calls)

    times: dict[str, list[float]] = {entry.label: [] for entry in entries}
    names = list(calls)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:  # nobody always follows the same neighbour
            seen = times[name]
            if len(seen) >= 3 and min(seen) > SLOW_SECONDS:
                continue
            gc.collect()
            start = time.perf_counter()
            result = calls[name]()
            seen.append(time.perf_counter() - start)
            del result
    return [
        Row(
            entry.label,
            entry.contestant,
            entry.op,
            str(entry.shape),
            entry.shape.tokens,
            entry.frozen_head,
            [1e3 * value for value in times[entry.label]],
            1e3 * statistics.median(times[entry.label]),
            errors[entry.label],
        )
        for entry in entries
    ]


def _gate(
    entries: list[Entry], inputs: Inputs, calls: dict[str, peers.Call]
) -> dict[str, float | None]:
    """Runs each call once (its warm-up); returns the errors of the summed log-probs.

    The entries share their op and inputs, and so the truth.
    """
    results = {entry.label: calls[entry.label]() for entry in entries}
    first = entries[0]
    if first.shape.tokens > GATED_TOKENS or all(r.logps is None for r in results.values()):
        return dict.fromkeys(results)
    want = truth(first.op, inputs)
    if any(entry.ours for entry in entries):
        eager = peers.build("eager", first.op, inputs)()
    for entry in entries:
        faults = gate(inputs, results[entry.label], eager, want) if entry.ours else []
        if faults:
            raise RuntimeError(f"{entry.label} ({entry.op}, {entry.shape}): {'; '.join(faults)}")
    return {
        label: None if result.logps is None else summed_error(inputs, result, want)
        for label, result in results.items()
    }


def peak_memory(entry: Entry) -> int:
    """Peak resident bytes of one call above its inputs and the gradients it returns."""
    environment = {
        **os.environ,
        # Every large block is mapped and given back, so that the peak is the call's own.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_ARENA_MAX": "1",
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve())],
        input=json.dumps({**asdict(entry), "threads": torch.get_num_threads()}),
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    return int(done.stdout)


def _status(name: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS (resident) or VmHWM (its high-water mark)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def _measure_here(entry: Entry) -> int:
    inputs = make_inputs(entry.shape, frozen_head=entry.frozen_head)
    call = peers.build(entry.contestant, entry.op, inputs)
    result = call()  # the libraries' own buffers and threads are made here
    del result
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    kept = sum(grad.nbytes for grad in (result.dhidden, result.dweight) if grad is not None)
    return peak - before - kept


if __name__ == "__main__":
    request = json.loads(sys.stdin.read())
    torch.set_num_threads(request.pop("threads"))
    request["shape"] = Shape(**request["shape"])
    print(_measure_here(Entry(**request)))
