"""The value head: what it computes, what it learns, and what it must not look at."""

import math
from typing import Any

import pytest
import torch

from lolrl.config import ValueConfig
from lolrl.value import ValueHead, _batch, backbone, fit_value_head, predict_values, prompt_states

RANGE = {"min_value": -1.0, "max_value": 2.0}


def make_head(**kw: Any) -> ValueHead:
    torch.manual_seed(1)
    return ValueHead(32, ValueConfig(**{**RANGE, **kw})).eval()


def by_hand(head: ValueHead, states: torch.Tensor) -> float:
    """The formula of the docstring in float64, one head at a time, for one prompt (T, D)."""
    d, heads = 32, head.config.num_heads
    width = d // heads
    x = states.double()
    weight, bias = head.attention.in_proj_weight.double(), head.attention.in_proj_bias.double()
    q = head.query.double().reshape(1, d) @ weight[:d].T + bias[:d]
    k, v = x @ weight[d : 2 * d].T + bias[d : 2 * d], x @ weight[2 * d :].T + bias[2 * d :]
    parts = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        share = torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(width), -1)
        parts.append(share @ v[:, part])
    out = head.attention.out_proj
    pooled = torch.cat(parts, -1) @ out.weight.double().T + out.bias.double()
    score = pooled @ head.linear.weight.double().T + head.linear.bias.double()
    return float(-1.0 + 3.0 * torch.sigmoid(score).detach())


def test_formula_and_mask() -> None:
    head = make_head()
    states = [torch.randn(n, 32) for n in (1, 4, 9)]
    hidden, mask = _batch(states)
    expected = torch.tensor([by_hand(head, s) for s in states])
    assert (head(hidden, mask) - expected).abs().max() < 1e-6
    # What stands at padded places does not matter, however large.
    hidden[~mask] = 1e30
    assert torch.equal(head(hidden, mask), head(_batch(states)[0], mask))
    # It would matter without the mask.
    assert (head(_batch(states)[0], torch.ones_like(mask)) - expected).abs().max() > 1e-3


def test_values_stay_in_their_range() -> None:
    head = make_head()
    with torch.no_grad():
        head.linear.weight.fill_(1e4)
    values = head(torch.randn(50, 3, 32), torch.ones(50, 3, dtype=torch.bool)).detach()
    assert float(values.min()) >= -1.0 and float(values.max()) <= 2.0
    assert float(values.max() - values.min()) > 2.9


def test_dropout_acts_in_training_only() -> None:
    head = make_head(dropout=0.5)
    hidden, mask = torch.randn(4, 3, 32), torch.ones(4, 3, dtype=torch.bool)
    assert torch.equal(head(hidden, mask), head(hidden, mask))
    head.train()
    assert not torch.equal(head(hidden, mask), head(hidden, mask))


