"""What follows a sweep, in torch: the statistics that its sums make, and the label's own terms.

A backend for a GPU has a kernel for each of ``finish`` and ``add_labels``: here they are the
definition, and dozens of launches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Exps, RowStats

ROWS = 1024  # that are gathered at a time
ELEMENTS = 2**23  # that are added at a time


def statistics(sums: Exps) -> RowStats:
    """What the sums over whole rows say of them."""
    base = torch.maximum(sums.target_logit, sums.anchor)
    mine, fall = (sums.target_logit - base).exp(), (sums.anchor - base).exp()
    rest = sums.rest * fall
    total = rest + mine
    log_total = total.log()
    lse = base + log_total
    lse = lse.masked_fill(lse == torch.inf, torch.nan)  # a row with +inf is spoilt, and says so
    below = sums.target_logit - lse
    logps = torch.where(mine > rest, -torch.log1p(rest / mine), below)
    others = fall * (sums.deviation + sums.rest * (sums.anchor - base))
    own = mine * (sums.target_logit - base)
    deviation = torch.where(fall == 0, 0.0, others) + torch.where(mine == 0, 0.0, own)
    return RowStats(
        logps=logps + 0.0 * lse,  # nan where the row is spoilt
        lse=lse,
        entropy=log_total - deviation / total,
        max_logit=sums.max_logit,
        target_logit=sums.target_logit,
        slope=sums.slope,
        rest=rest / total,
        share=fall / total,
    )


def finish(
    sums: Exps,  # each (n,)
    labels: Tensor,  # (n,)
    vocab: int,
    out: RowStats,  # each (n,)
    flags: Tensor | None = None,  # () int32
    unit: Tensor | None = None,  # (n, D): E table
    table: Tensor | None = None,  # (V, D)
    more: Tensor | None = None,  # (V, r) further columns of the table
) -> None:
    """The statistics of whole rows into ``out``; and ``unit`` becomes d logp / d hidden.

    That is (1 - p) dz/dx[label] table[label] - share E table. With ``flags`` a label outside [0, V)
    spoils its row, with nan for logps, lse, entropy and share, and sets their lowest bit.
    """
    stats = statistics(sums)
    if flags is not None:
        bad = (labels < 0) | (labels >= vocab)
        flags.bitwise_or_(bad.any().to(flags.dtype))
        names = ("logps", "lse", "entropy", "share")
        stats = stats._replace(**{k: getattr(stats, k).masked_fill(bad, torch.nan) for k in names})
    for into, t in zip(out, stats, strict=True):
        into.copy_(t)
    if unit is not None and table is not None:
        unit.mul_(-out.share[:, None])
        gather_labels(unit, labels, out.rest * out.slope, table, more)


def gather_labels(
    rows: Tensor,  # (n, D), or with more (n, D + r)
    labels: Tensor,
    factor: Tensor,
    table: Tensor,  # (V, D)
    more: Tensor | None = None,  # (V, r)
) -> None:
    """rows += factor [table, more][label], in the dtype of rows."""
    if more is not None:
        gather_labels(rows[:, table.shape[1] :], labels, factor, more)
        rows = rows[:, : table.shape[1]]
    labels = labels.clamp(0, table.shape[0] - 1)  # a label outside has a factor of 0 or nan
    for i in range(0, rows.shape[0], ROWS):
        some = slice(i, i + ROWS)
        picked = table.index_select(0, labels[some]).to(rows.dtype)
        rows[some].addcmul_(picked, factor[some, None])


def at_label(a: Tensor, both: Tensor | None, stats: RowStats) -> Tensor:  # (n,)
    """d loss / dx at the label: (a (1 - p) + both p) dz/dx, no digit lost for p near 1."""
    value = a * stats.rest
    if both is not None:
        value = value + both * stats.logps.exp()
    return value * stats.slope


def add_labels(
    table: Tensor,  # (V, D)
    labels: Tensor,  # (n,)
    rows: Tensor,  # (n, D)
    a: Tensor,  # (n,)
    both: Tensor | None,  # (n,)
    stats: RowStats,  # each (n,)
) -> None:
    """table[label] += at_label row, in the order of the rows, rounded once: the same bits always.

    Where a label is outside [0, V) its row of nan may go anywhere.
    """
    factor = at_label(a, both, stats)
    labels = labels.clamp(0, table.shape[0] - 1)
    owners, order = torch.sort(labels, stable=True)
    new = torch.ones_like(owners)
    new[1:] = owners.diff().ne(0)
    group, factor = new.cumsum(0) - 1, factor[order, None]
    width = max(64, ELEMENTS // max(1, len(labels)))
    for i in range(0, table.shape[1], width):
        part = table[:, i : i + width]
        added = rows[order, i : i + width] * factor
        total = torch.zeros_like(added).index_put_((group,), added, accumulate=True)
        summed = total[group].add_(part.index_select(0, owners))
        part.index_copy_(0, owners, summed.to(table.dtype))
