"""The GEMM for Hopper: its sums and exponentials against float64, for each of its tiles.

A dry run takes the epilogue that g++ compiles and torch's product (tests/test_cuda_spans.py).
"""

import math
from functools import partial
from typing import Any

import pytest
import torch
from on_device import DEVICE, ON_GPU, needs_gpu, peaky
from torch import Tensor

from lolkernels.backends import TABLE, cuda_gemm, reference
from lolkernels.backends.contract import SHIFT, Exps
from lolkernels.backends.finish import statistics

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
EPS = torch.finfo(torch.bfloat16).eps


@pytest.fixture(params=cuda_gemm.TILES)
def gemm(request: pytest.FixtureRequest) -> Any:
    if ON_GPU:
        reason = cuda_gemm.why_unavailable()
        if reason is not None:
            pytest.skip(reason)
        return TABLE[f"cuda_gemm_{request.param}"].gemm
    import cuda_host_backend as host

    if host.why_unavailable() is not None:
        pytest.skip("needs g++")
    return partial(host.GEMM_BACKEND.gemm, tile=request.param)


def place(n: int, v: int) -> tuple[Tensor, Tensor]:
    """Rows with room for a multiple of 8 columns, between borders of nan; and the whole."""
    stride = -(-v // 8) * 8 + 16
    whole = torch.full((128 + n * stride,), math.nan, dtype=torch.bfloat16, device=DEVICE)
    return whole.as_strided((n, v), (stride, 1), 64), whole


def check_borders(view: Tensor, whole: Tensor) -> None:
    n, v = view.shape
    kept = whole.clone()
    kept.as_strided((n, -(-v // 8) * 8), view.stride(), 64).fill_(math.nan)
    assert bool(kept.isnan().all())


def check(got: Exps, e: Tensor, x: Tensor, labels: Tensor, **options: Any) -> None:
    """Relative to the anchor that was used. What tensor cores add is cut off: up to 5e-5 a logit.

    x: hidden weight^T + bias in float64.
    """
    exact = torch.empty_like(x)
    want = reference.exps_(x, labels, got.anchor.double(), **options, out=exact)
    assert bool((got.anchor - want.anchor).abs().max() <= 1e-4)
    scale = max(1.0, float(want.max_logit.abs().max()) / 30)
    for name in ("max_logit", "target_logit"):
        a, b = getattr(got, name), getattr(want, name)
        assert bool(((a == b) | ((a - b).abs() <= 1e-4 * scale)).all()), name
    assert float((got.slope - want.slope).abs().max()) <= 1e-4
    logps, true = statistics(got).logps, statistics(want).logps
    assert bool(((logps == true) | ((logps - true).abs() <= 1e-4 * scale)).all())
    assert bool(((got.rest - want.rest).abs() <= 2e-4 * scale * want.rest).all())
    top = exact.abs().amax(1, keepdim=True)
    bound = (1.1 * EPS + 2e-4 * scale) * exact.abs() + 1e-6 * top + 1e-37
    assert bool(((e.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "scale", "softcap"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_exponentials(
    gemm: Any, shape: tuple[int, ...], with_bias: bool, options: Any
) -> None:
    n, _, v = shape
    p = peaky(*shape, dtype=torch.bfloat16, bias=with_bias)
    x = p.hidden.double() @ p.weight.double().T + (0 if p.bias is None else p.bias.double())
    labels = p.labels.clone()
    anchor = reference.sums(x, labels, **options).target_logit.float() + SHIFT
    labels[::5] = v + 1  # no target in these columns
    anchor[1::3] -= 90.0  # out of reach where the row is high
    anchor[2::7] = -math.inf
    out, whole = place(n, v)
    got = gemm(p.hidden, p.weight, p.bias, labels, anchor, out, **options)
    check_borders(out, whole)
    check(got, out, x, labels, **options)
    again, _ = place(n, v)
    for a, b in zip(
        (*gemm(p.hidden, p.weight, p.bias, labels, anchor, again, **options), again),
        (*got, out),
        strict=True,
    ):
        assert torch.equal(a, b)
    scored = gemm(p.hidden, p.weight, p.bias, labels, anchor, None, **options)
    assert all(torch.equal(a, b) for a, b in zip(scored, got, strict=True))


@needs_gpu
def test_more_than_2_31_exponentials(gemm: Any) -> None:
    n, d, v = 17_000, 64, 131_072
    p = peaky(n, d, v, dtype=torch.bfloat16)
    out = torch.empty(n, v, dtype=torch.bfloat16, device=DEVICE)
    anchor = (p.hidden.float() * p.weight[p.labels].float()).sum(1) + SHIFT
    got = gemm(p.hidden, p.weight, None, p.labels, anchor, out)
    cut = 2**31 // v
    for rows in (slice(0, 8), slice(cut - 4, cut + 4), slice(n - 8, n)):
        x = p.hidden[rows].double() @ p.weight.double().T
        check(Exps(*(t[rows] for t in got)), out[rows], x, p.labels[rows])
