"""End to end: one optimiser step of A-LoL on a whole model, with other log-probs and with ours.

python benchmarks/run.py train --device cpu
python benchmarks/run.py train --model qwen2.5-0.5b llama-3.1-8b --memory 24GiB 80GiB --out gpu
python benchmarks/run.py train --fits       what fits into 1, 2 and 4 GiB at Qwen2.5-0.5B's shape

The models are transformers' own, of random weights; half of each sequence is prompt. A step is
forward, loss, backward and AdamW. Before anything is timed, losses and gradients are compared with
the same loss from fp32 logits. Memory is a step's peak above weights and optimiser states; it and
the largest batch (by bisection) stand beside the formulas of lolrl plan: on a GPU by torch's
allocator, on a CPU measured in a process of its own each.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from the source tree, not installed

import measure
import report
import torch
from library import plan
from measure import Device, Row
from peers import Contestant, UnavailableError
from report import Goal
from train_cases import GRADIENT_LIMIT, LOSSES, MODELS, MODES, Case, Run
from truth import Check

CASES = {  # what is measured without --model
    "cpu": [(model, mode) for model in ("tiny", "tiny-qwen") for mode in MODES],
    "cuda": [
        ("qwen2.5-0.5b", "full"),
        ("llama-3.1-8b", "lora"),
        ("qwen2.5-1.5b", "full"),
        ("llama-3.2-3b", "lora"),
    ],
}
FITS = {"model": ["qwen2.5-0.5b"], "dtype": "bf16", "memory": ["1GiB", "2GiB", "4GiB"]}
RESOLUTION = 0.05  # of the largest batch
LARGEST = ("eager", "trl", "fused")  # whose largest batch is looked for


def contestant(run: Run, name: str, check: Check | UnavailableError) -> Contestant:
    if isinstance(check, UnavailableError):
        raise check
    step, small = run.case.step(name), partial(run.step, name, run.sized(1))
    formula = None if step is None else step.working
    return Contestant(partial(run.step, name), lambda: check, warm=small, formula=formula)


def from_request(request: dict[str, Any]) -> Contestant:
    """In a process of its own: see measure.py."""
    return contestant(Run(Case(**request["case"])), request["name"], Check())


def step_bytes(case: Case, name: str) -> int:
    """On a CPU: the peak of a step, beside weights and states."""
    return measure.peak_in_process("train", name, {"case": asdict(case), "name": name})


def fits(run: Run, name: str, sequences: int, memory: int, others: int) -> bool:
    """Whether a step on so many sequences takes ``memory`` bytes at most, beside ``others``."""
    if run.case.device == "cpu":
        case = replace(run.case, sequences=sequences)
        return run.fixed_bytes() + step_bytes(case, name) <= memory
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (memory + others) / total))
    try:
        run.step(name, run.sized(sequences))
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def largest_batch(case: Case, name: str, memory: int, fits: Callable[[int], bool]) -> list[int]:
    """[sequences that fit, within RESOLUTION; by formula: eager's where there is none]."""

    def formula(n: int) -> bool:
        step = replace(case, sequences=n).step(name if name in plan.LOSSES else "eager")
        assert step is not None
        return step.peak <= memory

    guess = plan.largest(formula)
    return [plan.largest(fits, max(1, guess), RESOLUTION), guess]


def measure_case(
    case: Case, memories: list[int] | None, rounds: int, device: Device, until: float = math.inf
) -> dict[str, Any]:
    """Times, memory beside the formulas, and the largest batches, with one model for all of them.
    ``memories=None``: times alone. What there was no time for stands in the title.
    """
    others = torch.cuda.memory_allocated() if case.device == "cuda" else 0
    shape, frozen = case.batch, case.mode == "lora"
    rows = [Row(n, n, "train", str(shape), shape.tokens, frozen) for n in LOSSES]
    name = case.title.rpartition(", ")[0]
    goals = [Goal(f"{name}: step, fused against eager", "fused", 1.0, "eager")]
    if memories is not None:
        text = f"{name}: {{}}, memory of a step off the formula by"
        goals += [Goal(text.format(n), n, 0.1, of="formula") for n in plan.LOSSES]
    shown = report.case(case.title, [], ["eager"], goals=goals, fits=[])
    try:
        run = Run(case)
        checks = run.checks()
        run.step("fused", run.batch.first(2))  # the optimiser's states
        build = [(row, partial(contestant, run, row.label, checks[row.label])) for row in rows]
        measure.measure(build, device, rounds=rounds, until=until, least=1)
        for row in rows if memories is not None and device.kind == "cpu" else []:
            if row.times_ms:
                row.extra_bytes = step_bytes(case, row.label)
        step = case.step("fused")
        assert step is not None
        fixed = {"measured": run.fixed_bytes(), "by formula": step.weights + step.states}
        label = "weights and optimiser states, {}"
        shown["facts"] = [
            {"label": label.format(how), "value": size / 2**20, "unit": "MiB"}
            for how, size in fixed.items()
        ]
        for memory in memories or []:
            for row in rows:
                if row.label not in LARGEST or row.wrong or row.skipped:
                    continue
                if time.monotonic() > until:
                    raise TimeoutError
                can = partial(fits, run, row.label, memory=memory, others=others)
                found = largest_batch(case, row.label, memory, can)
                tokens = [n * case.seq_len for n in found]
                known = tokens[1] if row.label in plan.LOSSES else None
                one = {"contestant": row.label, "memory": memory, "formula": known}
                shown["fits"].append({**one, "measured": tokens[0]})
    except TimeoutError:
        shown["title"] += " (the time was up)"
    except (ImportError, RuntimeError) as error:  # no peft; a process that died
        shown["error"] = measure.short(error)
    return {**shown, "rows": [asdict(row) for row in rows]}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = report.parser(__doc__)
    add = parser.add_argument
    models = "default: tiny and tiny-qwen, all weights and LoRA; on a GPU four of 0.5B to 8B"
    add("--model", nargs="+", choices=MODELS, help=models)
    add("--mode", nargs="+", choices=MODES, default=list(MODES))
    add("--dtype", choices=list(GRADIENT_LIMIT), help="default: bf16 on a GPU")
    add("--sequences", type=int, default=8)
    add("--seq-len", type=int, help="default: 128, 1024 on a GPU")
    add("--gradient-checkpointing", action="store_true")
    add("--memory", nargs="*", help="find the largest batch in each, like 1GiB")
    add("--memory-budget", help="of linear_loss (default: the library's own)")
    about = f"the same as --model {' '.join(FITS['model'])} --dtype bf16 --memory 1GiB 2GiB 4GiB"
    add("--fits", action="store_true", help=about)
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    given = report.parse(parser, argv)
    on_gpu, name = given.device == "cuda", "fits" if given.fits else "train"
    for key, value in FITS.items() if given.fits else ():
        setattr(given, key, getattr(given, key) or value)
    given.out = given.out or Path("benchmarks/results") / f"{name}-{given.device}"
    given.dtype = given.dtype or ("bf16" if on_gpu else "fp32")
    given.seq_len = given.seq_len or (1024 if on_gpu else 128)
    pairs = [(model, mode) for model in given.model or [] for mode in given.mode]
    given.pairs = pairs or CASES[given.device]
    if importlib.util.find_spec("transformers") is None:
        parser.error("the models are transformers' own: pip install transformers (and peft)")
    for name in ("sequences", "seq_len"):
        if getattr(given, name) < 2:
            parser.error(f"--{name.replace('_', '-')} must be >= 2")
    try:
        usual = ["24GiB", "80GiB"] if on_gpu else ["600MiB"]
        given.memory = [
            plan.parse_bytes(t) for t in (usual if given.memory is None else given.memory)
        ]
        if given.memory_budget is not None:
            given.memory_budget = plan.parse_bytes(given.memory_budget, "--memory-budget")
    except ValueError as error:
        parser.error(str(error))
    return given


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    given = parse(argv)
    sizes = (given.sequences, given.seq_len, given.dtype, given.device)
    options = (given.gradient_checkpointing, given.memory_budget)
    run = partial(measure_case, rounds=given.rounds, device=report.device_of(given))
    cases = (run(Case(*pair, *sizes, *options), given.memory) for pair in given.pairs)
    return report.publish(given, ["train", *argv], cases)
