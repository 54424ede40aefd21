"""The torch ops: schema, fake and autograd, once for all backends.

An op takes packed rows, tensors and plain numbers. It never sees a reduction, a model or an ignored
label, and it never writes into its inputs. Gradients are exact first derivatives; a second
derivative raises.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import custom_op

from . import backends, chunked, deferred
from .chunked import Grads, Head, Scaling, accumulation_dtype

FourTensors = tuple[Tensor, Tensor, Tensor, Tensor]


def _no_double_backward(*_: Any) -> NoReturn:
    raise NotImplementedError("lolkernels ops have no second derivative (create_graph=True)")


def _kept_rows(
    hidden: Tensor, labels: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, slice | Tensor, int]:
    """hidden, labels, the rows that take part, and their number.

    On a CPU masked rows never enter a GEMM. On a GPU their number could not be known without
    waiting: all rows take part, the masked ones as zeros, whatever they held.
    """
    n = labels.shape[0]
    if mask is None:
        return hidden, labels, slice(0, n), n
    if not deferred.immediate(hidden.device):
        labels = labels.masked_fill(~mask, 0)
        return hidden.masked_fill(~mask[:, None], 0), labels, slice(0, n), n
    kept = mask.nonzero().squeeze(1)
    return hidden, labels, (slice(0, n) if kept.numel() == n else kept), kept.numel()


def _spread(value: Tensor, rows: slice | Tensor, n: int, mask: Tensor | None) -> Tensor:
    """The rows' values in their places, zero elsewhere."""
    if isinstance(rows, slice):
        return value if mask is None else value.masked_fill(~mask, 0)
    return value.new_zeros(n).index_copy_(0, rows, value)


