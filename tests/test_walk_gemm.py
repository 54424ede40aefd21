"""The walk through a GEMM of the backend's own: tests/cuda_host behind torch's product.

Its epilogue leaves the exponentials of bfloat16 operands; other operands take the row functions.
"""

from typing import Any

import cuda_host_backend
import pytest
import torch
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives
from lolkernels.backends import TABLE

N, D, V = 40, 24, 700
LENGTHS = [7, 0, 12, 1, 20]
NAME = cuda_host_backend.GEMM_BACKEND.name

pytestmark = pytest.mark.skipif(
    cuda_host_backend.why_unavailable() is not None, reason=str(cuda_host_backend.why_unavailable())
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the backend's functions are called."""
    made: list[str] = []
    backend = cuda_host_backend.GEMM_BACKEND

    def noted(name: str) -> Any:
        real = getattr(backend, name)
        return lambda *args, **options: (made.append(name), real(*args, **options))[1]

    names = ("gemm", "exps_", "sums", "dlogits_")
    monkeypatch.setitem(TABLE, NAME, backend._replace(**{name: noted(name) for name in names}))
    return made


def run(
    backend: str, dtype: torch.dtype, frozen: bool, budget: int | None, **options: float
) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D).bfloat16(), (torch.randn(V, D) * 0.3).bfloat16()
    labels, advantages = torch.randint(V, (N,)), torch.tensor([1.0, 0.5, 0.3, 2.0, 0.7])
    hidden = hidden.to(dtype).requires_grad_()
    weight = weight.to(dtype).requires_grad_(not frozen)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = lk.linear_loss(
        objectives.a_lol,
        *(hidden, weight, labels, lk.Sequences.from_lengths(LENGTHS)),
        ref_logps=torch.linspace(-9, -5, N).to(wide),
        advantages=advantages.to(wide),
        clip=0.9,
        backend=backend,
        memory_budget=budget,
        return_outputs=True,
        **options,
    )
    wanted = [t for t in (hidden, weight) if t.requires_grad]
    return out.logps.detach(), list(torch.autograd.grad(out.loss, wanted))


@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "temperature": 0.8}])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [None, 13])
def test_linear_loss(calls, rows, frozen, options) -> None:
    budget = None if rows is None else rows * V * 2
    logps, got = run(NAME, torch.bfloat16, frozen, budget, **options)
    assert "gemm" in calls and "sums" not in calls
    true_logps, true = run("reference", torch.float64, frozen, None, **options)
    assert float((logps - true_logps).abs().max()) <= 2e-5
    for ours, exact in zip(got, true, strict=True):
        assert float((ours.double() - exact).norm() / exact.norm()) <= 2.5e-3


def test_other_operands_take_the_row_functions(calls: list[str]) -> None:
    run(NAME, torch.float32, False, None)
    assert "gemm" not in calls and "exps_" in calls


def test_scoring_writes_no_exponentials(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Tensor | None] = []
    real = TABLE[NAME].gemm
    assert real is not None

    def spy(h: Tensor, w: Tensor, b: Any, y: Tensor, anchor: Tensor, out: Any, **o: float) -> Any:
        written.append(out)
        return real(h, w, b, y, anchor, out, **o)

    monkeypatch.setitem(TABLE, NAME, TABLE[NAME]._replace(gemm=spy))
    hidden, weight = torch.randn(N, D).bfloat16(), (torch.randn(V, D) * 0.3).bfloat16()
    labels = torch.randint(V, (N,))
    got = lk.linear_logprob(hidden, weight, labels, backend=NAME)
    assert written == [None] * len(written) and written
    want = lk.linear_logprob(hidden.double(), weight.double(), labels)
    for a, b in zip(got, want, strict=True):
        assert float((a - b).abs().max()) <= 5e-5
