"""An objective on leaves: its losses, and their gradients by autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import size
from ..sequences import Sequences
from .reductions import reduction_weights
from .registry import DIFFERENTIABLE, Objective, name_of, statistics


class Evaluated(NamedTuple):
    """What :func:`evaluate` returns. Nothing of it carries a graph."""

    seq_loss: Tensor  # (G,) unreduced
    grads: dict[str, Tensor]  # d (sum_g weights_g loss_g) / d statistic, each (N,)
    side_grads: dict[str, Tensor]  # the same for side inputs that require a gradient
    metrics: dict[str, Tensor]  # each (G,)


def evaluate(
    fn: Objective,
    stats: dict[str, Tensor],  # each (N,); those that fn does not name are left out
    seq: Sequences,
    weights: Tensor,  # (G,) of the reduction
    side: dict[str, Any],  # side inputs and options
) -> Evaluated:
    """Call an objective on leaf copies of the row statistics, and differentiate it.

    ``grads`` has an entry for each differentiable statistic that ``fn`` names, zeros where the
    loss does not depend on it. ``max_logit`` is handed over without a gradient.

    Raises:
        TypeError: a statistic that ``fn`` names is not in ``stats``.
        ValueError: the result is not ``(G,)`` losses, or ``(losses, {name: (G,) tensor})``.
    """
    named = statistics(fn)
    missing = [s for s in named if s not in stats]
    if missing:
        raise TypeError(f"{missing[0]} is missing: objective {name_of(fn)} names it")
    # Inference tensors cannot be saved for a backward; their clones out here can.
    with torch.inference_mode(False), torch.enable_grad():
        seq, weights = seq.for_autograd(), _leaf(weights, False)
        given = {s: _leaf(stats[s], s in DIFFERENTIABLE) for s in named}
        inputs = {
            k: _leaf(v, v.requires_grad) if isinstance(v, Tensor) else v for k, v in side.items()
        }
        seq_loss, metrics = call(fn, given, seq, inputs)
        wanted = {k: t for k, t in {**given, **inputs}.items() if _wants_grad(t)}
        found: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if seq_loss.requires_grad and wanted:
            # Under context parallelism it is the sum of the ranks' equal losses that is derived.
            upstream = weights.to(seq_loss.dtype) / size(seq.cp_group)
            found = torch.autograd.grad(
                seq_loss, list(wanted.values()), upstream, allow_unused=True
            )
    grads = {
        k: torch.zeros_like(t) if g is None else g.detach()
        for (k, t), g in zip(wanted.items(), found, strict=True)
    }
    return Evaluated(
        seq_loss.detach(),
        {k: g for k, g in grads.items() if k in given},
        {k: g for k, g in grads.items() if k in inputs},
        {k: m.detach() for k, m in metrics.items()},
    )


def _leaf(t: Tensor, requires_grad: bool) -> Tensor:
    leaf = t.detach().clone() if t.is_inference() else t.detach()
    return leaf.requires_grad_(requires_grad)


def _wants_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def call(
    fn: Objective, stats: dict[str, Tensor], seq: Sequences, side: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses and metrics of an objective, or an error that says what it returned instead."""
    result, name = fn(**stats, seq=seq, **side), name_of(fn)
    metrics: dict[str, Tensor] = {}
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict):
        result, metrics = result
    shape = (seq.num_groups,)
    if not isinstance(result, Tensor) or result.shape != shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(
            f"objective {name} must return unreduced losses of shape {shape}, got {got}"
        )
    if not result.is_floating_point():
        raise ValueError(f"objective {name} must return floating-point losses, got {result.dtype}")
    for key, value in metrics.items():
        if not isinstance(key, str):
            raise ValueError(f"objective {name} must name its metrics by text, got {key!r}")
        if not isinstance(value, Tensor) or value.shape != shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"metric {key} of {name} must have shape {shape}, got {got}")
    return result, metrics


def loss_and_coef(
    fn: Objective, logps: Tensor, seq: Sequences, reduction: str = "seq-mean", **side: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced loss, its coefficients and the unreduced losses, by autograd on a leaf.

    Args:
        fn: an objective that reads ``logps``.
        logps: ``(N,)`` log-probs in nats.
        seq: which sequence each of them belongs to.
        reduction: see ``aggregate``.
        **side: the side inputs and options of ``fn``, and the statistics besides ``logps`` that it
            names, which are taken as constants (:func:`evaluate` gives their gradients too).

    Returns:
        loss ``()``; coef ``(N,)``, d loss / d logps; seq_loss ``(S,)``, one per group. All are
        detached.

    Raises:
        ValueError: the objective does not read ``logps``, or returns another shape.
    """
    named, weights = statistics(fn), reduction_weights(seq, reduction)
    if "logps" not in named:
        raise ValueError(
            f"objective {name_of(fn)} reads {', '.join(named)}, no logps: call evaluate"
        )
    stats = {s: side.pop(s) for s in named if s in side}
    out = evaluate(fn, {**stats, "logps": logps}, seq, weights, side)
    loss = (out.seq_loss * weights.to(out.seq_loss.dtype)).sum()
    return loss, out.grads["logps"], out.seq_loss
