"""Where these tests run, on which backends, and the problems they share.

LOLKERNELS_TEST_DEVICE=cpu is a dry run: the same tests with small tensors, Triton's interpreter for
its kernels and tests/cuda_host for those in CUDA C++.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import lolkernels as lk
from lolkernels import testing
from lolkernels.backends import TABLE
from lolkernels.testing import Problem

DEVICE = torch.device(os.environ.get("LOLKERNELS_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
if ON_GPU and not torch.cuda.is_available():  # skips the test file that imports this
    pytest.skip("torch sees no CUDA device", allow_module_level=True)
# In a dry run the CUDA kernels are those that g++ compiles.
BACKENDS = [name for name, m in TABLE.items() if m.devices is None or "cuda" in m.devices]
BACKENDS += [] if ON_GPU else ["cuda_host"]
KERNELS = [name for name in BACKENDS if name != "reference"]  # all that is not eager torch
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_kernel = pytest.mark.parametrize("backend", KERNELS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="only a CUDA device has this")


def size(full: int, dry: int) -> int:
    return full if ON_GPU else min(full, dry)


def peaky(n: int, d: int, v: int, **options: Any) -> Problem:
    """:func:`lolkernels.testing.peaky` made on the device: a large one takes the host seconds."""
    if n * d + v * d < 2**20:
        return moved(testing.peaky(n, d, v, **options))
    dtype, std, lift = options.pop("dtype", torch.float32), 3.0, 6.0
    bias = options.pop("bias", False)
    generator = torch.Generator(DEVICE).manual_seed(options.pop("seed", 0))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    weight, labels = normal(v, d), torch.randint(v, (n,), generator=generator, device=DEVICE)
    length = weight[labels].square().sum(1, keepdim=True).clamp(min=d / 2)
    hidden = normal(n, d) * (std / d**0.5) + weight[labels] * (lift / length)
    hidden *= options.get("temperature", 1.0) / options.get("logit_scale", 1.0)
    given = normal(v).to(dtype) if bias else None
    return Problem(hidden.to(dtype), weight.to(dtype), labels, given, **options)


def moved(p: Problem, device: torch.device = DEVICE) -> Problem:
    bias = None if p.bias is None else p.bias.to(device)
    places = (t.to(device) for t in (p.hidden, p.weight, p.labels))
    return Problem(*places, bias, **p.options)


def split(n: int, longest: int = 64) -> list[int]:
    """Lengths of n tokens in sequences of 1 to ``longest``, two of them empty."""
    lengths = [0]
    while n:
        lengths.append(min(n, 1 + (37 * len(lengths)) % longest))
        n -= lengths[-1]
    return [*lengths, 0]


def leaves(p: Problem, frozen: bool = False) -> tuple[Problem, list[Tensor]]:
    """The problem on leaves of its own, and those that want a gradient."""
    own = [
        None if t is None else t.detach().clone().requires_grad_(not frozen or i == 0)
        for i, t in enumerate((p.hidden, p.weight, p.bias))
    ]
    wanted = [t for t in own if t is not None and t.requires_grad]
    return Problem(own[0], own[1], p.labels, own[2], **p.options), wanted


def loss_inputs(n: int, lengths: list[int], truth: Tensor) -> tuple[lk.Sequences, dict[str, Any]]:
    """Sequences on the device, with a reference near the policy and advantages above zero."""
    assert sum(lengths) == n
    generator = torch.Generator().manual_seed(n)
    noise = 0.05 * torch.randn(n, generator=generator)
    advantages = torch.rand(len(lengths), generator=generator) + 0.1
    ref = truth.detach().float() + noise.to(DEVICE)
    seq = lk.Sequences.from_lengths(lengths).to(DEVICE)
    return seq, {"ref_logps": ref, "advantages": advantages.to(DEVICE)}


def a_lol(p: Problem, seq: lk.Sequences, side: dict[str, Any], **options: Any) -> Any:
    return lk.linear_loss(
        lk.objectives.a_lol, p.hidden, p.weight, p.labels, seq, bias=p.bias, **p.options,
        **side, return_outputs=True, **options,
    )  # fmt: skip


def score(p: Problem, **options: Any) -> lk.LogprobOutput:
    return lk.linear_logprob(p.hidden, p.weight, p.labels, bias=p.bias, **p.options, **options)


def accept_gradient(grad: Tensor, peer: Tensor, truth: Tensor, size: float = 0.0) -> None:
    """:func:`lolkernels.testing.accept_gradient`, for a large gradient without its canaries.

    A dry run is content with less in bfloat16, which Triton's interpreter cuts off.
    """
    if not ON_GPU and grad.dtype == torch.bfloat16:
        top = max(float(truth.abs().max()), 1e-3 * size)
        assert float((grad.double() - truth).abs().max()) <= 0.03 * top
    elif grad.numel() > 2**24:
        faults = testing.gradient_faults(grad, peer, truth, size)
        assert not faults, "; ".join(faults)
    else:
        testing.accept_gradient(grad, peer, truth, size)


def check_stats(got: Any, want: Any) -> None:
    """Row statistics against float64; logits beyond 30 lose digits in float32."""
    scale = max(1.0, float(want[3].abs().max()) / 30)
    for i, factor in enumerate((1, 1, 3, 1)):
        near = (got[i] == want[i]) | ((got[i] - want[i]).abs() <= factor * scale * 2e-5)
        assert bool(near.all()), (i, float((got[i] - want[i]).abs().nan_to_num().max()))


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """nan equals nan."""
    a, b = a.detach().reshape(-1).contiguous(), b.detach().reshape(-1).contiguous()
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def same(got: list[Tensor], want: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert equal_bits(a, b), f"output {i} differs by {float((a - b).abs().max())}"


class RedZones(testing.RedZones):
    """Between borders on the device."""

    def _allocate(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        with torch.device(DEVICE):
            return super()._allocate(*arguments)
