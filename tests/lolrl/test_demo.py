"""The demo's stages on a synthetic corpus; the real one, slow, where its text can be fetched."""

import json
import random
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lolkernels as lk
from lolrl import moviedata, policies
from lolrl.config import ConfigError
from lolrl.data import read_records
from lolrl.demo import run_demo
from lolrl.evaluate import generate
from lolrl.losscost import compare_losses, peak_bytes
from lolrl.moviedata import Snippet
from lolrl.policies import load_policy, lora
from lolrl.rewards import vader_reward
from lolrl.settings import SMOLLM2, TINY, DemoSettings
from lolrl.tiny import build_model, build_tokenizer
from tests.lolrl.toys import make_llama, reload

SMALL = DemoSettings(
    methods=("nll", "a_lol", "a_lol_seq"),
    validation=60,
    test=40,
    vocab_size=330,
    layers=1,
    width=48,
    sft_epochs=6,
    sft_batch=16,
    sft_learning_rate=1e-2,
    updates=24,
    batch=16,
    micro_batch=8,
    learning_rate=5e-3,
    max_new_tokens=24,
    curve_prompts=16,
    curve_points=2,
)


def corpus(count: int = 500) -> list[Snippet]:
    """Sentences of one mood each, half of them good: what the reward tells apart is learnable."""
    draw = random.Random(0)
    moods = (("good", "great", "fun"), ("bad", "awful", "dull"))
    snippets = []
    for i in range(count):
        mood = draw.choice((0, 1))
        first, second = draw.choices(moods[mood], k=2)
        snippets.append(Snippet(f"Film {i} is {first} and so {second}", 2.0 - 4.0 * mood))
    return snippets


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> tuple[Any, Path, list[str]]:
    folder, said = tmp_path_factory.mktemp("demo"), []
    import matplotlib.font_manager  # noqa: F401  # asks the system for its fonts, once a machine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", _forbidden)
        patch.setattr(socket.socket, "connect", _forbidden)
        outcomes = run_demo(
            folder, settings=SMALL, seed=3, seeds=1, snippets=corpus(), say=said.append
        )
    return outcomes[0], folder / "seed-3", said


def _forbidden(*args: Any, **kw: Any) -> None:
    raise AssertionError("the demo on given snippets starts no process and opens no connection")


def test_a_lol_improves_and_the_control_does_not(outcome) -> None:
    rows = {row["name"]: row for row in outcome[0].rows}
    assert list(rows) == ["sft", "nll", "a_lol", "a_lol_seq"]
    base = rows["sft"]["reward"]
    # The corpus is half good and half bad; a policy that only says good things earns about 0.7.
    assert abs(base) < 0.35
    assert rows["a_lol"]["reward"] - base > 0.3
    assert rows["a_lol_seq"]["reward"] - base > 0.3
    assert abs(rows["nll"]["reward"] - base) < 0.3
    assert rows["a_lol"]["judge"] > rows["nll"]["judge"] + 0.5
    assert rows["a_lol"]["improved"] > 0.6
    assert rows["sft"]["improved"] is None
    assert rows["sft"]["matched"] == base


def test_the_table_says_what_was_used(outcome) -> None:
    rows = {row["name"]: row for row in outcome[0].rows}
    facts = outcome[0].facts
    assert facts["seed"] == 3
    assert facts["train_rows"] == 400
    assert facts["positive_share"] == rows["a_lol"]["kept"] == rows["a_lol_seq"]["kept"]
    assert 0.3 < facts["positive_share"] < 0.7
    assert rows["nll"]["kept"] == rows["sft"]["kept"] == 1.0
    assert [rows[m]["updates"] for m in SMALL.methods] == [24, 24, 24]
    assert rows["sft"]["updates"] == 400 * 6 // 16
    assert rows["sft"]["divergence"] == pytest.approx(0, abs=1e-4)
    assert all(rows[m]["divergence"] > 0 for m in SMALL.methods)
    assert all(row["step_seconds"] > 0 for row in rows.values())
    assert facts["judge_r"] > 0.9
    # Two moods, three words each: a fitted reference is far below the uniform log(330) = 5.8.
    assert 0 < facts["reference_nll"] < 2.5
    # The mood is a coin's toss: no head can know it, and a sane one is not far from the mean.
    fit = facts["value_head"]
    assert fit["mse"] < 1.3 * fit["mse_mean"]
    for method in SMALL.methods:
        log = outcome[0].logs[method]
        assert [row["step"] for row in log if "eval_reward" in row] == [0, 12, 24]


