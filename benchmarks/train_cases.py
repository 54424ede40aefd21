"""What benchmarks/train.py measures: a model in training, and the ways to its A-LoL loss.

`Run.checks` is the gate: losses and gradients are compared before anything is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
import torch
import torch.nn.functional as F  # noqa: N812
from library import ModelShape, Setup, plan
from shapes import CLIP, DTYPES, Shape
from torch import Tensor
from truth import Check

import lolkernels as lk

RANK = 16
PROMPT = 0.5
# Relative errors against fp32 logits: of the loss, and of the whole gradient. The gradients of bf16
# blocks are rounded whoever makes the first one: there twice eager's own error will do too.
LOSS_LIMIT = 1e-3
GRADIENT_LIMIT = {"fp32": 1e-3, "bf16": 1e-2}
TINY = {
    "tiny": ModelShape("llama", 256, 4, 4, 2, 64, 688, 49152, True),
    "tiny-qwen": ModelShape("qwen2", 192, 4, 6, 2, 32, 512, 50257, False),
    "test": ModelShape("llama", 32, 2, 4, 2, 8, 64, 1000, True),
}
MODELS = TINY | {n: s for n, s in plan.MODELS.items() if s.family in ("llama", "qwen2")}
MODES = ("full", "lora")


@dataclass(frozen=True)
class Case:
    """One model, trained one way, on batches of one size."""

    model: str
    mode: str  # full, or lora: adapters on all linear layers but the head
    sequences: int
    seq_len: int
    dtype: str
    device: str
    checkpointing: bool = False
    memory_budget: int | None = None  # of linear_loss

    @property
    def shape(self) -> ModelShape:
        return MODELS[self.model]

    @property
    def batch(self) -> Shape:
        tokens = self.sequences * self.seq_len
        d, v = self.shape.hidden, self.shape.vocab
        return Shape(tokens, d, v, self.seq_len, self.dtype, prompt_share=PROMPT)

    @property
    def title(self) -> str:
        how = "LoRA" if self.mode == "lora" else "all weights"
        more = ", gradient checkpointing" if self.checkpointing else ""
        return f"{self.model}, {how}{more}, {self.batch}"

    def step(self, contestant: str) -> plan.Step | None:
        """The bytes of a step by the formulas of lolrl plan, which know no TRL."""
        if contestant not in plan.LOSSES:
            return None
        how = {"dtype": self.dtype, "device": self.device, "seq_len": self.seq_len}
        how |= {"lora": RANK if self.mode == "lora" else 0, "prompt_share": PROMPT}
        how |= {"checkpointing": self.checkpointing, "memory_budget": self.memory_budget}
        setup = Setup(**how)
        return plan.step_bytes(self.shape, setup, self.sequences, contestant)


@dataclass
class Batch:
    input_ids: Tensor  # (S, L)
    completion_mask: Tensor  # (S, L) bool
    advantages: Tensor  # (S,) fp32, all positive
    ref_logps: Tensor  # (N,) fp32

    def first(self, sequences: int) -> Batch:
        rows = int(self.completion_mask[:sequences].sum())
        parts = self.input_ids, self.completion_mask, self.advantages
        return Batch(*(t[:sequences] for t in parts), self.ref_logps[:rows])


def fused_loss(model: Any, batch: Batch) -> Tensor:
    out = model(
        input_ids=batch.input_ids,
        completion_mask=batch.completion_mask,
        objective=lk.objectives.a_lol,
        ref_logps=batch.ref_logps,
        advantages=batch.advantages,
        clip=CLIP,
    )
    loss: Tensor = out.loss
    return loss


def a_lol(logps: Tensor, batch: Batch) -> Tensor:
    """mean over sequences of -A clip(exp(sum logp - ref)) sum logp, from logps (N,)."""
    count, lengths = batch.advantages.shape[0], batch.completion_mask.sum(1)
    owner = torch.repeat_interleave(lengths)
    zeros = torch.zeros(count, device=logps.device)
    total = zeros.index_add(0, owner, logps)
    drift = zeros.index_add(0, owner, logps.detach() - batch.ref_logps)
    ratio = drift.clamp(math.log1p(-CLIP), math.log1p(CLIP)).exp()
    return -(batch.advantages * ratio * total).mean()


def inside(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def completion_states(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) of the positions that predict a completion token, and these tokens."""
    hidden = inside(model).base_model(input_ids=batch.input_ids, use_cache=False)[0]
    rows = batch.completion_mask[:, 1:]
    return hidden[:, :-1][rows], batch.input_ids[:, 1:][rows]


def eager_loss(model: Any, batch: Batch) -> Tensor:
    """A careful loop: the head and its logits for the completions' rows only."""
    hidden, labels = completion_states(model, batch)
    logits = inside(model).get_output_embeddings()(hidden)
    return a_lol(-F.cross_entropy(logits.float(), labels, reduction="none"), batch)


def trl_loss(model: Any, batch: Batch) -> Tensor:
    """The same with TRL's chunked log-prob.

    Raises:
        UnavailableError: TRL is not installed.
    """
    hidden, labels = completion_states(model, batch)
    weight = inside(model).get_output_embeddings().weight
    return a_lol(peers.token_logps("trl")(hidden, weight, labels), batch)


