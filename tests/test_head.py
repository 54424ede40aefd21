"""``fuse_lm_head`` on tiny random models: scores, losses, gradients, generation, adapters."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lolkernels as lk
from lolkernels import objectives

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

VOCAB = 61
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def configurations() -> dict[str, Callable[[], Any]]:
    t = transformers
    return {
        "llama": lambda: t.LlamaConfig(**COMMON),
        "llama tied": lambda: t.LlamaConfig(**COMMON, tie_word_embeddings=True),
        "gpt2": lambda: t.GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        "gemma2 softcap": lambda: t.Gemma2Config(
            **COMMON, final_logit_softcapping=4.0, sliding_window=16
        ),
        "cohere scale": lambda: t.CohereConfig(**COMMON, logit_scale=0.3),
        "granite scaling": lambda: t.GraniteConfig(**COMMON, logits_scaling=2.5),
        "qwen3": lambda: t.Qwen3Config(**COMMON),
        "phi bias": lambda: t.PhiConfig(**{k: v for k, v in COMMON.items() if k != "head_dim"}),
    }


CONFIGURATIONS = configurations()
# Eager attention, the only one it has, gives NaN where a row attends to nothing.
NO_LEFT_PADDING = "gemma2 softcap"
models = pytest.mark.parametrize("name", list(CONFIGURATIONS))


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = CONFIGURATIONS[name]()
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


def own_logps(model: Any, inputs: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """The scores from the model's own logits, packed: logits at t - 1 predict token t."""
    model_inputs = {k: v for k, v in inputs.items() if k != "completion_mask"}
    logits = model(**model_inputs).logits / temperature
    logps = torch.log_softmax(logits[:, :-1], -1)
    picked = logps.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
    return picked[inputs["completion_mask"][:, 1:]]


@models
def test_scores_equal_the_models_own_logits(name: str) -> None:
    model, inputs = build(name), batch(name)
    with torch.no_grad():
        want = own_logps(model, inputs)
        warm = own_logps(model, inputs, temperature=0.7)
        assert lk.fuse_lm_head(model) is model
        out = model(**inputs)
        assert float((out.logps - want).abs().max()) <= 1e-10
        assert float((model(**inputs, temperature=0.7).logps - warm).abs().max()) <= 1e-10
        assert out.seq.lengths.tolist() == [6, 9, 5]
        assert out.loss is None and out.seq_loss is None
        assert out.logps.shape == out.lse.shape == out.entropy.shape == out.max_logit.shape == (20,)
        assert float((own_logps(model, inputs) - want).abs().max()) == 0.0  # still as before
        # The canary: the neighbouring positions' scores are others.
        shifted = {**inputs, "completion_mask": inputs["completion_mask"].roll(-1, 1)}
        assert float((model(**shifted).logps - want).abs().max()) > 1e-2


@models
def test_losses_and_all_gradients_equal_the_unfused_models(name: str) -> None:
    inputs = batch(name)
    plain, fused = build(name), lk.fuse_lm_head(build(name))
    ref = own_logps(plain, inputs).detach() + 0.1 * torch.randn(20, dtype=torch.float64)
    advantages = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    seq = lk.Sequences.from_mask(inputs["completion_mask"])
    logps = own_logps(plain, inputs)
    want = lk.aggregate(objectives.a_lol(logps, ref, advantages, seq, clip=0.5), seq, "token-mean")
    want.backward()
    out = fused(
        **inputs,
        objective=objectives.a_lol,
        reduction="token-mean",
        ref_logps=ref,
        advantages=advantages,
        clip=0.5,
    )
    out.loss.backward()
    assert abs(out.loss.item() - want.item()) <= 1e-10
    assert out.seq_loss.shape == (3,) and not out.logps.requires_grad
    kept = ~out.logps.isnan()
    assert kept.tolist() == [True] * 6 + [False] * 9 + [True] * 5
    assert float((out.logps - logps.detach())[kept].abs().max()) <= 1e-10
    compare_gradients(plain, fused)


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


