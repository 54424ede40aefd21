"""Before the first update the policy is the reference, or training does not start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lolrl.annotate import annotate
from lolrl.config import AnnotateConfig
from lolrl.gate import StepZeroError, dropout_modules, gate_rows, switch_off_dropout
from lolrl.tokens import LoLDataset
from lolrl.trainer import LoLTrainer
from tests.lolrl.toys import (
    make_config,
    make_gpt2,
    make_llama,
    make_rows,
    make_tokenizer,
    parameters,
)

COUNT = 24


@pytest.fixture(scope="module")
def tok() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def rows(tok: Any) -> LoLDataset:
    return scored(make_llama(len(tok)), tok)


def scored(model: Any, tok: Any, **kw: Any) -> LoLDataset:
    config = AnnotateConfig(**{"keep": "all", "batch_size": 5, **kw})
    return annotate(model, tok, make_rows(COUNT), config=config, progress=False).dataset


def attempt(model: Any, rows: Any, tok: Any, folder: Path, **kw: Any) -> LoLTrainer:
    trainer = LoLTrainer(
        model, args=make_config(folder, **kw), train_dataset=rows, processing_class=tok
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(("make", "sizes"), [(make_llama, (1, 7)), (make_gpt2, (2, 16))])
def test_same_weights_pass_in_any_batch_shape(
    make: Any, sizes: tuple[int, int], tok: Any, tmp_path: Path
) -> None:
    """|sum log-ratio| <= 1e-3 nat on each row, in a batch shape the scores were not made with."""
    rows = scored(make(len(tok)), tok)
    options = {"advantage_filter": "none", "step0_rows": COUNT}
    for size in sizes:
        options["per_device_train_batch_size"] = size
        trainer = attempt(make(len(tok)), rows, tok, tmp_path / str(size), **options)
        assert trainer.step0["rows"] == COUNT and trainer.step0["max"] <= 1e-3
        first = trainer.state.log_history[0]
        assert abs(first["ratio/min"] - 1) <= 1e-3 and abs(first["ratio/max"] - 1) <= 1e-3


def test_dropout_is_switched_off_by_default(tok: Any, tmp_path: Path) -> None:
    model = make_gpt2(len(tok), dropout=0.1)
    rows = scored(make_gpt2(len(tok)), tok)
    assert len(dropout_modules(model)) >= 6
    trainer = attempt(model, rows, tok, tmp_path)
    assert trainer.step0["max"] <= 1e-3 and dropout_modules(trainer.model) == []


@pytest.mark.parametrize("kind", ["modules", "functional"])
def test_dropout_is_refused_and_named(kind: str, tok: Any, rows: Any, tmp_path: Path) -> None:
    """trl#3500: dropout in the policy alone. Nothing is trained."""
    if kind == "modules":
        rows = scored(make_gpt2(len(tok)), tok)
        model = make_gpt2(len(tok), dropout=0.1)
    else:
        model = make_llama(len(tok), attention_dropout=0.1)
    before = parameters(model)
    with pytest.raises(StepZeroError, match="dropout") as caught:
        attempt(model, rows, tok, tmp_path, disable_dropout=False)
    assert "line " in str(caught.value) and "0.1" in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in parameters(model).items())


def test_functional_dropout_is_found_and_switched_off(tok: Any) -> None:
    model = make_llama(len(tok), attention_dropout=0.25)
    assert any("attention_dropout" in name for name in dropout_modules(model))
    switch_off_dropout(model)
    assert dropout_modules(model) == []
    ids = torch.arange(3, 20)[None]
    model.train()
    a, b = model(ids).logits, model(ids).logits
    model.eval()
    assert torch.equal(a, b) and torch.equal(a, model(ids).logits)


def test_other_weights_are_refused(tok: Any, rows: Any, tmp_path: Path) -> None:
    model = make_llama(len(tok))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(StepZeroError, match="other weights"):
        attempt(model, rows, tok, tmp_path)
    # It is the user's to say that the policy is meant to start elsewhere.
    trainer = attempt(model, rows, tok, tmp_path, step0_gate=False)
    assert trainer.step0 is None and abs(trainer.state.log_history[0]["kl"]) > 1e-3


