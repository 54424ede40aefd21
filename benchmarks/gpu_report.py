"""Where a GPU result was measured, its goals, and the Markdown made from the JSON."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import report
import torch

import lolkernels as lk

MIB = 2**20
# What decides a measured number: another run may go on with a record only where these agree.
SAME = ("device", "torch", "triton", "lolkernels", "commit", "source")


def slug(device: str) -> str:
    """A file name for a device: "NVIDIA H200" -> "h200"."""
    words = re.sub("nvidia|geforce|tesla", "", device.lower())
    return re.sub("[^a-z0-9]+", "-", words).strip("-") or "device"


def clocks(device: torch.device) -> dict[str, str]:
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return {}
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    done = subprocess.run(
        [
            "nvidia-smi",
            f"--id={device.index or 0}",
            f"--query-gpu={','.join(fields)}",
            "--format=csv,noheader",
        ],
        text=True,
        capture_output=True,
        timeout=60,
    )
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def _source() -> str:
    """A hash of the code that is measured and of the code that measures."""
    digest = hashlib.sha256()
    folders = [report.ROOT / name for name in ("lolkernels", "csrc", "benchmarks")]
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
            digest.update(path.relative_to(report.ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def header(device: torch.device, command: str, commit: str | None = None) -> dict[str, Any]:
    """Device, versions, commit and command. ``commit`` names it where there is no git."""
    try:
        triton = __import__("triton").__version__
    except ImportError:
        triton = None
    found: dict[str, Any] = {"device": platform.processor() or "cpu"}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found = {
            "device": about.name,
            "capability": f"{about.major}.{about.minor}",
            "multiprocessors": about.multi_processor_count,
            "memory_gib": round(about.total_memory / 2**30, 1),
            "l2_mib": round(about.L2_cache_size / MIB, 1),
            "cuda": torch.version.cuda,
        }
    return {
        **found,
        **clocks(device),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "lolkernels": lk.__version__,
        "backends": {name: why or "available" for name, why in lk.available_backends().items()},
        "commit": commit or report.git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(report.git("status", "--porcelain", "--untracked-files=no")),
        "source": _source(),
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


# --- goals ----------------------------------------------------------------------------------------


def judge(goal: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The goal with what was measured; a row that is missing, wrong or untimed misses it.

    time: median ratio to the floor, at most the limit. rate: share of the copy's bandwidth, at
    least the limit. memory: distance of the extra bytes from the formula, at most the limit.
    """
    row = next((r for r in rows if r["label"] == goal["row"]), {})
    measured, why = None, row.get("error") or "; ".join(row.get("wrong", [])) or "not measured"
    if goal["of"] == "memory":
        if row.get("extra_bytes") is not None and row.get("formula_bytes"):
            measured = abs(row["extra_bytes"] / row["formula_bytes"] - 1)
        elif "times_ms" in row:
            why = "no formula or no measurement"
    elif goal["floor"] in row.get("against", {}):
        measured = row["against"][goal["floor"]]["median"]
    met = measured is not None and (
        measured >= goal["limit"] if goal["of"] == "rate" else measured <= goal["limit"]
    )
    return {**goal, "measured": measured, "met": met, "why": None if measured is not None else why}


def goals_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        judge(goal, task["rows"])
        for task in record["tasks"].values()
        for goal in task.get("goals", [])
    ]


# --- Markdown -------------------------------------------------------------------------------------


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / MIB:.1f}"


def _line(row: dict[str, Any], floors: list[str]) -> str:
    cells = [row["label"]]
    if "times_ms" not in row:
        reason = "WRONG: " + "; ".join(row["wrong"]) if "wrong" in row else row["error"]
        return f"| {row['label']} | {reason} |" + " |" * (len(floors) + 6)
    ms = row["ms"]
    cells += [f"{ms['median']:.3f}", f"{ms['min']:.3f} / {ms['q1']:.3f} / {ms['q3']:.3f}"]
    for name in floors:
        ratio = row["against"].get(name)
        cells.append(
            f"{ratio['median']:.3f} ({ratio['min']:.3f}-{ratio['max']:.3f})" if ratio else ""
        )
    cells.append(f"{row['rate']:.0f} {row['unit']}" if "rate" in row else "")
    cells += [_mib(row.get("extra_bytes")), _mib(row.get("formula_bytes"))]
    errors = [] if row["sum_nat"] is None else [f"sum {row['sum_nat']:.1e} nat"]
    errors += [f"{name} {value:.1e}" for name, value in row["gradients"].items()]
    return "| " + " | ".join([*cells, ", ".join(errors), row["work"]]) + " |"


