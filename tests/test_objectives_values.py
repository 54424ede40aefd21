"""Values and options of objectives, what the family reports, reductions, and the ratio."""

import functools
import math
import warnings
from typing import Any

import pytest
import torch
from objective_forms import FORMS, draw
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives

ROWS = {form.name: form for form in FORMS}
INF, NAN = math.inf, math.nan
BAD_VALUES = [
    ("advantages", [1.0, INF], r"advantages\[1\] = inf: advantages must be finite"),
    ("rewards", [NAN, 1.0], r"rewards\[0\] = nan"),
    ("ref_logps", [-1.0, -INF], r"ref_logps\[1\] = -inf"),
    ("ref_logps", [-1.0, 0.5], r"ref_logps\[1\] = 0.5.*log-probs"),
    ("old_logps", [2.0, -1.0], r"old_logps\[0\] = 2.0.*log-probs"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES)
def test_values_that_no_loss_can_take_are_named(name: str, value: Any, message: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        with pytest.raises(ValueError, match=message):
            objectives.check_side(name, torch.tensor(value, dtype=dtype))
        objectives.check_side(name, torch.tensor(value, dtype=dtype, device="meta"))


def test_good_values_pass() -> None:
    objectives.check_side("ref_logps", torch.tensor([0.0, 1e-6, -50.0]))  # rounding above zero
    objectives.check_side("advantages", torch.tensor([-1.0, 1e30]))
    for other in (0.9, None, torch.tensor([1, 2]), torch.zeros(0)):
        objectives.check_side("anything", other)


def test_options_may_be_numpy_numbers_and_tensors_are_refused() -> None:
    np = pytest.importorskip("numpy")
    drawn = draw(ROWS["a_lol"], 0.3)
    call = functools.partial(
        lk.loss_and_coef, objectives.a_lol, drawn.stats["logps"], drawn.seq, **drawn.side
    )
    for number in (np.float32(0.5), np.float64(0.5), np.int64(2)):
        assert torch.equal(call(clip=number)[1], call(clip=float(number))[1])
    for fn, option in (
        (objectives.a_lol, "clip"), (objectives.a_lol_kl, "beta"), (objectives.dpo, "beta"),
        (objectives.dpo, "label_smoothing"), (objectives.simpo, "gamma"),
        (objectives.grpo, "beta"), (objectives.q_learning, "gamma"), (objectives.ppo, "value_clip"),
    ):  # fmt: skip
        drawn = draw(ROWS[fn.__name__], 0.3)
        given = {k: drawn.stats[k] for k in objectives.statistics(fn)} | drawn.side
        for bad in (torch.tensor(0.9), NAN, True, "0.9"):
            words = f"tensor: pass float\\({option}\\)" if isinstance(bad, Tensor) else option
            with pytest.raises(ValueError, match=words):
                fn(**given, seq=drawn.seq, **{option: bad})


def test_pairs_and_lists_need_their_groups() -> None:
    seq = lk.Sequences.from_lengths([2, 3])
    for fn, side in (
        (objectives.dpo, {"ref_logps": torch.zeros(5)}),
        (objectives.simpo, {}),
        (objectives.pro, {"rewards": torch.zeros(2)}),
    ):
        with pytest.raises(ValueError, match="group_size"):
            fn(torch.zeros(5), seq=seq, **side)


def test_negative_rewards_warn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    warn_unlearned = objectives.warn_unlearned
    monkeypatch.setitem(warn_unlearned.__globals__, "_warned", set())
    seq = lk.Sequences.from_lengths([1, 1])
    for name in ("wbc", "r_lol", "r_gold"):
        fn = objectives.REGISTRY[name]
        family = objectives.traits(fn).family
        assert family is not None

        def fam(rewards: list[float], family: Any = family, fn: Any = fn) -> objectives.Family:
            return family(seq=seq, rewards=torch.tensor(rewards), **objectives.defaults(fn))

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_unlearned(fn, fam([1.0, 0.0]))
        with pytest.warns(UserWarning, match=f"{name} got negative rewards"):
            warn_unlearned(fn, fam([1.0, -0.1]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_unlearned(fn, fam([-1.0, -0.1]))


# --- what the family reports ----------------------------------------------------------------------


def test_family_metrics_count_clips_and_rows_pushed_down() -> None:
    seq = lk.Sequences.from_lengths([2, 0, 1])
    logps, ref = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -4.5, -3.1])
    side: dict[str, Any] = {"advantages": torch.tensor([1.0, 1.0, 0.05])}

    def report(name: str, **options: Any) -> dict[str, list[float]]:
        fn = objectives.REGISTRY[name]
        mark = objectives.traits(fn)
        assert mark.family is not None
        fam = mark.family(seq=seq, **side, **{**objectives.defaults(fn), **options})
        known = objectives.family_metrics(fam, logps, ref, seq)
        assert set(known) == {"log_ratio", "clipped"}
        out = objectives.family_report(mark, fam, **known)
        assert set(out) == set(mark.metrics)
        return {k: [round(x, 4) for x in v.tolist()] for k, v in out.items()}

    assert report("a_lol") == {"log_ratio": [3.0, 0.0, 0.1], "clipped": [1.0, 0.0, 0.0]}
    assert report("a_lol", clip=None)["clipped"] == [0.0, 0.0, 0.0]
    assert report("a_lol_seq") == {"log_ratio": [3.0, 0.0, 0.1], "clipped": [0.5, 0.0, 0.0]}
    assert report("a_lol_kl")["unlearned"] == [0.0, 0.0, 1.0]
    assert report("a_lol_ref_free") == {}


# --- reductions, options, and the ratio -----------------------------------------------------------

SEQ = lk.Sequences.from_lengths([3, 0, 5, 1, 4])


def test_reductions() -> None:
    loss = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    assert lk.aggregate(loss, SEQ, "none") is loss
    assert lk.aggregate(loss, SEQ, "sum").item() == 15
    assert lk.aggregate(loss, SEQ, "seq-mean").item() == 3
    assert lk.aggregate(loss, SEQ).item() == 3
    assert lk.aggregate(loss, SEQ, "token-mean").item() == pytest.approx(15 / 13)
    want = (1 / 3 + 2 + 3 / 5 + 4 + 5 / 4) / 5  # an empty sequence divides by one
    assert lk.aggregate(loss, SEQ, "seq-mean-token-mean").item() == pytest.approx(want)
    larger = SEQ.with_totals(num_sequences=50, num_tokens=1000)
    assert lk.aggregate(loss, larger, "seq-mean").item() == pytest.approx(0.3)
    assert lk.aggregate(loss, larger, "token-mean").item() == pytest.approx(0.015)
    assert lk.aggregate(loss, larger, "sum").item() == 15


def test_reductions_of_groups() -> None:
    pairs = lk.Sequences.from_lengths([3, 1, 2, 4], group_size=2)
    loss = torch.tensor([1.0, 3.0])
    assert lk.aggregate(loss, pairs, "seq-mean").item() == 2  # a mean over pairs
    assert lk.aggregate(loss, pairs, "token-mean").item() == pytest.approx(0.4)
    assert lk.aggregate(loss, pairs, "seq-mean-token-mean").item() == pytest.approx(
        (1 / 4 + 3 / 6) / 2
    )


def test_reduction_is_differentiable_and_linear() -> None:
    for reduction in objectives.REDUCTIONS:
        loss = torch.randn(5, dtype=torch.float64, requires_grad=True)
        (weights,) = torch.autograd.grad(lk.aggregate(loss, SEQ, reduction), loss)
        assert torch.allclose(weights, objectives.reduction_weights(SEQ, reduction))


def test_clip_bounds() -> None:
    assert objectives.clip_bounds(0.9) == pytest.approx((math.log(0.1), math.log(1.9)))
    assert objectives.clip_bounds(1.0) == pytest.approx((-math.inf, math.log(2)))
    assert objectives.clip_bounds(3)[0] == -math.inf
    low, high = objectives.clip_bounds(None)
    assert math.exp(high) < torch.finfo(torch.float32).max and math.exp(low) > 0


def test_float32_sums_of_long_sequences_keep_their_digits() -> None:
    """4,096 log-probs sum to 1e4 nats, where a float32 accumulator steps by 1e-3."""
    torch.manual_seed(1)
    logps = -5 * torch.rand(4096)
    seq = lk.Sequences.from_lengths([4096])
    got = seq.sum(logps)
    assert got.dtype == torch.float32
    assert abs(got.item() - logps.double().sum().item()) <= 1e-3
    ratio = objectives.sequence_ratio(logps, logps - 1e-5, seq, clip=None)
    want = math.exp((logps.double() - (logps - 1e-5).double()).sum())
    assert ratio.item() == pytest.approx(want, abs=1e-4)
