"""``logprob``: the statistics of logits that are there already. Argument errors, then one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import backends, checks, deferred, distributed
from .backends.contract import Exps, RowStats
from .backends.finish import at_label
from .gemm import accumulation_dtype
from .linear import no_second_derivative
from .logprob import LogprobOutput, whole_labels
from .walk import Coefficients, Scaling


def logprob(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
    inplace: bool = False,
    tp_group: Any = None,
) -> LogprobOutput:
    """The statistics of :func:`linear_logprob` from logits that are already there.

    Reads the logits once, and once more in the backward, which allocates one gradient of their
    size. z = softcap(logit_scale * logits) / temperature.

    Args:
        logits: float32, bfloat16, float16 or float64; any strides.
        labels: int64 token ids in [0, V); there is no ignored label: select the rows first.
        temperature, softcap, logit_scale, backend: as in :func:`linear_logprob`.
        inplace: the call takes the logits' memory where they require a gradient: it leaves their
            exponentials there, which the backward only multiplies, and allocates nothing. Do not
            read ``logits`` after it. Whoever needs them in a backward meets autograd's error, as
            does a second backward; the entropy has no gradient then.
        tp_group: vocab-parallel: a process group whose ranks hold consecutive columns, in their
            order; the results are the same on all. Not with ``inplace``. For p near 1 the gradient
            at the label is then exact to 1e-7 of its coefficient, not of itself:
            ``linear_logprob`` loses nothing.

    Raises:
        ValueError, TypeError: name the argument and what to change.
        NotImplementedError: a second derivative, forward-mode differentiation, or the gradient of
            the entropy with ``inplace``.
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
    checks.flag("inplace", inplace)
    name = backends.pick(backend, logits.device, logits.dtype)
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    if inplace and any(
        step == 0 and size > 1 for step, size in zip(rows.stride(), rows.shape, strict=True)
    ):
        raise ValueError(
            "inplace needs logits of their own memory, but these are expanded; pass "
            "logits.contiguous() or inplace=False"
        )
    ids, where = labels.reshape(-1).long(), None
    if tp_group is not None:
        if inplace:
            raise ValueError("inplace=True is for a whole vocabulary: leave it out with tp_group")
        where, poison = whole_labels(ids, rows.shape[1], tp_group)
        ids = where.labels
    taken = inplace and logits.requires_grad and torch.is_grad_enabled()
    sums = [*_exps_(rows.detach(), ids, scaling, name)] if taken else []
    out = _op(rows, ids, where is not None, sums, scaling, name)[:4]
    if where is not None:
        out = distributed.combine(out, where, poison)
    return LogprobOutput(*(t.view(labels.shape) for t in out))


@custom_op("lolkernels::logprob_exps_v3_", mutates_args=("logits",))
def _exps_(
    logits: Tensor,  # (N, V), overwritten by their exponentials
    labels: Tensor,  # (N,)
    scaling: Sequence[float],  # scale, softcap, temperature
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of Exps, each (N,)."""
    deferred.label_flags(labels, logits.shape[1])
    made: Exps = backends.TABLE[backend].exps_(logits, labels, **Scaling(*scaling)._asdict())
    return tuple(made)  # type: ignore[return-value]


@_exps_.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(_vectors(logits, len(Exps._fields)))


def _vectors(logits: Tensor, count: int) -> list[Tensor]:
    dtype = accumulation_dtype(logits)
    return [logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(count)]


@custom_op("lolkernels::logprob_v3", mutates_args=())
def _op(
    logits: Tensor,  # (N, V); their exponentials, where there are sums
    labels: Tensor,  # (N,)
    shard: bool,  # of a larger vocabulary: a label outside [0, V) has no target here
    sums: Sequence[Tensor],  # of :func:`_exps_`, or none
    scaling: Sequence[float],
    backend: str,
) -> list[Tensor]:
    """[logps, lse, entropy, max_logit, slope, rest, share], each (N,)."""
    deferred.raise_noted(logits.device)
    flags = None if shard else deferred.label_flags(labels, logits.shape[1])
    record, options = backends.TABLE[backend], Scaling(*scaling)._asdict()
    made = Exps(*sums) if sums else record.sums(logits, labels, **options)
    stats = RowStats(*_vectors(logits, len(RowStats._fields)))
    record.finish(made, labels, logits.shape[1], stats, flags)
    deferred.send(logits.device)
    return [*stats[:4], stats.slope, stats.rest, stats.share]


@_op.register_fake
def _(logits: Tensor, *_: Any) -> list[Tensor]:
    return _vectors(logits, 7)


@custom_op("lolkernels::logprob_gradient_v3", mutates_args=())
def _gradient(
    abc: Sequence[Tensor],  # each (N,)
    lse: Tensor,
    logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    scaling: Sequence[float],
    backend: str,
) -> Tensor:  # (N, V) in the logits' dtype
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    options = Scaling(*scaling)._asdict()
    dlogits_ = backends.TABLE[backend].dlogits_
    return dlogits_(logits, labels, lse, *abc, **options, out=out, logps=logps)


@_gradient.register_fake
def _(abc: Any, lse: Tensor, logps: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@custom_op("lolkernels::logprob_gradient_v3_", mutates_args=("exps",))
def _gradient_(
    exps: Tensor,  # (N, V), overwritten by the gradient
    labels: Tensor,  # (N,)
    factor: Tensor,  # (N,)
    own: Tensor,  # (N,) the gradient at the label
) -> None:
    exps.mul_(factor[:, None])
    columns = labels.clamp(0, exps.shape[1] - 1)[:, None]  # a bad label has a row of nan
    exps.scatter_(1, columns, own[:, None].to(exps.dtype))


@_gradient_.register_fake
def _(*_: Any) -> None:
    return None


_gradient.register_autograd(no_second_derivative)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    logits, labels, _, sums, *ctx.options = inputs
    logps, lse, entropy, _, slope, rest, share = output
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.taken = bool(sums)
    ctx.num_sums = len(sums)
    ctx.save_for_backward(logits, labels, logps, lse, entropy, slope, rest, share)


def _backward(ctx: Any, upstream: Sequence[Tensor | None]) -> tuple[Any, ...]:
    logits, labels, logps, lse, entropy, slope, rest, share = ctx.saved_tensors
    names, nothing = ("logps", "lse", "entropy"), (None, None, [None] * ctx.num_sums, None, None)
    given = {
        name: g.to(lse.dtype) for name, g in zip(names, upstream, strict=False) if g is not None
    }
    if not given:
        return None, *nothing
    coef = Coefficients.of(lse, entropy, given)
    if not ctx.taken:
        abc = [coef.a, coef.b, torch.zeros_like(lse) if coef.c is None else coef.c]
        return _gradient(abc, lse, logps, logits, labels, *ctx.options), *nothing
    if torch.is_grad_enabled():
        no_second_derivative()
    if coef.c is not None:
        raise NotImplementedError(
            "the entropy has no gradient with inplace=True, which keeps exponentials instead of "
            "logits: pass inplace=False"
        )
    stats = RowStats(logps, lse, entropy, lse, lse, slope, rest, share)
    own = logits.detach()
    _gradient_(own, labels, coef.b * share, at_label(coef.a, coef.both, stats))
    return own, *nothing


_op.register_autograd(_backward, setup_context=_setup)
