"""What the objective declares and the user says: filter, sampling, options, columns, groups."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch

import lolkernels as lk
from lolrl.annotate import annotate
from lolrl.config import AnnotateConfig, ConfigError
from lolrl.data import DataError
from lolrl.prepare import check_columns
from lolrl.tokens import LoLDataset
from lolrl.trainer import LoLTrainer
from tests.lolrl.toys import make_config, make_llama, make_rows, make_tokenizer, run

A_LOL = {n for n, fn in lk.objectives.REGISTRY.items() if lk.objectives.traits(fn).family}
GROUPS = "group_size" in inspect.signature(lk.LogprobHead.forward).parameters


@pytest.fixture(scope="module")
def tok() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def rows(tok: Any) -> LoLDataset:
    """27 annotated rows, of which some have a negative advantage; scores by the float64 model."""
    model = make_llama(len(tok), dtype=torch.float64)
    config = AnnotateConfig(keep="all")
    return annotate(model, tok, make_rows(27), config=config, progress=False).dataset


def test_filter_sampling_and_options_are_what_the_objective_declares_or_the_user_says(
    rows, tok, tmp_path
) -> None:
    def gradient(logps, advantages, seq, *, clip: float = 0.2, beta: float = 0.5):
        """A policy gradient learns from negative advantages too."""
        assert (clip, beta) in ((0.2, 0.5), (0.4, 0.5))
        return -advantages * seq.sum(logps)

    def build(function: Any = None, **kw: Any) -> LoLTrainer:
        return LoLTrainer(
            make_llama(len(tok)),
            args=make_config(tmp_path, **kw),
            train_dataset=rows,
            processing_class=tok,
            objective=function,
        )

    def chosen(trainer: LoLTrainer) -> tuple[Any, ...]:
        args = trainer.args
        return args.sampling, args.advantage_filter, args.clip, args.beta, args.floor

    own = build(gradient)
    assert chosen(own) == ("uniform", "none", 0.2, 0.5, "auto") and own.options == {}
    assert own.train_report["share_kept"] == 1.0
    own.train()  # the assertion inside sees the objective's own options
    said = build(gradient, clip=0.4, sampling="advantage", advantage_filter="positive")
    assert chosen(said) == ("advantage", "positive", 0.4, 0.5, "auto")
    assert said.options == {"clip": 0.4} and said.train_report["share_kept"] < 1
    assert chosen(build(objective_args={"clip": 0.3})) == (
        "advantage", "positive", 0.3, "auto", "auto",
    )  # fmt: skip
    bound = build(functools.partial(lk.objectives.a_lol, clip=0.7))
    assert chosen(bound)[:3] == ("advantage", "positive", 0.7)
    assert bound.objective_name == "a_lol"
    for objective, option in (("nll", "clip"), ("wbc", "beta"), ("a_lol", "floor")):
        with pytest.raises(ConfigError, match=f"{objective} has no option '{option}'"):
            build(objective=objective, **{option: 0.5})


def test_objectives_that_rows_cannot_feed_are_refused_before_training(rows, tok, tmp_path) -> None:
    fed = set()
    for name, fn in lk.objectives.REGISTRY.items():
        try:
            check_columns(dict(lk.side_inputs(fn)), name)
            fed.add(name)
        except ConfigError as error:
            assert f"objective {name} needs" in str(error)
    assert fed == {*A_LOL, "dpo", "ipo", "simpo", "pro"}
    with pytest.raises(ConfigError, match=r"gspo needs old_logps \(per token\).*data_collator"):
        run(tmp_path, rows, tok, objective="gspo")


def test_negative_rewards_warn(rows, tok, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(lk.objectives.warn_unlearned.__globals__, "_warned", set())
    assert float(rows.rewards.min()) < 0
    with pytest.warns(UserWarning, match="wbc got negative rewards"):
        run(tmp_path, rows, tok, objective="wbc", max_steps=1)


PAIRS = [{"prompt": f"it moves {i} ", "chosen": f"me {i}", "rejected": "slowly"} for i in range(6)]


@pytest.mark.skipif(not GROUPS, reason="the fused model takes no group_size")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_pairs_train_with_dpo(accumulation, tok, tmp_path) -> None:
    """The update's gradient is that of the pairs' mean, from the model's own logits."""
    trainer = run(
        tmp_path, PAIRS, tok, objective="dpo", beta=0.3, group_size=2, max_steps=1,
        per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
    )  # fmt: skip
    index = list(trainer._sampler)[:8]
    model = make_llama(len(tok), dtype=torch.float64)
    data, scores = trainer.train_dataset, []
    for i in index:
        item = data[i]
        ids, p = item["input_ids"], item["prompt_length"]
        logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)[:-1]
        l = logps.gather(1, ids[1:, None])[p - 1 :, 0]  # noqa: E741
        scores.append(l.sum() - item["ref_logps"].double().sum())
    margin = torch.stack(scores[0::2]) - torch.stack(scores[1::2])
    loss = -torch.nn.functional.logsigmoid(0.3 * margin).mean()
    loss.backward()
    for key, parameter in model.named_parameters():
        theirs = parameter.grad
        assert (trainer.gradients[0][key] - theirs).abs().max() <= 1e-8 * theirs.abs().max() + 1e-12
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-8)


def test_rows_that_are_no_whole_groups_are_refused(rows, tok, tmp_path) -> None:
    def attempt(data: Any, **kw: Any) -> None:
        run(tmp_path, data, tok, objective="simpo", **{"group_size": 2, **kw})

    with pytest.raises(DataError, match="differs from that of its group of 2"):
        attempt(rows)
    with pytest.raises(DataError, match="stands in a group of 1"):
        attempt([*PAIRS, {"prompt": "a ", "completion": "b"}])
    with pytest.raises(ConfigError, match="must hold whole groups of 3"):
        attempt(PAIRS, group_size=3)
    with pytest.raises(ConfigError, match="on_bad='skip' would tear"):
        attempt(PAIRS, on_bad="skip")
    with pytest.raises(ConfigError, match="draws single rows"):
        run(tmp_path, rows, tok, objective="a_lol", group_size=2)
