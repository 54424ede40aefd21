"""Draws the README's plots from the JSON of run.py and scaling.py, each light and dark.

python benchmarks/plots.py
python benchmarks/plots.py benchmarks/results/cpu.json --plots floor error --format png

Every number in a plot, its title included, comes from the records. The same records give the same
bytes. A plot is 380 points wide, with type that stays readable where a phone shows all of it.
It prints the <picture> elements that show them in a README.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

from drawing import (
    BODY,
    EAGER,
    FLOOR,
    LEFT,
    NAMES,
    OURS,
    STYLE,
    THEMES,
    WIDTH,
    Series,
    Theme,
    apart,
    binary_unit,
    bytes_text,
    canvas,
    count,
    draw_lines,
    dress,
    linear_ticks,
    log_bytes,
    ms_text,
    nat_text,
    number,
    panel,
)
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEFAULT = [RESULTS / "cpu.json", RESULTS / "cpu-scaling.json"]
SIZE = {"tokens": "Tokens", "vocab": "Vocabulary"}
SUM_NAT = 1e-3  # the contract's limit for the error of a summed log-prob
LONGEST_BAR = 3.0  # x the floor; a longer bar is cut and says so

Record = dict[str, Any]
Row = dict[str, Any]


class PlotError(Exception):
    """What the records lack for a plot, and the command that measures it."""


@dataclass
class Plot:
    figure: Figure
    title: str

    @property
    def alt(self) -> str:
        return self.title.replace("\n", " ")


# --- records --------------------------------------------------------------------------------------


def read(paths: list[Path]) -> list[Record]:
    """The records of one device.

    Raises:
        PlotError: a file is missing, is no record, or is of another device than the first.
    """
    records: list[Record] = []
    for path in paths:
        try:
            record = json.loads(path.read_text())
        except FileNotFoundError:
            raise PlotError(f"{path} does not exist: {_command(path)}") from None
        except json.JSONDecodeError as error:
            raise PlotError(f"{path} is not JSON: {error}") from None
        if not isinstance(record, dict) or not {"environment", "cases"} <= set(record):
            raise PlotError(f"{path} is no record of a benchmark (no 'environment' or 'cases')")
        records.append(record)
    devices = sorted({record["environment"]["device"] for record in records})
    if len(devices) != 1:
        raise PlotError(
            f"the records are of several devices ({', '.join(devices)}): draw each alone"
        )
    return records


def _command(path: Path) -> str:
    script = "scaling.py --axis all" if "scaling" in path.stem else "run.py --suite cpu"
    return f"python benchmarks/{script} --out {path.with_suffix('')} writes it"


def timed(case: dict[str, Any]) -> list[Row]:
    return [row for row in case["rows"] if row.get("median_ms") is not None]


def growth_case(records: list[Record], axis: str) -> tuple[dict[str, Any], str]:
    """The case over an axis, and where it was measured."""
    for record in records:
        for case in record["cases"]:
            if case.get("axis") == axis and len([r for r in timed(case) if _is(r, OURS)]) >= 2:
                return case, where(record)
    raise PlotError(
        f"no record has two points or more of lolkernels over {axis}: run "
        f"`python benchmarks/scaling.py --axis {axis} --out ...` and give its JSON"
    )


def _is(row: Row, contestant: str) -> bool:
    return bool(row["contestant"] == contestant)


def peer_of(row: Row) -> str:
    """What a row is a variant of: "cce kahan" and "cce no filter" are both "cce"."""
    return str(row["contestant"]).split()[0]


def best_of_each(rows: list[Row], key: str) -> list[Row]:
    """For each peer its variant with the least of `key`, the least first."""
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda r: r[key]):
        best.setdefault(peer_of(row), row)
    return list(best.values())


def peers_case(
    records: list[Record], usable: Callable[[Row], bool], what: str
) -> tuple[list[Row], str]:
    """The usable rows of the linear_loss case with the most peers, and where it was measured.

    Each has the `floor_ms` of its own rounds. A card's peers are measured family by family.
    """
    best: tuple[list[Row], str] | None = None
    most = 1
    for record in records:
        groups: dict[tuple[str, str], list[Row]] = {}
        for place, case in enumerate(record["cases"]):
            family = "peers" if case.get("name", "").startswith("peers ") else str(place)
            for row in timed(case):
                if row["op"] == "linear_loss" and not row["frozen_head"] and "axis" not in case:
                    shape = row["shape"]
                    bare = (r for r in timed(case) if _is(r, FLOOR) and r["shape"] == shape)
                    floor = next((r["times_ms"] for r in bare), None)
                    groups.setdefault((family, shape), []).append({**row, "floor_ms": floor})
        for group in groups.values():
            rows = [row for row in group if usable(row)]
            peers = {peer_of(row) for row in rows}
            if OURS in peers and len(peers) > most:
                best, most = (rows, where(record)), len(peers)
    if best is None:
        raise PlotError(
            f"no case of linear_loss has lolkernels and another contestant with {what}: run "
            "`python benchmarks/run.py --suite cpu --out ...` and give its JSON"
        )
    return best


def where(record: Record) -> str:
    found = record["environment"]
    threads = found.get("threads")
    if not threads or "cuda" in found:
        return str(found["device"])
    return f"{found['device']}, {threads} thread{'' if threads == 1 else 's'}"


def sizes(shape: str, without: str = "") -> str:
    """A shape's text with its most telling sizes: T=1024 D=768 V=50257 L=128 fp32."""
    return " ".join(part for part in shape.split() if not (without and part.startswith(without)))


