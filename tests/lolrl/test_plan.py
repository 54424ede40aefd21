"""`lolrl plan`: its counts and bytes against transformers' own models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st

from lolkernels import memory
from lolrl import cli, plan
from lolrl.config import ConfigError
from lolrl.plan import GIB, MODELS, ModelShape, Setup

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config),
    "gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config),
    "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig),
    "gpt-oss": (tf.GptOssForCausalLM, tf.GptOssConfig),
}


def build(shape: ModelShape, **more: Any) -> Any:
    """The model of transformers with this shape."""
    more |= {"vocab_size": shape.vocab, "bos_token_id": 0, "eos_token_id": 0}
    if shape.family == "gpt2":
        more |= {"n_embd": shape.hidden, "n_layer": shape.layers, "n_head": shape.heads}
        more |= {"n_inner": shape.intermediate, "n_positions": shape.positions}
        more |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return tf.GPT2LMHeadModel(tf.GPT2Config(**more))
    model, config = FAMILIES[shape.family]
    if shape.experts:
        more |= {"num_local_experts": shape.experts, "num_experts_per_tok": shape.active}
    more |= {"hidden_size": shape.hidden, "num_hidden_layers": shape.layers}
    more |= {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
    more |= {"head_dim": shape.head_dim, "intermediate_size": shape.intermediate}
    return model(config(tie_word_embeddings=shape.tied, pad_token_id=0, **more))


def count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


# As published with the weights.
PUBLISHED = {
    "gpt2": 124_439_808,
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model_itself_and_those_published(name) -> None:
    with torch.device("meta"):
        model = build(MODELS[name])
    own = count(model.parameters())
    assert MODELS[name].parameters() == own == PUBLISHED.get(name, own)


def small(family: str, layers: int = 2, *, tied: bool = True) -> ModelShape:
    positions = 256 if family == "gpt2" else 0
    kv_heads = 4 if family == "gpt2" else 2
    return ModelShape(family, 64, layers, 4, kv_heads, 16, 160, 512, tied, positions)


def adapted(model: Any, rank: int) -> Any:
    peft = pytest.importorskip("peft")
    # peft tells its own mind about Conv1D otherwise
    more = {"fan_in_fan_out": True} if isinstance(model, tf.GPT2LMHeadModel) else {}
    config = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM", **more)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "gpt2"])
def test_adapters_and_their_bytes_are_those_of_peft(family: str) -> None:
    shape, setup = small(family), Setup(lora=3, device="cpu")
    model = adapted(build(shape).bfloat16(), 3)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert plan.trained(shape, setup) == count(trainable)
    step = plan.step_bytes(shape, setup, 1)
    assert step.weights == sum(p.nbytes for p in model.parameters())
    assert step.gradients == sum(p.nbytes for p in trainable)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_trained_without_adapters(tied: bool, frozen: bool) -> None:
    shape = small("llama", tied=tied)
    model = build(shape)
    model.lm_head.weight.requires_grad_(not frozen)
    trainable = [p for p in model.parameters() if p.requires_grad]
    setup = Setup(dtype="fp32", frozen_head=frozen, device="cpu")
    assert plan.trained(shape, setup) == count(trainable)
    step = plan.step_bytes(shape, setup, 1)
    optimizer = torch.optim.AdamW(trainable)
    for p in trainable:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    states = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    assert step.states == sum(t.nbytes for t in states)
    assert step.gradients == sum(p.nbytes for p in trainable)


def saved_bytes(model: Any, tokens: int) -> int:
    """Bytes of distinct tensors that autograd saves in the backbone, parameters left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage  # held, so that no address is used twice
        return t

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        inner.base_model(input_ids=torch.arange(tokens)[None], use_cache=False)
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [0, 8])
# gpt-oss and Gemma 2 store the scores of their attention unless a flash kernel is installed.
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "gpt2"])
def test_activations_are_what_autograd_saves(family: str, lora: int, dtype: str) -> None:
    shape, tokens = small(family, layers=6), 128
    more = {} if family == "gpt2" else {"attn_implementation": "sdpa"}
    model = build(shape, **more)
    model = model.bfloat16() if dtype == "bf16" else model
    model = adapted(model, lora) if lora else model
    setup = Setup(dtype=dtype, lora=lora, seq_len=tokens, device="cpu")
    formula = plan.step_bytes(shape, setup, 1).activations
    # Row vectors (statistics of norms and attention) weigh more in so small a model.
    assert formula == pytest.approx(saved_bytes(model.train(), tokens), rel=0.02)


def test_activations_with_checkpointing() -> None:
    shape, tokens = small("llama", layers=6), 128
    model = build(shape).train()
    options = {"use_reentrant": False}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    setup = Setup(dtype="fp32", seq_len=tokens, checkpointing=True, device="cpu")
    inputs = shape.layers * tokens * shape.hidden * 4
    final = 2 * tokens * shape.hidden * 4
    assert plan.step_bytes(shape, setup, 1).activations == inputs + final
    without = plan.step_bytes(shape, replace(setup, checkpointing=False), 1)
    assert without.activations > 4 * (inputs + final)


