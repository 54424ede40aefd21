"""Before the first update the policy is the reference, or training does not start."""

from typing import Any

import pytest
import torch

from lolrl.annotate import annotate
from lolrl.config import AnnotateConfig
from lolrl.gate import StepZeroError, dropout_modules, gate_rows, switch_off_dropout
from lolrl.tokens import LoLDataset
from tests.lolrl.toys import make_gpt2, make_llama, make_rows, parameters, run, same_parameters

COUNT = 24


def scored(model: Any, tok: Any, **kw: Any) -> LoLDataset:
    config = AnnotateConfig(**{"keep": "all", "batch_size": 5, **kw})
    return annotate(model, tok, make_rows(COUNT), config=config, progress=False).dataset


def attempt(model: Any, rows: Any, tok: Any, folder: Any, **kw: Any) -> Any:
    return run(folder, rows, tok, model=model, **kw)


@pytest.mark.parametrize(("make", "sizes"), [(make_llama, (1, 7)), (make_gpt2, (2, 16))])
def test_same_weights_pass_in_any_batch_shape(make, sizes, tokenizer, tmp_path) -> None:
    """|sum log-ratio| <= 1e-3 nat on each row, in a batch shape the scores were not made with."""
    rows = scored(make(len(tokenizer)), tokenizer)
    options = {"advantage_filter": "none", "step0_rows": COUNT}
    for size in sizes:
        options["per_device_train_batch_size"] = size
        trainer = attempt(make(len(tokenizer)), rows, tokenizer, tmp_path / str(size), **options)
        assert trainer.step0["rows"] == COUNT and trainer.step0["max"] <= 1e-3
        first = trainer.state.log_history[0]
        assert abs(first["ratio/min"] - 1) <= 1e-3 and abs(first["ratio/max"] - 1) <= 1e-3


@pytest.mark.parametrize("kind", ["modules", "functional"])
def test_dropout_is_refused_and_named(kind, tokenizer, rows, tmp_path) -> None:
    """trl#3500: dropout in the policy alone. Nothing is trained."""
    if kind == "modules":
        rows = scored(make_gpt2(len(tokenizer)), tokenizer)
        model = make_gpt2(len(tokenizer), dropout=0.1)
    else:
        model = make_llama(len(tokenizer), attention_dropout=0.1)
    before = parameters(model)
    assert kind == "functional" or len(dropout_modules(model)) >= 6
    with pytest.raises(StepZeroError, match=r"line .*0\.1.*dropout|line .*dropout.*0\.1"):
        attempt(model, rows, tokenizer, tmp_path, disable_dropout=False)
    assert all(torch.equal(v, before[k]) for k, v in parameters(model).items())
    # By default it is switched off.
    trainer = attempt(model, rows, tokenizer, tmp_path)
    assert trainer.step0["max"] <= 1e-3 and dropout_modules(trainer.model) == []


def test_functional_dropout_is_found_and_switched_off(tokenizer) -> None:
    model = make_llama(len(tokenizer), attention_dropout=0.25)
    assert any("attention_dropout" in name for name in dropout_modules(model))
    switch_off_dropout(model)
    assert dropout_modules(model) == []
    ids = torch.arange(3, 20)[None]
    model.train()
    a, b = model(ids).logits, model(ids).logits
    model.eval()
    assert torch.equal(a, b) and torch.equal(a, model(ids).logits)


def test_other_weights_are_refused(tokenizer, rows, tmp_path) -> None:
    model = make_llama(len(tokenizer))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(StepZeroError, match="other weights"):
        attempt(model, rows, tokenizer, tmp_path)
    # It is the user's to say that the policy is meant to start elsewhere.
    trainer = attempt(model, rows, tokenizer, tmp_path, step0_gate=False)
    assert trainer.step0 is None and abs(trainer.state.log_history[0]["kl"]) > 1e-3


