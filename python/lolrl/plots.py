"""The pictures of an experiment as PNG: rewards, reward against divergence, training curves.

Every function takes plain rows (dicts), writes one file and returns its path. matplotlib is
imported at the first call and draws without a display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

_GREY = "0.55"
_CURVES = (
    ("eval_reward", "reward on validation prompts"),
    ("loss", "loss"),
    # The mean ratio itself spans twenty orders of magnitude: one row can own it.
    ("clip_ratio", "share of ratios outside the clip"),
    ("logps/mean", "mean log-prob of the training rows (nats per token)"),
)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _colors(names: Sequence[str]) -> dict[str, Any]:
    """One colour a name; the reference and the control in grey, so that the methods stand out."""
    from matplotlib import colormaps

    palette = colormaps["tab10"].colors  # type: ignore[attr-defined]
    methods = [name for name in names if name not in ("sft", "nll")]
    colors: dict[str, Any] = {name: palette[i % 10] for i, name in enumerate(methods)}
    return colors | {"sft": "0.2", "nll": _GREY}


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def _checked(rows: Sequence[Row], needed: Sequence[str]) -> Sequence[Row]:
    if not rows:
        raise ValueError("rows is empty: nothing to draw")
    for row in rows:
        missing = [key for key in needed if row.get(key) is None]
        if missing:
            raise ValueError(f"row {row.get('name')!r} has no {', '.join(missing)}")
    return rows


def plot_rewards(rows: Sequence[Row], path: str | Path, *, title: str = "") -> Path:
    """Mean reward of each method with its 95% interval, and beside it at matched length.

    rows: dicts with `name, reward, reward_low, reward_high` and, where measured, `matched,
    matched_low, matched_high`. The dashed line is the first row (the reference).
    Raises ValueError on no rows, or a row without one of the first four.
    """
    _checked(rows, ("name", "reward", "reward_low", "reward_high"))
    figure, axes = _figure(8.0, 1.4 + 0.42 * len(rows))
    axis = axes[0, 0]
    colors = _colors([row["name"] for row in rows])
    for place, row in enumerate(rows):
        for key, offset, filled in (("reward", -0.16, True), ("matched", 0.16, False)):
            mean = row.get(key)
            if mean is None:
                continue
            spread = [[mean - row[f"{key}_low"]], [row[f"{key}_high"] - mean]]
            color = colors[row["name"]]
            axis.errorbar(
                mean,
                place + offset,
                xerr=spread,
                fmt="o",
                capsize=3,
                markersize=6,
                color=color,
                markerfacecolor=color if filled else "white",
            )
        axis.annotate(
            f"{row['reward']:.3f}",
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
        )
    axis.axvline(rows[0]["reward"], color=_GREY, linestyle="--", linewidth=1)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel(
        "mean reward on held-out prompts, 95% interval (filled: as is, open: at matched length)"
    )
    axis.set_title(title or "Reward by method", loc="left")
    return _save(figure, path)


def plot_divergence(rows: Sequence[Row], path: str | Path, *, title: str = "") -> Path:
    """Mean reward of each method against its divergence from the reference (nats per sequence).

    rows: dicts with `name, reward, reward_low, reward_high, divergence`.
    Raises ValueError on no rows or a missing figure.
    """
    _checked(rows, ("name", "reward", "reward_low", "reward_high", "divergence"))
    figure, axes = _figure(7.6, 4.4)
    axis = axes[0, 0]
    colors = _colors([row["name"] for row in rows])
    for row in rows:
        axis.errorbar(
            row["divergence"],
            row["reward"],
            yerr=[[row["reward"] - row["reward_low"]], [row["reward_high"] - row["reward"]]],
            fmt="o",
            capsize=3,
            markersize=7,
            color=colors[row["name"]],
            label=row["name"],
        )
    figure.legend(loc="outside right center", frameon=False)
    axis.set_xlabel("mean log π − log π_ref of own samples (nats per sequence)")
    axis.set_ylabel("mean reward, 95% interval")
    axis.set_title(title or "Reward against divergence from the reference", loc="left")
    return _save(figure, path)


def plot_curves(logs: Mapping[str, Sequence[Row]], path: str | Path, *, title: str = "") -> Path:
    """Training curves over updates, a line per method: reward, loss, clipped share, log-prob.

    logs: method -> rows of its JSON Lines log, each with `step` and any of `eval_reward, loss,
    clip_ratio, logps/mean`. A panel that no method has is left out.
    Raises ValueError where no row has any of them.
    """
    panels = [
        (key, label)
        for key, label in _CURVES
        if any(row.get(key) is not None for rows in logs.values() for row in rows)
    ]
    if not panels:
        raise ValueError(f"logs hold none of {[key for key, _ in _CURVES]}: nothing to draw")
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = _figure(5.2 * columns, 3.4 * lines, lines, columns)
    colors = _colors(list(logs))
    for axis, (key, label) in zip(axes.flat, panels, strict=False):
        for name, rows in logs.items():
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                marker = "o" if len(points) < 12 else None
                axis.plot(
                    *zip(*points, strict=True),
                    color=colors[name],
                    label=name,
                    linewidth=1.4,
                    marker=marker,
                    markersize=3,
                )
        axis.set_xlabel("update")
        axis.set_title(label, loc="left", fontsize=10)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return _save(figure, path)
