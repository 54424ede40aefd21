"""End to end: one optimiser step of A-LoL on a whole model, with eager log-probs and with ours.

python benchmarks/train.py --device cpu
python benchmarks/train.py --model qwen2.5-0.5b llama-3.1-8b --memory 24GiB 80GiB --out gpu

The models are transformers' own, of random weights; half of each sequence is prompt. A step is
forward, loss, backward and AdamW. Before anything is timed, losses and gradients are compared. Peak
memory and the largest batch stand beside the formulas of lolrl plan: on a GPU by torch's allocator,
on a CPU measured in a process of its own each. OUT.json is written after every case.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from the source tree, not installed

import measure
import report
import torch
from library import plan
from train_cases import GRADIENT_LIMIT, LOSSES, MODELS, MODES, Case, Run, errors

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
OUT_OF_MEMORY = "out of memory"
LARGEST = ("eager", "fused")  # whose largest batch is looked for


def time_steps(run: Run, rounds: int, until: float = math.inf) -> dict[str, list[float] | str]:
    """Seconds of a step by contestant, in interleaved rounds; text where it cannot run."""
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    failed: dict[str, str] = {}
    for turn in range(-1, rounds):  # the first round warms up
        if turn > 0 and time.monotonic() > until:
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
                failed[name] = OUT_OF_MEMORY
                run.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                continue
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return {**times, **failed}


# --- memory ---------------------------------------------------------------------------------------

Peak = tuple[int, int] | None  # bytes: weights and states, a step beside; None: it does not fit


def peak_here(run: Run, contestant: str, sequences: int, memory: int | None) -> Peak:
    """On a GPU, where torch's allocator counts."""
    total = torch.cuda.get_device_properties(0).total_memory
    share = 1.0 if memory is None else min(1.0, (memory + run.others) / total)
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run.step(contestant, run.sized(sequences))
        fixed = run.fixed_bytes()
        return fixed, int(torch.cuda.max_memory_allocated()) - run.others - fixed
    except torch.OutOfMemoryError:
        run.optimizer.zero_grad(set_to_none=True)
        return None
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def peak_of_process(case: Case, contestant: str) -> tuple[int, int]:
    """Of this process, which has done nothing else."""
    run = Run(case)
    run.step(contestant, run.sized(1))  # the optimiser's states, the libraries' buffers
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = measure.status("VmRSS")
    run.step(contestant)
    return run.fixed_bytes(), measure.status("VmHWM") - before


def peak_in_process(case: Case, contestant: str) -> tuple[int, int]:
    """On a CPU: :func:`peak_of_process` in a fresh one."""
    asked = [json.dumps(asdict(case)), contestant, str(torch.get_num_threads())]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--measure", *asked],
        env={**measure.QUIET_MALLOC, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        text=True,
        capture_output=True,
    )
    if done.returncode:
        raise RuntimeError(f"measuring memory failed: {done.stderr.strip().splitlines()[-1:]}")
    fixed, extra = json.loads(done.stdout.splitlines()[-1])
    return int(fixed), int(extra)


def peak_of(run: Run, contestant: str, sequences: int, memory: int | None = None) -> Peak:
    if run.case.device == "cuda":
        return peak_here(run, contestant, sequences, memory)
    found = peak_in_process(replace(run.case, sequences=sequences), contestant)
    return None if memory is not None and sum(found) > memory else found


def largest_batch(run: Run, contestant: str, memory: int, until: float) -> tuple[int, int]:
    """Sequences whose step fits into `memory` bytes, within RESOLUTION: measured, by formula.

    Raises:
        TimeoutError: there was no time to find it.
    """

    def formula(n: int) -> bool:
        return replace(run.case, sequences=n).step(contestant).peak <= memory

    def fits(n: int) -> bool:
        if time.monotonic() > until:
            raise TimeoutError
        return peak_of(run, contestant, n, memory) is not None

    guess = plan.largest(formula)
    return plan.largest(fits, max(1, guess), RESOLUTION), guess


# --- a case ---------------------------------------------------------------------------------------


