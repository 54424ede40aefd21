"""GPU benchmarks: every op against its bare matrix products or a copy, after a float64 check.

python benchmarks/gpu.py --out benchmarks/results/h200
python benchmarks/gpu.py --only loss --minutes 3
python benchmarks/gpu.py --device cpu --out dry-run     (tiny shapes, to try the script)

OUT.json is written after every task, and OUT.md is made from it. A second run of the same code on
the same device does what the first one had no time for.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from the source tree, not installed

import gpu_cases as cases
import gpu_measure as gm
import gpu_report
import torch
from gpu_cases import Problem
from gpu_measure import Contestant, Device

import lolkernels as lk

LONGEST = 150  # seconds of a task: a kernel that hangs costs no more than this
GRACE = 25  # seconds past the deadline for the task in progress
BF16, FP32 = "GEMMs bf16", "GEMMs fp32 out"
TITLES = {
    "linear_loss": "linear_loss (A-LoL), forward + backward",
    "linear_logprob": "linear_logprob, forward + backward",
    "score": "linear_logprob without gradient",
}
Build = list[tuple[str, Callable[[], Contestant]]]


@dataclass(frozen=True)
class Sizes:
    llama: Problem
    llama_half: Problem
    qwen: Problem
    sweep: Problem  # its sequences fit every chunk of the sweep
    chunks: tuple[int, ...]
    vocabularies: tuple[int, ...]
    logits: int  # bytes of the row kernels' logits and of the copy


CUDA = Sizes(
    llama=Problem("llama-8192", 8192, 4096, 128256),
    llama_half=Problem("llama-4096", 4096, 4096, 128256),
    qwen=Problem("qwen-8192", 8192, 4096, 151936),
    sweep=Problem("llama-8192", 8192, 4096, 128256, longest=512),
    chunks=(512, 1024, 2048, 4096, 8192),
    vocabularies=(32000, 128256, 151936, 262144),
    logits=2**31,
)
TINY = Sizes(
    llama=Problem("llama-8192", 96, 32, 515, 4, 16),
    llama_half=Problem("llama-4096", 48, 32, 515, 4, 16),
    qwen=Problem("qwen-8192", 96, 48, 700, 4, 16),
    sweep=Problem("llama-8192", 96, 32, 515, 4, 8),
    chunks=(8, 96),
    vocabularies=(129, 500),
    logits=2**16,
)


@dataclass
class Settings:
    device: Device
    sizes: Sizes
    backends: list[str]  # the first one trains and has the row kernels; each one scores
    rounds: int
    until: float  # time.monotonic() when measuring ends


@dataclass
class Task:
    name: str
    title: str
    run: Callable[[Settings], dict[str, Any]]
    seconds: float  # with less time left it is not begun
    goals: list[dict[str, Any]] = field(default_factory=list)


def _goal(text: str, row: str, of: str, limit: float, floor: str | None = None) -> dict[str, Any]:
    return {"text": text, "row": row, "of": of, "limit": limit, "floor": floor}


def _measured(s: Settings, build: Build, floors: list[str]) -> dict[str, Any]:
    rows = gm.measure(build, s.device, floors=floors, rounds=s.rounds, until=s.until)
    return {"floors": floors, "rows": rows}


@lru_cache(maxsize=1)  # neighbours in the list of tasks share theirs
def _inputs(problem: Problem, device: torch.device) -> cases.Inputs:
    return cases.make_inputs(problem, device)


def _op(op: str, problem: Problem, frozen: bool, s: Settings) -> dict[str, Any]:
    inputs = _inputs(problem, s.device.device)
    inputs = inputs.frozen() if frozen else inputs
    want, dz = cases.truth(op, inputs), cases.gradient_logits(inputs)
    names = s.backends if op == "score" else s.backends[:1]
    build: Build = [(b, partial(cases.ours, b, op, inputs, want, b)) for b in names]
    for label in (BF16, FP32):
        build.append((label, partial(cases.gemms, label, op, inputs, dz, wide=label == FP32)))
    return _measured(s, build, [BF16, FP32])


def _kernels(vocab: int, s: Settings) -> dict[str, Any]:
    size, device, backend = s.sizes.logits, s.device.device, s.backends[0]
    wide = cases.make_rows(size, vocab, torch.float32, device)
    half = cases.make_rows(size, vocab, torch.bfloat16, device)
    build: Build = [("copy", partial(cases.copy, size, device))]
    for name, rows in (("fp32", wide), ("bf16", half)):
        label = f"row_stats {name}"
        build.append((label, partial(cases.row_stats, label, rows, backend)))
    for label, rows in (("dlogits_ fp32 to bf16", wide), ("dlogits_ bf16", half)):
        narrow = rows is wide
        build.append((label, partial(cases.dlogits, label, rows, backend, narrow=narrow)))
    for name, rows in (("fp32", wide), ("bf16", half)):
        label = f"logprob {name}, forward + backward"
        build.append((label, partial(cases.logprob, label, rows, backend)))
    return _measured(s, build, ["copy"])


def _sweep(s: Settings) -> dict[str, Any]:
    problem, backend = s.sizes.sweep, s.backends[0]
    inputs = _inputs(problem, s.device.device)
    want, dz = cases.truth("linear_loss", inputs), cases.gradient_logits(inputs)
    build: Build = []
    for rows in s.sizes.chunks:
        label = f"{rows} rows"
        budget = rows * problem.vocab * 4
        make = partial(cases.ours, label, "linear_loss", inputs, want, backend, budget)
        build.append((label, make))
    build.append(("default", partial(cases.ours, "default", "linear_loss", inputs, want, backend)))
    build.append((BF16, partial(cases.gemms, BF16, "linear_loss", inputs, dz, wide=False)))
    return _measured(s, build, [BF16])


def _peers(s: Settings) -> dict[str, Any]:
    inputs, backend = _inputs(s.sizes.llama, s.device.device), s.backends[0]
    want, dz = cases.truth("linear_loss", inputs), cases.gradient_logits(inputs)
    build: Build = [
        (backend, partial(cases.ours, backend, "linear_loss", inputs, want, backend)),
        (BF16, partial(cases.gemms, BF16, "linear_loss", inputs, dz, wide=False)),
    ]
    for name in cases.PEERS:
        # A first call may compile: at most a third of what is left, and a minute and a half.
        box = max(1.0, min(90.0, (s.until - time.monotonic()) / 3))
        build.append((name, partial(cases.peer, name, inputs, want, box)))
    return _measured(s, build, [BF16])


def _overhead(s: Settings) -> dict[str, Any]:
    return {"rows": [], "facts": cases.overhead(s.backends[0], s.device)}


def plan(sizes: Sizes, backends: list[str]) -> list[Task]:
    """All tasks, the most important first."""
    first, tasks = backends[0], []

    def op(op: str, problem: Problem, *, frozen: bool = False) -> None:
        kind = f"{TITLES[op]}{', frozen head' if frozen else ''}"
        name = f"{op}{'-frozen' if frozen else ''}-{problem.name}"
        goals = []
        if op == "score":
            goals = [
                _goal(f"scoring <= 1.10 x one GEMM ({problem.name}, {b})", b, "time", 1.10, BF16)
                for b in backends
            ]
        elif op == "linear_loss":
            limit, count = (1.12, "two GEMMs") if frozen else (1.10, "three GEMMs")
            head = "frozen head" if frozen else "trainable head"
            text = f"linear_loss, {head} <= {limit:.2f} x {count} ({problem.name})"
            goals = [_goal(text, first, "time", limit, BF16)]
        text = f"memory within 5% of the formula ({name})"
        goals += [
            _goal(f"{text}, {b}" if op == "score" else text, b, "memory", 0.05)
            for b in (backends if op == "score" else [first])
        ]
        run = partial(_op, op, problem, frozen)
        tasks.append(Task(name, f"{kind}, {problem}", run, 15, goals))

    op("linear_loss", sizes.llama_half)
    op("linear_loss", sizes.llama)
    op("linear_loss", sizes.llama, frozen=True)
    op("score", sizes.llama)
    op("linear_loss", sizes.qwen)
    op("score", sizes.qwen)
    op("linear_logprob", sizes.llama)
    for vocab in sizes.vocabularies:
        goals = []
        for label, limit in (
            ("row_stats fp32", 0.90),
            ("row_stats bf16", 0.90),
            ("dlogits_ fp32 to bf16", 0.90),
            ("dlogits_ bf16", 0.90),
            ("logprob fp32, forward + backward", 0.85),
            ("logprob bf16, forward + backward", 0.85),
        ):
            text = f"{label} >= {limit:.0%} of the copy's bandwidth (V={vocab})"
            goals.append(_goal(text, label, "rate", limit, "copy"))
        title = f"Row kernels, V={vocab}, {sizes.logits / 2**20:g} MiB of logits"
        tasks.append(Task(f"kernels-{vocab}", title, partial(_kernels, vocab), 12, goals))
    title = f"linear_loss by rows a chunk (memory_budget), {sizes.sweep}"
    tasks.append(Task("chunks", title, _sweep, 20))
    tasks.append(Task("overhead", "What a call costs beside its kernels", _overhead, 10))
    title = f"Peers: A-LoL, forward + backward, {sizes.llama}"
    tasks.append(Task("peers", title, _peers, 30))
    return tasks


def usable(names: list[str], kind: str) -> list[str]:
    """Those of the backends that can run here; says why for the others."""
    reasons, found = lk.available_backends(), []
    for name in names:
        devices = lk.backends.TABLE[name].DEVICES if name in reasons else ()
        why = reasons.get(name, "no such backend")
        if why is None and devices is not None and kind not in devices:
            why = f"runs on {', '.join(devices)}"
        if why is None:
            found.append(name)
        else:
            print(f"backend {name} is left out: {why}", file=sys.stderr)
    return found


class Watch:
    """Calls ``stop`` from a thread of its own where a task runs longer than its limit."""

    def __init__(self, seconds: float, stop: Callable[[], None]) -> None:
        self.timer = threading.Timer(max(0.0, seconds), stop)
        self.timer.daemon = True

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *_: Any) -> None:
        self.timer.cancel()


def run(
    tasks: list[Task],
    s: Settings,
    record: dict[str, Any],
    out: Path,
    again: Callable[[], None],
) -> None:
    """Runs what the record lacks. ``again`` goes on in a new process: a failed or hanging kernel
    takes the CUDA context along."""

    def keep(task: Task, found: dict[str, Any]) -> None:
        record["tasks"][task.name] = {"title": task.title, "goals": task.goals, **found}
        record["left"] = [t.title for t in tasks if t.name not in record["tasks"]]
        gpu_report.save(record, out)
        print(gpu_report.table(record["tasks"][task.name]), end="\n\n", flush=True)

    def hangs(task: Task) -> None:
        keep(task, {"rows": [], "error": f"still running after {LONGEST} s, or at the deadline"})
        if s.until > time.monotonic():
            again()
        print(gpu_report.goals_table(record["goals"]), flush=True)
        os._exit(3)

    for task in tasks:
        left = s.until - time.monotonic()
        if task.name in record["tasks"]:
            print(f"{task.name}: already measured", file=sys.stderr)
            continue
        if left < (task.seconds if s.device.kind == "cuda" else 0):
            print(f"{task.name}: no time left", file=sys.stderr)
            continue
        dead, began = False, time.monotonic()
        try:
            with Watch(min(LONGEST, left + GRACE), partial(hangs, task)):
                found = task.run(s)
        except Exception as error:
            found = {"rows": [], "error": gm.short(error)}
            try:
                s.device.sync()
            except Exception:
                dead = True
        keep(task, {**found, "seconds": round(time.monotonic() - began, 1)})
        if dead:
            again()
        gc.collect()
        if s.device.kind == "cuda":
            torch.cuda.empty_cache()
    record["left"] = [t.title for t in tasks if t.name not in record["tasks"]]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>")
    parser.add_argument("--minutes", type=float, default=9, help="no task begins after this")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", metavar="PATTERN", help="tasks whose name the pattern finds")
    parser.add_argument("--list", action="store_true", help="name the tasks and stop")
    parser.add_argument("--rounds", type=int, default=12, help="each times a contestant twice")
    parser.add_argument("--backends", help="comma-separated; the first trains, all score")
    parser.add_argument("--commit", help="to record where the tree has no git")
    parser.add_argument("--again", type=float, help=argparse.SUPPRESS)  # epoch of the deadline
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and arguments.out is None and not arguments.list:
        parser.error("--device cpu needs --out")
    return arguments


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    a = parse(argv)
    default = "triton,triton_onchip" if a.device == "cuda" else "cpu,reference"
    names = (a.backends or default).split(",")
    sizes = CUDA if a.device == "cuda" else TINY
    if a.list:
        print("\n".join(task.name for task in plan(sizes, names)))
        return 0
    ends = time.time() + 60 * a.minutes if a.again is None else a.again
    if a.device == "cuda" and not torch.cuda.is_available():
        print("this torch sees no CUDA device (try --device cpu)", file=sys.stderr)
        return 2
    backends = usable(names, a.device)
    if not backends:
        print("no backend left to measure", file=sys.stderr)
        return 2
    device: Device = gm.Cuda() if a.device == "cuda" else gm.Cpu()
    settings = Settings(device, sizes, backends, a.rounds, time.monotonic() + ends - time.time())
    rest = [arg for arg in argv if not arg.startswith("--again=")]
    shown = " ".join(["python", "benchmarks/gpu.py", *rest])
    now = gpu_report.header(device.device, shown, a.commit)
    out = a.out or Path("benchmarks/results") / gpu_report.slug(now["device"])
    record = gpu_report.resume(out, now, same_run=a.again is not None)
    if record["header"] is not now and a.again is None:
        record["header"].setdefault("then", []).append(shown)

    def restart() -> None:
        sys.stdout.flush()
        os.closerange(3, 1 << 16)  # the driver frees what the lost context held
        os.execv(sys.executable, [sys.executable, __file__, *rest, f"--again={ends}"])

    tasks = [t for t in plan(sizes, backends) if a.only is None or re.search(a.only, t.name)]
    run(tasks, settings, record, out, restart)
    record["header"]["ended"] = gpu_report.clocks(device.device)
    gpu_report.save(record, out)
    print(gpu_report.goals_table(record["goals"]))
    print("wrote", *gpu_report.files(out))
    bad = [r for t in record["tasks"].values() for r in [t, *t["rows"]] if gpu_report.faulty(r)]
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
