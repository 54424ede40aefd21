"""Where a result was measured, its goals, its JSON, and the Markdown made from the JSON.

    python benchmarks/report.py FOLDER      what benchmarks/card.py found: see card_page.py

The schema of every record, CPU or GPU:

    environment  device, versions, commit, source (a hash of the code), clocks, command, date
    rounds       interleaved rounds that were asked for
    cases        [{name, title, floors, floor (the first of them), rows, goals,
                   facts or error where there are no rows, fits, seconds}]
      rows       measure.Row as a dict; wrong, skipped or error where there are no times; missed:
                 bounds, and by how much
      fits       [{contestant, memory (bytes), measured, formula: tokens of the largest batch}]
    goals        [{text, limit, measured, met, and of a `Goal` here: row, against, of, why}]
    left         titles of cases that there was no time for
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import peers
import torch
from measure import Cpu, Cuda, Device, Row

import lolkernels as lk

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
# What decides a measured number: another run goes on with a journal only where these agree.
SAME = ("device", "torch", "triton", "source")


def git(*arguments: str) -> str:
    """What git prints; nothing where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, text=True, capture_output=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def slug(device: str) -> str:
    """A file name for a device: "NVIDIA H200" -> "h200"."""
    words = re.sub("nvidia|geforce|tesla", "", device.lower())
    return re.sub("[^a-z0-9]+", "-", words).strip("-") or "device"


def clocks(device: torch.device) -> dict[str, str]:
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return {}
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    query = [f"--id={device.index or 0}", f"--query-gpu={','.join(fields)}"]
    query.append("--format=csv,noheader")
    done = subprocess.run(["nvidia-smi", *query], text=True, capture_output=True, timeout=60)
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def source() -> str:
    """A hash of the code that is measured."""
    digest = hashlib.sha256()
    folders = [ROOT / name for name in ("lolkernels", "csrc")]
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Of the peers' packages, and of the training steps' models, that are installed."""
    found = {}
    packages = {peer.package for peer in peers.PEERS.values()} | {"transformers"}
    for package in sorted(packages - {"torch"}):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment(
    device: torch.device | None = None, command: str | None = None, commit: str | None = None
) -> dict[str, Any]:
    """Device, versions, commit and command of this run. ``commit`` names it without git."""
    cpu: dict[str, str] = {}
    if (info := Path("/proc/cpuinfo")).exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            cpu.setdefault(key.strip(), value.strip())
    flags = set(cpu.get("flags", "").split())
    vector = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    found: dict[str, Any] = {
        "device": cpu.get("model name") or platform.processor() or "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector": [name for name in vector if name in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if device is not None and device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found = {
            "device": about.name,
            "capability": f"{about.major}.{about.minor}",
            "multiprocessors": about.multi_processor_count,
            "memory_gib": round(about.total_memory / 2**30, 1),
            "l2_mib": round(about.L2_cache_size / MIB, 1),
            "cuda": torch.version.cuda,
            **clocks(device),
            "cores": os.cpu_count(),
        }
    try:
        triton = importlib.import_module("triton").__version__  # its package has several names
    except ImportError:
        triton = None
    return {
        **found,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "lolkernels": lk.__version__,
        "backends": [name for name, why in lk.available_backends().items() if why is None],
        "peers": versions(),
        "commit": commit or git("rev-parse", "--short", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "source": source(),
        "command": command or shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


@dataclass(frozen=True)
class Goal:
    """What a row must reach against the row ``against``; see `measured` for each kind of ``of``."""

    text: str
    row: str
    limit: float
    against: str | None = None
    of: str = "time"


def spread(values: list[float]) -> dict[str, float]:
    """Least, quartiles and greatest."""
    q1, median, q3 = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"min": min(values), "q1": q1, "median": median, "q3": q3, "max": max(values)}


def ratios(row: dict[str, Any], floor: dict[str, Any]) -> dict[str, float] | None:
    """The spread of the rounds' own ratios of times; of bandwidths where both counted bytes."""
    pairs = list(zip(row["times_ms"], floor["times_ms"], strict=False))
    if not pairs:
        return None
    counted = row["bytes"] and floor["bytes"]
    share = row["bytes"] / floor["bytes"] if counted else 1.0
    return spread([share * b / a if counted else a / b for a, b in pairs])


