"""How the cost grows with tokens, vocabulary, hidden size and sequence length.

python benchmarks/scaling.py --axis all --out benchmarks/results/cpu-scaling
python benchmarks/scaling.py --axis vocab --shape 512,256,32768,64 --points 32768 65536 131072

One size of a shape changes, the others stay. At each point lolkernels runs in interleaved rounds
with the bare GEMMs (the floor) and eager PyTorch, as far as these two, which hold all logits, fit
into the device's memory. Memory is measured too, beside the library's formula. Over the points of
an axis a line is fitted: time = intercept + slope * size.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import library
import measure
import report
import torch
from measure import Device, Entry
from shapes import Shape

OP = "linear_loss"
CONTESTANTS = ("lolkernels", "gemms", "eager")
WHOLE_LOGITS = ("gemms", "eager")
LOGITS_SHARE = 1 / 16  # of the device's memory: eager needs the fp32 logits several times over


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


VOCABULARIES = (32768, 65536, 131072, 196608, 262144)


def axes(dtype: str, tokens: Shape, vocab: Shape, hidden: Shape, length: Shape) -> dict[str, Axis]:
    """Each from its first point, which the shape names, to where the point is told."""
    bases = [replace(base, dtype=dtype) for base in (tokens, vocab, hidden, length)]
    last_hidden, last_length = 16 * hidden.hidden, length.tokens
    return {
        "tokens": Axis("tokens", "token", bases[0], doubling(tokens.tokens, 131072)),
        "vocab": Axis("vocab", "column", bases[1], VOCABULARIES),
        "hidden": Axis("hidden", "unit", bases[2], doubling(hidden.hidden, last_hidden)),
        "seq-len": Axis("seq_len", "token", bases[3], doubling(length.seq_len, last_length)),
    }


AXES = {  # on a CPU a narrow head, so that 131072 tokens take seconds and not minutes
    "cpu": axes(
        "fp32",
        Shape(256, 256, 8192, 128),
        Shape(512, 256, 32768, 128),
        Shape(512, 128, 32768, 128),
        Shape(4096, 256, 8192, 64),
    ),
    "cuda": axes(
        "bf16",
        Shape(256, 4096, 128256, 256),
        Shape(8192, 4096, 32768, 256),
        Shape(8192, 512, 128256, 256),
        Shape(16384, 4096, 128256, 64),
    ),
}


# --- what is made of the measurements -------------------------------------------------------------


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


def of(case: dict[str, Any], contestant: str) -> list[dict[str, Any]]:
    return [row for row in case["rows"] if row["contestant"] == contestant]


def lines(case: dict[str, Any]) -> list[dict[str, Any]]:
    """A fitted line for each contestant with two points or more; milliseconds and nanoseconds."""
    found = []
    for name in CONTESTANTS:
        if len(rows := of(case, name)) > 1:
            line = fit([row["x"] for row in rows], [row["median_ms"] for row in rows])
            sizes = {"slope_ns": 1e6 * line["slope"], "intercept_ms": line["intercept"]}
            found.append({"contestant": name, "points": len(rows), **sizes, "r2": line["r2"]})
    return found


def flatness(case: dict[str, Any]) -> dict[str, Any] | None:
    """The largest extra memory over the smallest, from the point on where chunks are full."""
    rows = [r for r in of(case, "lolkernels") if r["full_chunks"] and r["extra_bytes"] is not None]
    if len(rows) < 2:
        return None
    extra = [row["extra_bytes"] for row in rows]
    return {"from": rows[0]["x"], "to": rows[-1]["x"], "ratio": max(extra) / max(1, min(extra))}


# --- measuring ------------------------------------------------------------------------------------


def entries_at(shape: Shape, frozen_head: bool, device: torch.device) -> list[Entry]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    fits = 4 * shape.tokens * shape.vocab <= LOGITS_SHARE * memory
    names = [name for name in CONTESTANTS if fits or name not in WHOLE_LOGITS]
    return [Entry(name, name, OP, shape, frozen_head) for name in names]


def measure_point(entries: list[Entry], rounds: int, device: Device) -> list[dict[str, Any]]:
    """Times in interleaved rounds; on a CPU, then the memory of all but the floor.

    Eager goes out where it fails its check (bf16 logits of a long sequence) or its memory.

    Raises:
        RuntimeError: lolkernels or the floor fails.
    """
    found = []
    for entry, row in zip(entries, measure.time_entries(entries, rounds, device), strict=True):
        if why := "; ".join(row.wrong) or row.error or row.skipped:
            if entry.contestant != "eager":
                raise RuntimeError(f"{row.label} ({row.shape}): {why}")
            print(f"without eager: {why}", file=sys.stderr)
            continue
        if device.kind == "cpu" and entry.contestant != "gemms":
            row.extra_bytes = measure.peak_memory(entry)
            row.formula_bytes = measure.documented_bytes(entry)
        found.append(asdict(row))
    return found


def measure_axis(
    name: str, axis: Axis, rounds: int, frozen_head: bool, device: Device
) -> dict[str, Any]:
    rows = []
    for point, shape in zip(axis.points, axis.shapes(), strict=True):
        size = shape.itemsize if device.device.type == "cuda" else 4
        held = library.kept_rows(shape.vocab, shape.hidden, size, None, device.device)
        whole = shape.seq_len <= held  # a longer sequence goes tile by tile, without a chunk
        full = whole and held <= shape.scored
        for row in measure_point(entries_at(shape, frozen_head, device.device), rounds, device):
            label = f"{row['contestant']} {axis.field}={point}"
            rows.append({**row, "label": label, "x": point, "full_chunks": full})
            if not whole:
                rows[-1]["formula_bytes"] = None
        print(f"{name} {point}: {rows[-1]['shape']}", file=sys.stderr, flush=True)
    head = ", frozen head" if frozen_head else ""
    sizes = ("tokens", "hidden", "vocab", "seq_len", "dtype")
    case: dict[str, Any] = {
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


# --- the report -----------------------------------------------------------------------------------


def _slope(nanoseconds: float) -> str:
    for unit, size in (("ms", 1e6), ("µs", 1e3)):
        if abs(nanoseconds) >= size:
            return f"{nanoseconds / size:.3f} {unit}"
    return f"{nanoseconds:.2f} ns"


def table(case: dict[str, Any]) -> str:
    """One axis: a row a point, then the fitted lines and how flat the memory is."""

    def cell(row: dict[str, Any] | None, key: str, scale: float = 1.0) -> str:
        return "" if row is None or row.get(key) is None else f"{row[key] / scale:.1f}"

    base = {k: v for k, v in case["base"].items() if k != case["field"]}
    out = [
        f"### {case['title']}",
        "",
        ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in base.items()) + ".",
        "",
        f"| {case['axis']} | lolkernels ms | bare GEMMs ms | x GEMMs | eager ms | extra MiB "
        "| formula MiB | eager extra MiB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for x in dict.fromkeys(row["x"] for row in case["rows"]):
        here = {row["contestant"]: row for row in case["rows"] if row["x"] == x}
        ours, floor, eager = (here.get(name) for name in CONTESTANTS)
        ratio = f"{ours['median_ms'] / floor['median_ms']:.3f}" if ours and floor else ""
        cells = [str(x), cell(ours, "median_ms"), cell(floor, "median_ms"), ratio]
        cells += [cell(eager, "median_ms"), cell(ours, "extra_bytes", report.MIB)]
        cells.append(cell(ours, "formula_bytes", report.MIB))
        out.append(f"| {' | '.join([*cells, cell(eager, 'extra_bytes', report.MIB)])} |")
    floor_slope = next((f["slope_ns"] for f in case["lines"] if f["contestant"] == "gemms"), None)
    if case["lines"]:
        unit = f"a {case['unit']} costs"
        out += ["", f"| fitted line | points | {unit} | x GEMMs | intercept ms | R² |"]
        out += ["|---|---:|---:|---:|---:|---:|"]
    for line in case["lines"]:
        name = "bare GEMMs" if line["contestant"] == "gemms" else line["contestant"]
        # Nothing should depend on the sequence's length: a ratio of zeros.
        shown = floor_slope and case["axis"] != "seq-len"
        cells = [name, str(line["points"]), _slope(line["slope_ns"])]
        cells += [f"{line['slope_ns'] / floor_slope:.3f}" if shown else ""]
        out.append(f"| {' | '.join(cells)} | {line['intercept_ms']:.2f} | {line['r2']:.4f} |")
    if flat := case["flatness"]:
        out += ["", f"Extra memory from {flat['from']} to {flat['to']} (chunks are full): the "]
        out[-1] += f"largest is {flat['ratio']:.3f} x the smallest."
    return "\n".join(out)


def markdown(record: dict[str, Any]) -> str:
    about = (
        "# Scaling\n\nThe bare GEMMs and eager hold all logits and stop where these pass a "
        "sixteenth of the memory. `x GEMMs` is a ratio of medians. The formula of the extra memory "
        "is that of chunks of whole sequences, and is left out where one sequence is longer than a "
        "chunk. The lines are fitted by least squares of the relative errors.\n"
    )
    parts = [about + "\n#" + report.head(record), *map(table, record["cases"])]
    return "\n\n".join(parts) + "\n"


def axes_of(arguments: argparse.Namespace) -> dict[str, Axis]:
    """The axes asked for, with the base shape and the points asked for.

    Raises:
        ValueError: --points for several axes, or points that do not fit the shape.
    """
    known = AXES[arguments.device]
    names = list(known) if arguments.axis == "all" else [arguments.axis]
    if arguments.points and len(names) > 1:
        raise ValueError("--points needs one --axis")
    chosen = {}
    for name in names:
        axis = known[name]
        if arguments.shape:
            axis = replace(axis, base=replace(arguments.shape, dtype=axis.base.dtype))
        if arguments.points:
            axis = replace(axis, points=tuple(sorted(arguments.points)))
        axis.shapes()  # raises where a point does not fit
        chosen[name] = axis
    return chosen


def shape_of(text: str) -> Shape:
    try:
        return Shape(*(int(size) for size in text.split(",")))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"give T,D,V,seq_len; got {text!r} ({error})") from None


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--axis", choices=[*AXES["cpu"], "all"], default="all")
    add("--device", choices=list(AXES), default="cpu")
    add("--shape", type=shape_of, metavar="T,D,V,L", help="the sizes that stay")
    add("--points", type=int, nargs="+", help="sizes of the axis")
    add("--frozen-head", action="store_true", help="no gradient for the weight")
    add("--rounds", type=int, default=5, help="interleaved rounds a point")
    add("--threads", type=int, help="torch threads (default: torch's own choice)")
    add("--out", type=Path, help="write OUT.json and OUT.md")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device (try --device cpu)")
    try:
        arguments.axes = axes_of(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device: Device = measure.Cuda() if arguments.device == "cuda" else measure.Cpu()
    shown = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "benchmarks/scaling.py", *shown])
    record = report.new(report.environment(device.device, command), arguments.rounds)
    for name, axis in arguments.axes.items():
        case = measure_axis(name, axis, arguments.rounds, arguments.frozen_head, device)
        record["cases"].append(case)
        print(table(case), end="\n\n", flush=True)
        if arguments.out:  # what is there stays, should a later axis fail
            print("wrote", *report.save(record, arguments.out, markdown))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
