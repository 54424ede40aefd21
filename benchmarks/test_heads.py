"""Micro-benchmarks of the ops that start from hidden states; `make bench`."""

from collections.abc import Callable

import pytest
from peers import PEERS
from run import title_of

OURS = ["lolkernels", "gemms"]
FEW = [*OURS, "eager", "lol-rl", "verl recompute"]
SLOW = ["torch lce accurate", "torch lce balanced", "torch lce compact"]  # in run.py --suite cpu
ON_CPU = [name for name, peer in PEERS.items() if not peer.gpu_only and name not in SLOW]


@pytest.mark.parametrize("name", [*OURS, *ON_CPU])
def test_linear_loss(name: str, run: Callable[..., None]) -> None:
    run(title_of("linear_loss"), name, "linear_loss")


@pytest.mark.parametrize("name", FEW)
def test_linear_loss_frozen_head(name: str, run: Callable[..., None]) -> None:
    run(title_of("linear_loss", True), name, "linear_loss", frozen_head=True)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_linear_loss_by_pass(phase: str, name: str, run: Callable[..., None]) -> None:
    run(title_of("linear_loss", phase=phase), name, "linear_loss", phase=phase)


@pytest.mark.parametrize("name", FEW)
def test_linear_logprob(name: str, run: Callable[..., None]) -> None:
    run(title_of("linear_logprob"), name, "linear_logprob")


@pytest.mark.parametrize("name", FEW)
def test_score(name: str, run: Callable[..., None]) -> None:
    run(title_of("score"), name, "score")
