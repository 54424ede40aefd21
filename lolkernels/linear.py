"""What the ops on hidden states share: how a walk is made, and the head's gradients.

The gradients are ops of their own, which a backward calls. Names of ops have a version, which every
change of what autograd records raises: torch's compile cache does not look into a custom op, and
would run an old backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import custom_op

from . import backends, checks, memory
from .backends.contract import Backend, RowStats
from .gemm import HALF, accumulation_dtype, ieee_fp32, operand_dtype
from .walk import Coefficients, Grads, Scaling, Walk, takes_panels
from .walk_cpu import PanelWalk
from .walk_gpu import RowWalk


def with_low_rank(
    hidden: Tensor, weight: Tensor, low_rank: Any, into: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden with low's columns beside its own (..., D + r), weight, and up; or up in weight."""
    if low_rank is None:
        return hidden, weight, None
    low, up = checks.low_rank(low_rank, hidden, weight)
    if into is not None:
        raise ValueError(
            "accumulate_into takes the gradient of weight alone: leave it or low_rank out"
        )
    hidden = torch.cat([hidden, low], -1)
    if weight.requires_grad and torch.is_grad_enabled():
        return hidden, torch.cat([weight, up], 1), None
    return hidden, weight, up


def operand(hidden: Tensor, weight: Tensor, backend: str) -> torch.dtype:
    """The dtype of a call's products' operands: see :func:`lolkernels.gemm.operand_dtype`."""
    panels = hidden.device.type == "cpu" and backends.TABLE[backend].panels
    return operand_dtype(hidden, weight, panels=panels)


def make_walk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
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
        hidden, weight, bias, up, labels, Scaling(*scaling), record, operand, memory_budget, flags
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


def _gradients(
    into: Tensor | None,  # (V, D): dweight is added to it, and comes back empty
    coef: Sequence[Tensor],  # a, b: (N,)
    both: Tensor | None,  # (N,) a + b; None: zero
    c: Tensor | None,  # (N,); None: zero
    stats: Sequence[Tensor],  # logps, lse, slope, rest, share: (N,)
    kept: Tensor,  # (k, V')
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    scaling: Sequence[float],
    backend: str,
    memory_budget: int | None,
    operand: torch.dtype,
    hold: bool,  # ``kept`` holds logits
    need: Sequence[bool],  # dhidden, dweight, dbias
) -> list[Tensor]:
    """[dhidden, dweight (with up: dup), dbias], empty where not needed.

    dhidden takes the logits once more.
    """
    (n, d), vocab = hidden.shape, weight.shape[0]
    trained = weight if up is None else up
    walk = make_walk(hidden, weight, bias, up, labels, scaling, backend, operand, memory_budget)
    k = kept.shape[0] if c is None or hold else 0  # exponentials do not make entropy's gradient
    # Where one product makes the whole of dweight it is rounded as it leaves the accumulators. The
    # range of fp16 is too small for sums that are still in units.
    panels, units = isinstance(walk, PanelWalk), operand == torch.float16
    whole = panels or (k == n and not hold and not units)
    dtype = trained.dtype if whole else walk.dtype
    direct = into is not None and (whole or (into.dtype == walk.dtype and not units))
    grads = Grads(
        into if direct else trained.new_empty(trained.shape, dtype=dtype) if need[1] else None,
        (walk.empty(vocab).zero_() if direct else walk.empty(vocab)) if need[2] else None,
        written=direct,
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
    dweight = grads.weight
    if into is not None:
        if dweight is not None and not direct:
            into.add_(dweight)
        dweight = None
    return [
        dh.to(hidden.dtype),
        trained.new_empty(0, trained.shape[1]) if dweight is None else dweight.to(trained.dtype),
        weight.new_empty(0) if grads.bias is None or bias is None else grads.bias.to(bias.dtype),
    ]


_schema = torch.library.infer_schema(_gradients, mutates_args=())
gradients_op = custom_op(
    "lolkernels::linear_gradients_v3",
    lambda *args: _gradients(None, *args),
    mutates_args=(),
    schema=_schema.replace("Tensor? into, ", ""),
)


def _add_gradients(*args: Any) -> tuple[Tensor, Tensor]:
    dhidden, _, dbias = _gradients(*args)
    return dhidden, dbias


add_gradients_op = custom_op(
    "lolkernels::linear_add_gradients_v4",
    _add_gradients,
    mutates_args=("into",),
    schema=_schema.replace("Tensor? into", "Tensor(a!) into").replace(
        "-> Tensor[]", "-> (Tensor, Tensor)"
    ),
)


@gradients_op.register_fake
def _fake_gradients(*args: Any) -> list[Tensor]:
    hidden, weight, bias, up, need = args[5], args[6], args[8], args[9], args[-1]
    trained = weight if up is None else up
    return [
        hidden.new_empty(hidden.shape[0] if need[0] else 0, hidden.shape[1]),
        trained.new_empty(weight.shape[0] if need[1] else 0, trained.shape[1]),
        (weight if bias is None else bias).new_empty(weight.shape[0] if need[2] else 0),
    ]


@add_gradients_op.register_fake
def _(_: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dhidden, _, dbias = _fake_gradients(*args)
    return dhidden, dbias


def wanted(ctx: Any, inputs: Sequence[Tensor | None], upstream: Tensor) -> tuple[bool, ...]:
    """Whether the running backward goes on to hidden, to weight (or up) and to bias.

    ``autograd.grad`` and ``backward(inputs=)`` name some: a pipeline asks for the gradient of
    hidden first and for that of the head later. A tracer has no graph task to ask: then it is
    whether they need a gradient. ``inputs`` are the op's: hidden, weight, labels, bias, up.
    """
    needed = [*ctx.needs_input_grad[: len(inputs)]]
    if type(upstream) is Tensor:
        edges = iter(ctx.next_functions)
        nodes = [None if t is None else next(edges)[0] for t in inputs]
        needed = [need and _goes_on(node) for need, node in zip(needed, nodes, strict=True)]
    hidden, weight, _, bias, up = needed
    return hidden, weight if inputs[-1] is None else up, bias


def _goes_on(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # the engine's word on a leaf that autograd.grad asks for
        return True


def head_gradients(ctx: Any, *args: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dhidden, dweight, dbias as ``gradients_op`` has them, None where not needed.

    With ``ctx.into`` dweight goes there, where this backward would have added to ``weight.grad``.
    """
    need = [*args[-1]]
    if ctx.into is not None and need[1]:
        if type(args[4]) is Tensor:
            _refuse_capture(ctx.next_functions[1][0])
        if torch.is_grad_enabled():  # what is written carries no graph
            no_second_derivative()
        dhidden, dbias = add_gradients_op(ctx.into, *args)
        return dhidden if need[0] else None, None, dbias if need[2] else None
    made = gradients_op(*args)
    dhidden, dweight, dbias = (g if w else None for g, w in zip(made, need, strict=True))
    return dhidden, dweight, dbias


def _refuse_capture(node: Any) -> None:
    """A gradient that goes into a buffer cannot be handed over."""
    try:
        torch._C._will_engine_execute_node(node)
    except RuntimeError as error:
        raise RuntimeError(
            "autograd.grad asks for the gradient of weight, which accumulate_into takes: call "
            "backward(), or leave accumulate_into out"
        ) from error


def no_second_derivative(*_: Any) -> NoReturn:
    raise NotImplementedError("lolkernels ops have no second derivative (create_graph=True)")


gradients_op.register_autograd(no_second_derivative)
