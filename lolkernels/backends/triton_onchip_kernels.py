"""The kernels behind :mod:`lolkernels.backends.triton_onchip`. Importing this imports Triton.

One program takes BLOCK_M rows and walks a few neighbouring vocabulary tiles: a GEMM tile in
registers, whose epilogue folds it into the running statistics of its rows. What programs hand over
is 16 bytes for each row and span of tiles; a second kernel merges them in a fixed order. There are
no atomics: results are bit-reproducible on one device. Offsets are int64.
"""

import triton
import triton.language as tl

from .triton_kernels import NAN, NEG_INF, POS_INF, finite_or_zero, log_of_1_plus, transform

# Row blocks that share each vocabulary tile while it is in L2. Their hidden rows stay there too:
# 16 MiB of bf16 for 16 blocks of 128 rows of 4096.
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
    target_ptr,  # (n,) fp32, and so are the next three
    lse_ptr,
    expected_ptr,
    max_ptr,
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
    tl.store(target_ptr + rows, target, mask=rows < n)
    tl.store(lse_ptr + rows, base + log_of_1_plus(total - 1.0), mask=rows < n)
    tl.store(expected_ptr + rows, base + tl.sum(dev, 0) / total, mask=rows < n)
    tl.store(max_ptr + rows, top, mask=rows < n)