def full_logits_loss(model: Any, batch: Batch) -> Tensor:
    """The usual loop: the model's logits of all rows, log_softmax, gather, mask."""
    out = model(input_ids=batch.input_ids, use_cache=False)
    logps = out.logits[:, :-1].float().log_softmax(-1)
    picked = logps.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    return a_lol(picked[batch.completion_mask[:, 1:]], batch)


def exact_loss(model: Any, batch: Batch) -> Tensor:
    """What the others are compared with: fp32 logits whatever the model's dtype."""
    hidden, labels = completion_states(model, batch)
    logits = hidden.float() @ inside(model).get_output_embeddings().weight.float().T
    return a_lol(-F.cross_entropy(logits, labels, reduction="none"), batch)


LOSSES: dict[str, Callable[[Any, Batch], Tensor]] = {
    "eager": eager_loss,
    "full logits": full_logits_loss,
    "trl": trl_loss,
    "fused": fused_loss,
}


def build_model(case: Case) -> Any:
    import transformers

    shape = case.shape
    kinds = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
    config = kinds[shape.family](
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=max(2048, case.seq_len),
    )
    torch.manual_seed(0)
    with torch.device(case.device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=DTYPES[case.dtype], attn_implementation="sdpa"
        )
    if case.mode == "lora":
        import peft

        if case.checkpointing:
            model.enable_input_require_grads()
        # Adapters that are not zero, so that every one of them has a gradient.
        adapters = peft.LoraConfig(
            r=RANK, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, adapters)
    if case.checkpointing:
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    # Calls without completion_mask are what they were.
    return lk.fuse_lm_head(model.train(), memory_budget=case.memory_budget)


class Run:
    """The model, its optimiser and one batch."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model = build_model(case)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=True)
        self.batch = self._batch()

    def _batch(self) -> Batch:
        case, generator = self.case, torch.Generator().manual_seed(0)
        size = case.sequences, case.seq_len
        ids = torch.randint(case.shape.vocab, size, generator=generator)
        mask = torch.ones(size, dtype=torch.bool)
        mask[:, : int(case.seq_len * PROMPT)] = False
        advantages = torch.randn(case.sequences, generator=generator).abs() + 0.1
        noise = 0.02 * torch.randn(int(mask.sum()), generator=generator)
        ids, mask = ids.to(case.device), mask.to(case.device)
        logps = []
        with torch.no_grad():
            for i in range(case.sequences):  # one at a time: this is not measured
                scored = self.model(input_ids=ids[i : i + 1], completion_mask=mask[i : i + 1])
                logps.append(scored.logps)
        ref = torch.cat(logps) + noise.to(case.device)
        return Batch(ids, mask, advantages.to(case.device), ref)

    def sized(self, sequences: int) -> Batch:
        """A batch of that many, made of the sequences that are here."""
        here = torch.arange(sequences, device=self.case.device) % self.case.sequences
        parts = self.batch.input_ids, self.batch.completion_mask, self.batch.advantages
        ref = self.batch.ref_logps.view(self.case.sequences, -1)[here].flatten()
        return Batch(*(t[here] for t in parts), ref)

    def step(self, contestant: str, batch: Batch | None = None) -> None:
        try:
            LOSSES[contestant](self.model, batch or self.batch).backward()
            self.optimizer.step()
        finally:  # where the memory ran out, too
            self.optimizer.zero_grad(set_to_none=True)

    def gradients(self, loss: Callable[[Any, Batch], Tensor]) -> tuple[float, list[Tensor]]:
        """Loss and gradients of the first two sequences."""
        value = loss(self.model, self.batch.first(2))
        value.backward()
        found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.trained]
        self.optimizer.zero_grad(set_to_none=True)
        return float(value.detach()), found

    def fixed_bytes(self) -> int:
        """Weights and the optimiser's states."""
        states = [t for s in self.optimizer.state.values() for t in s.values() if t.dim()]
        return sum(t.nbytes for t in [*self.model.parameters(), *states])

    def checks(self) -> dict[str, Check | peers.UnavailableError]:
        """Of each contestant: the relative errors of loss and gradient (Frobenius norm over all
        parameters). In bf16 only ours is held to them; eager's own rounding is reported.
        """
        want, exact = self.gradients(exact_loss)
        norm = math.sqrt(sum(float(g.float().pow(2).sum()) for g in exact))
        found: dict[str, Check | peers.UnavailableError] = {}
        limit = GRADIENT_LIMIT[self.case.dtype]
        for name, loss in LOSSES.items():
            try:
                value, got = self.gradients(loss)
            except peers.UnavailableError as error:
                found[name] = error
                continue
            pairs = zip(got, exact, strict=True)
            off = math.sqrt(sum(float((a.float() - b.float()).pow(2).sum()) for a, b in pairs))
            del got
            off, wrong = off / norm, abs(value - want) / abs(want)
            check = found[name] = Check(gradients={"loss": wrong, "gradient": off})
            if name == "eager" and self.case.dtype != "fp32":
                limit = max(limit, 2 * off)
            sound = wrong <= LOSS_LIMIT and off <= limit
            if not sound and (name == "fused" or self.case.dtype == "fp32"):
                check.faults.append(
                    f"its loss is off by {wrong:.1e} (limit {LOSS_LIMIT:g}), its gradient by "
                    f"{off:.1e} (limit {limit:.1g})"
                )
        return found
