"""``linear_logprob``: argument errors, then one op with its schema, fake and autograd.

The op takes packed rows, tensors and plain numbers; it never writes into its inputs, but for a
buffer that the caller gives the backward to add to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from . import backends, checks, deferred, distributed, memory
from .gemm import HALF, accumulation_dtype, ieee_fp32
from .linear import (
    head_gradients,
    make_walk,
    new_kept,
    operand,
    rows_to_keep,
    wanted,
    with_low_rank,
)
from .walk import Coefficients

IGNORED = -100


class LogprobOutput(NamedTuple):
    """Per-token statistics in nats, of the labels' shape, float32 (float64 for float64 input)."""

    logps: Tensor  # log softmax(z)[label]
    lse: Tensor  # log sum_v exp z_v
    entropy: Tensor  # -sum_v p_v log p_v
    max_logit: Tensor  # max_v z_v, not differentiable


def linear_logprob(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    mask: Tensor | None = None,  # (...)
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy_grad: bool = False,
    backend: str | None = None,
    memory_budget: int | None = None,
    accumulate_into: Tensor | None = None,  # (V, D)
    tp_group: Any = None,
    low_rank: tuple[Tensor, Tensor] | None = None,  # (..., r), (V, r)
) -> LogprobOutput:
    """Per-token log-probs of ``labels`` from the final hidden states, without holding the logits.

    z = softcap(logit_scale (hidden W^T + bias)) / temperature, with softcap(x) = cap tanh(x / cap);
    logps = z[label] - lse, lse = log sum exp z, entropy = lse - sum softmax(z) z.

    Logits are formed and reduced in float32 whatever the inputs' dtype (float64 for float64).
    ``logps``, ``lse`` and ``entropy`` are differentiable with respect to hidden, weight and bias,
    once. Forward and backward together take two GEMMs of 2 N V D flops for any loss of ``logps``
    and ``lse`` where the head is frozen, and three where it is trained. Rows that ``memory_budget``
    does not hold take a fourth, which makes their logits again; so do all rows where the gradient
    of ``entropy`` is needed and was not announced.

    Under ``torch.autocast`` on a GPU the GEMMs take operands of autocast's dtype; logits, results
    and the gradient of a float32 weight stay float32. Float32 operands are multiplied in IEEE
    float32 whatever the TF32 flags say.

    Args:
        hidden: float32, bfloat16, float16 or float64; any strides.
        weight: the head's weight; its dtype may differ from hidden's (float64 does not mix).
        labels: int64 token ids in [0, V). Rows labelled -100 are left out.
        bias: of the head.
        mask: bool, False rows are left out: their outputs and gradients are 0, whatever they held.
            On a CPU they enter no GEMM; on a GPU, where their number is not known without waiting
            for it, they do, as zeros: select the rows first where they are many.
        temperature, softcap, logit_scale: see the formula; finite and > 0. ``softcap=None``: none.
        entropy_grad: the loss will use the gradient of ``entropy``: logits are held for it.
        backend: a name of ``available_backends()``; None picks by device and dtype.
        memory_budget: bytes of logits, or of their exponentials, held from forward to backward for
            a trained head. None: on a CPU those of D rows, no more than the weight's gradient, and
            at least 48 MiB or 256 rows; on a GPU a sixteenth of its memory.
        accumulate_into: a buffer of the caller's, float32 (float64) or of weight's dtype, such as
            Megatron's ``weight.main_grad`` or an allocated ``weight.grad``. Each backward that
            would add to ``weight.grad`` adds d loss / d weight to it in place, ``weight`` gets no
            gradient from autograd, and no other (V, D) tensor exists (float16 products, and a
            half-precision buffer with rows that ``memory_budget`` does not hold, take one on a
            GPU). What reads or hooks ``weight.grad`` sees nothing of it (FSDP, DDP: reduce the
            buffer yourself). Under ``torch.compile`` ``autograd.grad`` and ``backward(inputs=)``
            add to it too, and a call's backward has to come before the next call's. Nothing is
            added without gradients (``torch.no_grad``).
        tp_group: vocab-parallel: a process group whose ranks hold consecutive rows of the weight
            (and bias) in their order, as many as they like; ``weight`` is the rank's part, and
            ``hidden`` and ``labels``, ids of the whole vocabulary, are the same on all. So are the
            results and the gradient of hidden; that of the weight is the rank's part. A DTensor
            weight with Shard(0) on a one-dimensional mesh brings its group along.
        low_rank: ``(low, up)``, an adapter such as LoRA's: ``low up^T`` is added to
            ``hidden W^T``. Beside a frozen weight its gradients take products with r columns, and
            nothing else of V x D exists but, on a GPU, a copy of the weight in a call of each
            direction. Beside a trained one both are trained as one weight of D + r columns.

    Raises:
        ValueError, TypeError: name the argument and what to change; nothing has been computed then.
            A label outside [0, V) on a GPU is found without waiting: its row is nan, and the next
            call raises (see ``check_errors``).
        NotImplementedError: a second derivative, or forward-mode differentiation.
    """
    weight, bias, tp_group = distributed.local_shards(weight, bias, tp_group)
    checks.head(hidden, weight, bias, labels)
    hidden, weight, up = with_low_rank(hidden, weight, low_rank, accumulate_into)
    scaling = checks.scaling(temperature, softcap, logit_scale)
    memory_budget = checks.budget(memory_budget)
    checks.flag("entropy_grad", entropy_grad)
    grad = torch.is_grad_enabled()
    if accumulate_into is not None and grad:
        checks.accumulator(accumulate_into, weight)
    checks.no_forward_mode(hidden=hidden, weight=weight, bias=bias, up=up)
    name = backends.pick(backend, hidden.device, accumulation_dtype(hidden, weight))
    keep = labels != IGNORED
    if mask is not None:
        keep = keep & checks.token_mask(mask, labels)
    rows, ids, kept = (
        hidden.reshape(-1, hidden.shape[-1]),
        labels.reshape(-1).long(),
        keep.reshape(-1),
    )
    picked = None
    look = deferred.readable(labels)
    if look:
        if not bool(kept.all()):
            picked = kept.nonzero().squeeze(1)
            rows, ids = rows.index_select(0, picked), ids[picked]
    else:
        left_out = ~kept
        rows, ids = rows.masked_fill(left_out[:, None], 0), ids.masked_fill(left_out, 0)
    where = None
    if tp_group is not None:
        where, poison = whole_labels(ids, weight.shape[0], tp_group)
        ids, rows = where.labels, distributed.enter(rows, tp_group)
    head = (weight, bias, up)
    table = any(t is not None and t.requires_grad for t in head)
    out = _op(
        rows,
        weight,
        ids,
        bias,
        up,
        where is not None,
        scaling,
        name,
        memory_budget,
        operand(rows, weight, name),
        [grad and hidden.requires_grad, grad and table, grad and entropy_grad],
        accumulate_into if grad else None,
    )
    if where is not None:
        out = distributed.combine(out[:4], where, poison)
    if picked is not None:
        zeros = rows.new_zeros(kept.shape, dtype=out[0].dtype)
        out = [zeros.index_copy(0, picked, t) for t in out[:4]]
    elif not look:
        out = [t.masked_fill(left_out, 0) for t in out[:4]]
    # FSDP warns of a module that returns views, and rightly.
    shaped = (t if t.shape == labels.shape else t.view(labels.shape) for t in out[:4])
    return LogprobOutput(*shaped)


