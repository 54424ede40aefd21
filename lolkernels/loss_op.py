"""The op behind ``linear_loss``: a whole objective with its gradients, in one pass over the rows.

Schema, fake and autograd as in :mod:`lolkernels.ops`.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import backends, chunked, deferred, planner
from .chunked import Grads, Head, Scaling, accumulation_dtype
from .objectives import (
    NO_RATIO,
    Objective,
    reduction_weights,
    traits,
    weighted_loss_and_coef,
)
from .planner import Piece
from .sequences import Sequences, from_host

# An op's schema has no callable: an objective with its options travels as a number in this table.
_handles: weakref.WeakKeyDictionary[Any, dict[Any, int]] = weakref.WeakKeyDictionary()
_bound: dict[int, tuple[Any, dict[str, Any]]] = {}
_next = iter(range(2**62))


def bind(objective: Objective, options: tuple[tuple[str, Any], ...]) -> int:
    """The handle of an objective with its options. A plain function is held weakly."""
    try:
        known = _handles.setdefault(objective, {})
        hash(options)
    except TypeError as error:
        raise TypeError(f"objective and its options must be hashable: {error}") from None
    if options not in known:
        handle = next(_next)
        weak = isinstance(objective, types.FunctionType)
        _bound[handle] = (weakref.ref(objective) if weak else objective, dict(options))
        if weak:
            weakref.finalize(objective, _bound.pop, handle, None)
        known[options] = handle
    return known[options]


def _lookup(handle: int) -> tuple[Objective, dict[str, Any]]:
    found, options = _bound[handle]
    objective: Any = found() if isinstance(found, weakref.ref) else found
    return objective, options


class _Recording(torch._C._ForceDispatchKeyGuard):
    """Autograd inside an op, whose body runs below it: a coefficient is a gradient."""

    def __init__(self) -> None:
        autograd = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
        super().__init__(
            torch._C._dispatch_tls_local_include_set(),
            torch._C._dispatch_tls_local_exclude_set() - autograd,
        )


def _make_step(
    objective: Objective,
    options: dict[str, Any],
    inputs: dict[str, tuple[str, Tensor]],  # name -> kind, value
    seq: Sequences,
    weights: Tensor,  # (num_groups,) of the reduction
    backend: Any,
    seq_loss: Tensor,  # (num_groups,), added to
) -> chunked.Step:
    """The objective on a chunk: its rows' log-probs -> d (reduced loss) / d logp."""
    mark = traits(objective)

    def step(logps: Tensor, pieces: list[Piece], index: slice | Tensor) -> Tensor:
        owner, group = _places(pieces, seq)
        here = planner.chunk_sequences(pieces, seq)
        pick = {"token": lambda t: t[index], "sequence": lambda t: t[owner], "whole": lambda t: t}
        side = {name: pick[kind](t) for name, (kind, t) in inputs.items()} | options
        weight = weights[group].to(logps.dtype)
        if mark.family is not None:
            fam = mark.family(seq=here, **side)
            ref = side.get("ref_logps") if fam.uses_ref else None
            if ref is None and (fam.ratio != NO_RATIO and fam.uses_ref):
                raise ValueError("a ratio to the reference needs ref_logps")
            loss, coef, _, _ = backend.sequence_coef(
                logps,
                ref,
                here.offsets,
                fam.weight.to(logps.dtype),
                ratio=fam.ratio,
                log_low=fam.log_low,
                log_high=fam.log_high,
                beta=fam.beta,
            )
            coef = coef * here.expand(weight)
        else:
            with _Recording(), torch.inference_mode(False):
                _, coef, loss = weighted_loss_and_coef(
                    objective, logps.clone(), here, weight, **side
                )
        if isinstance(group, slice):
            seq_loss[group] += loss
        else:
            seq_loss.index_add_(0, group, loss.to(seq_loss.dtype))
        return torch.as_tensor(coef, dtype=logps.dtype)

    return step


