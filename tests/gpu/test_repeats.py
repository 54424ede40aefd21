"""Determinism: the same bits every time, and under torch's deterministic mode."""

import os
from collections.abc import Iterator

import pytest
import torch
from on_device import (
    DEVICE,
    ON_GPU,
    Step,
    each_backend,
    each_dtype,
    each_kernel,
    each_op,
    same,
    size,
)

# What torch asks of cuBLAS's users in deterministic mode; read when its first product runs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

FORWARDS, BACKWARDS = size(250, 3), size(50, 3)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Here torch also fills new tensors with nan: what nothing writes would show."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@each_kernel
@each_dtype
@each_op
def test_the_same_bits_again(op: str, dtype: torch.dtype, backend: str) -> None:
    step = Step(op, backend, dtype)
    first = [t.detach().clone() for t in step.forward()[1]]
    assert all(t.isfinite().all() for t in first)
    for _ in range(FORWARDS):
        same([t.detach() for t in step.forward()[1]], first)
    whole = step()
    for _ in range(BACKWARDS):
        same(step(), whole)


@each_kernel
def test_the_same_bits_while_the_device_is_busy(backend: str) -> None:
    """Other work beside it changes the order in which programs run, and nothing else."""
    step = Step("linear_loss", backend)
    first = step()
    if not ON_GPU:
        return
    noise, stream = torch.randn(4096, 4096, device=DEVICE), torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(stream):
            torch.mm(noise, noise)
        same(step(), first)
    stream.synchronize()


@each_backend
@each_dtype
@each_op
def test_deterministic_mode(op: str, dtype: torch.dtype, backend: str, deterministic: None) -> None:
    step = Step(op, backend, dtype)
    first = step()
    assert all(t.isfinite().all() for t in first)
    for _ in range(3):
        same(step(), first)
