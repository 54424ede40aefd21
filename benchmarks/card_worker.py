"""A worker of card.py: runs tasks one by one and writes each to the journal when it ends.

environment   where this is, which backends there are, and what is to be done
check NAME    every op of one backend against float64, at an odd and at a real shape
parts         products, sweeps, host time, rounding: each alone
bench         rows in the order they are wanted, then whole training steps
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from the source tree, not installed

import library
import measure
import parts
import report
import torch
from journal import Journal
from measure import Device, Entry
from peers import FLOORS, PEERS
from report import Goal
from run import Case, against, title_of
from shapes import DTYPES, HEADS, Shape

DEVICE_LOST = 75  # as in card.py
PATIENCE = {"cuda": 1, "cpu": 4}  # times a task's limit: a dry run is slow
OPS = ("linear_loss", "linear_loss frozen", "linear_logprob", "score", "logprob")
# Rows of the benchmark in the order that they are wanted.
WANTED = (
    "llama-8b 4096$",
    "^peers .* all gradients",
    "^flag",
    "^train",
    "llama-8b 1024$",
    "^kernels 128256",
    "^linear_loss",
    "llama-8b",
    "^peers",
    "",
)
# A peer that hangs or takes the device down costs its family only.
FAMILIES = {
    "torch": ["eager", "torch.compile", *(n for n in PEERS if n.startswith("torch lce"))],
    "liger": [n for n in PEERS if n.startswith("liger")],
    "cce": [n for n in PEERS if n.startswith("cce")],
    "others": ["trl", "quack", "verl recompute", "lol-rl"],
}


@dataclass(frozen=True)
class Sizes:
    odd: Shape
    real: Shape  # of the checks
    heads: dict[str, Shape]  # 4096 rows each, most wanted first
    product: tuple[int, int, int]  # rows, hidden, vocab
    additions: tuple[int, ...]  # rows K of a chunk of dweight
    terms: tuple[int, ...]  # K of the sums that truncation is measured in
    chunk: int  # rows of the sweeps
    vocabularies: tuple[int, ...]
    logits: int  # bytes of the row kernels' logits
    train: tuple[tuple[str, str, int, int], ...]  # model, mode, sequences, their length
    memory: tuple[int, ...]  # bytes that the largest batch is to fit into
    short: int  # tokens where the host's cost shows
    few: bool = False  # a dry run: one task of a kind


def _head(name: str, tokens: int = 4096) -> Shape:
    return Shape(tokens, *HEADS[name], 512, "bf16", shortest=64)


GIB = 2**30
CUDA = Sizes(
    odd=Shape(133, 56, 2049, 40, "bf16", shortest=3),
    real=Shape(512, *HEADS["llama3.2-1b"], 256, "bf16", shortest=32),
    heads={
        "llama-8b": _head("llama3-8b"),
        "qwen3-8b": _head("qwen3-8b"),
        "qwen2.5-0.5b": _head("qwen2.5-0.5b"),
        "gemma2-2b": _head("gemma2-2b"),
        "gemma3-1b": _head("gemma3-1b"),
    },
    product=(4096, 4096, 128256),
    additions=(512, 1024, 2048, 4096),
    terms=(512, 1024, 2048, 4096, 8192),
    chunk=1024,
    vocabularies=(128256, 151936, 32000, 262144),
    logits=2**30,
    train=(("llama-3.2-1b", "full", 8, 1024), ("llama-3.1-8b", "lora", 8, 1024)),
    memory=(24 * GIB, 78 * GIB),
    short=1024,
)
TINY = Sizes(
    odd=Shape(7, 8, 33, 5, "bf16", shortest=2),
    real=Shape(12, 16, 64, 4, "bf16"),
    heads={"llama-8b": Shape(24, 16, 130, 8, "bf16", shortest=4)},
    product=(24, 16, 130),
    additions=(8, 16),
    terms=(32, 64),
    chunk=4,
    vocabularies=(33,),
    logits=2**10,
    train=(("test", "full", 2, 16),),
    memory=(),
    short=16,
    few=True,
)


@dataclass(frozen=True)
class Task:
    name: str
    title: str
    run: Callable[[], dict[str, Any]]
    limit: float = 30.0  # seconds; with less left it is not begun, except in a dry run
    parts: tuple[Task, ...] = ()  # what is run instead where it faults: each contestant alone


def checks(backend: str, sizes: Sizes, device: Device) -> list[Task]:
    tasks = []
    for place, shape in (("odd", sizes.odd), ("real", sizes.real)):
        for dtype in DTYPES:
            for op in OPS:
                one = replace(shape, dtype=dtype)
                run = partial(check, backend, op, one, device)
                title = f"{op}, {dtype}, {place} shape, {backend}"
                tasks.append(Task(f"check {backend} {place} {dtype} {op}", title, run))
    return tasks


def check(backend: str, op: str, shape: Shape, device: Device) -> dict[str, Any]:
    """What one call is off by, against float64."""
    name, _, frozen = op.partition(" ")
    entry = Entry(backend, "lolkernels", name, shape, bool(frozen), backend=backend)
    found = {"op": op, "backend": backend, "shape": str(shape)}
    try:
        seen = measure.contestant(entry, device.device).check()
    except (NotImplementedError, ValueError) as error:  # it does not take this dtype or size
        return {**found, "skipped": measure.short(error)}
    more = {"sum_error_nat": seen.sum_nat, "gradient_errors": seen.gradients}
    return {**found, **more, "wrong": seen.faults, "missed": seen.missed}


def parts_tasks(sizes: Sizes, backends: list[str], device: Device) -> list[Task]:
    rounds = 2 if sizes.few else 7
    _, hidden, vocab = sizes.product
    logits, found = 4 * vocab * sizes.chunk, list[Task]()

    def add(name: str, title: str, limit: float, make: Callable[..., Any], *given: Any) -> None:
        run = lambda: {"case": make(*given)}  # noqa: E731
        found.append(Task(f"parts {name}", title, run, limit))

    add("products", "Matrix products", 20, parts.products, *sizes.product, device, rounds)
    add("sweeps", "Sweeps", 25, parts.sweeps, vocab, logits, ("fp32",), backends, device, rounds)
    given = (sizes.additions, hidden, vocab, device, rounds)
    add("additions", "dweight by chunks", 15, parts.additions, *given)
    for b in backends[-1:] if sizes.few else backends:
        add(f"overhead {b}", f"Host time, {b}", 15, parts.overhead, b, device)
    add("truncation", "Truncation", 25, parts.truncation, sizes.terms, backends, device)
    if importlib.util.find_spec("predict") is not None:
        add("prediction", "Predicted by counting", 20, parts.prediction, *sizes.product)
    beside = (*sizes.product, device, rounds, True)
    add("quack", "Matrix products beside QuACK", 40, parts.products, *beside)
    return found


class Bench:
    """The tasks of the benchmark, on the backends that are not the reference."""

    def __init__(
        self, sizes: Sizes, backends: list[str], device: Device, rounds: int, until: float
    ) -> None:
        self.sizes, self.device, self.rounds = sizes, device, rounds
        self.backends = [b for b in backends if b != "reference"] or backends
        self.ends = time.monotonic() + until - time.time()
        self.tasks: list[Task] = []

    def add(self, name: str, case: Case, limit: float = 45) -> None:
        """The task, and what is run where it faults: each contestant alone with the floors."""

        def task(name: str, title: str, entries: list[Entry], limit: float) -> Task:
            labels = {e.label for e in entries}
            goals = [goal for goal in case.goals if goal.row in labels]
            one = Case(title, entries, case.floors, goals)
            return Task(name, title, partial(self.time_rows, name, one, limit), limit)

        bare = [e for e in case.entries if e.label in case.floors]
        rivals = [e for e in case.entries if e.label not in case.floors]
        alone = [
            task(f"{name} / {e.label}", f"{case.title}: {e.label}", [e, *bare], limit / 2)
            for e in (rivals if len(rivals) > 1 else [])
        ]
        whole = task(name, case.title, case.entries, limit)
        self.tasks.append(replace(whole, parts=tuple(alone)))

    def time_rows(self, name: str, case: Case, limit: float) -> dict[str, Any]:
        # First calls have their boxes before it.
        until = min(self.ends, time.monotonic() + 0.8 * PATIENCE[self.device.kind] * limit)
        rows = measure.time_entries(case.entries, self.rounds, self.device, until)
        return judged(report.case(case.title, rows, case.floors, name=name, goals=case.goals))

    def op(self, op: str, name: str, shape: Shape, *, frozen: bool = False) -> None:
        task = f"{op}{'-frozen' if frozen else ''} {name} {shape.tokens}"
        floors, names = list(FLOORS), self.backends
        if op == "logprob":
            floors, names = ["copy"], library.distinct(names, "exps_")
            text = f"{task} >= 85% of a copy's bandwidth"
            goals = [Goal(f"{text} ({b})", b, 0.85, "copy", "bandwidth") for b in names]
        else:
            limit = limit_of(op, shape.hidden, frozen)
            text = f"{task} <= {limit:.2f} x its bare GEMMs"
            goals = [Goal(f"{text} ({b})", b, limit, FLOORS[0]) for b in names]
            text = f"{task}: memory within 5% of the formula"
            goals += [Goal(f"{text} ({b})", b, 0.05, of="formula") for b in names]
        make = partial(Entry, op=op, shape=shape, frozen_head=frozen)
        made = [make(b, "lolkernels", backend=b) for b in names]
        made += [make(n, n) for n in (*floors, "eager")]
        self.add(task, Case(f"{title_of(op, frozen)}, {shape}", made, floors, goals))

    def three(self, name: str, shape: Shape) -> None:
        self.op("linear_loss", name, shape)
        self.op("linear_loss", name, shape, frozen=True)
        self.op("score", name, shape)

    def head(self, name: str, shape: Shape) -> None:
        self.three(name, shape)
        self.op("linear_logprob", name, shape)
        self.op("linear_logprob", name, shape, frozen=True)
        self.op("logprob", name, shape)

    def peers(self, shape: Shape, frozen: bool) -> None:
        first, text = self.backends[0], "frozen head" if frozen else "all gradients"
        make = partial(Entry, op="linear_loss", shape=shape, frozen_head=frozen)
        for family, names in FAMILIES.items():
            title = f"Peers, {family}: {title_of('linear_loss', frozen)}, {shape}"
            made = [make(first, "lolkernels", backend=first)]
            made += [make(name, name) for name in (FLOORS[0], *names)]
            limit = 100 if family == "torch" else 60  # its compiler is slow
            case = Case(title, made, [FLOORS[0]], against(names, f", {text}", first))
            self.add(f"peers {family} {text}", case, limit)

    def flags(self, shape: Shape) -> None:
        first, make = self.backends[0], partial(Entry, op="linear_loss")
        for flag, dtype in (("autocast", "bf16"), ("tf32", "fp32")):
            made = [
                make(f"{first} {flag}", "lolkernels", shape=shape, backend=first, flag=flag),
                make(f"eager {flag}", "eager", shape=shape, flag=flag),
                make("gemms", "gemms", shape=replace(shape, dtype=dtype)),
                make("no flag", "lolkernels", shape=shape, backend=first),
            ]
            title = f"{title_of('linear_loss')} under {flag}, fp32 leaves, {shape}"
            self.add(f"flag {flag}", Case(title, made))

    def chunks(self, shape: Shape) -> None:
        make = partial(Entry, op="linear_loss", shape=shape)
        budgets = {f"{n} rows": n * shape.vocab * 4 for n in (512, 1024, 2048, 4096)}
        made = [
            make(label, "lolkernels", backend=self.backends[0], budget=budget)
            for label, budget in {**budgets, "default": None}.items()
        ]
        made.append(make(FLOORS[0], FLOORS[0]))
        self.add("chunks", Case(f"linear_loss by rows a chunk (memory_budget), {shape}", made))

    def train(self, model: str, mode: str, count: int, length: int) -> dict[str, Any]:
        module = importlib.import_module("train")  # it needs transformers
        measure.forget(self.device)
        dtype = "bf16" if self.device.kind == "cuda" else "fp32"
        case = module.Case(model, mode, count, length, dtype, self.device.kind)
        memory = list(self.sizes.memory) or None
        try:
            found = module.measure_case(case, memory, min(self.rounds, 5), self.device, self.ends)
        finally:  # what is measured next needs it
            self.device.fill()
        return judged(found)

    def kernels(self, vocab: int) -> dict[str, Any]:
        given = (self.sizes.logits, ("fp32", "bf16"), self.backends, self.device, self.rounds)
        return judged(parts.sweeps(vocab, *given, until=self.ends, goals=True))


def judged(case: dict[str, Any]) -> dict[str, Any]:
    return {"case": case, "wrong": report.faults(case)}


def bench_tasks(
    sizes: Sizes, backends: list[str], device: Device, rounds: int, until: float
) -> list[Task]:
    bench = Bench(sizes, backends, device, rounds, until)
    (main, shape), *others = sizes.heads.items()
    bench.head(main, shape)
    for frozen in (False,) if sizes.few else (False, True):
        bench.peers(shape, frozen)
    bench.flags(replace(shape, dtype="fp32", tokens=shape.tokens // 2))
    for given in sizes.train:
        how, run = " ".join(given[:2]), partial(bench.train, *given)
        bench.tasks.append(Task(f"train {how}", f"Training steps, {how}", run, 90))
    bench.three(main, replace(shape, tokens=sizes.short))
    if not sizes.few:
        bench.three(main, replace(shape, tokens=2 * shape.tokens, seq_len=1024, shortest=128))
        for name, other in others:
            bench.head(name, other)
        bench.chunks(shape)
    for vocab in sizes.vocabularies:
        run = partial(bench.kernels, vocab)
        bench.tasks.append(Task(f"kernels {vocab}", f"Row kernels, V={vocab}", run, 30))
    return sorted(
        bench.tasks, key=lambda task: [bool(re.search(p, task.name)) for p in WANTED].index(True)
    )


def limit_of(op: str, hidden: int, frozen: bool) -> float:
    """Of the bare products' time. A sweep weighs more where D is small."""
    if op == "score" or frozen:
        return 1.10 if op == "score" else 1.12
    return 1.08 if hidden >= 3584 else 1.15 if hidden >= 2048 else 1.30