@models
def test_differentiable_scores_carry_any_loss(name: str) -> None:
    inputs = batch(name)
    plain, fused = build(name), lk.fuse_lm_head(build(name))
    own_logps(plain, inputs).square().sum().backward()
    fused(**inputs).logps.square().sum().backward()
    compare_gradients(plain, fused)


@models
def test_generation_is_unchanged(name: str) -> None:
    model = build(name, torch.float32)
    ids = torch.randint(3, VOCAB, (2, 5))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    before = model.generate(ids, **options)
    logits = model(input_ids=ids).logits
    lk.fuse_lm_head(model)
    assert torch.equal(model.generate(ids, **options), before)
    assert torch.equal(model(input_ids=ids).logits, logits)
    labels = model(input_ids=ids, labels=ids).loss
    assert bool(labels.isfinite())


def test_the_signature_that_trainers_inspect_is_the_models_own() -> None:
    model = build("llama")
    before = list(inspect.signature(model.forward).parameters)
    lk.fuse_lm_head(model)
    assert [p for p in inspect.signature(model.forward).parameters if p != "self"] == before


def test_side_inputs_may_be_padded_or_packed() -> None:
    inputs, model = batch(), lk.fuse_lm_head(build("llama"))
    mask = inputs["completion_mask"]
    padded = -torch.rand(3, 12, dtype=torch.float64)
    advantages = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    losses = [
        model(
            **inputs, objective=objectives.a_lol_seq, ref_logps=ref, advantages=advantages
        ).loss.item()
        for ref in (padded, padded[mask])
    ]
    assert losses[0] == losses[1]
    other = padded.roll(1, 1)
    moved = model(**inputs, objective=objectives.a_lol_seq, ref_logps=other, advantages=advantages)
    assert moved.loss.item() != losses[0]


def test_totals_are_the_denominators_of_a_larger_update() -> None:
    inputs, model = batch(), lk.fuse_lm_head(build("llama"))
    whole = model(**inputs, objective=objectives.nll, reduction="token-mean").loss
    parts = [
        model(
            **{k: v[i : i + 1] for k, v in inputs.items()},
            objective=objectives.nll,
            reduction="token-mean",
            totals=(3, 20),
        ).loss
        for i in range(3)
    ]
    assert abs(whole.item() - sum(p.item() for p in parts)) <= 1e-12


def test_padding_side_and_batch_do_not_change_a_score() -> None:
    """GPT-2 with left padding and no position_ids is 34 nats off; with them it is exact."""
    model = lk.fuse_lm_head(build("gpt2"))
    ids = torch.randint(3, VOCAB, (7,))
    scores = []
    for left, right in ((0, 0), (5, 0), (0, 5), (2, 3)):
        row = torch.cat([torch.zeros(left), ids, torch.zeros(right)]).long()[None]
        attention = torch.cat([torch.zeros(left), torch.ones(7), torch.zeros(right)]).long()[None]
        completion = torch.zeros_like(row, dtype=torch.bool)
        completion[0, left + 3 : left + 7] = True
        out = model(
            input_ids=row,
            attention_mask=attention,
            position_ids=(attention.cumsum(1) - 1).clamp(min=0),
            completion_mask=completion,
        )
        scores.append(out.logps.detach())
    for other in scores[1:]:
        assert float((scores[0] - other).abs().max()) <= 1e-10


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_backend_and_the_budget_are_passed_on(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lolkernels.backends import TABLE

    model, inputs = build("llama", torch.float32), batch()
    lk.fuse_lm_head(model, backend=backend, memory_budget=VOCAB * 4 * 3)
    calls = dict.fromkeys(TABLE, 0)
    sizes = []
    for name, record in TABLE.items():
        original = record.exps_

        def spy(x: Tensor, *a: Any, name: str = name, f: Any = original, **k: Any) -> Any:
            calls[name] += 1
            sizes.append(x.shape[0])
            return f(x, *a, **k)

        monkeypatch.setitem(TABLE, name, record._replace(exps_=spy))
    model(**inputs)
    assert calls[backend] > 1 and sum(calls.values()) == calls[backend]
    assert max(sizes) == 3


# --- adapters, copies, refusals -------------------------------------------------------------------


def lora(model: Any, **options: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options))


