"""``fuse_lm_head`` under PEFT: adapters in the body and on the head, against their own logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from causal_lms import batch, build, one_rank, own_logps, transformers
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives

peft = pytest.importorskip("peft")

SIDE = {"ref_logps": -torch.rand(20), "advantages": torch.tensor([1.0, 2.0, 0.5])}
BODY = ["q_proj", "v_proj"]
HEAD = ["q_proj", "lm_head"]
# name -> the model, and what PEFT is asked for
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA in the body": ("llama", {"target_modules": BODY}),
    "DoRA in the body": ("llama", {"target_modules": BODY, "use_dora": True}),
    "LoRA on the head": ("llama", {"target_modules": HEAD}),
    "rank-stabilised": ("granite scaling", {"target_modules": HEAD, "use_rslora": True}),
    "a soft-cap behind": ("gemma2 softcap", {"target_modules": HEAD}),
    "biases": ("phi bias", {"target_modules": HEAD, "lora_bias": True, "bias": "all"}),
    "DoRA on the head": ("llama", {"target_modules": HEAD, "use_dora": True}),
    "DoRA on a bias": ("phi bias", {"target_modules": HEAD, "use_dora": True}),
    "modules_to_save": ("llama", {"target_modules": BODY, "modules_to_save": ["lm_head"]}),
    "LoRA on a tied head": (
        "llama tied",
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "tokens of a tied head": (
        "llama tied",
        {"target_modules": BODY, "trainable_token_indices": {"embed_tokens": [3, 5, 20]}},
    ),
}


def adapted(name: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """The same for the same name."""
    family, options = ADAPTERS[name]
    return with_values(build(family, dtype), **options, **more).to(dtype)


def with_values(model: Any, **options: Any) -> Any:
    """LoRA's B starts at zero."""
    torch.manual_seed(2)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def judge(plain: Any, fused: Any, inputs: dict[str, Tensor], tol: float) -> None:
    """Scores, an A-LoL loss and every gradient."""
    logps = own_logps(plain, inputs)
    seq = lk.Sequences.from_mask(inputs["completion_mask"])
    side = {k: v.to(logps.dtype) for k, v in SIDE.items()}
    loss = lk.aggregate(objectives.a_lol(logps, seq=seq, **side), seq)
    loss.backward()
    out = fused(**inputs, objective=objectives.a_lol, **side)
    out.loss.backward()
    assert float((out.logps - logps.detach()).abs().max()) <= tol * 10
    assert abs(out.loss.item() / loss.item() - 1) <= tol * 10
    trained = 0
    for (name, a), b in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == (not a.requires_grad), name
        if a.grad is not None:
            size = float(a.grad.abs().max())
            assert float((a.grad - b.grad).abs().max()) <= tol * max(1.0, size), name
            trained += size > 0
    assert trained >= 3


@pytest.mark.parametrize("name", list(ADAPTERS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adapters_score_and_train_as_their_own_logits(name: str, dtype: torch.dtype) -> None:
    plain, fused = adapted(name, dtype), lk.fuse_lm_head(adapted(name, dtype))
    judge(plain, fused, batch(ADAPTERS[name][0]), 1e-11 if dtype == torch.float64 else 1e-6)


def test_an_adapter_may_come_into_the_body_of_a_fused_model() -> None:
    plain, model = adapted("LoRA in the body"), lk.fuse_lm_head(build("llama"))
    judge(plain, with_values(model, target_modules=BODY).double(), batch(), 1e-11)


@pytest.mark.parametrize("name", ["LoRA on the head", "modules_to_save", "tokens of a tied head"])
def test_adapters_are_switched_merged_and_added(name: str) -> None:
    plain, fused, inputs = adapted(name), lk.fuse_lm_head(adapted(name)), batch()
    seen = []

    def same() -> None:
        with torch.no_grad():
            want, got = own_logps(plain, inputs), fused(**inputs).logps
        assert float((got - want).abs().max()) <= 1e-10
        assert all(float((got - other).abs().max()) > 1e-6 for other in seen[-1:])
        seen.append(got)

    same()
    with plain.disable_adapter(), fused.disable_adapter():
        same()
    if name == "LoRA on the head":
        for model in (plain, fused):
            torch.manual_seed(5)
            model.add_adapter(
                "other", peft.LoraConfig(r=2, target_modules=HEAD, init_lora_weights=False)
            )
            model.double().base_model.set_adapter(["default", "other"])
        same()
    for model in (plain, fused):
        model.merge_adapter()
    seen.clear()
    same()
    with plain.disable_adapter(), fused.disable_adapter():
        same()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["LoRA in the body", "LoRA on the head"])
def test_activation_checkpoints(name: str, reentrant: bool) -> None:
    """Frozen embeddings need ``enable_input_require_grads`` where checkpoints are reentrant."""
    plain, fused = adapted(name).train(), lk.fuse_lm_head(adapted(name)).train()
    fused.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fused.enable_input_require_grads()
    calls: list[int] = []
    layer = fused.get_base_model().model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    judge(plain, fused, batch(), 1e-11)
    assert len(calls) == 2  # once more in the backward


ON_THE_HEAD = ["LoRA on the head", "DoRA on the head", "modules_to_save", "tokens of a tied head"]


@pytest.mark.parametrize("name", ON_THE_HEAD)
def test_adapters_of_a_fused_model_are_saved_and_loaded(name: str, tmp_path: Any) -> None:
    model = lk.fuse_lm_head(adapted(name))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(ADAPTERS[name][0]), tmp_path).double()
    with torch.no_grad():
        want = model(**batch()).logps
        assert float((own_logps(loaded, batch()) - want).abs().max()) <= 1e-10
        merged = model.merge_and_unload()
        assert float((own_logps(merged, batch()) - want).abs().max()) <= 1e-10
        assert float((lk.fuse_lm_head(merged)(**batch()).logps - want).abs().max()) <= 1e-10


