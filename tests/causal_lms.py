"""Tiny random causal LMs, a batch for them, and what their own logits say of it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

VOCAB = 61
TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {  # the class, and what it takes
    "llama": ("Llama", COMMON),
    "llama tied": ("Llama", {**COMMON, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **TOKENS}),
    "gemma2 softcap": ("Gemma2", {**COMMON, "final_logit_softcapping": 4.0, "sliding_window": 16}),
    "cohere scale": ("Cohere", {**COMMON, "logit_scale": 0.3}),
    "granite scaling": ("Granite", {**COMMON, "logits_scaling": 2.5}),
    "qwen3": ("Qwen3", COMMON),
    "phi bias": ("Phi", {k: v for k, v in COMMON.items() if k != "head_dim"}),
}
# Eager attention, the only one it has, gives NaN where a row attends to nothing.
NO_LEFT_PADDING = "gemma2 softcap"


def build(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    torch.manual_seed(0)
    family, options = CONFIGURATIONS[name]
    config = getattr(transformers, f"{family}Config")(**{**options, **changes})
    attention = "eager" if name == NO_LEFT_PADDING else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():  # peaky logits, and a bias that matters where there is one
        head = model.get_output_embeddings()
        head.weight.mul_(20.0)
        if head.bias is not None:
            head.bias.normal_()
    return model.to(dtype).eval()


def batch(name: str = "") -> dict[str, Tensor]:
    """Three rows: left padding, no padding, right padding; prompts of different lengths."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, 12))
    attention = torch.ones(3, 12, dtype=torch.int64)
    attention[0, : 0 if name == NO_LEFT_PADDING else 3], attention[2, 9:] = 0, 0
    ids[attention == 0] = 0
    completion = torch.zeros(3, 12, dtype=torch.bool)
    completion[0, 6:], completion[1, 2:11], completion[2, 4:9] = True, True, True
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
        "completion_mask": completion,
    }


@contextlib.contextmanager
def one_rank() -> Iterator[Any]:
    """A device mesh of this process alone."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def own_logps(model: Any, inputs: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """The scores from the model's own logits, packed: logits at t - 1 predict token t."""
    model_inputs = {k: v for k, v in inputs.items() if k != "completion_mask"}
    logits = model(**model_inputs).logits / temperature
    logps = torch.log_softmax(logits[:, :-1], -1)
    picked = logps.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
    return picked[inputs["completion_mask"][:, 1:]]


def compare_gradients(plain: Any, fused: Any, tol: float = 1e-9) -> None:
    seen = 0
    for (key, a), (other, b) in zip(
        plain.named_parameters(), fused.named_parameters(), strict=True
    ):
        assert key == other
        if a.grad is None:
            assert b.grad is None or float(b.grad.abs().max()) == 0.0, key
            continue
        assert float((a.grad - b.grad).abs().max()) <= tol * max(1.0, float(a.grad.abs().max())), (
            key
        )
        seen += int(float(a.grad.abs().max()) > 0)
    assert seen >= 10
