"""The public functions: argument errors first, then one op."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, checks, loss_op, objectives, ops
from .chunked import accumulation_dtype
from .objectives import Objective
from .sequences import Sequences

IGNORED = -100


class LogprobOutput(NamedTuple):
    """Per-token statistics in nats, of the labels' shape, float32 (float64 for float64 input)."""

    logps: Tensor  # log softmax(z)[label]
    lse: Tensor  # log sum_v exp z_v
    entropy: Tensor  # -sum_v p_v log p_v
    max_logit: Tensor  # max_v z_v, not differentiable


class LinearLossOutput(NamedTuple):
    """A loss with what it was made of. Only ``loss`` is differentiable."""

    loss: Tensor  # ()
    seq_loss: Tensor  # (S,) unreduced (one a group)
    logps: Tensor  # (N,) nan at the tokens of skipped sequences, as in the next three
    lse: Tensor  # (N,)
    entropy: Tensor  # (N,)
    max_logit: Tensor  # (N,)


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
    backend: str | None = None,
    memory_budget: int | None = None,
) -> LogprobOutput:
    """Per-token log-probs of ``labels`` from the final hidden states, without holding the logits.

    z = softcap(logit_scale (hidden W^T + bias)) / temperature, with softcap(x) = cap tanh(x / cap);
    logps = z[label] - lse, lse = log sum exp z, entropy = lse - sum softmax(z) z.

    Logits are formed and reduced in float32 whatever the inputs' dtype (float64 for float64).
    ``logps``, ``lse`` and ``entropy`` are differentiable with respect to hidden, weight and bias.
    Forward: one GEMM of 2 N V D flops; backward: three (two where hidden or weight is frozen).

    Args:
        hidden: float32, bfloat16, float16 or float64; any strides.
        weight: the head's weight; its dtype may differ from hidden's (float64 does not mix).
        labels: int64 token ids in [0, V). Rows labelled -100 are left out.
        bias: of the head.
        mask: bool, False rows are left out: their outputs and gradients are 0, whatever they held.
        On a CPU they enter no GEMM; on a GPU, where their number is not known without waiting for
        it, they do, as zeros: select the rows first where they are many.
        temperature, softcap, logit_scale: see the formula; finite and > 0. ``softcap=None``: none.
        backend: a name of ``available_backends()``; None picks by device and dtype.
        memory_budget: bytes of logits held at a time; None: 48 MiB (on a GPU a 64th of its memory,
        256 MiB to 2 GiB), or 256 full rows where that is more.

    Raises:
        ValueError, TypeError: name the argument and what to change; nothing has been computed then.
        A label outside [0, V) on a GPU is found without waiting: its row is nan, and the next call
        raises (see ``check_errors``).
    """
    checks.head(hidden, weight, bias, labels)
    scale, cap, temperature = checks.scaling(temperature, softcap, logit_scale)
    memory_budget = checks.budget(memory_budget)
    name = backends.pick(backend, hidden.device, accumulation_dtype(hidden, weight))
    keep = labels != IGNORED
    if mask is not None:
        keep = keep & checks.token_mask(mask, labels)
    out = ops.linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1).long(),
        bias,
        keep.reshape(-1),
        scale,
        cap,
        temperature,
        name,
        memory_budget,
    )
    return LogprobOutput(*(t.view(labels.shape) for t in out))


