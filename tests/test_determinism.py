"""Bit equality: run after run, whatever the number of threads, and with poisoned fresh memory."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import calls, each_backend, each_dtype
from torch import Tensor

OFTEN = ["cpu", "reference"]  # Triton's interpreter is slow: 20 runs, in test_triton


@pytest.fixture(autouse=True)
def _restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small_calls(backend: str, dtype: torch.dtype) -> Any:
    return calls(backend, dtype, n=9 if backend == "triton" else 70, d=16, v=500)


NAMES = ["logprob", "linear_logprob", "a_lol", "r_gold"]


def run(call: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    out = call().sum()
    return [out.detach(), *torch.autograd.grad(out, leaves)]


@each_dtype
@pytest.mark.parametrize("backend", [*OFTEN, pytest.param("cuda_host", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_250_forwards_and_50_backwards_are_bit_equal(
    name: str, backend: str, dtype: torch.dtype
) -> None:
    call, leaves = calls(backend, dtype, n=20, d=8, v=130)[name]
    torch.set_num_threads(1)
    first = run(call, leaves)
    with torch.no_grad():
        silent = call()
        for _ in range(250):
            assert torch.equal(call(), silent)
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(run(call, leaves), first, strict=True))
    torch.set_num_threads(2)
    second = run(call, leaves)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(call, leaves), second, strict=True))
    assert all(float(t.abs().max()) > 0 for t in first)


@each_dtype
@pytest.mark.parametrize("backend", OFTEN)
@pytest.mark.parametrize("name", NAMES)
def test_one_and_two_threads_agree(name: str, backend: str, dtype: torch.dtype) -> None:
    """Our row functions bit for bit; the library's GEMM may split its sums by threads."""
    call, leaves = calls(backend, dtype, n=97, d=16, v=2300)[name]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(call, leaves))
    for one, two in zip(*results, strict=True):
        if name == "logprob":  # no GEMM in it
            assert torch.equal(one, two)
        else:
            scale = float(one.abs().max())
            assert (
                float((one - two).abs().max())
                <= (2**-7 if one.dtype != torch.float32 else 2e-6) * scale
            )


@each_backend
@pytest.mark.parametrize("name", NAMES)
def test_fresh_memory_full_of_nan_changes_nothing(name: str, backend: str) -> None:
    """Every element of a result is written: torch fills new tensors with NaN in this mode."""
    call, leaves = small_calls(backend, torch.bfloat16)[name]
    clean = run(call, leaves)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert bool(torch.empty(8).isnan().all())
        poisoned = run(call, leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(clean, poisoned, strict=True):
        assert bool(b.isfinite().all()) and torch.equal(a, b)


@each_backend
def test_no_op_draws_from_the_random_generator(backend: str) -> None:
    for call, leaves in small_calls(backend, torch.float32).values():
        before = torch.get_rng_state()
        run(call, leaves)
        assert torch.equal(before, torch.get_rng_state())
