"""A transformers model in bf16 on the device: fused it scores and learns as eager does."""

import copy
from typing import Any

import pytest
import torch
from on_device import DEVICE, each_backend

import lolkernels as lk
from lolkernels import objectives

transformers = pytest.importorskip("transformers")

VOCAB, B, T = 611, 4, 24


SIZES = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BLOCKS = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "llama": ("LlamaConfig", BLOCKS),
    "tied": ("LlamaConfig", {**BLOCKS, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gemma2": ("Gemma2Config", {**BLOCKS, "final_logit_softcapping": 4.0}),
}


def build(name: str) -> Any:
    kind, sizes = CONFIGS[name]
    config = getattr(transformers, kind)(**SIZES, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5.0)  # log-probs that differ
    return model.to(DEVICE, torch.bfloat16).eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (B, T), device=DEVICE)
    starts = torch.tensor([[3], [T], [1], [10]], device=DEVICE)  # one row has no completion
    return ids, torch.arange(T, device=DEVICE) >= starts


def exact(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probs in float64 from the very hidden states: what bf16 layers gave is not judged."""
    hidden = model.base_model(input_ids=ids, use_cache=False)[0].double()
    z = hidden @ model.get_output_embeddings().weight.double().T
    cap = getattr(model.config, "final_logit_softcapping", None)
    z = z if cap is None else cap * torch.tanh(z / cap)
    log_p = torch.log_softmax(z[:, :-1], -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return log_p[mask[:, 1:]]


@each_backend
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_and_losses(name: str, backend: str) -> None:
    plain = build(name)
    model = lk.fuse_lm_head(copy.deepcopy(plain), backend=backend)
    ids, mask = batch()
    with torch.no_grad():
        want = exact(plain, ids, mask)
        eager = plain(ids).logits[:, :-1].float().log_softmax(-1)
        eager = eager.gather(-1, ids[:, 1:, None]).squeeze(-1)[mask[:, 1:]]
        out = model(input_ids=ids, completion_mask=mask)
    assert out.logps.dtype == torch.float32
    assert float((out.logps - want).abs().max()) <= 2e-5
    assert float((out.logps - eager).abs().max()) <= 0.1  # its logits are rounded to bf16
    side = {
        "ref_logps": out.logps + 0.01,
        "advantages": torch.tensor([1.0, 1.0, 0.5, 2.0], device=DEVICE),
    }
    fused = model(input_ids=ids, completion_mask=mask, objective=objectives.a_lol, **side)
    fused.loss.backward()
    loss = lk.aggregate(
        objectives.a_lol(
            exact(plain, ids, mask), side["ref_logps"].double(), side["advantages"], out.seq
        ),
        out.seq,
    )
    loss.backward()
    assert abs(fused.loss.item() - loss.item()) <= 1e-3 * abs(loss.item())
    for (label, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is None:
            assert mine.grad is None or not mine.grad.any(), label
            continue
        g, t = mine.grad.double().flatten(), other.grad.double().flatten()
        if float(t.norm()) > 1e-6:  # the bias of an attention's keys has none but rounding
            turn = 1 - float(g @ t) / float(g.norm() * t.norm())
            assert turn <= 0.02, (label, turn)