def whole_labels(labels: Tensor, rows: int, group: Any) -> tuple[distributed.Shards, Tensor | None]:
    """Where labels of the whole vocabulary stand, and nan for those outside of it, or no tensor.

    Raises:
        ValueError: a label outside the vocabulary, or labels that differ between the ranks.
    """
    where = distributed.shards(labels, rows, group)
    if not deferred.immediate(labels.device):
        deferred.note(deferred.RANKS, ~where.agree)
    elif not bool(where.agree):
        raise ValueError(f"in this call {deferred.MEANING[deferred.RANKS]}")
    deferred.check_labels(labels, where.size)
    if deferred.immediate(labels.device):
        return where, None
    outside = (labels < 0) | (labels >= where.size)
    return where, torch.zeros(labels.shape, device=labels.device).masked_fill_(outside, torch.nan)


@custom_op("lolkernels::linear_logprob_v4", mutates_args=())
def _op(
    hidden: Tensor,  # (N, D), or with up (N, D + r)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    up: Tensor | None,  # (V, r) more columns of the weight, which then is frozen
    shard: bool,  # of a larger vocabulary: a label outside [0, V) has no target here
    scaling: Sequence[float],  # scale, softcap, temperature
    backend: str,
    memory_budget: int | None,
    operand: torch.dtype,
    need: Sequence[bool],  # the gradient of hidden, of the head, of the entropy too
    into: Tensor | None,  # (V, D), for the backward to add dweight to
) -> list[Tensor]:
    """[logps, lse, entropy, max_logit, slope, rest, share: (N,), unit (N, D'), kept (k, V')].

    ``unit`` is d logp / d hidden and ``kept`` the exponentials (with need[2] the logits) of the
    first rows; each is empty where it is not needed.
    """
    deferred.raise_noted(hidden.device)
    flags = None if shard else deferred.label_flags(labels, weight.shape[0])
    n, vocab = labels.shape[0], weight.shape[0]
    walk = make_walk(
        hidden, weight, bias, up, labels, scaling, backend, operand, memory_budget, flags
    )
    rows, dtype = rows_to_keep(n, hidden, weight, operand, memory_budget, need[2])
    kept = new_kept(hidden, rows if need[1] or need[2] else 0, vocab, dtype, backend)
    with_unit = need[0] and not need[2]
    unit = walk.empty(n if with_unit else 0, hidden.shape[1])
    with ieee_fp32():
        s = walk.sweep(kept[:, :vocab], unit if with_unit else None, hold=need[2])
    deferred.send(hidden.device)
    return [s.logps, s.lse, s.entropy, s.max_logit, s.slope, s.rest, s.share, unit, kept]


