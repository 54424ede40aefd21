"""Checks of values that stand on a GPU, without waiting for it.

On a CPU a bad value raises at once. On a GPU the kernels that read it spoil the row (nan) and set a
flag, which travels to the host behind the work and raises at the next call of this library on that
device, or in :func:`check_errors`. ``LOLKERNELS_STRICT=1`` in the environment
makes every check wait and raise at once.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from . import checks
from .objectives import check_side as check_values

LABEL, NAN, BLOCKING, RANKS = 1, 2, 4, 8
MEANING = {
    LABEL: "labels held an id outside [0, vocab): mask that token (mask=, or Sequences.from_mask), "
    "or resize the head to the tokenizer",
    NAN: "an input of the objective was nan: drop that row or mend its data",
    BLOCKING: "an objective's losses depended on which groups were evaluated together: compute "
    "what couples the batch before the call, set group_size, or use linear_logprob",
    RANKS: "labels differed between the ranks of tp_group: give all of them the same batch",
}

# Of each device: the flags there, and their copy on the host.
_flags: dict[torch.device, tuple[Tensor, Tensor]] = {}


def immediate(device: torch.device) -> bool:
    return device.type == "cpu" or os.environ.get("LOLKERNELS_STRICT") == "1"


def readable(t: Tensor) -> bool:
    """Whether the host may look at values now: on a CPU, and not while a call is being traced."""
    return (
        immediate(t.device) and not torch.compiler.is_compiling() and not isinstance(t, FakeTensor)
    )


def check_labels(labels: Tensor, vocab: int | Tensor) -> None:
    """Every label in [0, vocab): raises, or notes that one is outside."""
    if immediate(labels.device):
        checks.label_values(labels, int(vocab))
    else:
        note(LABEL, (labels < 0) | (labels >= vocab))


def label_flags(labels: Tensor, vocab: int) -> Tensor | None:
    """As :func:`check_labels`, or the device's flags: whoever reads the labels sets LABEL there."""
    if immediate(labels.device):
        checks.label_values(labels, vocab)
        return None
    return flags(labels.device)


def check_side(name: str, value: Tensor, *, seen: bool = False) -> None:
    """No side input may be nan; what stands on a CPU is checked as objectives.check_side does.

    seen: the kernel that reads it sets NAN.
    """
    check_values(name, value)
    if not (seen or immediate(value.device)):
        note(NAN, value.isnan())


def note(flag: int, bad: Tensor) -> None:
    """Sets a flag where anything is bad. Flags stay until they have been raised."""
    flags(bad.device).bitwise_or_(bad.any().to(torch.int32) * flag)


def send(device: torch.device) -> None:
    """The flags that work so far sets go to the host behind it."""
    if device in _flags:
        there, here = _flags[device]
        here.copy_(there, non_blocking=True)


def raise_noted(device: torch.device) -> None:
    """Raises what earlier work has flagged, as far as the host has heard of it. Does not wait."""
    if device not in _flags:
        return
    there, here = _flags[device]
    found = int(here)
    if not found:
        return
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # an error is about to be raised: no copy may come after it
    there.zero_()
    here.zero_()
    texts = [text for flag, text in MEANING.items() if found & flag]
    raise ValueError(
        f"in an earlier call on {device}: {'; '.join(texts)} (LOLKERNELS_STRICT=1 "
        "raises in the call itself)"
    )


def check_errors() -> None:
    """Wait for all GPUs in use and raise what their checks have found.

    Raises:
        ValueError: a label outside the vocabulary or a nan input in an earlier call. Its outputs
        were nan.
    """
    for device in list(_flags):
        send(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        raise_noted(device)


def flags(device: torch.device) -> Tensor:
    """() int32 on the device: LABEL, NAN and BLOCKING are its bits."""
    if device not in _flags:
        here = torch.zeros((), dtype=torch.int32, pin_memory=device.type == "cuda")
        _flags[device] = torch.zeros((), dtype=torch.int32, device=device), here
    return _flags[device][0]
