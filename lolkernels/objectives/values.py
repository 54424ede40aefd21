"""Checks of what objectives are given, and exponentials that stay finite."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

MAX_LOG_RATIO = 60.0  # exp of it is 1e26: squares and sums of it are finite in float32
# Log-probs made elsewhere may stand above zero by the rounding of float32 logits, not by more.
ROUNDING = 1e-3


def number(name: str, value: Any) -> float:
    """A finite int or float, of Python or NumPy, as a float.

    Raises:
        ValueError: anything else; a tensor is not read, because on a GPU that means to wait for it.
    """
    if isinstance(value, Tensor):
        raise ValueError(f"{name} must be a number, got a tensor: pass float({name})")
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def positive(name: str, value: Any) -> float:
    if not number(name, value) > 0:
        raise ValueError(f"{name} must be > 0, got {value!r}")
    return float(value)


def share(name: str, value: Any) -> float:
    if not 0 <= number(name, value) <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
    return float(value)


def clip_bounds(clip: float | None) -> tuple[float, float]:
    """Log-space bounds of a ratio clipped to [1 - clip, 1 + clip]; clip >= 1 leaves no lower bound.

    With ``clip=None`` nothing is clipped but exp's own range: +-60 nats keeps the loss finite in
    float32.
    """
    if clip is None:
        return -MAX_LOG_RATIO, MAX_LOG_RATIO
    if isinstance(clip, Tensor):
        raise ValueError("clip must be None (off) or a number > 0, got a tensor: pass float(clip)")
    if isinstance(clip, bool) or not isinstance(clip, numbers.Real) or not clip > 0:
        raise ValueError(
            f"clip must be None (off) or a number > 0, got {clip!r}; "
            "for a weight of one use a_lol_ref_free or nll"
        )
    if not math.isfinite(clip):
        raise ValueError(f"clip must be finite, got {clip!r}; for no clip pass clip=None")
    return (math.log1p(-clip) if clip < 1 else -math.inf), math.log1p(clip)


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x) and its gradient; above 60, where float32 would overflow, both are e^60."""
    return torch.where(x > MAX_LOG_RATIO, x - x.detach() + MAX_LOG_RATIO, x).exp()


def check_side(name: str, value: Any) -> None:
    """Raise where a side input on the CPU holds what no loss can take; a GPU is not waited for.

    Every value must be finite; ``ref_logps`` and ``old_logps`` are log-probs, <= 0 up to rounding.

    Raises:
        ValueError: naming the input, the first bad entry, and what to do.
    """
    if not isinstance(value, Tensor) or value.device.type != "cpu" or value.is_meta:
        return
    if not value.is_floating_point() or value.numel() == 0:
        return
    flat = value.detach().reshape(-1)
    _refuse(name, flat, ~flat.isfinite(), "must be finite: mend the data, or mask the token")
    if name in ("ref_logps", "old_logps"):
        advice = "must hold log-probs, which are <= 0 (not losses, ratios or probabilities)"
        _refuse(name, flat, flat > ROUNDING, advice)


def _refuse(name: str, flat: Tensor, bad: Tensor, advice: str) -> None:
    if bool(bad.any()):
        at = int(torch.nonzero(bad)[0])
        raise ValueError(f"{name}[{at}] = {float(flat[at])}: {name} {advice}")
