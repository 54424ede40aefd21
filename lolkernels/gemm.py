"""Matrix products that accumulate in fp32 and come out in fp32, whatever the operands' dtype.

Rounding logits to bf16 first would shift the summed log-prob of a sequence by 0.1 nat and more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def matmul(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """out = a b, or out += a b; a and b have one dtype.

    ``out`` is fp32 (fp64 for fp64 operands), or has the operands' dtype: it is then rounded once,
    from fp32. On a GPU half-precision operands go to the vendor's library with fp32 output. Where
    torch cannot add to it there (see :func:`adds_in_fp32`), blocks of the product are made and
    added. On a CPU they are converted: a path for tests only, the walk there converts weights panel
    by panel.
    """
    if a.dtype == out.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif not a.is_cuda:
        matmul(a.to(out.dtype), b.to(out.dtype), out, accumulate=accumulate)
    elif not accumulate:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif adds_in_fp32(a.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        for i in range(0, out.shape[0], 8192):
            out[i : i + 8192] += torch.mm(a[i : i + 8192], b, out_dtype=out.dtype)


@contextmanager
def ieee_fp32() -> Iterator[None]:
    """Within the block fp32 products are IEEE fp32, whatever TF32 and bf16 flags the caller has."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    found = [s.fp32_precision for s in settings]
    for s in settings:
        s.fp32_precision = "ieee"
    try:
        yield
    finally:
        for s, value in zip(settings, found, strict=True):
            s.fp32_precision = value


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def operand_dtype(hidden: Tensor, weight: Tensor, *, panels: bool) -> torch.dtype:
    """The dtype in which a call's products take their operands.

    Under ``torch.autocast`` on a GPU it is autocast's; otherwise the tensors' own where both have
    the same and products of it come out in fp32, and else fp32. With ``panels``, on a CPU, it is
    always fp32: without matrix units half-precision products run at half the fp32 rate. Float64
    stays.
    """
    wide = accumulation_dtype(hidden, weight)
    device = hidden.device
    if panels or wide == torch.float64:
        return wide
    if device.type != "cpu" and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    else:
        dtype = hidden.dtype if hidden.dtype == weight.dtype else wide
    return dtype if dtype not in HALF or has_fp32_output(device, dtype) else wide


@cache
def has_fp32_output(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of matrices of this half-precision dtype come out in fp32 on this device.

    Since torch 2.8 on NVIDIA. Elsewhere operands are converted to fp32, panel by panel.
    """
    return device.type == "cpu" or _works(device, dtype, accumulate=False)


@cache
def adds_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``torch.addmm`` adds such a product to an fp32 matrix (not in torch 2.8)."""
    return _works(device, dtype, accumulate=True)


def _works(device: torch.device, dtype: torch.dtype, *, accumulate: bool) -> bool:
    """By trying it: builds and cards differ (old ones lack bf16) and none of them says so."""
    a = torch.ones(16, 16, device=device, dtype=dtype)
    out = torch.zeros(16, 16, device=device)
    try:
        if accumulate:
            torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, a, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return True
