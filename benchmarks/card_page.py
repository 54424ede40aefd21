"""What a folder of benchmarks/card.py says: the record, its page, its plots, the section of
docs/benchmarks.md.

python benchmarks/report.py FOLDER                       FOLDER/report.md and FOLDER/report.json
python benchmarks/report.py FOLDER --publish             benchmarks/results/<device>, and plots
python benchmarks/report.py --docs                       the section, from what is published
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import journal
import report
from card_worker import OPS
from journal import Line

RESULTS = report.ROOT / "benchmarks" / "results"
MARKS = "<!-- measured on a card -->", "<!-- end of what was measured on a card -->"
HOW = (
    "`make gpu-bundle` builds what a bare machine with a card needs (no network there, and no card "
    "here); `make card` checks,\nmeasures and tests there in one command of ten minutes, and the "
    "same command goes on where it ended. `python\nbenchmarks/report.py card --publish --docs` "
    "makes this section of what it found."
)
NOTHING = (
    "**No card has measured anything yet**: no GPU time and no GPU result stands on this page.\n"
    + HOW
)
Record = dict[str, Any]


def collect(folder: Path) -> Record:
    """The record of a folder: the last run, and what earlier runs of the same code found.

    Raises:
        ValueError: no run in the folder got as far as to say where it was.
    """
    lines = journal.Journal(folder, "").lines()
    headers = [line for line in lines if line["kind"] == "header"]
    if not headers:
        faults = " ".join(fault_text(line) for line in lines if journal.bad(line))
        raise ValueError(f"{folder} holds no run that began: {faults or 'the journal is empty'}")
    last = headers[-1]
    here = journal.same_as(lines, last["run"])
    latest: dict[str, Line] = {}
    for line in lines:
        # What prepares a run comes before its header and is of that run alone.
        mine = here if line.get("job") != "prepare" else {last["run"]}
        if line["kind"] in ("result", "fault") and line["run"] in mine:
            latest[line["task"]] = line
    commands = [h["environment"]["command"] for h in headers if h["run"] in here]
    environment = {**last["environment"], "command": commands[0], "then": commands[1:]}
    titles, order = dict(last["plan"]), list[str]()
    for name, _ in last["plan"]:
        # The parts of a task that faulted follow it.
        order += [name, *(part for part in latest if part.startswith(f"{name} / "))]
    cases = [latest[name]["case"] for name in order if name in latest and "case" in latest[name]]
    rounds = [len(row["times_ms"]) for case in cases for row in case["rows"]]
    record = report.new(environment, max(rounds, default=0))
    record["cases"] = cases
    record["left"] = [titles[name] for name in order if name not in latest]
    record["clocks"] = {x["job"]: x["clocks"] for x in lines if x["kind"] == "clocks"}
    record["checks"] = [x for name in order if "op" in (x := latest.get(name, {}))]
    record["tests"] = [x for x in latest.values() if "outcome" in x]
    record["prepared"] = [x for x in latest.values() if x.get("job") == "prepare"]
    record["missing"] = last["missing"]
    record["faults"] = [x for x in latest.values() if journal.bad(x)]
    record["cut short"] = [x for x in lines if x["kind"] == "left" and x["run"] == last["run"]]
    report.judge_all(record)
    return record


def fault_text(line: Line) -> str:
    wrong = line.get("wrong") or [line.get("reason", "")]
    said = wrong if isinstance(wrong, str) else "; ".join(wrong)
    return f"* **{line['task']}**: {said}" + (f" ({line['text']})" if line.get("text") else "")


def checks_table(checks: list[Line]) -> str:
    """Backend by shape and dtype, a column for each op; `ok`, what is missed, or WRONG."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for one in checks:
        _, *key = one["task"].split(" ")[:4]
        worst = max(one.get("gradient_errors", {}).values(), default=None)
        numbers = [one.get("sum_error_nat"), worst]
        text = " / ".join(f"{value:.0e}" for value in numbers if value is not None)
        text = f"{'misses' if one.get('missed') else 'ok'} {text}".strip()
        if one.get("skipped") or journal.bad(one):
            text = "–" if one.get("skipped") else "**WRONG**"
        found.setdefault(tuple(key), {})[one["op"]] = text
    if not found:
        return "## Every op against float64\n\nNothing was checked."
    rows = [[*key, *(ops.get(op, "") for op in OPS)] for key, ops in found.items()]
    shapes = {" ".join(one["shape"].split()[:-1]) for one in checks if one.get("shape")}
    return "\n\n".join(
        [
            "## Every op against float64",
            "Nat of a sequence's summed log-prob / relative error of the worse gradient.",
            report.grid(["backend", "shape", "dtype", *OPS], rows, words=3 + len(OPS)),
            "\n".join(f"* {shape}" for shape in sorted(shapes)),
        ]
    )


