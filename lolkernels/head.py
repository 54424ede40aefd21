"""The language-model head as a module: per-token log-probs, or a whole loss, instead of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .logprob import linear_logprob
from .loss import linear_loss
from .objectives import Objective
from .sequences import Sequences


class LogprobHead(nn.Module):
    """A linear head that scores labels without holding logits.

    ``head(hidden)`` gives logits, as ``nn.Linear`` does. ``head(hidden, labels)`` gives
    :func:`lolkernels.linear_logprob`'s output, and
    ``head(hidden, labels, seq, objective=..., **side)`` :func:`lolkernels.linear_loss`'s.

    Args:
        linear: the layer whose ``weight`` (V, D) and ``bias`` are used; its parameters are shared.
        softcap, logit_scale: of the model, see :func:`lolkernels.linear_logprob`.
        backend, memory_budget: as there.
    """

    def __init__(
        self,
        linear: nn.Module,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        backend: str | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        check_linear(linear)
        self.linear = linear
        self.options: dict[str, Any] = {
            "softcap": softcap,
            "logit_scale": logit_scale,
            "backend": backend,
            "memory_budget": memory_budget,
        }

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        seq: Sequences | Tensor | None = None,
        *,
        objective: Objective | None = None,
        group_size: int | None = None,
        **options: Any,
    ) -> Any:
        """See the class. ``seq`` may be a (B, T) mask: each row is a sequence, ``group_size`` of
        them (1) form a group, as in :meth:`lolkernels.Sequences.from_mask`."""
        if labels is None:
            if seq is not None or objective is not None or group_size is not None or options:
                raise ValueError("labels is missing: scoring and losses need it")
            return scaled_logits(self.linear(hidden), self.options)
        if isinstance(seq, Tensor):
            seq = Sequences.from_mask(seq, group_size=1 if group_size is None else group_size)
        elif group_size is not None and (seq is None or seq.group_size != group_size):
            raise ValueError(
                f"group_size={group_size} groups the rows of a (B, T) mask given as seq; give it "
                "to the constructor of a Sequences instead"
            )
        return fused_head(
            self.linear, hidden, labels, seq, objective=objective, **self.options, **options
        )


def scaled_logits(logits: Tensor, options: dict[str, Any]) -> Tensor:
    logits = logits * options["logit_scale"]
    cap = options["softcap"]
    return logits if cap is None else cap * torch.tanh(logits / cap)


def fused_head(
    linear: Any,
    hidden: Tensor,  # (..., D)
    labels: Tensor,  # (...)
    seq: Sequences | None = None,
    *,
    objective: Objective | None = None,
    main_grad: bool = False,
    **options: Any,
) -> Any:
    """The head's result without logits; reads ``linear.weight`` and ``linear.bias``."""
    if main_grad and torch.is_grad_enabled():
        options["accumulate_into"] = getattr(linear.weight, "main_grad", None)
        if options["accumulate_into"] is None:
            raise ValueError(
                "the head's weight has no main_grad: give it one, such as torch.zeros_like(weight, "
                "dtype=torch.float32), or leave main_grad out"
            )
    if objective is None:
        return linear_logprob(
            hidden, linear.weight, labels, bias=getattr(linear, "bias", None), **options
        )
    if seq is None:
        raise ValueError("seq is missing: an objective needs to know the sequences")
    return linear_loss(
        objective,
        hidden,
        linear.weight,
        labels,
        seq,
        bias=getattr(linear, "bias", None),
        return_outputs=True,
        **options,
    )


def check_linear(linear: Any) -> None:
    """Refuse what is not x W^T + b with a floating (V, D) weight that holds the whole truth."""
    if hasattr(linear, "base_layer") or hasattr(linear, "original_module"):
        raise ValueError(
            "the head carries an adapter (LoRA or modules_to_save), which reading its weight would "
            "leave out: take lm_head out of target_modules and modules_to_save, or merge it"
        )
    weight = getattr(linear, "weight", None)
    if not isinstance(linear, nn.Module) or not isinstance(weight, Tensor):
        raise TypeError(f"the head must be a linear layer with a weight, got {type(linear)}")
    problem = None
    if not weight.is_floating_point():
        problem = f"its weight is {weight.dtype}: dequantise it"
    elif type(linear).forward is not nn.Linear.forward and is_materialised(weight):
        problem = _unlike_a_linear_layer(linear, weight)
    if problem is not None:
        raise TypeError(
            f"the head must be a linear layer, logits = x W^T + b with W of shape (V, D); this "
            f"{type(linear).__name__} is none: {problem}"
        )


def _unlike_a_linear_layer(linear: nn.Module, weight: Tensor) -> str | None:
    """What tells a layer with a forward of its own from a linear one, on one row; None if equal."""
    if weight.dim() != 2:
        return f"its weight has shape {tuple(weight.shape)}"
    x = torch.linspace(-1.0, 1.0, weight.shape[1], device=weight.device).to(weight.dtype)[None]
    with torch.no_grad():
        want = nn.functional.linear(x, weight, getattr(linear, "bias", None))
        try:
            got = linear.forward(x)
        except Exception as error:
            return f"it does not take x of shape (1, {weight.shape[1]}): {error}"
    if not isinstance(got, Tensor) or got.shape != want.shape or not close(got, want):
        return "its forward gives something else"
    return None


def is_materialised(parameter: Tensor) -> bool:
    """False where values are elsewhere: on the meta device, in a DTensor, or in ZeRO-3's shards."""
    return not (
        parameter.is_meta or parameter.numel() == 0 or type(parameter).__name__ == "DTensor"
    )


def close(got: Tensor, want: Tensor) -> bool:
    """Equal up to one rounding of their dtype, relative to the largest value."""
    tolerance = max(torch.finfo(got.dtype).eps, torch.finfo(want.dtype).eps, 1e-5)
    difference = (got.double() - want.double()).abs().max()
    return bool(difference <= tolerance * want.abs().max().double() + 1e-12)