def blank(case: Case, name: str) -> dict[str, Any]:
    """A row with nothing measured."""
    step = case.step(name)
    known = {"label": name, "contestant": name, "op": "train", "shape": str(case.batch)}
    unknown = ("median_ms", "tokens_per_s", "loss_error", "gradient_error", "sum_error_nat")
    return {
        **known,
        "tokens": case.batch.tokens,
        "frozen_head": case.mode == "lora",
        "times_ms": [],
        **dict.fromkeys(unknown),
        "extra_bytes": None,  # of a step, beside weights and states
        "formula_bytes": step.working,
        "peak_bytes": None,  # with them
        "formula_peak_bytes": step.peak,
        "largest": {},  # memory -> tokens of the largest batch: measured, by formula
        "error": None,
    }


def measure_case(
    case: Case, memories: list[int] | None, rounds: int, until: float = math.inf
) -> dict[str, Any]:
    """Times, peaks beside the formulas, and the largest batches, with one model for all of them.
    ``memories=None``: times alone.

    What is wrong, or what there was no time for, stands under `wrong` and in the title.
    """
    rows = [blank(case, name) for name in LOSSES]
    shown: dict[str, Any] = {"title": case.title, "floor": "eager", "rows": rows, "train": True}
    others = torch.cuda.memory_allocated() if case.device == "cuda" else 0
    shown["wrong"] = []
    try:
        run = Run(case)
        run.others = others
        off, times = errors(run), time_steps(run, rounds, until)
        for row in rows:
            row["loss_error"], row["gradient_error"] = off[row["label"]]
            seen = times[row["label"]]
            if isinstance(seen, str):
                row["error"] = seen
                continue
            row["times_ms"] = [1e3 * seconds for seconds in seen]
            row["median_ms"] = statistics.median(row["times_ms"])
            row["tokens_per_s"] = 1e3 * row["tokens"] / row["median_ms"]
            peak = None if memories is None else peak_of(run, row["label"], case.sequences)
            if peak is not None:
                row["extra_bytes"], row["peak_bytes"] = peak[1], sum(peak)
        for memory in memories or []:
            for row in (row for row in rows if row["label"] in LARGEST):
                found = largest_batch(run, row["label"], memory, until)
                text = f"{memory / 2**30:.3g} GiB"
                row["largest"][text] = [n * case.seq_len for n in found]
    except TimeoutError:
        shown["title"] += " (the time was up)"
    except (ImportError, RuntimeError) as error:  # no peft; a wrong loss; a process that died
        shown["wrong"] = [str(error)]
        for row in rows:
            row["error"] = row["error"] or str(error)
    return shown


def goals(record: dict[str, Any]) -> list[dict[str, Any]]:
    found = []

    def add(text: str, measured: float, limit: float) -> None:
        goal = {"text": text, "limit": limit, "measured": measured, "met": measured <= limit}
        found.append(goal)

    for case in record["cases"]:
        rows = {row["label"]: row for row in case["rows"]}
        name = case["title"].rpartition(", ")[0]
        times = [rows[n]["median_ms"] for n in ("fused", "eager")]
        if all(times):
            add(f"{name}: step, fused against eager", times[0] / times[1], 1.0)
        for row in case["rows"]:
            if row["extra_bytes"]:
                off = abs(row["extra_bytes"] / row["formula_bytes"] - 1)
                add(f"{name}: {row['label']}, memory of a step off the formula by", off, 0.1)
    return found


def table(case: dict[str, Any]) -> str:
    def number(value: float | None, form: str = ",.0f", scale: float = 1.0) -> str:
        return "" if value is None else format(value / scale, form)

    sizes = list(dict.fromkeys(size for row in case["rows"] for size in row["largest"]))
    heads = ["", "step ms (quartiles)", "tokens/s", "step memory MiB: measured", "formula", "ratio"]
    heads += ["peak MiB: measured", "formula"]
    heads += [f"largest batch in {s}, tokens: {w}" for s in sizes for w in ("measured", "formula")]
    heads += ["gradient off"]
    lines = [f"### {case['title']}", "", f"| {' | '.join(heads)} |"]
    lines.append("|---|" + "---:|" * (len(heads) - 1))
    for row in case["rows"]:
        spread, ratio = "", ""
        if len(row["times_ms"]) > 1:
            low, _, high = statistics.quantiles(row["times_ms"], n=4, method="inclusive")
            spread = f" ({low:,.1f}–{high:,.1f})"
        if row["extra_bytes"] is not None:
            ratio = f"{row['extra_bytes'] / row['formula_bytes']:.3f}"
        memory = ("extra_bytes", "formula_bytes", "peak_bytes", "formula_peak_bytes")
        mib = [number(row[key], ",.1f", report.MIB) for key in memory]
        cells = [row["label"], row["error"] or number(row["median_ms"], ",.1f") + spread]
        cells += [number(row["tokens_per_s"]), *mib[:2], ratio, *mib[2:]]
        cells += [number(n) for s in sizes for n in row["largest"].get(s, (None, None))]
        lines.append(f"| {' | '.join([*cells, number(row['gradient_error'], '.1e')])} |")
    return "\n".join(lines)


