"""Row statistics of a linear head in one Triton kernel: no logits in memory at all.

For x = hidden W^T + bias (fp32 accumulation) the statistics of :mod:`.reference` on x. One program
takes BLOCK_M rows and walks a few neighbouring vocabulary tiles: a GEMM tile in registers, whose
epilogue folds it into the running statistics of its rows. What programs hand over is 16 bytes for
each row and span of tiles; a second kernel merges them in a fixed order. There are no atomics:
results are bit-reproducible on one device. Offsets are int64.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .triton import (
    DEVICES,
    DTYPES,
    _device,
    _scaling,
    dlogits_,
    row_stats,
    sequence_coef,
    why_unavailable,
)
from .triton_kernels import NAN, NEG_INF, POS_INF, finite_or_zero, log_of_1_plus, transform

__all__ = [
    "DEVICES",
    "DTYPES",
    "dlogits_",
    "linear_row_stats",
    "row_stats",
    "sequence_coef",
    "why_unavailable",
]

# Row blocks that share each vocabulary tile while it is in L2. Their hidden rows stay there too:
# 16 MiB of bf16 for 128 rows of 4096.
GROUP_M = tl.constexpr(16)


@triton.jit
def shifted_exp(z, base):
    """d = z - base and e^d for z <= base, with e d = 0 at z = -inf and nan kept.

    Below -200 the exponential is 0 whatever d is.
    """
    d = tl.maximum(z - base, -200.0, propagate_nan=tl.PropagateNan.ALL)
    return d, tl.exp(d)


@triton.jit
def linear_stats(
    h,  # (n, D): pointer, or descriptor of (BLOCK_M, BLOCK_K) blocks
    w,  # (V, D): pointer, or descriptor of (BLOCK_N, BLOCK_K) blocks
    bias_ptr,  # (V,) or None
    labels_ptr,  # (n,) int64
    part_ptr,  # (4, splits, n) fp32
    n,
    D,
    V,
    splits,
    h_row,
    h_col,
    w_row,
    w_col,
    bias_row,
    labels_row,
    scale,
    softcap,
    inv_temperature,
    CAP: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Partial statistics of BLOCK_M rows over TILES vocabulary tiles.

    Per row: the maximum m, total = sum e^(z - m), dev = sum e^(z - m) (z - m), and z at the label
    (0 where it lies in another span).
    """
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(n, BLOCK_M)
    group = pid // (GROUP_M * splits)
    group_size = min(row_blocks - group * GROUP_M, GROUP_M)
    within = pid - group * GROUP_M * splits
    row0 = (group * GROUP_M + within % group_size) * BLOCK_M
    split = within // group_size

    rows = row0 + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last one: a load without a mask can be asynchronous and wide.
    h_rows = tl.minimum(rows, n - 1).to(tl.int64)
    label = tl.load(labels_ptr + h_rows * labels_row)
    label = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)
    m = tl.full([BLOCK_M], NEG_INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    dev = tl.zeros([BLOCK_M], tl.float32)
    target = tl.zeros([BLOCK_M], tl.float32)
    first = split * TILES
    last = min(first + TILES, tl.cdiv(V, BLOCK_N))
    for tile in range(first, last):
        v0 = tile * BLOCK_N
        v = v0 + tl.arange(0, BLOCK_N)
        w_rows = tl.minimum(v, V - 1).to(tl.int64)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if bias_ptr is not None:  # before the products: after them it would cost registers
            acc += tl.load(bias_ptr + w_rows * bias_row).to(tl.float32)[None, :]
        for k0 in range(0, D, BLOCK_K):
            if TMA:
                a = h.load([row0, k0])
                b = w.load([v0, k0])
            else:
                cols = (k0 + k).to(tl.int64)[None, :]
                a_ptrs = h + h_rows[:, None] * h_row + cols * h_col
                b_ptrs = w + w_rows[:, None] * w_row + cols * w_col
                if EVEN_K:
                    a = tl.load(a_ptrs)
                    b = tl.load(b_ptrs)
                else:
                    a = tl.load(a_ptrs, mask=cols < D, other=0.0)
                    b = tl.load(b_ptrs, mask=cols < D, other=0.0)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
        z, _ = transform(acc, scale, softcap, inv_temperature, CAP)
        z = tl.where((v < V)[None, :], z, NEG_INF)
        target += tl.sum(tl.where(v[None, :] == label[:, None], z, 0.0), 1)
        m_new = tl.maximum(m, tl.max(z, 1))
        base = finite_or_zero(m_new)
        fall, shrink = shifted_exp(m, base)
        d, e = shifted_exp(z, base[:, None])
        dev = shrink * (dev + total * fall) + tl.sum(e * d, 1)
        total = shrink * total + tl.sum(e, 1)
        m = m_new
    plane = tl.cast(splits, tl.int64) * n
    out = part_ptr + split.to(tl.int64) * n + rows
    tl.store(out, m, mask=rows < n)
    tl.store(out + plane, total, mask=rows < n)
    tl.store(out + 2 * plane, dev, mask=rows < n)
    tl.store(out + 3 * plane, target, mask=rows < n)


@triton.jit
def merge_stats(
    part_ptr,  # (4, splits, n) fp32
    labels_ptr,  # (n,) int64
    out_ptr,  # (4, n) fp32
    n,
    V,
    splits,
    labels_row,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The statistics of BLOCK_M rows from those of their spans, in a fixed order."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    s = tl.arange(0, BLOCK_S)[:, None]
    part_ptr += rows[None, :]
    plane = tl.cast(splits, tl.int64) * n
    m = tl.full([BLOCK_S, BLOCK_M], NEG_INF, tl.float32)
    for s0 in range(0, splits, BLOCK_S):
        inside = (s0 + s < splits) & (rows < n)[None, :]
        part = tl.load(part_ptr + (s0 + s).to(tl.int64) * n, mask=inside, other=NEG_INF)
        m = tl.maximum(m, part)
    top = tl.max(m, 0)
    base = finite_or_zero(top)
    total = tl.zeros([BLOCK_S, BLOCK_M], tl.float32)
    dev = tl.zeros([BLOCK_S, BLOCK_M], tl.float32)
    target = tl.zeros([BLOCK_S, BLOCK_M], tl.float32)
    for s0 in range(0, splits, BLOCK_S):
        inside = (s0 + s < splits) & (rows < n)[None, :]
        p = part_ptr + (s0 + s).to(tl.int64) * n
        m_s = tl.load(p, mask=inside, other=NEG_INF)
        total_s = tl.load(p + plane, mask=inside, other=0.0)
        dev_s = tl.load(p + 2 * plane, mask=inside, other=0.0)
        target += tl.load(p + 3 * plane, mask=inside, other=0.0)
        fall, shrink = shifted_exp(m_s, base[None, :])
        dev += shrink * (dev_s + total_s * fall)
        total += shrink * total_s
    total = tl.sum(total, 0)
    label = tl.load(labels_ptr + rows.to(tl.int64) * labels_row, mask=rows < n, other=-1)
    target = tl.where((label >= 0) & (label < V), tl.sum(target, 0), NEG_INF)
    # A maximum skips nan, a sum does not.
    top = tl.where((total != total) & (top != POS_INF), NAN, top)
    size = tl.cast(n, tl.int64)
    tl.store(out_ptr + rows, target, mask=rows < n)
    tl.store(out_ptr + size + rows, base + log_of_1_plus(total - 1.0), mask=rows < n)
    tl.store(out_ptr + 2 * size + rows, base + tl.sum(dev, 0) / total, mask=rows < n)
    tl.store(out_ptr + 3 * size + rows, top, mask=rows < n)


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
    out = hidden.new_empty((4, n), dtype=torch.float32)
    if n:
        _launch(hidden, weight, bias, labels, out, _scaling(scale, softcap, temperature))
    target, lse, expected, largest = out.unbind()
    return target, lse, expected, largest


def _launch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    out: Tensor,
    scaling: tuple[float, float, float],
) -> None:
    (n, D), V = hidden.shape, weight.shape[0]
    aligned = _describable(hidden) and _describable(weight)
    c = config(n, D, V, hidden.dtype, capability(hidden.device), aligned=aligned)
    splits = -(-V // (c.BLOCK_N * c.tiles))
    parts = out.new_empty((4, splits, n))
    h: Any = hidden
    w: Any = weight
    if c.tma:
        h = TensorDescriptor.from_tensor(hidden, [c.BLOCK_M, c.BLOCK_K])
        w = TensorDescriptor.from_tensor(weight, [c.BLOCK_N, c.BLOCK_K])
    with _device(hidden):
        linear_stats[(-(-n // c.BLOCK_M) * splits,)](
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
        merge_stats[(-(-n // MERGE["BLOCK_M"]),)](
            parts, labels, out, n, V, splits, labels.stride(0), **MERGE
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