def test_prompt_states_are_the_backbone_s(llama, tokenizer) -> None:
    llama.train()
    prompts = ["the movie", "a dull story with a bright end", "x"]
    states = prompt_states(llama, tokenizer, prompts, batch_size=2)
    assert llama.training and llama.model.layers[0].training  # modes are put back
    llama.eval()
    for prompt, mine in zip(prompts, states, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            theirs = llama(ids, output_hidden_states=True).hidden_states[-1][0]
        assert mine.shape == theirs.shape and (mine - theirs).abs().max() < 1e-5
        assert not mine.requires_grad
    with pytest.raises(ValueError, match="backbone"):
        backbone(llama.model)


def planted(count: int) -> tuple[list[str], list[float]]:
    """Rewards of both signs that a reader of the prompt can know."""
    words = {"good": 1.5, "dull": -2.0, "long": 0.5}
    prompts = [
        f"{w} {['movie', 'story', 'end'][i % 3]} {i % 5}" for i in range(count) for w in words
    ]
    return prompts, [words[p.split()[0]] + 0.1 * (-1) ** i for i, p in enumerate(prompts)]


def test_fit_learns_a_planted_function(llama, tokenizer) -> None:
    prompts, rewards = planted(30)
    config = ValueConfig(epochs=25, learning_rate=3e-3, num_heads=4)
    head, report = fit_value_head(llama, tokenizer, prompts, rewards, config=config)
    assert report.r2 > 0.9 and report.mse < 0.1 * report.mse_mean
    assert (head.config.min_value, head.config.max_value) == (min(rewards), max(rewards))
    assert not head.training and not any(p.requires_grad for p in head.parameters())
    # The epoch is the held-out part's choice.
    assert report.epoch == min(report.curve, key=lambda point: point[2])[0] > 0
    assert math.isclose(report.mse, min(point[2] for point in report.curve), rel_tol=1e-6)
    assert report.num_held_out == 18 and report.num_train == 72
    fresh = predict_values(head, llama, tokenizer, ["good end 9", "dull movie 9", "good end 9"])
    assert fresh[0] > 1.0 and fresh[1] < -1.5 and fresh[0] == fresh[2]
    assert fresh.dtype == torch.float64


def test_noise_is_not_worse_than_the_mean(llama, tokenizer) -> None:
    """Where nothing can be learnt the epoch chosen is the untrained one: the training mean."""
    torch.manual_seed(3)
    prompts = [f"movie {i}" for i in range(40)]
    rewards = torch.randn(40)
    config = ValueConfig(epochs=6, learning_rate=1e-1)
    head, report = fit_value_head(llama, tokenizer, prompts, rewards, config=config)
    assert report.r2 >= -1e-6
    first = report.curve[0]
    assert first[0] == 0 and math.isclose(first[2], report.mse_mean, rel_tol=1e-4)
    if report.epoch == 0:
        values = predict_values(head, llama, tokenizer, prompts)
        assert float(values.max() - values.min()) < 1e-6


def test_fit_is_seeded_and_draws_from_its_own_stream(llama, tokenizer) -> None:
    def fit(seed: int = 0) -> tuple[ValueHead, Any]:
        config = ValueConfig(epochs=2, num_heads=4, seed=seed)
        return fit_value_head(llama, tokenizer, *planted(8), config=config)

    state = torch.random.get_rng_state()
    first, one = fit()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(17)
    second, two = fit()
    assert one.curve == two.curve
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert fit(seed=1)[1].curve != one.curve


def test_predictions_do_not_depend_on_batching(llama, tokenizer) -> None:
    head = make_head(num_heads=4)
    prompts = planted(9)[0]
    one = predict_values(head, llama, tokenizer, prompts, batch_size=1)
    many = predict_values(head, llama, tokenizer, prompts, batch_size=8)
    assert (one - many).abs().max() < 1e-5
    assert float(one.max() - one.min()) > 1e-3


def test_save_and_load(tmp_path) -> None:
    head = make_head(num_heads=4, dropout=0.25)
    path = head.save(tmp_path)
    back = ValueHead.load(tmp_path)
    assert back.config == head.config and not back.training
    hidden, mask = torch.randn(3, 4, 32), torch.ones(3, 4, dtype=torch.bool)
    assert torch.equal(head(hidden, mask), back(hidden, mask))
    data = path.read_bytes()
    flipped = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
    half, pickled = data[: len(data) // 2], b"\x80\x04\x95pickle"
    for damaged in (flipped, half, data[:7], b"", pickled, data[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be loaded"):
            ValueHead.load(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        ValueHead.load(tmp_path)


def test_bad_fits(llama, tokenizer) -> None:
    bad: list[tuple[dict[str, Any], list[float], str]] = [
        ({}, [1.0, 2.0, 3.0], "at least 4"),
        ({}, [1.0, 1.0, 1.0, 1.0], "all 1.0"),
        ({}, [1.0, 2.0, math.nan, 1.0], r"rewards\[2\]"),
        ({"max_value": 2.0}, [1.0, 2.0, 3.0, 4.0], "widen"),
        ({"num_heads": 5}, [1.0, 2.0, 3.0, 4.0], "num_heads"),
    ]
    for changes, rewards, message in bad:
        prompts = ["a", "b", "c", "d"][: len(rewards)]
        with pytest.raises(ValueError, match=message):
            fit_value_head(llama, tokenizer, prompts, rewards, config=ValueConfig(**changes))
    with pytest.raises(ValueError, match="one for each"):
        fit_value_head(llama, tokenizer, ["a"] * 5, [1.0] * 4)
    with pytest.raises(ValueError, match="min_value"):
        ValueHead(32, ValueConfig())