def logprob(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
    inplace_backward: bool = False,
) -> LogprobOutput:
    """The statistics of :func:`linear_logprob` from logits that are already there.

    Reads the logits once, and once more in the backward, which allocates one gradient of their
    size. z = softcap(logit_scale * logits) / temperature.

    Args:
        logits: float32, bfloat16, float16 or float64; any strides.
        labels: int64 token ids in [0, V); there is no ignored label: select the rows first.
        inplace_backward: the backward writes the gradient over ``logits`` and allocates nothing.
        Whoever needs the logits after that meets autograd's error, as does a second backward.

    Raises:
        ValueError, TypeError: name the argument and what to change.
    """
    checks.floating("logits", logits)
    if logits.dim() < 2 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must have shape (N, V) or (..., V), V > 0; got {tuple(logits.shape)}"
        )
    checks.label_ids("labels", labels, logits.shape[:-1], "logits' leading dimensions")
    checks.same_device(logits=logits, labels=labels)
    scale, cap, temperature = checks.scaling(temperature, softcap, logit_scale)
    if not isinstance(inplace_backward, bool):
        raise TypeError(f"inplace_backward must be a bool, got {inplace_backward!r}")
    name = backends.pick(backend, logits.device, logits.dtype)
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    if inplace_backward and any(
        step == 0 and size > 1 for step, size in zip(rows.stride(), rows.shape, strict=True)
    ):
        raise ValueError(
            "inplace_backward needs logits of their own memory, but these are expanded; pass "
            "logits.contiguous() or inplace_backward=False"
        )
    out = ops.logprob(
        rows, labels.reshape(-1).long(), scale, cap, temperature, name, inplace_backward
    )
    return LogprobOutput(*(t.view(labels.shape) for t in out))


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
    return_outputs: bool = False,
    **side: Any,
) -> Any:
    """A loss on the log-probs of whole sequences, with its gradients, in 3 GEMMs (frozen head: 2).

    Equals ``aggregate(objective(linear_logprob(hidden, weight, labels).logps, ..., seq), seq,
    reduction)`` and its gradients with respect to hidden, weight and bias, for log-probs defined
    there. Groups of sequences are packed into chunks of rows; per chunk the logits are made once,
    the objective gives the coefficient d loss / d logp, and the gradients follow at once. Backward
    scales them by the upstream scalar (a second backward makes them again). Sequences whose
    coefficient is zero whatever their log-probs (advantage <= 0 in ``a_lol``) enter no GEMM.

    Args:
        objective: one of ``lolkernels.objectives`` or any callable ``(logps, ..., seq, ...)`` that
        returns
            ``(S,)`` unreduced losses, each a function of its own sequence (group) only.
        hidden: float32, bfloat16, float16 or float64; any strides. Packed rows, one a token of
        ``seq``; or
            ``(B, T, D)`` with ``seq = Sequences.from_mask(mask)``: masked ones are dropped first.
        weight, labels, bias, temperature, softcap, logit_scale, backend: as in
        :func:`linear_logprob`,
            but a label outside [0, V) is always an error: leave the token out of the mask.
        seq: which rows form a sequence, and the denominators of the reduction.
        reduction: "seq-mean", "token-mean", "seq-mean-token-mean" or "sum" (see ``aggregate``).
        memory_budget: bytes of logits held at a time. None: 48 MiB (on a GPU a 64th of its memory,
        256 MiB to 2 GiB), or 256 full rows where that is more.
            ``lolkernels.planner.extra_bytes`` states the whole extra memory.
        return_outputs: return a :class:`LinearLossOutput` instead of the scalar.
        **side: the objective's inputs (``side_inputs(objective)``): per-token tensors ``(N,)`` (or
            ``(B, T)``), per-sequence tensors ``(S,)``, and options. They get no gradient. With the
            rest on a GPU per-sequence tensors may stay on the CPU: then sequences of weight zero
            are skipped there too, which otherwise would mean to wait for the GPU.

    Raises:
        ValueError, TypeError: name the argument and what to change; nothing has been computed then.
        Bad labels and nan inputs on a GPU are found without waiting: the loss is nan, and the next
        call raises (see ``check_errors``).
    """
    needed = dict(_described(objective))
    if not isinstance(seq, Sequences):
        raise TypeError(f"seq must be a Sequences, got {type(seq).__name__}")
    if reduction not in objectives.REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {', '.join(objectives.REDUCTIONS)}; got {reduction!r}"
        )
    checks.head(hidden, weight, bias, labels)
    if hidden.dim() == 3:
        hidden, labels = seq.pack(hidden), seq.pack(labels)
    if hidden.dim() != 2 or hidden.shape[0] != seq.num_tokens:
        raise ValueError(
            f"hidden must have one row a token of seq, {seq.num_tokens}; got "
            f"{tuple(hidden.shape)}. "
            "Pass hidden[mask], labels[mask], or (B, T, D) with seq = Sequences.from_mask(mask)"
        )
    if seq.device != hidden.device:
        raise ValueError(f"seq is on {seq.device} but hidden is on {hidden.device}: seq.to(device)")
    scale, cap, temperature = checks.scaling(temperature, softcap, logit_scale)
    memory_budget = checks.budget(memory_budget)
    dtype = accumulation_dtype(hidden, weight)
    name = backends.pick(backend, hidden.device, dtype)
    spec, tensors, options = _side_tensors(needed, side, seq, hidden.device, dtype)
    handle = _bound(objective, options)
    grad = torch.is_grad_enabled()
    out = loss_op.linear_loss(
        hidden,
        weight,
        labels.long(),
        bias,
        seq.cu_seqlens,
        seq.lengths,
        seq.token_to_sequence,
        tensors,
        spec,
        handle,
        reduction,
        seq.group_size,
        seq.totals,
        scale,
        cap,
        temperature,
        name,
        memory_budget,
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
    )
    return LinearLossOutput(*out[:6]) if return_outputs else out[0]


