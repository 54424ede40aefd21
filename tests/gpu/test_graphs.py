"""CUDA graphs, side streams, a second device, and torch.compile as one graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_device import (
    DEVICE,
    DTYPES,
    LENGTHS,
    ON_GPU,
    D,
    Step,
    V,
    each_budget,
    each_dtype,
    each_kernel,
    each_op,
    leaves,
    moved,
    needs_gpu,
    peaky,
    same,
)
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives


@needs_gpu
@each_kernel
@each_dtype
@each_op
@each_budget
def test_ten_replays_of_a_cuda_graph(
    budget: int | None, op: str, dtype: torch.dtype, backend: str
) -> None:
    step = Step(op, backend, dtype, budget)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(10):
        step.fill(seed)
        graph.replay()
        got = [t.clone() for t in captured]
        same(got, step())
    lk.check_errors()


@needs_gpu
@each_kernel
def test_a_bad_label_in_a_replay_is_reported(backend: str) -> None:
    step = Step("linear_loss", backend)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    step.p.labels[3] = V
    graph.replay()
    with pytest.raises(ValueError, match="labels held"):
        lk.check_errors()
    assert captured[0].isnan()


@needs_gpu
@each_kernel
@each_op
def test_a_side_stream(op: str, backend: str) -> None:
    """A call works behind what its own stream still has to do."""
    source, target = (Step(op, backend) for _ in range(2))
    source.fill(1)
    want = source()
    target()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        target.take(source.p, source.side)
        got = target()
    stream.synchronize()
    same(got, want)


@pytest.mark.skipif(not ON_GPU or torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@each_kernel
@each_op
def test_tensors_on_a_device_that_is_not_the_current_one(op: str, backend: str) -> None:
    step = Step(op, backend)
    want = step()
    there = torch.device("cuda", 1)
    step.p, step.wanted = leaves(moved(step.p, there))
    step.logits = step.logits.detach().to(there).requires_grad_()
    step.seq = step.seq.to(there)
    step.side = {k: v.to(there) for k, v in step.side.items()}
    same([t.to(DEVICE) for t in step()], want)


def by_loss(h: Tensor, w: Tensor, y: Tensor, seq: Any, ref: Tensor, adv: Tensor) -> Tensor:
    side = {"ref_logps": ref, "advantages": adv}
    return 2 * lk.linear_loss(objectives.a_lol, 0.5 * h, w, y, seq, **side)


def by_logprob(h: Tensor, w: Tensor, y: Tensor, seq: Any, ref: Tensor, adv: Tensor) -> Tensor:
    out = lk.linear_logprob(0.5 * h, w, y)
    loss = objectives.a_lol(out.logps, ref, adv, seq) + 0.1 * seq.sum(out.entropy)
    return lk.aggregate(loss, seq)


def by_logits(h: Tensor, w: Tensor, y: Tensor, seq: Any, ref: Tensor, adv: Tensor) -> Tensor:
    out = lk.logprob(0.5 * h @ w.T, y)
    return lk.aggregate(objectives.a_lol(out.logps, ref, adv, seq), seq)


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES[:2] if ON_GPU else DTYPES[:1], ids=str)
@pytest.mark.parametrize("function", [by_loss, by_logprob, by_logits], ids=lambda f: f.__name__)
def test_compile_as_one_graph(
    function: Callable[..., Tensor], dtype: torch.dtype, backend: str
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiler = "inductor" if ON_GPU else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for lengths in (LENGTHS, LENGTHS[::-1], [*LENGTHS, 5]):
        n = sum(lengths)
        p, _ = leaves(peaky(n, D, V, dtype=dtype))
        seq = lk.Sequences.from_lengths(lengths).to(DEVICE)
        ref, adv = torch.full((n,), -7.0), torch.linspace(-0.5, 1, len(lengths))
        found = []
        for f in (compiled, function):
            with lk.use_backend(backend):
                loss = f(p.hidden, p.weight, p.labels, seq, ref.to(DEVICE), adv.to(DEVICE))
            found.append([loss.detach(), *torch.autograd.grad(loss, (p.hidden, p.weight))])
        for got, want in zip(*found, strict=True):
            # Sums of a fused kernel are not eager's to the last bit.
            tolerance = 2e-5 if dtype == torch.float32 else 2e-2
            assert got.dtype == want.dtype and got.shape == want.shape
            error = float((got - want).abs().max())
            assert error <= tolerance * max(1e-6, float(want.abs().max()))
    assert not torch._dynamo.utils.counters["graph_break"]
