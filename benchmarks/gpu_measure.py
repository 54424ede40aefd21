"""Timing on a device: interleaved rounds, a flushed cache, peak memory, launches and host syncs.

A contestant is checked first; what fails its check is never timed.
"""

from __future__ import annotations

import gc
import re
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

MIN_ROUNDS = 3
SLOW_SECONDS = 2.0  # a contestant slower than this gets the fewest rounds
MIB = 2**20


@dataclass
class Check:
    """What a contestant's result was off by; faults, if any, keep it from being timed."""

    faults: list[str] = field(default_factory=list)
    sum_nat: float | None = None  # largest error of a sequence's summed log-prob
    gradients: dict[str, float] = field(default_factory=dict)  # relative errors, Frobenius norm


@dataclass
class Contestant:
    label: str
    call: Callable[[], Any]
    check: Callable[[], Check]
    prepare: Callable[[], None] | None = None  # before each timing, outside it
    flops: int = 0
    bytes: int = 0
    work: str = ""  # how flops or bytes were counted
    returned: Callable[[Any], int] | None = None  # bytes of the result that are not extra memory
    formula: int | None = None  # documented extra bytes


class Cpu:
    """The dry run: the same calls with a host clock. Its memory is not measured."""

    kind = "cpu"
    device = torch.device("cpu")

    def sync(self) -> None:
        pass

    def time_ms(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        del result
        return 1e3 * seconds

    def extra_bytes(self, c: Contestant) -> int | None:
        if c.prepare:
            c.prepare()
        result = c.call()
        if c.returned:
            c.returned(result)
        return None

    def launches(self, call: Callable[[], Any]) -> int:
        """Products, which stand for the launches of a GPU."""
        with torch.profiler.profile() as profile:
            call()
        return sum(e.name in ("aten::mm", "aten::addmm_") for e in profile.events())

    def syncs(self, call: Callable[[], Any]) -> int:
        call()
        return 0


class Cuda:
    kind = "cuda"

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        # Far more than the cache: while it is written (0.3 ms) the host gets ahead of the device,
        # and a launch's own latency stays outside the events.
        self.scratch = torch.empty(max(2 * l2, 2**30), dtype=torch.uint8, device=self.device)

    def sync(self) -> None:
        torch.cuda.synchronize(self.device)

    def time_ms(self, call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.scratch.fill_(1)
        start.record()
        result = call()
        end.record()
        del result
        self.sync()
        return float(start.elapsed_time(end))

    def extra_bytes(self, c: Contestant) -> int | None:
        if c.prepare:
            c.prepare()
        gc.collect()
        self.sync()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = c.call()
        self.sync()
        peak = torch.cuda.max_memory_allocated(self.device)
        kept = c.returned(result) if c.returned else 0
        return peak - before - kept

    def launches(self, call: Callable[[], Any]) -> int:
        """Kernels, copies and fills that the call puts on the device."""
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        for _ in range(2):  # the first one may miss events while the tracer starts
            with torch.profiler.profile(activities=kinds) as profile:
                call()
                self.sync()
        cuda = torch.autograd.DeviceType.CUDA
        return sum(e.device_type == cuda for e in profile.events())

    def syncs(self, call: Callable[[], Any]) -> int:
        """Times the host waited for the device inside the call, as torch's debug mode sees it."""
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum(bool(re.search("synchronizing CUDA operation", str(w.message))) for w in seen)


Device = Cpu | Cuda


class TimeBoxError(Exception):
    pass


@contextmanager
def time_box(seconds: float) -> Iterator[None]:
    """Raises TimeBoxError inside the block after that time (main thread; not inside one C call)."""

    def stop(*_: Any) -> None:
        raise TimeBoxError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interleave(
    contestants: list[Contestant], rounds: int, device: Device, until: float
) -> dict[str, list[list[float]]]:
    """Times by label: a pair for each round. A round runs a, b, c, c, b, a.

    After ``MIN_ROUNDS`` it stops when ``time.monotonic()`` has passed ``until``.
    """
    times: dict[str, list[list[float]]] = {c.label: [] for c in contestants}

    def once(c: Contestant) -> float:
        if c.prepare:
            c.prepare()
        return device.time_ms(c.call)

    for turn in range(rounds):
        if turn >= MIN_ROUNDS and time.monotonic() > until:
            break
        running = [
            c
            for c in contestants
            if turn < MIN_ROUNDS or min(times[c.label][0]) < 1e3 * SLOW_SECONDS
        ]
        there = [once(c) for c in running]
        back = [once(c) for c in reversed(running)][::-1]
        for c, first, second in zip(running, there, back, strict=True):
            times[c.label].append([first, second])
    return times


def spread(values: list[float]) -> dict[str, float]:
    q1, median, q3 = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"min": min(values), "q1": q1, "median": median, "q3": q3, "max": max(values)}


def ratios(over: list[list[float]], under: list[list[float]]) -> dict[str, float]:
    """The spread of the rounds' own ratios: both sides of each ran within one round."""
    return spread([sum(a) / sum(b) for a, b in zip(over, under, strict=False)])


def measure(
    build: list[tuple[str, Callable[[], Contestant]]],
    device: Device,
    *,
    floors: list[str],
    rounds: int,
    until: float,
) -> list[dict[str, Any]]:
    """One row a contestant, in order: checked, then timed in rounds, then its memory.

    Ratios stand beside each floor: of times, or of bytes per second where bytes were counted.
    """
    rows: dict[str, dict[str, Any]] = {}
    sound: list[Contestant] = []
    for label, make in build:
        row = rows[label] = {"label": label}
        try:
            c = make()
            check = c.check()
            device.sync()
        except Exception as error:
            device.sync()  # raises where the device itself has failed: nothing can follow then
            row["error"] = short(error)
            continue
        row |= {"work": c.work, "sum_nat": check.sum_nat, "gradients": check.gradients}
        row["formula_bytes"] = c.formula
        if check.faults:
            row["wrong"] = check.faults
            continue
        try:
            if c.prepare:
                c.prepare()
            c.call()  # warm
            row["extra_bytes"] = device.extra_bytes(c)
        except Exception as error:
            device.sync()
            row["error"] = short(error)
            continue
        sound.append(c)
    times = interleave(sound, rounds, device, until)
    by_label = {c.label: c for c in sound}
    for c in sound:
        row, seen = rows[c.label], times[c.label]
        row["times_ms"] = seen
        row["ms"] = spread([t for pair in seen for t in pair])
        if c.bytes:
            row |= {"rate": c.bytes / row["ms"]["median"] / 1e6, "unit": "GB/s"}
        elif c.flops:
            row |= {"rate": c.flops / row["ms"]["median"] / 1e9, "unit": "TFLOP/s"}
        row["against"] = {}
        for name in floors:
            if name not in by_label:
                continue
            if c.bytes:  # share of the floor's bandwidth
                share = c.bytes / by_label[name].bytes
                found = ratios(times[name], seen)
                row["against"][name] = {key: share * value for key, value in found.items()}
            else:
                row["against"][name] = ratios(seen, times[name])
    return list(rows.values())


def short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
