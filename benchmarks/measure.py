"""Check, then time, then memory: interleaved rounds on a CPU or a GPU.

A contestant is checked first; what fails its check is never timed. Run as a script, this file is
the fresh process in which peak memory on a CPU is measured: it reads as JSON what makes a
contestant, and prints its bytes.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import library
import peers
import rowwise
import torch
from peers import Contestant, UnavailableError
from shapes import Inputs, Shape, make_inputs
from truth import Check, Result, Truth, judge, truth

GATED_ROWS = {"cpu": 2048, "cuda": 1 << 62}  # float64 on a CPU: beyond that, some of the sequences
MIN_ROUNDS = 3
SLOW_SECONDS = 3.0  # a contestant slower than this gets the fewest rounds
BOX = 150.0  # seconds that a first call may take: compilers
PHASES = ("both", "forward", "backward")
# autocast: fp32 leaves under torch.autocast(bfloat16); tf32: fp32 products allowed in TF32
FLAGS = ("", "autocast", "tf32")


@dataclass(frozen=True)
class Entry:
    """One contestant at one shape; `label` names it inside its case."""

    label: str
    contestant: str
    op: str
    shape: Shape
    frozen_head: bool = False
    memory: bool = False
    backend: str | None = None  # of lolkernels
    budget: int | None = None  # of lolkernels, bytes
    phase: str = "both"
    flag: str = ""  # one of FLAGS


@dataclass
class Row:
    """What was measured for one entry. Times in milliseconds, memory in bytes, errors in nat."""

    label: str
    contestant: str = ""
    op: str = ""
    shape: str = ""
    tokens: int = 0
    frozen_head: bool = False
    phase: str = "both"
    version: str = ""
    times_ms: list[float] = field(default_factory=list)  # one a round
    median_ms: float | None = None
    flops: int = 0  # that the op needs, whoever computes it
    bytes: int = 0
    work: str = ""  # the formula of flops or bytes
    sum_error_nat: float | None = None
    gradient_errors: dict[str, float] = field(default_factory=dict)
    extra_bytes: int | None = None
    formula_bytes: int | None = None
    wrong: list[str] = field(default_factory=list)  # failed its check: not timed
    missed: list[str] = field(default_factory=list)  # a bound, by how much: timed all the same
    skipped: str = ""  # why it cannot run here
    error: str = ""  # it ran, and failed


class Cpu:
    kind = "cpu"
    device = torch.device("cpu")

    def sync(self) -> None:
        """Nothing runs behind the host, and nothing is held for timing."""

    fill = free = sync

    def time_ms(self, call: Callable[[], Any]) -> float:
        gc.collect()
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        del result
        return 1e3 * seconds

    def extra_bytes(self, c: Contestant) -> int | None:
        """Not in this process, whose memory holds everybody's: see `peak_memory`."""
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
        self.fill()

    def fill(self) -> None:
        l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        # Far more than the cache: while it is written (0.3 ms) the host gets ahead of the device,
        # and a launch's own latency stays outside the events.
        self.scratch = torch.empty(max(2 * l2, 2**30), dtype=torch.uint8, device=self.device)

    def free(self) -> None:
        self.scratch = torch.empty(0, dtype=torch.uint8, device=self.device)
        torch.cuda.empty_cache()

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
        return peak - before - c.returned(result) + c.holds

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
    contestants: dict[str, Contestant], rounds: int, device: Device, until: float, least: int
) -> dict[str, list[float]]:
    """Milliseconds by label, one a round. Rounds run a, b, c and c, b, a in turn.

    After ``least`` it stops when ``time.monotonic()`` has passed ``until``.
    """
    times: dict[str, list[float]] = {label: [] for label in contestants}
    for turn in range(rounds):
        if turn >= least and time.monotonic() > until:
            break
        names = list(contestants)
        for label in names[:: -1 if turn % 2 else 1]:
            c, seen = contestants[label], times[label]
            if turn >= MIN_ROUNDS and min(seen) > 1e3 * SLOW_SECONDS:
                continue
            if c.prepare:
                c.prepare()
            seen.append(device.time_ms(c.call))
    return times


def measure(
    build: list[tuple[Row, Callable[[], Contestant]]],
    device: Device,
    *,
    rounds: int,
    until: float = math.inf,
    least: int = MIN_ROUNDS,
) -> list[Row]:
    """Fills the rows, in order: each checked, on a GPU its memory, then all timed in rounds."""
    sound: dict[str, Contestant] = {}
    for row, make in build:
        found = ready(row, make, device, min(BOX, max(1.0, (until - time.monotonic()) / 3)))
        if found is not None:
            sound[row.label] = found
    gc.collect()
    gc.freeze()  # so that a collection before each call looks at what the calls left, and no more
    try:
        times = interleave(sound, rounds, device, until, least)
    finally:
        gc.unfreeze()
    for row, _ in build:
        if row.label in sound:
            row.times_ms = times[row.label]
            row.median_ms = statistics.median(row.times_ms)
    return [row for row, _ in build]


