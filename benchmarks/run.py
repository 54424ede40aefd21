"""Benchmarks of the kernels: time, floor, peers and peak memory, after a correctness gate.

python benchmarks/run.py --op linear_loss --shape gpt2 --dtype fp32
python benchmarks/run.py --op score --shape 1024,768,50257,128 --memory
python benchmarks/run.py --suite cpu --out benchmarks/results/cpu
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import measure
import peers
import report
import torch
from measure import Entry, Row
from shapes import DTYPES, SHAPES, Shape, parse_shape

TITLES = {
    "linear_loss": "linear_loss (A-LoL), forward + backward",
    "linear_logprob": "linear_logprob, forward + backward",
    "score": "linear_logprob without gradient",
    "logprob": "logprob on given logits, forward + backward",
}
SWEEP = f"{TITLES['linear_loss']}, time and memory over T"


@dataclass
class Goal:
    """A ratio of two rows of a case that must not exceed `limit`.

    time: medians. rate: medians per row of hidden states. memory: extra bytes. formula: distance
    of one row's extra bytes from the documented formula, as a share of the formula.
    """

    text: str
    over: str
    under: str
    limit: float
    of: str = "time"


@dataclass
class Case:
    title: str
    entries: list[Entry]
    floor: str = "gemms"
    goals: list[Goal] = field(default_factory=list)
    rounds: int | None = None


def single(
    op: str,
    shape: Shape,
    *,
    frozen_head: bool = False,
    memory: bool = False,
    against: list[str] | None = None,
) -> Case:
    """One op at one shape: lolkernels beside its floor, eager and torch's own op."""
    if against is None:
        against = ["copy", "eager"] if op == "logprob" else ["gemms", "eager", "torch"]
    names = ["lolkernels", *against]
    measured = ("lolkernels", "eager", "torch") if memory else ()
    entries = [Entry(n, n, op, shape, frozen_head, memory=n in measured) for n in names]
    title = f"{TITLES[op]}{', frozen head' if frozen_head else ''}, {shape}"
    return Case(title, entries, floor="copy" if op == "logprob" else "gemms")


def cpu_suite(shape: Shape, longest: int) -> Iterator[Case]:
    """The CPU rows: each op against its floor, bf16, prompt rows, and the sweep over T."""
    case = single("linear_loss", shape, memory=True)
    case.goals = [
        Goal("linear_loss against three bare GEMMs", "lolkernels", "gemms", 1.05),
        Goal("linear_loss against eager", "lolkernels", "eager", 1.0),
        Goal("its memory against eager's", "lolkernels", "eager", 0.12, "memory"),
        Goal("its memory, distance from the formula", "lolkernels", "lolkernels", 0.05, "formula"),
    ]
    yield case
    case = single("linear_loss", shape, frozen_head=True, memory=True)
    case.goals = [
        Goal("frozen head against two bare GEMMs", "lolkernels", "gemms", 1.05),
        Goal("its memory against eager's", "lolkernels", "eager", 0.12, "memory"),
        Goal("its memory, distance from the formula", "lolkernels", "lolkernels", 0.05, "formula"),
    ]
    yield case
    case = single("score", shape, memory=True)
    case.goals = [
        Goal("scoring against one bare GEMM", "lolkernels", "gemms", 1.10),
        Goal("its memory, distance from the formula", "lolkernels", "lolkernels", 0.05, "formula"),
    ]
    yield case
    case = single("linear_logprob", shape, memory=True)
    case.goals = [
        Goal("linear_logprob against four bare GEMMs", "lolkernels", "gemms", 1.10),
        Goal("its memory, distance from the formula", "lolkernels", "lolkernels", 0.05, "formula"),
    ]
    yield case
    yield bf16_case(shape)
    yield prompt_case(shape)
    yield sweep_case(shape, longest)
    yield single("logprob", shape)


def bf16_case(shape: Shape) -> Case:
    half = replace(shape, dtype="bf16")
    op = "linear_loss"
    return Case(
        f"{TITLES[op]}, bf16 tensors beside fp32, {shape}",
        [
            Entry("lolkernels bf16", "lolkernels", op, half, memory=True),
            Entry("lolkernels fp32", "lolkernels", op, shape),
            Entry("gemms", "gemms", op, shape),
            Entry("eager bf16", "eager", op, half, memory=True),
            Entry("eager fp32", "eager", op, shape),
        ],
        goals=[
            Goal("bf16 against fp32 tensors", "lolkernels bf16", "lolkernels fp32", 1.15),
            Goal(
                "bf16 memory, distance from the formula",
                "lolkernels bf16",
                "lolkernels bf16",
                0.05,
                "formula",
            ),
        ],
    )


