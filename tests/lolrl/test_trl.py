"""TRL's own trainers, with its kernel and with ours."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the extra trl is not installed")

import peft
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)
from trl.trainer import utils

import lolkernels as lk
from lolrl.trl import use_lolkernels
from tests.lolrl.toys import Gradients, make_llama, make_rows

STEPS = 20
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# Of a line of TRL's log: what a clock says.
CLOCKS = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def make_model(kind: str, vocab: int) -> Any:
    if kind == "llama":
        return make_llama(vocab)
    sizes = SIZES | {"vocab_size": vocab}
    torch.manual_seed(0)
    if kind == "phi":  # an untied head with a bias
        model = PhiForCausalLM(PhiConfig(**sizes, partial_rotary_factor=0.5))
        torch.nn.init.normal_(model.lm_head.bias)
        return model
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=2.0))
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
    return MixtralForCausalLM(MixtralConfig(**sizes, **experts))


def reward_vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(c in "aeiou" for c in text) / 4 + len(text) / 40 for text in completions]


def rows(trainer: str) -> Dataset:
    data = [{"prompt": r["prompt"], "completion": r["completion"]} for r in make_rows(24)]
    if trainer == "kto":
        data = [{**row, "label": i % 3 > 0} for i, row in enumerate(data)]
    if trainer == "dpo":
        data = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
            for row, other in zip(data, data[1:] + data[:1], strict=True)
        ]
    if trainer in ("grpo", "rloo"):
        data = [{"prompt": row["prompt"]} for row in data]
    return Dataset.from_list(data)


TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, {}),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, {}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, {}),
    "grpo": (
        trl.GRPOTrainer,
        trl.GRPOConfig,
        {"num_generations": 4, "max_completion_length": 6, "beta": 0.1},
    ),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, {"num_generations": 4, "max_completion_length": 6}),
}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
CASES = {
    "sft": ("sft", "llama", {}, None),
    "sft lora": ("sft", "llama", {}, LORA),
    "sft accumulated": ("sft", "phi", {"gradient_accumulation_steps": 3}, None),
    "sft moe": ("sft", "mixtral", {"gradient_accumulation_steps": 2}, None),
    "sft saved head": ("sft", "phi", {}, {**LORA, "modules_to_save": ["lm_head"]}),
    "dpo": ("dpo", "llama", {}, None),
    "dpo lora": ("dpo", "phi", {"gradient_accumulation_steps": 2}, LORA),
    "dpo softcap, weighted": ("dpo", "gemma2", {"use_weighting": True}, None),
    "kto": ("kto", "gemma2", {}, None),
    "kto lora": ("kto", "llama", {}, LORA),
    "kto moe": ("kto", "mixtral", {}, None),
    "grpo": ("grpo", "llama", {"temperature": 0.7, "entropy_coef": 0.05}, None),
    "grpo lora": ("grpo", "phi", {"top_entropy_quantile": 0.5}, LORA),
    "rloo": ("rloo", "llama", {"temperature": 1.3}, None),
    "rloo lora moe": ("rloo", "mixtral", {"gradient_accumulation_steps": 2}, LORA),
}


def run(case: str, tokenizer: Any, folder: Any, steps: int = STEPS) -> tuple[list, list, Any]:
    """Log lines, gradients and the trained model."""
    name, kind, options, adapter = CASES[case]
    trainer, config, more = TRAINERS[name]
    make_model(kind, len(tokenizer)).save_pretrained(folder)  # where TRL finds the reference
    model = AutoModelForCausalLM.from_pretrained(folder)
    gradients = Gradients()
    arguments: dict[str, Any] = {}
    if name in ("grpo", "rloo"):
        arguments["reward_funcs"] = reward_vowels
    if adapter is not None:
        arguments["peft_config"] = peft.LoraConfig(**adapter)
    made = trainer(
        model=model,
        args=config(
            **{
                "output_dir": str(folder),
                "use_cpu": True,
                "bf16": False,
                "report_to": "none",
                "disable_tqdm": True,
                "gradient_checkpointing": False,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2 if adapter else 1e-3,
                "logging_steps": 1,
                "save_strategy": "no",
                "max_steps": steps,
                "seed": 0,
                "adam_epsilon": 1e-5,  # else gradients that are rounding alone move weights
                **more,
                **options,
            }
        ),
        train_dataset=rows(name),
        processing_class=tokenizer,
        callbacks=[gradients],
        **arguments,
    )
    made.train()
    return made.state.log_history, gradients.seen, made.model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many rows went through TRL's kernel, and through ours."""
    seen = {"trl": 0, "ours": 0}
    own, theirs = lk.linear_logprob, utils._ChunkedLogProbFunction

    def counted(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        seen["ours"] += len(hidden)
        return own(hidden, *args, **kwargs)

    class Counted:
        @staticmethod
        def apply(hidden: Any, *args: Any) -> Any:
            seen["trl"] += len(hidden)
            return theirs.apply(hidden, *args)

    monkeypatch.setattr(lk, "linear_logprob", counted)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Counted)
    return seen