def test_every_file_that_the_text_promises(outcome) -> None:
    result, folder, said = outcome
    for name in ("reward.png", "divergence.png", "curves.png"):
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = (folder / "results.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("| a_lol ")]
    assert f"{result.rows[2]['reward']:.3f}" in table[0]
    assert "fused / eager" in text
    assert "seed 3" in text
    assert said[-1].endswith(f"Everything of seed 3 is in {folder}")
    assert text.strip() in said[-1]
    stored = json.loads((folder / "results.json").read_text())
    assert [row["reward"] for row in stored["rows"]] == [row["reward"] for row in result.rows]
    assert stored["settings"]["updates"] == 24
    samples = [json.loads(s) for s in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * 40
    first = [s for s in samples if s["method"] == "a_lol"]
    rewards = vader_reward([s["prompt"] for s in first], [s["completion"] for s in first])
    assert [s["reward"] for s in first] == rewards
    assert (folder / "samples.md").read_text().count("`a_lol_seq`") == 12


def test_the_written_splits_share_no_prompt(outcome) -> None:
    data = outcome[1] / "data"
    train, validation, test = (
        {r.prompt for r in read_records(data / f"{name}.jsonl")}
        for name in ("train", "validation", "test")
    )
    assert (len(validation), len(test)) == (60, 40)
    assert not train & validation
    assert not (train | validation) & test
    rows = read_records(data / "train.jsonl")
    expected = vader_reward([r.prompt for r in rows], [r.completion for r in rows])
    assert [r.reward for r in rows] == expected


def test_models_on_disk_are_the_ones_that_were_measured(outcome) -> None:
    result, folder, _ = outcome
    model, tokenizer = load_policy(folder / "a_lol" / "last")
    rows = result.samples["a_lol"]
    options = {"top_p": SMALL.top_p, "seed": 3, "batch_size": SMALL.generation_batch}
    prompts = [row["prompt"] for row in rows]
    texts = generate(model, tokenizer, prompts, max_new_tokens=24, **options)
    assert texts == [row["completion"] for row in rows]


QUICK = replace(SMALL, sft_epochs=1, updates=2, methods=("a_lol",), curve_prompts=0)


def test_seeds_print_their_spread_and_decide_everything(tmp_path) -> None:
    said: list[str] = []
    outcomes = run_demo(tmp_path, settings=QUICK, seeds=2, snippets=corpus(200), say=said.append)
    spread = json.loads((tmp_path / "spread.json").read_text())
    rewards = [o.rows[1]["reward"] for o in outcomes]
    assert spread["rows"][1]["reward"] == pytest.approx(sum(rewards) / 2)
    assert [o.facts["seed"] for o in outcomes] == [0, 1]
    assert outcomes[0].rows[0]["reward"] != outcomes[1].rows[0]["reward"]
    assert (tmp_path / "spread.md").read_text().strip() in said[-2]
    assert "eval_reward" not in (tmp_path / "seed-0" / "results.json").read_text()
    (again,) = run_demo(tmp_path / "b", settings=QUICK, snippets=corpus(200), say=lambda s: None)
    for first, second in zip(outcomes[0].rows, again.rows, strict=True):
        assert first | {"step_seconds": 0} == second | {"step_seconds": 0}


def test_lora_methods_start_from_the_merged_reference(tmp_path) -> None:
    small = replace(QUICK, lora_rank=4)
    (result,) = run_demo(tmp_path, settings=small, snippets=corpus(200), say=lambda s: None)
    folder = tmp_path / "seed-0"
    assert (folder / "sft" / "last" / "adapter_model.safetensors").exists()
    assert not (folder / "reference" / "adapter_config.json").exists()
    assert (folder / "a_lol" / "last" / "adapter_model.safetensors").exists()
    assert result.rows[1]["divergence"] is not None


# --- pieces ---


def test_the_tiny_model_is_the_one_of_the_demo() -> None:
    tokenizer = build_tokenizer([s.text for s in corpus(200)], 400)
    text = "Film 3 is good — naïve  \n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token is None
    model = build_model(tokenizer, layers=TINY.layers, width=TINY.width)
    grown = sum(p.numel() for p in model.parameters()) + (2048 - len(tokenizer)) * TINY.width
    assert grown == 1_066_112
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    state = torch.get_rng_state()
    again = build_model(tokenizer, layers=TINY.layers, width=TINY.width)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    with pytest.raises(ValueError, match="vocab_size must be >= 259"):
        build_tokenizer(["a"], 258)


def test_settings_out_of_range_are_named() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"methods": ()}, "methods"),
        ({"methods": ("a_lol", "alol")}, "alol"),
        ({"updates": 0}, "updates=0 must be at least 1"),
        ({"batch": 10, "micro_batch": 4}, "multiple of 4"),
        ({"curve_prompts": 900}, "curve_prompts=900"),
    ]
    for changes, cause in refused:
        with pytest.raises(ConfigError, match=cause):
            replace(TINY, **changes)


