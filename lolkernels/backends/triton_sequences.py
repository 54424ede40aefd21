"""The Triton kernel of the A-LoL family's coefficients. Importing this imports Triton."""

import triton
import triton.language as tl


@triton.jit
def clamp(x, low, high):
    """tl.minimum and tl.maximum drop nan: here it stays."""
    return tl.where(x != x, x, tl.minimum(tl.maximum(x, low), high))


@triton.jit
def sequence_coef(
    logps_ptr,  # (n,) fp32
    ref_ptr,  # (n,) fp32
    cu_ptr,  # (s + 1,) int64
    weight_ptr,  # (s,) fp32
    loss_ptr,  # (s,) fp32
    coef_ptr,  # (n,) fp32
    log_ratio_ptr,  # (s,) fp32
    clipped_ptr,  # (s,) fp32
    log_low,
    log_high,
    beta,
    scale_ptr,  # (s,) fp32
    flags_ptr,  # () int32
    HAS_SCALE: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    HAS_REF: tl.constexpr,
    RATIO: tl.constexpr,  # 0 none, 1 of the sequence, 2 of each token
    HAS_BETA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The A-LoL family on one sequence per program, in fp64: tokens are few, their sum is large.

    Bytes a token: 8 read, 4 written.
    """
    s = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_ptr + s)
    end = tl.load(cu_ptr + s + 1)
    weight = tl.load(weight_ptr + s).to(tl.float64)
    log_low = tl.full((), log_low, tl.float64)
    log_high = tl.full((), log_high, tl.float64)
    beta = tl.full((), beta, tl.float64)
    scale = tl.full((), 1.0, tl.float64)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + s).to(tl.float64)
    nans = tl.zeros([BLOCK], tl.int32)
    sum_d = tl.zeros([BLOCK], tl.float64)
    sum_wl = tl.zeros([BLOCK], tl.float64)
    outside = tl.zeros([BLOCK], tl.float64)
    for t0 in range(start, end, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        logp = tl.load(logps_ptr + t, mask=t < end, other=0.0).to(tl.float64)
        d = logp
        if HAS_REF:
            ref = tl.load(ref_ptr + t, mask=t < end, other=0.0).to(tl.float64)
            nans += (ref != ref).to(tl.int32)
            d -= ref
        sum_d += d
        w = tl.zeros([BLOCK], tl.float64) + 1.0
        if RATIO == 2:
            w = tl.exp(clamp(d, log_low, log_high))
            coef = scale * (beta - weight * w)
            tl.store(coef_ptr + t, coef.to(tl.float32), mask=t < end)
            outside += tl.where((t < end) & ((d < log_low) | (d > log_high)), 1.0, 0.0)
        sum_wl += tl.where(t < end, w * logp, 0.0)
    log_ratio = tl.sum(sum_d, 0)
    total = tl.sum(sum_wl, 0)
    clipped = tl.sum(outside, 0) / tl.maximum((end - start).to(tl.float64), 1.0)
    if RATIO != 2:
        coef = scale * (beta - weight)
        if RATIO == 1:
            w_s = tl.exp(clamp(log_ratio, log_low, log_high))
            clipped += tl.where((log_ratio < log_low) | (log_ratio > log_high), 1.0, 0.0)
            total = w_s * total
            coef = scale * (beta - weight * w_s)
        for t0 in range(start, end, BLOCK):
            t = t0 + tl.arange(0, BLOCK)
            tl.store(
                coef_ptr + t, tl.full([BLOCK], 0.0, tl.float32) + coef.to(tl.float32), mask=t < end
            )
    loss = -weight * total
    if HAS_BETA:
        loss += beta * log_ratio
    if HAS_FLAGS:
        tl.atomic_or(flags_ptr, 2, mask=(tl.sum(nans, 0) > 0) | (weight != weight))
    empty = end == start
    tl.store(loss_ptr + s, tl.where(empty, 0.0, loss).to(tl.float32))
    tl.store(log_ratio_ptr + s, log_ratio.to(tl.float32))
    tl.store(clipped_ptr + s, tl.where(empty, 0.0, clipped).to(tl.float32))
