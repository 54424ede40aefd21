"""More than 2^31 elements: of logits, of a chunk of logits, of the head's weight; 65,537 rows.

Judged on rows at both ends and on both sides of element 2^31, in float64.
"""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from on_device import DEVICE, ON_GPU, each_kernel, size
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives

N, V = size(65_537, 37), size(40_000, 131)
CUT = 2**31 // V if ON_GPU else 20
ROWS = torch.tensor([0, 1, CUT - 1, CUT, CUT + 1, N - 2, N - 1])
each_width = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def laid_out(n: int, v: int, dtype: torch.dtype, layout: str) -> Tensor:
    make = {"device": DEVICE, "dtype": dtype}
    if layout == "columns":
        return torch.randn(v, n, **make).T
    if layout == "padded":
        return torch.randn(n, v + 7, **make)[:, 3 : 3 + v]
    if layout == "steps":
        return torch.randn(n, 2 * (v // 2 + 1), **make)[:, ::2]
    return torch.randn(n, v, **make)


@each_kernel
@each_width
@pytest.mark.parametrize("layout", ["rows", "padded", "columns", "steps"])
def test_logprob(layout: str, dtype: torch.dtype, backend: str) -> None:
    logits = laid_out(N, V, dtype, layout).requires_grad_()
    v = logits.shape[1]
    labels = torch.randint(v, (N,), device=DEVICE)
    labels[-1] = v - 1
    out = lk.logprob(logits, labels, backend=backend)
    (grad,) = torch.autograd.grad(out.logps.sum(), logits)
    rows = ROWS.to(DEVICE)
    x = logits.detach()[rows].double().requires_grad_()
    logps = torch.log_softmax(x, 1).gather(1, labels[rows, None]).squeeze(1)
    (truth,) = torch.autograd.grad(logps.sum(), x)
    assert float((out.logps[rows] - logps).abs().max()) <= 2e-5
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3 if ON_GPU else 8e-3
    assert float((grad[rows] - truth).abs().max()) <= tolerance
    # Every row, by what is true of all: probabilities sum to one.
    assert out.logps.isfinite().all() and bool((out.logps < 0).all())
    worst = max(float(part.sum(1, dtype=torch.float64).abs().max()) for part in grad.split(4096))
    assert worst <= (1e-4 if dtype == torch.float32 else 0.05)


@each_kernel
@each_width
def test_one_chunk_of_logits(dtype: torch.dtype, backend: str) -> None:
    d = 16
    hidden = (torch.randn(N, d, device=DEVICE) * 0.7).to(dtype).requires_grad_()
    weight = torch.randn(V, d, device=DEVICE).to(dtype).requires_grad_()
    labels = torch.randint(V, (N,), device=DEVICE)
    budget = 4 * N * (V + 16)
    out = lk.linear_logprob(hidden, weight, labels, backend=backend, memory_budget=budget)
    got = torch.autograd.grad(out.logps.sum(), (hidden, weight))
    judge(hidden, weight, labels, out, got, -1.0)
    del out, got
    seq = lk.Sequences.from_lengths([N // 2, N - N // 2]).to(DEVICE)
    result = lk.linear_loss(
        objectives.nll, hidden, weight, labels, seq,
        reduction="sum", backend=backend, memory_budget=budget, return_outputs=True,
    )  # fmt: skip
    got = torch.autograd.grad(result.loss, (hidden, weight))
    judge(hidden, weight, labels, result, got, 1.0)


def judge(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    out: Any,  # logps and lse
    grads: tuple[Tensor, ...],
    sign: float,
    rows: Tensor = ROWS,
    atol: float = 2e-5,
) -> None:
    """Some rows of logps and dhidden, some of dweight: gradients of -sign sum logps."""
    h, w, v, rows = hidden.detach().double(), weight.detach(), len(weight), rows.to(DEVICE)
    z = torch.cat([h[rows] @ part.double().T for part in w.split(8192)], 1)
    log_p = torch.log_softmax(z, 1)
    truth = log_p.gather(1, labels[rows, None]).squeeze(1)
    assert float((out.logps[rows] - truth).abs().max()) <= atol
    dz = log_p.exp()
    dz[torch.arange(len(rows), device=DEVICE), labels[rows]] -= 1
    parts = zip(dz.split(8192, 1), w.split(8192), strict=True)
    close(grads[0][rows], sign * sum(a @ part.double() for a, part in parts))
    columns = torch.tensor([0, 1, v // 2, v - 2, v - 1], device=DEVICE)
    dz = (h @ w[columns].double().T - out.lse.detach().double()[:, None]).exp()
    dz -= (labels[:, None] == columns).double()
    close(grads[1][columns], sign * (dz.T @ h))


def close(got: Tensor, want: Tensor) -> None:
    tolerance = 1e-4 if got.dtype == torch.float32 else 1e-2 if ON_GPU else 3e-2
    assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


@each_kernel
def test_a_weight_of_more_than_2_31_elements(backend: str) -> None:
    n, d, v = 24, size(16_384, 40), size(151_936, 131)
    hidden = (torch.randn(n, d, device=DEVICE) * (3 / d**0.5)).to(torch.bfloat16).requires_grad_()
    weight = torch.randn(v, d, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(v, (n,), device=DEVICE)
    labels[:2] = torch.tensor([v - 1, 0], device=DEVICE)
    seq = lk.Sequences.from_lengths([n]).to(DEVICE)
    out = lk.linear_loss(
        objectives.nll, hidden, weight, labels, seq,
        reduction="sum", backend=backend, return_outputs=True,
    )  # fmt: skip
    grads = torch.autograd.grad(out.loss, (hidden, weight))
    # Sums of 16,384 products: it is their place that matters here.
    judge(hidden, weight, labels, out, grads, 1.0, torch.arange(n), atol=2e-3)
    scored = lk.linear_logprob(hidden.detach(), weight.detach(), labels, backend=backend).logps
    assert float((out.logps - scored).abs().max()) <= 2e-3
