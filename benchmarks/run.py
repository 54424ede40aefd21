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
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import measure
import peers
import report
import torch
from measure import Device, Entry
from report import Goal
from shapes import DTYPES, SHAPES, Shape, parse_shape

MODES = ("card", "compare", "plots", "scaling", "train")  # each a script of its own, too
OPS = (*peers.OPS, "logprob")
TITLES = {
    "linear_loss": "linear_loss (A-LoL)",
    "linear_logprob": "linear_logprob",
    "score": "linear_logprob without gradient",
    "logprob": "logprob on given logits, forward + backward",
}
PASSES = {"both": ", forward + backward", "forward": ", forward", "backward": ", backward"}
USUAL = {op: ["eager", "torch lce"] for op in peers.OPS}  # beside lolkernels and its floor
USUAL |= {"logprob": ["eager"]}


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
    *,
    frozen_head: bool = False,
    memory: bool = False,
    names: list[str] | None = None,
    backends: list[str] | None = None,
    phase: str = "both",
    floors: list[str] | None = None,
) -> Case:
    """One op at one shape: lolkernels beside its floor and peers."""
    floors = ["copy"] if op == "logprob" else floors or ["gemms"]
    names = USUAL[op] if names is None else names
    make = partial(Entry, op=op, shape=shape, frozen_head=frozen_head, phase=phase)
    ours = [(f"lolkernels {b}", b) for b in backends] if backends else [("lolkernels", None)]
    entries = [make(label, "lolkernels", memory=memory, backend=b) for label, b in ours]
    entries += [make(name, name) for name in floors]
    entries += [make(name, name, memory=memory) for name in names]
    return Case(f"{title_of(op, frozen_head, phase)}, {shape}", entries, floors)


def formula(text: str, row: str = "lolkernels") -> Goal:
    return Goal(f"{text}: memory, distance from the formula", row, 0.05, of="formula")


def against(names: list[str]) -> list[Goal]:
    """To be faster than each of these peers."""
    timed = [name for name in names if not peers.PEERS[name].scalar_only]
    return [Goal(f"linear_loss against {name}", "lolkernels", 1.0, name) for name in timed]


