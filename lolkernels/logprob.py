"""``linear_logprob``: argument errors, then one op with its schema, fake and autograd.

The op takes packed rows, tensors and plain numbers; it never writes into its inputs. Its name has a
version, which every change of what autograd records raises: torch's compile cache does not look
into a custom op, and would run an old backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.library import custom_op

from . import backends, checks, deferred, memory
from .backends.contract import Backend, RowStats
from .gemm import HALF, accumulation_dtype, ieee_fp32, operand_dtype
from .walk import Coefficients, Grads, Scaling, Walk, takes_panels
from .walk_cpu import PanelWalk
from .walk_gpu import RowWalk

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
) -> LogprobOutput:
    """Per-token log-probs of ``labels`` from the final hidden states, without holding the logits.

    z = softcap(logit_scale (hidden W^T + bias)) / temperature, with softcap(x) = cap tanh(x / cap);
    logps = z[label] - lse, lse = log sum exp z, entropy = lse - sum softmax(z) z.

    Logits are formed and reduced in float32 whatever the inputs' dtype (float64 for float64).
    ``logps``, ``lse`` and ``entropy`` are differentiable with respect to hidden, weight and bias,
    once. Forward and backward together take two GEMMs of 2 N V D flops for any loss of ``logps``
    and ``lse`` where the head is frozen, and three where it is trained. For the rows that
    ``memory_budget`` does not hold a fourth makes the logits again, and so does the gradient of
    ``entropy`` for all rows, unless it is announced.

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

    Raises:
        ValueError, TypeError: name the argument and what to change; nothing has been computed then.
            A label outside [0, V) on a GPU is found without waiting: its row is nan, and the next
            call raises (see ``check_errors``).
        NotImplementedError: a second derivative, or forward-mode differentiation.
    """
    checks.head(hidden, weight, bias, labels)
    scaling = checks.scaling(temperature, softcap, logit_scale)
    memory_budget = checks.budget(memory_budget)
    checks.flag("entropy_grad", entropy_grad)
    checks.no_forward_mode(hidden=hidden, weight=weight, bias=bias)
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
    grad = torch.is_grad_enabled()
    table = weight.requires_grad or (bias is not None and bias.requires_grad)
    out = _op(
        rows,
        weight,
        ids,
        bias,
        scaling,
        name,
        memory_budget,
        operand(rows, weight, name),
        [grad and hidden.requires_grad, grad and table, grad and entropy_grad],
    )
    if picked is not None:
        zeros = rows.new_zeros(kept.shape, dtype=out[0].dtype)
        out = [zeros.index_copy(0, picked, t) for t in out[:4]]
    elif not look:
        out = [t.masked_fill(left_out, 0) for t in out[:4]]
    return LogprobOutput(*(t.view(labels.shape) for t in out[:4]))


def operand(hidden: Tensor, weight: Tensor, backend: str) -> torch.dtype:
    """The dtype of a call's products' operands: see :func:`lolkernels.gemm.operand_dtype`."""
    panels = hidden.device.type == "cpu" and backends.TABLE[backend].panels
    return operand_dtype(hidden, weight, panels=panels)


def make_walk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scaling: Sequence[float],
    backend: str,
    operand: torch.dtype,
    memory_budget: int | None,
    flags: Tensor | None = None,
) -> Walk:
    record: Backend = backends.TABLE[backend]
    kind = PanelWalk if takes_panels(hidden, weight, record, operand) else RowWalk
    return kind(
        hidden, weight, bias, labels, Scaling(*scaling), record, operand, memory_budget, flags
    )


def new_kept(hidden: Tensor, rows: int, vocab: int, dtype: torch.dtype, backend: str) -> Tensor:
    """Room for the exponentials of ``rows``; whole rows start at multiples of 16 elements."""
    panels = hidden.device.type == "cpu" and backends.TABLE[backend].panels
    return hidden.new_empty(rows, vocab if panels else memory.padded(vocab), dtype=dtype)


def rows_to_keep(
    n: int,
    hidden: Tensor,
    weight: Tensor,
    operand: torch.dtype,
    memory_budget: int | None,
    hold: bool,
    longest: int | None = None,
) -> tuple[int, torch.dtype]:
    """How many of the first rows are kept for dweight, and in which dtype."""
    wide = accumulation_dtype(hidden, weight)
    dtype = wide if hold or operand not in HALF else operand
    vocab, size = weight.shape
    held = memory.kept_rows(vocab, size, dtype.itemsize, memory_budget, hidden.device, longest)
    return min(n, held), dtype


@custom_op("lolkernels::linear_logprob_v2", mutates_args=())
def _op(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    scaling: Sequence[float],  # scale, softcap, temperature
    backend: str,
    memory_budget: int | None,
    operand: torch.dtype,
    need: Sequence[bool],  # the gradient of hidden, of the head, of the entropy too
) -> list[Tensor]:
    """[logps, lse, entropy, max_logit, slope, rest, share: (N,), unit (N, D), kept (k, V')].

    ``unit`` is d logp / d hidden and ``kept`` the exponentials (with need[2] the logits) of the
    first rows; each is empty where it is not needed.
    """
    deferred.raise_noted(hidden.device)
    flags = deferred.label_flags(labels, weight.shape[0])
    n, vocab = labels.shape[0], weight.shape[0]
    walk = make_walk(hidden, weight, bias, labels, scaling, backend, operand, memory_budget, flags)
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
    scaling: Sequence[float],
    backend: str,
    memory_budget: int | None,
    operand: torch.dtype,
    need: Sequence[bool],
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


@custom_op("lolkernels::linear_gradients_v2", mutates_args=())
def gradients_op(
    coef: Sequence[Tensor],  # a, b: (N,)
    both: Tensor | None,  # (N,) a + b; None: zero
    c: Tensor | None,  # (N,); None: zero
    stats: Sequence[Tensor],  # logps, lse, slope, rest, share: (N,)
    kept: Tensor,  # (k, V')
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    scaling: Sequence[float],
    backend: str,
    memory_budget: int | None,
    operand: torch.dtype,
    hold: bool,  # ``kept`` holds logits
    need: Sequence[bool],  # dhidden, dweight, dbias
) -> list[Tensor]:
    """[dhidden, dweight, dbias], empty where not needed. dhidden takes the logits once more."""
    (n, d), vocab = hidden.shape, weight.shape[0]
    walk = make_walk(hidden, weight, bias, labels, scaling, backend, operand, memory_budget)
    k = kept.shape[0] if c is None or hold else 0  # exponentials do not make entropy's gradient
    # Where one product makes the whole of dweight it is rounded as it leaves the accumulators. The
    # range of fp16 is too small for sums that are still in units.
    whole = isinstance(walk, PanelWalk) or (k == n and not hold and operand != torch.float16)
    dtype = weight.dtype if whole else walk.dtype
    grads = Grads(
        weight.new_empty(weight.shape, dtype=dtype) if need[1] else None,
        walk.empty(vocab) if need[2] else None,
    )
    dh = walk.empty(n if need[0] else 0, d)
    logps, lse, slope, rest, share = stats
    row_stats = RowStats(logps, lse, lse, lse, lse, slope, rest, share)
    with ieee_fp32():
        walk.gradients(
            row_stats,
            Coefficients(coef[0], coef[1], c, both),
            grads,
            kept[:k, :vocab] if k else None,
            dh if need[0] else None,
            hold=hold,
        )
    grads.finish()
    return [
        dh.to(hidden.dtype),
        weight.new_empty(0, d) if grads.weight is None else grads.weight.to(weight.dtype),
        weight.new_empty(0) if grads.bias is None or bias is None else grads.bias.to(bias.dtype),
    ]


@gradients_op.register_fake
def _(*args: Any) -> list[Tensor]:
    hidden, weight, bias, need = args[5], args[6], args[8], args[-1]
    return [
        hidden.new_empty(hidden.shape[0] if need[0] else 0, hidden.shape[1]),
        weight.new_empty(weight.shape[0] if need[1] else 0, weight.shape[1]),
        (weight if bias is None else bias).new_empty(weight.shape[0] if need[2] else 0),
    ]


def no_second_derivative(*_: Any) -> NoReturn:
    raise NotImplementedError("lolkernels ops have no second derivative (create_graph=True)")


gradients_op.register_autograd(no_second_derivative)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, weight, labels, bias, *options, need = inputs
    logps, lse, entropy, _, slope, rest, share, unit, kept = output
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        hidden, weight, labels, bias, logps, lse, entropy, slope, rest, share, unit, kept
    )
    ctx.options, ctx.need = options, need


def _backward(ctx: Any, upstream: Sequence[Tensor | None]) -> tuple[Any, ...]:
    names = ("logps", "lse", "entropy")
    given = {name: g for name, g in zip(names, upstream, strict=False) if g is not None}
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    nothing = (None,) * 5
    if not given or not any(needs):
        return None, None, None, None, *nothing
    hidden, weight, labels, bias, *stats, unit, kept = ctx.saved_tensors
    logps, lse, entropy, slope, rest, share = stats
    coef = Coefficients.of(lse, entropy, {k: g.to(lse.dtype) for k, g in given.items()})
    again = coef.c is not None or ctx.need[2]  # there is no unit, or it does not do
    dhidden = dweight = dbias = None
    if needs[0] and not again:
        dhidden = unit * (coef.a if coef.both is None else -coef.b)[:, None]
        if coef.both is not None:
            rows = weight.index_select(0, labels.clamp(0, weight.shape[0] - 1))
            rows = rows.to(ctx.options[-1])  # as they were multiplied
            dhidden = dhidden + rows.to(unit.dtype) * (coef.both * slope)[:, None]
        dhidden = dhidden.to(hidden.dtype)
    wanted = [needs[0] and again, needs[1], needs[2]]
    if any(wanted):
        made = gradients_op(
            [coef.a, coef.b],
            coef.both,
            coef.c,
            [logps, lse, slope, rest, share],
            kept,
            hidden,
            weight,
            labels,
            bias,
            *ctx.options,
            ctx.need[2],
            wanted,
        )
        dhidden = made[0] if wanted[0] else dhidden
        dweight, dbias = (g if w else None for g, w in zip(made[1:], wanted[1:], strict=True))
    return dhidden, dweight, None, dbias, *nothing


_op.register_autograd(_backward, setup_context=_setup)
