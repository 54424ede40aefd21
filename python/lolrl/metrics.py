"""What a training step says about itself: sums kept on the device, read once per log line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from lolrl.files import write_atomic

# exp of this is the largest finite number logs (and JSON) can hold with room for a mean.
MAX_LOG_RATIO = 700.0
# Metrics of the A-LoL family by the names of a log line; others keep theirs behind "objective/".
LOGGED = {"log_ratio": "kl", "clipped": "clip_ratio", "unlearned": "unlearned_share"}


class Meter:
    """Accumulates what `LoLTrainer` logs between two log lines.

    Everything is a mean. Over the tokens that were scored: logps/mean and entropy. Over the
    sequences that have tokens: advantage/mean, positive_share and reward/mean. Over the sequences
    (groups) that were scored, those without weight being skipped: what the objective reports in the
    outputs' `metrics`. Of these log_ratio, sum_t (l_t - l^r_t) in nats, is logged as kl, and its
    exponential as ratio/{min,mean,max}; where the objective reports none it is taken from the
    rows' ref_logps. clipped is logged as clip_ratio, unlearned as unlearned_share, and any other
    name behind `objective/`.
    """

    def __init__(self, device: Any) -> None:
        self.device = torch.device(device)
        self.num_tokens = 0.0
        self.skipped_steps = 0
        self.sums: dict[str, Tensor] = {}
        self._zero()

    def _zero(self) -> None:
        self._started: float | None
        names = {"loss", "tokens", "input_tokens", *self.sums}  # ranks agree about the names
        self.sums = {name: self._number(0.0, 0.0) for name in names}
        self.low, self.high = self._number(math.inf), self._number(-math.inf)
        self.updates, self.seconds, self._started = 0, 0.0, None

    def _number(self, *values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)

    def begin_update(self) -> None:
        """Start the clock: evaluation, logging and saving between updates are not step time."""
        self._started = time.monotonic()

    def end_update(self) -> None:
        """Stop the clock and count the update."""
        self.updates += 1
        if self._started is not None:
            self.seconds += time.monotonic() - self._started
        self._started = None

    def _add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        if name not in self.sums:
            self.sums[name] = self._number(0.0, 0.0)
        self.sums[name][0] += total
        self.sums[name][1] += count

    def _mean(self, name: str, values: Tensor, use: Tensor) -> None:
        self._add(name, torch.where(use, values.double(), 0.0).sum(), use.sum())

    @torch.no_grad()
    def add(self, out: Any, inputs: dict[str, Tensor]) -> None:
        """Count one micro-batch: `out` of the fused model, `inputs` of the collator."""
        seq = out.seq
        present, scored = seq.lengths > 0, ~torch.isnan(out.logps)
        self._add("loss", out.loss.detach().double())
        self._add("tokens", float(seq.num_tokens))
        every = torch.ones_like(inputs["completion_mask"])  # of a packed row
        self._add("input_tokens", inputs.get("attention_mask", every).sum())
        self._mean("logps/mean", out.logps, scored)
        self._mean("entropy", out.entropy, scored)
        # A sequence is scored as a whole or not at all.
        counted = seq.sum(scored.double()) > 0
        metrics = dict(getattr(out, "metrics", None) or {})
        if "log_ratio" not in metrics and "ref_logps" in inputs:
            ref = inputs["ref_logps"][inputs["completion_mask"]].double()
            metrics["log_ratio"] = seq.sum(torch.where(scored, out.logps.double() - ref, 0.0))
        for name, values in metrics.items():
            values = values.to(self.device).double()
            use = counted if len(values) == len(counted) else counted.view(len(values), -1).any(1)
            use = use & ~torch.isnan(values)
            self._mean(LOGGED.get(name, f"objective/{name}"), values, use)
            if name == "log_ratio":
                self._add_ratio(values.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), use)
        if "rewards" in inputs:
            self._mean("reward/mean", inputs["rewards"], present)
        if "advantages" in inputs and inputs["advantages"].shape == present.shape:  # not per token
            self._mean("advantage/mean", inputs["advantages"], present)
            self._mean("positive_share", inputs["advantages"] > 0, present)

    def _add_ratio(self, ratio: Tensor, use: Tensor) -> None:
        self._mean("ratio/mean", ratio, use)
        if ratio.numel():
            self.low = torch.minimum(self.low, torch.where(use, ratio, math.inf).min())
            self.high = torch.maximum(self.high, torch.where(use, ratio, -math.inf).max())

    def pop(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The log line's figures over all ranks; starts the next line.

        `gather` turns one rank's (k,) tensor into all ranks' (ranks, k).
        """
        sums, low, high, ranks = self._gathered(gather)
        updates, seconds = max(self.updates, 1), max(self.seconds, 1e-9)
        input_tokens = sums.pop("input_tokens")[0]
        self.num_tokens += input_tokens
        logs = {"loss": sums.pop("loss")[0] / updates / ranks}
        completion_tokens = sums.pop("tokens")[0]
        logs |= {name: total / count for name, (total, count) in sorted(sums.items()) if count}
        if "ratio/mean" in logs:
            logs["ratio/min"], logs["ratio/max"] = low, high
        logs["num_tokens"] = self.num_tokens
        logs["completion_tokens"] = completion_tokens
        logs["tokens_per_second"] = input_tokens / seconds
        logs["step_time"] = seconds / updates
        if self.skipped_steps:
            logs["skipped_steps"] = float(self.skipped_steps)
        self._zero()
        return logs

    def state(self, gather: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Counters and unfinished sums of all ranks as JSON values; floats are text, to survive."""
        sums, low, high, _ = self._gathered(gather)
        return {
            "sums": {name: [repr(total), repr(count)] for name, (total, count) in sums.items()},
            "low": repr(low),
            "high": repr(high),
            "updates": self.updates,
            "num_tokens": self.num_tokens,
            "skipped_steps": self.skipped_steps,
        }

    def _gathered(
        self, gather: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, list[float]], float, float, int]:
        """Totals and counts over all ranks, the lowest and highest ratio, and how many ranks."""
        names = sorted(self.sums)
        packed = torch.cat([*(self.sums[name] for name in names), self.low, self.high])
        every = gather(packed[None]).reshape(-1, len(packed)).cpu()
        pairs = every[:, :-2].sum(0).view(-1, 2).tolist()
        sums = dict(zip(names, pairs, strict=True))
        return sums, float(every[:, -2].min()), float(every[:, -1].max()), len(every)

    def load(self, state: dict[str, Any], *, main: bool = True) -> None:
        """Go on from `state()`; the sums of all ranks go to the `main` one.

        Raises:
            ValueError: the state is not one of this class.
        """
        try:
            sums = {name: (float(a), float(b)) for name, (a, b) in state["sums"].items()}
            low, high = float(state["low"]), float(state["high"])
            self.sums = dict.fromkeys(sums, self.low)
            self._zero()
            if main:
                self.sums |= {name: self._number(*pair) for name, pair in sums.items()}
                self.low, self.high = self._number(low), self._number(high)
            self.updates = int(state["updates"])
            self.num_tokens = float(state["num_tokens"])
            self.skipped_steps = int(state["skipped_steps"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint's counters cannot be read: {error}") from error


class JsonLinesCallback(TrainerCallback):
    """Appends every log line to `metrics.jsonl` in the output folder.

    A resumed run first drops the lines behind its checkpoint, so that each step is there once; a
    run from the start begins a fresh file.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / "metrics.jsonl"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept = []
        if state.global_step and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # a line torn by a crash
                if row.get("step", 0) <= state.global_step and "train_runtime" not in row:
                    kept.append(line + "\n")
        write_atomic(self.path, "".join(kept).encode("utf-8"))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        row: dict[str, Any] = {"step": state.global_step}
        for name, value in logs.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            row[name] = value if finite else None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False, default=str) + "\n")
