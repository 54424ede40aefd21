"""The meter: every figure from hand-made batches, over ranks, and through a checkpoint."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lolkernels as lk
from lolrl.metrics import Meter

NAN = float("nan")


def batch(logps: list[list[float]], ref: list[list[float]] | None = None, **side: Any) -> tuple:
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
        seq=lk.Sequences.from_lengths(lengths),
    )
    return out, inputs


def alone(x: torch.Tensor) -> torch.Tensor:
    return x


def meter(objective: str, clip: float | None = 0.9, beta: float = 0.1) -> Meter:
    return Meter(objective, clip=clip, beta=beta, device="cpu")


LOGPS = [[-1.0, -2.0], [-3.0], [-0.5, -0.5, -0.5]]
REF = [[-1.5, -1.5], [-0.5], [-1.0, -1.0, -0.2]]
RATIOS = [1.0, math.exp(-2.5), math.exp(0.7)]  # below the bounds, and above


def test_sequence_ratio_and_both_sides_of_the_clip() -> None:
    m = meter("a_lol")
    m.add(*batch(LOGPS, REF, advantages=[1.0, -0.5, 2.0], rewards=[1.0, 0.0, 0.5]))
    m.updates = 1
    logs = m.pop(alone)
    assert logs["ratio/min"] == pytest.approx(RATIOS[1], rel=1e-6)
    assert logs["ratio/max"] == pytest.approx(RATIOS[2], rel=1e-6)
    assert logs["ratio/mean"] == pytest.approx(sum(RATIOS) / 3, rel=1e-6)
    # 0.082 < 0.1 and 2.01 > 1.9: one on either side.
    assert logs["clip_ratio"] == pytest.approx(2 / 3)
    assert logs["kl"] == pytest.approx((0.0 - 2.5 + 0.7) / 3, rel=1e-6)
    assert logs["logps/mean"] == pytest.approx(-7.5 / 6)
    assert logs["entropy"] == pytest.approx(15 / 6)
    assert logs["advantage/mean"] == pytest.approx(2.5 / 3)
    assert logs["positive_share"] == pytest.approx(2 / 3)
    assert logs["reward/mean"] == 0.5 and logs["completion_tokens"] == 6
    assert logs["loss"] == 1.5 and logs["num_tokens"] == 12


def test_token_ratio() -> None:
    m = meter("a_lol_seq")
    m.add(*batch(LOGPS, REF))
    tokens = [
        math.exp(a - b) for x, y in zip(LOGPS, REF, strict=True) for a, b in zip(x, y, strict=True)
    ]
    logs = m.pop(alone)
    assert logs["ratio/mean"] == pytest.approx(sum(tokens) / 6, rel=1e-6)
    assert logs["ratio/min"] == pytest.approx(min(tokens), rel=1e-6)
    outside = sum(t < 0.1 or t > 1.9 for t in tokens)
    assert outside == 1 and logs["clip_ratio"] == pytest.approx(outside / 6)
    assert logs["kl"] == pytest.approx(-1.8 / 3, rel=1e-6)


def test_without_clip_nothing_is_clipped_and_others_do_not_say() -> None:
    for objective, clip, expected in (("a_lol", None, 0.0), ("nll", 0.9, None)):
        m = meter(objective, clip)
        m.add(*batch(LOGPS, REF))
        assert m.pop(alone).get("clip_ratio") == expected


@pytest.mark.parametrize(
    ("objective", "column", "share"),
    [
        ("a_lol_kl", "advantages", 2 / 4),
        ("r_lol_kl", "rewards", 2 / 4),
        ("a_lol", "advantages", None),
    ],
)
def test_unlearned_share(objective: str, column: str, share: float | None) -> None:
    m = meter(objective, beta=0.25)
    m.add(*batch([[-1.0]] * 4, [[-1.0]] * 4, **{column: [-1.0, 0.2, 0.3, 4.0]}))
    assert m.pop(alone).get("unlearned_share") == share


def test_skipped_and_empty_sequences_are_not_averaged() -> None:
    """A row without weight is not scored (NaN), a row without tokens does not exist."""
    m = meter("a_lol")
    m.add(
        *batch(
            [[-1.0, -2.0], [NAN, NAN], []],
            [[-1.0, -1.0], [-9.0, -9.0], []],
            advantages=[1.0, -3.0, 7.0],
        )
    )
    logs = m.pop(alone)
    assert logs["logps/mean"] == -1.5 and logs["kl"] == -1.0
    assert logs["ratio/min"] == logs["ratio/max"] == pytest.approx(math.exp(-1))
    assert logs["advantage/mean"] == -1.0 and logs["positive_share"] == 0.5
    only_skipped = meter("a_lol")
    only_skipped.add(*batch([[NAN]], [[-1.0]], advantages=[-1.0]))
    logs = only_skipped.pop(alone)
    assert "ratio/mean" not in logs and "kl" not in logs and "logps/mean" not in logs


def test_huge_ratios_stay_finite() -> None:
    m = meter("a_lol")
    m.add(*batch([[-1.0], [-1e6]], [[-1e6], [-1.0]]))
    logs = m.pop(alone)
    assert math.isfinite(logs["ratio/mean"]) and logs["ratio/max"] > 1e300
    assert 0 < logs["ratio/min"] < 1e-300 and logs["clip_ratio"] == 1.0
    json.dumps(logs, allow_nan=False)


def test_micro_batches_updates_and_ranks() -> None:
    """Loss adds over micro-batches, and averages over updates and ranks; extremes over all."""
    one = meter("a_lol")
    for ref in (-1.0, -2.0, -1.5, -3.0):
        one.add(*batch([[-1.0]], [[ref]]))
    one.updates = 2
    two = meter("a_lol")
    two.add(*batch([[-1.0]], [[4.0]]))
    other = torch.cat([two.sums, two.low[None], two.high[None]])[None]
    logs = one.pop(lambda mine: torch.cat([mine, other]))
    assert logs["loss"] == pytest.approx((4 * 1.5 + 1.5) / 2 / 2)
    assert logs["ratio/min"] == pytest.approx(math.exp(-5), rel=1e-6)
    assert logs["ratio/max"] == pytest.approx(math.exp(2), rel=1e-6)
    assert logs["completion_tokens"] == 5 and logs["num_tokens"] == 10
    # The next line starts from nothing, but tokens go on counting.
    one.add(*batch([[-1.0]], [[-1.0]]))
    again = one.pop(alone)
    assert again["ratio/max"] == 1.0 and again["num_tokens"] == 12


def test_state_survives_json_exactly() -> None:
    first, second = meter("a_lol"), meter("a_lol")
    first.add(*batch(LOGPS, REF, advantages=[0.1, 0.2, 0.3]))
    first.updates, first.skipped_steps = 3, 1
    second.load(json.loads(json.dumps(first.state(alone), allow_nan=False)))
    for m in (first, second):
        m.add(*batch([[-0.3]], [[-0.7]], advantages=[0.7]))
    a, b = first.pop(alone), second.pop(alone)
    for name in a:
        if name not in ("tokens_per_second", "step_time"):
            assert a[name] == b[name], name
    assert b["skipped_steps"] == 1.0
    fresh = meter("a_lol")
    fresh.load(json.loads(json.dumps(fresh.state(alone), allow_nan=False)))
    assert math.isinf(float(fresh.low)) and math.isinf(float(fresh.high))
    # Of several ranks the main one goes on with the sums of all, the others with none.
    ranks = first.state(lambda mine: torch.cat([mine, mine]))
    main, other = meter("a_lol"), meter("a_lol")
    first.add(*batch([[-1.0]], [[-3.0]]))
    both = first.state(lambda mine: torch.cat([mine, mine]))
    main.load(both)
    other.load(both, main=False)
    assert float(main.sums[0]) == 3.0 and float(other.sums.abs().sum()) == 0.0
    assert math.isinf(float(other.high)) and float(main.high) == pytest.approx(math.exp(2))
    assert ranks["updates"] == both["updates"] == 0
    for damaged in ({}, {**first.state(alone), "sums": ["1"]}, {**first.state(alone), "low": "x"}):
        with pytest.raises(ValueError, match="counters"):
            meter("a_lol").load(damaged)
