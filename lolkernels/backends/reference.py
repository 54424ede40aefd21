"""The definition of correct: the row functions in eager torch. Slow, obvious, any dtype.

For a row of raw logits x (n, V), with z = softcap(scale * x) / temperature and softcap(x) = cap
tanh(x / cap):

    exps_         E = exp(z - anchor) dz/dx, the label's column 0, and the sums of which
                  ``finish.statistics`` makes log softmax(z)[label] and its kin
    dlogits_      (a [v == label] + exp(z - lse) (b + c z)) dz/dx
    sequence_coef the A-LoL family's loss and d loss / d logp (see Family in objectives.py)

Results are float32 (float64 for float64 input). A label outside [0, V) has no target in these
columns: its target_logit is -inf and it gets no ``a`` term. p = 0 times z = -inf counts as 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .contract import REACH, SHIFT, Backend, Exps
from .finish import add_labels, finish


def exps_(
    logits: Tensor,  # (n, V)
    labels: Tensor,  # (n,)
    anchor: Tensor | None = None,  # (n,); None: the label's own logit + SHIFT
    *,
    out: Tensor | None = None,  # (n, V)
    **scaling: Any,
) -> Exps:
    """E = exp(z - anchor) dz/dx over ``logits`` or into ``out``, the label's column 0.

    The anchor is known before the row is read, so that one read and one write make E. A row that
    reaches more than REACH above it, or whose anchor is not finite, is anchored at its maximum over
    v != label instead, or at the label's logit where that is -inf; fp16, whose range is small,
    always is. An anchor that stands above all of a row is kept: what is 87 below it counts as 0.
    The sums are of what stands before the rounding to ``out``'s dtype.
    """
    out = logits if out is None else out
    z, dz_dx = _transform(logits, **scaling)
    has_target, index = _target(labels, z.shape[1])
    index, missing = index[:, None], ~has_target
    z_y = z.gather(1, index).squeeze(1).masked_fill(missing, -torch.inf)
    slope = torch.as_tensor(dz_dx, dtype=z.dtype).expand_as(z)
    slope_y = slope.gather(1, index).squeeze(1).masked_fill(missing, 0.0)
    others = z.scatter(1, index, torch.where(missing, z[:, 0], -torch.inf)[:, None])
    top = others.amax(1)
    anchor = z_y + SHIFT if anchor is None else anchor.to(z.dtype)
    again = ~(top - anchor <= REACH) | ~anchor.isfinite()
    if out.dtype == torch.float16:
        again = torch.ones_like(again)
    anchor = torch.where(again, top, anchor)
    # Where no other column counts, the label's own logit.
    anchor = torch.where(anchor == -torch.inf, z_y.nan_to_num(0.0, 0.0, 0.0), anchor)
    d = others - anchor[:, None]
    e = d.exp()
    out.copy_(torch.where(e == 0, 0.0, e * slope))
    deviation = torch.where(e == 0, 0.0, e * d).sum(1)
    largest = torch.where(z.isnan().any(1), torch.nan, z.amax(1))
    return Exps(anchor, e.sum(1), deviation, largest, z_y, slope_y)


def sums(logits: Tensor, labels: Tensor, **scaling: Any) -> Exps:
    """Those of :func:`exps_`; in float64 from the row's maximum, which keeps the last digit."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    top = _transform(wide, **scaling)[0].amax(1) if wide is logits else None
    return exps_(wide, labels, top, out=torch.empty_like(wide), **scaling)


