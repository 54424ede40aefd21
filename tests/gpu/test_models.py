"""A transformers model in bf16 on the device: fused it scores as eager does, and generates."""

import copy
from typing import Any

import pytest
import torch
from on_device import DEVICE, each_backend

import lolkernels as lk
from lolkernels import objectives

transformers = pytest.importorskip("transformers")

VOCAB, B, T = 611, 4, 24


def llama(**options: Any) -> Any:
    return transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip


def gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def gemma2() -> Any:
    return transformers.Gemma2Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, final_logit_softcapping=4.0,
    )  # fmt: skip


CONFIGS = {"llama": llama, "tied": lambda: llama(tie_word_embeddings=True)}
CONFIGS |= {"gpt2": gpt2, "gemma2": gemma2}
each_model = pytest.mark.parametrize("name", CONFIGS)


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    model = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[name](), attn_implementation="eager"
    )
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5.0)  # log-probs that differ
    return model.to(DEVICE, dtype).eval()


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
@each_model
def test_scores_and_losses(name: str, backend: str) -> None:
    plain = build(name, torch.bfloat16)
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


@each_model
def test_generation_is_unchanged(name: str) -> None:
    plain = build(name)
    model = lk.fuse_lm_head(copy.deepcopy(plain))
    ids, _ = batch()
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


@each_backend
@pytest.mark.parametrize("compiled", [False, True])
def test_a_head_as_a_module(compiled: bool, backend: str) -> None:
    linear = torch.nn.Linear(64, VOCAB, bias=True).to(DEVICE, torch.bfloat16)
    head = lk.LogprobHead(linear, backend=backend, softcap=20.0)
    hidden = torch.randn(9, 64, device=DEVICE).to(torch.bfloat16).requires_grad_()
    labels = torch.randint(VOCAB, (9,), device=DEVICE)
    torch._dynamo.reset()
    call = torch.compile(head, backend="aot_eager", fullgraph=True) if compiled else head
    out = call(hidden, labels)
    out.logps.sum().backward()
    z = hidden.detach().double() @ linear.weight.double().T + linear.bias.double()
    z = 20.0 * torch.tanh(z / 20.0)
    want = z.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    assert float((out.logps - want).detach().abs().max()) <= 2e-5
    assert hidden.grad.isfinite().all() and linear.weight.grad.any() and linear.bias.grad.any()