def prompt_case(shape: Shape) -> Case:
    op = "linear_loss"
    return Case(
        f"{TITLES[op]}, half of each sequence is prompt, {shape}",
        [
            Entry("all rows", "lolkernels", op, shape),
            Entry("half prompt", "lolkernels", op, replace(shape, prompt_share=0.5)),
        ],
        floor="all rows",
        goals=[Goal("half the rows prompt, against all", "half prompt", "all rows", 0.55)],
    )


def sweep_case(shape: Shape, longest: int) -> Case:
    """Time and memory over T; the peers stop where they take too long or too much."""
    op, sizes, tokens = "linear_loss", [], 256
    while tokens <= longest:
        sizes.append(tokens)
        tokens *= 2
    reach = {"lolkernels": longest, "eager": 4096, "torch": 1024}
    entries = [
        Entry(f"{name} T={t}", name, op, replace(shape, tokens=t), memory=True)
        for name, limit in reach.items()
        for t in sizes
        if t <= limit
    ]
    # From 1024 rows on the chunks are full.
    base, last = (f"lolkernels T={t}" for t in (min(1024, sizes[-1]), sizes[-1]))
    return Case(
        SWEEP,
        entries,
        floor=base,
        goals=[
            Goal(f"time per row, {last} against {base}", last, base, 1.05, "rate"),
            Goal(f"extra memory, {last} against {base}", last, base, 1.05, "memory"),
        ],
        rounds=3,
    )


def judge(goal: Goal, rows: dict[str, Row]) -> dict[str, Any]:
    """Puts the measured value beside the goal's limit."""
    over, under = rows[goal.over], rows[goal.under]
    if goal.of == "time":
        measured = over.median_ms / under.median_ms
    elif goal.of == "rate":
        measured = (over.median_ms / over.tokens) / (under.median_ms / under.tokens)
    elif goal.of == "memory":
        measured = (over.extra_bytes or 0) / max(1, under.extra_bytes or 0)
    else:
        measured = abs((over.extra_bytes or 0) / max(1, over.formula_bytes or 0) - 1)
    return {**asdict(goal), "measured": measured, "met": measured <= goal.limit}


def run_case(case: Case, rounds: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rows = measure.check_and_time(case.entries, case.rounds or rounds)
    for entry, row in zip(case.entries, rows, strict=True):
        if entry.memory:
            row.extra_bytes = measure.peak_memory(entry)
            row.formula_bytes = measure.documented_bytes(entry)
    shown = {"title": case.title, "floor": case.floor, "rows": [asdict(row) for row in rows]}
    print(report.table(shown), end="\n\n", flush=True)
    by_label = {row.label: row for row in rows}
    return shown, [judge(goal, by_label) for goal in case.goals]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=peers.OPS, default="linear_loss")
    parser.add_argument(
        "--shape", default="gpt2", help=f"T,D,V,seq_len or one of {', '.join(SHAPES)}"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--frozen-head", action="store_true", help="no gradient for the weight")
    parser.add_argument("--prompt-share", type=float, default=0.0, help="rows without loss, 0 to 1")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too")
    parser.add_argument(
        "--against",
        nargs="*",
        choices=["gemms", "eager", "torch", "reference"],
        help="what to run beside lolkernels (default: gemms eager torch)",
    )
    parser.add_argument("--suite", choices=["cpu"], help="every CPU row instead of one op")
    parser.add_argument("--longest", type=int, default=16384, help="last T of the suite's sweep")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds a case")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    arguments = parser.parse_args(argv)
    try:
        shape = parse_shape(arguments.shape)
        arguments.shape = replace(shape, dtype=arguments.dtype, prompt_share=arguments.prompt_share)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.suite:
        cases = list(cpu_suite(arguments.shape, arguments.longest))
    else:
        cases = [
            single(
                arguments.op,
                arguments.shape,
                frozen_head=arguments.frozen_head,
                memory=arguments.memory,
                against=arguments.against,
            )
        ]
    record: dict[str, Any] = {
        "environment": report.environment(),
        "rounds": arguments.rounds,
        "cases": [],
        "goals": [],
    }
    for case in cases:
        shown, goals = run_case(case, arguments.rounds)
        record["cases"].append(shown)
        record["goals"] += goals
    if record["goals"]:
        print(report.goals_table(record["goals"]))
    if arguments.out:
        written = report.save(record, arguments.out)
        sweep = next((case for case in record["cases"] if case["title"] == SWEEP), None)
        if sweep is not None:
            written.append(report.figure(sweep, record["environment"], arguments.out))
        for path in written:
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
