"""The Triton kernels of what follows a sweep of whole rows: their statistics, and the label's own
terms of dhidden and dweight. Importing this imports Triton.

The formulas stand in :mod:`lolkernels.backends.finish`. The order of additions is fixed.
"""

import triton
import triton.language as tl

from .triton_rows import NAN, POS_INF


@triton.jit
def log_of_1_plus(x):
    """log(1 + x): for small x by 2 artanh(x / (2 + x)), never below 0 for x >= 0."""
    s = x / (2.0 + x)
    square = s * s
    series = 2.0 * s * (1.0 + square * (1.0 / 3.0 + square * (1.0 / 5.0 + square * (1.0 / 7.0))))
    return tl.where((x >= 0.0) & (x < 0.3), series, tl.log(1.0 + x))


@triton.jit
def finish(
    labels_ptr,  # (n,) int64
    anchor_ptr,  # (n,) fp32: the sums of exps, and so are the next five
    rest_ptr,
    deviation_ptr,
    max_ptr,
    target_ptr,
    slope_ptr,
    logps_out,  # (n,) fp32: the statistics, and so are the next seven
    lse_out,
    entropy_out,
    max_out,
    target_out,
    slope_out,
    rest_out,
    share_out,
    flags_ptr,  # () int32
    unit_ptr,  # (n, D) fp32
    table_ptr,  # (V, D)
    V,
    D,
    labels_row,
    unit_row,
    table_row,
    table_col,
    HAS_FLAGS: tl.constexpr,
    HAS_UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The statistics of a row, and E W becomes d logp / d hidden. Bytes per element of the row: a
    read and a write of fp32, and a read of the label's row of the table.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row * labels_row)
    anchor = tl.load(anchor_ptr + row)
    rest = tl.load(rest_ptr + row)
    target = tl.load(target_ptr + row)
    slope = tl.load(slope_ptr + row)
    base = tl.maximum(target, anchor)
    mine = tl.exp(target - base)
    fall = tl.exp(anchor - base)
    others = fall * (tl.load(deviation_ptr + row) + rest * (anchor - base))
    dev = tl.where(fall == 0.0, 0.0, others) + tl.where(mine == 0.0, 0.0, mine * (target - base))
    rest = rest * fall
    total = rest + mine
    log_total = tl.log(total)
    lse = base + log_total
    lse = tl.where(lse == POS_INF, NAN, lse)
    share = fall / total
    if HAS_FLAGS:
        bad = (label < 0) | (label >= V)
        lse = tl.where(bad, NAN, lse)
        share = tl.where(bad, NAN, share)
        tl.atomic_or(flags_ptr, 1, mask=bad)
    logps = tl.where(mine > rest, -log_of_1_plus(rest / mine), (target - base) - log_total)
    spoilt = lse != lse
    rest = rest / total
    tl.store(logps_out + row, tl.where(spoilt, NAN, logps))
    tl.store(lse_out + row, lse)
    tl.store(entropy_out + row, tl.where(spoilt, NAN, log_total - dev / total))
    tl.store(max_out + row, tl.load(max_ptr + row))
    tl.store(target_out + row, target)
    tl.store(slope_out + row, slope)
    tl.store(rest_out + row, rest)
    tl.store(share_out + row, share)
    if HAS_UNIT:
        own = rest * slope
        label = tl.minimum(tl.maximum(label, 0), V - 1)
        unit_ptr += row * unit_row
        table_ptr += label * table_row
        for start in range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)
            unit = tl.load(unit_ptr + d, mask=d < D, other=0.0)
            picked = tl.load(table_ptr + d.to(tl.int64) * table_col, mask=d < D, other=0.0)
            tl.store(unit_ptr + d, own * picked.to(tl.float32) - share * unit, mask=d < D)


@triton.jit
def add_labels(
    table_ptr,  # (V, D)
    labels_ptr,  # (n,) int64
    rows_ptr,  # (n, D)
    a_ptr,  # (n,) fp32, and so are the next four
    both_ptr,
    logps_ptr,
    rest_ptr,
    slope_ptr,
    n,
    V,
    D,
    table_row,
    labels_row,
    rows_row,
    rows_col,
    a_row,
    both_row,
    HAS_BOTH: tl.constexpr,
    SCAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """table[label] += dx_label row, in the order of the rows, rounded once.

    The program of the first row with a label adds up those of all its rows.
    """
    first = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + first * labels_row)
    alone = (label >= 0) & (label < V)
    start = first * 0
    while (start < first) & alone:
        i = start + tl.arange(0, SCAN)
        other = tl.load(labels_ptr + i * labels_row, mask=i < first, other=-1)
        alone = tl.sum((other == label).to(tl.int32), 0) == 0
        start += SCAN
    if alone:
        table_ptr += label * table_row
        total = tl.load(table_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        row = first
        while row < n:
            own = tl.load(a_ptr + row * a_row) * tl.load(rest_ptr + row)
            if HAS_BOTH:
                own += tl.load(both_ptr + row * both_row) * tl.exp(tl.load(logps_ptr + row))
            own *= tl.load(slope_ptr + row)
            at = rows_ptr + row * rows_row + d.to(tl.int64) * rows_col
            total += own * tl.load(at, mask=d < D, other=0.0).to(tl.float32)
            # The next row with this label, or n.
            start = row + 1
            row = first * 0 + n
            while start < row:
                i = start + tl.arange(0, SCAN)
                other = tl.load(labels_ptr + i * labels_row, mask=i < n, other=-1)
                row = tl.min(tl.where((i < n) & (other == label), i, row), 0)
                start += SCAN
        tl.store(table_ptr + d, total.to(table_ptr.dtype.element_ty), mask=d < D)