def _places(pieces: list[Piece], seq: Sequences) -> tuple[slice | Tensor, slice | Tensor]:
    """The sequences and the groups of a chunk's pieces."""
    owner, size = planner.consecutive(pieces), seq.group_size
    if isinstance(owner, slice):
        return owner, slice(owner.start // size, owner.stop // size)
    groups = [s // size for s in owner[::size]]
    return from_host(owner, seq.device), from_host(groups, seq.device)


def _active(
    objective: Objective, side: dict[str, Tensor], options: dict[str, Any], seq: Sequences
) -> list[bool]:
    """False for the sequences whose loss and coefficient are zero whatever the log-probs are.

    To look at what stands on a GPU would be to wait for it: all sequences take part then.
    """
    family = traits(objective).family
    everything = [True] * seq.num_sequences
    if family is None:
        return everything
    fam = family(seq=seq, **side, **options)
    if fam.beta != 0 or not deferred.immediate(fam.weight.device):
        return everything
    found: list[bool] = (fam.weight != 0).tolist()
    return found


def _coefficient_size(
    objective: Objective,
    inputs: dict[str, tuple[str, Tensor]],
    options: dict[str, Any],
    seq: Sequences,
    weights: Tensor,  # (G,)
) -> Tensor | None:
    """About the largest d (reduced loss) / d logp, as far as it is known before any log-prob."""
    if not seq.num_groups:
        return None
    family = traits(objective).family
    if family is None:
        return weights.amax()
    fam = family(seq=seq, **{name: t for name, (_, t) in inputs.items()}, **options)
    return weights.amax() * (fam.weight.abs().amax() + abs(fam.beta))


@custom_op("lolkernels::linear_loss", mutates_args=())
def linear_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    cu_seqlens: Tensor,  # (S + 1,) on the CPU
    lengths: Tensor,  # (S,)
    token_to_sequence: Tensor,  # (N,)
    side: Sequence[Tensor],  # the objective's inputs; a value a sequence may stand on the CPU
    side_spec: str,  # "name:kind,..." in the order of side; kind is token, sequence or whole
    objective: int,  # see bind
    reduction: str,
    group_size: int,
    totals: Tensor,  # (2,) total_sequences and total_tokens, on the CPU
    scale: float,
    softcap: float,
    temperature: float,
    backend: str,
    memory_budget: int | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> list[Tensor]:
    """[loss (), seq_loss (G,), logps, lse, entropy, max_logit (N,), dhidden, dweight, dbias].

    Gradients are of the loss, in the accumulation dtype; empty where not needed.
    """
    deferred.raise_noted(hidden.device)
    poison = deferred.check_labels(labels, weight.shape[0])
    fn, options = _lookup(objective)
    seq = Sequences._of(cu_seqlens, lengths, token_to_sequence, group_size, totals)
    given: dict[str, Tensor] = {}
    inputs: dict[str, tuple[str, Tensor]] = {}
    for text, value in zip(side_spec.split(",") if side_spec else [], side, strict=True):
        name, kind = text.split(":")
        deferred.check_not_nan(name, value)
        given[name] = value
        inputs[name] = (kind, value.to(hidden.device, non_blocking=True))
    module = backends.TABLE[backend]
    scaling = Scaling(scale, softcap, temperature)
    head = Head(hidden, weight, bias, labels, scaling, module, poison=poison)
    weights = reduction_weights(seq, reduction)
    grads = Grads(
        head,
        need_hidden,
        need_weight,
        need_bias,
        scale_to=lambda: _coefficient_size(fn, inputs, options, seq, weights),
    )
    stats = chunked.RowStats(*(t.fill_(torch.nan) for t in head.empty_stats(seq.num_tokens)))
    seq_loss = torch.zeros(seq.num_groups, dtype=torch.float64, device=hidden.device)
    rows = head.held_rows(memory_budget)
    chunks = planner.plan_chunks(
        cu_seqlens.tolist(),
        _active(fn, given, options, seq),
        rows if grads.any else max(1, seq.num_tokens),
        group_size=group_size,
        token_local=traits(fn).token_local,
    )
    step = _make_step(fn, options, inputs, seq, weights, module, seq_loss)
    chunked.loss_and_grads(head, chunks, step, grads, stats, memory_budget)
    loss = (seq_loss * weights).sum().to(head.dtype)
    s = stats
    rows_out = [s.target_logit - s.lse, s.lse, s.lse - s.expected_logit, s.max_logit]
    return [loss, seq_loss.to(head.dtype), *rows_out, grads.hidden, grads.weight, grads.bias]


@linear_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    lengths: Tensor,
    token_to_sequence: Tensor,
    side: Sequence[Tensor],
    side_spec: str,
    objective: int,
    reduction: str,
    group_size: int,
    *options: Any,
) -> list[Tensor]:
    need_hidden, need_weight, need_bias = options[-3:]
    (n, d), v = hidden.shape, weight.shape[0]
    groups = (cu_seqlens.shape[0] - 1) // group_size
    dtype = accumulation_dtype(hidden, weight)
    shapes: list[Any] = [(), (groups,), (n,), (n,), (n,), (n,)]
    shapes += [(n if need_hidden else 0, d), (v if need_weight else 0, d), (v if need_bias else 0,)]
    return [hidden.new_empty(shape, dtype=dtype) for shape in shapes]


def _linear_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, weight, labels, bias, cu_seqlens, lengths, owner, side, *options = inputs
    totals = options[4]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.num_side = len(side)
    # Saved for a second backward only.
    ctx.save_for_backward(hidden, weight, labels, bias, cu_seqlens, lengths, owner, totals, *side)
    ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
    ctx.options = [*options[:4], None, *options[5:]]
    ctx.objective = _lookup(options[1])  # kept alive as long as the graph
    ctx.grads = output[6:]


def _linear_loss_grad(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    """Scale the gradients made in the forward. A second backward makes them again.

    They are handed over, not copied: a copy of dweight would be V x D more memory at the peak.
    """
    nothing: list[Any] = [None] * 21
    nothing[7] = [None] * ctx.num_side
    g = upstream[0]
    if g is None:
        return tuple(nothing)
    if torch.is_grad_enabled():  # the gradients carry no graph: a second one would be lost silently
        raise NotImplementedError("lolkernels ops have no second derivative (create_graph=True)")
    grads, ctx.grads = ctx.grads, None
    if grads is None:
        *tensors, totals = ctx.saved_tensors[:8]
        side = ctx.saved_tensors[8:]
        options = [*ctx.options[:4], totals, *ctx.options[5:]]
        grads = linear_loss(*tensors, side, *options)[6:]
    for i, position in enumerate((0, 1, 3)):
        if ctx.needs_input_grad[position]:
            nothing[position] = _scaled(grads[i], g, ctx.dtypes[i])
    return tuple(nothing)


def _scaled(grad: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """g times a gradient that nobody else needs, in ``dtype``."""
    if type(g) is not Tensor:  # a tracer sees the op's outputs: the product is a value of its own
        return (grad * g).to(dtype)
    if grad.is_cuda and grad.dtype != dtype:  # one pass over it instead of two
        return torch.mul(grad, g, out=torch.empty_like(grad, dtype=dtype))
    return grad.mul_(g).to(dtype)


linear_loss.register_autograd(_linear_loss_grad, setup_context=_linear_loss_setup)