def test_lora_on_the_head_is_refused() -> None:
    for options in (
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        with pytest.raises(ValueError, match="adapter"):
            lk.fuse_lm_head(lora(build("llama"), **options))


def test_lora_put_on_the_head_afterwards_is_refused() -> None:
    model = lk.fuse_lm_head(build("llama"))
    wrapped = lora(model, target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"adapter|replaced"):
        wrapped(**batch())


@pytest.mark.parametrize("fused_first", [False, True])
def test_a_peft_model_scores_and_trains_its_adapter_only(fused_first: bool) -> None:
    inputs, ref = batch(), -torch.rand(20, dtype=torch.float64)
    advantages = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    plain = lora(build("llama"), target_modules=["q_proj", "v_proj"]).double()
    base = build("llama")
    if fused_first:
        fused = lora(lk.fuse_lm_head(base), target_modules=["q_proj", "v_proj"]).double()
    else:
        fused = lk.fuse_lm_head(lora(base, target_modules=["q_proj", "v_proj"]).double())
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        with torch.no_grad():  # LoRA's B starts at zero
            if a.requires_grad:
                a.copy_(0.1 * torch.randn_like(a))
            b.copy_(a)
    seq = lk.Sequences.from_mask(inputs["completion_mask"])
    logps = own_logps(plain, inputs)
    lk.aggregate(objectives.a_lol(logps, ref, advantages, seq), seq).backward()
    out = fused(**inputs, objective=objectives.a_lol, ref_logps=ref, advantages=advantages)
    out.loss.backward()
    assert float((out.logps - logps.detach()).abs().max()) <= 1e-9
    trained = 0
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == (not a.requires_grad)
        if a.grad is not None:
            assert float((a.grad - b.grad).abs().max()) <= 1e-9
            trained += int(float(a.grad.abs().max()) > 0)
    assert trained >= 4


def test_a_copy_of_a_fused_model_stands_alone() -> None:
    model, inputs = lk.fuse_lm_head(build("llama")), batch()
    twin = copy.deepcopy(model)
    want = model(**inputs).logps.detach()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert torch.equal(twin(**inputs).logps.detach(), want)
    assert float((model(**inputs).logps.detach() - want).abs().max()) > 1e-3
    twin(**inputs, objective=objectives.nll).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None for p in twin.parameters())


def test_fusing_twice_is_fusing_once() -> None:
    model, inputs = build(NO_LEFT_PADDING), batch(NO_LEFT_PADDING)
    once = lk.fuse_lm_head(model)(**inputs).logps
    assert torch.equal(lk.fuse_lm_head(model)(**inputs).logps, once)
    ids = inputs["input_ids"]
    assert bool(model(input_ids=ids).logits.isfinite().all())


def test_only_this_instance_is_patched() -> None:
    model, other = build("llama"), build("llama")
    lk.fuse_lm_head(model)
    assert "forward" in vars(model) and "forward" not in vars(other)
    assert "forward" not in vars(other.lm_head) and hasattr(other(batch()["input_ids"]), "logits")


def test_the_state_dict_is_the_models_own() -> None:
    model = build("llama")
    keys = list(model.state_dict())
    lk.fuse_lm_head(model)
    assert list(model.state_dict()) == keys


