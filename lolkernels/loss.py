"""``linear_loss``: a whole objective with its gradients, in one pass over the rows.

Argument errors, then one op with its schema, fake and autograd, as in :mod:`lolkernels.logprob`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from . import backends, checks, deferred, distributed, objectives
from .backends.contract import RowStats
from .gemm import accumulation_dtype, ieee_fp32
from .linear import (
    head_gradients,
    make_walk,
    new_kept,
    no_second_derivative,
    operand,
    rows_to_keep,
    wanted,
    with_low_rank,
)
from .logprob import LogprobOutput, linear_logprob
from .objectives import Objective, reduction_weights
from .packing import longest_group, plan_blocks
from .sequences import Sequences
from .side import active_rows, side_tensors
from .step import Step, bind, lookup, revive
from .walk import Coefficients, Grads, Walk


class LinearLossOutput(NamedTuple):
    """A loss with what it was made of. Only ``loss`` is differentiable."""

    loss: Tensor  # ()
    seq_loss: Tensor  # (S,) unreduced (one per group)
    logps: Tensor  # (N,) nan at the tokens of skipped sequences, as in the next three
    lse: Tensor  # (N,)
    entropy: Tensor  # (N,)
    max_logit: Tensor  # (N,)
    metrics: dict[str, Tensor]  # (G,) each, what the objective reports: log_ratio, clipped, ...


def linear_loss(
    objective: Objective,
    hidden: Tensor,  # (N, D), or (B, T, D) where seq comes from a mask
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,) or (B, T)
    seq: Sequences,
    *,
    reduction: str = "seq-mean",
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
    memory_budget: int | None = None,
    tp_group: Any = None,
    return_outputs: bool = False,
    accumulate_into: Tensor | None = None,  # (V, D)
    low_rank: tuple[Tensor, Tensor] | None = None,  # (N, r) or (B, T, r), (V, r)
    **side: Any,
) -> Any:
    """A loss on the statistics of whole sequences, with its gradients, in 3 GEMMs (frozen head: 2).

    Equals ``aggregate(objective(linear_logprob(hidden, weight, labels).logps, ..., seq), seq,
    reduction)`` and its gradients with respect to hidden, weight, bias and the side inputs, for
    log-probs defined there. Rows go in blocks of whole groups of sequences: a block's logits are
    made once, the objective gives the derivatives of the loss with respect to the statistics that
    it names, and the gradients follow. Sequences whose coefficient is zero whatever their log-probs
    (advantage <= 0 in ``a_lol``) enter no GEMM; under ``torch.compile`` they do.

    Over a group of ranks (``tp_group``, a DTensor weight, or a ``seq`` with a ``cp_group``) it is
    that composition: the objective's own body runs once, on all log-probs, and the rows that
    ``memory_budget`` does not hold cost a fourth GEMM.

    For an objective that names ``entropy`` logits are held in place of their exponentials. Where
    ``memory_budget`` does not hold all rows of a group, the logits of the others are made twice;
    with ``accumulate_into`` this goes for all rows beyond it (with ``entropy`` for every row).

    Args:
        objective: one of ``lolkernels.objectives`` or any callable that names statistics (``logps,
            lse, entropy, target_logit, max_logit``), side inputs, ``seq`` and options, and returns
            ``(S,)`` unreduced losses (one per group), each a function of its own group only, or
            ``(losses, {name: (S,) metric})``.
        hidden: float32, bfloat16, float16 or float64; any strides. Packed rows, one per token of
            ``seq``; or ``(B, T, D)`` with ``seq = Sequences.from_mask(mask)``: masked ones are
            dropped first.
        weight, labels, bias, temperature, softcap, logit_scale, backend, tp_group, low_rank: as in
            :func:`linear_logprob`, but a label outside [0, V) is always an error: leave the token
            out of the mask.
        seq: which rows form a sequence, and the denominators of the reduction.
        reduction: "seq-mean", "token-mean", "seq-mean-token-mean" or "sum" (see ``aggregate``).
        memory_budget: bytes of logits, or of their exponentials, held at a time for a trained head.
            None: as in :func:`linear_logprob`. ``lolkernels.memory.extra_bytes`` states the whole
            extra memory.
        return_outputs: return a :class:`LinearLossOutput` instead of the scalar.
        accumulate_into: as in :func:`linear_logprob`: the backward adds weight's gradient to it.
        **side: the objective's inputs (``side_inputs(objective)``): per-token tensors ``(N,)`` (or
            ``(B, T)``), per-sequence tensors ``(S,)``, and options. Those that require a gradient
            get one. Per-sequence tensors may stay on the CPU while the rest is on a GPU: sequences
            of weight zero can then be skipped without waiting for the GPU.

    Raises:
        ValueError, TypeError: name the argument and what to change; nothing has been computed then.
            Bad labels and nan inputs on a GPU are found without waiting: the loss is nan, and the
            next call raises (see ``check_errors``).
        ValueError: the objective's value depends on which groups are evaluated together.
        NotImplementedError: a second derivative, or forward-mode differentiation.
    """
    needed = dict(_described(objective))
    if not isinstance(seq, Sequences):
        raise TypeError(f"seq must be a Sequences, got {type(seq).__name__}")
    if reduction not in objectives.REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {', '.join(objectives.REDUCTIONS)}; got {reduction!r}"
        )
    weight, bias, tp_group = distributed.local_shards(weight, bias, tp_group)
    checks.head(hidden, weight, bias, labels)
    hidden, weight, up = with_low_rank(hidden, weight, low_rank, accumulate_into)
    if hidden.dim() == 3:
        hidden, labels = seq.pack(hidden), seq.pack(labels)
    if hidden.dim() != 2 or hidden.shape[0] != seq.num_tokens:
        raise ValueError(
            f"hidden must have one row per token of seq, {seq.num_tokens}; got "
            f"{tuple(hidden.shape)}. "
            "Pass hidden[mask], labels[mask], or (B, T, D) with seq = Sequences.from_mask(mask)"
        )
    if seq.device != hidden.device:
        raise ValueError(f"seq is on {seq.device} but hidden is on {hidden.device}: seq.to(device)")
    scaling = checks.scaling(temperature, softcap, logit_scale)
    memory_budget = checks.budget(memory_budget)
    checks.no_forward_mode(hidden=hidden, weight=weight, bias=bias, up=up)
    grad = torch.is_grad_enabled()
    if accumulate_into is not None and grad:
        checks.accumulator(accumulate_into, weight)
    dtype = accumulation_dtype(hidden, weight)
    name = backends.pick(backend, hidden.device, dtype)
    inputs, options = side_tensors(needed, side, seq, hidden.device, dtype)
    weights = reduction_weights(seq, reduction, dtype)
    labels, whole = labels.long(), seq
    picked = None if torch.compiler.is_compiling() else active_rows(objective, inputs, options, seq)
    ranks = tp_group is not None or seq.cp_group is not None
    if picked is not None or ranks:
        vocab = distributed.total_size(weight.shape[0], hidden.device, tp_group)
        deferred.check_labels(labels, vocab)  # of skipped sequences too
        for key, (_, value) in inputs.items():
            deferred.check_side(key, value)
    if picked is not None:
        rows, sequences = picked  # a family has groups of one
        which = sequences.tolist()
        seq = seq.part(which, rows, whole.cu_seqlens.diff()[which].tolist())
        hidden, labels, weights = hidden.index_select(0, rows), labels[rows], weights[sequences]
        pick = {"token": rows, "sequence": sequences}
        inputs = {
            key: (kind, value[pick[kind].to(value.device)] if kind in pick else value)
            for key, (kind, value) in inputs.items()
        }
    if ranks:
        first = hidden.shape[1] - (0 if up is None else up.shape[1])
        hold = "entropy" in objectives.statistics(objective)
        made = linear_logprob(
            hidden[:, :first],
            weight,
            labels,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            entropy_grad=hold,
            backend=name,
            memory_budget=memory_budget,
            accumulate_into=accumulate_into,
            tp_group=tp_group,
            low_rank=None if up is None else (hidden[:, first:], up),
        )
        out, names = _composed(objective, made, inputs, options, seq, weights)
    else:
        spec = tuple((key, kind) for key, (kind, _) in inputs.items())
        side_values = [value for _, value in inputs.values()]
        call = _bound(objective, options, spec, name, operand(hidden, weight, name))
        trained = weight if up is None else up
        differentiable = [hidden, trained, bias, *side_values]
        out = _op(
            hidden,
            weight,
            labels,
            bias,
            up,
            [seq.cu_seqlens, seq.lengths, seq.token_to_sequence, seq.totals],
            side_values,
            weights,
            scaling,
            memory_budget,
            call,
            [grad and t is not None and t.requires_grad for t in differentiable],
            accumulate_into if grad else None,
        )
        names = _metric_names(call)
    if not return_outputs:
        return out[0]
    results, metrics = out[1:6], out[6]
    if picked is not None:
        rows, sequences = picked
        spread = whole.num_sequences, sequences
        results = [
            _spread(results[0], *spread, 0.0),
            *(_spread(t, whole.num_tokens, rows, torch.nan) for t in results[1:]),
        ]
        metrics = [_spread(m, *spread, torch.nan) for m in metrics]
    named = dict(zip(names, metrics, strict=True))
    return LinearLossOutput(*(out[0], *results, named))


def _composed(
    objective: Objective,
    made: LogprobOutput,
    inputs: dict[str, tuple[str, Tensor]],
    options: tuple[tuple[str, Any], ...],
    seq: Sequences,
    weights: Tensor,  # (G,)
) -> tuple[list[Any], tuple[str, ...]]:
    """The op's [loss, seq_loss, logps, lse, entropy, max_logit, metrics] from statistics with a
    graph, and the metrics' names."""
    side = objectives.defaults(objective) | dict(options)
    side |= {key: value.to(seq.device) for key, (_, value) in inputs.items()}
    known = made._asdict() | {"target_logit": made.logps + made.lse}
    stats = {s: known[s] for s in objectives.statistics(objective)}
    losses, metrics = objectives.call(objective, stats, seq, side)
    mark = objectives.traits(objective)
    if mark.family is not None:
        with torch.no_grad():
            fam = mark.family(seq=seq, **side)
            ref = side.get("ref_logps") if fam.uses_ref else None
            found = objectives.family_metrics(fam, made.logps, ref, seq)
            metrics = objectives.family_report(mark, fam, found["log_ratio"], found["clipped"])
    loss = (losses * weights.to(losses.dtype)).sum()
    values = [m.detach() for m in metrics.values()]
    results = [losses.detach(), *(t.detach() for t in made)]
    return [loss, *results, values], tuple(metrics)


