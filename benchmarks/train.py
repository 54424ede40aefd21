"""End to end: one optimiser step of A-LoL on a whole model, with eager log-probs and with ours.

python benchmarks/train.py --device cpu
python benchmarks/train.py --model qwen2.5-0.5b llama-3.1-8b --memory 80GiB --deadline 220 --out gpu

The models are transformers' own, of random weights; half of each sequence is prompt. A step is
forward, loss, backward and AdamW. Before anything is timed, losses and gradients are compared. Peak
memory and the largest batch are measured in a process of their own each, beside the formulas of
python/lolrl/plan.py. OUT.json is written after every measurement; the same command again does what
the last one had no time for.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from the source tree, not installed

import report
import torch
import train_report
from train_cases import GRADIENT_LIMIT, LOSSES, MODELS, MODES, Case, Run, errors

from lolrl import plan

ROOT = Path(__file__).resolve().parents[1]
CASES = {  # what is measured without --model
    "cpu": [(model, mode) for model in ("tiny", "tiny-qwen") for mode in MODES],
    "cuda": [
        ("qwen2.5-0.5b", "full"),
        ("llama-3.1-8b", "lora"),
        ("qwen2.5-1.5b", "full"),
        ("llama-3.2-3b", "lora"),
    ],
}
RESOLUTION = 0.05  # of the largest batch


class DeadlineError(Exception):
    """No time is left; what is measured has been written."""


def left(until: float) -> float:
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise DeadlineError
    return seconds


def time_steps(run: Run, rounds: int, until: float) -> dict[str, list[float] | str]:
    """Seconds of a step by contestant, in interleaved rounds; text where it cannot run."""
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    failed: dict[str, str] = {}
    for turn in range(-1, rounds):  # the first round warms up
        if turn > 0:
            try:
                left(until)
            except DeadlineError:
                break
        names = [name for name in LOSSES if name not in failed]
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            run.synchronize()
            start = time.perf_counter()
            try:
                run.step(name)
                run.synchronize()
            except torch.OutOfMemoryError:
                failed[name] = train_report.OUT_OF_MEMORY
                run.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                continue
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return {**times, **failed}


# --- memory, in a process of its own --------------------------------------------------------------


def _status(field: str) -> int:
    """VmRSS (resident) or VmHWM (its high-water mark) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_here(case: Case, contestant: str, memory: int | None) -> dict[str, Any]:
    """{fixed, extra}: bytes of weights and states, and of a step beside them; or {oom: true}.

    On a GPU the process gets no more than `memory` bytes.
    """
    gpu = case.device == "cuda"
    if gpu and memory is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total))
    try:
        run = Run(case)
        run.step(contestant, run.batch.first(1))  # the optimiser's states, the libraries' buffers
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run.step(contestant)
            extra = torch.cuda.max_memory_allocated() - before
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            run.step(contestant)
            extra = _status("VmHWM") - before
    except torch.OutOfMemoryError:
        return {"oom": True}
    return {"fixed": run.fixed_bytes(), "extra": extra}


