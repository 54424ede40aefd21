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

from . import backends, checks, chunked
from .chunked import Grads, Head, Scaling, accumulation_dtype

FourTensors = tuple[Tensor, Tensor, Tensor, Tensor]


def _no_double_backward(*_: Any) -> NoReturn:
    raise NotImplementedError("lolkernels ops have no second derivative (create_graph=True)")


def _kept_rows(mask: Tensor | None, labels: Tensor) -> tuple[slice | Tensor, int]:
    """The rows that take part, and their number: masked rows never enter a GEMM."""
    n = labels.shape[0]
    if mask is None:
        return slice(0, n), n
    kept = mask.nonzero().squeeze(1)
    return (slice(0, n), n) if kept.numel() == n else (kept, kept.numel())


def _spread(value: Tensor, rows: slice | Tensor, n: int) -> Tensor:
    if isinstance(rows, slice):
        return value
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
    rows, n = _kept_rows(mask, labels)
    checks.label_values(labels[rows], weight.shape[0])
    head = Head(
        hidden, weight, bias, labels, Scaling(scale, softcap, temperature), backends.TABLE[backend]
    )
    s = chunked.tile_stats(head, rows, n, memory_budget)
    out = (s.target_logit - s.lse, s.lse, s.lse - s.expected_logit, s.max_logit)
    a, b, c, d = (_spread(t, rows, labels.shape[0]) for t in out)
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
    rows, n = _kept_rows(mask, labels)
    head = Head(
        hidden, weight, bias, labels, Scaling(scale, softcap, temperature), backends.TABLE[backend]
    )
    grads = Grads(head, need_hidden, need_weight, need_bias, round_weight=True)
    lse, expected = lse[rows], (lse - entropy)[rows]
    given = (None if g is None else g[rows].to(lse.dtype) for g in (g_logps, g_lse, g_entropy))
    abc = _row_coefficients(expected, *given)
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
) -> FourTensors:  # logps, lse, entropy, max_logit: each (N,)
    checks.label_values(labels, logits.shape[1])
    target, lse, expected, largest = backends.TABLE[backend].row_stats(
        logits, labels, scale=scale, softcap=softcap, temperature=temperature
    )
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
    given = (None if g is None else g.to(lse.dtype) for g in (g_logps, g_lse, g_entropy))
    a, b, c = _row_coefficients(lse - entropy, *given)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    dlogits: Tensor = backends.TABLE[backend].dlogits_(
        logits, labels, lse, a, b, c, scale=scale, softcap=softcap, temperature=temperature, out=out
    )
    return dlogits


@logprob_backward.register_fake
def _(*args: Any) -> Tensor:
    logits: Tensor = args[5]
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _logprob_setup(ctx: Any, inputs: tuple[Any, ...], output: FourTensors) -> None:
    logits, labels, *options = inputs
    _, lse, entropy, max_logit = output
    ctx.mark_non_differentiable(max_logit)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(lse, entropy, logits, labels)
    ctx.options = options


def _logprob_grad(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 5
    if all(g is None for g in upstream[:3]):
        return None, *nothing
    return logprob_backward(*upstream[:3], *ctx.saved_tensors, *ctx.options), *nothing


logprob.register_autograd(_logprob_grad, setup_context=_logprob_setup)
logprob_backward.register_autograd(_no_double_backward)
