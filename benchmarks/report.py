"""Where a result was measured, its JSON, and the Markdown made from the JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import lolkernels as lk

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


def git(*arguments: str) -> str:
    """What git prints; nothing where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, text=True, capture_output=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def environment() -> dict[str, Any]:
    """Device, versions, commit and command of this run."""
    cpu = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        cpu.setdefault(key.strip(), value.strip())
    flags = set(cpu.get("flags", "").split())
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {
        "device": cpu.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector": [
            name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags
        ],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lolkernels": lk.__version__,
        "backends": [name for name, why in lk.available_backends().items() if why is None],
        "commit": git("rev-parse", "--short", "HEAD") + (" with local changes" if changed else ""),
        "command": " ".join(["python", "benchmarks/run.py", *sys.argv[1:]]),
    }


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / MIB:.1f}"


def table(case: dict[str, Any]) -> str:
    """One case as a Markdown table; `x floor` is the ratio of medians to the bare GEMMs."""
    floor = next((r["median_ms"] for r in case["rows"] if r["label"] == case["floor"]), None)
    lines = [
        f"### {case['title']}",
        "",
        "| | shape | median ms | fastest ms | x floor | extra MiB | formula MiB | sum error nat |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in case["rows"]:
        ratio = f"{row['median_ms'] / floor:.3f}" if floor else ""
        error = "" if row["sum_error_nat"] is None else f"{row['sum_error_nat']:.1e}"
        lines.append(
            f"| {row['label']} | {row['shape']} | {row['median_ms']:.1f} "
            f"| {min(row['times_ms']):.1f} | {ratio} | {_mib(row['extra_bytes'])} "
            f"| {_mib(row['formula_bytes'])} | {error} |"
        )
    return "\n".join(lines)


def goals_table(goals: list[dict[str, Any]]) -> str:
    lines = ["### Goals", "", "| goal | limit | measured | met |", "|---|---:|---:|---|"]
    lines += [
        f"| {goal['text']} | {goal['limit']:g} | {goal['measured']:.3f} "
        f"| {'yes' if goal['met'] else 'no'} |"
        for goal in goals
    ]
    return "\n".join(lines)


def markdown(record: dict[str, Any]) -> str:
    where = record["environment"]
    head = [
        f"# {where['device']}, {where['cores']} cores",
        "",
        f"{where['threads']} threads, {', '.join(where['vector'])}, {where['memory_gib']} GiB; "
        f"Python {where['python']}, torch {where['torch']}, lolkernels {where['lolkernels']} "
        f"({', '.join(where['backends'])}), commit {where['commit']}.",
        f"Medians of {record['rounds']} interleaved rounds. Extra memory is the peak above inputs "
        "and returned gradients, measured in a process of its own.",
        "",
        f"    {where['command']}",
    ]
    parts = ["\n".join(head), *(table(case) for case in record["cases"])]
    if record["goals"]:
        parts.append(goals_table(record["goals"]))
    return "\n\n".join(parts) + "\n"


def save(record: dict[str, Any], out: Path) -> list[Path]:
    """Writes `out`.json, and `out`.md from it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    data, page = out.with_suffix(".json"), out.with_suffix(".md")
    data.write_text(json.dumps(record, indent=1) + "\n")
    page.write_text(markdown(json.loads(data.read_text())))
    return [data, page]


def figure(sweep: dict[str, Any], where: dict[str, Any], out: Path) -> Path:
    """Draws peak extra memory and time against rows, one line a contestant, to `out`.png."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(9, 3.6), layout="constrained")
    memory, speed = canvas.subplots(1, 2)
    for name in dict.fromkeys(row["contestant"] for row in sweep["rows"]):
        rows = [row for row in sweep["rows"] if row["contestant"] == name]
        tokens = [row["tokens"] for row in rows]
        shown = {"marker": "o", "label": "torch linear_cross_entropy" if name == "torch" else name}
        memory.plot(tokens, [row["extra_bytes"] / MIB for row in rows], **shown)
        speed.plot(tokens, [row["median_ms"] / 1e3 for row in rows], **shown)
    for axes, label in (
        (memory, "extra memory, MiB"),
        (speed, "forward + backward, s"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="rows (tokens with loss)", ylabel=label)
        ticks = sorted({row["tokens"] for row in sweep["rows"]})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    memory.legend()
    shape = sweep["rows"][0]["shape"].split(maxsplit=1)[1]
    canvas.suptitle(f"linear_loss, {shape}; {where['device']}, {where['threads']} threads")
    path = out.with_suffix(".png")
    canvas.savefig(path, dpi=120)
    return path