def measure(case: Case, contestant: str, memory: int | None, until: float) -> dict[str, Any]:
    """:func:`measure_here` in a fresh process."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        # Every large block is mapped and given back, so that the peak is the step's own.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_ARENA_MAX": "1",
    }
    asked = {
        "case": asdict(case),
        "contestant": contestant,
        "memory": memory,
        "threads": torch.get_num_threads(),
    }
    try:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), "--measure", json.dumps(asked)],
            env=environment,
            text=True,
            capture_output=True,
            timeout=left(until),
        )
    except subprocess.TimeoutExpired:
        raise DeadlineError from None
    if done.returncode:
        raise RuntimeError(f"measuring memory failed: {done.stderr.strip().splitlines()[-1:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def largest_batch(
    case: Case,
    contestant: str,
    memory: int,
    measured: Callable[[Case], dict[str, Any]],
) -> tuple[int, int]:
    """Sequences whose step fits into `memory` bytes, within RESOLUTION: measured, by formula."""

    def formula(n: int) -> bool:
        return replace(case, sequences=n).step(contestant).peak <= memory

    def fits(n: int) -> bool:
        found = measured(replace(case, sequences=n))
        return "oom" not in found and bool(found["fixed"] + found["extra"] <= memory)

    guess = plan.largest(formula)
    return plan.largest(fits, max(1, guess), RESOLUTION), guess


def fill_times(case: Case, shown: dict[str, Any], rounds: int, until: float) -> None:
    left(until)
    run = Run(case)
    off = errors(run)
    times = time_steps(run, rounds, until)
    for row in shown["rows"]:
        row["loss_error"], row["gradient_error"] = off[row["label"]]
        seen = times[row["label"]]
        if isinstance(seen, str):
            row["error"] = seen
            continue
        row["times_ms"] = [1e3 * seconds for seconds in seen]
        row["median_ms"] = statistics.median(row["times_ms"])
        row["tokens_per_s"] = 1e3 * row["tokens"] / row["median_ms"]


def fill_memory(case: Case, row: dict[str, Any], until: float) -> None:
    step = case.step(row["label"])
    row["formula_bytes"], row["formula_peak_bytes"] = step.working, step.peak
    found = measure(case, row["label"], None, until)
    if "oom" in found:
        row["error"] = train_report.OUT_OF_MEMORY
        return
    row["extra_bytes"] = found["extra"]
    row["peak_bytes"] = found["fixed"] + found["extra"]


def fill_largest(case: Case, row: dict[str, Any], memory: int, until: float) -> None:
    def measured(tried: Case) -> dict[str, Any]:
        return measure(tried, row["label"], memory, until)

    found, formula = largest_batch(case, row["label"], memory, measured)
    row["largest_tokens"] = found * case.seq_len
    row["formula_largest_tokens"] = formula * case.seq_len


def measure_all(
    record: dict[str, Any],
    cases: list[Case],
    until: float,
    save: Callable[[], None],
) -> None:
    """Measures what the record lacks: all times, then all memory, then all largest batches.

    Raises:
        DeadlineError: something is lacking still.
    """

    def attempt(rows: list[dict[str, Any]], fill: Callable[[], None]) -> None:
        """What fails says so in its rows, and the rest goes on."""
        try:
            fill()
        except torch.OutOfMemoryError:
            failed = train_report.OUT_OF_MEMORY
        except (ImportError, RuntimeError) as error:  # no peft; a wrong loss; a process that died
            failed = str(error)
        else:
            failed = None
        if failed:
            for row in rows:
                row["error"] = failed
            print(failed, file=sys.stderr)
        save()

    pairs = list(zip(cases, record["cases"], strict=True))
    for case, shown in pairs:
        rows = shown["rows"]
        if not any(row["times_ms"] or row["error"] for row in rows):
            attempt(rows, partial(fill_times, case, shown, record["rounds"], until))
            gc.collect()
            if case.device == "cuda":
                torch.cuda.empty_cache()
            print(train_report.table(shown), end="\n\n", flush=True)
    for case, shown in pairs:
        for row in shown["rows"]:
            if row["extra_bytes"] is None and row["error"] is None:
                attempt([row], partial(fill_memory, case, row, until))
    memory = record["settings"]["memory"]
    for case, shown in pairs:
        for row in shown["rows"]:
            if train_report.lacks_largest(record, row):
                attempt([row], partial(fill_largest, case, row, memory, until))


def start_record(given: argparse.Namespace, cases: list[Case], argv: list[str]) -> dict[str, Any]:
    """A new record, or the one in OUT.json where the same was asked for on the same device."""
    import transformers

    where = report.environment()
    if given.device == "cuda":
        where["device"] = torch.cuda.get_device_name()
    where["transformers"] = transformers.__version__
    where["command"] = " ".join(["python", "benchmarks/train.py", *argv])
    settings = {"cases": [asdict(case) for case in cases], "memory": given.memory}
    record = {
        "environment": where,
        "settings": settings,
        "rounds": given.rounds,
        "cases": [train_report.new_case(case) for case in cases],
        "goals": [],
        "left": [],
    }
    before = given.out.with_suffix(".json")
    if not before.exists():
        return record
    found: dict[str, Any] = json.loads(before.read_text())
    same = ("device", "commit", "torch", "transformers", "threads")
    if found.get("settings") == settings and all(
        found["environment"].get(key) == where[key] for key in same
    ):
        return found
    return record


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = "default: tiny and tiny-qwen, all weights and LoRA; on a GPU four of 0.5B to 8B"
    parser.add_argument("--model", nargs="+", choices=MODELS, help=models)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is one"
    )
    parser.add_argument("--dtype", choices=list(GRADIENT_LIMIT), help="default: bf16 on a GPU")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seq-len", type=int, help="default: 128, 1024 on a GPU")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--memory", help="find the largest batch in this, like 1GiB; none: do not")
    parser.add_argument("--memory-budget", help="of linear_loss (default: the library's own)")
    parser.add_argument("--deadline", type=float, help="seconds (default: 450, 225 on a GPU)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/train-DEVICE")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    given.device = given.device or ("cuda" if gpu else "cpu")
    if given.measure:
        return given
    if given.device == "cuda" and not gpu:
        parser.error("--device cuda: torch sees no GPU; give --device cpu")
    on_gpu = given.device == "cuda"
    given.out = given.out or Path("benchmarks/results") / f"train-{given.device}"
    given.dtype = given.dtype or ("bf16" if on_gpu else "fp32")
    given.seq_len = given.seq_len or (1024 if on_gpu else 128)
    given.deadline = given.deadline or (225 if on_gpu else 450)
    given.memory = given.memory or ("80GiB" if on_gpu else "600MiB")
    given.pairs = CASES[given.device]
    if given.model:
        given.pairs = [(model, mode) for model in given.model for mode in given.mode]
    if importlib.util.find_spec("transformers") is None:
        parser.error("the models are transformers' own: pip install transformers (and peft)")
    for name, least in (("sequences", 2), ("seq_len", 2), ("rounds", 1)):
        if getattr(given, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be >= {least}")
    try:
        given.memory = None if given.memory == "none" else plan.parse_bytes(given.memory)
        if given.memory_budget is not None:
            given.memory_budget = plan.parse_bytes(given.memory_budget, "--memory-budget")
    except ValueError as error:
        parser.error(str(error))
    return given


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    given = parse(argv)
    if given.measure:
        asked = json.loads(given.measure)
        torch.set_num_threads(asked["threads"])
        print(json.dumps(measure_here(Case(**asked["case"]), asked["contestant"], asked["memory"])))
        return 0
    until = time.monotonic() + given.deadline
    if given.threads:
        torch.set_num_threads(given.threads)
    sizes = (given.sequences, given.seq_len, given.dtype, given.device)
    options = (given.gradient_checkpointing, given.memory_budget)
    cases = [Case(*pair, *sizes, *options) for pair in given.pairs]
    record = start_record(given, cases, argv)
    record["left"] = []
    save = partial(train_report.save, record, given.out)
    try:
        measure_all(record, cases, until, save)
    except DeadlineError:
        record["left"] = train_report.unfinished(record)
    save()
    print("\n\n".join(train_report.table(case) for case in record["cases"]), end="\n\n")
    print(report.goals_table(record["goals"]))
    if record["left"]:
        print("no time was left for:", "; ".join(record["left"]), "(run the same command again)")
    print(f"wrote {given.out.with_suffix('.json')} and .md")
    rows = [row for case in record["cases"] for row in case["rows"]]
    return 1 if any(row["error"] not in (None, train_report.OUT_OF_MEMORY) for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
