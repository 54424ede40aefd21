"""TRL's own trainers, one optimiser step at a time, with TRL's kernel and with ours.

One run of the trainer changes kernel with every step, so that both see the same machine. The
learning rate is zero and all batches are equal: losses and gradient norms must be too, or nothing
is reported. Memory is the peak of a step above what was held before it.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from the source tree, not installed

import measure
import torch
import trl
from datasets import Dataset
from train_cases import GRADIENT_LIMIT, LOSS_LIMIT, MODELS, MODES, Case, build_model
from transformers import TrainerCallback

from lolrl.tiny import build_tokenizer
from lolrl.trl import use_lolkernels

NAMES = ("trl", "lolkernels")
TRAINERS = {"sft": ("completion",), "dpo": ("chosen", "rejected")}
WARM = 2  # steps of each, not counted


class Steps(TrainerCallback):
    """Puts a kernel in place before each step, and takes the step's time and memory."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.times_ms: dict[str, list[float]] = {name: [] for name in NAMES}
        self.bytes: dict[str, list[int]] = {name: [] for name in NAMES}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % 2:
            self.kernel = use_lolkernels()
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        self.held = torch.cuda.memory_allocated() if self.cuda else measure.status("VmRSS")
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        name = NAMES[(state.global_step - 1) % 2]
        self.times_ms[name].append(1e3 * (time.perf_counter() - self.start))
        peak = torch.cuda.max_memory_allocated() if self.cuda else measure.status("VmHWM")
        self.bytes[name].append(peak - self.held)
        if name != "trl":
            self.kernel.undo()


def measure_trl(case: Case, trainer: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each of NAMES: times_ms and extra_bytes of a step.

    Raises:
        RuntimeError: the losses or the gradients differ.
    """
    model, steps = build_model(case), Steps(case.device == "cuda")
    letters = "etaoinsh" * case.seq_len  # a token each
    text = {name: letters[i : i + case.seq_len // 2] for i, name in enumerate(TRAINERS[trainer])}
    row = {"prompt": letters[: case.seq_len // 2 - 2], **text}
    more = {"ref_model": copy.deepcopy(model)} if (trainer, case.mode) == ("dpo", "full") else {}
    with tempfile.TemporaryDirectory() as folder:
        args = getattr(trl, f"{trainer.upper()}Config")(
            folder, max_steps=2 * (rounds + WARM), learning_rate=0.0, max_length=None,
            per_device_train_batch_size=case.sequences, use_cpu=case.device == "cpu", bf16=False,
            gradient_checkpointing=case.checkpointing, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        made = getattr(trl, f"{trainer.upper()}Trainer")(
            model, args=args, train_dataset=Dataset.from_list([row] * case.sequences),
            processing_class=build_tokenizer(["a"], 259), callbacks=[steps], **more,
        )  # fmt: skip
        made.train()
    for what, limit in (("loss", LOSS_LIMIT), ("grad_norm", GRADIENT_LIMIT[case.dtype])):
        values = [line[what] for line in made.state.log_history if "grad_norm" in line]
        if max(values) - min(values) > limit * abs(values[0]):
            raise RuntimeError(f"{case.title}: TRL's {what} and ours differ: {values[:2]}")
    times, sizes = steps.times_ms, steps.bytes
    return [
        {"label": n, "times_ms": times[n][WARM:], "extra_bytes": max(sizes[n][WARM:])}
        for n in NAMES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, known in (("trainer", TRAINERS), ("model", MODELS), ("mode", MODES)):
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=list(known)[:1])
    given = parser.parse_args()
    where = (1024, "bf16", "cuda") if torch.cuda.is_available() else (128, "fp32", "cpu")
    for trainer, model, mode in product(given.trainer, given.model, given.mode):
        case = Case(model, mode, 8, *where)
        for row in measure_trl(case, trainer, rounds=5):
            ms, size = statistics.median(row["times_ms"]), row["extra_bytes"] / 2**20
            print(f"{trainer}, {case.title}, {row['label']}: {ms:.1f} ms, {size:.1f} MiB a step")


if __name__ == "__main__":
    main()