def _described(objective: Objective) -> tuple[tuple[str, str], ...]:
    return tuple(objectives.side_inputs(objective).items())


def _bound(objective: Objective, options: tuple[tuple[str, Any], ...]) -> int:
    options = tuple({**objectives.defaults(objective), **dict(options)}.items())
    return loss_op.bind(objective, options)


def _side_tensors(
    needed: dict[str, str],
    side: dict[str, Any],
    seq: Sequences,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[str, list[Tensor], tuple[tuple[str, Any], ...]]:
    """The side inputs as ("name:kind,...", tensors, options), or an error naming the wrong one."""
    for name in side:
        if name not in needed:
            raise TypeError(
                f"{name} is not an input of this objective; it takes {', '.join(needed) or 'none'}"
            )
    spec, tensors, options = [], [], []
    for name, kind in needed.items():
        if name not in side:
            if kind == "option":
                continue
            raise TypeError(f"{name} is missing: the objective needs it ({kind} input)")
        value = side[name]
        if kind == "option" and not isinstance(value, Tensor):
            options.append((name, value))
            continue
        kind, value = _side_tensor(name, kind, value, seq)
        on_host = kind == "sequence" and value.device.type == "cpu"
        if value.device != device and not on_host:
            raise ValueError(f"{name} is on {value.device} but hidden is on {device}; move it")
        spec.append(f"{name}:{kind}")
        tensors.append(value.to(dtype))
    return ",".join(spec), tensors, tuple(options)


def _side_tensor(name: str, kind: str, value: Any, seq: Sequences) -> tuple[str, Tensor]:
    checks.tensor(name, value)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be a real tensor, got {value.dtype}")
    if value.requires_grad:
        raise ValueError(f"{name} requires grad, but side inputs get none; pass {name}.detach()")
    if value.dim() == 2 and seq.mask_shape is not None and kind in ("token", "tensor"):
        return "token", seq.pack(value)
    n, s = seq.num_tokens, seq.num_sequences
    if kind in ("tensor", "option"):
        if value.dim() == 0:
            return "whole", value
        if n == s and value.shape == (n,) and bool((seq.cu_seqlens.diff() != 1).any()):
            raise ValueError(
                f"{name} of shape ({n},) may be per token or per sequence: annotate the "
                "objective's parameter with lolkernels.objectives.PerToken or PerSequence"
            )
        kind = "token" if value.shape == (n,) else "sequence"
    expected = (n,) if kind == "token" else (s,)
    if value.shape != expected:
        raise ValueError(
            f"{name} must have shape {expected}, one value a {kind}; got {tuple(value.shape)}"
        )
    return kind, value


# Both read signatures, which torch.compile cannot trace: what torch.compiler.assume_constant_result
# sets, without its import of the whole compiler.
_described._dynamo_marked_constant = True  # type: ignore[attr-defined]
_bound._dynamo_marked_constant = True  # type: ignore[attr-defined]