@pytest.mark.parametrize("name", ON_THE_HEAD)
def test_adapters_on_a_sharded_head(name: str) -> None:
    from torch.distributed.fsdp import fully_shard

    plain, model = (adapted(name, torch.float32) for _ in range(2))
    lk.fuse_lm_head(plain)
    with one_rank() as mesh:
        base = model.get_base_model()
        own = [] if "tied" in name else [base.lm_head]
        for part in (*base.model.layers, *own, model):
            fully_shard(part, mesh=mesh)
        lk.fuse_lm_head(model)
        losses = [m(**batch(), objective=objectives.nll).loss for m in (plain, model)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        for a, b in zip(plain.parameters(), model.parameters(), strict=True):
            assert not a.requires_grad or torch.equal(a.grad, b.grad.full_tensor())


class EveryOther(torch.nn.Module):
    """A dropout that is the same for every row, whatever their number."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x * (torch.arange(x.shape[-1]) % 2)


def test_lora_drops_its_own_input_only() -> None:
    models = [adapted("LoRA on the head", lora_dropout=0.5).train() for _ in range(2)]
    for model in models:
        for module in model.modules():
            if isinstance(getattr(module, "lora_dropout", None), torch.nn.ModuleDict):
                module.lora_dropout["default"] = EveryOther()
    judge(models[0], lk.fuse_lm_head(models[1]), batch(), 1e-11)


def test_narrow_weights_with_wide_adapters_are_nearer_the_truth_than_their_own_logits() -> None:
    """As PEFT makes them. The truth is float64, from the same weights."""
    options = {"target_modules": ["lm_head"], "init_lora_weights": False}
    config = peft.LoraConfig(r=4, **options)
    layer = peft.get_peft_model(build("llama", torch.bfloat16), config).lm_head
    assert layer.lora_A.default.weight.dtype == torch.float32
    hidden, labels = torch.randn(50, 32).bfloat16(), torch.randint(61, (50,))

    def logps(logits: Tensor) -> Tensor:
        return logits.double().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)

    with torch.no_grad():
        got, own = lk.LogprobHead(layer)(hidden, labels).logps, logps(layer(hidden))
        truth = logps(layer.double()(hidden.double()))
    assert float((got - truth).abs().max()) <= 0.5 * float((own - truth).abs().max())


REFUSED: dict[str, tuple[str, Callable[[], Any]]] = {
    "IA3": (
        "adapter .Linear",
        lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    ),
    "AdaLoRA": (
        "adapter .SVDLinear",
        lambda: peft.AdaLoraConfig(target_modules=["lm_head"], total_step=10),
    ),
    "VeRA": ("adapter .Linear", lambda: peft.VeraConfig(target_modules=["lm_head"], r=2)),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_other_adapters_on_the_head_are_refused(name: str) -> None:
    words, config = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        lk.fuse_lm_head(peft.get_peft_model(build("llama"), config()))


def test_what_lora_on_the_head_cannot_do_is_refused() -> None:
    inputs = batch()
    dropped = lk.fuse_lm_head(adapted("DoRA on the head", lora_dropout=0.5).eval())
    assert dropped(**inputs).logps.isfinite().all()
    with pytest.raises(ValueError, match="DoRA with dropout"):
        dropped.train()(**inputs)
    mixed = lk.fuse_lm_head(adapted("LoRA on the head"))
    with pytest.raises(ValueError, match="adapter_names"):
        mixed(**inputs, adapter_names=["default", "default", "__base__"])
    partitioned = lk.fuse_lm_head(adapted("LoRA on the head"), check=False)
    partitioned.get_base_model().lm_head.base_layer.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="not gathered beneath its adapter"):
        partitioned(**inputs)


def test_lora_put_on_the_head_afterwards_needs_fusing_again() -> None:
    wrapped = peft.get_peft_model(
        lk.fuse_lm_head(build("llama")),
        peft.LoraConfig(target_modules=HEAD, init_lora_weights=False),
    ).double()
    with pytest.raises(ValueError, match="replaced"):
        wrapped(**batch())
    want = own_logps(wrapped, batch())
    assert torch.allclose(lk.fuse_lm_head(wrapped)(**batch()).logps, want)


# --- virtual tokens -------------------------------------------------------------------------------

PROMPTS: dict[str, Callable[[], Any]] = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    ),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("name", list(PROMPTS))
def test_virtual_tokens_are_scored_past_and_trained(name: str) -> None:
    inputs, models = batch(), []
    ids, mask = inputs["input_ids"], inputs["completion_mask"]
    del inputs["position_ids"]  # PEFT leaves them out, and says so
    for _ in range(2):
        torch.manual_seed(4)
        models.append(peft.get_peft_model(build("llama"), PROMPTS[name]()).double())
    plain, fused = models[0], lk.fuse_lm_head(models[1])
    # The first token has a predictor, the last virtual token, where these are embedded.
    first = int(name != "prefix tuning")
    mask[1, 0] = bool(first)
    logits = plain(ids, attention_mask=inputs["attention_mask"]).logits[:, -12 - first :]
    logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1 - first :, None]).squeeze(-1)
    logps = logps[mask[:, 1 - first :]]
    options = {"labels": ids} if first else {}
    ref = -torch.rand(3, 12, dtype=torch.float64)
    seq = lk.Sequences.from_mask(mask)
    lk.aggregate(objectives.a_lol_seq(logps, ref[mask], torch.ones(3), seq), seq).backward()
    out = fused(
        **inputs, **options, objective=objectives.a_lol_seq, ref_logps=ref, advantages=torch.ones(3)
    )
    out.loss.backward()
    assert float((out.logps - logps.detach()).abs().max()) <= 1e-10
    pairs = zip(plain.parameters(), fused.parameters(), strict=True)
    trained = [(a.grad, b.grad) for a, b in pairs if a.requires_grad]
    assert trained
    for a, b in trained:
        assert float(a.abs().max()) > 0 and float((a - b).abs().max()) <= 1e-10
    if first:
        with pytest.raises(ValueError, match="labels=input_ids"):
            fused(**inputs)


# --- quantised weights ----------------------------------------------------------------------------


def quantised(folder: Any, **options: Any) -> Any:
    """As ``from_pretrained`` loads it; the kernels of bitsandbytes take no narrower layers."""
    pytest.importorskip("bitsandbytes")
    if not folder.exists():
        build("llama", torch.float32, hidden_size=128, head_dim=32).save_pretrained(folder)
    config = transformers.BitsAndBytesConfig(
        bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **options
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_scores_and_trains_as_its_own_logits(bits: int, tmp_path: Any) -> None:
    options = {f"load_in_{bits}bit": True}
    plain, fused = (
        with_values(
            peft.prepare_model_for_kbit_training(quantised(tmp_path / "model", **options)),
            target_modules=HEAD,
        )
        for _ in range(2)
    )
    judge(plain.train(), lk.fuse_lm_head(fused).train(), batch(), 1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_head_is_refused(bits: int, tmp_path: Any) -> None:
    options = {f"load_in_{bits}bit": True, "llm_int8_skip_modules": ["none"]}
    model = quantised(tmp_path / "model", **options)
    with pytest.raises(TypeError, match=r"Linear(4bit|8bitLt) is none: its weight .*dequantise"):
        lk.fuse_lm_head(model)
    with pytest.raises(TypeError, match=r"Linear(4bit|8bitLt) is none: its weight .*dequantise"):
        lk.fuse_lm_head(peft.get_peft_model(model, peft.LoraConfig(target_modules=HEAD)))