def table(task: dict[str, Any]) -> str:
    lines = [f"### {task['title']}", ""]
    if "error" in task:
        return "\n".join([*lines, f"Not measured: {task['error']}"])
    if "facts" in task:
        lines += ["| | measured |", "|---|---:|"]
        lines += [f"| {f['label']} | {f['value']:.4g} {f['unit']} |" for f in task["facts"]]
        return "\n".join(lines)
    floors = task["floors"]
    heads = ["", "median ms", "min / q1 / q3", *(f"x {name} (range)" for name in floors)]
    heads += ["rate", "extra MiB", "formula MiB", "error against float64", "counted"]
    lines += ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 3) + "---|---|"]
    return "\n".join(lines + [_line(row, floors) for row in task["rows"]])


def goals_table(goals: list[dict[str, Any]]) -> str:
    lines = ["## Goals", "", "| goal | measured | limit | |", "|---|---:|---:|---|"]
    for goal in goals:
        sign = ">=" if goal["of"] == "rate" else "<="
        measured = "–" if goal["measured"] is None else f"{goal['measured']:.3f}"
        verdict = "met" if goal["met"] else "MISSED" + (f" ({goal['why']})" if goal["why"] else "")
        lines.append(f"| {goal['text']} | {measured} | {sign} {goal['limit']:g} | {verdict} |")
    return "\n".join(lines)


def faulty(row: dict[str, Any]) -> bool:
    """Wrong, or a task that failed. A peer that cannot run here is no fault."""
    return "wrong" in row or ("error" in row and "rows" in row)


def markdown(record: dict[str, Any]) -> str:
    where = record["header"]
    facts = [
        f"{key.replace('_', ' ')} {where[key]}"
        for key in (
            *("capability", "multiprocessors", "memory_gib", "l2_mib", "driver_version"),
            *("clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "cuda"),
        )
        if where.get(key)
    ]
    commit = where["commit"] + (" with local changes" if where["dirty"] else "")
    versions = [f"{name} {where[name]}" for name in ("python", "torch", "triton", "lolkernels")]
    head = [
        f"# {where['device']}",
        "",
        *([", ".join(facts) + "."] if facts else []),
        f"{', '.join(versions)}; commit {commit}, source {where['source']}; {where['date']}.",
        "",
        *(f"    {command}" for command in [where["command"], *where.get("then", [])]),
        "",
        "A row has passed its check against float64 first; one that has not says WRONG and has no",
        "time. Times are device time between events, the L2 overwritten before each; a round runs",
        "a, b, b, a, and a ratio is the median of the rounds' own (with their range). `x copy` is",
        "the share of the copy's bandwidth in the same round. Extra memory: the peak above inputs",
        "and returned gradients.",
    ]
    parts = ["\n".join(head), *(table(task) for task in record["tasks"].values())]
    for name in record.get("left", []):
        parts.append(f"### {name}\n\nNot measured: no time was left.")
    return "\n\n".join([*parts, goals_table(record["goals"])]) + "\n"


# --- files ----------------------------------------------------------------------------------------


def files(out: Path) -> tuple[Path, Path]:
    return out.with_name(out.name + ".json"), out.with_name(out.name + ".md")


def _replace(path: Path, text: str) -> None:
    """Whole or not at all: a run that is killed leaves the last complete record."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def save(record: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    record["goals"] = goals_of(record)
    data, page = files(out)
    _replace(data, json.dumps(record, indent=1) + "\n")
    _replace(page, markdown(json.loads(data.read_text())))


def resume(out: Path, now: dict[str, Any], *, same_run: bool) -> dict[str, Any]:
    """The record to go on with: what is there, where code and device are the same.

    Tasks that failed are tried again, though not in a later process of the same run.
    """
    data, _ = files(out)
    if data.exists():
        record: dict[str, Any] = json.loads(data.read_text())
        before = record.get("header", {})
        if same_run or all(before.get(key) == now[key] for key in SAME):
            if not same_run:
                record["tasks"] = {k: t for k, t in record["tasks"].items() if "error" not in t}
            return record
        print(f"{data}: another commit, device or version; starting anew", file=sys.stderr)
    return {"header": now, "tasks": {}, "goals": []}