@pytest.mark.parametrize("fault", ["a hundredth of a nat", "shifted by one token", "nan"])
def test_scores_of_one_row_alone_are_enough(fault, tokenizer, rows, tmp_path) -> None:
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
        attempt(make_llama(len(tokenizer)), rows.with_columns(ref_logps=logps), tokenizer, tmp_path)
    if fault == "a hundredth of a nat":
        assert f"line {rows.records[victim].line}:" in str(caught.value)
        assert "0.01 nats" in str(caught.value)


def test_other_tokenisation_is_named(tokenizer, tmp_path) -> None:
    """Rows cut at other places than the scores: each token count agrees, the tokens do not."""
    model = make_llama(len(tokenizer))
    short = scored(model, tokenizer, max_prompt_length=3)
    whole = scored(model, tokenizer)
    mixed = short.with_columns(ref_logps=whole.ref_logps)
    with pytest.raises(StepZeroError, match="tokenised otherwise"):
        attempt(make_llama(len(tokenizer)), mixed, tokenizer, tmp_path)


def test_temperature_of_the_scores_matters(tokenizer, tmp_path) -> None:
    rows = scored(make_llama(len(tokenizer)), tokenizer, temperature=0.7)
    with pytest.raises(StepZeroError):
        attempt(make_llama(len(tokenizer)), rows, tokenizer, tmp_path / "a")
    trainer = attempt(make_llama(len(tokenizer)), rows, tokenizer, tmp_path / "b", temperature=0.7)
    assert trainer.step0["max"] <= 1e-3


@pytest.mark.parametrize("name", ["nll", "wbc", "a_lol_ref_free"])
def test_objectives_without_a_reference_need_no_gate(name, tokenizer, rows, tmp_path) -> None:
    trainer = attempt(make_llama(len(tokenizer), seed=3), rows, tokenizer, tmp_path, objective=name)
    assert trainer.step0 is None and trainer.state.global_step == 2


def test_gate_leaves_the_random_stream_and_the_mode_alone(tokenizer, rows, tmp_path) -> None:
    ends = []
    for gate in (True, False):
        trainer = attempt(
            make_llama(len(tokenizer)), rows, tokenizer, tmp_path / str(gate), step0_gate=gate
        )
        ends.append((torch.random.get_rng_state(), trainer.model))
    assert torch.equal(ends[0][0], ends[1][0])
    same_parameters(ends[0][1], ends[1][1])


def test_gate_rows_are_spread_and_hold_the_longest(rows) -> None:
    picked = gate_rows(rows, 5)
    assert {0, 26, int(rows.lengths.argmax())} <= set(picked) and len(picked) in (5, 6)
    assert gate_rows(rows, 1000) == list(range(27))


@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_sixteen_bits_are_named_and_can_be_allowed(kind, tokenizer, tmp_path) -> None:
    """Noise of low precision is not taken for dropout or a stale cache."""

    def make() -> Any:
        model = make_llama(len(tokenizer))
        return model.bfloat16() if kind == "weights" else model

    rows = scored(make(), tokenizer)
    kw = {"bf16": kind == "autocast", "step0_rows": COUNT}
    with pytest.raises(StepZeroError, match="16-bit"):
        attempt(make(), rows, tokenizer, tmp_path, **kw)
    trainer = attempt(make(), rows, tokenizer, tmp_path, step0_tolerance=0.3, **kw)
    assert 1e-3 < trainer.step0["max"] <= 0.3


def test_mixed_precision_scores_agree_with_mixed_precision_training(tokenizer, tmp_path) -> None:
    """Scored by the trainer itself, in the batch shape of the gate, they agree to the bit or so."""
    rows = scored(make_llama(len(tokenizer)), tokenizer).with_columns(ref_logps=None)
    trainer = attempt(
        make_llama(len(tokenizer)), rows, tokenizer, tmp_path, bf16=True, step0_tolerance=0.05
    )
    assert trainer.step0["max"] <= 0.05
