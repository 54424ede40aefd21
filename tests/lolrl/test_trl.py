"""TRL's own trainers, with its kernel and with ours."""

from __future__ import annotations

import logging
import re
import runpy
import sys
from pathlib import Path
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
from lolrl.config import ConfigError, LoLConfig
from lolrl.trainer import LoLTrainer
from lolrl.trl import ALoLConfig, ALoLTrainer, use_lolkernels
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
CLOCKS = re.compile("step_time|.*_runtime|.*_per_second")


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


EVALUATED = {"eval_strategy": "steps", "eval_steps": 10}
TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, EVALUATED),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, EVALUATED),
    "kto": (trl.KTOTrainer, trl.KTOConfig, EVALUATED),
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
    # Generations of a prompt begin with the same entropy, but for its last bit: with this seed the
    # quantile never falls among equals, and is 1e-4 from all others.
    "grpo lora": (
        "grpo",
        "phi",
        {"top_entropy_quantile": 0.2, "epsilon_high": 0.3, "seed": 13},
        LORA,
    ),
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
        eval_dataset=rows(name).select(range(6)),
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
    evaluations = 0 if case[:4] in ("grpo", "rloo") else 2
    assert len(lines) == len(ours) == STEPS + evaluations + 1
    assert ("aux_loss" in lines[0]) == case.endswith("moe")
    for step, (line, our_line) in enumerate(zip(lines, ours, strict=True)):
        assert line.keys() == our_line.keys()
        for name in (name for name in line if not CLOCKS.fullmatch(name)):
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
    with pytest.warns(UserWarning, match="use_lolkernels is for them"):
        theirs = head_call(model, labels).loss
    with use_lolkernels():
        ours = head_call(model, labels).loss
    assert calls["trl"] and calls["ours"]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


# --- ALoLTrainer ---

SETTINGS = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "save_best_and_last": False,
    "max_steps": 4,
    "seed": 0,
}


def alol(folder: Any, tokenizer: Any, data: Any, model: Any = None, **kw: Any) -> ALoLTrainer:
    names = ("reward_funcs", "eval_dataset", "peft_config", "ref_model")
    given = {name: kw.pop(name) for name in names if name in kw}
    return ALoLTrainer(
        make_llama(len(tokenizer)) if model is None else model,
        args=ALoLConfig(str(folder), **SETTINGS, **kw),
        train_dataset=data,
        processing_class=tokenizer,
        **given,
    )


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_alol_trainer_is_lol_trainer_on_a_dataset_with_rewards(
    tokenizer: Any, tmp_path: Any
) -> None:
    rows = make_rows(24)
    config = LoLConfig(str(tmp_path / "a"), **SETTINGS)
    one = LoLTrainer(
        make_llama(len(tokenizer)), args=config, train_dataset=rows, processing_class=tokenizer
    )
    other = alol(tmp_path / "b", tokenizer, Dataset.from_list(rows))
    expected = losses(one)
    assert expected == losses(other) and len(set(expected)) == 4
    assert other.step0 is not None and other.step0["max"] <= 1e-3


def test_rewards_of_functions_and_the_mean_of_a_prompts_rows(
    chat_tokenizer: Any, tmp_path: Any
) -> None:
    """Conversational rows without rewards: functions see messages, V(x) is their group's mean."""
    data = []
    for i, row in enumerate(make_rows(12)):
        prompt = [{"role": "user", "content": f"question {i // 3}"}]
        answer = [{"role": "assistant", "content": row["completion"]}]
        data.append({"prompt": prompt, "completion": answer, "bonus": float(i % 3)})

    def reward(prompts: Any, completions: Any, bonus: Any, **_: Any) -> list[float]:
        assert all(prompt[-1]["role"] == "user" for prompt in prompts)
        return [len(c[0]["content"]) + b for c, b in zip(completions, bonus, strict=True)]

    trainer = alol(
        tmp_path,
        chat_tokenizer,
        Dataset.from_list(data),
        reward_funcs=[reward, reward],
        reward_func_weights=[0.5, 0.0],
        advantage_filter="none",
        sampling="uniform",
        eval_dataset=Dataset.from_list(data[:3]),
        eval_max_new_tokens=3,
    )
    rewards = torch.tensor([(len(r["completion"][0]["content"]) + r["bonus"]) / 2 for r in data])
    expected = (rewards.view(4, 3) - rewards.view(4, 3).mean(1, keepdim=True)).flatten().double()
    torch.testing.assert_close(trainer.train_dataset.advantages, expected)
    assert len(set(losses(trainer))) == 4
    assert trainer.evaluate()["eval_reward"] >= 0.5


def test_the_baseline_is_the_one_that_was_asked_for(tokenizer: Any, tmp_path: Any) -> None:
    rows = make_rows(12)
    options = {"advantage_filter": "none", "sampling": "uniform"}
    reward = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    value = torch.tensor([row["value"] for row in rows], dtype=torch.float64)
    prompts = [row["prompt"] for row in rows]
    means = torch.stack([reward[[p == q for q in prompts]].mean() for p in prompts])
    for baseline, expected in (("auto", value), ("value", value), ("group", means)):
        made = alol(tmp_path / baseline, tokenizer, rows, baseline=baseline, **options)
        torch.testing.assert_close(made.train_dataset.advantages, reward - expected)
    alone = [{**row, "value": None} for row in rows[:3]]
    with pytest.raises(ValueError, match="positive advantage"):
        alol(tmp_path / "alone", tokenizer, alone)
    for wrong, fix in (("baseline", "median"), ("precompute_ref_log_probs", False)):
        with pytest.raises(ConfigError, match=wrong):
            ALoLConfig(str(tmp_path), **{wrong: fix})


def test_models_by_name_adapters_and_what_a_trl_trainer_left(tokenizer: Any, tmp_path: Any) -> None:
    """From TRL's SFT to A-LoL with an adapter, and an equal model read from a folder."""
    _, _, model = run("sft", tokenizer, tmp_path / "sft", steps=2)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    adapter = {"peft_config": peft.LoraConfig(**LORA)}
    left = losses(alol(tmp_path / "left", tokenizer, make_rows(24), model, **adapter))
    name = str(tmp_path / "saved")
    read = alol(tmp_path / "read", None, make_rows(24), name, ref_model=name, **adapter)
    assert left == pytest.approx(losses(read), rel=1e-6) and len(set(left)) == 4


def test_the_example_raises_the_reward(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Any
) -> None:
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--disable_tqdm", "True"]
    monkeypatch.setattr(sys, "argv", ["trl_alol.py", *flags])
    example = Path(__file__).resolve().parents[2] / "python" / "examples" / "trl_alol.py"
    runpy.run_path(str(example), run_name="__main__")
    before, after = map(float, re.findall(r"^reward \w+: (\S+)$", capsys.readouterr().out, re.M))
    assert after > before + 0.3
    assert (tmp_path / "model.safetensors").exists()


def test_trls_parser_reads_the_configuration(tmp_path: Any) -> None:
    parser = trl.TrlParser((trl.ScriptArguments, ALoLConfig, trl.ModelConfig))
    flags = {"output_dir": tmp_path, "objective": "a_lol_kl", "clip": 0.5, "beta": 0.2}
    flags |= {"objective_args": '{"floor": 1}', "max_prompt_length": 9}
    line = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    _, config, _ = parser.parse_args_and_config([*line, "--use_cpu"])
    assert (config.clip, config.beta, config.max_prompt_length) == (0.5, 0.2, 9)
    assert config.report_to == []
    assert config.objective_args == {"floor": 1}
    assert "--baseline" in parser.format_help()
