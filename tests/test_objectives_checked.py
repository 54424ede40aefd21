"""``check_objective``: true declarations pass, false ones are named (see also test_objectives)."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives
from lolkernels.objectives import Family, PerSequence, PerToken, Traits
from lolkernels.testing import check_objective


def declared(fn: Callable[..., Any], **traits: Any) -> Callable[..., Any]:
    """A copy of ``fn`` that declares these traits."""

    @functools.wraps(fn)
    def copy(**inputs: Any) -> Any:
        return fn(**inputs)

    copy.traits = Traits(**traits)  # type: ignore[attr-defined]
    return copy


def plain(logps: Tensor, advantages: PerSequence, seq: lk.Sequences) -> Tensor:
    return -advantages * seq.sum(logps)


def length_mean(logps: PerToken, seq: lk.Sequences) -> Tensor:
    """Its pieces add up because a piece divides by the length of the whole sequence."""
    return -seq.mean(logps)


def own_length(logps: PerToken, seq: lk.Sequences) -> Tensor:
    return -seq.sum(logps) / seq.cu_seqlens.diff()


def squared_sum(logps: PerToken, seq: lk.Sequences) -> Tensor:
    return seq.sum(logps) ** 2


def constant_per_piece(logps: PerToken, seq: lk.Sequences) -> Tensor:
    return 1.0 - seq.sum(logps)


def whitened(logps: PerToken, advantages: PerSequence, seq: lk.Sequences) -> Tensor:
    a = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-6)
    return -a * seq.sum(logps)


def nan_alone(logps: PerToken, advantages: PerSequence, seq: lk.Sequences) -> Tensor:
    """The standard deviation of a single value is nan."""
    return -(advantages - advantages.mean()) / advantages.std() * seq.sum(logps)


def counted(logps: PerToken, seq: lk.Sequences) -> Tensor:
    return -seq.sum(logps) / seq.num_sequences


def detached(logps: PerToken, lse: PerToken, seq: lk.Sequences) -> Tensor:
    return seq.sum(lse.detach() ** 2 - logps)


def through_numpy(logps: PerToken, seq: lk.Sequences) -> Tensor:
    return seq.sum(logps) + seq.sum(torch.from_numpy(logps.detach().numpy() ** 2))


def in_place(logps: PerToken, advantages: PerSequence, seq: lk.Sequences) -> Tensor:
    return -advantages.clamp_(min=0) * seq.sum(logps)


def nan_loss(logps: PerToken, seq: lk.Sequences) -> Tensor:
    return seq.sum(logps).sqrt()


def pairs(logps: PerToken, seq: lk.Sequences) -> Tensor:
    return seq.sum(logps).view(-1, seq.group_size).prod(1)


COUNTER = itertools.count()


def stateful(logps: PerToken, seq: lk.Sequences) -> Tensor:
    return seq.sum(logps) * (1 + next(COUNTER))


def test_what_holds_is_found_though_it_is_not_declared() -> None:
    assert check_objective(plain).token_local
    assert check_objective(length_mean).token_local
    assert not check_objective(squared_sum).token_local
    assert not check_objective(constant_per_piece).token_local
    found = check_objective(pairs, group_size=2)
    assert not found.token_local and found.statistics == ("logps",)
    assert found.gradient_error is not None and found.gradient_error < 1e-6
    check_objective(declared(plain, token_local=True))
    check_objective(declared(length_mean, token_local=True))


FALSE: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "token_local of a square": (squared_sum, {"token_local": True}, "token_local, but .* add up"),
    "token_local of a constant": (constant_per_piece, {"token_local": True}, "token_local, but"),
    "token_local of its own length": (own_length, {"token_local": True}, "token_local, but"),
    "whitening": (whitened, {}, "looks across groups: the loss of group 0 is"),
    "whitening that is nan in a group alone": (nan_alone, {}, "looks across groups"),
    "a count of the batch": (counted, {}, "looks across groups"),
    "a detached statistic": (detached, {}, r"d loss / d lse\[0\] is 0 by autograd"),
    "a way out of torch": (through_numpy, {}, r"d loss / d logps\[0\] is 0.5 by autograd"),
    "an input changed": (in_place, {}, "changes its input advantages in place"),
    "not finite": (nan_loss, {}, "is not finite"),
    "a state": (stateful, {}, "another result at a second call"),
    "a family of another weight": (
        plain,
        {"family": lambda advantages, **_: Family(2 * advantages)},
        r"family that plain declares is not its body: loss\[",
    ),
    "a family of another beta": (
        plain,
        {"family": lambda advantages, **_: Family(advantages, beta=0.1)},
        "is not its body",
    ),
}


@pytest.mark.parametrize("name", FALSE)
def test_what_does_not_hold_is_named(name: str) -> None:
    fn, traits, message = FALSE[name]
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        check_objective(declared(fn, **traits))


def test_a_true_family_passes_and_a_meant_detach_can_be_said() -> None:
    check_objective(declared(plain, family=lambda advantages, **_: Family(advantages)))
    with pytest.raises(AssertionError, match="finite_differences=False"):
        check_objective(detached)
    assert check_objective(detached, finite_differences=False).gradient_error is None


def test_the_gradient_of_a_side_input_is_compared_too() -> None:
    def wrong(logps: PerToken, scale: Tensor, seq: lk.Sequences) -> Tensor:
        return scale.detach() * seq.sum(logps) + scale

    def right(logps: PerToken, scale: Tensor, seq: lk.Sequences) -> Tensor:
        return scale * seq.sum(logps)

    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    check_objective(right, scale=scale)
    with pytest.raises(AssertionError, match="d loss / d scale"):
        check_objective(wrong, scale=scale)


def test_inputs_of_unknown_shape_and_unknown_names_are_refused() -> None:
    with pytest.raises(TypeError, match="z0 is missing and of unknown shape"):
        check_objective(objectives.kto)
    with pytest.raises(TypeError, match="gama is not an input of simpo"):
        check_objective(objectives.simpo, group_size=2, gama=1.0)
    with pytest.raises(ValueError, match="unreduced losses"):
        check_objective(lambda logps, seq: logps.sum())


def test_a_batch_of_ones_own_is_taken() -> None:
    seq = lk.Sequences.from_lengths([2, 2, 6, 1], group_size=4)
    check_objective(objectives.pro, seq, rewards=torch.tensor([3.0, 2.0, 1.0, 0.5]).double())
