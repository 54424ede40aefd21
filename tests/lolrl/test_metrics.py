"""The meter: every figure from hand-made batches, over ranks, and through a checkpoint."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lolkernels as lk
from lolrl.metrics import Meter

NAN = float("nan")


def batch(
    logps: list[list[float]],
    ref: list[list[float]] | None = None,
    metrics: dict[str, list[float]] | None = None,
    group_size: int = 1,
    **side: Any,
) -> tuple:
    """What the fused model and the collator give for rows of these token log-probs."""
    lengths = [len(row) for row in logps]
    width = 1 + max(lengths)
    mask = torch.zeros(len(logps), width, dtype=torch.bool)
    inputs: dict[str, torch.Tensor] = {}
    for i, n in enumerate(lengths):
        mask[i, 1 : 1 + n] = True
    inputs["completion_mask"] = mask
    inputs["attention_mask"] = torch.ones_like(mask, dtype=torch.long)
    if ref is not None:
        inputs["ref_logps"] = torch.zeros(mask.shape)
        inputs["ref_logps"][mask] = torch.tensor([x for row in ref for x in row])
    for name, values in side.items():
        inputs[name] = torch.tensor(values)
    flat = torch.tensor([x for row in logps for x in row])
    out = SimpleNamespace(
        loss=torch.tensor(1.5),
        logps=flat,
        entropy=-2 * flat,
        seq=lk.Sequences.from_lengths(lengths, group_size=group_size),
    )
    if metrics is not None:
        out.metrics = {name: torch.tensor(values) for name, values in metrics.items()}
    return out, inputs


def alone(x: torch.Tensor) -> torch.Tensor:
    return x


def line(*batches: tuple) -> dict[str, float]:
    m = Meter("cpu")
    for out, inputs in batches:
        m.add(out, inputs)
    return m.pop(alone)


LOGPS = [[-1.0, -2.0], [-3.0], [-0.5, -0.5, -0.5]]
REF = [[-1.5, -1.5], [-0.5], [-1.0, -1.0, -0.2]]
RATIOS = [1.0, math.exp(-2.5), math.exp(0.7)]


def test_figures_of_a_batch() -> None:
    side = {"advantages": [1.0, -0.5, 2.0], "rewards": [1.0, 0.0, 0.5]}
    logs = line(batch(LOGPS, REF, {"clipped": [0.0, 1.0, 1.0]}, **side))
    expected = {"ratio/min": min(RATIOS), "ratio/max": max(RATIOS), "ratio/mean": sum(RATIOS) / 3}
    expected |= {"kl": (0.0 - 2.5 + 0.7) / 3, "clip_ratio": 2 / 3, "logps/mean": -7.5 / 6}
    expected |= {"entropy": 15 / 6, "advantage/mean": 2.5 / 3, "positive_share": 2 / 3}
    assert {name: logs[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    exact = logs["reward/mean"], logs["completion_tokens"], logs["loss"], logs["num_tokens"]
    assert exact == (0.5, 6, 1.5, 12)


def test_what_the_objective_reports_is_logged_and_not_computed_again() -> None:
    reported = {"log_ratio": [0.5, -0.5, NAN], "unlearned": [1.0, 0.0, 0.0]}
    reported["margin"] = [1.0, 2.0, 6.0]
    logs = line(batch(LOGPS, REF, reported))
    assert logs["kl"] == 0.0 and logs["ratio/max"] == pytest.approx(math.exp(0.5))
    assert logs["unlearned_share"] == pytest.approx(1 / 3) and logs["objective/margin"] == 3.0
    assert "clip_ratio" not in logs


def test_an_objective_without_metrics_or_reference_logs_none() -> None:
    for metrics in (None, {}):
        logs = line(batch(LOGPS, None, metrics))
        assert not {"kl", "ratio/mean", "ratio/min", "clip_ratio", "unlearned_share"} & set(logs)


def test_metrics_of_groups_are_one_per_group() -> None:
    rows = [[-1.0], [-2.0], [NAN], [NAN]]
    logs = line(batch(rows, None, {"margin": [3.0, 9.0]}, group_size=2))
    assert logs["objective/margin"] == 3.0  # the second pair was not scored


def test_skipped_and_empty_sequences_are_not_averaged() -> None:
    """A row without weight is not scored (NaN), a row without tokens does not exist."""
    logs = line(
        batch(
            [[-1.0, -2.0], [NAN, NAN], []],
            [[-1.0, -1.0], [-9.0, -9.0], []],
            {"clipped": [1.0, 0.0, 0.0]},
            advantages=[1.0, -3.0, 7.0],
        )
    )
    assert logs["logps/mean"] == -1.5 and logs["kl"] == -1.0 and logs["clip_ratio"] == 1.0
    assert logs["ratio/min"] == logs["ratio/max"] == pytest.approx(math.exp(-1))
    assert logs["advantage/mean"] == -1.0 and logs["positive_share"] == 0.5
    logs = line(batch([[NAN]], [[-1.0]], advantages=[-1.0]))
    assert "ratio/mean" not in logs and "kl" not in logs and "logps/mean" not in logs


def test_advantages_per_token_are_not_averaged_over_sequences() -> None:
    assert "advantage/mean" not in line(batch([[-1.0]], advantages=[[0.0, 2.0]]))


def test_huge_ratios_stay_finite() -> None:
    logs = line(batch([[-1.0], [-1e6]], [[-1e6], [-1.0]]))
    assert math.isfinite(logs["ratio/mean"]) and logs["ratio/max"] > 1e300
    assert 0 < logs["ratio/min"] < 1e-300
    json.dumps(logs, allow_nan=False)


def test_micro_batches_updates_and_ranks() -> None:
    """Loss adds over micro-batches, and averages over updates and ranks; extremes over all."""
    one, two = Meter("cpu"), Meter("cpu")
    for ref in (-1.0, -2.0, -1.5, -3.0):
        one.add(*batch([[-1.0]], [[ref]]))
    one.updates = 2
    two.add(*batch([[-1.0]], [[4.0]]))
    kept: list[torch.Tensor] = []
    two.pop(lambda mine: kept.append(mine) or mine)
    logs = one.pop(lambda mine: torch.cat([mine, kept[0]]))
    assert logs["loss"] == pytest.approx((4 * 1.5 + 1.5) / 2 / 2)
    assert logs["ratio/min"] == pytest.approx(math.exp(-5), rel=1e-6)
    assert logs["ratio/max"] == pytest.approx(math.exp(2), rel=1e-6)
    assert logs["kl"] == pytest.approx((0.0 + 1.0 + 0.5 + 2.0 - 5.0) / 5)
    assert logs["completion_tokens"] == 5 and logs["num_tokens"] == 10
    # The next line starts from nothing, but tokens go on counting.
    one.add(*batch([[-1.0]], [[-1.0]]))
    again = one.pop(alone)
    assert again["ratio/max"] == 1.0 and again["num_tokens"] == 12


def test_state_survives_json_exactly() -> None:
    first, second = Meter("cpu"), Meter("cpu")
    first.add(*batch(LOGPS, REF, {"margin": [0.1, 0.2, 0.4]}, advantages=[0.1, 0.2, 0.3]))
    first.updates, first.skipped_steps = 3, 1
    second.load(json.loads(json.dumps(first.state(alone), allow_nan=False)))
    for m in (first, second):
        m.add(*batch([[-0.3]], [[-0.7]], {"margin": [0.3]}, advantages=[0.7]))
    a, b = first.pop(alone), second.pop(alone)
    assert a.keys() == b.keys() and "objective/margin" in a
    for name in a:
        if name not in ("tokens_per_second", "step_time"):
            assert a[name] == b[name], name
    assert b["skipped_steps"] == 1.0
    fresh = Meter("cpu")
    fresh.load(json.loads(json.dumps(fresh.state(alone), allow_nan=False)))
    assert math.isinf(float(fresh.low)) and math.isinf(float(fresh.high))


def test_after_a_resume_the_main_rank_goes_on_with_the_sums_of_all() -> None:
    first, main, other = Meter("cpu"), Meter("cpu"), Meter("cpu")
    first.add(*batch([[-1.0]], [[-3.0]]))
    both = first.state(lambda mine: torch.cat([mine, mine]))
    main.load(both)
    other.load(both, main=False)
    assert other.sums.keys() == main.sums.keys()  # gathering needs the same names
    assert float(main.sums["loss"][0]) == 3.0
    assert all(float(pair.abs().sum()) == 0.0 for pair in other.sums.values())
    assert math.isinf(float(other.high)) and float(main.high) == pytest.approx(math.exp(2))
    state = first.state(alone)
    for damage in ({"sums": ["1"]}, {"low": "x"}, {"sums": {"a": 1}}):
        with pytest.raises(ValueError, match="counters"):
            Meter("cpu").load({**state, **damage})
    with pytest.raises(ValueError, match="counters"):
        Meter("cpu").load({})
