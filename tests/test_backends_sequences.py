"""sequence_coef of the CPU backends against a plain Python loop in float64."""

import math
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from cases import each_module, needs_cpu
from torch import Tensor

from lolkernels.backends import cpu
from lolkernels.objectives import clip_bounds

INF, NAN = math.inf, math.nan


def loop(
    logps: Tensor,
    ref_logps: Tensor | None,
    cu: Tensor,
    weight: Tensor,
    ratio: int,
    log_low: float,
    log_high: float,
    beta: float,
) -> list[Tensor]:
    """The formulas of the contract, one token at a time."""
    loss, coef, log_ratio, clipped = [], [], [], []
    for s, (first, last) in enumerate(pairwise(cu.tolist())):
        lp = logps[first:last].double().tolist()
        r = [0.0] * len(lp) if ref_logps is None else ref_logps[first:last].double().tolist()
        d = [x - y for x, y in zip(lp, r, strict=True)]
        bounded = {0: [], 1: [math.fsum(d)] * len(d), 2: d}[ratio]
        w = [math.exp(min(max(x, log_low), log_high)) for x in bounded] or [1.0] * len(d)
        wt = float(weight[s])
        loss.append(-wt * math.fsum(map(lambda a, b: a * b, w, lp)) + beta * math.fsum(d))
        coef += [-(wt * x - beta) for x in w]
        log_ratio.append(math.fsum(d))
        clipped.append(sum(x < log_low or x > log_high for x in bounded) / max(len(bounded), 1))
    return [torch.tensor(x, dtype=torch.float64) for x in (loss, coef, log_ratio, clipped)]


def case(lengths: list[int], drift: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = sum(lengths)
    logps = -torch.rand(n) * 8
    ref_logps = logps - drift + 0.2 * torch.randn(n)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    return logps, ref_logps, cu, torch.randn(len(lengths))


BOUNDS = [(math.log(0.1), math.log(1.9)), (-INF, math.log(3.0)), (math.log(0.1), INF), (-INF, INF)]


@each_module
@pytest.mark.parametrize("ratio", [0, 1, 2])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("with_ref", [True, False])
def test_the_formulas(backend, ratio, bounds, beta, with_ref) -> None:
    low, high = bounds
    for lengths in ([5], [1, 1, 1], [0, 7, 0, 130, 2, 0], [512, 3], []):
        for drift in (0.0, 0.01, -0.01):
            logps, ref_logps, cu, weight = case(lengths, drift)
            ref = ref_logps if with_ref else None
            got = backend.sequence_coef(
                logps, ref, cu, weight, ratio=ratio, log_low=low, log_high=high, beta=beta
            )
            want = loop(logps, ref, cu, weight, ratio, low, high, beta)
            for x, y in zip(got, want, strict=True):
                assert x.dtype == torch.float32 and x.shape == y.shape
                torch.testing.assert_close(x.double(), y, rtol=2e-7, atol=1e-30)


@each_module
@pytest.mark.parametrize("log_ratio", [50, -50, 88.7, 89, 200, -200, 1e4, -1e4, INF])
@pytest.mark.parametrize("weight", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("clip", [0.9, None])
def test_a_runaway_ratio_stays_finite_on_the_right_side(
    backend: ModuleType, log_ratio: float, weight: float, ratio: int, clip: float | None
) -> None:
    logps = torch.tensor([-3.0])
    low, high = clip_bounds(clip)
    loss, coef, total, clipped = backend.sequence_coef(
        logps,
        logps - log_ratio,
        torch.tensor([0, 1]),
        torch.tensor([weight]),
        ratio=ratio,
        log_low=low,
        log_high=high,
    )
    w = math.exp(min(max(log_ratio, low), high))
    rtol = 1.3e-6 if clip else 2e-5  # of exp of a float32 near 60
    torch.testing.assert_close(loss, torch.tensor([3.0 * weight * w]), rtol=rtol, atol=0)
    torch.testing.assert_close(coef, torch.tensor([-weight * w]), rtol=rtol, atol=0)
    torch.testing.assert_close(total, torch.tensor([float(log_ratio)]), rtol=1e-6, atol=0)
    assert clipped.item() == float(not low <= log_ratio <= high)


@each_module
def test_a_nan_stays_in_its_sequence_and_is_not_clipped_away(backend: ModuleType) -> None:
    logps, ref_logps, cu, weight = case([4, 4, 4], 0.0)
    want = backend.sequence_coef(logps, ref_logps, cu, weight, ratio=1, log_low=-0.5, log_high=0.5)
    logps[5] = NAN
    got = backend.sequence_coef(logps, ref_logps, cu, weight, ratio=1, log_low=-0.5, log_high=0.5)
    assert got[0][1].isnan() and got[1][4:8].isnan().all() and got[2][1].isnan()
    keep = torch.tensor([0, 2])
    for index, tokens in ((0, keep), (2, keep), (1, torch.tensor([0, 1, 2, 3, 8, 9, 10, 11]))):
        assert torch.equal(got[index][tokens], want[index][tokens])


@needs_cpu
def test_sums_keep_their_digits_over_long_sequences() -> None:
    n = 200_000
    logps, ref_logps, cu, weight = case([n], 0.0)
    log_ratio = cpu.sequence_coef(
        logps, ref_logps, cu, weight, ratio=1, log_low=-INF, log_high=INF
    )[2]
    want = math.fsum((logps.double() - ref_logps.double()).tolist())
    assert abs(float(log_ratio) - want) <= 2**-24 * abs(want)


@needs_cpu
def test_strides_and_threads_change_no_bit() -> None:
    logps, ref_logps, cu, weight = case([300] * 200, 0.0)
    options = {"ratio": 2, "log_low": -0.1, "log_high": 0.1, "beta": 0.1}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = cpu.sequence_coef(logps, ref_logps, cu, weight, **options)
        spread = [torch.stack([t, t], 1)[:, 0] for t in (logps, ref_logps, cu, weight)]
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for inputs in ((logps, ref_logps, cu, weight), spread):
                for got, expected in zip(cpu.sequence_coef(*inputs, **options), want, strict=True):
                    assert torch.equal(got, expected)
    finally:
        torch.set_num_threads(threads)


BAD = [
    ("logps", {"logps": torch.zeros(4, dtype=torch.float64)}),
    ("logps", {"logps": torch.zeros(4, 1)}),
    ("ref_logps", {"ref_logps": torch.zeros(3)}),
    ("ref_logps", {"ref_logps": torch.zeros(4, dtype=torch.bfloat16)}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 1, 2, 4])}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 1, 3])}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([1, 2, 4])}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 5, 4])}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, -1, 4])}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 1, 4], dtype=torch.int32)}),
    ("weight", {"weight": torch.zeros(2, dtype=torch.float64)}),
    ("weight", {"weight": torch.zeros(2, 1)}),
    ("ratio", {"ratio": 3}),
    ("ratio", {"ratio": -1}),
    ("log_low", {"log_low": 1.0}),
    ("log_low", {"log_low": NAN}),
]


