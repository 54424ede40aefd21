"""``evaluate``: a gradient of each statistic and side input, metrics, and errors of results."""

from typing import Any

import pytest
import torch
from objective_forms import FORMS, draw
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives
from lolkernels.objectives import PerSequence

ROWS = {form.name: form for form in FORMS}


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