@_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    shard: bool,
    scaling: Sequence[float],
    backend: str,
    memory_budget: int | None,
    operand: torch.dtype,
    need: Sequence[bool],
    into: Tensor | None,
) -> list[Tensor]:
    (n, d), vocab = hidden.shape, weight.shape[0]
    wide = accumulation_dtype(hidden, weight)
    dtype = wide if need[2] or operand not in HALF else operand
    held = memory.kept_rows(vocab, d, dtype.itemsize, memory_budget, hidden.device)
    rows: Any = torch.sym_min(n, held) if need[1] or need[2] else 0  # type: ignore[no-untyped-call]
    unit = hidden.new_empty(n if need[0] and not need[2] else 0, d, dtype=wide)
    return [
        *(hidden.new_empty(n, dtype=wide) for _ in range(7)),
        unit,
        new_kept(hidden, rows, vocab, dtype, backend),
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, weight, labels, bias, up, _, *options, need, into = inputs
    logps, lse, entropy, _, slope, rest, share, unit, kept = output
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        hidden, weight, labels, bias, up, logps, lse, entropy, slope, rest, share, unit, kept
    )
    ctx.options, ctx.need = options, need
    ctx.into = into  # not saved: the backward of another call may write into it first


def _backward(ctx: Any, upstream: Sequence[Tensor | None]) -> tuple[Any, ...]:
    names = ("logps", "lse", "entropy")
    given = {name: g for name, g in zip(names, upstream, strict=False) if g is not None}
    nothing = (None,) * 7
    if not given:
        return (*(None,) * 5, *nothing)
    hidden, weight, labels, bias, up, *stats, unit, kept = ctx.saved_tensors
    inputs = (hidden, weight, labels, bias, up)
    need_hidden, need_head, need_bias = wanted(ctx, inputs, next(iter(given.values())))
    logps, lse, entropy, slope, rest, share = stats
    coef = Coefficients.of(lse, entropy, {k: g.to(lse.dtype) for k, g in given.items()})
    again = coef.c is not None or ctx.need[2]  # there is no unit, or it does not do
    dhidden = dweight = dbias = None
    if need_hidden and not again:
        dhidden = unit * (coef.a if coef.both is None else -coef.b)[:, None]
        if coef.both is not None:
            ids = labels.clamp(0, weight.shape[0] - 1)
            rows = torch.cat([t.index_select(0, ids) for t in (weight, up) if t is not None], 1)
            rows = rows.to(ctx.options[-1])  # as they were multiplied
            dhidden = dhidden + rows.to(unit.dtype) * (coef.both * slope)[:, None]
        dhidden = dhidden.to(hidden.dtype)
    need = [need_hidden and again, need_head, need_bias]
    if any(need):
        made, dweight, dbias = head_gradients(
            ctx,
            [coef.a, coef.b],
            coef.both,
            coef.c,
            [logps, lse, slope, rest, share],
            kept,
            hidden,
            weight,
            labels,
            bias,
            up,
            *ctx.options,
            ctx.need[2],
            need,
        )
        dhidden = made if need[0] else dhidden
    of_weight, of_up = (dweight, None) if up is None else (None, dweight)
    return dhidden, of_weight, None, dbias, of_up, *nothing


_op.register_autograd(_backward, setup_context=_setup)
