"""GPU benchmarks: every op against its bare GEMMs or a copy, and the peers, after a float64 check.

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
import shlex
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from the source tree, not installed

import kernels
import measure
import report
import torch
from measure import Device, Entry, Row
from peers import FLOORS, PEERS, Contestant
from report import Goal
from run import against, title_of
from shapes import HEADS, Shape

import lolkernels as lk

LONGEST = 150  # seconds of a task: a kernel that hangs costs no more than this
GRACE = 25  # seconds past the deadline for the task in progress
# One task a family: a peer that hangs or takes the device down costs its family only.
FAMILIES = {
    "eager": ["eager", "lol-rl", "torch.compile", "verl recompute"],
    "torch": [name for name in PEERS if name.startswith("torch lce")],
    "liger": [name for name in PEERS if name.startswith("liger")],
    "cce": [name for name in PEERS if name.startswith("cce")],
    "others": ["trl", "quack", "quack chunked", "fla"],
}
Build = list[tuple[Row, Callable[[], Contestant]]]


@dataclass(frozen=True)
class Sizes:
    llama: Shape
    llama_half: Shape
    qwen: Shape
    sweep: Shape  # its sequences fit every chunk of the sweep
    chunks: tuple[int, ...]
    vocabularies: tuple[int, ...]
    logits: int  # bytes of the row kernels' logits and of the copy


_LLAMA = Shape(8192, *HEADS["llama3-8b"], 1024, "bf16", shortest=128)
CUDA = Sizes(
    llama=_LLAMA,
    llama_half=replace(_LLAMA, tokens=4096),
    qwen=Shape(8192, *HEADS["qwen3-8b"], 1024, "bf16", shortest=128),
    sweep=replace(_LLAMA, seq_len=512),
    chunks=(512, 1024, 2048, 4096, 8192),
    vocabularies=(32000, 128256, 151936, 262144),
    logits=2**31,
)
_TINY = Shape(96, 32, 515, 16, "bf16", shortest=4)
TINY = Sizes(
    llama=_TINY,
    llama_half=replace(_TINY, tokens=48),
    qwen=Shape(96, 48, 700, 16, "bf16", shortest=4),
    sweep=replace(_TINY, seq_len=8),
    chunks=(8, 96),
    vocabularies=(129, 500),
    logits=2**16,
)


@dataclass
class Settings:
    device: Device
    sizes: Sizes
    backends: list[str]  # the first one meets the peers
    rounds: int
    until: float  # time.monotonic() when measuring ends


@dataclass
class Task:
    name: str
    title: str
    run: Callable[[Settings], dict[str, Any]]
    seconds: float  # with less time left it is not begun
    floors: list[str] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)


def _timed(entries: list[Entry], s: Settings) -> dict[str, Any]:
    return {"rows": measure.time_entries(entries, s.rounds, s.device, s.until)}


def _kernels(vocab: int, s: Settings) -> dict[str, Any]:
    size, device = s.sizes.logits, s.device.device
    build: Build = [(Row("copy", "copy", "copy"), partial(kernels.copy, size, device))]

    def add(label: str, op: str, make: Callable[[], Contestant]) -> None:
        build.append((Row(label, "lolkernels", op), make))

    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        n = max(8, size // (vocab * dtype.itemsize))
        rows = kernels.make_rows(n, vocab, dtype, device)
        narrow = name == "fp32"
        to = " to bf16" if narrow else ""
        for b in distinct(s.backends, "row_stats"):
            add(f"row_stats {name}, {b}", "row_stats", partial(kernels.row_stats, rows, b))
            dlogits = partial(kernels.dlogits, rows, b, narrow=narrow)
            add(f"dlogits_ {name}{to}, {b}", "dlogits_", dlogits)
            label = f"logprob {name}, forward + backward, {b}"
            add(label, "logprob", partial(kernels.logprob, rows, b))
    return {"rows": measure.measure(build, s.device, rounds=s.rounds, until=s.until)}


def distinct(names: list[str], *functions: str) -> list[str]:
    """Without the backends whose functions of these names are those of an earlier one."""
    found: dict[tuple[Any, ...], str] = {}
    for name in names:
        module = lk.backends.TABLE[name]
        found.setdefault(tuple(getattr(module, f, None) for f in functions), name)
    return list(found.values())


def _overhead(s: Settings) -> dict[str, Any]:
    return {"rows": [], "facts": kernels.overhead(s.backends[0], s.device)}


def plan(sizes: Sizes, backends: list[str]) -> list[Task]:
    """All tasks, the most important first."""
    first, tasks = backends[0], []

    def entries(
        op: str, shape: Shape, frozen: bool, names: list[str], others: list[str]
    ) -> list[Entry]:
        make = partial(Entry, op=op, shape=shape, frozen_head=frozen)
        ours = [make(b, "lolkernels", backend=b) for b in names]
        return ours + [make(name, name) for name in others]

    def op(op: str, name: str, shape: Shape, *, frozen: bool = False) -> None:
        task = f"{op}{'-frozen' if frozen else ''}-{name}"
        ours = backends
        if op != "score":  # which differ in the GEMMs that only score
            ours = distinct(backends, "row_stats", "linear_spans")
        goals, limit, count = [], 1.10, "three GEMMs"
        if op == "score":
            count = "one GEMM"
        elif frozen:
            limit, count = 1.12, "two GEMMs"
        for b in ours:
            if op != "linear_logprob":
                text = f"{task} <= {limit:.2f} x {count} ({b})"
                goals.append(Goal(text, b, limit, FLOORS[0]))
            text = f"{task}: memory within 5% of the formula ({b})"
            goals.append(Goal(text, b, 0.05, of="formula"))
        run = partial(_timed, entries(op, shape, frozen, ours, list(FLOORS)))
        title = f"{title_of(op, frozen)}, {shape}"
        tasks.append(Task(task, title, run, 15, list(FLOORS), goals))

    op("linear_loss", "llama-4096", sizes.llama_half)
    op("linear_loss", "llama-8192", sizes.llama)
    op("linear_loss", "llama-8192", sizes.llama, frozen=True)
    op("score", "llama-8192", sizes.llama)
    op("linear_loss", "qwen-8192", sizes.qwen)
    op("score", "qwen-8192", sizes.qwen)
    op("linear_logprob", "llama-8192", sizes.llama)
    for family, names in FAMILIES.items():
        title = f"Peers, {family}: {title_of('linear_loss')}, {sizes.llama}"
        run = partial(
            _timed, entries("linear_loss", sizes.llama, False, [first], [FLOORS[0], *names])
        )
        goals = [replace(goal, row=first) for goal in against(names)]
        tasks.append(Task(f"peers-{family}", title, run, 25, [FLOORS[0]], goals))
    for vocab in sizes.vocabularies:
        goals = []
        for kernel, limit in (
            ("row_stats fp32", 0.90),
            ("row_stats bf16", 0.90),
            ("dlogits_ fp32 to bf16", 0.90),
            ("dlogits_ bf16", 0.90),
            ("logprob fp32, forward + backward", 0.85),
            ("logprob bf16, forward + backward", 0.85),
        ):
            for b in distinct(backends, "row_stats"):
                label = f"{kernel}, {b}"
                text = f"{label} >= {limit:.0%} of the copy's bandwidth (V={vocab})"
                goals.append(Goal(text, label, limit, "copy", "bandwidth"))
        title = f"Row kernels, V={vocab}, {sizes.logits / 2**20:g} MiB of logits"
        run = partial(_kernels, vocab)
        tasks.append(Task(f"kernels-{vocab}", title, run, 12, ["copy"], goals))
    sweep = partial(Entry, op="linear_loss", shape=sizes.sweep)
    budgets = {f"{n} rows": n * sizes.sweep.vocab * 4 for n in sizes.chunks}
    chunked = [
        sweep(label, "lolkernels", backend=first, budget=budget)
        for label, budget in {**budgets, "default": None}.items()
    ]
    title = f"linear_loss by rows a chunk (memory_budget), {sizes.sweep}"
    run = partial(_timed, [*chunked, sweep(FLOORS[0], FLOORS[0])])
    tasks.append(Task("chunks", title, run, 20, [FLOORS[0]]))
    tasks.append(Task("overhead", "What a call costs beside its kernels", _overhead, 10))
    return tasks


def usable(names: list[str], kind: str) -> list[str]:
    """Those of the backends that can run here; says why for the others."""
    reasons, found = lk.available_backends(), []
    for name in names:
        devices = lk.backends.TABLE[name].devices if name in reasons else ()
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

    def done() -> set[str]:
        return {case["name"] for case in record["cases"]}

    def keep(task: Task, found: dict[str, Any]) -> None:
        rows = found.pop("rows")
        case = report.case(task.title, rows, task.floors, name=task.name, goals=task.goals, **found)
        record["cases"].append(case)
        record["left"] = [t.title for t in tasks if t.name not in done()]
        report.judge_all(record)
        report.save(record, out)
        print(report.table(case), end="\n\n", flush=True)

    def hangs(task: Task) -> None:
        keep(task, {"rows": [], "error": f"still running after {LONGEST} s, or at the deadline"})
        if s.until > time.monotonic():
            again()
        print(report.goals_table(record["goals"]), flush=True)
        os._exit(3)

    for task in tasks:
        left = s.until - time.monotonic()
        if task.name in done():
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
            found = {"rows": [], "error": measure.short(error)}
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
    record["left"] = [t.title for t in tasks if t.name not in done()]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>")
    parser.add_argument("--minutes", type=float, default=9, help="no task begins after this")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", metavar="PATTERN", help="tasks whose name the pattern finds")
    parser.add_argument("--list", action="store_true", help="name the tasks and stop")
    parser.add_argument("--rounds", type=int, default=24, help="interleaved rounds a task")
    parser.add_argument("--backends", help="comma-separated; the first meets the peers")
    parser.add_argument("--commit", help="to record where the tree has no git")
    parser.add_argument("--again", type=float, help=argparse.SUPPRESS)  # epoch of the deadline
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and arguments.out is None and not arguments.list:
        parser.error("--device cpu needs --out")
    return arguments


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    a = parse(argv)
    default = "triton,cuda" if a.device == "cuda" else "cpu,reference"
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
    device: Device = measure.Cuda() if a.device == "cuda" else measure.Cpu()
    settings = Settings(device, sizes, backends, a.rounds, time.monotonic() + ends - time.time())
    rest = [arg for arg in argv if not arg.startswith("--again=")]
    shown = shlex.join(["python", "benchmarks/gpu.py", *rest])
    now = report.environment(device.device, shown, a.commit)
    out = a.out or Path("benchmarks/results") / report.slug(now["device"])
    record = report.resume(out, now, a.rounds, same_run=a.again is not None)
    if record["environment"] is not now and a.again is None:
        record["environment"].setdefault("then", []).append(shown)

    def restart() -> None:
        sys.stdout.flush()
        os.closerange(3, 1 << 16)  # the driver frees what the lost context held
        os.execv(sys.executable, [sys.executable, __file__, *rest, f"--again={ends}"])

    tasks = [t for t in plan(sizes, backends) if a.only is None or re.search(a.only, t.name)]
    run(tasks, settings, record, out, restart)
    record["environment"]["ended"] = report.clocks(device.device)
    report.judge_all(record)
    report.save(record, out)
    print(report.goals_table(record["goals"]))
    print("wrote", *report.files(out))
    return 1 if any(report.faulty(case) for case in record["cases"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
