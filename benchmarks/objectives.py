"""Losses of other people's fused layers, where these give one scalar and no log-prob of a token.

Liger's chunked DPO and GRPO against the same loss through `lolkernels.linear_loss` (a user's own
function) and through eager logits. Separate cases, never mixed with A-LoL's rows.
"""

from __future__ import annotations

import importlib
from typing import Any

import peers
import torch
import torch.nn.functional as F  # noqa: N812
from peers import Call, UnavailableError
from shapes import Inputs
from torch import Tensor
from truth import BETA, EPSILON, Result

import lolkernels as lk
from lolkernels.objectives import PerSequence, PerToken

OPS = ("dpo", "grpo")
CONTESTANTS = ("lolkernels", "eager", "liger chunked")


def dpo(logps: PerToken, seq: lk.Sequences) -> Tensor:
    """Without a reference, over pairs 2i (chosen), 2i + 1 (rejected): -log sigmoid(beta margin)."""
    chosen, rejected = seq.sum(logps).view(-1, 2).unbind(1)
    return -F.logsigmoid(BETA * (chosen - rejected))


def grpo(
    logps: PerToken, old_logps: PerToken, advantages: PerSequence, seq: lk.Sequences
) -> Tensor:
    """PPO's clip on the token's ratio, mean over a sequence's tokens; no KL term."""
    ratio, a = (logps - old_logps).exp(), seq.expand(advantages)
    return seq.mean(-torch.minimum(ratio * a, ratio.clamp(1 - EPSILON, 1 + EPSILON) * a))


def build(name: str, op: str, inputs: Inputs, *, backend: str | None, budget: int | None) -> Call:
    """Raises UnavailableError where it cannot run here."""
    if name not in CONTESTANTS:
        raise UnavailableError(f"{op} is a case of {', '.join(CONTESTANTS)}")
    shape = inputs.shape
    if shape.shortest is not None or shape.prompt_share or shape.sequences % 2:
        raise UnavailableError(f"{op} takes an even number of sequences of one length, no prompts")
    if name == "liger chunked":
        return _liger(op, inputs)
    seq = inputs.seq
    if op == "dpo":
        seq = lk.Sequences.from_lengths(seq.lengths.tolist(), group_size=2).to(seq.device)
    side = {} if op == "dpo" else {"old_logps": inputs.ref_logps, "advantages": inputs.advantages}
    objective = {"dpo": dpo, "grpo": grpo}[op]
    leaves = inputs.hidden, inputs.weight, inputs.labels

    def fused() -> tuple[Tensor, Tensor]:
        out = lk.linear_loss(
            objective,
            *leaves,
            seq,
            backend=backend,
            memory_budget=budget,
            return_outputs=True,
            **side,
        )
        return out.loss, out.logps

    def eager() -> tuple[Tensor, Tensor]:
        logps = peers.eager(*leaves)
        return lk.aggregate(objective(logps, **side, seq=seq), seq), logps

    def backward(state: tuple[Tensor, Tensor]) -> Result:
        state[0].backward()
        return Result(state[1].detach(), *peers.gradients(inputs))

    return Call(fused if name == "lolkernels" else eager, backward)


def _liger(op: str, inputs: Inputs) -> Call:
    peers.version("liger-kernel")
    module = importlib.import_module("liger_kernel.chunked_loss")
    s, length = inputs.shape.sequences, inputs.shape.seq_len
    # All chosen, then all rejected, in a leaf of its own: the layout that its users have.
    order = torch.arange(s, device=inputs.hidden.device)
    order = torch.cat([order[0::2], order[1::2]]) if op == "dpo" else order
    hidden = inputs.hidden.detach().view(s, length, -1)[order].requires_grad_()
    labels = inputs.labels.view(s, length)[order]
    back = order.argsort()
    if op == "dpo":
        loss = module.LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)
    else:
        loss = module.LigerFusedLinearGRPOLoss(
            beta=0.0,
            use_ref_model=False,
            epsilon_low=EPSILON,
            epsilon_high=EPSILON,
            loss_type="grpo",
        )

    def forward() -> Any:
        if op == "dpo":
            return loss(inputs.weight, hidden, labels)[0]
        old = inputs.ref_logps.view(s, length)
        everywhere = torch.ones_like(labels)
        return loss(
            hidden,
            inputs.weight,
            labels,
            everywhere,
            inputs.advantages,
            old_per_token_logps=old,
        )[0]

    def backward(state: Tensor) -> Result:
        state.backward()
        dhidden, hidden.grad = hidden.grad, None
        _, dweight = peers.gradients(inputs)
        assert dhidden is not None
        return Result(None, dhidden[back].flatten(0, 1), dweight)

    return Call(forward, backward)