def tests_table(tests: list[Line]) -> str:
    counts: dict[str, dict[str, int]] = {}
    for one in tests:
        job = counts.setdefault(one["job"].removeprefix("tests "), {})
        job[one["outcome"]] = job.get(one["outcome"], 0) + 1
    kinds = ("passed", "failed", "skipped")
    rows = [[name, *(job.get(kind, 0) for kind in kinds)] for name, job in counts.items()]
    reasons = sorted({one["text"] for one in tests if one.get("text")})
    table = report.grid(["file, backend", *kinds], rows)
    return "\n".join(["## Tests", "", table, "", *(f"* skipped: {reason}" for reason in reasons)])


def page(record: Record) -> str:
    faults = [fault_text(line) for line in record["faults"]]
    parts = [report.head(record)]
    text = "\n".join(faults) or "None: every task that ran came to its end with a sound result."
    parts.append(f"## Faults\n\n{text}")
    if record["prepared"] or record["missing"]:
        lines = [f"* {x['task']}: {x.get('text') or x.get('reason')}" for x in record["prepared"]]
        lines += [f"* backend {name} is missing: {why}" for name, why in record["missing"].items()]
        for job, clocks in record["clocks"].items():
            seen = ", ".join(f"{name} {value}" for name, value in clocks.items())
            lines.append(f"* clocks after {job}: {seen}")
        parts.append("## What it ran with\n\n" + "\n".join(lines))
    parts.append(checks_table(record["checks"]))
    if record["goals"]:
        parts.append(report.goals_table(record["goals"]))
    parts.append("## Measured")
    parts += map(report.table, record["cases"])
    if record["tests"]:
        parts.append(tests_table(record["tests"]))
    left = [f"* {title}" for title in record["left"]]
    left += [f"* {x['job']}: {x['why']}" for x in record["cut short"]]
    if left:
        parts.append("## Left for another run in the same folder\n\n" + "\n".join(left))
    return "\n\n".join(parts) + "\n"


def published() -> list[Record]:
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return [record for record in found if record["environment"].get("capability")]


def docs_section(records: list[Record]) -> str:
    """From the published records alone: ours by backend beside the bare products and the peers."""
    if not records:
        return NOTHING
    return "\n\n".join([*map(_measured, records), HOW])


def _measured(record: Record) -> str:
    where = record["environment"]
    met = [goal["met"] for goal in record["goals"]]
    rows = []
    for case in record["cases"]:
        if not case.get("name", "").startswith(("linear_", "score ", "peers ")):
            continue
        found = report.rows_of(case)
        floor = next((row for row in found if row["label"] == case["floor"]), None)
        for row in found:
            if row["times_ms"] and floor and row["label"] not in case["floors"]:
                ratio = report.ratios(row, floor)
                cells = [f"{case['name']}, {row['label']}", f"{row['median_ms']:.2f}"]
                cells += [f"{ratio['median']:.2f}" if ratio else "", report.mib(row["extra_bytes"])]
                rows.append(cells)
    return (
        f"Measured on one {where['device']} (torch {where['torch']}, commit {where['commit']}, "
        f"{where['date']}): {met.count(True)} goals met, {met.count(False)} missed, "
        f"{len(record['faults'])} faults; "
        f"[all rows](../benchmarks/results/{report.slug(where['device'])}.md).\n\n"
        + report.grid(["", "ms", "x bare products", "extra MiB"], rows)
    )


def in_docs(text: str, section: str) -> str:
    """The page's text with its section replaced."""
    before, start, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not start or not end:
        raise ValueError(f"docs/benchmarks.md has no {MARKS[0]} ... {MARKS[1]}")
    return f"{before}{start}\n{section}\n{end}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--publish", action="store_true")
    parser.add_argument("--docs", action="store_true")
    given = parser.parse_args(argv)
    if given.folder is None and not given.docs:
        parser.error("give the folder of a run, or --docs")
    if given.folder:
        try:
            record = collect(given.folder)
        except ValueError as error:
            print(f"report: {error}", file=sys.stderr)
            return 2
        out = given.folder / "report"
        if given.publish:
            out = RESULTS / report.slug(record["environment"]["device"])
        paths = report.save(record, out, page)
        print(page(record).partition("\n## Measured")[0])
        print("wrote", *paths)
        if given.publish:
            import plots  # it needs matplotlib

            plots.main([str(paths[0]), "--plots", "floor", "error"])
    if given.docs:
        path = report.ROOT / "docs" / "benchmarks.md"
        path.write_text(in_docs(path.read_text(), docs_section(published())))
    return 0
