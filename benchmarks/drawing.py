"""What every plot of plots.py is made of: themes, headings, axes, ticks, labels at lines' ends.

Sizes are in points. A figure is 380 wide, about what a phone shows of a README.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH, LEFT = 380, 16
TITLE, BODY, SMALL = 15, 11.5, 10.5
OURS, FLOOR, EAGER = "lolkernels", "gemms", "eager"
NAMES = {FLOOR: "bare GEMMs", EAGER: "eager PyTorch", "lol-rl": "the A-LoL authors' way"}
SHORT = NAMES | {EAGER: "eager"}  # at the end of a line
# Text as paths: the same on every machine. The salt and the missing date keep the bytes the same.
STYLE = {"svg.fonttype": "path", "svg.hashsalt": "lolkernels", "font.family": "DejaVu Sans"}


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
        {OURS: "#0072b2", EAGER: "#c04d00", FLOOR: "#59636e"},
    ),
    Theme(
        "dark",
        "#0d1117",
        "#f0f6fc",
        "#9198a1",
        "#3d444d",
        {OURS: "#56b4e9", EAGER: "#e69f00", FLOOR: "#9198a1"},
    ),
)


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


def balanced(text: str, width: int) -> str:
    """Breaks into as few lines as the width allows, then as narrow as that number allows."""
    fewest = len(textwrap.wrap(text, width))
    while len(textwrap.wrap(text, width - 1)) == fewest:
        width -= 1
    return textwrap.fill(text, width)


def canvas(height: float, title: str, subtitle: str, theme: Theme) -> Figure:
    """A figure with its heading, and `height` points below it."""
    title = "\n".join(balanced(part, 39) for part in title.split("\n"))
    subtitle = textwrap.fill(subtitle, 55)
    heading = 14 + 20 * (1 + title.count("\n")) + 14 * (1 + subtitle.count("\n"))
    figure = Figure(figsize=(WIDTH / 72, (height + heading) / 72), dpi=72, facecolor=theme.paper)
    total = height + heading

    def put(text: str, top: float, **style: Any) -> None:
        figure.text(LEFT / WIDTH, 1 - top / total, text, va="top", linespacing=1.25, **style)

    put(title, 12, size=TITLE, weight="bold", color=theme.ink)
    put(subtitle, 16 + 20 * (1 + title.count("\n")), size=SMALL, color=theme.muted)
    return figure


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
        # A line that ends first has its name beside its end, or under it where another goes on.
        others = [place for place, other in zip(places, at_edge, strict=True) if other != name]
        under = name not in at_edge and any(abs(place - other) < 16 for other in others)
        axes.annotate(
            SHORT.get(name, name),
            (x, place / height),
            xycoords="axes fraction",
            xytext=(0, -7) if under else (9, 0),
            textcoords="offset points",
            ha="right" if under else "left",
            va="top" if under else "center",
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
