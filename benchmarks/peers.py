"""The contestants: lolkernels, eager PyTorch, torch's own fused op, and the bare GEMMs.

A contestant is built from inputs outside the clock and then called: one call is one forward and
backward (one forward for scoring). Each builder names the GEMMs that its mathematics needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from shapes import CLIP, Inputs, Result, make_logits
from torch import Tensor

import lolkernels as lk

Call = Callable[[], Result]
OPS = ("linear_loss", "linear_logprob", "score", "logprob")


def _gradients(inputs: Inputs) -> tuple[Tensor | None, Tensor | None]:
    """Takes the gradients off the leaves, so that no call accumulates into the last one's."""
    found = inputs.hidden.grad, inputs.weight.grad
    inputs.hidden.grad = inputs.weight.grad = None
    return found


def _rows(inputs: Inputs) -> Tensor | None:
    return None if bool(inputs.mask.all()) else inputs.mask.view(-1)


def _select(inputs: Inputs, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows that carry loss; the copy is part of the measured call where rows are left out."""
    if rows is None:
        return inputs.hidden, inputs.labels
    return inputs.hidden[rows], inputs.labels[rows]


def build_lolkernels(op: str, inputs: Inputs, *, backend: str | None = None) -> Call:
    seq, rows = lk.Sequences.from_mask(inputs.mask), _rows(inputs)

    def linear_loss() -> Result:
        hidden, labels = _select(inputs, rows)
        out = lk.linear_loss(
            lk.objectives.a_lol,
            hidden,
            inputs.weight,
            labels,
            seq,
            ref_logps=inputs.ref_logps,
            advantages=inputs.advantages,
            clip=CLIP,
            backend=backend,
            return_outputs=True,
        )
        out.loss.backward()
        return Result(out.logps, *_gradients(inputs))

    def linear_logprob() -> Result:
        hidden, labels = _select(inputs, rows)
        out = lk.linear_logprob(hidden, inputs.weight, labels, backend=backend)
        out.logps.backward(inputs.upstream)
        return Result(out.logps.detach(), *_gradients(inputs))

    def score() -> Result:
        with torch.no_grad():
            hidden, labels = _select(inputs, rows)
            return Result(lk.linear_logprob(hidden, inputs.weight, labels, backend=backend).logps)

    return {"linear_loss": linear_loss, "linear_logprob": linear_logprob, "score": score}[op]


def token_logps_eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What a careful hand-written loop does: logits, fp32, cross entropy without reduction."""
    return -F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")


def token_logps_torch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    loss = F.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options)
    return -loss.float()


def _build_from_logps(
    op: str, inputs: Inputs, token_logps: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Call:
    """A-LoL, or a given upstream gradient, on top of any per-token log-prob, in plain torch."""
    rows = _rows(inputs)
    sequences = inputs.mask.shape[0]
    owner = torch.arange(sequences).repeat_interleave(inputs.mask.sum(1))
    low, high = math.log1p(-CLIP), math.log1p(CLIP)

    def linear_loss() -> Result:
        hidden, labels = _select(inputs, rows)
        logps = token_logps(hidden, inputs.weight, labels)
        total = torch.zeros(sequences).index_add(0, owner, logps)
        drift = torch.zeros(sequences).index_add(0, owner, logps.detach() - inputs.ref_logps)
        ratio = drift.clamp(low, high).exp()
        (-(inputs.advantages * ratio * total).sum() / sequences).backward()
        return Result(logps.detach(), *_gradients(inputs))

    def linear_logprob() -> Result:
        hidden, labels = _select(inputs, rows)
        logps = token_logps(hidden, inputs.weight, labels)
        logps.backward(inputs.upstream)
        return Result(logps.detach(), *_gradients(inputs))

    def score() -> Result:
        with torch.no_grad():
            hidden, labels = _select(inputs, rows)
            return Result(token_logps(hidden, inputs.weight, labels))

    return {"linear_loss": linear_loss, "linear_logprob": linear_logprob, "score": score}[op]


def build_eager(op: str, inputs: Inputs) -> Call:
    return _build_from_logps(op, inputs, token_logps_eager)


def build_torch(op: str, inputs: Inputs) -> Call:
    return _build_from_logps(op, inputs, token_logps_torch)


def gemm_count(op: str, inputs: Inputs) -> int:
    """GEMMs of 2 N V D flops that the op cannot do without."""
    if op == "score":
        return 1
    trainable = inputs.weight.requires_grad
    return {"linear_loss": 2, "linear_logprob": 3}[op] + trainable


def build_gemms(op: str, inputs: Inputs) -> Call:
    """The floor: those GEMMs, fp32, into buffers made outside the clock, and nothing else.

    fp32 for every dtype: the log-prob is defined from fp32 logits, and a CPU has no GEMM that takes
    bf16 and gives fp32.
    """
    rows = _rows(inputs)
    hidden = inputs.hidden.detach() if rows is None else inputs.hidden.detach()[rows]
    hidden, weight = hidden.float(), inputs.weight.detach().float()
    logits = torch.ones(hidden.shape[0], weight.shape[0])
    dhidden, dweight = torch.ones_like(hidden), torch.ones_like(weight)
    forwards = {"score": 1, "linear_loss": 1, "linear_logprob": 2}[op]
    trainable = inputs.weight.requires_grad

    def run() -> Result:
        for _ in range(forwards):
            torch.mm(hidden, weight.T, out=logits)
        if op != "score":
            torch.mm(logits, weight, out=dhidden)
            if trainable:
                torch.mm(logits.T, hidden, out=dweight)
        return Result(None)

    return run


def build_logits_op(name: str, inputs: Inputs) -> Call:
    """`logprob` on logits that are already there: ours, eager, or one copy of the logits."""
    logits = make_logits(inputs).requires_grad_()
    out = torch.empty_like(logits)

    def run() -> Result:
        if name == "copy":
            out.copy_(logits.detach())
            return Result(None)
        if name == "lolkernels":
            logps = lk.logprob(logits, inputs.labels).logps
        else:
            logps = -F.cross_entropy(logits.float(), inputs.labels, reduction="none")
        logps.backward(inputs.upstream)
        gradient, logits.grad = logits.grad, None
        return Result(logps.detach(), gradient)

    return run


def build(contestant: str, op: str, inputs: Inputs) -> Call:
    """Builds one contestant: lolkernels, reference, eager, torch, gemms, or copy for `logprob`."""
    if op == "logprob":
        return build_logits_op(contestant, inputs)
    if contestant == "reference":
        return build_lolkernels(op, inputs, backend="reference")
    builders: dict[str, Callable[[str, Inputs], Call]] = {
        "lolkernels": build_lolkernels,
        "eager": build_eager,
        "torch": build_torch,
        "gemms": build_gemms,
    }
    return builders[contestant](op, inputs)
