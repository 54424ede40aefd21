"""Every registered objective: closed form, declarations, the fused loss; and ``evaluate``."""

import functools
from collections.abc import Iterator
from typing import Any

import judges
import pytest
import torch
from objective_forms import FORMS, Form, by_hand, draw
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives
from lolkernels.objectives import PerSequence, PerToken
from lolkernels.testing import check_objective

forms = pytest.mark.parametrize("form", FORMS, ids=str)
ROWS = {form.name: form for form in FORMS}  # the last row of each


def test_every_registered_objective_has_a_row() -> None:
    assert set(ROWS) == set(objectives.REGISTRY)


@forms
@pytest.mark.parametrize("spread", [0.02, 0.3, 3.0])
def test_losses_and_gradients_equal_the_closed_form(form: Form, spread: float) -> None:
    drawn = draw(form, spread)
    side = {k: v.requires_grad_(k == "values") for k, v in drawn.side.items()}
    weights = torch.ones(drawn.seq.num_groups, dtype=torch.float64)
    out = objectives.evaluate(
        form.objective, drawn.stats, drawn.seq, weights, {**side, **form.options}
    )
    losses, grads = by_hand(form, drawn)
    assert out.seq_loss.tolist() == pytest.approx(losses, rel=1e-12, abs=1e-12)
    got = {**out.grads, **out.side_grads}
    assert got.keys() == grads.keys()
    for name, want in grads.items():
        assert got[name].tolist() == pytest.approx(want, rel=1e-12, abs=1e-12), name
    assert any(abs(x) > 1e-3 for x in grads[next(iter(grads))])  # the row proves something


@pytest.mark.parametrize("form", ROWS.values(), ids=list(ROWS))
def test_what_an_objective_declares_is_true(form: Form) -> None:
    whole = {k: torch.tensor(v, dtype=torch.float64) for k, v in form.whole.items()}
    found = check_objective(form.objective, group_size=form.group_size, **whole, **form.options)
    mark = objectives.traits(form.objective)
    assert found.token_local == mark.token_local  # declared wherever it holds
    assert (found.gradient_error is None) == ("clipped" in mark.metrics)


@forms
@pytest.mark.parametrize("reduction", objectives.REDUCTIONS)
def test_eager_linear_logprob_and_linear_loss_agree(form: Form, reduction: str) -> None:
    drawn = draw(form, 0.3)
    seq, n = drawn.seq, drawn.seq.num_tokens
    scaling = {"softcap": 20.0, "temperature": 0.8}
    p = judges.peaky(n, 5, 11, std=1.0, lift=0.0, dtype=torch.float64, bias=True, **scaling)
    operands = [t.requires_grad_() for t in (p.hidden, p.weight, p.bias)]
    head = {"bias": p.bias, "backend": "reference", **scaling}
    call = {**drawn.side, **form.options}
    named = objectives.statistics(form.objective)
    # Every input whose gradient the loss has: a value head's prediction, a learned scale.
    inputs = [t.requires_grad_() for t in drawn.side.values() if t.is_floating_point()]

    def gradients(loss: Tensor) -> list[Tensor]:
        leaves = (*operands, *inputs)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]

    def judged(out: Any) -> list[Tensor]:
        stats = {**out._asdict(), "target_logit": out.logps + out.lse}
        given = {k: stats[k] for k in named}
        loss = lk.aggregate(form.objective(**given, seq=seq, **call), seq, reduction)
        return [loss, *gradients(loss)]

    want = judged(judges.eager(p))
    found = [judged(lk.linear_logprob(*operands[:2], p.labels, **head))]
    for rows_held in (1, 4, 8, 1000):  # sequences longer than a block, and all in one
        loss = lk.linear_loss(
            form.objective, *operands[:2], p.labels, seq,
            reduction=reduction, memory_budget=rows_held * 11 * 8, **head, **call,
        )  # fmt: skip
        found.append([loss, *gradients(loss)])
    for results in found:
        for got, exact in zip(results, want, strict=True):
            assert torch.allclose(got, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["ppo", "grpo", "gspo"])
@pytest.mark.parametrize("drift", [-1e4, -200.0, -89.0, 88.7, 89.0, 200.0])
def test_a_far_ratio_stays_finite_and_clips_on_the_right_side(name: str, drift: float) -> None:
    """exp overflows float32 at 88.72: the minimum then is inf, and every gradient nan."""
    form = ROWS[name]
    logps = torch.full((3,), -1e4 if drift < 0 else -1.0)
    old = logps - drift if drift < 0 else torch.full((3,), -1.0 - drift)
    for sign in (1.0, -1.0):
        seq = lk.Sequences.from_lengths([3])
        side = {k: torch.zeros(3) for k in objectives.side_inputs(form.objective)}
        side |= {"old_logps": old, "ref_logps": logps}
        side["advantages"] = torch.full((3 if name == "ppo" else 1,), sign)
        side = {
            k: side[k] for k, kind in lk.side_inputs(form.objective).items() if kind != "option"
        }
        stats = {"logps": logps, "entropy": torch.ones(3)}
        out = objectives.evaluate(form.objective, stats, seq, torch.ones(1), side)
        slope = out.grads["logps"]
        assert bool(out.seq_loss.isfinite()) and bool(slope.isfinite().all())
        if (sign > 0) == (drift > 0):  # the bound binds
            assert float(slope.abs().max()) == 0.0
        elif drift > 0:
            assert bool((slope > 0).all())


