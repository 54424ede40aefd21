"""How the cost grows with tokens, vocabulary, hidden size and sequence length.

python benchmarks/run.py scaling --axis all --out benchmarks/results/cpu-scaling
python benchmarks/run.py scaling --axis vocab --shape 512,256,32768,64 --points 32768 65536 131072

One size of a shape changes, the others stay. At each point lolkernels runs in interleaved rounds
with the bare GEMMs (the floor) and eager PyTorch, as far as these two, which hold all logits, fit
into the device's memory. Memory is measured too, beside the library's formula. Over the points of
an axis a line is fitted: time = intercept + slope * size.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import library
import measure
import report
import torch
from measure import Device, Entry
from shapes import Shape, parse_shape

OP = "linear_loss"
CONTESTANTS = ("lolkernels", "gemms", "eager")
LOGITS_SHARE = 1 / 16  # of the device's memory: eager needs the fp32 logits several times over
Case = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    field: str  # of Shape
    unit: str  # one step of it
    base: Shape
    points: tuple[int, ...]

    def shapes(self) -> list[Shape]:
        return [replace(self.base, **{self.field: point}) for point in self.points]


def doubling(first: int, last: int) -> tuple[int, ...]:
    return tuple(first << k for k in range((last // first).bit_length()))


def axes(dtype: str, *sizes: tuple[int, int, int, int]) -> dict[str, Axis]:
    """Each from its first point, which the shape names, to where the point is told."""
    tokens, vocab, hidden, length = (Shape(*four, dtype) for four in sizes)
    lengths = doubling(length.seq_len, length.tokens)
    return {
        "tokens": Axis("tokens", "token", tokens, doubling(tokens.tokens, 131072)),
        "vocab": Axis("vocab", "column", vocab, (32768, 65536, 131072, 196608, 262144)),
        "hidden": Axis("hidden", "unit", hidden, doubling(hidden.hidden, 16 * hidden.hidden)),
        "seq-len": Axis("seq_len", "token", length, lengths),
    }


# On a CPU a narrow head, so that 131072 tokens take seconds and not minutes.
ON_CPU = (
    (256, 256, 8192, 128),
    (512, 256, 32768, 128),
    (512, 128, 32768, 128),
    (4096, 256, 8192, 64),
)
ON_CARD = (
    (256, 4096, 128256, 256),
    (8192, 4096, 32768, 256),
    (8192, 512, 128256, 256),
    (16384, 4096, 128256, 64),
)
AXES = {"cpu": axes("fp32", *ON_CPU), "cuda": axes("bf16", *ON_CARD)}


def fit(sizes: list[float], times: list[float]) -> dict[str, float]:
    """Least squares of the relative errors: time = intercept + slope * size.

    Each point is weighted by 1 / time^2, since a measured time is off by a share of itself: without
    it the largest point alone would decide. R^2 is weighted alike.

    Raises:
        ValueError: fewer than two sizes.
    """
    if len(set(sizes)) < 2:
        raise ValueError(f"a line needs two sizes or more; got {sorted(set(sizes))}")
    points = [(1 / time**2, size, time) for size, time in zip(sizes, times, strict=True)]
    total = sum(w for w, _, _ in points)
    x0, t0 = (sum(p[0] * p[i] for p in points) / total for i in (1, 2))
    spread = sum(w * (x - x0) ** 2 for w, x, _ in points)
    slope = sum(w * (x - x0) * (t - t0) for w, x, t in points) / spread
    intercept = t0 - slope * x0
    left = sum(w * (t - intercept - slope * x) ** 2 for w, x, t in points)
    whole = sum(w * (t - t0) ** 2 for w, _, t in points)
    return {"slope": slope, "intercept": intercept, "r2": 1 - left / whole if whole else 1.0}


def of(case: Case, contestant: str) -> list[dict[str, Any]]:
    return [row for row in case["rows"] if row["contestant"] == contestant]


def lines(case: Case) -> list[dict[str, Any]]:
    """A fitted line for each contestant with two points or more; milliseconds and nanoseconds."""
    found = []
    for name in CONTESTANTS:
        if len(rows := of(case, name)) > 1:
            line = fit([row["x"] for row in rows], [row["median_ms"] for row in rows])
            sizes = {"slope_ns": 1e6 * line["slope"], "intercept_ms": line["intercept"]}
            found.append({"contestant": name, "points": len(rows), **sizes, "r2": line["r2"]})
    return found


def flatness(case: Case) -> dict[str, Any] | None:
    """The largest extra memory over the smallest, from the point on where chunks are full."""
    rows = [r for r in of(case, "lolkernels") if r["full_chunks"] and r["extra_bytes"] is not None]
    if len(rows) < 2:
        return None
    extra = [row["extra_bytes"] for row in rows]
    return {"from": rows[0]["x"], "to": rows[-1]["x"], "ratio": max(extra) / max(1, min(extra))}


def entries_at(shape: Shape, frozen_head: bool, device: torch.device) -> list[Entry]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    fits = 4 * shape.tokens * shape.vocab <= LOGITS_SHARE * memory
    names = CONTESTANTS if fits else CONTESTANTS[:1]
    return [Entry(n, n, OP, shape, frozen_head, memory=n != "gemms") for n in names]


def measure_point(entries: list[Entry], rounds: int, device: Device) -> list[dict[str, Any]]:
    """Eager goes out where it fails its check (bf16 logits of a long sequence) or its memory.

    Raises:
        RuntimeError: lolkernels or the floor fails.
    """
    found = []
    for row in measure.time_entries(entries, rounds, device):
        if why := "; ".join(row.wrong) or row.error or row.skipped:
            if row.contestant != "eager":
                raise RuntimeError(f"{row.label} ({row.shape}): {why}")
            print(f"without eager: {why}", file=sys.stderr)
        else:
            found.append(asdict(row))
    return found


def measure_axis(name: str, axis: Axis, rounds: int, frozen_head: bool, device: Device) -> Case:
    rows = []
    for point, shape in zip(axis.points, axis.shapes(), strict=True):
        size = shape.itemsize if device.kind == "cuda" else 4
        held = library.kept_rows(shape.vocab, shape.hidden, size, None, device.device)
        whole = shape.seq_len <= held  # a longer sequence goes tile by tile, without a chunk
        for row in measure_point(entries_at(shape, frozen_head, device.device), rounds, device):
            more = {"x": point, "full_chunks": whole and held <= shape.scored}
            more |= {} if whole else {"formula_bytes": None}
            rows.append({**row, "label": f"{row['contestant']} {axis.field}={point}", **more})
        print(f"{name} {point}: {rows[-1]['shape']}", file=sys.stderr, flush=True)
    head = ", frozen head" if frozen_head else ""
    sizes = ("tokens", "hidden", "vocab", "seq_len", "dtype")
    case: Case = {
        "title": f"Cost against {name}: {OP} (A-LoL), forward + backward{head}",
        "axis": name,
        "field": axis.field,
        "unit": axis.unit,
        "base": {key: getattr(axis.base, key) for key in sizes},
        "frozen_head": frozen_head,
        "floor": f"gemms {axis.field}={axis.points[0]}",
        "rows": rows,
    }
    return {**case, "lines": lines(case), "flatness": flatness(case)}


def _slope(nanoseconds: float) -> str:
    for unit, size in (("ms", 1e6), ("µs", 1e3)):
        if abs(nanoseconds) >= size:
            return f"{nanoseconds / size:.3f} {unit}"
    return f"{nanoseconds:.2f} ns"


def table(case: Case) -> str:
    """One axis: a row a point, then the fitted lines and how flat the memory is."""

    def cell(row: dict[str, Any] | None, key: str, scale: float = 1.0) -> str:
        return "" if row is None or row.get(key) is None else f"{row[key] / scale:.1f}"

    points = []
    for x in dict.fromkeys(row["x"] for row in case["rows"]):
        here = {row["contestant"]: row for row in case["rows"] if row["x"] == x}
        ours, floor, eager = (here.get(name) for name in CONTESTANTS)
        ratio = f"{ours['median_ms'] / floor['median_ms']:.3f}" if ours and floor else ""
        times = [cell(row, "median_ms") for row in (ours, floor, eager)]
        memory = [(ours, "extra_bytes"), (ours, "formula_bytes"), (eager, "extra_bytes")]
        mib = [cell(row, key, report.MIB) for row, key in memory]
        points.append([x, *times[:2], ratio, times[2], *mib])
    heads = [case["axis"], "lolkernels ms", "bare GEMMs ms", "x GEMMs", "eager ms", "extra MiB"]
    base = [f"{k.replace('_', ' ')} {v}" for k, v in case["base"].items() if k != case["field"]]
    parts = [f"### {case['title']}", ", ".join(base) + "."]
    parts.append(report.grid([*heads, "formula MiB", "eager extra MiB"], points, words=0))
    floor_slope = next((f["slope_ns"] for f in case["lines"] if f["contestant"] == "gemms"), None)
    fitted = []
    for line in case["lines"]:
        # Nothing should depend on the sequence's length: a ratio of zeros.
        shown = floor_slope and case["axis"] != "seq-len"
        ratio = f"{line['slope_ns'] / floor_slope:.3f}" if shown else ""
        cells = [line["contestant"].replace("gemms", "bare GEMMs"), line["points"]]
        cells += [_slope(line["slope_ns"]), ratio, f"{line['intercept_ms']:.2f}"]
        fitted.append([*cells, f"{line['r2']:.4f}"])
    if fitted:
        heads = [
            "fitted line",
            "points",
            f"a {case['unit']} costs",
            "x GEMMs",
            "intercept ms",
            "R²",
        ]
        parts.append(report.grid(heads, fitted))
    if flat := case["flatness"]:
        text = (
            f"Extra memory from {flat['from']} to {flat['to']} (chunks are full): the largest is "
        )
        parts.append(f"{text}{flat['ratio']:.3f} x the smallest.")
    return "\n\n".join(parts)


def markdown(record: dict[str, Any]) -> str:
    about = (
        "# Scaling\n\nThe bare GEMMs and eager hold all logits and stop where these pass a "
        "sixteenth of the memory. `x GEMMs` is a ratio of medians. The formula of the extra memory "
        "is that of chunks of whole sequences, and is left out where one sequence is longer than a "
        "chunk. The lines are fitted by least squares of the relative errors.\n\n#"
    )
    return about + report.markdown(record, table)


def axes_of(given: argparse.Namespace) -> Iterator[tuple[str, Axis]]:
    """The axes asked for, with the base shape and the points asked for.

    Raises:
        ValueError: --points for several axes, or points that do not fit the shape.
    """
    known = AXES[given.device]
    names = list(known) if given.axis == "all" else [given.axis]
    if given.points and len(names) > 1:
        raise ValueError("--points needs one --axis")
    for name in names:
        axis = known[name]
        if given.shape:
            axis = replace(axis, base=replace(parse_shape(given.shape), dtype=axis.base.dtype))
        if given.points:
            axis = replace(axis, points=tuple(sorted(given.points)))
        axis.shapes()  # raises where a point does not fit
        yield name, axis


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.parser(__doc__)
    add = parser.add_argument
    add("--axis", choices=[*AXES["cpu"], "all"], default="all")
    add("--shape", metavar="T,D,V,L", help="the sizes that stay, or a name as in run.py")
    add("--points", type=int, nargs="+", help="sizes of the axis")
    add("--frozen-head", action="store_true", help="no gradient for the weight")
    given = report.parse(parser, argv)
    try:
        chosen = list(axes_of(given))
    except ValueError as error:
        parser.error(str(error))
    run = partial(measure_axis, frozen_head=given.frozen_head, device=report.device_of(given))
    cases = (run(name, axis, given.rounds) for name, axis in chosen)
    return report.publish(given, ["scaling", *argv], cases, markdown, table)
