"""Draws the docs' plots from the JSON of run.py and its mode scaling, each light and dark.

python benchmarks/run.py plots
python benchmarks/run.py plots benchmarks/results/cpu.json --plots floor error --format png

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
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEFAULT = [RESULTS / "cpu.json", RESULTS / "cpu-scaling.json"]
SUM_NAT = 1e-3  # the contract's limit for the error of a summed log-prob
RUN = "run `python benchmarks/run.py --suite cpu --out ...` and give its JSON"
LONGEST_BAR = 3.0  # x the floor; a longer bar is cut and says so
WIDTH, LEFT, TITLE, BODY, SMALL = 380, 12, 15, 11.5, 10.5  # points
OURS, FLOOR, EAGER = "lolkernels", "gemms", "eager"
NAMES = {FLOOR: "bare GEMMs", EAGER: "eager PyTorch", "lol-rl": "the A-LoL authors' way"}

Record = dict[str, Any]
Row = dict[str, Any]


class PlotError(Exception):
    """What the records lack for a plot, and the command that measures it."""


class Plot(NamedTuple):
    figure: Figure
    title: str

    @property
    def alt(self) -> str:
        return self.title.replace("\n", " ")


class Theme(NamedTuple):
    """Colours after Okabe and Ito, told apart by the colour-blind too; paper is GitHub's."""

    name: str
    paper: str
    ink: str
    muted: str
    grid: str
    colors: dict[str, str]

    def style(self) -> dict[str, Any]:
        """Text as paths: the same on every machine. The salt keeps the bytes the same."""
        found = {"svg.fonttype": "path", "svg.hashsalt": "lolkernels", "font.family": "DejaVu Sans"}
        found |= {"font.size": BODY, "axes.titlesize": BODY, "axes.titleweight": "bold"}
        found |= {"figure.facecolor": self.paper, "axes.facecolor": self.paper, "figure.dpi": 72}
        found |= {f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")}
        found |= {"axes.grid": True, "axes.axisbelow": True, "grid.color": self.grid}
        found |= {"xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False}
        found |= dict.fromkeys(("xtick.color", "ytick.color", "axes.labelcolor"), self.muted)
        return {**found, "text.color": self.ink, "axes.titlecolor": self.ink}


LIGHT = {OURS: "#0072b2", EAGER: "#c04d00", FLOOR: "#59636e"}
DARK = {OURS: "#56b4e9", EAGER: "#e69f00", FLOOR: "#9198a1"}
THEMES = (
    Theme("light", "#ffffff", "#1f2328", "#59636e", "#d1d9e0", LIGHT),
    Theme("dark", "#0d1117", "#f0f6fc", "#9198a1", "#3d444d", DARK),
)


def number(value: float) -> str:
    """Three digits without an exponent: 0.0812, 1.27, 14.2, 512."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def count(value: float) -> str:
    return f"{value / 1000:.0f}k" if value >= 1000 else f"{value:.0f}"


def bytes_text(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return f"{value:.0f} B" if value else "0"


def ms_text(value: float) -> str:
    return f"{number(value / 1e3)} s" if value >= 1e3 else f"{number(value)} ms" if value else "0"


def nat_text(value: float) -> str:
    small = f"{value:.0e}".replace("e-0", "e-").replace("e+00", "")
    return small if value < 0.01 else f"{value:.2f}"


def read(paths: list[Path]) -> list[Record]:
    """The records of one device.

    Raises:
        PlotError: a file is missing, is no record, or is of another device than the first.
    """
    records: list[Record] = []
    for path in paths:
        if not path.exists():
            mode = "scaling" if "scaling" in path.stem else "--suite cpu"
            command = f"python benchmarks/run.py {mode} --out {path.with_suffix('')}"
            raise PlotError(f"{path} does not exist: {command} writes it")
        try:
            records.append(json.loads(path.read_text()))
        except json.JSONDecodeError as error:
            raise PlotError(f"{path} is not JSON: {error}") from None
        if not isinstance(records[-1], dict) or not {"environment", "cases"} <= set(records[-1]):
            raise PlotError(f"{path} is no record of a benchmark (no 'environment' or 'cases')")
    devices = sorted({record["environment"]["device"] for record in records})
    if len(devices) != 1:
        names = ", ".join(devices)
        raise PlotError(f"the records are of several devices ({names}): draw each alone")
    return records


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
        f"`python benchmarks/run.py scaling --axis {axis} --out ...` and give its JSON"
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
            f"no case of linear_loss has lolkernels and another contestant with {what}: {RUN}"
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


def canvas(height: float, panels: int, plot: tuple[str, str], theme: Theme) -> tuple[Figure, Any]:
    """A figure with its title and subtitle, and `height` points below them."""
    title, subtitle = plot
    title = "\n".join(textwrap.fill(part, 39) for part in title.split("\n"))
    subtitle = textwrap.fill(subtitle, 55)
    lines = 1 + title.count("\n")
    total = height + 26 + 20 * lines + 14 * (1 + subtitle.count("\n"))
    figure = Figure(figsize=(WIDTH / 72, total / 72), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, height / total), w_pad=0.12, hspace=0.1)
    style: dict[str, Any] = {"va": "top", "linespacing": 1.25}
    figure.text(LEFT / WIDTH, 1 - 12 / total, title, size=TITLE, weight="bold", **style)
    down = 16 + 20 * lines
    figure.text(LEFT / WIDTH, 1 - down / total, subtitle, size=SMALL, color=theme.muted, **style)
    return figure, figure.subplots(panels, 1)


def growth(case: dict[str, Any], device: str, theme: Theme, *, logarithmic: bool) -> Plot:
    """Time above, memory below. Over logarithmic sizes it is the time a unit."""
    axis, unit = case["axis"], case["unit"]
    rows = {
        name: sorted((r for r in timed(case) if _is(r, name)), key=lambda r: r["x"])
        for name in (OURS, FLOOR, EAGER)
    }
    memory = {
        name: [r for r in found if name != FLOOR and (r.get("extra_bytes") or 0) > 0]
        for name, found in rows.items()
    }
    if len(memory[OURS]) < 2:
        raise PlotError(
            f"the case over {axis} has no extra_bytes of lolkernels at two points: measure them"
        )
    title = tokens_title(memory[OURS], unit) if logarithmic else vocab_title(memory)
    shape = sizes(rows[OURS][0]["shape"], {"tokens": "T=", "vocab": "V="}.get(axis, ""))
    subtitle = f"A-LoL loss, forward + backward, {shape}; {device}"
    figure, panels = canvas(390, 2, (title, subtitle), theme)
    points = sorted({r["x"] for found in rows.values() for r in found})
    for axes, series, key in zip(panels, (rows, memory), ("median_ms", "extra_bytes"), strict=True):
        each = logarithmic and key == "median_ms"
        text, name = (ms_text, "Time") if key == "median_ms" else (bytes_text, "Extra memory")
        axes.set_title(f"{name} per 1,000 {unit}s" if each else name, loc="left")
        found = {
            name: [(r["x"], r[key] * (1000 / r["x"] if each else 1)) for r in some]
            for name, some in series.items()
        }
        for name, pairs in found.items():
            look = {"linewidth": 3.2 if name == OURS else 2.2, "color": theme.colors[name]}
            look |= {"dashes": (4, 2)} if name == FLOOR else {"marker": "o"}
            if pairs:
                axes.plot(*zip(*pairs, strict=True), label=NAMES.get(name, name), **look)
        if logarithmic:
            axes.set_xscale("log")
        values = [y for pairs in found.values() for _, y in pairs]
        ticks = places(values, key, log=logarithmic and not each)
        if logarithmic and not each:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.05 * max(values))
        axes.set_yticks(ticks, [text(tick) for tick in ticks])
        shown = points[:: max(1, len(points) // 3)] if logarithmic else points[1:]
        axes.set_xticks(shown, [count(tick) for tick in shown])
        axes.minorticks_off()
    axes.set_xlabel({"tokens": "tokens", "vocab": "vocabulary"}[axis])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return Plot(figure, title)


def places(values: list[float], key: str, *, log: bool) -> list[float]:
    """Of up to five ticks: bytes at powers of two or their multiples, times at round numbers."""
    low, high = math.log2(min(values)), math.log2(max(values))
    if log:
        return [2.0**k for k in range(math.ceil(low), math.ceil(high), math.ceil((high - low) / 4))]
    step = 2.0 ** math.ceil(high - 2)
    found = [k * step for k in range(5)]
    if key != "extra_bytes":
        found = MaxNLocator(4).tick_values(0, max(values))
    return [tick for tick in found if 0 <= tick <= max(values)]


def tokens_title(ours: list[Row], unit: str) -> str:
    """From the point on where chunks are full: before it, memory grows with the rows."""
    full = [row for row in ours if row.get("full_chunks", True)]
    first, *_, last = full if len(full) > 1 else ours
    more, time, memory = (last[key] / first[key] for key in ("x", "median_ms", "extra_bytes"))
    return (
        f"From {count(first['x'])} to {count(last['x'])} {unit}s, {number(more)}x as many:\n"
        f"{number(time)}x the time, {memory:.2f}x the memory"
    )


def vocab_title(memory: dict[str, list[Row]]) -> str:
    """At the largest vocabulary that both have."""
    others = {row["x"]: row for row in memory[EAGER]}
    both = [(row, others[row["x"]]) for row in memory[OURS] if row["x"] in others]
    if not both:
        last = memory[OURS][-1]
        return f"Vocabulary {last['x']:,}: {bytes_text(last['extra_bytes'])} extra memory"
    a, b = both[-1]
    time, less = (a[key] / b[key] for key in ("median_ms", "extra_bytes"))
    return f"Vocabulary {a['x']:,}:\n{time:.2f}x eager's time, {less:.2f}x its memory"


def name_text(row: Row) -> str:
    """A known name, or the row's own label and version."""
    if (known := NAMES.get(row["contestant"])) or _is(row, OURS):
        return known or OURS
    label = row["label"].removesuffix(f" {row['shape'].split()[4]}")  # the dtype
    return f"{label} {row.get('version', '')}".strip()


def ranked(
    rows: list[Row], key: str, text: Callable[[float], str], plot: tuple[str, str], theme: Theme
) -> tuple[Figure, Any]:
    """A bar for each contestant, the least first, its value at its end; cut at the axes' limit."""
    figure, axes = canvas(36 * len(rows) + 46, 1, plot, theme)
    names = [textwrap.fill(name_text(row), 17) for row in rows]
    colors = [theme.colors[OURS] if _is(row, OURS) else theme.muted for row in rows]
    bars = axes.barh(range(len(rows)), [row[key] for row in rows], 0.55, color=colors)
    axes.set_yticks(range(len(rows)), names, color=theme.ink)
    axes.grid(False, axis="y")
    axes.invert_yaxis()
    for bar, row in zip(bars, rows, strict=True):
        ours = {"weight": "bold", "color": theme.colors[OURS]} if _is(row, OURS) else {}
        place = {"xycoords": ("data", "data"), "textcoords": "offset points", "va": "center"}
        at = min(row[key], LONGEST_BAR) if key == "ratio" else row[key]
        axes.annotate(text(row[key]), (at, bar.get_y() + 0.27), (5, 0), **place, **ours)
    return figure, axes


def floor_plot(records: list[Record], theme: Theme) -> Plot:
    """Each contestant's time over the bare matrix products': the median of the rounds' ratios."""
    rows, device = peers_case(records, lambda row: True, "a time")
    if rows[0]["floor_ms"] is None:
        raise PlotError(
            f"no row of the bare GEMMs stands beside {rows[0]['label']}, {rows[0]['shape']}: {RUN}"
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
    title = f"lolkernels takes {ours['ratio']:.2f}x the bare matrix products, "
    title += f"{name_text(other)} {other['ratio']:.2f}x"
    subtitle = f"A-LoL loss, forward + backward, {sizes(ours['shape'])}; {device}"
    figure, axes = ranked(rows, "ratio", lambda v: f"{v:.2f}x", (title, subtitle), theme)
    end = min(LONGEST_BAR, max(1.2, rows[-1]["ratio"]))
    axes.set_xlim(0, end * 1.2)
    ticks = range(int(end) + 1)
    axes.set_xticks(ticks, [f"{t}x" + ("\nbare GEMMs" if t == 1 else "") for t in ticks])
    for place, row in enumerate(rows):
        if row["ratio"] > end:  # cut, with a gap near its end
            gaps = {"left": [end * 0.93, end], "color": theme.paper}
            axes.barh([place] * 2, [end * 0.012, row["ratio"]], 0.62, **gaps)
    axes.axvline(1, color=theme.ink, linewidth=1.4, linestyle=(0, (3, 2)))
    return Plot(figure, title)


def error_plot(records: list[Record], theme: Theme) -> Plot:
    """The error of a sequence's summed log-prob against float64, bf16 tensors where measured."""

    def half(row: Row) -> bool:
        return bool(row.get("sum_error_nat")) and "bf16" in row["shape"].split()

    try:
        rows, _ = peers_case(records, half, "sum_error_nat")
    except PlotError:
        rows, _ = peers_case(records, lambda row: bool(row.get("sum_error_nat")), "sum_error_nat")
    rows = best_of_each(rows, "sum_error_nat")
    ours = next(row for row in rows if _is(row, OURS))
    others = [row for row in rows if not _is(row, OURS)]
    peer = next((row for row in others if _is(row, EAGER)), others[-1])
    title = (
        f"{ours['shape'].split()[4]}: summed log-prob off by {nat_text(ours['sum_error_nat'])} "
        f"nat,\n{name_text(peer)}'s by {nat_text(peer['sum_error_nat'])}"
    )
    subtitle = f"Worst sequence against float64, {sizes(ours['shape'])}. "
    subtitle += "0.1 nat moves the importance ratio by 10%."
    figure, axes = ranked(rows, "sum_error_nat", nat_text, (title, subtitle), theme)
    errors = [row["sum_error_nat"] for row in rows]
    low = math.floor(math.log10(min(*errors, SUM_NAT)))
    high = math.ceil(math.log10(max(*errors, SUM_NAT * 10)))
    axes.set_xscale("log")
    axes.set_xlim(10.0**low, 10.0 ** (high + 1))
    texts = {0: "1 nat", -3: "1e-3 nat\nthe tests' limit"}
    powers = [k for k in range(low, high + 1) if k % 3 == 0]
    axes.set_xticks([10.0**k for k in powers], [texts.get(k, f"1e{k}") for k in powers])
    axes.minorticks_off()
    axes.axvline(SUM_NAT, color=theme.ink, linewidth=1.4, linestyle=(0, (3, 2)))
    return Plot(figure, title)


PLOTS: dict[str, Callable[[list[Record], Theme], Plot]] = {
    "tokens": lambda found, t: growth(*growth_case(found, "tokens"), t, logarithmic=True),
    "vocab": lambda found, t: growth(*growth_case(found, "vocab"), t, logarithmic=False),
    "floor": floor_plot,
    "error": error_plot,
}


def draw(records: list[Record], name: str, theme: Theme) -> Plot:
    with rc_context(theme.style()):
        return PLOTS[name](records, theme)


def save(plot: Plot, path: Path, theme: Theme) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"Date": None, "Title": plot.alt} if path.suffix == ".svg" else {}
    with rc_context(theme.style()):
        plot.figure.savefig(path, dpi=144, metadata=facts)


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
    add = parser.add_argument
    add("records", nargs="*", type=Path, default=DEFAULT, help="JSON of one device")
    add("--plots", nargs="+", choices=list(PLOTS), default=list(PLOTS))
    add("--out", type=Path, help="start of the files' names (default: plots/<first record> there)")
    add("--format", choices=["svg", "png"], default="svg")
    given = parser.parse_args(argv)
    first = given.records[0]
    out = given.out or first.parent / "plots" / first.stem
    try:
        records = read(given.records)
        made = {n: [draw(records, n, theme) for theme in THEMES] for n in given.plots}
    except PlotError as error:
        print(f"plots: {error}", file=sys.stderr)
        return 2
    for name, plots in made.items():
        paths = [out.with_name(f"{out.name}-{name}-{t.name}.{given.format}") for t in THEMES]
        for plot, path, theme in zip(plots, paths, THEMES, strict=True):
            save(plot, path, theme)
        print(picture(*paths, plots[0].alt))
    return 0