def measured(goal: dict[str, Any], row: dict[str, Any], other: dict[str, Any]) -> float | None:
    """time: median of the rounds' ratios, at most the limit; bandwidth: the same, at least it.
    memory: ratio of extra bytes. formula: distance of the extra bytes from the documented ones, as
    a share of these.
    """
    if goal["of"] in ("time", "bandwidth"):
        found = ratios(row, other)
        return found["median"] if found else None
    if row["extra_bytes"] is None:
        return None
    if goal["of"] == "memory":
        return row["extra_bytes"] / max(1, other["extra_bytes"]) if other["extra_bytes"] else None
    return abs(row["extra_bytes"] / row["formula_bytes"] - 1) if row["formula_bytes"] else None


def judge(goal: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The goal with what was measured; a row that is missing, wrong or untimed misses it.

    Against a peer that cannot run here there is nothing to judge: met is None.
    """
    by_label = {row["label"]: row for row in rows}
    row, other = (by_label.get(name) for name in (goal["row"], goal["against"] or goal["row"]))
    if row is None or other is None:
        return {**goal, "measured": None, "met": False, "why": "not measured"}
    value = measured(goal, row, other)
    if value is None:
        why = reason_of(row) or reason_of(other) or "not measured"
        met = None if other["skipped"] and not reason_of(row) else False
        return {**goal, "measured": None, "met": met, "why": why}
    met = value >= goal["limit"] if goal["of"] == "bandwidth" else value <= goal["limit"]
    return {**goal, "measured": value, "met": met, "why": None}


BLANK = asdict(Row(""))


def grid(heads: list[str], rows: Iterable[list[Any]], words: int = 1, last: int = 0) -> str:
    """A table of Markdown, whose columns hold numbers but for the first ``words`` and the last."""
    numbers = len(heads) - words - last
    lines = [["---"] * words + ["---:"] * numbers + ["---"] * last, *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in [heads, *lines])


def rows_of(case: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**BLANK, **row} for row in case["rows"]]


def reason_of(row: dict[str, Any]) -> str:
    """Why a row has no time; empty where it has one."""
    if row["wrong"]:
        return "WRONG: " + "; ".join(row["wrong"])
    if row["error"]:
        return "failed: " + row["error"]
    return "not run: " + row["skipped"] if row["skipped"] else ""


def mib(value: int | None) -> str:
    return "" if value is None else f"{value / MIB:.1f}"


def _ms(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3f}"


def _counted(row: dict[str, Any]) -> list[str]:
    """[rate, count]: "1.2 TFLOP/s", "3 x 2 N V D = 237.1 GFLOP", or the same in bytes."""
    seconds = row["median_ms"] / 1e3
    if row["flops"]:
        size, unit = (1e12, "TFLOP/s") if row["flops"] / seconds >= 1e12 else (1e9, "GFLOP/s")
        count = f"{row['work']} = {row['flops'] / 1e9:.4g} GFLOP"
        return [f"{row['flops'] / seconds / size:.3g} {unit}", count]
    if row["bytes"]:
        count = f"{row['work']} = {row['bytes'] / 1e9:.3g} GB"
        return [f"{row['bytes'] / seconds / 1e9:.3g} GB/s", count]
    if row["op"] == "train":
        return [f"{row['tokens'] / seconds:,.0f} tokens/s", ""]
    return ["", ""]


def _cells(row: dict[str, Any], floors: list[dict[str, Any] | None], shapes: bool) -> list[str]:
    cells = [f"{row['label']} {row['version']}".strip(), *([row["shape"]] if shapes else [])]
    if not row["times_ms"]:
        return [*cells, reason_of(row), *[""] * (6 + len(floors))]
    seen = spread(row["times_ms"])
    cells += [_ms(seen["median"]), f"{_ms(seen['q1'])} - {_ms(seen['q3'])}"]
    for floor in floors:
        r = ratios(row, floor) if floor else None
        cells.append(f"{r['median']:.3f} ({r['q1']:.3f}-{r['q3']:.3f})" if r else "")
    cells += [*_counted(row), mib(row["extra_bytes"]), mib(row["formula_bytes"])]
    errors = [] if row["sum_error_nat"] is None else [f"sum {row['sum_error_nat']:.1e} nat"]
    errors += [f"{name} {value:.1e}" for name, value in row["gradient_errors"].items()]
    return [*cells, ", ".join([*errors, *(f"MISSED: {text}" for text in row["missed"])])]


def _fits(found: list[dict[str, Any]]) -> str:
    """What fits into a memory: tokens of the largest batch, measured and by formula."""
    known = {(one["contestant"], one["memory"]): one for one in found}
    names, sizes = (list(dict.fromkeys(pair[i] for pair in known)) for i in (0, 1))
    heads = [f"{n / MIB:,.4g} MiB: {what}" for n in sizes for what in ("measured", "formula")]

    def cells(name: str) -> list[str]:
        of = [known.get((name, size), {}).get(w) for size in sizes for w in ("measured", "formula")]
        return ["" if tokens is None else f"{tokens:,}" for tokens in of]

    return grid(["largest batch, tokens", *heads], ([name, *cells(name)] for name in names))


def table(case: dict[str, Any]) -> str:
    parts = [f"### {case['title']}"]
    if case.get("error"):
        parts.append(f"Not measured: {case['error']}")
    if case.get("facts"):
        facts = ([f["label"], f"{f['value']:.4g} {f['unit']}"] for f in case["facts"])
        parts.append(grid(["", "value"], facts))
    if rows := rows_of(case):
        shapes = len({row["shape"] for row in rows}) > 1
        by_label = {row["label"]: row for row in rows}
        floors = case.get("floors") or [case["floor"]]
        heads = ["", *(["shape"] if shapes else []), "median ms", "quartiles ms"]
        heads += [f"x {name} (quartiles)" for name in floors]
        heads += ["rate", "counted", "extra MiB", "formula MiB", "error against float64"]
        found = [by_label.get(name) for name in floors]
        parts.append(grid(heads, [_cells(row, found, shapes) for row in rows], last=1))
    if case.get("fits"):
        parts.append(_fits(case["fits"]))
    return "\n\n".join(parts)


def goals_table(goals: list[dict[str, Any]]) -> str:
    rows = []
    for goal in goals:
        sign = ">=" if goal.get("of") == "bandwidth" else "<="
        value = "–" if goal["measured"] is None else f"{goal['measured']:.3f}"
        verdict = {True: "met", False: "MISSED", None: "not judged"}[goal["met"]]
        verdict += f" ({goal['why']})" if goal.get("why") else ""
        rows.append([goal["text"], value, f"{sign} {goal['limit']:g}", verdict])
    return "## Goals\n\n" + grid(["goal", "measured", "limit", ""], rows, last=1)


def head(record: dict[str, Any]) -> str:
    """Where a record was measured, with what, and how to read it."""
    where = record["environment"]
    names = ("cores", "threads", "capability", "multiprocessors", "memory_gib", "l2_mib")
    names += ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "cuda")
    facts = [f"{name.replace('_', ' ')} {where[name]}" for name in names if where.get(name)]
    facts += where.get("vector", [])
    known = {name: where[name] for name in ("python", "torch", "triton", "lolkernels")}
    known |= where.get("peers", {})
    commit = where["commit"] + (" with local changes" if where["dirty"] else "")
    lines = [
        f"# {where['device']}",
        "",
        ", ".join(facts) + ".",
        ", ".join(f"{name} {value}" for name, value in known.items() if value)
        + f"; backends {', '.join(where['backends'])}; commit {commit}, source {where['source']}; "
        f"{where['date']}.",
        "",
        *(f"    {command}" for command in [where["command"], *where.get("then", [])]),
        "",
        f"Up to {record['rounds']} interleaved rounds. A row has passed its check against float64",
        "first; one that has not says WRONG and has no time. A ratio is the median of the rounds'",
        "own; `x copy` is the share of the copy's bandwidth. Flops are those that the op needs,",
        "whoever computes it (lolkernels' linear_loss makes its gradients in the forward). Extra",
        "memory is the peak above inputs and returned gradients: on a CPU measured in a process of",
        "its own, on a GPU by torch's allocator.",
    ]
    return "\n".join(lines)


Table = Callable[[dict[str, Any]], str]


def markdown(record: dict[str, Any], table: Table = table) -> str:
    """The page of a record, from the record alone."""
    parts = [head(record), *(table(case) for case in record["cases"])]
    for name in record.get("left", []):
        parts.append(f"### {name}\n\nNot measured: no time was left.")
    if record["goals"]:
        parts.append(goals_table(record["goals"]))
    return "\n\n".join(parts) + "\n"


def case(title: str, rows: list[Any], floors: list[str], **more: Any) -> dict[str, Any]:
    """One case of a record; ``more`` may hold name, goals (of `Goal`), facts, error, seconds."""
    goals = [asdict(goal) for goal in more.pop("goals", [])]
    first = floors[0] if floors else None
    found = {"title": title, "floors": floors, "floor": first, "rows": [asdict(r) for r in rows]}
    return {**found, "goals": goals, **more}


def new(where: dict[str, Any], rounds: int) -> dict[str, Any]:
    return {"environment": where, "rounds": rounds, "cases": [], "goals": [], "left": []}


def files(out: Path) -> tuple[Path, Path]:
    return out.with_name(out.name + ".json"), out.with_name(out.name + ".md")


def _replace(path: Path, text: str) -> None:
    """Whole or not at all: a run that is killed leaves the last complete record."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def judge_all(record: dict[str, Any]) -> None:
    pairs = [(goal, case) for case in record["cases"] for goal in case.get("goals", [])]
    record["goals"] = [judge(goal, rows_of(case)) for goal, case in pairs]


def save(
    record: dict[str, Any], out: Path, page: Callable[[dict[str, Any]], str] = markdown
) -> list[Path]:
    """Writes `out`.json, and `out`.md from it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    data, text = files(out)
    _replace(data, json.dumps(record, indent=1) + "\n")
    _replace(text, page(json.loads(data.read_text())))
    return [data, text]


def faults(case: dict[str, Any]) -> list[str]:
    """A case or a row of ours that failed, or a wrong result. A peer that fails is no fault."""
    found = [case["error"]] if case.get("error") else []
    for row in rows_of(case):
        ours = row["contestant"] in ("lolkernels", "fused")
        if row["wrong"] or (row["error"] and ours):
            found.append(f"{row['label']}: {'; '.join(row['wrong']) or row['error']}")
    return found


def parser(about: str | None, rounds: int = 5, *, out: bool = True) -> argparse.ArgumentParser:
    """With the flags that the modes share."""
    made = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds a case")
    made.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    if out:
        made.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    return made


def parse(made: argparse.ArgumentParser, argv: list[str], least: int = 1) -> argparse.Namespace:
    """Reads the flags, and checks and applies those that the modes share."""
    given = made.parse_args(argv)
    if given.rounds < least:
        made.error(f"--rounds must be at least {least}; got {given.rounds}")
    if given.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: this torch sees no CUDA device; give --device cpu")
    if given.threads:
        torch.set_num_threads(given.threads)
    return given


def device_of(given: argparse.Namespace) -> Device:
    return Cuda() if given.device == "cuda" else Cpu()


def publish(
    given: argparse.Namespace,
    command: list[str],
    cases: Iterable[dict[str, Any]],
    page: Callable[[dict[str, Any]], str] = markdown,
    table: Table = table,
) -> int:
    """Prints each case as it is measured and writes what is there. Returns the exit status."""
    shown = shlex.join(["python", "benchmarks/run.py", *command])
    record = new(environment(torch.device(given.device), shown), given.rounds)
    for case in cases:
        record["cases"].append(case)
        print(table(case), end="\n\n", flush=True)
        judge_all(record)
        if given.out:  # what is there stays, should a later case fail
            save(record, given.out, page)
    if record["goals"]:
        print(goals_table(record["goals"]))
    if given.out:
        print("wrote", *files(given.out))
    return 1 if any(map(faults, record["cases"])) else 0


if __name__ == "__main__":
    import card_page  # it imports this module

    raise SystemExit(card_page.main())
