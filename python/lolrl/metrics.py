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

SUMS = (
    "loss",
    "sequences",
    "tokens",
    "input_tokens",
    "scored_tokens",
    "logps",
    "entropy",
    "ratios",
    "ratio",
    "clipped",
    "ref_sequences",
    "log_ratio",
    "advantage",
    "advantage_sequences",
    "positive",
    "unlearned",
    "reward",
    "reward_sequences",
)
TOKEN_RATIO = ("a_lol_seq",)
SEQUENCE_RATIO = ("a_lol", "r_lol")
# exp of this is the largest finite number logs (and JSON) can hold with room for a mean.
MAX_LOG_RATIO = 700.0


class Meter:
    """Accumulates what `LoLTrainer` logs between two log lines.

    ratio/{min,mean,max} are those of the ratio the objective uses (whole-sequence for a_lol and
    r_lol, per token for a_lol_seq, before the clip; whole-sequence for other objectives with a
    reference), clip_ratio the share outside [1 - clip, 1 + clip], kl the mean over sequences of
    sum_t (l_t - l^r_t) in nats, entropy and logps/mean means over the tokens that were scored
    (sequences without weight are not), unlearned_share the share of rows a KL objective pushes
    down.
    """

    def __init__(self, objective: str, *, clip: float | None, beta: float, device: Any) -> None:
        self.objective, self.clip, self.beta = objective, clip, beta
        self.device = torch.device(device)
        self.num_tokens = 0.0
        self.skipped_steps = 0
        self._zero()

    def _zero(self) -> None:
        self._started: float | None
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)
        self.low = torch.full((), math.inf, dtype=torch.float64, device=self.device)
        self.high = torch.full((), -math.inf, dtype=torch.float64, device=self.device)
        self.updates, self.seconds, self._started = 0, 0.0, None

    def begin_update(self) -> None:
        """Start the clock: evaluation, logging and saving between updates are not step time."""
        self._started = time.monotonic()

    def end_update(self) -> None:
        """Stop the clock and count the update."""
        self.updates += 1
        if self._started is not None:
            self.seconds += time.monotonic() - self._started
        self._started = None

    def _add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self.sums[SUMS.index(name)] += value

    @torch.no_grad()
    def add(self, out: Any, inputs: dict[str, Tensor]) -> None:
        """Count one micro-batch: `out` of the fused model, `inputs` of the collator."""
        seq, mask = out.seq, inputs["completion_mask"]
        present = seq.lengths > 0
        scored = ~torch.isnan(out.logps)
        logps = out.logps.double()
        self._add(
            loss=out.loss.detach().double(),
            sequences=present.sum(),
            tokens=float(seq.num_tokens),
            input_tokens=inputs["attention_mask"].sum(),
            scored_tokens=scored.sum(),
            logps=torch.where(scored, logps, 0.0).sum(),
            entropy=torch.where(scored, out.entropy.double(), 0.0).sum(),
        )
        if "ref_logps" in inputs:
            self._add_ratio(logps, inputs["ref_logps"][mask].double(), scored, seq, present)
        if "advantages" in inputs:
            advantages = inputs["advantages"].double()
            self._add(
                advantage=(advantages * present).sum(),
                advantage_sequences=present.sum(),
                positive=((advantages > 0) & present).sum(),
            )
            if self.objective == "a_lol_kl":
                self._add(unlearned=((advantages.clamp(min=0) < self.beta) & present).sum())
        if "rewards" in inputs:
            rewards = inputs["rewards"].double()
            self._add(reward=(rewards * present).sum(), reward_sequences=present.sum())
            if self.objective == "r_lol_kl":
                self._add(unlearned=((rewards < self.beta) & present).sum())

    def _add_ratio(
        self, logps: Tensor, ref: Tensor, scored: Tensor, seq: Any, present: Tensor
    ) -> None:
        token = torch.where(scored, logps - ref, 0.0)
        whole = torch.zeros(seq.num_sequences, dtype=torch.float64, device=logps.device)
        whole = whole.index_add(0, seq.token_to_sequence, token)
        # A sequence is scored as a whole or not at all.
        counted = torch.zeros_like(whole).index_add(0, seq.token_to_sequence, scored.double()) > 0
        self._add(ref_sequences=counted.sum(), log_ratio=torch.where(counted, whole, 0.0).sum())
        log_ratio, use = (token, scored) if self.objective in TOKEN_RATIO else (whole, counted)
        ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        self._add(ratios=use.sum(), ratio=torch.where(use, ratio, 0.0).sum())
        if ratio.numel():
            self.low = torch.minimum(self.low, torch.where(use, ratio, math.inf).min())
            self.high = torch.maximum(self.high, torch.where(use, ratio, -math.inf).max())
        if self.clip is not None and self.objective in TOKEN_RATIO + SEQUENCE_RATIO:
            outside = (ratio < 1 - self.clip) | (ratio > 1 + self.clip)
            self._add(clipped=(outside & use).sum())

    def pop(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The log line's figures over all ranks; starts the next line.

        `gather` turns one rank's (k,) tensor into all ranks' (ranks, k).
        """
        every = self._gathered(gather)
        sums = dict(zip(SUMS, every[:, :-2].sum(0).tolist(), strict=True))
        low, high = float(every[:, -2].min()), float(every[:, -1].max())
        ranks, updates = len(every), max(self.updates, 1)
        seconds = max(self.seconds, 1e-9)
        self.num_tokens += sums["input_tokens"]
        logs = {"loss": sums["loss"] / updates / ranks}

        def mean(name: str, total: str, count: str) -> None:
            if sums[count]:
                logs[name] = sums[total] / sums[count]

        mean("logps/mean", "logps", "scored_tokens")
        mean("entropy", "entropy", "scored_tokens")
        if sums["ratios"]:
            logs["ratio/min"], logs["ratio/max"] = low, high
            mean("ratio/mean", "ratio", "ratios")
            mean("kl", "log_ratio", "ref_sequences")
            if self.objective in TOKEN_RATIO + SEQUENCE_RATIO:
                mean("clip_ratio", "clipped", "ratios")
        mean("advantage/mean", "advantage", "advantage_sequences")
        mean("positive_share", "positive", "advantage_sequences")
        mean("reward/mean", "reward", "reward_sequences")
        if self.objective.endswith("_kl"):
            mean("unlearned_share", "unlearned", "sequences")
        logs["num_tokens"] = self.num_tokens
        logs["completion_tokens"] = sums["tokens"]
        logs["tokens_per_second"] = sums["input_tokens"] / seconds
        logs["step_time"] = seconds / updates
        if self.skipped_steps:
            logs["skipped_steps"] = float(self.skipped_steps)
        self._zero()
        return logs

    def state(self, gather: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Counters and unfinished sums of all ranks as JSON values; floats are text, to survive."""
        every = self._gathered(gather)
        return {
            "sums": [repr(v) for v in every[:, :-2].sum(0).tolist()],
            "low": repr(float(every[:, -2].min())),
            "high": repr(float(every[:, -1].max())),
            "updates": self.updates,
            "num_tokens": self.num_tokens,
            "skipped_steps": self.skipped_steps,
        }

    def _gathered(self, gather: Callable[[Tensor], Tensor]) -> Tensor:  # (ranks, len(SUMS) + 2)
        packed = torch.cat([self.sums, self.low[None], self.high[None]])
        return gather(packed[None]).reshape(-1, len(packed)).cpu()

    def load(self, state: dict[str, Any], *, main: bool = True) -> None:
        """Go on from `state()`; the sums of all ranks go to the `main` one.

        Raises:
            ValueError: the state is not one of this class.
        """
        try:
            sums = [float(v) for v in state["sums"]]
            if len(sums) != len(SUMS):
                raise ValueError(f"{len(sums)} sums instead of {len(SUMS)}")
            self._zero()
            if main:
                self.sums += torch.tensor(sums, dtype=torch.float64, device=self.device)
                self.low.fill_(float(state["low"]))
                self.high.fill_(float(state["high"]))
            self.updates = int(state["updates"])
            self.num_tokens = float(state["num_tokens"])
            self.skipped_steps = int(state["skipped_steps"])
        except (KeyError, TypeError, ValueError) as error:
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