def cpu_suite(shape: Shape) -> Iterator[Case]:
    """The CPU rows: each op against its floor and the peers, bf16, prompt rows, mixed lengths."""
    on_cpu = [name for name, peer in peers.PEERS.items() if not peer.gpu_only]
    policies = [name for name in on_cpu if name.startswith("torch lce ")]  # seconds a call
    everyone = [name for name in on_cpu if name not in policies]
    case = single("linear_loss", shape, memory=True, names=everyone)
    # The compiled peers hold the logits of all rows: what that memory buys here.
    whole = "lolkernels, one chunk"
    budget = 4 * shape.tokens * shape.vocab
    case.entries.insert(1, replace(case.entries[0], label=whole, budget=budget))
    compiled = [name for name in everyone if "compile" in name]
    case.goals = [
        replace(goal, row=whole, text=f"{goal.text}, {whole}") for goal in against(compiled)
    ]
    case.goals += [
        Goal("linear_loss against three bare GEMMs", "lolkernels", 1.05, "gemms"),
        *against(everyone),
        Goal("linear_loss: memory against eager's", "lolkernels", 0.12, "eager", "memory"),
        formula("linear_loss"),
    ]
    yield case
    case = single("linear_loss", replace(shape, tokens=2 * shape.seq_len), names=policies)
    case.goals = against(policies)
    yield case
    few = ["eager", "lol-rl"]
    case = single("linear_loss", shape, frozen_head=True, memory=True, names=few)
    case.goals = [
        Goal("frozen head against two bare GEMMs", "lolkernels", 1.05, "gemms"),
        Goal("frozen head: memory against eager's", "lolkernels", 0.02, "eager", "memory"),
        formula("frozen head"),
    ]
    yield case
    case = single("score", shape, memory=True, names=few)
    case.goals = [
        Goal("scoring against one bare GEMM", "lolkernels", 1.10, "gemms"),
        formula("scoring"),
    ]
    yield case
    case = single("linear_logprob", shape, memory=True, names=few)
    case.goals = [
        Goal("linear_logprob against three bare GEMMs", "lolkernels", 1.10, "gemms"),
        formula("linear_logprob"),
    ]
    yield case
    for phase in ("forward", "backward"):
        yield single("linear_loss", shape, names=["eager", "lol-rl"], phase=phase)
    yield bf16_case(shape)
    yield prompt_case(shape)
    mixed = replace(shape, shortest=max(1, shape.seq_len // 8), seq_len=2 * shape.seq_len)
    yield single("linear_loss", mixed, names=["eager"])
    for name, tokens in (("smollm2", 512), ("qwen3-0.6b", 256)):
        other = replace(SHAPES[name], tokens=tokens)
        yield single("linear_loss", other, names=["eager"], memory=True)
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
    half = replace(shape, dtype="bf16")
    op = "linear_loss"
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
    for entry, row in zip(case.entries, rows, strict=True):
        if device.kind == "cpu" and entry.memory and row.times_ms:
            try:
                row.extra_bytes = measure.peak_memory(entry)
            except RuntimeError as error:  # killed for its memory, say: the times stand
                row.error = measure.short(error)
    found = report.case(case.title, rows, case.floors, goals=case.goals)
    print(report.table(found), end="\n\n", flush=True)
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", nargs="?", choices=OPS, default="linear_loss", metavar="OP")
    parser.add_argument(
        "--shape", default="gpt2", help=f"T,D,V,seq_len or one of {', '.join(SHAPES)}"
    )
    parser.add_argument("--tokens", type=int, help="T, in place of the shape's")
    parser.add_argument("--lengths", help="of sequences: N, or SHORTEST-LONGEST for a mix")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--frozen-head", action="store_true", help="no gradient for the weight")
    parser.add_argument("--prompt-share", type=float, default=0.0, help="rows without loss, 0 to 1")
    parser.add_argument(
        "--pass", dest="phase", choices=measure.PHASES, default="both", help="what is timed"
    )
    parser.add_argument("--backend", nargs="+", help="of lolkernels (default: its own choice)")
    parser.add_argument(
        "--peer",
        nargs="*",
        choices=["all", *peers.PEERS],
        metavar="NAME",
        help=f"all, or some of {', '.join(peers.PEERS)} (default: a few)",
    )
    parser.add_argument("--memory", action="store_true", help="measure peak memory too")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    suites = "every CPU row instead of one op; small: at one small shape, times alone"
    parser.add_argument("--suite", choices=["cpu", "small"], help=suites)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds a case")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    arguments = parser.parse_args(argv)
    if arguments.peer and "all" in arguments.peer:
        arguments.peer = list(peers.PEERS)
    if arguments.op in ("score", "logprob") and arguments.phase != "both":
        parser.error(f"--pass {arguments.phase} needs an op with a backward and a head")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1; got {arguments.rounds}")
    try:
        shape = parse_shape(arguments.shape, arguments.tokens, arguments.lengths)
        arguments.shape = replace(shape, dtype=arguments.dtype, prompt_share=arguments.prompt_share)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] and argv[0] in MODES:
        mode: Callable[[list[str]], int] = importlib.import_module(argv[0]).main
        return mode(argv[1:])
    a = parse(argv)
    if a.threads:
        torch.set_num_threads(a.threads)
    device: Device = measure.Cuda() if a.device == "cuda" else measure.Cpu()
    if a.suite == "cpu":
        cases = list(cpu_suite(a.shape))
    elif a.suite == "small":
        cases = small_suite(parse_shape("256,512,16384,64"))
    else:
        options = {"frozen_head": a.frozen_head, "memory": a.memory, "phase": a.phase}
        wide = a.device == "cuda" and a.dtype != "fp32"
        floors = list(peers.FLOORS) if wide else ["gemms"]
        made = single(a.op, a.shape, names=a.peer, backends=a.backend, floors=floors, **options)
        cases = [made]
    command = shlex.join(["python", "benchmarks/run.py", *argv])
    record = report.new(report.environment(device.device, command), a.rounds)
    for case in cases:
        record["cases"].append(run_case(case, a.rounds, device))
        report.judge_all(record)
        if a.out:  # what is there stays, should a later case fail
            report.save(record, a.out)
    if record["goals"]:
        print(report.goals_table(record["goals"]))
    if a.out:
        print("wrote", *report.files(a.out))
    return 1 if any(report.faulty(case) for case in record["cases"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
