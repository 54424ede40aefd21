"""Benchmarks of the kernels: time, floor, peers and peak memory, after a check against float64.

python benchmarks/run.py linear_loss --shape gpt2 --peer eager lol-rl "torch lce" --memory
python benchmarks/run.py linear_loss --shape qwen3-0.6b --lengths 16-256 --dtype bf16 --pass forward
python benchmarks/run.py score --shape 1024,768,50257,128 --backend cpu reference
python benchmarks/run.py --suite cpu --out benchmarks/results/cpu
python benchmarks/run.py --suite small                  (make bench: a few minutes)
python benchmarks/run.py compare main                   (or scaling, train, plots, card; --help)
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import measure
import peers
import report
from measure import Device, Entry
from report import Goal
from shapes import DTYPES, SHAPES, Shape, parse_shape

MODES = ("card", "compare", "plots", "scaling", "train")  # a file each; card is a script, too
OPS = (*peers.OPS, "logprob")
TITLES = {
    "linear_loss": "linear_loss (A-LoL)",
    "linear_logprob": "linear_logprob",
    "score": "linear_logprob without gradient",
    "logprob": "logprob on given logits, forward + backward",
}
PASSES = {"both": ", forward + backward", "forward": ", forward", "backward": ", backward"}
FEW = ["eager", "lol-rl"]


@dataclass
class Case:
    title: str
    entries: list[Entry]
    floors: list[str] = field(default_factory=lambda: ["gemms"])
    goals: list[Goal] = field(default_factory=list)


def title_of(op: str, frozen_head: bool = False, phase: str = "both") -> str:
    passes = "" if op in ("score", "logprob") else PASSES[phase]
    return f"{TITLES[op]}{passes}{', frozen head' if frozen_head else ''}"


def single(
    op: str,
    shape: Shape,
    names: list[str] | None = None,
    *,
    backends: list[str] | None = None,
    floors: list[str] | None = None,
    goals: list[Goal] | None = None,
    **options: Any,  # frozen_head, memory, phase: of each Entry
) -> Case:
    """One op at one shape: lolkernels beside its floor and peers."""
    floors = ["copy"] if op == "logprob" else floors or ["gemms"]
    if names is None:
        names = ["eager"] if op == "logprob" else ["eager", "torch lce"]
    make = partial(Entry, op=op, shape=shape, **options)
    ours = [(f"lolkernels {b}", b) for b in backends] if backends else [("lolkernels", None)]
    entries = [make(label, "lolkernels", backend=b) for label, b in ours]
    entries += [make(name, name, memory=False) for name in floors]
    entries += [make(name, name) for name in names]
    title = title_of(op, options.get("frozen_head", False), options.get("phase", "both"))
    return Case(f"{title}, {shape}", entries, floors, goals or [])


def formula(text: str, row: str = "lolkernels") -> Goal:
    return Goal(f"{text}: memory, distance from the formula", row, 0.05, of="formula")


def against(names: list[str], text: str = "", row: str = "lolkernels") -> list[Goal]:
    """To be faster than each of these peers."""
    return [Goal(f"linear_loss against {name}{text}", row, 1.0, name) for name in names]


def cpu_suite(shape: Shape) -> Iterator[Case]:
    """The CPU rows: each op against its floor and the peers, bf16, prompt rows, mixed lengths."""
    on_cpu = [name for name, peer in peers.PEERS.items() if not peer.gpu_only]
    policies = [name for name in on_cpu if name.startswith("torch lce ")]  # seconds a call
    everyone = [name for name in on_cpu if name not in policies]
    with_memory = partial(single, memory=True)
    case = with_memory("linear_loss", shape, everyone)
    # The compiled peers hold the logits of all rows: what that memory buys here.
    whole = "lolkernels, one chunk"
    case.entries.insert(
        1, replace(case.entries[0], label=whole, budget=4 * shape.tokens * shape.vocab)
    )
    case.goals = [
        *against([name for name in everyone if "compile" in name], f", {whole}", whole),
        Goal("linear_loss against three bare GEMMs", "lolkernels", 1.05, "gemms"),
        *against(everyone),
        Goal("linear_loss: memory against eager's", "lolkernels", 0.12, "eager", "memory"),
        formula("linear_loss"),
    ]
    yield case
    few_rows = replace(shape, tokens=2 * shape.seq_len)
    yield single("linear_loss", few_rows, policies, goals=against(policies))
    goals = [
        Goal("frozen head against two bare GEMMs", "lolkernels", 1.05, "gemms"),
        Goal("frozen head: memory against eager's", "lolkernels", 0.02, "eager", "memory"),
        formula("frozen head"),
    ]
    yield with_memory("linear_loss", shape, FEW, frozen_head=True, goals=goals)
    for op, name, gemms in (
        ("score", "scoring", "one bare GEMM"),
        ("linear_logprob", "linear_logprob", "three bare GEMMs"),
    ):
        goals = [Goal(f"{name} against {gemms}", "lolkernels", 1.10, "gemms"), formula(name)]
        yield with_memory(op, shape, FEW, goals=goals)
    for phase in ("forward", "backward"):
        yield single("linear_loss", shape, FEW, phase=phase)
    yield bf16_case(shape)
    yield prompt_case(shape)
    mixed = replace(shape, shortest=max(1, shape.seq_len // 8), seq_len=2 * shape.seq_len)
    yield single("linear_loss", mixed, ["eager"])
    for name, tokens in (("smollm2", 512), ("qwen3-0.6b", 256)):
        yield with_memory("linear_loss", replace(SHAPES[name], tokens=tokens), ["eager"])
    yield single("logprob", shape)


def small_suite(shape: Shape) -> list[Case]:
    """The same at one shape: times alone, in a few minutes."""
    found = []
    for case in cpu_suite(shape):
        entries = [replace(entry, memory=False) for entry in case.entries]
        if all(entry.shape.vocab == shape.vocab for entry in entries):
            found.append(replace(case, entries=entries, goals=[]))
    return found


def bf16_case(shape: Shape) -> Case:
    op, half = "linear_loss", replace(shape, dtype="bf16")
    others = ("lol-rl", "verl recompute", "trl", "liger scaled")
    entries = [Entry(f"{n} bf16", n, op, half, memory=True) for n in ("lolkernels", "eager")]
    entries += [Entry(f"{n} bf16", n, op, half) for n in others]
    entries += [Entry(f"{n} fp32", n, op, shape) for n in ("lolkernels", "eager")]
    entries.append(Entry("gemms", "gemms", op, shape))
    goals = [
        Goal("bf16 against fp32 tensors", "lolkernels bf16", 1.15, "lolkernels fp32"),
        formula("bf16", "lolkernels bf16"),
    ]
    return Case(f"{title_of(op)}, bf16 tensors beside fp32", entries, goals=goals)


def prompt_case(shape: Shape) -> Case:
    op, half = "linear_loss", replace(shape, prompt_share=0.5)
    entries = [
        Entry("all rows", "lolkernels", op, shape),
        Entry("half prompt", "lolkernels", op, half),
    ]
    goals = [Goal("half the rows prompt, against all", "half prompt", 0.55, "all rows")]
    return Case(f"{title_of(op)}, half of each sequence is prompt", entries, ["all rows"], goals)


def run_case(case: Case, rounds: int, device: Device) -> dict[str, Any]:
    rows = measure.time_entries(case.entries, rounds, device)
    return report.case(case.title, rows, case.floors, goals=case.goals)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = report.parser(__doc__)
    add = parser.add_argument
    add("op", nargs="?", choices=OPS, default="linear_loss", metavar="OP")
    add("--shape", default="gpt2", help=f"T,D,V,seq_len or one of {', '.join(SHAPES)}")
    add("--tokens", type=int, help="T, in place of the shape's")
    add("--lengths", help="of sequences: N, or SHORTEST-LONGEST for a mix")
    add("--dtype", choices=list(DTYPES), default="fp32")
    add("--frozen-head", action="store_true", help="no gradient for the weight")
    add("--prompt-share", type=float, default=0.0, help="rows without loss, 0 to 1")
    add("--pass", dest="phase", choices=measure.PHASES, default="both", help="what is timed")
    add("--backend", nargs="+", help="of lolkernels (default: its own choice)")
    names = f"all, or some of {', '.join(peers.PEERS)} (default: a few)"
    add("--peer", nargs="*", choices=["all", *peers.PEERS], metavar="NAME", help=names)
    add("--memory", action="store_true", help="measure peak memory too")
    suites = "every CPU row instead of one op; small: at one small shape, times alone"
    add("--suite", choices=["cpu", "small"], help=suites)
    given = report.parse(parser, argv)
    if given.peer and "all" in given.peer:
        given.peer = list(peers.PEERS)
    if given.op in ("score", "logprob") and given.phase != "both":
        parser.error(f"--pass {given.phase} needs an op with a backward and a head")
    try:
        shape = parse_shape(given.shape, given.tokens, given.lengths)
        given.shape = replace(shape, dtype=given.dtype, prompt_share=given.prompt_share)
    except ValueError as error:
        parser.error(str(error))
    return given


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] and argv[0] in MODES:
        mode: Callable[[list[str]], int] = importlib.import_module(argv[0]).main
        return mode(argv[1:])
    a = parse(argv)
    if a.suite == "cpu":
        cases = list(cpu_suite(a.shape))
    elif a.suite == "small":
        cases = small_suite(parse_shape("256,512,16384,64"))
    else:
        options = {"frozen_head": a.frozen_head, "memory": a.memory, "phase": a.phase}
        wide = a.device == "cuda" and a.dtype != "fp32"
        floors = list(peers.FLOORS) if wide else ["gemms"]
        cases = [single(a.op, a.shape, a.peer, backends=a.backend, floors=floors, **options)]
    device = report.device_of(a)
    return report.publish(a, argv, (run_case(case, a.rounds, device) for case in cases))


if __name__ == "__main__":
    raise SystemExit(main())
