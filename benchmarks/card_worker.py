"""A worker of card.py: runs tasks one by one and writes each to the journal when it ends.

environment   where this is, which backends there are, and what is to be done
check NAME    every op of one backend against float64, at an odd and at a real shape
parts         products, sweeps, host time, rounding: each alone
bench         rows in the order they are wanted, then whole training steps
"""

from __future__ import annotations

import argparse
import gc
import importlib
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
import rowwise
import torch
from journal import Journal
from measure import Device, Entry, Row
from peers import FLOORS, PEERS
from report import Goal
from run import Case, against, title_of
from shapes import HEADS, Shape

DEVICE_LOST = 75  # as in card.py
OPS = ("linear_loss", "linear_loss frozen", "linear_logprob", "score", "logprob")
DTYPES = ("bf16", "fp16", "fp32")
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
    "others": ["trl", "quack", "verl recompute", "lol-rl", "quack chunked", "fla"],
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


# --- is it right ----------------------------------------------------------------------------------


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


# --- the parts ------------------------------------------------------------------------------------


def parts_tasks(sizes: Sizes, backends: list[str], device: Device) -> list[Task]:
    rounds = 2 if sizes.few else 7
    _, hidden, vocab = sizes.product

    def case(make: Callable[[], tuple[str, parts.Build, str]]) -> Callable[[], dict[str, Any]]:
        return lambda: {"case": parts.timed(make(), device, rounds)}

    products = case(partial(parts.products, *sizes.product, device))
    beside = case(partial(parts.products, *sizes.product, device, peer=True))
    adding = case(partial(parts.additions, sizes.additions, hidden, vocab, device))
    sweeping = case(partial(parts.sweeps, sizes.chunk, vocab, backends, device))
    tasks = [
        Task("parts products", "Matrix products", products, 20),
        Task("parts sweeps", "Sweeps", sweeping, 25),
        Task("parts additions", "dweight by chunks", adding, 15),
    ]
    for b in backends[-1:] if sizes.few else backends:
        run = partial(lambda b: {"case": parts.overhead(b, device)}, b)
        tasks.append(Task(f"parts overhead {b}", f"Host time, {b}", run, 15))
    return [
        *tasks,
        Task(
            "parts truncation",
            "Truncation",
            lambda: {"case": parts.truncation(sizes.terms, backends, device)},
            25,
        ),
        Task("parts quack", "Matrix products beside QuACK", beside, 40),
    ]


# --- the benchmark --------------------------------------------------------------------------------