def _spread(values: Tensor, n: int, where: Tensor, rest: float) -> Tensor:
    return values.new_full((n,), rest).index_copy_(0, where, values)


def _described(objective: Objective) -> tuple[tuple[str, str], ...]:
    return tuple(objectives.side_inputs(objective).items())


def _bound(*call: Any) -> int:
    return bind(*call)


def _metric_names(number: int) -> tuple[str, ...]:
    return tuple(lookup(number).metrics)


# They read signatures, which torch.compile cannot trace: what torch.compiler.assume_constant_result
# sets, without its import of the whole compiler.
for _constant in (_described, _bound, _metric_names):
    _constant._dynamo_marked_constant = True  # type: ignore[union-attr]


# --- the op ---------------------------------------------------------------------------------------


@custom_op("lolkernels::linear_loss_v4", mutates_args=())
def _op(
    hidden: Tensor,  # (N, D), or with up (N, D + r)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    up: Tensor | None,  # (V, r) more columns of the weight, which then is frozen
    sequences: Sequence[Tensor],  # cu_seqlens (CPU), lengths, token_to_sequence, totals (CPU)
    side: Sequence[Tensor],  # the objective's inputs; a value per sequence may stand on the CPU
    weights: Tensor,  # (G,) of the reduction
    scaling: Sequence[float],  # scale, softcap, temperature
    memory_budget: int | None,
    call: int,  # see step.bind
    need: Sequence[bool],  # the gradient of hidden, weight (with up: of up), bias, each of side
    into: Tensor | None,  # (V, D), for the backward to add dweight to
) -> list[Tensor]:
    """[loss (), seq_loss (G,), logps, lse, entropy, max_logit (N,), metrics (M, G), dhidden,
    dweight, dbias, kept (k, V'), saved (6 or 7, N), *dside].

    Gradients are of the loss, in the accumulation dtype; empty where not needed. Where one block
    holds all rows, or ``into`` waits for them, dweight and dbias are left to the backward, which
    makes them of ``kept`` and of the logits made again of other rows.
    """
    deferred.raise_noted(hidden.device)
    flags = deferred.label_flags(labels, weight.shape[0])
    c = lookup(call)
    cu_seqlens, lengths, owners, totals = sequences
    group_size = lengths.shape[0] // max(1, weights.shape[0])
    seq = Sequences._of(cu_seqlens, lengths, owners, max(1, group_size), totals)
    n, size = hidden.shape
    trained = weight if up is None else up
    vocab, columns = trained.shape
    need_hidden, need_weight, need_bias = need[:3]
    head = need_weight or need_bias
    step = Step(c, side, need[3:], seq, weights)
    for (name, _), value in zip(c.spec, side, strict=True):
        deferred.check_side(name, value, seen=step.fused)
    walk = make_walk(
        hidden, weight, bias, up, labels, scaling, c.backend, c.operand, memory_budget, flags
    )
    hold = "entropy" in objectives.statistics(c.objective)
    most, dtype = rows_to_keep(2**62, hidden, weight, c.operand, memory_budget, hold)
    one = n <= most and not hold
    later = head and (one or into is not None)
    made, held = head and not later, hold and need_hidden
    offsets = seq.cu_seqlens.tolist()
    if one or not (made or held):
        plan = [step.whole]
    else:
        group = longest_group(offsets, seq.group_size)
        most, _ = rows_to_keep(2**62, hidden, weight, c.operand, memory_budget, hold, group)
        local = step.traits.token_local and seq.group_size == 1
        plan = plan_blocks(offsets, most, group_size=seq.group_size, token_local=local)
    grads = Grads(
        walk.empty(vocab, columns) if need_weight and not later else None,
        walk.empty(vocab) if need_bias and not later else None,
    )
    dhidden = walk.empty(n if need_hidden else 0, size)
    longest = max((b.stop - b.start for b in plan), default=0)
    keep = later and not hold
    rows = min(longest, most) if made or held or keep else 0
    kept = new_kept(hidden, rows, vocab, dtype, c.backend)
    saved = walk.empty(6 + hold if later else 0, n)
    parts = []
    with ieee_fp32():
        for block in plan:
            here = walk.block(block.start, block.stop)
            k = min(here.n, rows)
            view = kept[:k, :vocab]
            dh = dhidden[block.start : block.stop] if need_hidden else None
            stats = here.sweep(view, None if hold else dh, hold=hold)
            parts.append(stats)
            coef = step(stats, block)
            if later:
                _save(saved[:, block.start : block.stop], stats, coef)
            if dh is not None and not hold:
                here.dhidden(dh, stats, coef)
            if grads.any or (hold and dh is not None):
                here.gradients(stats, coef, grads, view, dh if hold else None, hold=hold)
    grads.finish()
    stats = _joined(parts, walk)
    if len(plan) > 1 and step.traits.family is None:
        step.check_blocking(stats)
    reported = step.reported()
    if not c.metrics:
        c.metrics.extend(reported)
    seq_loss = step.seq_loss.to(walk.dtype)
    loss = torch.dot(seq_loss, weights.to(walk.dtype))
    found = [reported[name] for name in c.metrics if reported]
    metrics = torch.stack(found) if found else seq_loss.new_empty(0, seq.num_groups)
    deferred.send(hidden.device)
    return [
        loss,
        seq_loss,
        stats.logps,
        stats.lse,
        stats.entropy,
        stats.max_logit,
        metrics.to(walk.dtype),
        dhidden,
        walk.empty(0, columns) if grads.weight is None else grads.weight,
        walk.empty(0) if grads.bias is None else grads.bias,
        kept if keep else new_kept(hidden, 0, vocab, dtype, c.backend),
        saved,
        *step.side_grads.values(),
    ]


