"""The triton backend with scoring on chip: row statistics of a linear head, no logits in memory.

For x = hidden W^T + bias (fp32 accumulation) the statistics of :mod:`.reference` on x, made in the
epilogue of a Triton GEMM. Chosen by name only: where it is faster than the vendor's GEMM with a
sweep over its logits has not been measured.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .triton import (
    DEVICES,
    DTYPES,
    WHOLE_ROWS,
    _device,
    _scaling,
    dlogits_,
    row_stats,
    sequence_coef,
    why_unavailable,
)

__all__ = [
    "DEVICES",
    "DTYPES",
    "GEMM_DTYPES",
    "WHOLE_ROWS",
    "dlogits_",
    "linear_row_stats",
    "row_stats",
    "sequence_coef",
    "why_unavailable",
]


GEMM_DTYPES = DTYPES


class Config(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    tma: bool  # operands come through tensor descriptors
    tiles: int  # vocabulary tiles a program


MERGE = {"BLOCK_S": 16, "BLOCK_M": 32, "num_warps": 4, "num_stages": 1}
PROGRAMS = 2048  # at least: many for each processor, so that the last round wastes little
MAX_TILES = 8


def config(
    n: int,
    D: int,
    V: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    aligned: bool = True,
) -> Config:
    """The launch of ``linear_stats``: tiles that fit the registers, with a bias and a cap too.

    `capability` is (0, 0) for a device that is not NVIDIA's; `aligned`: see :func:`_describable`.
    """
    major = capability[0]
    tma = aligned and major in (9, 10) and dtype != torch.float32
    if dtype == torch.float32:
        block = (64, 64, 16, 4, 2)
    elif n <= 64:
        block = (64, 128, 64, 4, 4) if tma else (64, 64, 32, 4, 4)
    elif not tma:
        block = (128, 128, 32, 8, 4)
    elif major == 9:
        block = (128, 256, 64, 8, 4)
    else:  # accumulators lie in tensor memory: 256 columns of them spill on the way out
        block = (128, 128, 64, 8, 4)
    programs = -(-n // block[0]) * -(-V // block[1])
    tiles = max(1, min(MAX_TILES, programs // PROGRAMS))
    return Config(*block, tma=tma, tiles=tiles)


def constants(c: Config, D: int, *, cap: bool) -> dict[str, Any]:
    """The compile-time arguments of ``linear_stats``."""
    return {
        "CAP": cap,
        "TMA": c.tma,
        "EVEN_K": D % c.BLOCK_K == 0,
        "TILES": c.tiles,
        "PRECISION": "ieee",
        "BLOCK_M": c.BLOCK_M,
        "BLOCK_N": c.BLOCK_N,
        "BLOCK_K": c.BLOCK_K,
    }


def linear_row_stats(
    hidden: Tensor,  # (n, D)
    weight: Tensor,  # (V, D), of hidden's dtype
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`target_logit, lse, expected_logit, max_logit`, each (n,) float32, of hidden W^T + bias.

    float32 operands are multiplied in float32, never in tf32. Any strides. 2 n V D flops. Bytes of
    e-byte operands: the weight is read from memory once for each 16 row blocks, e V D ceil(n / 16
    BLOCK_M), and the hidden rows e n D for as long as 16 blocks of them stay in L2; 16 n spans
    written and read for the partials, which is all the memory that a call takes beside the results
    (16 n bytes). With tiles of 256 columns and 8 a span: 8 MiB for 8192 rows of 128256 logits,
    whose float32 logits are 4 GiB.
    """
    n = hidden.shape[0]
    target, lse, expected, largest = (hidden.new_empty(n, dtype=torch.float32) for _ in range(4))
    if n:
        out = (target, lse, expected, largest)
        _launch(hidden, weight, bias, labels, out, _scaling(scale, softcap, temperature))
    return target, lse, expected, largest


def _launch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    scaling: tuple[float, float, float],
) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from . import triton_onchip_kernels as kernels

    (n, D), V = hidden.shape, weight.shape[0]
    aligned = _describable(hidden) and _describable(weight)
    c = config(n, D, V, hidden.dtype, capability(hidden.device), aligned=aligned)
    splits = -(-V // (c.BLOCK_N * c.tiles))
    parts = hidden.new_empty((4, splits, n), dtype=torch.float32)
    h: Any = hidden
    w: Any = weight
    if c.tma:
        h = TensorDescriptor.from_tensor(hidden, [c.BLOCK_M, c.BLOCK_K])
        w = TensorDescriptor.from_tensor(weight, [c.BLOCK_N, c.BLOCK_K])
    with _device(hidden):
        kernels.linear_stats[(-(-n // c.BLOCK_M) * splits,)](
            h,
            w,
            bias,
            labels,
            parts,
            n,
            D,
            V,
            splits,
            *hidden.stride(),
            *weight.stride(),
            0 if bias is None else bias.stride(0),
            labels.stride(0),
            *scaling,
            **constants(c, D, cap=scaling[1] != 0),
            num_warps=c.num_warps,
            num_stages=c.num_stages,
        )
        kernels.merge_stats[(-(-n // MERGE["BLOCK_M"]),)](
            parts, labels, *out, n, V, splits, labels.stride(0), **MERGE
        )


def capability(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda" or torch.version.hip:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def _describable(operand: Tensor) -> bool:
    """What a tensor descriptor asks for: 16-byte aligned rows of neighbouring elements."""
    rows, columns = operand.stride()
    size = operand.element_size()
    return (
        columns == 1
        and rows >= operand.shape[1] > 0
        and rows * size % 16 == 0
        and operand.data_ptr() % 16 == 0
    )