def test_a_tied_weight_stays_tied_and_gets_both_gradients() -> None:
    model = lk.fuse_lm_head(build("llama tied"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model(**batch(), objective=objectives.nll).loss.backward()
    unused = torch.ones(VOCAB, dtype=torch.bool)
    unused[batch()["input_ids"].unique()] = False
    assert bool((model.lm_head.weight.grad[unused].abs().sum(1) > 0).all())  # the head's share


def test_hooks_of_the_head_run() -> None:
    """What wraps the head (FSDP, ZeRO-3) gathers its weight in a hook of the module's call."""
    model, seen = lk.fuse_lm_head(build("llama")), []
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append("pre"))
    model.lm_head.register_forward_hook(lambda *_: seen.append("post"))
    model(**batch())
    assert seen == ["pre", "post"]


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no mask for the first token": (
        ValueError,
        "position 0",
        {"completion_mask": torch.ones(3, 12, dtype=torch.bool)},
    ),
    "mask of another shape": (
        ValueError,
        "completion_mask",
        {"completion_mask": torch.zeros(3, 11, dtype=torch.bool)},
    ),
    "no tensor": (ValueError, "completion_mask", {"completion_mask": [[True]]}),
    "labels too": (TypeError, "labels", {"labels": torch.zeros(3, 12, dtype=torch.int64)}),
    "a column without an objective": (TypeError, "advantages", {"advantages": torch.ones(3)}),
    "another objective's column": (
        TypeError,
        "rewards",
        {"objective": objectives.nll, "rewards": torch.ones(3)},
    ),
    "a missing column": (TypeError, "rewards", {"objective": objectives.wbc}),
    "an unknown reduction": (
        ValueError,
        "reduction",
        {"objective": objectives.nll, "reduction": "mean"},
    ),
    "an objective that is none": (TypeError, "objective", {"objective": "a_lol"}),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_calls_name_the_argument(name: str) -> None:
    model = lk.fuse_lm_head(build("llama"))
    error, words, changed = BAD[name]
    with pytest.raises(error, match=words):
        model(**{**batch(), **changed})


def test_inputs_embeds_cannot_be_scored() -> None:
    model, inputs = lk.fuse_lm_head(build("llama")), batch()
    ids = inputs.pop("input_ids")
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=model.model.embed_tokens(ids), **inputs)


def test_what_is_no_causal_lm_is_refused() -> None:
    for thing in (nn.Linear(3, 4), object(), build("llama").model):
        with pytest.raises(TypeError, match="causal LM"):
            lk.fuse_lm_head(thing)


def test_a_mixture_of_experts_with_a_balancing_loss_is_refused() -> None:
    model = build("llama")
    model.config.output_router_logits = True
    lk.fuse_lm_head(model)
    with pytest.raises(ValueError, match="output_router_logits"):
        model(**batch())


# --- LogprobHead ----------------------------------------------------------------------------------


def test_logprob_head_shares_the_layer() -> None:
    linear = nn.Linear(8, 30)
    head = lk.LogprobHead(linear, softcap=5.0, logit_scale=0.5)
    h, labels = torch.randn(6, 8), torch.randint(30, (6,))
    z = 5 * torch.tanh(0.5 * linear(h) / 5)
    assert torch.allclose(head(h), z)
    want = torch.log_softmax(z.double(), -1).gather(-1, labels[:, None]).squeeze(-1)
    assert float((head(h, labels).logps - want).detach().abs().max()) <= 1e-5
    seq = lk.Sequences.from_lengths([2, 4])
    out = head(h, labels, seq, objective=objectives.nll)
    assert abs(out.loss.item() + want.sum().item() / 2) <= 1e-5
    out.loss.backward()
    assert float(linear.weight.grad.abs().max()) > 0 and float(linear.bias.grad.abs().max()) > 0
    assert list(dict(head.named_parameters())) == ["linear.weight", "linear.bias"]


def test_logprob_head_names_what_is_missing() -> None:
    head = lk.LogprobHead(nn.Linear(8, 30))
    h, labels = torch.randn(6, 8), torch.randint(30, (6,))
    with pytest.raises(ValueError, match="labels"):
        head(h, objective=objectives.nll)
    with pytest.raises(ValueError, match="labels"):
        head(h, temperature=2.0)
    with pytest.raises(ValueError, match="seq"):
        head(h, labels, objective=objectives.nll)
    with pytest.raises(TypeError, match="linear layer"):
        lk.LogprobHead(nn.ReLU())
