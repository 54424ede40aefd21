"""The Triton kernels of rows of logits: their exponentials and their gradient. Importing this
imports Triton.

One program walks one row (a part of it in ``dlogits``), so that no statistic crosses programs and
there are no atomics: results are bit-reproducible. Rows go on grid-x, whose limit is 2^31 - 1.
Offsets are int64.
"""

import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))
POS_INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))


@triton.jit
def one_minus_exp(x):
    """1 - e^x for x <= 0 without cancellation near 0."""
    series = 1.0 + x * (1.0 / 9.0)
    series = 1.0 + x * (1.0 / 8.0) * series
    series = 1.0 + x * (1.0 / 7.0) * series
    series = 1.0 + x * (1.0 / 6.0) * series
    series = 1.0 + x * (1.0 / 5.0) * series
    series = 1.0 + x * (1.0 / 4.0) * series
    series = 1.0 + x * (1.0 / 3.0) * series
    series = 1.0 + x * (1.0 / 2.0) * series
    return tl.where(tl.abs(x) < 0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def transform(x, scale, softcap, inv_temperature, CAP: tl.constexpr):
    """z = softcap(scale x) / temperature, and dz / dx.

    Without a cap ``scale`` carries the temperature too. With one, u = scale x / cap and
    e = exp(-2 |u|): tanh |u| = (1 - e) / (1 + e), or its series where 1 - e has lost its digits,
    and 1 - tanh^2 = 4 e / (1 + e)^2 keeps its digits where tanh is near 1.
    """
    if CAP:
        u = x * (scale / softcap)
        e = tl.exp(-2.0 * tl.abs(u))
        square = u * u
        series = -1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))
        inverse = 1.0 / (1.0 + e)
        large = (1.0 - e) * inverse
        t = tl.where(u < 0, -large, large)
        t = tl.where(tl.abs(u) < 0.15, u + u * square * series, t)
        z = t * (softcap * inv_temperature)
        slope = 4.0 * e * inverse * inverse * (scale * inv_temperature)
    else:
        z = x * scale
        slope = scale
    return z, slope


