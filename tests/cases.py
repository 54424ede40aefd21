"""What the tests of several files share: backends, dtypes, fuzz blocks and their judges, calls."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_host_backend as cuda_host
import judges
import pytest
import torch
from judges import LOGPROB_ATOL, Problem, eager, peaky
from torch import Tensor

import lolkernels as lk
from lolkernels.backends import cpu, reference, triton

ROOT = Path(__file__).resolve().parents[1]
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
COUNTS = {"cpu": (300, 2000), "triton": (25, 300), "cuda_host": (75, 600), "reference": (300, 2000)}
BLOCKS = [
    pytest.param(b, start, marks=() if start < quick else pytest.mark.slow, id=f"{b}-{start}")
    for b, (quick, every) in COUNTS.items()
    for start in range(0, every, BLOCK)
]


def fuzz_test(check: Callable[[int, str], tuple[float, int]], canaries: int) -> Callable[..., None]:
    """The test that runs ``check(seed, backend)``, which returns an error and canaries rejected.

    At least so many ``canaries`` per case: the judgements could have failed.
    """

    @pytest.mark.parametrize(("backend", "start"), BLOCKS)
    def test(backend: str, start: int, record_property: Callable[[str, object], None]) -> None:
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
        record_property("worst error", worst)

    return test


def judge_outputs(out: Any, truth: Any, dtype: torch.dtype) -> tuple[float, int]:
    """Log-probs and statistics against float64; returns the worst log-prob error and canaries."""
    canaries = judges.accept_logprobs(out.logps, truth.logps.detach())
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


def rounded_sizes(
    sizes: dict[str, Tensor], problem: Problem, tiny: float = 0.0
) -> dict[str, Tensor]:
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
    known, eps = judges.STATISTICS_TOL[dtype], torch.finfo(dtype).eps
    own, last = eps / 4 if dtype == torch.bfloat16 else 0.0, eps / 2 / n**0.5
    roundings = {"hidden": (own, v**0.5 * w), "weight": (last, n**0.5 * h), "bias": (last, n**0.5)}
    return {
        name: sizes[name] * (1 + rounding / known) + tiny * terms / known
        for name, (rounding, terms) in roundings.items()
        if name in sizes
    }


# --- calls with one backward ----------------------------------------------------------------------


def with_entropy(logps: Tensor, entropy: Tensor, seq: lk.Sequences) -> Tensor:
    return -seq.sum(logps + 0.1 * entropy)


def calls(
    backend: str, dtype: torch.dtype, n: int = 12, d: int = 8, v: int = 300
) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """name -> a call of a public function, and the leaves to differentiate its result for."""
    p = peaky(n, d, v, dtype=dtype, bias=True)
    leaves = [t.requires_grad_() for t in (p.hidden, p.weight, p.bias)]
    h, w, b = leaves
    logits = (h.detach().float() @ w.detach().float().T).to(dtype).requires_grad_()
    seq = lk.Sequences.from_lengths([n // 3, 0, n - n // 3 - 5, 5])
    ref = (eager(p.double()).logps.detach().float() + 0.05 * torch.randn(n)).clamp(max=0)
    weight = torch.tensor([1.0, 1.0, 0.5, 2.0])
    options = {"bias": b, "backend": backend}
    held = {**options, "memory_budget": min(30, n // 2) * v * 4}
    a_lol, r_gold = lk.objectives.a_lol, lk.objectives.r_gold
    side = {"ref_logps": ref, "advantages": weight}
    return {
        "logprob": (lambda: lk.logprob(logits, p.labels, backend=backend).logps, [logits]),
        "linear_logprob": (
            lambda **more: lk.linear_logprob(h, w, p.labels, **options | more).logps,
            leaves,
        ),
        "a_lol": (
            lambda **more: lk.linear_loss(a_lol, h, w, p.labels, seq, **side, **held | more),
            leaves,
        ),
        "with_entropy": (
            lambda **more: lk.linear_loss(with_entropy, h, w, p.labels, seq, **held | more),
            leaves,
        ),
        "r_gold": (
            lambda: lk.linear_loss(r_gold, h, w, p.labels, seq, rewards=weight, **held),
            leaves,
        ),
    }


# --- processes ------------------------------------------------------------------------------------

# Not getrusage: its peak survives exec, and would be that of the process that started this one.
PRINT_PEAK = """
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(1024 * int(status["VmHWM"].split()[0]))
"""


def run_python(code: str, **environment: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def seed_fault(folder: Path, file: str, old: str, new: str) -> None:
    """Copies the kernels and what compiles them, one file of csrc changed."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "tests" / "cuda_host", folder / "tests" / "cuda_host")
    shutil.copy2(ROOT / "tests" / "rows_harness.cpp", folder / "tests")
    source = folder / "csrc" / file
    text = source.read_text()
    assert old in text, f"{file} no longer holds {old!r}"
    source.write_text(text.replace(old, new))
