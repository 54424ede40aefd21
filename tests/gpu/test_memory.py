"""What a call takes on a GPU beyond its inputs and the gradients it returns: the stated formula."""

from typing import Any

import pytest
import torch
from on_device import DEVICE, each_kernel, leaves, needs_gpu, peaky, score
from torch import Tensor

import lolkernels as lk
from lolkernels import memory, objectives

pytestmark = needs_gpu
MIB = 2**20
D, V, LENGTH = 1024, 50257, 128


def run(
    op: str, p: Any, wanted: list[Tensor], backend: str, budget: int | None, into: Any = None
) -> Any:
    options = {"backend": backend, "memory_budget": budget, "accumulate_into": into}
    if op == "score":
        with torch.no_grad():
            return score(p, **options)
    if op == "linear_logprob":
        return differentiated(score(p, **options).logps.sum(), wanted, into)
    n = len(p.labels)
    seq = lk.Sequences.from_lengths([LENGTH] * (n // LENGTH)).to(DEVICE)
    side = {
        "ref_logps": torch.full((n,), -9.0, device=DEVICE),
        "advantages": torch.ones(n // LENGTH, device=DEVICE),
    }
    loss = lk.linear_loss(
        objectives.a_lol, p.hidden, p.weight, p.labels, seq, **side, **options
    )  # fmt: skip
    return differentiated(loss, wanted, into)


def differentiated(loss: Tensor, wanted: list[Tensor], into: Any) -> Any:
    if into is None:
        return torch.autograd.grad(loss, wanted)
    loss.backward()  # autograd.grad adds nothing to a buffer
    made, wanted[0].grad = wanted[0].grad, None
    return [made]


def extra(
    op: str,
    backend: str,
    *,
    n: int,
    d: int,
    dtype: torch.dtype,
    frozen: bool,
    budget: int | None,
    added: torch.dtype | None = None,
) -> int:
    """Peak bytes less those before the call and those of its gradients."""
    p, wanted = leaves(peaky(n, d, V, dtype=dtype), frozen)
    into = None if added is None else torch.zeros(V, d, dtype=added, device=DEVICE)
    run(op, p, wanted, backend, budget, into)  # compiles; cuBLAS takes its workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = run(op, p, wanted, backend, budget, into)
    torch.cuda.synchronize()
    returned = 0 if op == "score" else sum(t.nbytes for t in out)
    return torch.cuda.max_memory_allocated() - before - returned


def stated(
    op: str,
    backend: str,
    *,
    n: int,
    d: int,
    dtype: torch.dtype,
    frozen: bool,
    budget: int | None,
    added: torch.dtype | None = None,
) -> int:
    device = torch.device("cuda", torch.cuda.current_device())
    rows = memory.kept_rows(V, d, dtype.itemsize, budget, device)
    return memory.extra_bytes(
        op,
        longest_block=rows // LENGTH * LENGTH,
        num_rows=n,
        hidden_size=d,
        vocab=V,
        hidden_bytes=dtype.itemsize,
        weight_bytes=dtype.itemsize,
        frozen_weight=frozen,
        memory_budget=budget,
        device=device,
        buffer_bytes=None if added is None else added.itemsize,
    )


@each_kernel
@pytest.mark.parametrize("budget", [None, 128 * MIB], ids=["default", "128 MiB"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("op", ["linear_loss", "linear_logprob", "score"])
def test_the_stated_memory(
    op: str, frozen: bool, dtype: torch.dtype, budget: int | None, backend: str
) -> None:
    case = {"n": 4096, "d": D, "dtype": dtype, "frozen": frozen, "budget": budget}
    measured, formula = extra(op, backend, **case) / MIB, stated(op, backend, **case) / MIB
    # A scratch tensor of torch's own (a sum, a converted vector) takes less than 2 MiB.
    assert abs(measured - formula) <= 0.1 * formula + 2, (measured, formula)


@each_kernel
@pytest.mark.parametrize("budget", [None, 128 * MIB], ids=["default", "128 MiB"])
@pytest.mark.parametrize("added", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", ["linear_loss", "linear_logprob"])
def test_a_buffer_takes_the_place_of_dweight(
    op: str, added: torch.dtype, budget: int | None, backend: str
) -> None:
    case: Any = {"n": 4096, "d": D, "dtype": torch.bfloat16, "frozen": False, "budget": budget}
    case["added"] = added
    measured, formula = extra(op, backend, **case) / MIB, stated(op, backend, **case) / MIB
    assert abs(measured - formula) <= 0.1 * formula + 2, (measured, formula)


@each_kernel
@pytest.mark.parametrize("op", ["linear_loss", "linear_logprob", "score"])
def test_memory_does_not_grow_with_the_rows(op: str, backend: str) -> None:
    """With a fixed budget, but for what is stated: row vectors and gradients of hidden."""
    case = {"d": 64, "dtype": torch.bfloat16, "frozen": True, "budget": 128 * MIB}
    few, many = (extra(op, backend, n=n, **case) / MIB for n in (2048, 16_384))
    rows = 16_384 * (4 * 64 + 2 * 64 + 48) / MIB
    assert many <= 1.05 * few + rows, (few, many)
