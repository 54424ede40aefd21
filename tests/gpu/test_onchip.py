"""Row statistics of a linear head with no logits in memory, called directly."""

from typing import Any

import pytest
import torch
from on_device import (
    DEVICE,
    DTYPES,
    ON_GPU,
    RedZones,
    check_stats,
    needs_gpu,
    peaky,
    same,
    size,
)
from torch import Tensor

from lolkernels.backends import reference

pytest.importorskip("triton")
onchip = pytest.importorskip("lolkernels.backends.triton_onchip")

SHAPES = [  # rows, hidden size, vocabulary
    (1, 8, 1),
    (3, 17, 2),
    (65, 64, 127),
    (200, 72, 1025),
    (129, 1024, 32003),
    (64, 4096, 50257),
    (300, 1024, 151936),
]
# Triton's interpreter multiplies bfloat16 wrongly.
WIDTHS = [dtype for dtype in DTYPES if ON_GPU or dtype != torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", WIDTHS, ids=str)
SHAPES = SHAPES if ON_GPU else SHAPES[:3]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale": 0.5, "temperature": 0.7},
    {"softcap": 30.0, "scale": 1.5},
]


def truth(h: Tensor, w: Tensor, bias: Tensor | None, y: Tensor, options: Any) -> Any:
    x = h.double() @ w.double().T + (0 if bias is None else bias.double())
    return reference.row_stats(x, y, **options)


@each_dtype
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "scale", "softcap"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics(
    shape: tuple[int, ...], with_bias: bool, options: Any, dtype: torch.dtype
) -> None:
    p = peaky(*shape, dtype=dtype, bias=with_bias)
    labels = p.labels.clone()
    labels[::5] = shape[2] + 1  # no target in these columns
    zones = RedZones()
    h, w = zones.place("hidden", p.hidden), zones.place("weight", p.weight)
    y = zones.place("labels", labels)
    bias = None if p.bias is None else zones.place("bias", p.bias)
    got = onchip.linear_row_stats(h, w, bias, y, **options)
    zones.check()
    check_stats(got, truth(p.hidden, p.weight, p.bias, labels, options))
    same(list(onchip.linear_row_stats(h, w, bias, y, **options)), list(got))


@each_dtype
@pytest.mark.parametrize("layout", ["offset", "sliced", "transposed"])
def test_strides(layout: str, dtype: torch.dtype) -> None:
    p = peaky(size(150, 5), 64, size(1025, 129), dtype=dtype)
    zones = RedZones()
    h, w = zones.place("hidden", p.hidden, layout), zones.place("weight", p.weight, layout)
    got = onchip.linear_row_stats(h, w, None, zones.place("labels", p.labels, "sliced"))
    zones.check()
    check_stats(got, truth(p.hidden, p.weight, None, p.labels, {}))


@needs_gpu
def test_a_weight_of_more_than_2_31_elements() -> None:
    d, v = 16_384, 151_936
    h = (torch.randn(70, d, device=DEVICE) * (3 / d**0.5)).bfloat16()
    w = torch.randn(v, d, device=DEVICE, dtype=torch.bfloat16)
    y = torch.randint(v, (70,), device=DEVICE)
    y[0] = v - 1
    got = onchip.linear_row_stats(h, w, None, y)
    z = torch.cat([h.double() @ part.double().T for part in w.split(8192)], 1)
    want = reference.row_stats(z, y)
    for a, b in zip(got, want, strict=True):
        assert float((a - b).abs().max()) <= 2e-3  # sums of 16,384 products
