"""The side inputs of ``linear_loss``: their kinds, their errors, and the rows that take part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, deferred, objectives
from .objectives import Objective
from .sequences import Sequences


def side_tensors(
    needed: dict[str, str],
    side: dict[str, Any],
    seq: Sequences,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[dict[str, tuple[str, Tensor]], tuple[tuple[str, Any], ...]]:
    """The side inputs as name -> (kind, tensor), and options, or an error naming the wrong one."""
    for name in side:
        if name not in needed:
            raise TypeError(
                f"{name} is not an input of this objective; it takes "
                f"{', '.join(needed) or 'none'}{checks.nearest(name, needed)}"
            )
    tensors: dict[str, tuple[str, Tensor]] = {}
    options: list[tuple[str, Any]] = []
    for name, kind in needed.items():
        if name not in side:
            if kind == "option":
                continue
            raise TypeError(f"{name} is missing: the objective needs it ({kind} input)")
        value = side[name]
        if kind == "option" and not isinstance(value, Tensor):
            options.append((name, value))
            continue
        kind, value = _side_tensor(name, kind, value, seq)
        on_host = kind == "sequence" and value.device.type == "cpu"
        if value.device != device and not on_host:
            raise ValueError(f"{name} is on {value.device} but hidden is on {device}; move it")
        tensors[name] = kind, value.to(dtype)
    return tensors, tuple(options)


def _side_tensor(name: str, kind: str, value: Any, seq: Sequences) -> tuple[str, Tensor]:
    checks.tensor(name, value)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be a real tensor, got {value.dtype}")
    checks.no_forward_mode(**{name: value})
    if value.dim() == 2 and seq.mask_shape is not None and kind in ("token", "tensor"):
        return "token", seq.pack(value)
    n, s = seq.num_tokens, seq.num_sequences
    if kind in ("tensor", "option"):
        if value.dim() == 0:
            return "whole", value
        if n == s and value.shape == (n,) and bool((seq.cu_seqlens.diff() != 1).any()):
            raise ValueError(
                f"{name} of shape ({n},) may be per token or per sequence: annotate the "
                "objective's parameter with lolkernels.objectives.PerToken or PerSequence"
            )
        kind = "token" if value.shape == (n,) else "sequence"
    expected = (n,) if kind == "token" else (s,)
    if value.shape != expected:
        raise ValueError(
            f"{name} must have shape {expected}, one value per {kind}; got {tuple(value.shape)}"
        )
    return kind, value


def active_rows(
    objective: Objective,
    inputs: dict[str, tuple[str, Tensor]],
    options: tuple[tuple[str, Any], ...],
    seq: Sequences,
) -> tuple[Tensor, Tensor] | None:
    """The rows and the sequences that take part; None where all do.

    A sequence takes no part where its loss and coefficient are zero whatever the log-probs are. To
    look at what stands on a GPU would be to wait for it: all sequences take part then.
    """
    family = objectives.traits(objective).family
    if family is None:
        return None
    if seq.group_size != 1:
        raise ValueError(
            f"objective {objectives.name_of(objective)} scores single sequences: build seq with "
            f"group_size=1, not {seq.group_size}"
        )
    values = {name: value.detach() for name, (_, value) in inputs.items()}
    if not any(deferred.readable(t) for t in (seq.lengths, *values.values())):
        return None
    fam = family(seq=seq, **values, **objectives.defaults(objective) | dict(options))
    if deferred.readable(fam.weight):
        objectives.warn_unlearned(objective, fam)
    if fam.beta != 0 or not deferred.readable(fam.weight):
        return None
    active = (fam.weight != 0).cpu()
    if bool(active.all()):
        return None
    rows = torch.repeat_interleave(active, seq.cu_seqlens.diff()).nonzero().squeeze(1)
    return rows.to(seq.device), active.nonzero().squeeze(1).to(seq.device)
