"""Determinism: the same bits every time, and under torch's deterministic mode."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from on_device import (
    DEVICE,
    ON_GPU,
    a_lol,
    each_backend,
    each_dtype,
    each_kernel,
    leaves,
    loss_inputs,
    peaky,
    same,
    score,
    size,
    split,
)
from torch import Tensor

import lolkernels as lk

# What torch asks of cuBLAS's users in deterministic mode; read when its first product runs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

N, D, V = size(300, 10), 64, size(5003, 131)
FORWARDS, BACKWARDS = size(250, 3), size(50, 3)
each_op = pytest.mark.parametrize("op", ["linear_loss", "linear_logprob", "logprob"])


class Call:
    def __init__(self, op: str, backend: str, dtype: torch.dtype) -> None:
        self.op, self.backend = op, backend
        self.p, self.wanted = leaves(peaky(N, D, V, dtype=dtype, bias=True))
        self.seq, self.side = loss_inputs(N, split(N), torch.full((N,), -5.0, device=DEVICE))
        self.logits = torch.randn(N, V, device=DEVICE).to(dtype).requires_grad_()

    def forward(self) -> Any:
        if self.op == "linear_loss":
            budget = 4 * V * N // 2
            return a_lol(self.p, self.seq, self.side, backend=self.backend, memory_budget=budget)
        if self.op == "linear_logprob":
            return score(self.p, backend=self.backend)
        return lk.logprob(self.logits, self.p.labels, backend=self.backend)

    def backward(self) -> list[Tensor]:
        out = self.forward()
        if self.op == "linear_loss":
            return list(torch.autograd.grad(out.loss, self.wanted))
        total = (out.logps + 0.1 * out.entropy).sum()
        return list(
            torch.autograd.grad(total, self.logits if self.op == "logprob" else self.wanted)
        )


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
    call = Call(op, backend, dtype)
    first = [t.clone() for t in call.forward()]
    assert all(t.isfinite().all() for t in first)
    for _ in range(FORWARDS):
        same(list(call.forward()), first)
    first = call.backward()
    for _ in range(BACKWARDS):
        same(call.backward(), first)


@each_kernel
def test_the_same_bits_while_the_device_is_busy(backend: str) -> None:
    """Other work beside it changes the order in which programs run, and nothing else."""
    call = Call("linear_loss", backend, torch.bfloat16)
    first = call.backward()
    if not ON_GPU:
        return
    noise = torch.randn(4096, 4096, device=DEVICE)
    stream = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(stream):
            torch.mm(noise, noise)
        same(call.backward(), first)
    stream.synchronize()


@each_backend
@each_dtype
@each_op
def test_deterministic_mode(op: str, dtype: torch.dtype, backend: str, deterministic: None) -> None:
    call = Call(op, backend, dtype)
    first = [*call.forward(), *call.backward()]
    assert all(t.isfinite().all() for t in first)
    for _ in range(3):
        same([*call.forward(), *call.backward()], first)
