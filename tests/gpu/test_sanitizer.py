"""Small launches of every kernel, for compute-sanitizer: its tools take seconds for each of these.

Vocabularies are odd, rows are padded, gradients lie over logits; what is computed is judged
elsewhere.
"""

import pytest
import torch
from judges import row_stats
from on_device import DEVICE, HALF, Step, each_dtype, each_kernel, each_op
from torch import Tensor

import lolkernels as lk
from lolkernels.backends import TABLE

N = 7
each_v = pytest.mark.parametrize("v", [1, 129, 1031])


def padded(v: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(N, v + 5, device=DEVICE).to(dtype)[:, 2 : 2 + v]


def some_labels(v: int) -> Tensor:
    labels = torch.randint(v, (N,), device=DEVICE)
    labels[:3] = torch.tensor([v, -1, v - 1], device=DEVICE)
    return labels


@each_kernel
@each_dtype
@each_v
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_rows(softcap: float, v: int, dtype: torch.dtype, backend: str) -> None:
    module, labels = TABLE[backend], some_labels(v)
    abc = [torch.randn(N, device=DEVICE) for _ in range(3)]
    for x in (padded(v, dtype), padded(v, dtype).T.contiguous().T):
        lse = row_stats(module, x, labels, softcap=softcap)[1]
        out = torch.empty_like(x)
        module.dlogits_(x, labels, lse, *abc, softcap=softcap, out=out)
        module.dlogits_(x, labels, lse, *abc, softcap=softcap)
        assert torch.equal(x, out)


@each_kernel
@each_v
@pytest.mark.parametrize("narrow", HALF, ids=str)
def test_half_precision_over_fp32(narrow: torch.dtype, v: int, backend: str) -> None:
    module, labels = TABLE[backend], some_labels(v)
    x = torch.randn(N, -(-v // 16) * 16, device=DEVICE)[:, :v]
    lse = row_stats(module, x, labels)[1]
    a = torch.ones(N, device=DEVICE)
    out = x.view(narrow)[:, :v]
    module.dlogits_(x, labels, lse, a, -a, 0 * a, out=out)
    assert out.isfinite().all()


@each_kernel
@pytest.mark.parametrize("ratio", [0, 1, 2])
@pytest.mark.parametrize("with_ref", [True, False])
def test_coefficients(with_ref: bool, ratio: int, backend: str) -> None:
    cu = torch.tensor([0, 3, 3, 700, 701], device=DEVICE)
    logps = -torch.rand(701, device=DEVICE)
    ref = logps - 0.01 if with_ref else None
    weight = torch.ones(4, device=DEVICE)
    for beta in (0.0, 0.1):
        found = TABLE[backend].sequence_coef(
            logps, ref, cu, weight, ratio=ratio, log_low=-0.5, log_high=0.5, beta=beta
        )
        assert all(t.isfinite().all() for t in found)


@each_kernel
@each_dtype
@each_op
def test_whole_calls(op: str, dtype: torch.dtype, backend: str) -> None:
    for budget in (None, 4 * 131 * 6):
        assert all(t.isfinite().all() for t in Step(op, backend, dtype, budget)())
    lk.check_errors()
