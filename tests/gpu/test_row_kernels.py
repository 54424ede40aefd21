"""The row functions themselves, between red zones, in every layout, against float64."""

import random
from typing import Any

import pytest
import torch
from judges import row_stats
from on_device import (
    DEVICE,
    DTYPES,
    HALF,
    ON_GPU,
    RedZones,
    check_stats,
    each_dtype,
    each_kernel,
    equal_bits,
    same,
    size,
)
from torch import Tensor

from lolkernels.backends import TABLE, reference

LAYOUTS = ("plain", "offset", "sliced", "transposed")
VOCABULARIES = (1, 2, 3, 127, 129, 1023, 1025, 4097, 8192, 50257, 151936)
VOCABULARIES = VOCABULARIES if ON_GPU else VOCABULARIES[:6]
OPTIONS = (
    {"scale": 1.0, "softcap": 0.0, "temperature": 1.0},
    {"scale": 0.25, "softcap": 0.0, "temperature": 0.5},
    {"scale": 3.0, "softcap": 7.0, "temperature": 0.8},
)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_v = pytest.mark.parametrize("v", VOCABULARIES)


def rows_of(v: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, labels of which some lie outside, and a, b, c."""
    r = random.Random(f"{v} {dtype} {seed}")
    n = r.randint(2, size(40, 6))
    logits = torch.randn(n, v) * r.uniform(1, 6)
    if seed % 3 == 2:
        logits[torch.rand(n, v) < 0.3] = -torch.inf
        logits[:, 0] = 0.0
    labels = torch.randint(-3, v + 3, (n,))
    labels[0], labels[1] = v - 1, [v, -1, 2**31, 2**40, -(2**63)][seed % 5]
    abc = [torch.randn(n) for _ in range(3)]
    return logits.to(dtype), labels, abc


def truth_of(logits: Tensor, labels: Tensor, abc: list[Tensor], options: Any) -> Any:
    x, y = logits.double().to(DEVICE), labels.to(DEVICE)
    stats = row_stats(reference, x, y, **options)
    given = (t.double().to(DEVICE) for t in abc)
    dx = reference.dlogits_(x.clone(), y, stats[1], *given, **options)
    return stats, dx


def check_gradient(
    got: Tensor, true: Tensor, exact: tuple[Tensor, ...], abc: list[Tensor], options: Any
) -> None:
    """Terms before they cancel, times what z - lse in float32 leaves, and one rounding."""
    a, b, c = (t.abs().to(DEVICE)[:, None] for t in abc)
    z = exact[3].abs()[:, None] + exact[1].abs()[:, None]
    rounding = torch.finfo(got.dtype).eps / 2 * (2 if not ON_GPU else 1)
    chain = options["scale"] / options["temperature"]
    allowed = 1e-5 * chain * (a + b + c * z) + rounding * true.abs() + 1e-7
    error = (got.double() - true).abs()
    assert bool((error <= allowed).all()), float((error / allowed).max())
    if float((0.02 * true.abs() - 2 * allowed).max()) > 0:
        assert not bool(((1.02 * got.double() - true).abs() <= allowed).all())


@each_kernel
@each_dtype
@each_layout
@each_v
def test_statistics_and_gradients(v: int, layout: str, dtype: torch.dtype, backend: str) -> None:
    module = TABLE[backend]
    for seed, options in enumerate(OPTIONS):
        logits, labels, abc = rows_of(v, dtype, seed)
        exact, true = truth_of(logits, labels, abc, options)
        zones = RedZones()
        x = zones.place("logits", logits, layout)
        y = zones.place("labels", labels, LAYOUTS[seed])
        stats = row_stats(module, x, y, **options)
        given = [
            zones.place(k, t, LAYOUTS[(seed + i) % 3])
            for i, (k, t) in enumerate(zip(("lse", *"abc"), (stats[1], *abc), strict=True))
        ]
        out = zones.output("out", tuple(x.shape), dtype, LAYOUTS[(seed + 1) % 4])
        assert module.dlogits_(x, y, *given, **options, out=out) is out
        for other in {*DTYPES} - {dtype}:
            wide = zones.output(f"out {other}", tuple(x.shape), other, "offset")
            module.dlogits_(x, y, *given, **options, out=wide)
            check_gradient(wide, true, exact, abc, options)
        zones.check()
        check_stats(stats, exact)
        check_gradient(out, true, exact, abc, options)
        # In place, in the same layout.
        own = RedZones()
        mine = own.output("in place", tuple(x.shape), dtype, layout)
        mine.copy_(x)
        module.dlogits_(mine, y, *given, **options)
        own.check()
        same([mine], [out])


@each_kernel
@pytest.mark.parametrize("narrow", HALF, ids=str)
@each_v
def test_half_precision_gradients_over_fp32_logits(
    v: int, narrow: torch.dtype, backend: str
) -> None:
    """Row by row the gradients take the first half of the logits' bytes, and nothing beyond."""
    module = TABLE[backend]
    for seed, options in enumerate(OPTIONS):
        logits, labels, abc = rows_of(v, torch.float32, seed)
        n, pitch = len(logits), -(-v // 16) * 16
        exact, true = truth_of(logits, labels, abc, options)
        y, given = labels.to(DEVICE), [t.to(DEVICE) for t in abc]
        buffer = torch.full((n + 2, pitch), -7.5, device=DEVICE)
        x = buffer[1:-1, :v]
        x.copy_(logits)
        stats = row_stats(module, x, y, **options)
        out = x.view(narrow)[:, :v] if x.stride(1) == 1 else None
        apart = torch.empty(n, v, dtype=narrow, device=DEVICE)
        module.dlogits_(x.clone(), y, stats[1], *given, **options, out=apart)
        before = buffer.clone()
        module.dlogits_(x, y, stats[1], *given, **options, out=out)
        same([out], [apart])
        check_gradient(out, true, exact, abc, options)
        bytes_now, bytes_then = (t.view(torch.uint8) for t in (buffer, before))
        assert equal_bits(bytes_now[:, 2 * v :], bytes_then[:, 2 * v :])
        assert equal_bits(buffer[0], before[0]) and equal_bits(buffer[-1], before[-1])


@each_kernel
@each_v
def test_a_bias_is_added_to_the_logits(v: int, backend: str) -> None:
    module = TABLE[backend]
    if backend == "cpu":
        pytest.skip("on a CPU the bias stands in the panels already")
    for seed, options in enumerate(OPTIONS):
        logits, labels, abc = rows_of(v, torch.float32, seed)
        x, y, bias = logits.to(DEVICE), labels.to(DEVICE), torch.randn(v, device=DEVICE)
        whole, given = x + bias, [t.to(DEVICE) for t in abc]
        same(module.sums(x, y, bias=bias, **options), module.sums(whole, y, **options))
        lse = row_stats(module, whole, y, **options)[1]
        want = module.dlogits_(whole.clone(), y, lse, *given, **options)
        same([module.dlogits_(x.clone(), y, lse, *given, bias=bias, **options)], [want])
        same(
            [*module.exps_(x, y, bias=bias, **options), x],
            [*module.exps_(whole, y, **options), whole],
        )


FAMILY = {
    "no ratio": {"ratio": 0, "log_low": -60.0, "log_high": 60.0},
    "sequence": {"ratio": 1, "log_low": -0.5, "log_high": 0.6},
    "token": {"ratio": 2, "log_low": -0.2, "log_high": 0.18},
    "no upper bound": {"ratio": 2, "log_low": -2.3, "log_high": float("inf")},
    "no lower bound": {"ratio": 1, "log_low": float("-inf"), "log_high": 0.9},
}


@each_kernel
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("with_ref", [True, False])
@pytest.mark.parametrize("name", FAMILY)
def test_sequence_coefficients(name: str, with_ref: bool, beta: float, backend: str) -> None:
    for longest in (1, 40, size(600, 50), size(5000, 60)):
        lengths = torch.randint(0, longest + 1, (9,))
        cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        n = int(cu[-1])
        logps = -3 * torch.rand(n)
        ref = logps + 0.02 * torch.randn(n) if with_ref else None
        zones = RedZones()
        placed = [
            zones.place("logps", logps),
            None if ref is None else zones.place("ref", ref),
            zones.place("cu", cu),
            zones.place("weight", torch.randn(9)),
        ]
        options = {**FAMILY[name], "beta": beta}
        got = TABLE[backend].sequence_coef(*placed, **options)
        zones.check()
        doubled = [t if t is None or not t.is_floating_point() else t.double() for t in placed]
        want = reference.sequence_coef(*doubled, **options)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == torch.float32 and a.shape == b.shape
            bound = 1e-6 + 2e-6 * b.abs()
            assert bool(((a - b).abs() <= bound).all()), name
