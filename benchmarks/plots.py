"""Draws the README's plots from the JSON of run.py and scaling.py, each light and dark.

python benchmarks/plots.py
python benchmarks/plots.py benchmarks/results/cpu.json --plots floor error --out /tmp/cpu

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
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEFAULT = [RESULTS / "cpu.json", RESULTS / "cpu-scaling.json"]
WIDTH, LEFT, RIGHT = 380, 16, 12  # points
TITLE, BODY, SMALL = 15, 11.5, 10.5
OURS, FLOOR, EAGER = "lolkernels", "gemms", "eager"
NAMES = {FLOOR: "bare GEMMs", EAGER: "eager PyTorch", "lol-rl": "the A-LoL authors' way"}
SHORT = NAMES | {EAGER: "eager"}  # at the end of a line
SIZE = {"tokens": "Tokens", "vocab": "Vocabulary"}
SUM_NAT = 1e-3  # the contract's limit for the error of a summed log-prob
LONGEST_BAR = 3.0  # x the floor; a longer bar is cut and says so

Record = dict[str, Any]
Row = dict[str, Any]


class PlotError(Exception):
    """What the records lack for a plot, and the command that measures it."""


@dataclass(frozen=True)
class Theme:
    """Colours after Okabe and Ito, told apart by the colour-blind too; paper is GitHub's."""

    name: str
    paper: str
    ink: str
    muted: str
    grid: str
    colors: dict[str, str]


THEMES = (
    Theme(
        "light",
        "#ffffff",
        "#1f2328",
        "#59636e",
        "#d1d9e0",
        {OURS: "#0072b2", EAGER: "#c04d00", "torch": "#007a5a", FLOOR: "#59636e"},
    ),
    Theme(
        "dark",
        "#0d1117",
        "#f0f6fc",
        "#9198a1",
        "#3d444d",
        {OURS: "#56b4e9", EAGER: "#e69f00", "torch": "#2fc99a", FLOOR: "#9198a1"},
    ),
)


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


def growth_case(records: list[Record], axis: str) -> dict[str, Any]:
    for record in records:
        for case in record["cases"]:
            if case.get("axis") == axis and len([r for r in timed(case) if _is(r, OURS)]) >= 2:
                return case
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
) -> tuple[dict[str, Any], list[Row]]:
    """The usable rows of the case, and shape, of linear_loss with the most peers."""
    best: tuple[dict[str, Any], list[Row]] | None = None
    most = 1
    for record in records:
        for case in record["cases"]:
            groups: dict[str, list[Row]] = {}
            for row in timed(case):
                if row["op"] == "linear_loss" and not row["frozen_head"] and "axis" not in case:
                    groups.setdefault(row["shape"], []).append(row)
            for group in groups.values():
                rows = [row for row in group if usable(row)]
                peers = {peer_of(row) for row in rows}
                if OURS in peers and len(peers) > most:
                    best, most = (case, rows), len(peers)
    if best is None:
        raise PlotError(
            f"no case of linear_loss has lolkernels and another contestant with {what}: run "
            "`python benchmarks/run.py --suite cpu --out ...` and give its JSON"
        )
    return best


def where(records: list[Record]) -> str:
    found = records[0]["environment"]
    threads = found.get("threads")
    if not threads or "cuda" in found:
        return str(found["device"])
    return f"{found['device']}, {threads} thread{'' if threads == 1 else 's'}"


def sizes(shape: str, without: str = "") -> str:
    """A shape's text with its most telling sizes: T=1024 D=768 V=50257 L=128 fp32."""
    return " ".join(part for part in shape.split() if not (without and part.startswith(without)))


# --- numbers as text ------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits without an exponent: 0.0812, 1.27, 14.2, 512."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def count(value: float) -> str:
    return f"{value / 1000:.0f}k" if value >= 1000 else f"{value:.0f}"


