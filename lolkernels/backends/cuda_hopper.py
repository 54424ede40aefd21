"""The cuda backend with a GEMM of its own for NVIDIA's Hopper: no float32 logits in memory.

For x = hidden W^T + bias (fp32 accumulation) the GEMM's epilogue takes the statistics of each row's
256 columns while they are in registers, and writes e^(z - maximum) in the operands' dtype instead
of x. One light pass over them makes the gradient of the logits, for any loss of the log-probs: its
coefficient need not be known before. In all 6 bytes a logit instead of 14, half the memory a row.

Chosen by name only: where it is faster than the vendor's GEMM with two sweeps over its logits has
not been measured.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cuda import DEVICES, DTYPES, _compiled, dlogits_, row_stats, sequence_coef
from .cuda import why_unavailable as _why_cuda_is_unavailable

__all__ = [
    "DEVICES",
    "DTYPES",
    "GEMM_DTYPES",
    "dlogits_",
    "linear_row_stats",
    "linear_spans",
    "row_stats",
    "sequence_coef",
    "span_dlogits_",
    "why_unavailable",
]

GEMM_DTYPES = (torch.bfloat16, torch.float16)  # others go to the vendor's library
SPAN = 256  # columns whose statistics are taken at once: kSpan of csrc/cuda/spans.cuh
SCHEDULE = 1  # of the GEMM's two warpgroups; see csrc/cuda/hopper.h

Stats = tuple[Tensor, Tensor, Tensor, Tensor]


class Spans(NamedTuple):
    """What turns exponentials into gradients."""

    parts: Tensor  # (3, spans, n) float32
    target_logit: Tensor  # (n,) float32
    target_slope: Tensor  # (n,) float32


@cache
def why_unavailable() -> str | None:
    """None where the GEMM can run, else the reason and what to do about it."""
    reason: str | None = _why_cuda_is_unavailable()
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return (
            "it needs a GPU of compute capability 9.0 (Hopper), this one has "
            f"{capability[0]}.{capability[1]}: use backend='cuda'"
        )
    if not hasattr(_compiled.ops, "linear_spans"):
        return (
            "the CUDA kernels were built without CUTLASS: `pip install --no-deps nvidia-cutlass`, "
            "then `pip install --no-build-isolation .` in the source tree"
        )
    return None


def check_operands(*operands: Tensor) -> None:
    """What TMA loads: rows of adjacent elements from addresses that are multiples of 16 bytes."""
    for name, t in zip(("hidden", "weight"), operands, strict=True):
        if t.shape[1] % 8 or t.shape[1] == 0:
            raise ValueError(
                f"backend='cuda_hopper' needs {name} to have a multiple of 8 columns, not "
                f"{t.shape[1]}: use backend='cuda'"
            )
        rows, columns = t.stride()
        if columns != 1 or (t.shape[0] > 1 and (rows < t.shape[1] or rows % 8)):
            raise ValueError(
                f"backend='cuda_hopper' needs {name} with rows of adjacent elements that start at "
                f"multiples of 16 bytes, not strides {t.stride()}: pass {name}.contiguous()"
            )
        if t.data_ptr() % 16:
            raise ValueError(
                f"backend='cuda_hopper' needs {name} to start at a multiple of 16 bytes: pass "
                f"{name}.clone()"
            )


def linear_spans(
    hidden: Tensor,  # (n, D) bfloat16 or float16, D a multiple of 8
    weight: Tensor,  # (V, D) of hidden's dtype
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64
    out: Tensor | None,  # (n, V) of hidden's dtype
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Stats, Spans]:
    """The statistics of hidden W^T + bias, and in `out` what :func:`span_dlogits_` takes.

    `out` holds e^(z - m) dz/dx / (scale / temperature), m the maximum of the row's 256 columns.
    Rows of all three matrices are adjacent elements and start at multiples of 16 bytes; those of
    `out` have room for a multiple of 8 columns. 2 n V D flops; 2 n V bytes are written, beside
    12 n ceil(V / 256) of statistics.
    """
    check_operands(hidden, weight)
    if bias is not None:
        bias = torch.nn.functional.pad(bias.float(), (0, -weight.shape[0] % SPAN))
    *stats, slope, parts = _compiled.ops.linear_spans(
        hidden, weight, bias, labels, out, scale, softcap, temperature, SCHEDULE
    )
    target, lse, expected, largest = stats
    return (target, lse, expected, largest), Spans(parts, target, slope)


def span_dlogits_(
    x: Tensor,  # (n, V): `out` of linear_spans, overwritten
    spans: Spans,
    labels: Tensor,  # (n,) int64
    lse: Tensor,  # (n,) float32
    coef: Tensor,  # (n,) float32
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """`coef ([v == y] - exp(z - lse)) dz/dx` over x. 2 bytes a logit are read and 2 written.

    The label's gradient comes from its float32 logit, so that a probability near one costs no
    digits.
    """
    _compiled.ops.span_dlogits(
        x,
        spans.parts,
        labels,
        spans.target_logit,
        spans.target_slope,
        lse,
        coef,
        scale,
        softcap,
        temperature,
    )
    return x


def linear_row_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    **scaling: Any,
) -> Stats:
    """`target_logit, lse, expected_logit, max_logit`, each (n,) float32; no logits in memory."""
    return linear_spans(hidden, weight, bias, labels, None, **scaling)[0]
