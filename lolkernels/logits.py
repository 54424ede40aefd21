"""``logprob``: the statistics of logits that are there already. Argument errors, then one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import backends, checks, deferred, distributed
from .gemm import accumulation_dtype
from .logprob import LogprobOutput, no_second_derivative, whole_labels
from .walk import Coefficients, Scaling


def logprob(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
    inplace_backward: bool = False,
    tp_group: Any = None,
) -> LogprobOutput:
    """The statistics of :func:`linear_logprob` from logits that are already there.

    Reads the logits once, and once more in the backward, which allocates one gradient of their
    size. z = softcap(logit_scale * logits) / temperature.

    Args:
        logits: float32, bfloat16, float16 or float64; any strides.
        labels: int64 token ids in [0, V); there is no ignored label: select the rows first.
        temperature, softcap, logit_scale, backend: as in :func:`linear_logprob`.
        inplace_backward: the backward writes the gradient over ``logits`` and allocates nothing.
            Whoever needs the logits after that meets autograd's error, as does a second backward.
        tp_group: vocab-parallel: a process group whose ranks hold consecutive columns, in their
            order; the results are the same on all.

    Raises:
        ValueError, TypeError: name the argument and what to change.
        NotImplementedError: a second derivative, or forward-mode differentiation.
    """
    checks.floating("logits", logits)
    if logits.dim() < 2 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must have shape (N, V) or (..., V), V > 0; got {tuple(logits.shape)}"
        )
    checks.label_ids("labels", labels, logits.shape[:-1], "logits' leading dimensions")
    checks.same_device(logits=logits, labels=labels)
    distributed.check_group("tp_group", tp_group)
    checks.no_forward_mode(logits=logits)
    scaling = checks.scaling(temperature, softcap, logit_scale)
    checks.flag("inplace_backward", inplace_backward)
    name = backends.pick(backend, logits.device, logits.dtype)
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    if inplace_backward and any(
        step == 0 and size > 1 for step, size in zip(rows.stride(), rows.shape, strict=True)
    ):
        raise ValueError(
            "inplace_backward needs logits of their own memory, but these are expanded; pass "
            "logits.contiguous() or inplace_backward=False"
        )
    ids, where = labels.reshape(-1).long(), None
    if tp_group is not None:
        where, poison = whole_labels(ids, rows.shape[1], tp_group)
        ids = where.labels
    out = _op(rows, ids, where is not None, scaling, name, inplace_backward)
    if where is not None:
        out = distributed.combine(out, where, poison)
    return LogprobOutput(*(t.view(labels.shape) for t in out))


@custom_op("lolkernels::logprob_v3", mutates_args=())
def _op(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    shard: bool,  # of a larger vocabulary: a label outside [0, V) has no target here
    scaling: Sequence[float],  # scale, softcap, temperature
    backend: str,
    inplace_backward: bool,
) -> list[Tensor]:
    """[logps, lse, entropy, max_logit], each (N,)."""
    deferred.raise_noted(logits.device)
    poison = None if shard else deferred.check_labels(labels, logits.shape[1])
    target, lse, expected, largest = backends.TABLE[backend].row_stats(
        logits, labels, **Scaling(*scaling)._asdict()
    )
    if poison is not None:
        lse = lse + poison
    return [target - lse, lse, lse - expected, largest]


@_op.register_fake
def _(logits: Tensor, labels: Tensor, *_: Any) -> list[Tensor]:
    dtype = accumulation_dtype(logits)
    return [logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(4)]


@custom_op("lolkernels::logprob_gradient_v2", mutates_args=())
def _gradient(
    abc: Sequence[Tensor],  # each (N,)
    lse: Tensor,
    logits: Tensor,
    labels: Tensor,
    scaling: Sequence[float],
    backend: str,
) -> Tensor:  # (N, V) in the logits' dtype
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    options = Scaling(*scaling)._asdict()
    return backends.TABLE[backend].dlogits_(logits, labels, lse, *abc, **options, out=out)


@_gradient.register_fake
def _(abc: Any, lse: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@custom_op("lolkernels::logprob_gradient_v2_", mutates_args=("logits",))
def _gradient_(
    abc: Sequence[Tensor],
    lse: Tensor,
    logits: Tensor,  # overwritten by its gradient
    labels: Tensor,
    scaling: Sequence[float],
    backend: str,
) -> None:
    options = Scaling(*scaling)._asdict()
    backends.TABLE[backend].dlogits_(logits, labels, lse, *abc, **options, out=logits)


@_gradient_.register_fake
def _(*_: Any) -> None:
    return None


_gradient.register_autograd(no_second_derivative)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    logits, labels, _, *ctx.options, ctx.inplace = inputs
    _, lse, entropy, max_logit = output
    ctx.mark_non_differentiable(max_logit)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(lse, entropy, logits, labels)


def _backward(ctx: Any, upstream: Sequence[Tensor | None]) -> tuple[Any, ...]:
    lse, entropy, logits, labels = ctx.saved_tensors
    names = ("logps", "lse", "entropy")
    given = {
        name: g.to(lse.dtype) for name, g in zip(names, upstream, strict=False) if g is not None
    }
    if not given:
        return (None,) * 6
    coef = Coefficients.of(lse - entropy, given)
    abc = [coef.a, coef.b, torch.zeros_like(lse) if coef.c is None else coef.c]
    if not ctx.inplace:
        return _gradient(abc, lse, logits, labels, *ctx.options), *(None,) * 5
    if torch.is_grad_enabled():
        no_second_derivative()
    own = logits.detach()
    _gradient_(abc, lse, own, labels, *ctx.options)
    return own, *(None,) * 5


_op.register_autograd(_backward, setup_context=_setup)