def _save(out: Tensor, stats: RowStats, coef: Coefficients) -> None:
    """What the backward makes the head's gradients of; a seventh row where logits were held."""
    columns = [coef.a, coef.b, coef.both, stats.slope, stats.rest, stats.share, coef.c]
    zero = torch.zeros_like(coef.a)
    torch.stack([zero if t is None else t for t in columns[: len(out)]], out=out)


def _joined(parts: list[RowStats], walk: Walk) -> RowStats:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return RowStats(*(walk.empty(0) for _ in RowStats._fields))
    return RowStats(*map(torch.cat, zip(*parts, strict=True)))


@_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    sequences: Sequence[Tensor],
    side: Sequence[Tensor],
    weights: Tensor,
    scaling: Sequence[float],
    memory_budget: int | None,
    call: int,
    need: Sequence[bool],
    into: Tensor | None,
) -> list[Tensor]:
    c = lookup(call)
    (n, d), vocab, groups = hidden.shape, weight.shape[0], weights.shape[0]
    dtype = accumulation_dtype(hidden, weight)
    hold = "entropy" in objectives.statistics(c.objective)
    most, kept_dtype = rows_to_keep(2**62, hidden, weight, c.operand, memory_budget, hold)
    later = (need[1] or need[2]) and (into is not None or (not hold and n <= most))
    keep: Any = torch.sym_min(n, most) if later and not hold else 0  # type: ignore[no-untyped-call]
    shapes: list[Any] = [(), (groups,), (n,), (n,), (n,), (n,), (len(c.metrics), groups)]
    shapes += [
        (n if need[0] else 0, d),
        (vocab if need[1] and not later else 0, (weight if up is None else up).shape[1]),
        (vocab if need[2] and not later else 0,),
    ]
    return [
        *(hidden.new_empty(shape, dtype=dtype) for shape in shapes),
        new_kept(hidden, keep, vocab, kept_dtype, c.backend),
        hidden.new_empty(6 + hold if later else 0, n, dtype=dtype),
        *(
            torch.empty_like(t, device=hidden.device)
            for t, w in zip(side, need[3:], strict=True)
            if w
        ),
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, weight, labels, bias, up, sequences, side, weights, *options, call, need, into = inputs
    logps, lse, dhidden, kept, saved = (output[i] for i in (2, 3, 7, 10, 11))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.num_side = len(side)
    ctx.save_for_backward(
        hidden, weight, labels, bias, up, weights, *sequences, *side, logps, lse, dhidden, kept,
        saved, *output[12:],
    )  # fmt: skip
    ctx.call, ctx.need, ctx.options, ctx.into = call, need, options, into
    ctx.kept_call = lookup(call)  # the objective lives as long as the graph
    ctx.later = saved.shape[0] > 0
    ctx.made = None if ctx.later else output[8:10]


def _backward(ctx: Any, upstream: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Scale what the forward made, and make the head's gradients of what it kept.

    Gradients of the head that the forward made are handed over, not copied: a copy of dweight would
    be V x D more memory at the peak. A second backward makes them again.
    """
    g = upstream[0]
    if g is None:
        return (*(None,) * 5, [None] * 4, [None] * ctx.num_side, *(None,) * 6)
    if torch.is_grad_enabled():  # the gradients carry no graph: a second one would be lost silently
        no_second_derivative()
    hidden, weight, labels, bias, up, weights, *tensors = ctx.saved_tensors
    sequences, side = tensors[:4], tensors[4 : 4 + ctx.num_side]
    logps, lse, dhidden, kept, saved, *dside = tensors[4 + ctx.num_side :]
    need_hidden, *head = wanted(ctx, (hidden, weight, labels, bias, up), g)
    trained = weight if up is None else up
    dtrained = dbias = None
    if any(head) and ctx.later:
        c = ctx.kept_call
        a, b, both = saved[:3] * g
        slope, rest, share = saved[3:6]
        _, dtrained, dbias = head_gradients(
            ctx,
            [a, b],
            both,
            saved[6] * g if len(saved) > 6 else None,
            [logps, lse, slope, rest, share],
            kept,
            hidden,
            weight,
            labels,
            bias,
            up,
            ctx.options[0],
            c.backend,
            ctx.options[1],
            c.operand,
            False,
            [False, *head],
        )
    elif any(head):
        made, ctx.made = ctx.made, None
        if made is None:
            revive(ctx.call, ctx.kept_call)
            made = _op(
                hidden, weight, labels, bias, up, sequences, side, weights, *ctx.options, ctx.call,
                [False, *head, *[False] * ctx.num_side], None,
            )[8:10]  # fmt: skip
        dtrained = _scaled(made[0], g, trained.dtype) if head[0] else None
        dbias = _scaled(made[1], g, bias.dtype) if head[1] else None
    of_weight, of_up = (dtrained, None) if up is None else (None, dtrained)
    found = iter(dside)
    return (
        _product(dhidden, g, hidden.dtype) if need_hidden else None,
        of_weight,
        None,
        dbias,
        of_up,
        [None] * 4,
        [
            (next(found) * g).to(t.device) if w else None
            for t, w in zip(side, ctx.need[3:], strict=True)
        ],
        *(None,) * 6,
    )


def _product(grad: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """g grad in ``dtype``, in one pass."""
    if type(g) is not Tensor:  # a tracer writes into nothing
        return (grad * g).to(dtype)
    return torch.mul(grad, g, out=torch.empty_like(grad, dtype=dtype))


def _scaled(grad: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """The same of a gradient that nobody else needs."""
    # A tracer sees the op's outputs: the product is a value of its own.
    if type(g) is not Tensor or (grad.is_cuda and grad.dtype != dtype):
        return _product(grad, g, dtype)
    if grad.is_cuda or float(g) != 1.0:
        grad.mul_(g)
    return grad.to(dtype)


_op.register_autograd(_backward, setup_context=_setup)