@pytest.mark.parametrize("gpu", [True, False])  # a parameter "cuda" would ask for the backend
@pytest.mark.parametrize(("dtype", "size"), [("bf16", 2), ("fp32", 4)])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_head_is_the_planner_formula(gpu, dtype, size, frozen) -> None:
    shape, place = MODELS["llama-3.2-1b"], "cuda" if gpu else "cpu"
    budget = {"memory_budget": 2**29, "device": place}
    setup = Setup(dtype=dtype, frozen_head=frozen, seq_len=512, prompt_share=0.5, **budget)
    held = memory.kept_rows(
        shape.vocab, shape.hidden, size if gpu else 4, 2**29, torch.device(place)
    )
    want = memory.extra_bytes(
        "linear_loss",
        longest_block=held // 256 * 256,  # sequences of 256
        num_rows=20 * 256,
        hidden_size=shape.hidden,
        vocab=shape.vocab,
        hidden_bytes=size,
        weight_bytes=size,
        frozen_weight=frozen,
        **budget,
    )
    assert plan.fused_extra_bytes(shape, setup, 20) == want
    returned = size * shape.hidden * (20 * 256 + (0 if frozen else shape.vocab))
    hidden = size * shape.hidden * (20 * 512 + 20 * 256)
    assert plan.loss_bytes(shape, setup, 20, "fused") == want + returned + hidden


def test_the_default_budget_follows_the_memory() -> None:
    shape, setup = MODELS["llama-3.2-1b"], Setup(seq_len=512, checkpointing=True)
    small, large = (plan.plan(shape, setup, n * GIB) for n in (24, 80))
    rows = [plan.fused_extra_bytes(shape, p.setup, 64) for p in (small, large)]
    assert rows[0] < rows[1]
    fixed = replace(setup, memory_budget=2**28)
    small, large = (plan.plan(shape, fixed, n * GIB) for n in (24, 80))
    assert len({plan.fused_extra_bytes(shape, p.setup, 64) for p in (small, large)}) == 1


@pytest.mark.parametrize("name", ["gpt2", "qwen2.5-0.5b", "gemma-3-1b", "gpt-oss-20b"])
@pytest.mark.parametrize("lora", [0, 16])
def test_the_largest_batch_is_the_largest_and_grows_with_memory(name: str, lora: int) -> None:
    shape, setup = MODELS[name], Setup(lora=lora, seq_len=512)
    last = (0, 0)
    for card in (GIB, 8 * GIB, 24 * GIB, 80 * GIB, 192 * GIB):
        found = plan.plan(shape, setup, card)
        for n, loss in ((found.eager, "eager"), (found.fused, "fused")):
            assert n == 0 or plan.step_bytes(shape, found.setup, n, loss).peak <= card
            assert plan.step_bytes(shape, found.setup, n + 1, loss).peak > card
        assert found.eager >= last[0] and found.fused >= last[1]
        assert found.fused >= found.eager
        last = found.eager, found.fused
    assert last[1] > last[0] > 0
    assert (found.eager_tokens, found.fused_tokens) == (512 * last[0], 512 * last[1])