def _row_coefficients(
    expected: Tensor, g_logps: Tensor | None, g_lse: Tensor | None, g_entropy: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, c) of the contract: dz_v = a [v == y] + p_v (b + c z_v).

    logp = z_y - lse gives a = g, b = -g; dlse/dz_v = p_v; dH/dz_v = p_v (E[z] - z_v).
    """
    zero = torch.zeros_like(expected)
    a = zero if g_logps is None else g_logps
    b = -a if g_lse is None else g_lse - a
    if g_entropy is None:
        return a, b, zero
    return a, b + g_entropy * expected, -g_entropy


# --- linear_logprob -------------------------------------------------------------------------------


@custom_op("lolkernels::linear_logprob", mutates_args=())
def linear_logprob(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    mask: Tensor | None,  # (N,)
    scale: float,
    softcap: float,
    temperature: float,
    backend: str,
    memory_budget: int | None,
) -> FourTensors:  # logps, lse, entropy, max_logit: each (N,), 0 where masked
    deferred.raise_noted(hidden.device)
    total = labels.shape[0]
    hidden, labels, rows, n = _kept_rows(hidden, labels, mask)
    poison = deferred.check_labels(labels[rows], weight.shape[0])
    scaling, module = Scaling(scale, softcap, temperature), backends.TABLE[backend]
    head = Head(hidden, weight, bias, labels, scaling, module, poison=poison)
    s = chunked.tile_stats(head, rows, n, memory_budget)
    out = (s.target_logit - s.lse, s.lse, s.lse - s.expected_logit, s.max_logit)
    a, b, c, d = (_spread(t, rows, total, mask) for t in out)
    return a, b, c, d


@linear_logprob.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, *_: Any) -> FourTensors:
    def row() -> Tensor:
        return hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden, weight))

    return row(), row(), row(), row()


@custom_op("lolkernels::linear_logprob_backward", mutates_args=())
def linear_logprob_backward(
    g_logps: Tensor | None,  # (N,)
    g_lse: Tensor | None,  # (N,)
    g_entropy: Tensor | None,  # (N,)
    lse: Tensor,  # (N,)
    entropy: Tensor,  # (N,)
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    temperature: float,
    backend: str,
    memory_budget: int | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[
    Tensor, Tensor, Tensor
]:  # dhidden, dweight, dbias: (0, D), (0, D), (0,) where not needed
    hidden, labels, rows, n = _kept_rows(hidden, labels, mask)
    scaling, module = Scaling(scale, softcap, temperature), backends.TABLE[backend]
    head = Head(hidden, weight, bias, labels, scaling, module)
    if mask is not None and isinstance(rows, slice):
        g_logps, g_lse, g_entropy = (
            None if g is None else g.masked_fill(~mask, 0) for g in (g_logps, g_lse, g_entropy)
        )
    lse, expected = lse[rows], (lse - entropy)[rows]
    given = (None if g is None else g[rows].to(lse.dtype) for g in (g_logps, g_lse, g_entropy))
    abc = _row_coefficients(expected, *given)
    grads = Grads(
        head,
        need_hidden,
        need_weight,
        need_bias,
        round_weight=True,
        scale_to=lambda: torch.stack(abc).abs().amax() if n else None,
    )
    chunked.tile_grads(head, rows, n, lse, abc, grads, memory_budget)
    grads.finish()
    dbias = grads.bias if bias is None else grads.bias.to(bias.dtype)
    return grads.hidden.to(hidden.dtype), grads.weight, dbias


@linear_logprob_backward.register_fake
def _(
    g_logps: Tensor | None,
    g_lse: Tensor | None,
    g_entropy: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = options[-3:]
    return (
        hidden.new_empty((hidden.shape[0] if need_hidden else 0, hidden.shape[1])),
        weight.new_empty((weight.shape[0] if need_weight else 0, weight.shape[1])),
        lse.new_empty(
            weight.shape[0] if need_bias else 0, dtype=lse.dtype if bias is None else bias.dtype
        ),
    )


def _linear_logprob_setup(ctx: Any, inputs: tuple[Any, ...], output: FourTensors) -> None:
    hidden, weight, labels, bias, mask, *options = inputs
    _, lse, entropy, max_logit = output
    ctx.mark_non_differentiable(max_logit)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(lse, entropy, hidden, weight, labels, bias, mask)
    ctx.options = options


def _linear_logprob_grad(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    nothing = (None,) * 10
    if not any(needs) or all(g is None for g in upstream[:3]):
        return nothing
    dhidden, dweight, dbias = linear_logprob_backward(
        *upstream[:3], *ctx.saved_tensors, *ctx.options, *needs
    )
    picked = [g if need else None for g, need in zip((dhidden, dweight, dbias), needs, strict=True)]
    return picked[0], picked[1], None, picked[2], *nothing[4:]


linear_logprob.register_autograd(_linear_logprob_grad, setup_context=_linear_logprob_setup)
linear_logprob_backward.register_autograd(_no_double_backward)


# --- logprob: the logits are there already --------------------------------------------------------


@custom_op("lolkernels::logprob", mutates_args=())
def logprob(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    scale: float,
    softcap: float,
    temperature: float,
    backend: str,
    inplace_backward: bool,
) -> FourTensors:  # logps, lse, entropy, max_logit: each (N,)
    deferred.raise_noted(logits.device)
    poison = deferred.check_labels(labels, logits.shape[1])
    target, lse, expected, largest = backends.TABLE[backend].row_stats(
        logits, labels, scale=scale, softcap=softcap, temperature=temperature
    )
    if poison is not None:
        lse = lse + poison
    return target - lse, lse, lse - expected, largest


@logprob.register_fake
def _(logits: Tensor, labels: Tensor, *_: Any) -> FourTensors:
    def row() -> Tensor:
        return logits.new_empty(logits.shape[0], dtype=accumulation_dtype(logits))

    return row(), row(), row(), row()


@custom_op("lolkernels::logprob_backward", mutates_args=())
def logprob_backward(
    g_logps: Tensor | None,
    g_lse: Tensor | None,
    g_entropy: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    logits: Tensor,
    labels: Tensor,
    scale: float,
    softcap: float,
    temperature: float,
    backend: str,
) -> Tensor:  # (N, V) in the logits' dtype
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    given = (g_logps, g_lse, g_entropy)
    scaling = Scaling(scale, softcap, temperature)
    _logprob_dlogits(given, lse, entropy, logits, labels, scaling, backend, out)
    return out


@logprob_backward.register_fake
def _(*args: Any) -> Tensor:
    logits: Tensor = args[5]
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@custom_op("lolkernels::logprob_backward_", mutates_args=("logits",))
def logprob_backward_(
    g_logps: Tensor | None,
    g_lse: Tensor | None,
    g_entropy: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    logits: Tensor,  # overwritten by its gradient
    labels: Tensor,
    scale: float,
    softcap: float,
    temperature: float,
    backend: str,
) -> None:
    given = (g_logps, g_lse, g_entropy)
    scaling = Scaling(scale, softcap, temperature)
    _logprob_dlogits(given, lse, entropy, logits, labels, scaling, backend, logits)


@logprob_backward_.register_fake
def _(*args: Any) -> None:
    return None


def _logprob_dlogits(
    given: tuple[Tensor | None, ...],
    lse: Tensor,
    entropy: Tensor,
    logits: Tensor,
    labels: Tensor,
    scaling: Scaling,
    backend: str,
    out: Tensor,
) -> None:
    upstream = (None if g is None else g.to(lse.dtype) for g in given)
    abc = _row_coefficients(lse - entropy, *upstream)
    backends.TABLE[backend].dlogits_(logits, labels, lse, *abc, **scaling._asdict(), out=out)


def _logprob_setup(ctx: Any, inputs: tuple[Any, ...], output: FourTensors) -> None:
    logits, labels, *options, inplace_backward = inputs
    _, lse, entropy, max_logit = output
    ctx.mark_non_differentiable(max_logit)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(lse, entropy, logits, labels)
    ctx.options = options
    ctx.inplace = inplace_backward


def _logprob_grad(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 6
    if all(g is None for g in upstream[:3]):
        return None, *nothing
    if not ctx.inplace:
        return logprob_backward(*upstream[:3], *ctx.saved_tensors, *ctx.options), *nothing
    if torch.is_grad_enabled():
        _no_double_backward()
    logits = ctx.saved_tensors[2].detach()
    lse, entropy, _, labels = ctx.saved_tensors
    logprob_backward_(*upstream[:3], lse, entropy, logits, labels, *ctx.options)
    return logits, *nothing


logprob.register_autograd(_logprob_grad, setup_context=_logprob_setup)
logprob_backward.register_autograd(_no_double_backward)
