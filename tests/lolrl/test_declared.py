"""What the objective declares and the user says: filter, sampling, options, columns, groups."""

import functools
from typing import Any

import pytest
import torch

import lolkernels as lk
from lolrl.config import ConfigError
from lolrl.data import DataError
from lolrl.prepare import check_columns
from tests.lolrl.toys import build, make_llama, row_logps, run

A_LOL = {n for n, fn in lk.objectives.REGISTRY.items() if lk.objectives.traits(fn).family}


def test_filter_sampling_and_options_are_what_the_objective_declares_or_the_user_says(
    rows, tokenizer, tmp_path
) -> None:
    def gradient(logps, advantages, seq, *, clip: float = 0.2, beta: float = 0.5):
        """A policy gradient learns from negative advantages too."""
        assert (clip, beta) in ((0.2, 0.5), (0.4, 0.5))
        return -advantages * seq.sum(logps)

    def made(function: Any = None, **kw: Any) -> Any:
        return build(tmp_path, rows, tokenizer, given={"objective": function}, **kw)

    def chosen(trainer: Any) -> tuple[Any, ...]:
        args = trainer.args
        return args.sampling, args.advantage_filter, args.clip, args.beta, args.floor

    own = made(gradient)
    assert chosen(own) == ("uniform", "none", 0.2, 0.5, "auto") and own.options == {}
    assert own.train_report["share_kept"] == 1.0
    own.train()  # the assertion inside sees the objective's own options
    said = made(gradient, clip=0.4, sampling="advantage", advantage_filter="positive")
    assert chosen(said) == ("advantage", "positive", 0.4, 0.5, "auto")
    assert said.options == {"clip": 0.4} and said.train_report["share_kept"] < 1
    by_mapping = made(objective_args={"clip": 0.3})
    assert chosen(by_mapping) == ("advantage", "positive", 0.3, "auto", "auto")
    bound = made(functools.partial(lk.objectives.a_lol, clip=0.7))
    assert chosen(bound)[:3] == ("advantage", "positive", 0.7)
    assert bound.objective_name == "a_lol"
    for objective, option in (("nll", "clip"), ("wbc", "beta"), ("a_lol", "floor")):
        with pytest.raises(ConfigError, match=f"{objective} has no option '{option}'"):
            made(objective=objective, **{option: 0.5})


def test_objectives_that_rows_cannot_feed_are_refused_before_training(
    rows, tokenizer, tmp_path
) -> None:
    fed = set()
    for name, fn in lk.objectives.REGISTRY.items():
        try:
            check_columns(dict(lk.side_inputs(fn)), name)
            fed.add(name)
        except ConfigError as error:
            assert f"objective {name} needs" in str(error)
    assert fed == {*A_LOL, "dpo", "ipo", "simpo", "pro"}
    with pytest.raises(ConfigError, match=r"gspo needs old_logps \(per token\).*data_collator"):
        run(tmp_path, rows, tokenizer, objective="gspo")


def test_negative_rewards_warn(rows, tokenizer, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(lk.objectives.warn_unlearned.__globals__, "_warned", set())
    assert float(rows.rewards.min()) < 0
    with pytest.warns(UserWarning, match="wbc got negative rewards"):
        run(tmp_path, rows, tokenizer, objective="wbc", max_steps=1)


PAIRS = [{"prompt": f"it moves {i} ", "chosen": f"me {i}", "rejected": "slowly"} for i in range(6)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_pairs_train_with_dpo(accumulation, tokenizer, tmp_path) -> None:
    """The update's gradient is that of the pairs' mean, from the model's own logits."""
    settings = {"objective": "dpo", "beta": 0.3, "group_size": 2, "max_steps": 1}
    settings |= {"per_device_train_batch_size": 8 // accumulation, "max_grad_norm": 0.0}
    settings |= {"gradient_accumulation_steps": accumulation}
    trainer = run(tmp_path, PAIRS, tokenizer, **settings)
    model = make_llama(len(tokenizer), dtype=torch.float64)
    items = [trainer.train_dataset[i] for i in list(trainer._sampler)[:8]]
    scores = [row_logps(model, x).sum() - x["ref_logps"].double().sum() for x in items]
    margin = torch.stack(scores[0::2]) - torch.stack(scores[1::2])
    loss = -torch.nn.functional.logsigmoid(0.3 * margin).mean()
    loss.backward()
    for key, parameter in model.named_parameters():
        theirs = parameter.grad
        assert (trainer.gradients[0][key] - theirs).abs().max() <= 1e-8 * theirs.abs().max() + 1e-12
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-8)


def test_rows_that_are_no_whole_groups_are_refused(rows, tokenizer, tmp_path) -> None:
    odd = [*PAIRS, {"prompt": "a ", "completion": "b"}]
    refused: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (rows, {}, DataError, "differs from that of its group of 2"),
        (odd, {}, DataError, "stands in a group of 1"),
        (PAIRS, {"group_size": 3}, ConfigError, "must hold whole groups of 3"),
        (PAIRS, {"on_bad": "skip"}, ConfigError, "on_bad='skip' would tear"),
        (rows, {"objective": "a_lol"}, ConfigError, "draws single rows"),
    ]
    for data, changes, error, message in refused:
        with pytest.raises(error, match=message):
            run(tmp_path, data, tokenizer, **{"objective": "simpo", "group_size": 2, **changes})
