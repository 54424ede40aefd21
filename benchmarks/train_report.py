"""The record of benchmarks/train.py: rows, goals, JSON, and the Markdown made from it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import report
from train_cases import LOSSES, Case

MIB = 2**20
OUT_OF_MEMORY = "out of memory"
LARGEST = ("eager", "fused")  # whose largest batch is looked for


def new_case(case: Case) -> dict[str, Any]:
    """A case with nothing measured."""
    rows = [
        {
            "label": name,
            "contestant": name,
            "op": "train",
            "shape": str(case.batch),
            "tokens": case.batch.tokens,
            "frozen_head": case.mode == "lora",
            "times_ms": [],
            "median_ms": None,
            "tokens_per_s": None,
            "loss_error": None,
            "gradient_error": None,
            "sum_error_nat": None,
            "extra_bytes": None,  # of a step, beside weights and states
            "formula_bytes": None,
            "peak_bytes": None,  # with them
            "formula_peak_bytes": None,
            "largest_tokens": None,
            "formula_largest_tokens": None,
            "error": None,
        }
        for name in LOSSES
    ]
    return {"title": case.title, "floor": "eager", "rows": rows}


def goals(record: dict[str, Any]) -> list[dict[str, Any]]:
    found = []

    def add(text: str, measured: float, limit: float) -> None:
        goal = {"text": text, "limit": limit, "measured": measured, "met": measured <= limit}
        found.append(goal)

    for case in record["cases"]:
        rows = {row["label"]: row for row in case["rows"]}
        name = case["title"].rpartition(", ")[0]
        times = [rows[n]["median_ms"] for n in ("fused", "eager")]
        if all(times):
            add(f"{name}: step, fused against eager", times[0] / times[1], 1.0)
        for row in case["rows"]:
            if row["extra_bytes"]:
                off = abs(row["extra_bytes"] / row["formula_bytes"] - 1)
                add(f"{name}: {row['label']}, memory of a step off the formula by", off, 0.1)
    return found


def _number(value: float | None, form: str = ",.0f", scale: float = 1.0) -> str:
    return "" if value is None else format(value / scale, form)


def table(case: dict[str, Any]) -> str:
    lines = [
        f"### {case['title']}",
        "",
        "| | step ms (quartiles) | tokens/s | step memory MiB: measured | formula | ratio "
        "| peak MiB: measured | formula | largest batch, tokens: measured | formula "
        "| gradient off |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in case["rows"]:
        spread, ratio = "", ""
        if len(row["times_ms"]) > 1:
            low, _, high = statistics.quantiles(row["times_ms"], n=4, method="inclusive")
            spread = f" ({low:,.1f}–{high:,.1f})"
        if row["extra_bytes"] is not None:
            ratio = f"{row['extra_bytes'] / row['formula_bytes']:.3f}"
        cells = [
            row["label"],
            row["error"] or _number(row["median_ms"], ",.1f") + spread,
            _number(row["tokens_per_s"]),
            _number(row["extra_bytes"], ",.1f", MIB),
            _number(row["formula_bytes"], ",.1f", MIB),
            ratio,
            _number(row["peak_bytes"], ",.1f", MIB),
            _number(row["formula_peak_bytes"], ",.1f", MIB),
            _number(row["largest_tokens"]),
            _number(row["formula_largest_tokens"]),
            _number(row["gradient_error"], ".1e"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(record: dict[str, Any]) -> str:
    where, memory = record["environment"], record["settings"]["memory"]
    into = (
        "" if memory is None else f" The largest batch is the one that fits into {memory:,} bytes."
    )
    head = [
        f"# Training steps: {where['device']}",
        "",
        f"{where['cores']} cores, {where['threads']} threads, {where['memory_gib']} GiB; Python "
        f"{where['python']}, torch {where['torch']}, transformers {where['transformers']}, "
        f"lolkernels {where['lolkernels']}, commit {where['commit']}.",
        f"Medians of up to {record['rounds']} interleaved rounds. Step memory is the peak above "
        "weights and optimiser states, in a process of its own; the formula is that of "
        f"`lolrl plan`.{into} "
        "Gradient off: relative to the same loss from fp32 logits.",
        "",
        f"    {where['command']}",
    ]
    parts = ["\n".join(head), *(table(case) for case in record["cases"])]
    if record["goals"]:
        parts.append(report.goals_table(record["goals"]))
    if record["left"]:
        parts.append("Not measured yet: " + "; ".join(record["left"]) + ".")
    return "\n\n".join(parts) + "\n"


def unfinished(record: dict[str, Any]) -> list[str]:
    """Titles of the cases that lack a measurement."""
    return [
        case["title"]
        for case in record["cases"]
        if any(
            row["error"] is None and (row["extra_bytes"] is None or lacks_largest(record, row))
            for row in case["rows"]
        )
    ]


def lacks_largest(record: dict[str, Any], row: dict[str, Any]) -> bool:
    """Who has no memory for the batch of the case has a largest one still."""
    return (
        bool(record["settings"]["memory"])
        and row["label"] in LARGEST
        and row["largest_tokens"] is None
        and row["error"] in (None, OUT_OF_MEMORY)
    )


def save(record: dict[str, Any], out: Path) -> None:
    record["goals"] = goals(record)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text(page(record))