# --- the registry: one function and one row add an objective --------------------------------------


@pytest.fixture
def registry() -> Iterator[dict[str, Any]]:
    """The registry, left as it was."""
    before = dict(objectives.REGISTRY)
    yield objectives.REGISTRY
    objectives.REGISTRY.clear()
    objectives.REGISTRY.update(before)


def test_one_function_and_one_row_add_an_objective(registry: dict[str, Any]) -> None:
    @objectives.objective(token_local=True)
    def z_loss(logps: PerToken, lse: PerToken, seq: lk.Sequences, *, weight: float = 0.1) -> Tensor:
        """-S + weight sum_t lse_t^2."""
        return seq.sum(weight * lse**2 - logps)

    def closed(x: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        (l,), (z,) = x["logps"], x["lse"]  # noqa: E741
        loss = sum(0.3 * a * a for a in z) - sum(l)
        return loss, {"logps": [[-1.0] * len(l)], "lse": [[0.6 * a for a in z]]}

    form = Form("z_loss", closed, {"weight": 0.3})
    test_losses_and_gradients_equal_the_closed_form(form, 0.3)
    test_what_an_objective_declares_is_true(form)
    assert registry["z_loss"] is z_loss and objectives.statistics(z_loss) == ("logps", "lse")


def test_a_name_is_taken_once_and_a_declaration_is_a_known_one(registry: dict[str, Any]) -> None:
    def dpo(logps: Tensor, seq: lk.Sequences) -> Tensor:
        return -seq.sum(logps)

    with pytest.raises(ValueError, match=r"dpo exists already, in lolkernels\.objectives"):
        objectives.objective()(dpo)
    with pytest.raises(TypeError, match="token_locale"):
        objectives.objective(token_locale=True)
    with pytest.raises(ValueError, match="sampling must be uniform or advantage"):
        objectives.objective(sampling="advantages")
    with pytest.raises(ValueError, match="metrics of a family"):
        objectives.objective(metrics=("clipped",))
    with pytest.raises(TypeError, match="logps and seq"):
        objectives.objective()(lambda x: x)


def test_a_users_callable_claims_nothing_and_a_partial_keeps_its_traits() -> None:
    def mine(logps: Tensor, seq: lk.Sequences) -> Tensor:
        return -seq.sum(logps)

    assert objectives.traits(mine) == objectives.Traits()
    bound = functools.partial(objectives.a_lol, clip=0.5)
    assert objectives.traits(bound) == objectives.traits(objectives.a_lol)
    assert objectives.defaults(bound) == {"clip": 0.5}
    assert lk.side_inputs(bound) == lk.side_inputs(objectives.a_lol)


# --- signatures -----------------------------------------------------------------------------------


def test_statistics_and_side_inputs_are_read_from_the_signature() -> None:
    def mine(
        max_logit: Tensor,
        plain: Tensor,
        token: PerToken,
        entropy: Tensor,
        row: PerSequence,
        seq: Any,
        *,
        k: float = 1,
    ) -> Tensor:
        return seq.sum(entropy)

    assert objectives.statistics(mine) == ("entropy", "max_logit")
    assert lk.side_inputs(mine) == {
        "plain": "tensor",
        "token": "token",
        "row": "sequence",
        "k": "option",
    }
    assert objectives.defaults(mine) == {"k": 1}
    assert lk.side_inputs(objectives.nll) == {}
    assert lk.side_inputs(objectives.ppo)["values"] == "token"

    def only_by_place(logps: Tensor, seq: Any, /) -> Tensor:
        return -seq.sum(logps)

    with pytest.raises(TypeError, match="by name"):
        lk.side_inputs(only_by_place)


def test_a_tensor_of_unstated_kind_is_told_by_its_shape() -> None:
    def mine(logps: Tensor, extra: Tensor, seq: lk.Sequences) -> Tensor:
        factor = (
            extra if extra.dim() == 0 or extra.shape[0] == seq.num_sequences else seq.mean(extra)
        )
        return -factor * seq.sum(logps)

    seq = lk.Sequences.from_lengths([3, 0, 5])
    h, w = torch.randn(8, 4), torch.randn(9, 4)
    labels = torch.randint(9, (8,))
    for extra in (torch.rand(8), torch.rand(3), torch.tensor(2.0)):
        got = lk.linear_loss(mine, h, w, labels, seq, extra=extra)
        logps = lk.linear_logprob(h, w, labels).logps
        assert abs(got.item() - lk.aggregate(mine(logps, extra, seq), seq).item()) <= 1e-5


# --- evaluate -------------------------------------------------------------------------------------


def evaluate(fn: Any, **side: Any) -> objectives.Evaluated:
    drawn = draw(ROWS["nll"], 0.3, [2, 3])
    return objectives.evaluate(fn, drawn.stats, drawn.seq, torch.tensor([1.0, 2.0]), side)


def test_each_statistic_gets_its_gradient_and_max_logit_none() -> None:
    def every(
        logps: Tensor, lse: Tensor, entropy: Tensor, target_logit: Tensor, max_logit: Tensor,
        seq: Any,
    ) -> Any:  # fmt: skip
        assert logps.requires_grad and not max_logit.requires_grad
        loss = seq.sum(2 * logps + 3 * lse + max_logit * entropy + 0 * target_logit)
        return loss, {"peak": seq.mean(max_logit), "twice": loss * 2}

    drawn = draw(ROWS["nll"], 0.3, [2, 3])
    out = evaluate(every)
    weight = torch.tensor([1.0, 1, 2, 2, 2], dtype=torch.float64)
    assert list(out.grads) == ["logps", "lse", "entropy", "target_logit"]
    assert torch.equal(out.grads["logps"], 2 * weight)
    assert torch.equal(out.grads["lse"], 3 * weight)
    assert torch.equal(out.grads["entropy"], drawn.stats["max_logit"] * weight)
    assert torch.equal(out.grads["target_logit"], torch.zeros(5, dtype=torch.float64))
    assert torch.equal(out.metrics["peak"], drawn.seq.mean(drawn.stats["max_logit"]))
    every_tensor = [out.seq_loss, *out.grads.values(), *out.metrics.values()]
    assert not any(t.requires_grad for t in every_tensor)


def test_side_inputs_get_a_gradient_where_they_require_one() -> None:
    def scaled(logps: Tensor, scale: Tensor, shift: PerSequence, seq: Any) -> Tensor:
        return scale * seq.sum(logps) + shift

    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    out = evaluate(scaled, scale=scale, shift=shift)
    drawn = draw(ROWS["nll"], 0.3, [2, 3])
    total = drawn.seq.sum(drawn.stats["logps"])
    assert torch.allclose(out.side_grads["scale"], total[0] + 2 * total[1])
    assert out.side_grads["shift"].tolist() == [1.0, 2.0]
    assert evaluate(scaled, scale=scale.detach(), shift=shift.detach()).side_grads == {}
    assert scale.grad is None


def test_unused_statistics_and_constant_losses_have_zero_gradients() -> None:
    def constant(logps: Tensor, lse: Tensor, seq: Any) -> Tensor:
        return torch.ones(seq.num_groups)

    assert all(float(g.abs().max()) == 0.0 for g in evaluate(constant).grads.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_made_in_any_mode(mode: Any) -> None:
    with mode():
        drawn = draw(ROWS["dpo"], 0.3)
        out = objectives.evaluate(objectives.dpo, drawn.stats, drawn.seq, torch.ones(3), drawn.side)
    assert float(out.grads["logps"].abs().max()) > 1e-3


WRONG = {
    "a scalar": (lambda logps, seq: logps.sum(), r"unreduced losses of shape \(2,\), got \(\)"),
    "a list": (lambda logps, seq: [1.0, 2.0], "got list"),
    "integers": (lambda logps, seq: torch.ones(2, dtype=torch.int64), "floating-point"),
    "a metric per token": (
        lambda logps, seq: (seq.sum(logps), {"margin": logps}),
        r"metric margin .* shape \(2,\), got \(5,\)",
    ),
    "a number as metric": (lambda logps, seq: (seq.sum(logps), {"margin": 1.0}), "got float"),
    "a nameless metric": (lambda logps, seq: (seq.sum(logps), {1: logps}), "by text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_an_objective_returns_is_checked(name: str) -> None:
    fn, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        evaluate(fn)
    seq = lk.Sequences.from_lengths([2, 3])
    with pytest.raises(ValueError, match=message):
        lk.linear_loss(fn, torch.randn(5, 4), torch.randn(9, 4), torch.arange(5), seq)


def test_a_statistic_that_is_missing_is_named() -> None:
    drawn = draw(ROWS["nll"], 0.3)
    with pytest.raises(TypeError, match="lse is missing"):
        objectives.evaluate(
            lambda lse, seq: seq.sum(lse), {"logps": drawn.stats["logps"]}, drawn.seq,
            torch.ones(6), {},
        )  # fmt: skip
    with pytest.raises(ValueError, match="target_logit, no logps"):
        lk.loss_and_coef(objectives.psi_learning, drawn.stats["logps"], drawn.seq)


def test_loss_and_coef_reduces_and_takes_other_statistics_as_keywords() -> None:
    def bonus(logps: Tensor, entropy: Tensor, seq: Any) -> Any:
        return -seq.sum(logps * entropy), {"mean_entropy": seq.mean(entropy)}

    drawn = draw(ROWS["nll"], 0.3)
    entropy = drawn.stats["entropy"]
    loss, coef, seq_loss = lk.loss_and_coef(bonus, drawn.stats["logps"], drawn.seq, entropy=entropy)
    assert torch.allclose(coef, -entropy / 6)
    assert torch.allclose(loss, seq_loss.mean())
    assert not (loss.requires_grad or coef.requires_grad or seq_loss.requires_grad)