def dlogits_(
    logits: Tensor,  # (n, V)
    labels: Tensor,  # (n,)
    lse: Tensor,  # (n,)
    a: Tensor,  # (n,)
    b: Tensor,  # (n,)
    c: Tensor,  # (n,)
    *,
    out: Tensor | None = None,  # (n, V)
    logps: Tensor | None = None,  # (n,); None: z - lse at the label, without digits for p near 1
    **scaling: Any,
) -> Tensor:
    z, dz_dx = _transform(logits, **scaling)
    log_p = z - lse[:, None]
    p = log_p.exp()
    dz = torch.where(p == 0, 0.0, p * (b[:, None] + c[:, None] * z))
    has_target, index = _target(labels, z.shape[1])
    # a + b p as a (1 - p) + (a + b) p, with 1 - p from expm1: for p near 1 no digit is lost.
    log_p_y = log_p.gather(1, index[:, None]).squeeze(1) if logps is None else logps
    p_y = log_p_y.exp()
    z_y = z.gather(1, index[:, None]).squeeze(1)
    rest = torch.where(p_y == 0, 0.0, p_y * ((a + b) + c * z_y))
    at_label = torch.where(has_target, -a * torch.expm1(log_p_y) + rest, 0.0)
    dz = dz.scatter(1, index[:, None], torch.where(has_target, at_label, dz[:, 0])[:, None])
    out = logits if out is None else out
    return out.copy_(dz * dz_dx)


def sequence_coef(
    logps: Tensor,  # (n,)
    ref_logps: Tensor | None,  # (n,)
    cu_seqlens: Tensor,  # (s + 1,)
    weight: Tensor,  # (s,)
    *,
    ratio: int,
    log_low: float,
    log_high: float,
    beta: float = 0.0,
    scale: Tensor | None = None,  # (s,)
    flags: Tensor | None = None,  # () int32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # loss (s,), coef (n,), log_ratio (s,), clipped (s,)
    """Sequence s's coefficients come out times scale[s]. A nan input sets bit 2 of ``flags``."""
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    logps = logps.double()
    ref = torch.zeros_like(logps) if ref_logps is None else ref_logps.double()
    d = logps - ref
    cu = cu_seqlens.to(logps.device)
    lengths = cu[1:] - cu[:-1]
    owner = torch.repeat_interleave(lengths)
    weight = weight.double()

    def total(x: Tensor) -> Tensor:
        return torch.zeros_like(weight).index_add(0, owner, x)

    log_ratio = total(d)
    if ratio == 0:
        w, clipped = torch.ones_like(logps), torch.zeros_like(weight)
    elif ratio == 1:
        outside = (log_ratio < log_low) | (log_ratio > log_high)
        w, clipped = log_ratio.clamp(log_low, log_high).exp()[owner], outside.double()
    else:
        outside = (d < log_low) | (d > log_high)
        w, clipped = d.clamp(log_low, log_high).exp(), total(outside.double())
        clipped = clipped / lengths.clamp(min=1)
    loss = -weight * total(w * logps)
    if beta:
        loss = loss + beta * log_ratio
    coef = beta - weight[owner] * w
    if scale is not None:
        coef = coef * scale[owner]
    if flags is not None:
        bad = weight.isnan().any() | ref.isnan().any()
        flags.bitwise_or_(2 * bad.to(flags.dtype))
    empty = lengths == 0
    loss, clipped = loss.masked_fill(empty, 0.0), clipped.masked_fill(empty, 0.0)
    return loss.to(dtype), coef.to(dtype), log_ratio.to(dtype), clipped.to(dtype)


def _transform(
    logits: Tensor,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | float]:
    x = logits if logits.dtype == torch.float64 else logits.float()
    z = (x if bias is None else x + bias) * scale
    if not softcap:
        return z / temperature, scale / temperature
    t = torch.tanh(z / softcap)
    return t * (softcap / temperature), (1 - t * t) * (scale / temperature)


def _target(labels: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    has_target = (labels >= 0) & (labels < vocab)
    return has_target, torch.where(has_target, labels, 0)


BACKEND = Backend(
    name="reference",
    devices=None,
    dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    panels=True,
    why_unavailable=lambda: None,
    exps_=exps_,
    sums=sums,
    dlogits_=dlogits_,
    sequence_coef=sequence_coef,
    finish=finish,
    add_labels=add_labels,
)