@triton.jit
def exps(
    x_ptr,  # (n, V)
    labels_ptr,  # (n,) int64
    anchor_ptr,  # (n,) fp32
    out_ptr,  # (n, V)
    used_ptr,  # (n,) fp32, and so are the next five
    rest_ptr,
    deviation_ptr,
    max_ptr,
    target_ptr,
    slope_ptr,
    bias_ptr,  # (V,) fp32
    V,
    x_row,
    x_col,
    out_row,
    out_col,
    labels_row,
    anchor_row,
    scale,
    softcap,
    inv_temperature,
    shift,
    reach,
    HAS_ANCHOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAP: tl.constexpr,
    AT_TOP: tl.constexpr,  # anchor every row at its maximum
    WRITE: tl.constexpr,  # else the sums only: out_ptr is none
    BLOCK: tl.constexpr,
):
    """E = e^(z - anchor) dz/dx, 0 at the label, and its sums. Bytes per logit: one read, one write.

    From a block on whose maximum is out of the anchor's reach the walk only looks for the row's
    maximum. Then that is the anchor: what has been written is scaled down, and a second walk starts
    from that block. No logit is lost where out is x, or where its rows start where those of x do,
    with narrower elements: a block is written when its maximum is known, hence all of it read.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_row
    if WRITE:
        out_ptr += row * out_row
    label = tl.load(labels_ptr + row * labels_row)
    has_target = (label >= 0) & (label < V)
    column = tl.where(has_target, label, -1).to(tl.int32)
    x_y = tl.load(x_ptr + label * x_col, mask=has_target, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x_y += tl.load(bias_ptr + label, mask=has_target, other=0.0)
    z_y, slope_y = transform(x_y, scale, softcap, inv_temperature, CAP)
    z_y = tl.where(has_target, z_y, NEG_INF)
    tl.store(target_ptr + row, z_y)
    tl.store(slope_ptr + row, tl.where(has_target, slope_y, 0.0))
    if HAS_ANCHOR:
        anchor = tl.load(anchor_ptr + row * anchor_row)
    else:
        anchor = z_y + shift
    # All threads have the label's logit before any writes.
    tl.debug_barrier()
    writing = tl.abs(anchor) < POS_INF
    if AT_TOP:
        writing = writing & False
    anchor = tl.where(writing, anchor, 0.0)
    limit = anchor + reach
    top = tl.full((), NEG_INF, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    dev = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(V, BLOCK)
    done = 0  # blocks that hold exponentials
    while done < blocks:
        for block in range(done, blocks):
            v = block * BLOCK + tl.arange(0, BLOCK)
            if block < V // BLOCK:
                x = tl.load(x_ptr + v.to(tl.int64) * x_col).to(tl.float32)
            else:
                x = tl.load(x_ptr + v.to(tl.int64) * x_col, mask=v < V, other=0.0).to(tl.float32)
            if HAS_BIAS:
                x += tl.load(bias_ptr + v, mask=v < V, other=0.0)
            z, slope = transform(x, scale, softcap, inv_temperature, CAP)
            z = tl.where((v < V) & (v != column), z, NEG_INF)
            high = tl.max(z, 0)
            top = tl.maximum(top, high)
            writing = writing & ~(high > limit)
            if writing:
                d = z - anchor
                e = tl.exp(d)
                total += e
                dev += tl.where(e == 0.0, 0.0, e * d)
                if WRITE:
                    e = (e * slope).to(out_ptr.dtype.element_ty)
                    if block < V // BLOCK:
                        tl.store(out_ptr + v.to(tl.int64) * out_col, e)
                    else:
                        tl.store(out_ptr + v.to(tl.int64) * out_col, e, mask=v < V)
                done = block + 1
        if done < blocks:
            # Where no other column counts, the label's own logit.
            base = tl.where(top == NEG_INF, tl.where(tl.abs(z_y) < POS_INF, z_y, 0.0), top)
            fall = tl.where(done == 0, 0.0, anchor - base)
            half = tl.exp(0.5 * fall)  # its square may be too small for a float
            dev = (dev + total * fall) * half * half
            total = total * half * half
            if WRITE:
                tl.debug_barrier()
                for block in range(done):
                    at = out_ptr + (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64) * out_col
                    e = tl.load(at).to(tl.float32) * half * half
                    tl.store(at, e.to(out_ptr.dtype.element_ty))
            anchor = base
            limit = POS_INF
            writing = tl.full((), True, tl.int1)
    rest = tl.sum(total, 0)
    spoilt = (z_y != z_y) | ((rest != rest) & (top != POS_INF))  # the maximum skips nan
    tl.store(used_ptr + row, anchor)
    tl.store(rest_ptr + row, rest)
    tl.store(deviation_ptr + row, tl.sum(dev, 0))
    tl.store(max_ptr + row, tl.where(spoilt, NAN, tl.maximum(top, z_y)))


@triton.jit
def dlogit(x, lse, b, c, scale, softcap, inv_temperature, CAP: tl.constexpr):
    """p (b + c z) dz/dx: a column that is not the label."""
    z, slope = transform(x, scale, softcap, inv_temperature, CAP)
    p = tl.exp(z - lse)
    # p = 0 at z = -inf: 0 * -inf counts as 0.
    return tl.where(p == 0.0, 0.0, p * (b + c * z)) * slope


@triton.jit
def dlogits(
    x_ptr,  # (n, V)
    labels_ptr,  # (n,) int64
    lse_ptr,  # (n,) fp32, and so are a, b, c
    a_ptr,
    b_ptr,
    c_ptr,
    logps_ptr,
    bias_ptr,  # (V,) fp32
    out_ptr,  # (n, V)
    V,
    parts,  # programs per row
    span,  # columns per program: a multiple of BLOCK
    x_row,
    x_col,
    out_row,
    out_col,
    labels_row,
    lse_row,
    a_row,
    b_row,
    c_row,
    logps_row,
    scale,
    softcap,
    inv_temperature,
    CAP: tl.constexpr,
    HAS_LOGPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = (a [v == y] + p (b + c z)) dz/dx. Bytes per logit: one read, one write.

    ALIASED: out's rows start where x's rows do, with narrower elements. A write then lands only on
    columns that have been read, provided that one program walks the row from its start and that its
    threads have all read a block before any writes.
    """
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    first = (program % parts) * span
    x_ptr += row * x_row
    out_ptr += row * out_row
    label = tl.load(labels_ptr + row * labels_row)
    lse = tl.load(lse_ptr + row * lse_row)
    a = tl.load(a_ptr + row * a_row)
    b = tl.load(b_ptr + row * b_row)
    c = tl.load(c_ptr + row * c_row)
    end = min(first + span, V)
    # The label's own column, read before anything is written. a + b p as a (1 - p) + (a + b) p: for
    # p near 1 no digit of 1 - p is lost.
    mine = (label >= first) & (label < end)
    x_y = tl.load(x_ptr + label * x_col, mask=mine, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x_y += tl.load(bias_ptr + label, mask=mine, other=0.0)
    z_y, slope_y = transform(x_y, scale, softcap, inv_temperature, CAP)
    logp = z_y - lse
    if HAS_LOGPS:
        logp = tl.load(logps_ptr + row * logps_row)
    p_y = tl.exp(logp)
    dx_y = tl.where(p_y == 0.0, 0.0, p_y * (a + b + c * z_y)) + a * one_minus_exp(logp)
    dx_y = dx_y * slope_y
    column = tl.where(mine, label, -1).to(tl.int32)
    full = first + (end - first) // BLOCK * BLOCK
    for start in range(first, full, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + v.to(tl.int64) * x_col).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias_ptr + v)
        if ALIASED:
            tl.debug_barrier()
        dx = dlogit(x, lse, b, c, scale, softcap, inv_temperature, CAP)
        dx = tl.where(v == column, dx_y, dx).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + v.to(tl.int64) * out_col, dx)
    if full < end:
        v = full + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + v.to(tl.int64) * x_col, mask=v < V, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias_ptr + v, mask=v < V, other=0.0)
        if ALIASED:
            tl.debug_barrier()
        dx = dlogit(x, lse, b, c, scale, softcap, inv_temperature, CAP)
        dx = tl.where(v == column, dx_y, dx).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + v.to(tl.int64) * out_col, dx, mask=v < V)
