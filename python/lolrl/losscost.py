"""Time and peak memory of the fused loss beside the eager one, on the same batch."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import lolkernels as lk


@dataclass(frozen=True)
class LossCost:
    """One forward and backward of A-LoL through the head, fused and eager.

    Seconds are medians, bytes the peak of tensors allocated above the inputs; `relative_error` is
    the largest difference between the two gradients, over the largest gradient.
    """

    tokens: int
    hidden_size: int
    vocabulary: int
    fused_seconds: float
    eager_seconds: float
    fused_bytes: int
    eager_bytes: int
    relative_error: float

    def to_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def peak_bytes(step: Callable[[], object]) -> int:
    """Most bytes of CPU tensors alive at once during `step`, above those alive at its start.

    Counted by the profiler from the allocator's own events, buffers inside operators included.
    """
    # The profiler announces its start and stop on stderr unless told not to.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    alive = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def compare_losses(
    hidden: torch.Tensor,  # (N, D) hidden states that predict the labels
    weight: torch.Tensor,  # (V, D) the head
    labels: torch.Tensor,  # (N,)
    ref_logps: torch.Tensor,  # (N,) nats
    advantages: torch.Tensor,  # (S,)
    seq: lk.Sequences,
    *,
    repeats: int = 7,
) -> LossCost:
    """Measure `linear_loss(a_lol)` against logits, log_softmax, gather, autograd; interleaved."""

    def leaves() -> tuple[torch.Tensor, torch.Tensor]:
        return hidden.detach().requires_grad_(), weight.detach().requires_grad_()

    def fused() -> tuple[torch.Tensor, ...]:
        x, w = leaves()
        loss = lk.linear_loss(
            lk.objectives.a_lol, x, w, labels, seq, ref_logps=ref_logps, advantages=advantages
        )
        return torch.autograd.grad(loss, (x, w))

    def eager() -> tuple[torch.Tensor, ...]:
        x, w = leaves()
        logps = (x @ w.T).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]
        loss = lk.aggregate(lk.objectives.a_lol(logps, ref_logps, advantages, seq), seq, "seq-mean")
        return torch.autograd.grad(loss, (x, w))

    error = max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
        for a, b in zip(fused(), eager(), strict=True)
    )
    seconds: dict[str, list[float]] = {"fused": [], "eager": []}
    for _ in range(repeats):
        for name, step in (("fused", fused), ("eager", eager)):
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return LossCost(
        tokens=hidden.shape[0],
        hidden_size=hidden.shape[1],
        vocabulary=weight.shape[0],
        fused_seconds=statistics.median(seconds["fused"]),
        eager_seconds=statistics.median(seconds["eager"]),
        fused_bytes=peak_bytes(fused),
        eager_bytes=peak_bytes(eager),
        relative_error=error,
    )
