"""What a call takes on a GPU beyond its inputs and the gradients it returns: the stated formula."""

import pytest
import torch
from on_device import DEVICE, each_kernel, leaves, needs_gpu, peaky, score

import lolkernels as lk
from lolkernels import memory, objectives

pytestmark = needs_gpu
MIB = 2**20
V, LENGTH = 50257, 128
each_op = pytest.mark.parametrize("op", ["linear_loss", "linear_logprob", "score"])


def extra(
    op: str, backend: str, n: int, d: int, dtype: torch.dtype, frozen: bool, budget: int | None
) -> int:
    """Peak bytes less those before the call and those of its gradients."""
    p, wanted = leaves(peaky(n, d, V, dtype=dtype), frozen)
    options = {"backend": backend, "memory_budget": budget}
    seq = lk.Sequences.from_lengths([LENGTH] * (n // LENGTH)).to(DEVICE)
    side = {"ref_logps": torch.full((n,), -9.0, device=DEVICE)}
    side["advantages"] = torch.ones(n // LENGTH, device=DEVICE)
    before = 0
    for _ in range(2):  # the first compiles, and cuBLAS takes its workspace
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        if op == "linear_loss":
            call = (objectives.a_lol, p.hidden, p.weight, p.labels, seq)
            total = lk.linear_loss(*call, **side, **options)
        else:
            with torch.set_grad_enabled(op != "score"):
                total = score(p, **options).logps.sum()
        out = [] if op == "score" else torch.autograd.grad(total, wanted)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        returned = sum(t.nbytes for t in out)
        del out, total
    return peak - before - returned


@each_kernel
@pytest.mark.parametrize("budget", [None, 128 * MIB], ids=["default", "128 MiB"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@each_op
def test_the_stated_memory(
    op: str, frozen: bool, dtype: torch.dtype, budget: int | None, backend: str
) -> None:
    n, d, device = 4096, 1024, torch.device("cuda", torch.cuda.current_device())
    rows = memory.kept_rows(V, d, dtype.itemsize, budget, device)
    sizes = {"hidden_size": d, "vocab": V, "frozen_weight": frozen, "memory_budget": budget}
    sizes |= {"num_rows": n, "longest_block": rows // LENGTH * LENGTH, "device": device}
    sizes |= dict.fromkeys(("hidden_bytes", "weight_bytes"), dtype.itemsize)
    formula = memory.extra_bytes(op, **sizes) / MIB
    measured = extra(op, backend, n, d, dtype, frozen, budget) / MIB
    # A scratch tensor of torch's own (a sum, a converted vector) takes less than 2 MiB.
    assert abs(measured - formula) <= 0.1 * formula + 2, (measured, formula)


@each_kernel
@each_op
def test_memory_does_not_grow_with_the_rows(op: str, backend: str) -> None:
    """With a fixed budget, but for what is stated: row vectors and gradients of hidden."""
    few, many = (
        extra(op, backend, n, 64, torch.bfloat16, True, 128 * MIB) / MIB for n in (2048, 16_384)
    )
    assert many <= 1.05 * few + 16_384 * (4 * 64 + 2 * 64 + 48) / MIB, (few, many)