def ready(
    row: Row, make: Callable[[], Contestant], device: Device, box: float
) -> Contestant | None:
    """A contestant whose check, within ``box`` seconds, fills its row; None: not to be timed."""
    try:
        with time_box(box):
            c = make()
            check = c.check()
            device.sync()
        row.flops, row.bytes, row.work, row.version = c.flops, c.bytes, c.work, c.version
        row.sum_error_nat, row.gradient_errors = check.sum_nat, check.gradients
        row.wrong, row.missed, row.formula_bytes = check.faults, check.missed, c.formula
        if peers.only_interpreted(row.contestant, device.kind) and not check.faults:
            row.skipped = "correct in Triton's interpreter, where a time means nothing"
        if row.wrong or row.skipped:
            return None
        row.extra_bytes = device.extra_bytes(c)  # warms it, too
        return c
    except (UnavailableError, NotImplementedError) as error:
        row.skipped = str(error)
    except Exception as error:
        device.sync()  # raises where the device itself has failed: nothing can follow then
        row.error = short(error)
    return None


def short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


@lru_cache(maxsize=2)  # the entries of a case, and neighbours among cases, share theirs
def inputs_of(shape: Shape, frozen_head: bool, device: torch.device) -> Inputs:
    return make_inputs(shape, frozen_head=frozen_head, device=device)


@lru_cache(maxsize=2)
def _truth(op: str, inputs: Inputs) -> Truth:
    return truth(op, inputs, GATED_ROWS[inputs.hidden.device.type])


@lru_cache(maxsize=2)
def _eager_errors(op: str, inputs: Inputs) -> dict[str, float]:
    """Of eager's gradients, in the inputs' dtype."""
    try:
        got = peers.build("eager", op, inputs)()
    except torch.OutOfMemoryError:
        return {}
    return judge(got, _truth(op, inputs), inputs, strict=False).gradients


def forget(device: Device) -> None:
    """Frees what is kept between cases, for who is to have the whole device."""
    for kept in (inputs_of, _truth, _eager_errors, peers.gradient_logits):
        kept.cache_clear()
    gc.collect()
    device.free()


@contextmanager
def flagged(flag: str, device: torch.device) -> Iterator[None]:
    """Runs the block under one of FLAGS."""
    if flag == "autocast":
        with torch.autocast(device.type, torch.bfloat16):
            yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = flag == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def documented_bytes(entry: Entry, device: torch.device | None = None) -> int | None:
    """The library's own statement of the memory a call takes beyond inputs and gradients."""
    known = entry.contestant == "lolkernels" and entry.op in peers.OPS and not entry.flag
    if not known or entry.phase != "both":
        return None
    shape, device = entry.shape, device or torch.device("cpu")
    lengths = [n - p for n, p in zip(shape.lengths(), shape.prompts(), strict=True)]
    own = entry.backend is not None and library.function(entry.backend, "gemm") is not None
    size = shape.itemsize if device.type == "cuda" else 4
    held = library.kept_rows(shape.vocab, shape.hidden, size, entry.budget, device, max(lengths))
    blocks = library.plan_blocks([0, *itertools.accumulate(lengths)], held)
    return library.extra_bytes(
        entry.op,
        longest_block=max(b.stop - b.start for b in blocks),
        num_rows=shape.scored,
        hidden_size=shape.hidden,
        vocab=shape.vocab,
        hidden_bytes=shape.itemsize,
        weight_bytes=shape.itemsize,
        frozen_weight=entry.frozen_head,
        memory_budget=entry.budget,
        device=device,
        gemm=own and shape.dtype == "bf16",
    )


def _gradient_bytes(result: Any) -> int:
    found = (result.dhidden, result.dweight) if isinstance(result, Result) else ()
    return sum(g.nbytes for g in found if g is not None)