def page(record: dict[str, Any]) -> str:
    where = record["environment"]
    head = [
        f"# Training steps: {where['device']}",
        "",
        f"{where['cores']} cores, {where['memory_gib']} GiB; Python {where['python']}, torch "
        f"{where['torch']}, transformers {where['transformers']}, lolkernels "
        f"{where['lolkernels']}, commit {where['commit']}.",
        f"Medians of up to {record['rounds']} interleaved rounds. Step memory is the peak above "
        "weights and optimiser states; the formula is the library's plan of a step. Gradient off: "
        "relative to the same loss from fp32 logits.",
        "",
        f"    {where['command']}",
    ]
    parts = ["\n".join(head), *map(table, record["cases"])]
    if record["goals"]:
        parts.append(report.goals_table(record["goals"]))
    return "\n\n".join(parts) + "\n"


# --- the command ----------------------------------------------------------------------------------


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
    parser.add_argument("--memory", nargs="*", help="find the largest batch in each, like 1GiB")
    parser.add_argument("--memory-budget", help="of linear_loss (default: the library's own)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/train-DEVICE")
    given = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    given.device = given.device or ("cuda" if gpu else "cpu")
    if given.device == "cuda" and not gpu:
        parser.error("--device cuda: torch sees no GPU; give --device cpu")
    on_gpu = given.device == "cuda"
    given.out = given.out or Path("benchmarks/results") / f"train-{given.device}"
    given.dtype = given.dtype or ("bf16" if on_gpu else "fp32")
    given.seq_len = given.seq_len or (1024 if on_gpu else 128)
    given.pairs = CASES[given.device]
    if given.model:
        given.pairs = [(model, mode) for model in given.model for mode in given.mode]
    if importlib.util.find_spec("transformers") is None:
        parser.error("the models are transformers' own: pip install transformers (and peft)")
    for name, least in (("sequences", 2), ("seq_len", 2), ("rounds", 1)):
        if getattr(given, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be >= {least}")
    try:
        usual = ["24GiB", "80GiB"] if on_gpu else ["600MiB"]
        memory = usual if given.memory is None else given.memory
        given.memory = [plan.parse_bytes(text) for text in memory]
        if given.memory_budget is not None:
            given.memory_budget = plan.parse_bytes(given.memory_budget, "--memory-budget")
    except ValueError as error:
        parser.error(str(error))
    return given


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--measure"]:
        torch.set_num_threads(int(argv[3]))
        print(json.dumps(peak_of_process(Case(**json.loads(argv[1])), argv[2])))
        return 0
    given = parse(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    import transformers

    command = " ".join(["python", "benchmarks/train.py", *argv])
    record = report.new(report.environment(torch.device(given.device), command), given.rounds)
    record["environment"]["transformers"] = transformers.__version__
    sizes = (given.sequences, given.seq_len, given.dtype, given.device)
    options = (given.gradient_checkpointing, given.memory_budget)
    for pair in given.pairs:
        case = measure_case(Case(*pair, *sizes, *options), given.memory, given.rounds)
        record["cases"].append(case)
        record["goals"] = goals(record)
        print(table(case), end="\n\n", flush=True)
        report.save(record, given.out, page)
    print(report.goals_table(record["goals"]))
    print("wrote", *report.files(given.out))
    return 1 if any(case["wrong"] for case in record["cases"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
