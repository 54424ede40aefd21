"""Every registered objective against its closed form, its declarations, and the fused loss."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from objective_forms import FORMS, Form, by_hand, draw
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives, testing
from lolkernels.objectives import PerSequence, PerToken

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
    found = testing.check_objective(
        form.objective, group_size=form.group_size, **whole, **form.options
    )
    mark = objectives.traits(form.objective)
    assert found.token_local == mark.token_local  # declared wherever it holds
    assert (found.gradient_error is None) == ("clipped" in mark.metrics)


@forms
@pytest.mark.parametrize("reduction", objectives.REDUCTIONS)
def test_eager_linear_logprob_and_linear_loss_agree(form: Form, reduction: str) -> None:
    drawn = draw(form, 0.3)
    seq, n = drawn.seq, drawn.seq.num_tokens
    p = testing.peaky(n, 5, 11, std=1.0, lift=0.0, dtype=torch.float64)
    h, w = p.hidden.requires_grad_(), p.weight.requires_grad_()
    call = {**drawn.side, **form.options}
    named = objectives.statistics(form.objective)
    # Every input whose gradient the loss has: a value head's prediction, a learned scale.
    inputs = [t.requires_grad_() for t in drawn.side.values() if t.is_floating_point()]

    def gradients(loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, (h, w, *inputs), allow_unused=True)
        leaves = (h, w, *inputs)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]

    def judged(out: Any) -> list[Tensor]:
        stats = {**out._asdict(), "target_logit": out.logps + out.lse}
        given = {k: stats[k] for k in named}
        loss = lk.aggregate(form.objective(**given, seq=seq, **call), seq, reduction)
        return [loss, *gradients(loss)]

    want = judged(testing.eager(p))
    found = [judged(lk.linear_logprob(h, w, p.labels, backend="reference"))]
    for held in (None, 4 * 11 * 8):
        loss = lk.linear_loss(
            form.objective, h, w, p.labels, seq,
            reduction=reduction, backend="reference", memory_budget=held, **call,
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