@pytest.mark.parametrize("case", CASES)
def test_a_trl_trainer_trains_alike(case: str, tokenizer: Any, tmp_path: Any, calls: Any) -> None:
    logging.getLogger("trl").setLevel(logging.ERROR)
    lines, gradients, _ = run(case, tokenizer, tmp_path / "theirs")
    assert calls["trl"] and not calls["ours"]
    before = calls["trl"]
    with use_lolkernels():
        ours, our_gradients, _ = run(case, tokenizer, tmp_path / "ours")
    assert calls["ours"] and calls["trl"] == before
    assert len(gradients) == len(our_gradients) == STEPS
    assert len(lines) == len(ours) == STEPS + 1
    assert ("aux_loss" in lines[0]) == case.endswith("moe")
    for step, (line, our_line) in enumerate(zip(lines, ours, strict=True)):
        assert line.keys() == our_line.keys()
        for name in line.keys() - CLOCKS:
            assert our_line[name] == pytest.approx(line[name], rel=1e-5, abs=1e-5), (step, name)
    for step, (one, other) in enumerate(zip(gradients, our_gradients, strict=True)):
        for name, gradient in one.items():
            torch.testing.assert_close(
                other[name], gradient, rtol=1e-4, atol=1e-5, msg=f"{step} {name}"
            )


OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize(
    ("dtype", "has_bias", "options"),
    [
        (torch.float32, True, {}),
        (torch.float32, False, {"temperature": 0.7, "logit_scale": 0.25}),
        (torch.float32, True, {"final_logit_softcapping": 3.0, "temperature": 1.4}),
        (torch.bfloat16, True, {"final_logit_softcapping": 3.0, "logit_scale": 2.0}),
    ],
)
def test_every_output_and_gradient_is_trls(dtype: Any, has_bias: bool, options: Any) -> None:
    options = {"temperature": 1.0, "chunk_size": 64, "outputs": OUTPUTS, **options}
    order = ("temperature", "chunk_size", "final_logit_softcapping", "logit_scale", "outputs")
    defaults = {"final_logit_softcapping": None, "logit_scale": 1.0}
    arguments = [(defaults | options)[name] for name in order]
    weight = torch.randn(5000, 16).to(dtype)
    weight[100] = weight[10]  # of two tokens that are equal the first is the top one
    hidden = torch.randn(60, 16).to(dtype)
    bias = torch.randn(5000).to(dtype) if has_bias else None
    if bias is not None:
        bias[10] = bias[100] = 9.0
    logits = hidden.float() @ weight.float().T + (0 if bias is None else bias.float())
    targets = torch.where(torch.arange(60) % 2 == 0, logits.argmax(1), torch.arange(60) * 80)
    targets[targets.eq(10).nonzero()[::2]] = 100

    def outcome(kernel: Any) -> Any:
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
        out = kernel.apply(*leaves[:2], leaves[2] if has_bias else None, targets, *arguments)
        loss = (out[0] * torch.linspace(-1, 1, 60)).sum() + out[1].square().sum()
        return [*(t.detach() for t in out), *torch.autograd.grad(loss, leaves)]

    theirs = outcome(utils._ChunkedLogProbFunction)
    with use_lolkernels() as kernel:
        ours = outcome(kernel)
    # TRL rounds logits to bf16: a part in 256, of logits up to 30.
    rough = dtype == torch.bfloat16
    for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert our.dtype == their.dtype and our.shape == their.shape
        if our.dtype == torch.bool:
            assert rough or our.equal(their)
            assert 10 < our.sum() < 50 and not our[targets == 100].any()
        elif i < len(OUTPUTS):
            torch.testing.assert_close(our, their, rtol=1e-5, atol=0.2 if rough else 1e-5)
        else:
            off = (our.float() - their.float()).norm() / their.float().norm()
            assert off < (0.1 if rough else 1e-5), (i, off)


def head_call(model: Any, labels: Any) -> Any:
    ids = torch.arange(24).view(2, 12)
    return model(input_ids=ids, labels=labels, fused_lm_head=True)


def test_masked_positions_enter_no_product_and_none_need_be_left(calls: Any) -> None:
    model = make_llama(60)
    utils.add_fused_lm_head(model, outputs=OUTPUTS[:2])
    labels = torch.arange(24).view(2, 12).clone()
    labels[:, :8] = -100
    with use_lolkernels():
        out = head_call(model, labels)
        assert calls == {"trl": 0, "ours": 8}
        assert out.log_probs[:, 7:].lt(0).all() and out.log_probs[:, :7].eq(0).all()
        empty = head_call(model, torch.full_like(labels, -100))
        empty.loss.backward()
    assert empty.loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_what_the_kernel_cannot_do_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    found = utils._ChunkedLogProbFunction, getattr(utils, "_use_triton", None)
    hidden, weight, targets = torch.randn(2, 4), torch.randn(5, 4), torch.tensor([1, 2])
    with use_lolkernels(backend="cpu") as kernel:
        with pytest.raises(ValueError, match="logit_scale"):
            kernel.apply(hidden, weight, None, targets, 1.0, 8, None, 0.0, OUTPUTS)
        with pytest.raises(ValueError, match="outputs"):
            kernel.apply(hidden, weight, None, targets, 1.0, 8, None, 1.0, ("log_probs", "top5"))
        with pytest.raises(ValueError, match="labels"):
            kernel.apply(hidden, weight, None, targets + 3, 1.0, 8)
    assert found == (utils._ChunkedLogProbFunction, getattr(utils, "_use_triton", None))
    for version in ("1.14.0", "1.17.0.dev0"):
        monkeypatch.setattr(trl, "__version__", version)
        with pytest.raises(ImportError, match=r"trl>=1\.15,<1\.17"):
            use_lolkernels()
    assert found[0] is utils._ChunkedLogProbFunction


def test_a_model_fused_before_works_in_a_trl_trainer(calls: Any) -> None:
    model = lk.fuse_lm_head(make_llama(60))
    utils.add_fused_lm_head(model)
    labels = torch.arange(24).view(2, 12)
    theirs = head_call(model, labels).loss
    with use_lolkernels():
        ours = head_call(model, labels).loss
    assert calls["trl"] and calls["ours"]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