def growth(case: dict[str, Any], device: str, theme: Theme, *, logarithmic: bool) -> Plot:
    """Time above, memory below. Over logarithmic sizes it is the time a unit."""
    axis, unit = case["axis"], case["unit"]
    rows = {
        name: sorted((r for r in timed(case) if _is(r, name)), key=lambda r: r["x"])
        for name in (OURS, FLOOR, EAGER)
    }
    rows = {name: found for name, found in rows.items() if found}
    per = 1000 if logarithmic else None
    time: Series = {
        name: (
            [r["x"] for r in found],
            [r["median_ms"] * (per / r["x"] if per else 1) for r in found],
        )
        for name, found in rows.items()
    }
    with_memory = {
        name: [r for r in found if (r.get("extra_bytes") or 0) > 0]
        for name, found in rows.items()
        if name != FLOOR
    }
    memory: Series = {
        name: ([r["x"] for r in found], [r["extra_bytes"] for r in found])
        for name, found in with_memory.items()
        if found
    }
    if len(memory.get(OURS, ([], []))[0]) < 2:
        raise PlotError(
            f"the case over {axis} has no extra_bytes of lolkernels at two points: measure them"
        )
    if logarithmic:
        title = tokens_title(with_memory[OURS], unit)
    else:
        title = vocab_title(with_memory[OURS], with_memory.get(EAGER, []))
    shape = sizes(rows[OURS][0]["shape"], {"tokens": "T=", "vocab": "V="}.get(axis, ""))
    figure = canvas(372, title, f"A-LoL loss, forward + backward, {shape}; {device}", theme)
    left, right = 66, WIDTH - 92
    ticks = sorted({x for xs, _ in time.values() for x in xs})
    for series, bottom, top, name in (
        (time, 222, 342, f"Time per 1,000 {unit}s" if per else "Time"),
        (memory, 44, 164, "Extra memory"),
    ):
        axes = panel(figure, left, bottom, right, top)
        dress(axes, theme, "y")
        values = [y for _, ys in series.values() for y in ys]
        if logarithmic:
            axes.set_xscale("log")
            axes.set_xlim(ticks[0], ticks[-1])
        else:
            axes.set_xlim(0, ticks[-1])
        if series is time:
            linear_ticks(axes, max(values), ms_text)
        elif logarithmic:
            log_bytes(axes, values)
        else:
            linear_ticks(axes, max(values), bytes_text, binary_unit(max(values)))
        shown = [ticks[0], ticks[len(ticks) // 2], ticks[-1]] if logarithmic else apart(ticks)
        axes.set_xticks(shown, [count(tick) for tick in shown])
        axes.minorticks_off()
        axes.spines["bottom"].set_visible(True)
        axes.spines["bottom"].set_color(theme.muted)
        axes.annotate(
            name,
            (LEFT / WIDTH, 1),
            xycoords=("figure fraction", "axes fraction"),
            xytext=(0, 12),
            textcoords="offset points",
            size=BODY,
            weight="bold",
            color=theme.ink,
            annotation_clip=False,
        )
        draw_lines(axes, series, theme)
    axes.set_xlabel(SIZE[axis].lower(), size=BODY, color=theme.muted)
    return Plot(figure, title)


def tokens_title(ours: list[Row], unit: str) -> str:
    """From the point on where chunks are full: before it, memory grows with the rows."""
    full = [row for row in ours if row.get("full_chunks", True)]
    first, *_, last = full if len(full) > 1 else ours
    more, time, memory = (last[key] / first[key] for key in ("x", "median_ms", "extra_bytes"))
    return (
        f"From {count(first['x'])} to {count(last['x'])} {unit}s, {number(more)}x as many:\n"
        f"{number(time)}x the time, {memory:.2f}x the memory"
    )


def vocab_title(ours: list[Row], eager: list[Row]) -> str:
    """At the largest vocabulary that both have."""
    others = {row["x"]: row for row in eager}
    both = [(row, others[row["x"]]) for row in ours if row["x"] in others]
    if not both:
        return f"Vocabulary {ours[-1]['x']:,}: {bytes_text(ours[-1]['extra_bytes'])} extra memory"
    a, b = both[-1]
    time, memory = (a[key] / b[key] for key in ("median_ms", "extra_bytes"))
    return f"Vocabulary {a['x']:,}:\n{time:.2f}x eager's time, {memory:.2f}x its memory"


def named_rows(figure: Figure, rows: int, theme: Theme) -> Axes:
    """Axes for one contestant a line of 38 points, its name above its mark."""
    axes = panel(figure, LEFT, 46, WIDTH - 56, 46 + 38 * rows + 8)
    dress(axes, theme, "x")
    axes.set_ylim(rows - 0.5 + 0.1, -0.5 - 0.25)
    axes.set_yticks([])
    return axes


def name_text(row: Row) -> str:
    """A known name, or the row's own label and version."""
    if (known := NAMES.get(row["contestant"])) or _is(row, OURS):
        return known or OURS
    label = row["label"].removesuffix(f" {row['shape'].split()[4]}")  # the dtype
    return f"{label} {row.get('version', '')}".strip()


def mark_value(axes: Axes, text: str, at: tuple[float, float], right: int, color: str) -> None:
    axes.annotate(
        text,
        at,
        xytext=(right, 0),
        textcoords="offset points",
        va="center",
        size=BODY,
        weight="bold",
        color=color,
        annotation_clip=False,
    )


def mark_name(axes: Axes, row: Row, place: int, theme: Theme) -> None:
    axes.annotate(
        name_text(row),
        (0, place),
        xycoords=("axes fraction", "data"),
        xytext=(0, 5),
        textcoords="offset points",
        va="bottom",
        size=BODY,
        weight="bold" if _is(row, OURS) else "normal",
        color=theme.colors[OURS] if _is(row, OURS) else theme.ink,
        bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 0.6},
    )


def floor_plot(records: list[Record], theme: Theme) -> Plot:
    """Each contestant's time over the bare matrix products': the median of the rounds' ratios."""

    def usable(row: Row) -> bool:
        return True

    rows, device = peers_case(records, usable, "a time")
    if rows[0]["floor_ms"] is None:
        raise PlotError(
            f"no row of the bare GEMMs stands beside {rows[0]['label']}, {rows[0]['shape']}: run "
            "`python benchmarks/run.py --suite cpu --out ...` and give its JSON"
        )
    rows = [
        {**row, "ratio": median(map(truediv, row["times_ms"], row["floor_ms"]))}
        for row in rows
        if peer_of(row) != FLOOR
    ]
    rows = best_of_each(rows, "ratio")
    ours = next(row for row in rows if _is(row, OURS))
    other = next((row for row in rows if not _is(row, OURS)), None)
    if other is None:
        raise PlotError("no peer has a time beside lolkernels and the bare GEMMs: measure one")
    title = (
        f"lolkernels takes {ours['ratio']:.2f}x the bare matrix products, "
        f"{name_text(other)} {other['ratio']:.2f}x"
    )
    figure = canvas(
        38 * len(rows) + 64,
        title,
        f"A-LoL loss, forward + backward, {sizes(ours['shape'])}; {device}",
        theme,
    )
    axes = named_rows(figure, len(rows), theme)
    end = min(LONGEST_BAR, max(1.2, rows[-1]["ratio"]))
    axes.set_xlim(0, end)
    ticks = [0, 1, 2, 3][: int(end) + 1]
    axes.set_xticks(ticks, [f"{t}x" + ("\nbare GEMMs" if t == 1 else "") for t in ticks])
    for place, row in enumerate(rows):
        value, strong = row["ratio"], _is(row, OURS)
        color = theme.colors[OURS] if strong else theme.muted
        axes.barh(place + 0.2, min(value, end), 0.36, color=color, alpha=1 if strong else 0.75)
        if value > end:  # cut: a gap near its end
            axes.barh(place + 0.2, end * 0.012, 0.46, left=end * 0.93, color=theme.paper)
        ink = color if strong else theme.ink
        mark_value(axes, f"{value:.2f}x", (min(value, end), place + 0.2), 6, ink)
        mark_name(axes, row, place, theme)
    axes.axvline(1, color=theme.ink, linewidth=1.4, linestyle=(0, (3, 2)))
    axes.get_xticklabels()[1].set(color=theme.ink)
    return Plot(figure, title)


def error_plot(records: list[Record], theme: Theme) -> Plot:
    """The error of a sequence's summed log-prob against float64, bf16 tensors where measured."""

    def half(row: Row) -> bool:
        return bool(row.get("sum_error_nat")) and "bf16" in row["shape"].split()

    def known(row: Row) -> bool:
        return bool(row.get("sum_error_nat"))

    try:
        rows, _ = peers_case(records, half, "sum_error_nat")
    except PlotError:
        rows, _ = peers_case(records, known, "sum_error_nat")
    rows = best_of_each(rows, "sum_error_nat")
    ours = next(row for row in rows if _is(row, OURS))
    others = [row for row in rows if not _is(row, OURS)]
    peer = next((row for row in others if _is(row, EAGER)), others[-1])
    dtype = ours["shape"].split()[4]
    title = (
        f"{dtype}: summed log-prob off by {nat_text(ours['sum_error_nat'])} nat,\n"
        f"{name_text(peer)}'s by {nat_text(peer['sum_error_nat'])}"
    )
    figure = canvas(
        38 * len(rows) + 64,
        title,
        f"Worst sequence against float64, {sizes(ours['shape'])}. "
        "0.1 nat moves the importance ratio by 10%.",
        theme,
    )
    axes = named_rows(figure, len(rows), theme)
    errors = [row["sum_error_nat"] for row in rows]
    low = math.floor(math.log10(min(*errors, SUM_NAT)))
    high = math.ceil(math.log10(max(*errors, SUM_NAT * 10)))
    axes.set_xscale("log")
    axes.set_xlim(10.0**low, 10.0**high)
    powers = [k for k in range(low, high + 1) if k % 3 == 0]
    limit = round(math.log10(SUM_NAT))
    texts = {0: "1 nat", limit: f"1e{limit} nat\nthe tests' limit"}
    axes.set_xticks([10.0**k for k in powers], [texts.get(k, f"1e{k}") for k in powers])
    axes.get_xticklabels()[powers.index(limit)].set_color(theme.ink)
    axes.minorticks_off()
    for place, row in enumerate(rows):
        value, strong = row["sum_error_nat"], _is(row, OURS)
        color = theme.colors[OURS] if strong else theme.muted
        axes.plot([10.0**low, value], [place + 0.2] * 2, ":", color=color, linewidth=1.5)
        axes.plot(value, place + 0.2, "o", markersize=11, color=color, clip_on=False)
        ink = color if strong else theme.ink
        mark_value(axes, nat_text(value), (value, place + 0.2), 11, ink)
        mark_name(axes, row, place, theme)
    axes.axvline(SUM_NAT, color=theme.ink, linewidth=1.4, linestyle=(0, (3, 2)))
    return Plot(figure, title)


def tokens_plot(records: list[Record], theme: Theme) -> Plot:
    return growth(*growth_case(records, "tokens"), theme, logarithmic=True)


def vocab_plot(records: list[Record], theme: Theme) -> Plot:
    return growth(*growth_case(records, "vocab"), theme, logarithmic=False)


PLOTS = {"tokens": tokens_plot, "vocab": vocab_plot, "floor": floor_plot, "error": error_plot}


def draw(records: list[Record], name: str, theme: Theme) -> Plot:
    with rc_context(STYLE):
        return PLOTS[name](records, theme)


def save(plot: Plot, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"Date": None, "Title": plot.alt} if path.suffix == ".svg" else {}
    with rc_context(STYLE):
        plot.figure.savefig(path, dpi=144, facecolor=plot.figure.get_facecolor(), metadata=facts)


def picture(light: Path, dark: Path, alt: str) -> str:
    """The README's element: the dark plot where the reader's screen is dark."""

    def address(path: Path) -> str:
        path = path.resolve()
        return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()

    return (
        "<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="{address(dark)}">\n'
        f'  <img alt="{html.escape(alt)}" src="{address(light)}" width="410">\n'
        "</picture>"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="*", type=Path, default=DEFAULT, help="JSON of one device")
    parser.add_argument("--plots", nargs="+", choices=list(PLOTS), default=list(PLOTS))
    parser.add_argument(
        "--out", type=Path, help="start of the files' names (default: plots/<first record> there)"
    )
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    arguments = parser.parse_args(argv)
    first = arguments.records[0]
    out = arguments.out or first.parent / "plots" / first.stem
    try:
        records = read(arguments.records)
        made = {n: [draw(records, n, theme) for theme in THEMES] for n in arguments.plots}
    except PlotError as error:
        print(f"plots: {error}", file=sys.stderr)
        return 2
    for name, plots in made.items():
        paths = [
            out.with_name(f"{out.name}-{name}-{theme.name}.{arguments.format}") for theme in THEMES
        ]
        for plot, path in zip(plots, paths, strict=True):
            save(plot, path)
        print(picture(*paths, plots[0].alt))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