def environment(
    given: argparse.Namespace, backends: list[str], sizes: Sizes, device: Device, journal: Journal
) -> None:
    where = report.environment(device.device, given.shown, given.commit or None)
    why = library.usable(given.device)
    planned = [*(t for b in backends for t in checks(b, sizes, device))]
    planned += parts_tasks(sizes, backends, device)
    planned += bench_tasks(sizes, backends, device, 1, time.time())
    journal.write(
        "header",
        job="environment",
        task="environment",
        identity={key: where[key] for key in report.SAME},
        environment=where,
        backends=backends,
        missing={name: reason for name, reason in why.items() if reason is not None},
        plan=[[t.name, t.title] for t in planned if re.search(given.only or "", t.name)],
    )


def backends_of(kind: str, named: str | None) -> list[str]:
    """Those that run here; the one that a call takes by itself first, the reference last."""
    found = [name for name, why in library.usable(kind).items() if why is None]
    if named:
        return [name for name in named.split(",") if name in found]
    return sorted(found, key=lambda name: name == "reference")


def work(tasks: list[Task], job: str, journal: Journal, until: float, device: Device) -> int:
    """Runs what is not settled. Returns the exit status."""
    on_card, settled, queue = device.kind == "cuda", journal.settled(), deque(tasks)
    here = (x for x in journal.lines() if x["run"] == journal.run and x["kind"] == "fault")
    faulty = {line["task"] for line in here}
    while queue:
        task = queue.popleft()
        if task.name in faulty:
            queue.extendleft(reversed(task.parts))
            continue
        if task.name in settled:
            continue
        left = until - time.time()
        if left < (0.6 * task.limit if on_card else 0):
            journal.write("left", job=job, why=f"{task.name}: {left:.0f} s were left")
            continue
        limit = PATIENCE[device.kind] * task.limit
        journal.write("begin", job=job, task=task.name, limit=limit)
        began = time.monotonic()
        try:
            found = task.run()
            device.sync()
        except Exception as error:
            journal.write("fault", job=job, task=task.name, reason=measure.short(error), text="")
            faulty.add(task.name)
            queue.appendleft(task)
            try:
                device.sync()
            except Exception:
                return DEVICE_LOST
        else:
            more = {"title": task.title, "seconds": round(time.monotonic() - began, 2), **found}
            journal.write("result", job=job, task=task.name, **more)
        gc.collect()
        if on_card:
            torch.cuda.empty_cache()
    if on_card:
        journal.write("clocks", job=job, clocks=report.clocks(device.device))
    return 0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    for name in ("--run", "--device", "--commit", "--shown", "--plugin", "--only", "--backends"):
        parser.add_argument(name)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--rounds", type=int)
    given = parser.parse_args(argv)
    journal = Journal(given.out, given.run)
    if given.plugin:
        importlib.import_module(given.plugin)
    sizes = CUDA if given.device == "cuda" else TINY
    device: Device = measure.Cuda() if given.device == "cuda" else measure.Cpu()
    backends, job = backends_of(given.device, given.backends), " ".join(given.what)
    if not backends:
        raise SystemExit("no backend is left to measure")
    if given.what == ["environment"]:
        environment(given, backends, sizes, device, journal)
        return
    rounds = given.rounds or (2 if sizes.few else 12)
    if given.what[0] == "check":
        tasks = checks(given.what[1], sizes, device)
    elif given.what[0] == "parts":
        tasks = parts_tasks(sizes, backends, device)
    else:
        tasks = bench_tasks(sizes, backends, device, rounds, given.until)
    tasks = [t for t in tasks if given.only is None or re.search(given.only, t.name)]
    status = work(tasks, job, journal, given.until, device)
    sys.stdout.flush()
    if status:  # a lost device must not hold up the end of the process
        os._exit(status)
