"""Argument errors, written once: what is wrong, with which argument, and what to pass instead."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise ValueError(
            f"{name} is a DTensor: call the head inside the wrapped module's forward, where its "
            "parameters are gathered (see fuse_lm_head), or pass the local shard"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    return value


def floating(name: str, value: Any) -> Tensor:
    t = tensor(name, value)
    if t.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {t.dtype}")
    return t


def same_device(**tensors: Tensor | None) -> None:
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    first_name, first = next(iter(devices.items()))
    for name, device in devices.items():
        if device != first:
            raise ValueError(
                f"{name} is on {device} but {first_name} is on {first}; move {name} there"
            )


def head(hidden: Any, weight: Any, bias: Any, labels: Any) -> None:
    """hidden (..., D), weight (V, D), bias (V,) or None, labels (...) integers."""
    floating("hidden", hidden)
    floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape (V, D), got {tuple(weight.shape)}")
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(
            f"weight is empty, shape {tuple(weight.shape)}: a sharded (ZeRO-3, FSDP) parameter has "
            "to be gathered first; call the head inside the wrapped module's forward "
            "(see fuse_lm_head)"
        )
    if hidden.dim() < 2:
        raise ValueError(f"hidden must have shape (N, D) or (..., D), got {tuple(hidden.shape)}")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has D={hidden.shape[-1]} but weight has D={weight.shape[1]}: "
            "weight must be (V, D) with hidden's D"
        )
    label_ids("labels", labels, hidden.shape[:-1], "hidden's leading dimensions")
    if bias is not None:
        floating("bias", bias)
        if bias.shape != (weight.shape[0],):
            raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    doubles = [
        name
        for name, t in (("hidden", hidden), ("weight", weight), ("bias", bias))
        if t is not None and (t.dtype == torch.float64) != (hidden.dtype == torch.float64)
    ]
    if doubles:
        raise TypeError(
            f"{doubles[0]} and hidden ({hidden.dtype}) differ: float64 does not mix with "
            "other dtypes; convert one of them"
        )
    same_device(hidden=hidden, weight=weight, labels=labels, bias=bias)


def low_rank(value: Any, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(low (..., r), up (V, r)) of hidden's and weight's dtypes."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"low_rank must be a pair (low, up), got {type(value).__name__}")
    pairs = (("low", value[0], "hidden", hidden), ("up", value[1], "weight", weight))
    for name, t, of, beside in pairs:
        name = f"low_rank's {name}"
        if floating(name, t).dtype != beside.dtype:
            raise TypeError(f"{name} must have {of}'s {beside.dtype}, got {t.dtype}")
        if t.shape[:-1] != beside.shape[:-1] or t.shape[-1:] != value[0].shape[-1:]:
            raise ValueError(
                f"{name} must have shape {(*beside.shape[:-1], 'r')} with one r for low and up, "
                f"got {tuple(t.shape)}"
            )
    same_device(hidden=hidden, low=value[0], up=value[1])
    return value[0], value[1]


def label_ids(name: str, labels: Any, shape: Any, of: str) -> None:
    tensor(name, labels)
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 token ids, got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, {of}; got {tuple(labels.shape)}")


def label_values(labels: Tensor, vocab: int) -> None:
    """Every label in [0, vocab), or an error naming the first bad row."""
    if labels.numel() == 0:
        return
    low, high = torch.aminmax(labels)
    if int(low) < 0 or int(high) >= vocab:
        row = int(((labels < 0) | (labels >= vocab)).nonzero()[0, 0])
        raise ValueError(
            f"labels[{row}] = {int(labels[row])} is outside [0, {vocab}), the rows of weight; mask "
            "that token (mask=, or Sequences.from_mask), or resize the head to the tokenizer"
        )


def positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number > 0, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value}")
    return float(value)


def scaling(temperature: Any, softcap: Any, logit_scale: Any) -> tuple[float, float, float]:
    """(scale, softcap, temperature) as the row functions take them; no softcap is 0.0."""
    return (
        positive("logit_scale", logit_scale),
        0.0 if softcap is None else positive("softcap", softcap),
        positive("temperature", temperature),
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the name that was meant, where one is close."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {found[0]}?)" if found else ""


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def no_forward_mode(**tensors: Tensor | None) -> None:
    """Forward-mode differentiation would silently give zero."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for name, t in tensors.items():
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(
                f"{name} has a forward-mode tangent, but lolkernels ops have no forward-mode "
                "derivative (jvp, forward_ad): use reverse mode"
            )


def budget(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"memory_budget must be an int (bytes) or None, got {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"memory_budget must be > 0 bytes, got {value}")
    return value


def accumulator(into: Any, weight: Tensor) -> None:
    """A buffer (V, D) to which the gradient of ``weight`` may be added behind autograd's back."""
    name = "accumulate_into"
    floating(name, into)
    if into.shape != weight.shape:
        raise ValueError(
            f"{name} must have weight's shape {tuple(weight.shape)}, got {tuple(into.shape)}"
        )
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if into.dtype not in (wide, weight.dtype):
        raise TypeError(f"{name} must be {wide} or weight's {weight.dtype}, got {into.dtype}")
    same_device(weight=weight, accumulate_into=into)
    if into.requires_grad:
        raise ValueError(f"{name} requires a gradient: pass a buffer, such as weight.main_grad")
    if not weight.requires_grad or not weight.is_leaf:
        raise ValueError(
            f"{name} takes the gradient of a trained parameter, but weight "
            + ("is made of others: pass the parameter" if weight.requires_grad else "is frozen")
            + f", or leave {name} out"
        )
    if torch.compiler.is_compiling():
        return
    ddp: Any = nn.parallel.DistributedDataParallel._active_ddp_module
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        reader = "gradient hooks (DeepSpeed, or an optimiser inside the backward, sets them)"
    elif ddp is not None and any(weight is p for p in ddp._module_parameters):
        reader = "DistributedDataParallel around it (it can be told to ignore a parameter)"
    else:
        return
    raise ValueError(f"weight has {reader}, which would miss what goes into {name}: leave it out")


def token_mask(mask: Any, labels: Tensor) -> Tensor:
    tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}; pass mask.bool()")
    if mask.shape != labels.shape:
        raise ValueError(
            f"mask must have labels' shape {tuple(labels.shape)}, got {tuple(mask.shape)}"
        )
    same_device(labels=labels, mask=mask)
    kept: Tensor = mask
    return kept
