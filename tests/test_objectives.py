"""Objectives: closed-form losses and coefficients, the fused coefficient, traits, reductions."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives
from lolkernels.backends import TABLE
from lolkernels.objectives import PerSequence, PerToken

LENGTHS = [3, 0, 5, 1, 4]
SEQ = lk.Sequences.from_lengths(LENGTHS)
N, S = sum(LENGTHS), len(LENGTHS)


class Inputs(NamedTuple):
    logps: Tensor
    ref_logps: Tensor
    advantages: Tensor
    rewards: Tensor


def draw(spread: float = 0.3) -> Inputs:
    logps = -3 * torch.rand(N, dtype=torch.float64)
    return Inputs(
        logps,
        logps + spread * torch.randn(N, dtype=torch.float64),
        torch.tensor([0.4, 1.0, -0.7, 2.0, 0.0], dtype=torch.float64),
        torch.tensor([0.1, 0.2, -0.3, 0.9, 0.0], dtype=torch.float64),
    )


def clip(w: float, eps: float) -> float:
    return min(max(w, 1 - eps), 1 + eps)


def plus(a: float) -> float:
    return max(a, 0.0)


# Each row: objective, options, and the closed form: (loss of a sequence, d loss / d l_t of a token)
# from its log-probs l, reference log-probs r, advantage a and reward g, all plain numbers.
Closed = Callable[[list[float], list[float], float, float], tuple[float, list[float]]]


def closed_nll(l: list[float], r: list[float], a: float, g: float) -> tuple[float, list[float]]:  # noqa: E741
    return -sum(l), [-1.0] * len(l)


def weighted(
    weight: Callable[[float, float], float], w: Callable[..., list[float]], beta: float = 0
) -> Closed:
    """-weight sum_t w_t l_t + beta sum_t (l_t - r_t) and -(weight w_t - beta)."""

    def form(l: list[float], r: list[float], a: float, g: float) -> tuple[float, list[float]]:  # noqa: E741
        factor, ratios = weight(a, g), w(l, r)
        loss = -factor * sum(x * y for x, y in zip(ratios, l, strict=True))
        loss += beta * (sum(l) - sum(r))
        return loss, [-(factor * x - beta) for x in ratios]

    return form


def ones(l: list[float], r: list[float]) -> list[float]:  # noqa: E741
    return [1.0] * len(l)


def whole(eps: float) -> Callable[..., list[float]]:
    return lambda l, r: [clip(math.exp(sum(l) - sum(r)), eps)] * len(l)  # noqa: E741


def by_token(eps: float) -> Callable[..., list[float]]:
    return lambda l, r: [clip(math.exp(x - y), eps) for x, y in zip(l, r, strict=True)]  # noqa: E741


def reward(a: float, g: float) -> float:
    return g


def advantage(a: float, g: float) -> float:
    return plus(a)


TABLE_OF_FORMS: list[tuple[Callable[..., Tensor], dict[str, Any], Closed]] = [
    (objectives.nll, {}, closed_nll),
    (objectives.wbc, {}, weighted(reward, ones)),
    (
        objectives.r_gold,
        {"floor": 0.2},
        weighted(reward, lambda l, r: [max(math.exp(x), 0.2) for x in l]),  # noqa: E741
    ),
    (objectives.r_lol, {"clip": 0.3}, weighted(reward, whole(0.3))),
    (objectives.r_lol, {"clip": None}, weighted(reward, whole(1e9))),
    (objectives.a_lol, {}, weighted(advantage, whole(0.9))),
    (objectives.a_lol, {"clip": 0.1}, weighted(advantage, whole(0.1))),
    (objectives.a_lol, {"clip": 2.0}, weighted(advantage, whole(2.0))),
    (objectives.a_lol_seq, {}, weighted(advantage, by_token(0.9))),
    (objectives.a_lol_seq, {"clip": 0.1}, weighted(advantage, by_token(0.1))),
    (objectives.a_lol_seq, {"clip": None}, weighted(advantage, by_token(1e9))),
    (objectives.a_lol_ref_free, {}, weighted(advantage, ones)),
    (objectives.a_lol_kl, {}, weighted(advantage, ones, 0.1)),
    (objectives.a_lol_kl, {"beta": 0.5}, weighted(advantage, ones, 0.5)),
    (objectives.r_lol_kl, {"beta": 0.2}, weighted(reward, ones, 0.2)),
]
forms = pytest.mark.parametrize(
    ("objective", "options", "closed"),
    TABLE_OF_FORMS,
    ids=[f"{f.__name__} {o}" for f, o, _ in TABLE_OF_FORMS],
)


def side_of(objective: Callable[..., Tensor], x: Inputs) -> dict[str, Tensor]:
    return {k: t for k, t in x._asdict().items() if k in lk.side_inputs(objective)}


@forms
@pytest.mark.parametrize("spread", [0.02, 0.3, 3.0])
def test_loss_and_coefficient_equal_the_closed_form(
    objective: Callable[..., Tensor], options: dict[str, Any], closed: Closed, spread: float
) -> None:
    x = draw(spread)
    loss, coef, seq_loss = lk.loss_and_coef(
        objective, x.logps, SEQ, "sum", **side_of(objective, x), **options
    )
    cu = SEQ.cu_seqlens.tolist()
    total = 0.0
    for s in range(S):
        rows = slice(cu[s], cu[s + 1])
        want, coefficients = closed(
            x.logps[rows].tolist(),
            x.ref_logps[rows].tolist(),
            x.advantages[s].item(),
            x.rewards[s].item(),
        )
        total += want
        assert seq_loss[s].item() == pytest.approx(want, rel=1e-12, abs=1e-12)
        assert coef[rows].tolist() == pytest.approx(coefficients, rel=1e-12, abs=1e-12)
    assert loss.item() == pytest.approx(total, rel=1e-12)
    assert not loss.requires_grad and not coef.requires_grad and not seq_loss.requires_grad


@forms
@pytest.mark.parametrize("backend", list(TABLE))
@pytest.mark.parametrize("spread", [0.02, 0.3, 3.0])
def test_the_fused_coefficient_equals_autograd(
    objective: Callable[..., Tensor],
    options: dict[str, Any],
    closed: Closed,
    backend: str,
    spread: float,
) -> None:
    """``sequence_coef`` of each backend, fed as the fused pass feeds it."""
    x = draw(spread)
    side = side_of(objective, x)
    _, coef, seq_loss = lk.loss_and_coef(objective, x.logps, SEQ, "sum", **side, **options)
    family = objectives.traits(objective).family
    assert family is not None
    arguments = {**objectives.defaults(objective), **options, **side}
    fam = family(seq=SEQ, **arguments)
    kinds = [k for k in (torch.float32, torch.float64) if k in TABLE[backend].dtypes]
    for kind in kinds:
        ref = side["ref_logps"].to(kind) if fam.uses_ref and "ref_logps" in side else None
        loss, got, log_ratio, clipped = TABLE[backend].sequence_coef(
            x.logps.to(kind),
            ref,
            SEQ.cu_seqlens,
            fam.weight.to(kind),
            ratio=fam.ratio,
            log_low=fam.log_low,
            log_high=fam.log_high,
            beta=fam.beta,
        )
        tol = 1e-12 if kind == torch.float64 else 2e-6
        assert float(((got - coef).abs() / coef.abs().clamp(min=1)).max()) <= tol
        assert float(((loss - seq_loss).abs() / seq_loss.abs().clamp(min=1)).max()) <= tol
        d = x.logps if ref is None else x.logps - x.ref_logps
        assert float((log_ratio - SEQ.sum(d)).abs().max()) <= tol * 20
        outside = torch.zeros(S, dtype=torch.float64)
        if fam.ratio == objectives.SEQUENCE_RATIO:
            total = SEQ.sum(d)
            outside = ((total < fam.log_low) | (total > fam.log_high)).double()
        elif fam.ratio == objectives.TOKEN_RATIO:
            outside = SEQ.mean(((d < fam.log_low) | (d > fam.log_high)).double())
        assert float((clipped - outside).abs().max()) <= 1e-6
        assert float(clipped[1]) == 0.0 and float(loss[1]) == 0.0  # no tokens


# --- traits ---------------------------------------------------------------------------------------

EVERY = [
    (objectives.nll, True),
    (objectives.wbc, True),
    (objectives.r_gold, True),
    (objectives.r_lol, False),
    (objectives.a_lol, False),
    (objectives.a_lol_seq, True),
    (objectives.a_lol_ref_free, True),
    (objectives.a_lol_kl, True),
    (objectives.r_lol_kl, True),
]


def test_every_objective_of_the_module_is_in_these_tables() -> None:
    public = {name for name, f in vars(objectives).items() if callable(f) and hasattr(f, "traits")}
    assert public == {f.__name__ for f, _ in EVERY} == {f.__name__ for f, _, _ in TABLE_OF_FORMS}


@pytest.mark.parametrize(("objective", "local"), EVERY, ids=lambda x: getattr(x, "__name__", x))
def test_token_local_is_what_the_jacobian_of_the_coefficient_says(
    objective: Callable[..., Tensor], local: bool
) -> None:
    """A token-local loss may be cut into pieces: its coefficient at t depends on token t alone."""
    x = draw(0.02)  # nothing is clipped, so that a coupling would show
    side = side_of(objective, x)
    side = {k: t.abs() + 0.1 if k in ("advantages", "rewards") else t for k, t in side.items()}

    def coefficient(logps: Tensor) -> Tensor:
        return lk.loss_and_coef(objective, logps, SEQ, "sum", **side)[1]

    step, base = 1e-4, coefficient(x.logps)
    jacobian = torch.stack(
        [(coefficient(x.logps + step * e) - base) / step for e in torch.eye(N).double()]
    )
    diagonal = torch.eye(N, dtype=torch.bool)
    coupled = float(jacobian[~diagonal].abs().max()) > 1e-6
    assert coupled != local
    assert objectives.traits(objective).token_local == local
    owner = SEQ.token_to_sequence
    apart = owner[:, None] != owner[None, :]
    assert float(jacobian[apart].abs().max()) == 0.0  # never from one sequence to another


def test_a_users_callable_claims_nothing() -> None:
    def mine(logps: Tensor, seq: lk.Sequences) -> Tensor:
        return -seq.sum(logps)

    assert objectives.traits(mine) == objectives.Traits(False, None)


# --- side inputs ----------------------------------------------------------------------------------


def test_side_inputs_of_the_library() -> None:
    assert lk.side_inputs(objectives.nll) == {}
    assert lk.side_inputs(objectives.a_lol) == {
        "ref_logps": "token",
        "advantages": "sequence",
        "clip": "option",
    }
    assert lk.side_inputs(objectives.r_gold) == {"rewards": "sequence", "floor": "option"}


def test_side_inputs_of_a_users_callable() -> None:
    def mine(
        logps: Tensor, plain: Tensor, token: PerToken, row: PerSequence, seq: Any, *, k: float = 1
    ) -> Tensor:
        return seq.sum(logps)

    assert lk.side_inputs(mine) == {
        "plain": "tensor",
        "token": "token",
        "row": "sequence",
        "k": "option",
    }


def test_a_tensor_of_unstated_kind_is_told_by_its_shape() -> None:
    def mine(logps: Tensor, extra: Tensor, seq: lk.Sequences) -> Tensor:
        factor = (
            extra if extra.dim() == 0 or extra.shape[0] == seq.num_sequences else seq.mean(extra)
        )
        return -factor * seq.sum(logps)

    h, w = torch.randn(N, 4), torch.randn(9, 4)
    labels = torch.randint(9, (N,))
    for extra in (torch.rand(N), torch.rand(S), torch.tensor(2.0)):
        got = lk.linear_loss(mine, h, w, labels, SEQ, extra=extra)
        logps = lk.linear_logprob(h, w, labels).logps
        assert abs(got.item() - lk.aggregate(mine(logps, extra, SEQ), SEQ).item()) <= 1e-5


# --- reductions -----------------------------------------------------------------------------------


def test_reductions() -> None:
    loss = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    assert lk.aggregate(loss, SEQ, "none") is loss
    assert lk.aggregate(loss, SEQ, "sum").item() == 15
    assert lk.aggregate(loss, SEQ, "seq-mean").item() == 3
    assert lk.aggregate(loss, SEQ).item() == 3
    assert lk.aggregate(loss, SEQ, "token-mean").item() == pytest.approx(15 / N)
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


def test_a_batch_without_sequences_reduces_to_zero() -> None:
    for lengths in ([], [0, 0]):
        seq = lk.Sequences.from_lengths(lengths)
        for reduction in objectives.REDUCTIONS:
            loss = lk.aggregate(objectives.nll(torch.zeros(0), seq), seq, reduction)
            assert loss.item() == 0.0


def test_reduction_is_differentiable_and_linear() -> None:
    for reduction in objectives.REDUCTIONS:
        loss = torch.randn(S, dtype=torch.float64, requires_grad=True)
        (weights,) = torch.autograd.grad(lk.aggregate(loss, SEQ, reduction), loss)
        assert torch.allclose(weights, objectives.reduction_weights(SEQ, reduction))


# --- options --------------------------------------------------------------------------------------


def test_clip_bounds() -> None:
    assert objectives.clip_bounds(0.9) == pytest.approx((math.log(0.1), math.log(1.9)))
    assert objectives.clip_bounds(1.0) == pytest.approx((-math.inf, math.log(2)))
    assert objectives.clip_bounds(3)[0] == -math.inf
    low, high = objectives.clip_bounds(None)
    assert math.exp(high) < torch.finfo(torch.float32).max and math.exp(low) > 0


def test_the_ratio_carries_no_gradient() -> None:
    x = draw()
    logps = x.logps.requires_grad_()
    ratio = objectives.sequence_ratio(logps, x.ref_logps, SEQ)
    assert not ratio.requires_grad and ratio.shape == (S,)


def test_a_clipped_sequence_keeps_a_constant_gradient() -> None:
    """PPO's min would give zero here."""
    seq = lk.Sequences.from_lengths([4])
    ref = -torch.ones(4)
    for drift, bound in ((5.0, 1.9), (-5.0, 0.1)):
        _, coef, _ = lk.loss_and_coef(
            objectives.a_lol, ref + drift, seq, ref_logps=ref, advantages=torch.tensor([2.0])
        )
        assert torch.allclose(coef, torch.full((4,), -2 * bound))


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