@pytest.mark.compiled
def test_the_loss_comparison_is_of_equal_losses() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(240, 32), torch.randn(700, 32)
    labels = torch.randint(0, 700, (240,))
    seq = lk.Sequences.from_lengths(torch.tensor([40] * 6))
    ref = (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None])[:, 0] + 0.01
    cost = compare_losses(hidden, weight, labels, ref, torch.rand(6), seq, repeats=3)
    assert cost.relative_error < 1e-4
    assert (cost.tokens, cost.hidden_size, cost.vocabulary) == (240, 32, 700)
    assert cost.fused_seconds > 0
    # Eager holds logits, log-softmax and their gradients; the fused loss one buffer of logits.
    logits = 240 * 700 * 4
    assert cost.eager_bytes >= 2 * logits
    assert cost.fused_bytes < cost.eager_bytes


def test_peak_bytes_counts_what_is_alive_at_once() -> None:
    def step() -> None:
        first = torch.zeros(1000)
        del first
        second = torch.zeros(500)
        third = torch.zeros(600)
        del second, third

    assert peak_bytes(step) == 4400
    assert peak_bytes(lambda: None) == 0


def test_a_missing_smollm2_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr(policies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="make demo-smollm2"):
        policies.load_smollm2()


def test_a_dequantised_model_is_an_ordinary_one(tmp_path) -> None:
    """transformers marks a GGUF model as quantised, and its Trainer then refuses it."""
    model = make_llama(300)
    ids = torch.arange(12)[None]
    logits = model(ids).logits
    model.config.quantization_config = {"quant_method": "gguf"}
    model.is_quantized = True
    plain = policies._plain(model)
    assert torch.equal(plain(ids).logits, logits)
    assert not getattr(plain, "is_quantized", False)
    assert not hasattr(plain.config, "quantization_config")
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    plain.save_pretrained(tmp_path)
    assert torch.equal(reload(tmp_path)(ids).logits, logits)


def test_lora_settings() -> None:
    assert lora(0) is None
    config = lora(8)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.0)
    with pytest.raises(ValueError, match="rank must be >= 0"):
        lora(-1)


# --- the real thing ---


@pytest.mark.slow
def test_the_demo_on_real_text(tmp_path) -> None:
    """The effects of the paper with the demo's own settings, on two of its methods."""
    try:
        sdist = moviedata.fetch_sdist()
    except RuntimeError as error:
        pytest.skip(str(error))
    settings = replace(TINY, methods=("nll", "a_lol"), curve_prompts=0)
    (outcome,) = run_demo(tmp_path, settings=settings, snippets=moviedata.read_movies(sdist))
    rows = {row["name"]: row for row in outcome.rows}
    base = rows["sft"]
    assert rows["a_lol"]["reward"] - base["reward"] > 0.10
    assert abs(rows["nll"]["reward"] - base["reward"]) < 0.08
    assert rows["a_lol"]["distinct"][1] >= 0.95 * base["distinct"][1]
    assert rows["a_lol"]["judge"] > base["judge"]
    assert SMOLLM2.methods == ("nll", "a_lol", "a_lol_seq")