def bench_tasks(
    sizes: Sizes, backends: list[str], device: Device, rounds: int, until: float
) -> list[Task]:
    backends = [b for b in backends if b != "reference"] or backends
    first, tasks = backends[0], list[Task]()
    ends = time.monotonic() + until - time.time()

    def add(
        name: str,
        title: str,
        entries: list[Entry],
        floors: list[str],
        goals: list[Goal],
        limit: float,
    ) -> None:
        def task(name: str, title: str, entries: list[Entry], limit: float) -> Task:
            labels = {e.label for e in entries}
            case = Case(title, entries, floors, [goal for goal in goals if goal.row in labels])
            run = partial(time_rows, name, case, device, rounds, ends, limit)
            return Task(name, title, run, limit)

        rivals = [e for e in entries if e.label not in floors]
        bare = [e for e in entries if e.label in floors]
        alone = (
            task(f"{name} / {e.label}", f"{title}: {e.label}", [e, *bare], limit / 2)
            for e in (rivals if len(rivals) > 1 else [])
        )
        tasks.append(replace(task(name, title, entries, limit), parts=tuple(alone)))

    def entry(label: str, contestant: str, op: str, shape: Shape, **more: Any) -> Entry:
        return Entry(label, contestant, op, shape, **more)

    def op(op: str, name: str, shape: Shape, *, frozen: bool = False) -> None:
        task = f"{op}{'-frozen' if frozen else ''} {name} {shape.tokens}"
        floors = ["copy"] if op == "logprob" else list(FLOORS)
        goals = []
        names = library.distinct(backends, "row_stats") if op == "logprob" else backends
        for b in names:
            if op == "logprob":
                goals.append(
                    Goal(f"{task} >= 85% of a copy's bandwidth ({b})", b, 0.85, "copy", "bandwidth")
                )
                continue
            limit = limit_of(op, shape.hidden, frozen)
            text = f"{task} <= {limit:.2f} x its bare GEMMs ({b})"
            goals.append(Goal(text, b, limit, FLOORS[0]))
            text = f"{task}: memory within 5% of the formula ({b})"
            goals.append(Goal(text, b, 0.05, of="formula"))
        made = [entry(b, "lolkernels", op, shape, frozen_head=frozen, backend=b) for b in names]
        made += [entry(f, f, op, shape, frozen_head=frozen) for f in floors]
        made.append(entry("eager", "eager", op, shape, frozen_head=frozen))
        add(task, f"{title_of(op, frozen)}, {shape}", made, floors, goals, 45)

    def head(name: str, shape: Shape) -> None:
        op("linear_loss", name, shape)
        op("linear_loss", name, shape, frozen=True)
        op("score", name, shape)
        op("linear_logprob", name, shape)
        op("linear_logprob", name, shape, frozen=True)
        op("logprob", name, shape)

    main, shape = next(iter(sizes.heads.items()))
    head(main, shape)
    for frozen in (False,) if sizes.few else (False, True):
        for family, names in FAMILIES.items():
            text = "frozen head" if frozen else "all gradients"
            title = f"Peers, {family}: {title_of('linear_loss', frozen)}, {shape}"
            make = partial(entry, op="linear_loss", shape=shape, frozen_head=frozen)
            made = [make(first, "lolkernels", backend=first), make(FLOORS[0], FLOORS[0])]
            made += [make(name, name) for name in names]
            goals = [replace(g, row=first, text=f"{g.text}, {text}") for g in against(names)]
            limit = 100 if family == "torch" else 60  # its compiler is slow
            add(f"peers {family} {text}", title, made, [FLOORS[0]], goals, limit)
    wide = replace(shape, dtype="fp32", tokens=shape.tokens // 2)
    for flag, dtype in (("autocast", "bf16"), ("tf32", "fp32")):
        made = [
            Entry(f"{c} {flag}", "lolkernels" if c == first else c, "linear_loss", wide, flag=flag)
            for c in (first, "eager")
        ]
        made[0] = replace(made[0], backend=first)
        made.append(entry("gemms", "gemms", "linear_loss", replace(wide, dtype=dtype)))
        made.append(entry("no flag", "lolkernels", "linear_loss", wide, backend=first))
        title = f"{title_of('linear_loss')} under {flag}, fp32 leaves, {wide}"
        add(f"flag {flag}", title, made, ["gemms"], [], 45)
    for model, mode, count, length in sizes.train:
        how = partial(train, model, mode, count, length, sizes.memory, device, rounds, ends)
        tasks.append(Task(f"train {model} {mode}", f"Training steps, {model}, {mode}", how, 90))
    short = replace(shape, tokens=sizes.short)
    for name, frozen in (("linear_loss", False), ("linear_loss", True), ("score", False)):
        op(name, main, short, frozen=frozen)
    if not sizes.few:
        double = replace(shape, tokens=2 * shape.tokens, seq_len=1024, shortest=128)
        for name, frozen in (("linear_loss", False), ("linear_loss", True), ("score", False)):
            op(name, main, double, frozen=frozen)
        for name, other in list(sizes.heads.items())[1:]:
            head(name, other)
        budgets = {f"{n} rows": n * shape.vocab * 4 for n in (512, 1024, 2048, 4096)}
        made = [
            entry(label, "lolkernels", "linear_loss", shape, backend=first, budget=budget)
            for label, budget in {**budgets, "default": None}.items()
        ]
        made.append(entry(FLOORS[0], FLOORS[0], "linear_loss", shape))
        title = f"linear_loss by rows a chunk (memory_budget), {shape}"
        add("chunks", title, made, [FLOORS[0]], [], 45)
    for vocab in sizes.vocabularies:
        how = partial(row_kernels, vocab, sizes.logits, backends, device, rounds, ends)
        tasks.append(Task(f"kernels {vocab}", f"Row kernels, V={vocab}", how, 30))
    return sorted(
        tasks, key=lambda task: [bool(re.search(p, task.name)) for p in WANTED].index(True)
    )


def time_rows(
    name: str, case: Case, device: Device, rounds: int, ends: float, limit: float
) -> dict[str, Any]:
    until = min(ends, time.monotonic() + 0.8 * limit)  # first calls have their boxes before it
    rows = measure.time_entries(case.entries, rounds, device, until)
    wrong = [f"{r.label}: {'; '.join(r.wrong)}" for r in rows if r.wrong]
    wrong += [f"{r.label}: {r.error}" for r in rows if r.error and r.contestant == "lolkernels"]
    found = report.case(case.title, rows, case.floors, name=name, goals=case.goals)
    return {"case": found, "wrong": wrong}


def limit_of(op: str, hidden: int, frozen: bool) -> float:
    """Of the bare products' time. A sweep weighs more where D is small."""
    if op == "score":
        return 1.10
    if frozen:
        return 1.12
    return 1.08 if hidden >= 3584 else 1.15 if hidden >= 2048 else 1.30


def row_kernels(
    vocab: int, size: int, backends: list[str], device: Device, rounds: int, until: float
) -> dict[str, Any]:
    build: parts.Build = [(Row("copy", "copy", "copy"), partial(rowwise.copy, size, device.device))]
    goals = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rows = rowwise.make_rows(
            max(8, size // (vocab * dtype.itemsize)), vocab, dtype, device.device
        )
        narrow = name == "fp32"
        for b in library.distinct(backends, "row_stats"):
            made = {
                f"row_stats {name}, {b}": partial(rowwise.row_stats, rows, b),
                f"exps_ {name} to bf16, {b}": partial(rowwise.exps, rows, b),
                f"dlogits_ {name}, {b}": partial(rowwise.dlogits, rows, b, narrow=narrow),
                f"logprob {name}, {b}": partial(rowwise.logprob, rows, b),
            }
            for label, make in made.items():
                build.append((Row(label, "lolkernels", label.split()[0]), make))
                share = 0.85 if label.startswith("logprob") else 0.90
                text = f"{label} >= {share:.0%} of the copy's bandwidth (V={vocab})"
                goals.append(Goal(text, label, share, "copy", "bandwidth"))
    found = measure.measure(build, device, rounds=rounds, until=until)
    wrong = [f"{r.label}: {'; '.join(r.wrong) or r.error}" for r in found if r.wrong or r.error]
    title = f"Row kernels, V={vocab}, {size / 2**20:g} MiB of logits"
    return {"case": report.case(title, found, ["copy"], goals=goals), "wrong": wrong}


def train(
    model: str,
    mode: str,
    sequences: int,
    length: int,
    memory: tuple[int, ...],
    device: Device,
    rounds: int,
    until: float,
) -> dict[str, Any]:
    module = importlib.import_module("train")  # it needs transformers
    measure.forget(device)
    dtype = "bf16" if device.kind == "cuda" else "fp32"
    case = module.Case(model, mode, sequences, length, dtype, device.kind)
    found = module.measure_case(case, list(memory) or None, min(rounds, 5), until)
    if isinstance(device, measure.Cuda):
        device.fill()
    return {"case": found, "wrong": found["wrong"]}


# --- the worker -----------------------------------------------------------------------------------


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
        patience = 1 if on_card else 4
        journal.write("begin", job=job, task=task.name, limit=patience * task.limit)
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