def test_states_of_eight_bits() -> None:
    """Two states of one byte a parameter, and for each 256 of them an fp32 scale."""
    shape = small("llama")
    count = shape.parameters()
    states = [plan.step_bytes(shape, Setup(optimizer="8bit", device="cpu"), 1).states]
    states += [plan.step_bytes(shape, Setup(optimizer="none", device="cpu"), 1).states]
    assert states[1] == 0 and 0 <= states[0] - 2 * count - 2 * 4 * (count // 256) < 8


def test_each_saving_saves() -> None:
    shape, base = MODELS["qwen2.5-1.5b"], Setup(seq_len=512, card=80 * GIB)
    changes: list[dict[str, Any]] = [{"lora": 16}, {"frozen_head": True}, {"prompt_share": 0.5}]
    changes += [{"optimizer": "8bit"}, {"optimizer": "none"}, {"checkpointing": True}]
    for loss in plan.LOSSES:
        plain = plan.step_bytes(shape, base, 8, loss)
        for change in changes:
            saving = plan.step_bytes(shape, replace(base, **change), 8, loss)
            # The prompt's rows are no less work for who takes the logits of all rows.
            same = loss == "full logits" and "prompt_share" in change
            assert saving.peak < plain.peak or same, (loss, change)
    for share, same in ((0.0, True), (0.5, False)):
        setup = replace(base, prompt_share=share)
        fused, eager, full = (
            plan.step_bytes(shape, setup, 8, x).loss for x in ("fused", "eager", "full logits")
        )
        assert fused < eager and (eager == full if same else eager < full)


@given(st.integers(0, 3000), st.integers(1, 3000))
def test_bisection_finds_the_largest(most: int, guess: int) -> None:
    assert plan.largest(lambda n: n <= most, guess) == most


@given(st.integers(0, 10**6), st.integers(1, 10**4), st.floats(0.01, 0.5))
def test_bisection_stops_at_its_resolution(most: int, guess: int, resolution: float) -> None:
    found = plan.largest(lambda n: n <= most, guess, resolution)
    assert found <= most < found + max(1, int(resolution * found)) + 1


def test_bisection_asks_little_after_a_good_guess() -> None:
    asked: list[int] = []

    def fits(most: int) -> Callable[[int], bool]:
        asked.clear()
        return lambda n: asked.append(n) or n <= most  # type: ignore[func-returns-value]

    assert 0.95 * 210 <= plan.largest(fits(210), 200, 0.05) <= 210 and len(asked) <= 4
    assert 0.95 * 190 <= plan.largest(fits(190), 200, 0.05) <= 190 and len(asked) <= 4
    assert all(n >= 1 for n in asked)


def test_a_custom_shape() -> None:
    assert plan.parse_shape("Llama-3.1-8B") == MODELS["llama-3.1-8b"]
    full = plan.parse_shape("576,30,49152,1536,9,3,tied")
    assert full == MODELS["smollm2-135m"]
    short = plan.parse_shape("256,2,1000")
    assert (short.intermediate, short.heads, short.kv_heads, short.tied) == (1024, 4, 4, False)


def test_bytes() -> None:
    sizes = {"24GiB": 24 * 2**30, "80GB": 80 * 10**9, "1.5 gib": 3 * 2**29, "123": 123}
    assert {text: plan.parse_bytes(text) for text in sizes} == sizes


BASE = ["plan", "--model-shape", "gpt2", "--memory", "8GiB", "--seq-len", "512"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--memory", "lots"], "--memory must be like 24GiB"),
        (["--memory", "0"], "--memory must be >= 1 byte"),
        (["--memory", "null"], "--memory is missing"),
        (["--memory-budget=-1GiB"], "--memory-budget must be like"),
        (["--memory-budget", "0"], "--memory-budget must be >= 1"),
        (["--card", "big"], "--card must be like"),
        (["--model-shape", "gpt9"], "--model-shape must be one of gpt2"),
        (["--model-shape", "64,2"], "--model-shape must be one of"),
        (["--model-shape", "64,0,100"], "layers must be > 0"),
        (["--model-shape", "64,2,100,128,3"], "heads must divide hidden=64"),
        (["--model-shape", "64,2,100,128,4,3"], "heads must be a multiple of kv_heads"),
        (["--seq-len", "0"], "--seq-len must be >= 1"),
        (["--seq-len", "2048"], "--seq-len must be <= 1024"),
        (["--prompt-share", "1"], "--prompt-share must be in [0, 1)"),
        (["--lora=-2"], "--lora must be a rank"),
        (["--lora", "8", "--frozen-head"], "leave --frozen-head out"),
        (["--optimizer", "sgd"], "--optimizer must be one of"),
        (["--dtype", "fp8"], "--dtype must be one of"),
        (["--device", "tpu"], "--device must be one of"),
    ],
)
def test_bad_flags_are_named(flags, words, capsys) -> None:
    assert cli.main([*BASE, *flags]) == 2
    assert words in capsys.readouterr().err


def test_an_unknown_loss_is_named() -> None:
    with pytest.raises(ConfigError, match="loss must be one of"):
        plan.step_bytes(MODELS["gpt2"], Setup(), 1, "fast")


def test_the_command_prints_what_fits(tmp_path, capsys) -> None:
    config = tmp_path / "plan.yaml"
    config.write_text("model_shape: qwen2.5-0.5b\nmemory: 24GiB\nmemory_budget: 512MiB\n")
    assert cli.main(["plan", "--config", str(config), "--seq-len", "1024"]) == 0
    text = capsys.readouterr().out
    setup = Setup(seq_len=1024, memory_budget=2**29)
    found = plan.plan(MODELS["qwen2.5-0.5b"], setup, 24 * GIB)
    tokens = next(line for line in text.splitlines() if line.startswith("tokens"))
    assert tokens.split()[1:3] == [f"{found.eager_tokens:,}", f"{found.fused_tokens:,}"]
    assert "494,032,768 parameters" in text
    config.write_text("model_shape: gpt2\nmemroy: 24GiB\n")
    assert cli.main(["plan", "--config", str(config), "--memory", "1GiB"]) == 2
    assert "plan has no option 'memroy'" in capsys.readouterr().err


def test_the_readme_says_what_the_command_does() -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    assert "lolrl plan --model-shape qwen2.5-0.5b --memory 24GiB" in text
    found = plan.plan(MODELS["qwen2.5-0.5b"], Setup(), 24 * GIB)
    said = f"{found.eager_tokens:,} tokens for eager and {found.fused_tokens:,} for lolkernels"
    assert said in " ".join(text.split())


def test_the_command_says_why_nothing_fits(capsys) -> None:
    large = ["plan", "--model-shape", "llama-3-8b", "--memory", "24GiB"]
    cli.main(large)
    text = capsys.readouterr().out
    assert "nothing fits: weights, gradients and optimiser states take 59.83 GiB" in text
    assert "try --lora 16, --optimizer 8bit" in text
    cli.main([*large, "--lora", "16"])
    text = capsys.readouterr().out
    assert "nothing fits: one sequence of 2048 tokens takes" in text
    assert "try --checkpointing" in text