def contestant(entry: Entry, device: torch.device) -> Contestant:
    """Raises UnavailableError where it cannot run here."""
    shape = entry.shape
    if entry.op == "logprob":
        return rowwise.build(entry.contestant, shape, entry.backend, device)
    inputs = inputs_of(shape, entry.frozen_head, device)
    gemms = peers.gemm_count(entry.op, inputs)
    if entry.phase != "both":
        gemms = 1 if entry.phase == "forward" else gemms - 1
    flops = gemms * 2 * shape.scored * shape.vocab * shape.hidden
    work = f"{gemms} x 2 N V D"
    if entry.contestant in peers.FLOORS:
        wide = entry.contestant == "gemms fp32 out"
        found = peers.build_gemms(entry.op, inputs, entry.phase, wide=wide)
        found.flops, found.work = flops, work
        return found
    ours = entry.contestant == "lolkernels"
    settings = {"backend": entry.backend, "budget": entry.budget} if ours else {}
    call = peers.build(entry.contestant, entry.op, inputs, **settings)

    def check() -> Check:
        peers.gradients(inputs)
        strict = (ours or shape.dtype == "fp32") and not entry.flag
        # A GPU rounds the logits' gradients once more and truncates what it adds; in Triton's
        # interpreter its kernels do the first.
        truncates = (device.type == "cuda" or peers.interpreted()) and ours
        eager = _eager_errors(entry.op, inputs) if truncates else None
        return judge(timed(), _truth(entry.op, inputs), inputs, strict=strict, eager=eager)

    state: list[Any] = []

    def prepare() -> None:
        state[:] = [call.forward()]

    def timed() -> Result:
        with flagged(entry.flag, device):
            state = call.forward()
            if entry.flag != "autocast":  # which its users leave before the backward
                return call.backward(state)
        return call.backward(state)

    steps = {"both": timed, "forward": call.forward}
    return Contestant(
        steps.get(entry.phase, lambda: call.backward(state.pop())),
        check,
        prepare if entry.phase == "backward" else None,
        flops=flops,
        work=work,
        returned=_gradient_bytes,
        holds=call.holds,
        formula=documented_bytes(entry, device),
        version="" if ours else peers.version(peers.PEERS[entry.contestant].package),
    )


def time_entries(
    entries: list[Entry], rounds: int, device: Device | None = None, until: float = math.inf
) -> list[Row]:
    """One row an entry. What cannot run here, failed or is wrong says so and has no times.

    On a CPU the memory of those that ask for it is measured, once all are timed.
    """
    device = device or Cpu()
    build: list[tuple[Row, Callable[[], Contestant]]] = []
    for e in entries:
        shape, tokens = str(e.shape), e.shape.tokens
        row = Row(e.label, e.contestant, e.op, shape, tokens, e.frozen_head, e.phase)
        build.append((row, partial(contestant, e, device.device)))
    rows = measure(build, device, rounds=rounds, until=until)
    for e, row in zip(entries, rows, strict=True):
        if device.kind == "cpu" and e.memory and row.times_ms:
            try:
                row.extra_bytes = peak_memory(e)
            except RuntimeError as error:  # killed for its memory, say: the times stand
                row.error = short(error)
    return rows


# Every large block is mapped and given back, so that the peak is the call's own.
QUIET_MALLOC = {
    **os.environ,
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
}


def peak_memory(entry: Entry) -> int:
    """Of an entry; what it keeps between calls (a second model's head) counts as its own."""
    return peak_in_process("measure", entry.label, asdict(entry))


def peak_in_process(module: str, what: str, request: dict[str, Any]) -> int:
    """Peak resident bytes of a call above its inputs and the gradients it returns, in a new process
    and of the contestant that `module.from_request` makes there.

    Raises:
        RuntimeError: it failed there.
    """
    here = str(Path(__file__).resolve().parent)
    path = os.pathsep.join([here, str(Path(here).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", "import measure; measure.answer()"],
        input=json.dumps({"module": module, "threads": torch.get_num_threads(), **request}),
        env={**QUIET_MALLOC, "PYTHONPATH": path},
        text=True,
        capture_output=True,
    )
    if done.returncode:
        raise RuntimeError(f"{what}: {(done.stderr.strip().splitlines() or ['it was killed'])[-1]}")
    return int(done.stdout.split()[-1])


def from_request(request: dict[str, Any]) -> Contestant:
    shape = Shape(**request.pop("shape"))
    return contestant(Entry(shape=shape, **request), torch.device("cpu"))


def answer() -> None:
    """What the new process does."""
    request = json.loads(sys.stdin.read())
    torch.set_num_threads(request.pop("threads"))
    print(_peak_here(importlib.import_module(request.pop("module")).from_request(request)))


def _peak_here(c: Contestant) -> int:
    peak = 0
    for call in (c.warm or c.call, c.call):  # the first makes the libraries' buffers and threads
        if c.prepare:
            c.prepare()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        result = call()
        peak = status("VmHWM") - before - c.returned(result)
        del result
    return peak + c.holds


def status(name: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS (resident) or VmHWM (its high-water mark)."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition(f"\n{name}:")[2].split()[0])
