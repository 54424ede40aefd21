"""Tables of an experiment: one row a method, as Markdown, and the spread over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

_LEGEND = """\
reward: mean over held-out prompts, one sample each, with its 95% bootstrap interval over prompts.
matched: the same with each completion cut to the words of the reference's on the same prompt.
judge: predicted human rating, by a ridge regression that no training saw.
improved: share of prompts that score above the reference, ties counting half.
divergence: mean log π − log π_ref of the samples, nats per sequence. ppl: under the reference.
kept: share of the training rows with a coefficient. step: median time of one update."""


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"


def _interval(row: Row, key: str) -> str:
    if row.get(key) is None:
        return "–"
    return f"{row[key]:.3f} [{row[f'{key}_low']:.3f}, {row[f'{key}_high']:.3f}]"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text: text left, figures right."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return f"| {' | '.join([first, *rest])} |"

    rule = "-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])
    return "\n".join([line(head), line(rule), *map(line, rows)])


def results_table(rows: Sequence[Row]) -> str:
    """The one table of an experiment: rows of `EvalReport.to_dict()` with `updates, kept,
    step_seconds` where known."""
    head = ["method", "reward", "matched", "judge", "improved", "distinct-1/2/3", "words", "ppl"]
    head += ["divergence", "updates", "kept", "step"]
    cells = []
    for row in rows:
        step = row.get("step_seconds")
        updates = row.get("updates")
        cells.append(
            [
                row["name"],
                _interval(row, "reward"),
                _interval(row, "matched"),
                _number(row.get("judge"), 2),
                _percent(row.get("improved")),
                "/".join(f"{share:.3f}".removeprefix("0") for share in row["distinct"]),
                _number(row["words"], 1),
                _number(row.get("ppl_ref"), 1),
                _number(row.get("divergence"), 2),
                "–" if updates is None else str(updates),
                _percent(row.get("kept")),
                "–" if step is None else f"{1000 * step:.0f} ms",
            ]
        )
    return markdown_table(head, cells)


def legend() -> str:
    """What the columns of `results_table` mean, one line each."""
    return _LEGEND


def loss_table(cost: Mapping[str, float]) -> str:
    """Time and peak memory of the fused loss beside the eager one: a `LossCost` as a mapping."""
    rows = [
        [
            kind,
            f"{1000 * cost[f'{kind}_seconds']:.1f} ms",
            f"{cost[f'{kind}_bytes'] / 2**20:.1f} MiB",
        ]
        for kind in ("fused", "eager")
    ]
    rows.append(
        [
            "fused / eager",
            f"{cost['fused_seconds'] / cost['eager_seconds']:.2f}",
            f"{cost['fused_bytes'] / max(1, cost['eager_bytes']):.2f}",
        ]
    )
    return markdown_table(["A-LoL, forward + backward", "time", "peak memory"], rows)


def spread(runs: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over runs (seeds) of each method's main figures.

    Each run lists the same methods in the same order, the reference first. `gain` is the reward
    above the reference of the same run; `worst_gain` the smallest of them. The deviation (n - 1) is
    None with one run. Raises ValueError where the runs differ in their methods.
    """
    names = [row["name"] for row in runs[0]]
    if any([row["name"] for row in run] != names for run in runs):
        raise ValueError("runs must list the same methods in the same order")
    rows = []
    for place, name in enumerate(names):
        row: dict[str, Any] = {"name": name, "runs": len(runs)}
        for key in ("reward", "matched", "judge", "words", "divergence"):
            values = [run[place].get(key) for run in runs]
            if all(value is not None and math.isfinite(value) for value in values):
                row[key] = statistics.fmean(values)
                row[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        row["distinct_2"] = statistics.fmean(run[place]["distinct"][1] for run in runs)
        gains = [run[place]["reward"] - run[0]["reward"] for run in runs]
        row["gain"] = statistics.fmean(gains)
        row["gain_sd"] = statistics.stdev(gains) if len(gains) > 1 else None
        row["worst_gain"] = min(gains)
        rows.append(row)
    return rows


def spread_table(rows: Sequence[Row]) -> str:
    """The table of `spread`: mean ± standard deviation over seeds."""

    def cell(row: Row, key: str, digits: int = 3) -> str:
        if row.get(key) is None:
            return "–"
        deviation = row.get(f"{key}_sd")
        tail = "" if deviation is None else f" ± {deviation:.{digits}f}"
        return f"{row[key]:.{digits}f}{tail}"

    head = ["method", "reward", "gain over sft", "smallest gain", "matched", "judge"]
    head += ["distinct-2", "words", "divergence"]
    cells = [
        [
            row["name"],
            cell(row, "reward"),
            cell(row, "gain"),
            _number(row["worst_gain"], 3),
            cell(row, "matched"),
            cell(row, "judge", 2),
            _number(row["distinct_2"], 3),
            cell(row, "words", 1),
            cell(row, "divergence", 2),
        ]
        for row in rows
    ]
    return markdown_table(head, cells)


def samples_text(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],  # method -> rows of EvalReport.samples
    count: int = 8,
) -> str:
    """Completions of the first `count` prompts side by side, as Markdown. Chosen by position, never
    by score."""
    lines = []
    first = next(iter(samples.values()))
    for place in range(min(count, len(first))):
        lines.append(f"**{first[place]['prompt']}** …\n")
        for name, rows in samples.items():
            row = rows[place]
            text = " ".join(str(row["completion"]).split())
            lines.append(f"- `{name}` ({row['reward']:+.2f}): {text}")
        lines.append("")
    return "\n".join(lines)
