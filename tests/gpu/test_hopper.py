"""The GEMM for Hopper: its statistics and exponentials, and linear_loss on top, against float64.

A dry run takes the epilogue that g++ compiles and torch's product (tests/test_cuda_spans.py).
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from on_device import (
    DEVICE,
    HALF,
    ON_GPU,
    a_lol,
    check_stats,
    leaves,
    loss_inputs,
    needs_gpu,
    peaky,
    score,
    split,
)
from torch import Tensor

import lolkernels as lk
from lolkernels import planner
from lolkernels.backends import TABLE, cuda_hopper, reference

FULL = [  # rows, hidden size, vocabulary
    (1, 8, 1),
    (3, 16, 9),
    (65, 64, 127),
    (130, 72, 255),
    (200, 72, 1025),
    (129, 1024, 32003),
    (64, 4096, 50257),
    (1000, 512, 257),
    (300, 1024, 151936),
]
SHAPES = FULL if ON_GPU else FULL[:4]
OPTIONS: list[dict[str, float]] = [
    {},
    {"scale": 0.5, "temperature": 0.7},
    {"softcap": 30.0, "scale": 1.5},
]
each_dtype = pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d)[6:])


@pytest.fixture(params=[0, 1], ids=["cooperative", "pingpong"])
def hopper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(cuda_hopper, "SCHEDULE", request.param)
    yield request.getfixturevalue("module")


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if ON_GPU:
        reason = cuda_hopper.why_unavailable()
        if reason is not None:
            pytest.skip(reason)
        yield cuda_hopper
        return
    import test_cuda_spans as host

    if host.CXX is None:
        pytest.skip("needs g++")
    library: Path = tmp_path_factory.mktemp("spans") / "spans.so"
    made = host.backend(host.compile_spans(library, "-O2"))
    real, TABLE["cuda_hopper"] = TABLE["cuda_hopper"], made
    yield made
    TABLE["cuda_hopper"] = real


def place(n: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows with room for a multiple of 16 columns, between borders of nan; and the whole."""
    stride = planner.padded(v) + 16
    whole = torch.full((128 + n * stride,), math.nan, dtype=dtype, device=DEVICE)
    return whole.as_strided((n, v), (stride, 1), 64), whole


def check_borders(view: Tensor, whole: Tensor) -> None:
    n, v = view.shape
    kept = whole.clone()
    kept.as_strided((n, -(-v // 8) * 8), view.stride(), 64).fill_(math.nan)
    assert bool(kept.isnan().all())


@each_dtype
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "scale", "softcap"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_and_gradients(
    hopper: Any, shape: tuple[int, ...], with_bias: bool, options: Any, dtype: torch.dtype
) -> None:
    n, _, v = shape
    p = peaky(*shape, dtype=dtype, bias=with_bias)
    labels = p.labels.clone()
    labels[::5] = v + 1  # no target in these columns
    out, whole = place(n, v, dtype)
    stats, spans = hopper.linear_spans(p.hidden, p.weight, p.bias, labels, out, **options)
    z = p.hidden.double() @ p.weight.double().T + (0 if p.bias is None else p.bias.double())
    check_stats(stats, reference.row_stats(z, labels, **options))
    check_borders(out, whole)
    again, _ = place(n, v, dtype)
    for a, b in zip(
        hopper.linear_spans(p.hidden, p.weight, p.bias, labels, again, **options)[0],
        stats,
        strict=True,
    ):
        assert torch.equal(a, b)
    assert torch.equal(again, out)

    coef = torch.randn(n, device=DEVICE)
    abc = (coef.double(), -coef.double(), torch.zeros_like(coef).double())
    want = reference.dlogits_(z, labels, stats[1].double(), *abc, **options)
    got = hopper.span_dlogits_(out, spans, labels, stats[1], coef, **options)
    finfo = torch.finfo(dtype)
    size = want.abs().amax(1, keepdim=True)
    small = finfo.tiny * finfo.eps * (1 + 2 * coef.abs()[:, None])  # float16 loses digits there
    small += 5e-6 * coef.abs()[:, None]  # and a confident label those of its log-prob
    bound = 1.1 * finfo.eps * want.abs() + 1e-4 * size + small
    assert bool(((got.double() - want).abs() <= bound).all())
    check_borders(out, whole)


@each_dtype
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 20.0, "temperature": 0.8}])
def test_linear_loss(hopper: Any, frozen: bool, dtype: torch.dtype, options: Any) -> None:
    n, d, v = (700, 256, 32003) if ON_GPU else (40, 24, 300)
    p, wanted = leaves(peaky(n, d, v, dtype=dtype, **options), frozen)
    exact, exact_wanted = leaves(p.double(), frozen)
    with torch.no_grad():
        truth = score(exact, backend="reference").logps
    seq, side = loss_inputs(n, split(n), truth)
    want = a_lol(exact, seq, {k: t.double() for k, t in side.items()}, backend="reference")
    want_grads = torch.autograd.grad(want.loss, exact_wanted)
    eps = torch.finfo(dtype).eps
    for budget in (None, 2 * v * 100, 2 * v * 20):
        out = a_lol(p, seq, side, backend="cuda_hopper", memory_budget=budget)
        assert float((out.logps - want.logps).abs().max()) <= 2e-5
        grads = torch.autograd.grad(out.loss, wanted)
        for got, true in zip(grads, want_grads, strict=True):
            error = (got.double() - true).norm() / true.norm()
            assert float(error) <= 2 * eps, float(error)
    lk.check_errors()


def test_scoring_is_the_same_as_training(hopper: Any) -> None:
    p = peaky(130, 64, 1025 if ON_GPU else 300, dtype=torch.bfloat16)
    seq, side = loss_inputs(130, split(130), torch.full((130,), -5.0, device=DEVICE))
    with torch.no_grad():
        scored = score(p, backend="cuda_hopper").logps
    trained = a_lol(leaves(p)[0], seq, side, backend="cuda_hopper").logps
    assert torch.equal(scored, trained)


@needs_gpu
@each_dtype
def test_more_than_2_31_exponentials(hopper: Any, dtype: torch.dtype) -> None:
    n, d, v = 17_000, 64, 131_072
    p = peaky(n, d, v, dtype=dtype)
    out = torch.empty(n, v, dtype=dtype, device=DEVICE)
    stats, spans = hopper.linear_spans(p.hidden, p.weight, None, p.labels, out)
    coef = torch.ones(n, device=DEVICE)
    got = hopper.span_dlogits_(out, spans, p.labels, stats[1], coef)
    cut = 2**31 // v
    for rows in (slice(0, 8), slice(cut - 4, cut + 4), slice(n - 8, n)):
        z = p.hidden[rows].double() @ p.weight.double().T
        labels, one = p.labels[rows], torch.ones(8, dtype=torch.float64, device=DEVICE)
        want = reference.row_stats(z, labels)
        check_stats([t[rows] for t in stats], want)
        true = reference.dlogits_(z, labels, want[1], one, -one, 0 * one)
        assert float((got[rows].double() - true).abs().max()) <= 4e-3