@pytest.mark.parametrize("fault", ["a hundredth of a nat", "shifted by one token", "nan"])
def test_scores_of_one_row_alone_are_enough(
    fault: str, tok: Any, rows: Any, tmp_path: Path
) -> None:
    """prime-rl#1525 among them: a ratio that compares different tokens."""
    logps = [row.clone() for row in rows.ref_logps]
    victim = int(rows.advantages.argmax())
    if fault == "nan":
        logps[victim][0] = float("nan")
    elif fault == "shifted by one token":
        logps = [torch.cat([row[1:], row[1:2]]) for row in logps]
    else:
        logps[victim][1] -= 0.01
    with pytest.raises(StepZeroError) as caught:
        attempt(make_llama(len(tok)), rows.with_columns(ref_logps=logps), tok, tmp_path)
    if fault == "a hundredth of a nat":
        assert f"line {rows.records[victim].line}:" in str(caught.value)
        assert "0.01 nats" in str(caught.value)


def test_other_tokenisation_is_named(tok: Any, tmp_path: Path) -> None:
    """Rows cut at other places than the scores: each token count agrees, the tokens do not."""
    model = make_llama(len(tok))
    short = scored(model, tok, max_prompt_length=3)
    whole = scored(model, tok)
    mixed = short.with_columns(ref_logps=whole.ref_logps)
    with pytest.raises(StepZeroError, match="tokenised otherwise"):
        attempt(make_llama(len(tok)), mixed, tok, tmp_path)


def test_temperature_of_the_scores_matters(tok: Any, tmp_path: Path) -> None:
    rows = scored(make_llama(len(tok)), tok, temperature=0.7)
    with pytest.raises(StepZeroError):
        attempt(make_llama(len(tok)), rows, tok, tmp_path / "a")
    trainer = attempt(make_llama(len(tok)), rows, tok, tmp_path / "b", temperature=0.7)
    assert trainer.step0["max"] <= 1e-3


@pytest.mark.parametrize("name", ["nll", "wbc", "a_lol_ref_free"])
def test_objectives_without_a_reference_need_no_gate(
    name: str, tok: Any, rows: Any, tmp_path: Path
) -> None:
    trainer = attempt(make_llama(len(tok), seed=3), rows, tok, tmp_path, objective=name)
    assert trainer.step0 is None and trainer.state.global_step == 2


def test_gate_leaves_the_random_stream_and_the_mode_alone(
    tok: Any, rows: Any, tmp_path: Path
) -> None:
    ends = []
    for gate in (True, False):
        trainer = attempt(make_llama(len(tok)), rows, tok, tmp_path / str(gate), step0_gate=gate)
        ends.append((torch.random.get_rng_state(), parameters(trainer.model)))
    assert torch.equal(ends[0][0], ends[1][0])
    assert all(torch.equal(v, ends[1][1][k]) for k, v in ends[0][1].items())


def test_gate_rows_are_spread_and_hold_the_longest(rows: Any) -> None:
    picked = gate_rows(rows, 5)
    assert {0, COUNT - 1, int(rows.lengths.argmax())} <= set(picked) and len(picked) in (5, 6)
    assert gate_rows(rows, 1000) == list(range(COUNT))


@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_sixteen_bits_are_named_and_can_be_allowed(kind: str, tok: Any, tmp_path: Path) -> None:
    """Noise of low precision is not taken for dropout or a stale cache."""

    def make() -> Any:
        model = make_llama(len(tok))
        return model.bfloat16() if kind == "weights" else model

    rows = scored(make(), tok)
    kw = {"bf16": kind == "autocast", "step0_rows": COUNT}
    with pytest.raises(StepZeroError, match="16-bit"):
        attempt(make(), rows, tok, tmp_path, **kw)
    trainer = attempt(make(), rows, tok, tmp_path, step0_tolerance=0.3, **kw)
    assert 1e-3 < trainer.step0["max"] <= 0.3


def test_mixed_precision_scores_agree_with_mixed_precision_training(
    tok: Any, tmp_path: Path
) -> None:
    """Scored by the trainer itself, in the batch shape of the gate, they agree to the bit or so."""
    rows = scored(make_llama(len(tok)), tok).with_columns(ref_logps=None)
    trainer = attempt(make_llama(len(tok)), rows, tok, tmp_path, bf16=True, step0_tolerance=0.05)
    assert trainer.step0["max"] <= 0.05
