"""What the tests of several files share: backends, dtypes, fuzz blocks and how they are judged."""

from collections.abc import Callable
from typing import Any

import cuda_host_backend as cuda_host
import pytest
import torch

from lolkernels import testing
from lolkernels.backends import cpu, reference, triton
from lolkernels.testing import LOGPROB_ATOL, Problem

HALF = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = {
    "cpu": HALF,
    "triton": (torch.float32, torch.float16),  # the interpreter cuts bfloat16 off: see test_triton
    "cuda_host": HALF,
    "reference": (*HALF, torch.float64),
}
BACKENDS = list(DTYPES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", HALF, ids=str)


def module(name: str, backend: Any) -> Any:
    """A parameter that is the backend's module, skipped where it is missing."""
    why = getattr(backend, "why_unavailable", lambda: None)()
    return pytest.param(
        backend, marks=pytest.mark.skipif(why is not None, reason=str(why)), id=name
    )


MODULES = [
    module("cpu", cpu),
    module("triton", triton),
    module("cuda_host", cuda_host),
    module("reference", reference),
]
each_module = pytest.mark.parametrize("backend", MODULES)
needs_cpu = pytest.mark.skipif(cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable()))


# --- fuzz cases against float64, by blocks --------------------------------------------------------

BLOCK = 25
# Kernels in an interpreter are slow: fewer cases, and most of those in the exhaustive run.
COUNTS = {
    "cpu": (300, 2000),
    "triton": (25, 300),
    "cuda_host": (75, 600),
    "reference": (300, 2000),
}
each_block = pytest.mark.parametrize(
    ("backend", "start"),
    [
        pytest.param(b, start, marks=() if start < quick else pytest.mark.slow, id=f"{b}-{start}")
        for b, (quick, every) in COUNTS.items()
        for start in range(0, every, BLOCK)
    ],
)


def judge_block(
    check: Callable[[int, str], tuple[float, int]], backend: str, start: int, canaries: int
) -> float:
    """The worst error over a block; each case rejects some ``canaries``: it could have failed."""
    worst, seen, faults = 0.0, 0, []
    for seed in range(start, start + BLOCK):
        try:
            error, rejected = check(seed, backend)
        except AssertionError as error_of_case:
            faults.append(f"seed {seed}: {error_of_case}")
            continue
        worst, seen = max(worst, error), seen + rejected
    assert not faults, f"{len(faults)} of {BLOCK} cases:\n" + "\n".join(faults)
    assert seen >= canaries * BLOCK
    return worst


def judge_outputs(out: Any, truth: Any, dtype: torch.dtype) -> tuple[float, int]:
    """Log-probs and statistics against float64; returns the worst log-prob error and canaries."""
    canaries = testing.accept_logprobs(out.logps, truth.logps.detach())
    if not out.logps.numel():
        return 0.0, canaries
    scale = 1e-12 / LOGPROB_ATOL if dtype == torch.float64 else 1.0
    size = max(1.0, float(truth.max_logit.detach().abs().max()) / 30)
    offs = {
        name: float((getattr(out, name).double() - getattr(truth, name)).detach().abs().max())
        for name in ("logps", "lse", "max_logit", "entropy")
    }
    for name, factor in (("lse", 1.0), ("max_logit", 1.0), ("entropy", 3.0)):
        assert offs[name] <= factor * size * scale * LOGPROB_ATOL, f"{name} off by {offs[name]:.1e}"
    return offs["logps"] / scale, canaries


def rounded_sizes(sizes: dict[str, float], problem: Problem, tiny: float = 0.0) -> dict[str, float]:
    """Sizes (see gradient_sizes) for a walk that rounds the gradients of the logits.

    Over whole rows they are rounded to the dtype of half-precision operands: an error of half a
    unit in the last place of each of n terms, which shows where the terms cancel, and of ``tiny``
    where float16 cannot hold coefficients far below the largest. In dhidden one term, the label's,
    is most of the sum; of bfloat16 its rounding is as large as that of the result.
    """
    dtype, n, v = problem.hidden.dtype, problem.labels.shape[0], problem.weight.shape[0]
    if dtype != problem.weight.dtype or dtype not in HALF[1:] or n == 0:
        return sizes
    h, w = float(problem.hidden.abs().max()), float(problem.weight.abs().max())
    known, eps = testing.STATISTICS_TOL[dtype], torch.finfo(dtype).eps
    own, last = eps / 4 if dtype == torch.bfloat16 else 0.0, eps / 2 / n**0.5
    roundings = {"hidden": (own, v**0.5 * w), "weight": (last, n**0.5 * h), "bias": (last, n**0.5)}
    return {
        name: sizes[name] * (1 + rounding / known) + tiny * terms / known
        for name, (rounding, terms) in roundings.items()
        if name in sizes
    }