@needs_cpu
@pytest.mark.parametrize(("name", "change"), BAD)
def test_the_op_refuses_what_it_cannot_compute(name: str, change: dict[str, object]) -> None:
    good = {
        "logps": torch.zeros(4),
        "ref_logps": torch.zeros(4),
        "cu_seqlens": torch.tensor([0, 1, 4]),
        "weight": torch.zeros(2),
        "ratio": 1,
        "log_low": -0.5,
        "log_high": 0.5,
    }
    cpu.sequence_coef(**good)
    with pytest.raises(RuntimeError, match=rf"\b{name} must"):
        cpu.sequence_coef(**(good | change))


@each_module
@pytest.mark.parametrize("ratio", [0, 1, 2])
def test_coefficients_are_scaled_by_sequence(backend: ModuleType, ratio: int) -> None:
    logps, ref_logps, cu, weight = case([3, 0, 700, 5], 0.01)
    scale = torch.tensor([2.0, 0.3, -0.25, 0.0])
    options = {"ratio": ratio, "log_low": -0.5, "log_high": 0.5, "beta": 0.1}
    loss, coef, *rest = backend.sequence_coef(logps, ref_logps, cu, weight, **options)
    got = backend.sequence_coef(logps, ref_logps, cu, weight, **options, scale=scale)
    torch.testing.assert_close(got[1], coef * scale.repeat_interleave(cu.diff()), rtol=3e-7, atol=0)
    for x, y in zip((got[0], *got[2:]), (loss, *rest), strict=True):
        assert torch.equal(x, y)


@each_module
@pytest.mark.parametrize("where", ["none", "ref", "weight", "logps"])
def test_a_nan_input_is_noted(backend: ModuleType, where: str) -> None:
    logps, ref_logps, cu, weight = case([3, 0, 700, 5], 0.01)
    {"ref": ref_logps, "weight": weight, "logps": logps}.get(where, torch.zeros(4))[2] = NAN
    flags, options = torch.tensor(1, dtype=torch.int32), {"log_low": -0.5, "log_high": 0.5}
    if backend is cpu:
        with pytest.raises(RuntimeError, match="flags are for a GPU"):
            cpu.sequence_coef(logps, ref_logps, cu, weight, ratio=1, **options, flags=flags)
        return
    backend.sequence_coef(logps, ref_logps, cu, weight, ratio=1, **options, flags=flags)
    assert int(flags) == (3 if where in ("ref", "weight") else 1)