def bytes_text(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return f"{value:.0f} B"


def ms_text(value: float) -> str:
    return f"{number(value / 1e3)} s" if value >= 1e3 else f"{number(value)} ms"


def nat_text(value: float) -> str:
    return (
        f"{value:.0e}".replace("e-0", "e-").replace("e+00", "") if value < 0.01 else f"{value:.2f}"
    )


# --- drawing --------------------------------------------------------------------------------------


def balanced(text: str, width: int) -> str:
    """Breaks into as few lines as the width allows, then as narrow as that number allows."""
    fewest = len(textwrap.wrap(text, width))
    while len(textwrap.wrap(text, width - 1)) == fewest:
        width -= 1
    return textwrap.fill(text, width)


def canvas(height: float, title: str, subtitle: str, theme: Theme) -> tuple[Figure, float]:
    """A figure with its heading, and the points left below the heading."""
    title = "\n".join(balanced(part, 39) for part in title.split("\n"))
    subtitle = textwrap.fill(subtitle, 55)
    heading = 14 + 20 * (1 + title.count("\n")) + 14 * (1 + subtitle.count("\n"))
    figure = Figure(figsize=(WIDTH / 72, (height + heading) / 72), dpi=72, facecolor=theme.paper)
    total = height + heading

    def put(text: str, top: float, **style: Any) -> None:
        figure.text(LEFT / WIDTH, 1 - top / total, text, va="top", linespacing=1.25, **style)

    put(title, 12, size=TITLE, weight="bold", color=theme.ink)
    put(subtitle, 16 + 20 * (1 + title.count("\n")), size=SMALL, color=theme.muted)
    return figure, height


def panel(figure: Figure, left: float, bottom: float, right: float, top: float) -> Axes:
    """Axes between distances in points from the left, the bottom, the right and the bottom."""
    width, height = (72 * size for size in figure.get_size_inches())
    span = (right - left) / width, (top - bottom) / height
    return figure.add_axes((left / width, bottom / height, *span))


def dress(axes: Axes, theme: Theme, grid: str) -> None:
    axes.set_facecolor(theme.paper)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.grid(axis=grid, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=BODY, labelcolor=theme.muted, pad=6)
    axes.tick_params(axis="x", pad=8)


def spread(places: list[float], gap: float, top: float) -> list[float]:
    """Moves labels apart: ordered as before, `gap` or more between neighbours, none above top."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    limit = top
    for index in reversed(order):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - gap
    return moved


Series = dict[str, tuple[list[float], list[float]]]


def draw_lines(axes: Axes, series: Series, theme: Theme) -> None:
    """Draws each series and writes its name where it ends."""
    figure = axes.figure
    styles = {OURS: {"linewidth": 3.2, "zorder": 4}, FLOOR: {"linestyle": (0, (4, 2)), "zorder": 3}}
    for name, (x, y) in series.items():
        marker = {} if name == FLOOR else {"marker": "o", "markersize": 6 if name == OURS else 5}
        style = {"linewidth": 2.2} | marker | styles.get(name, {})
        axes.plot(x, y, color=color_of(name, theme), clip_on=False, **style)
    height = axes.get_position().height * 72 * figure.get_size_inches()[1]
    to_points = axes.transData + axes.transAxes.inverted()
    ends = {name: to_points.transform((x[-1], y[-1])) for name, (x, y) in series.items()}
    far = max(x for x, _ in ends.values())
    at_edge = [name for name, (x, _) in ends.items() if x > far - 0.05]
    places = spread([height * ends[name][1] for name in at_edge], 15, height + 8)
    for name, (x, y) in ends.items():
        place = places[at_edge.index(name)] if name in at_edge else height * y
        axes.annotate(
            SHORT.get(name, name),
            (x, place / height),
            xycoords="axes fraction",
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            size=BODY,
            weight="bold" if name == OURS else "normal",
            color=color_of(name, theme),
            bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 1},
            annotation_clip=False,
        )


def color_of(name: str, theme: Theme) -> str:
    return theme.colors.get(name, theme.ink)


def nice_step(largest: float, steps: int = 3) -> float:
    """The smallest of 1, 2, 2.5, 5 x 10^k that reaches `largest` in that many steps."""
    power = 10 ** math.floor(math.log10(largest / steps))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * steps >= largest * 0.999)


def linear_ticks(axes: Axes, largest: float, text: Callable[[float], str], unit: float = 1) -> None:
    """Ticks from zero in round steps of the unit."""
    step = unit * nice_step(largest / unit)
    ticks = [k * step for k in range(4)]
    axes.set_ylim(0, max(largest * 1.03, ticks[2]))
    ticks = [tick for tick in ticks if tick <= max(largest * 1.03, ticks[2])]
    axes.set_yticks(ticks, [text(tick) if tick else "0" for tick in ticks])


def apart(ticks: list[float]) -> list[float]:
    """From the last one down, those with room for a label between them."""
    kept = [ticks[-1]]
    for tick in reversed(ticks):
        if kept[-1] - tick >= 0.2 * ticks[-1]:
            kept.append(tick)
    return kept[::-1]


def binary_unit(value: float) -> float:
    return float(2 ** (10 * int(math.log2(max(value, 1)) // 10)))


def log_bytes(axes: Axes, values: list[float]) -> None:
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    step = max(1, math.ceil((high - low) / 3))
    ticks = [2.0**k for k in range(low, high + 1, step)]
    axes.set_yscale("log", base=2)
    axes.set_ylim(2.0**low * 0.8, 2.0**high * 1.1)
    axes.set_yticks(ticks, [bytes_text(tick) for tick in ticks])
    axes.minorticks_off()


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
    figure, _ = canvas(372, title, f"A-LoL loss, forward + backward, {shape}; {device}", theme)
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

    case, rows = peers_case(records, usable, "a time")
    floor = next((r["times_ms"] for r in rows if _is(r, FLOOR)), None)
    if floor is None:
        raise PlotError(
            f"the case '{case['title']}' has no row of the bare GEMMs: measure it again"
        )
    rows = [
        {**row, "ratio": median(a / b for a, b in zip(row["times_ms"], floor, strict=False))}
        for row in rows
        if peer_of(row) != FLOOR
    ]
    rows = best_of_each(rows, "ratio")
    ours = next(row for row in rows if _is(row, OURS))
    other = next(row for row in rows if not _is(row, OURS))
    title = (
        f"lolkernels takes {ours['ratio']:.2f}x the bare matrix products, "
        f"{name_text(other)} {other['ratio']:.2f}x"
    )
    figure, _ = canvas(
        38 * len(rows) + 64,
        title,
        f"A-LoL loss, forward + backward, {sizes(ours['shape'])}; {where(records)}",
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
        axes.annotate(
            f"{value:.2f}x",
            (min(value, end), place + 0.2),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            size=BODY,
            weight="bold",
            color=color if strong else theme.ink,
            annotation_clip=False,
        )
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
        _, rows = peers_case(records, half, "sum_error_nat")
    except PlotError:
        _, rows = peers_case(records, known, "sum_error_nat")
    rows = best_of_each(rows, "sum_error_nat")
    ours = next(row for row in rows if _is(row, OURS))
    others = [row for row in rows if not _is(row, OURS)]
    peer = next((row for row in others if _is(row, EAGER)), others[-1])
    dtype = ours["shape"].split()[4]
    title = (
        f"{dtype}: summed log-prob off by {nat_text(ours['sum_error_nat'])} nat,\n"
        f"{name_text(peer)}'s by {nat_text(peer['sum_error_nat'])}"
    )
    figure, _ = canvas(
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
        axes.annotate(
            nat_text(value),
            (value, place + 0.2),
            xytext=(11, 0),
            textcoords="offset points",
            va="center",
            size=BODY,
            weight="bold",
            color=color if strong else theme.ink,
            annotation_clip=False,
        )
        mark_name(axes, row, place, theme)
    axes.axvline(SUM_NAT, color=theme.ink, linewidth=1.4, linestyle=(0, (3, 2)))
    return Plot(figure, title)


def tokens_plot(records: list[Record], theme: Theme) -> Plot:
    return growth(growth_case(records, "tokens"), where(records), theme, logarithmic=True)


def vocab_plot(records: list[Record], theme: Theme) -> Plot:
    return growth(growth_case(records, "vocab"), where(records), theme, logarithmic=False)


PLOTS = {"tokens": tokens_plot, "vocab": vocab_plot, "floor": floor_plot, "error": error_plot}
# Text as paths: the same on every machine. The salt and the missing date keep the bytes the same.
STYLE = {"svg.fonttype": "path", "svg.hashsalt": "lolkernels", "font.family": "DejaVu Sans"}


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
