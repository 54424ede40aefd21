"""Where these tests run, on which backends, and the problems they share.

LOLKERNELS_TEST_DEVICE=cpu is a dry run: the same tests with small tensors, Triton's interpreter for
its kernels and tests/cuda_host for those in CUDA C++.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import judges
import pytest
import torch
from judges import Problem
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives
from lolkernels.backends import TABLE

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
    """:func:`judges.peaky` made on the device: a large one takes the host seconds."""
    if n * d + v * d < 2**20:
        return moved(judges.peaky(n, d, v, **options))
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
    ref = (truth.detach().float() + noise.to(DEVICE)).clamp(max=0)
    seq = lk.Sequences.from_lengths(lengths).to(DEVICE)
    return seq, {"ref_logps": ref, "advantages": advantages.to(DEVICE)}


def a_lol(p: Problem, seq: lk.Sequences, side: dict[str, Any], **options: Any) -> Any:
    return lk.linear_loss(
        lk.objectives.a_lol, p.hidden, p.weight, p.labels, seq, bias=p.bias, **p.options,
        **side, return_outputs=True, **options,
    )  # fmt: skip


def score(p: Problem, **options: Any) -> lk.LogprobOutput:
    return lk.linear_logprob(p.hidden, p.weight, p.labels, bias=p.bias, **p.options, **options)


def accept_gradient(grad: Tensor, peer: Tensor, truth: Tensor, size: Tensor | float = 0.0) -> None:
    """:func:`judges.accept_gradient`, for a large gradient without its canaries.

    A dry run is content with less in bfloat16, which Triton's interpreter cuts off.
    """
    if not ON_GPU and grad.dtype == torch.bfloat16:
        top = max(float(truth.abs().max()), 1e-3 * float(torch.as_tensor(size).max()))
        assert float((grad.double() - truth).abs().max()) <= 0.03 * top
    elif grad.numel() > 2**24:
        faults = judges.gradient_faults(grad, peer, truth, size)
        assert not faults, "; ".join(faults)
    else:
        judges.accept_gradient(grad, peer, truth, size)


@contextmanager
def no_sync() -> Iterator[None]:
    """Whatever waits for the device raises."""
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")


def gradients(out: Any, wanted: list[Tensor], upstream: dict[str, Tensor]) -> list[Tensor]:
    """For the upstream gradients of some statistics."""
    total = sum((getattr(out, k) * g).sum() for k, g in upstream.items())
    return list(torch.autograd.grad(total, wanted))


def judge(p: Problem, got: list[Tensor], frozen: bool, upstream: dict[str, Tensor]) -> None:
    """Gradients for the upstream gradients of logps, lse and entropy, beside eager's."""
    results = []
    for q in (p.double(), p):
        own, wanted = leaves(q, frozen)
        wide = {k: g.double() for k, g in upstream.items()}
        results.append(gradients(judges.eager(own), wanted, wide))
    sizes = judges.gradient_sizes(p, upstream).values()
    for grad, truth, peer, bound in zip(got, *results, sizes, strict=False):
        accept_gradient(grad, peer, truth, bound)


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


class RedZones(judges.RedZones):
    """Between borders on the device."""

    def _allocate(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        with torch.device(DEVICE):
            return super()._allocate(*arguments)


LENGTHS = [31, 0, 64, 7, 90, 16] if ON_GPU else [3, 0, 6, 1, 7, 2]
N, D, V = sum(LENGTHS), 64, size(5003, 131)
BUDGETS = {"whole": None, "chunks": 4 * V * (N // 2), "long groups": 4 * V * (N // 10)}
each_op = pytest.mark.parametrize("op", ["linear_loss", "linear_logprob", "logprob"])
each_budget = pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)


class Step:
    """Forward and backward of one op on buffers whose content may be replaced."""

    def __init__(
        self,
        op: str,
        backend: str,
        dtype: torch.dtype = torch.bfloat16,
        budget: int | None = None,
        *,
        frozen: bool = False,
        objective: Any = objectives.a_lol,
    ) -> None:
        self.p, self.wanted = leaves(peaky(N, D, V, dtype=dtype, bias=True), frozen)
        self.op, self.objective = op, objective
        self.options = {"backend": backend, "memory_budget": budget}
        self.seq = lk.Sequences.from_lengths(LENGTHS).to(DEVICE)
        self.logits = (self.p.hidden @ self.p.weight.T).detach().requires_grad_()
        side = {"ref_logps": torch.linspace(-9, -5, N)}
        side["advantages"] = torch.tensor([1.0, 0.5, 1.5, 2.0, 0.7, 0.3])
        self.side = {k: v.to(DEVICE) for k, v in side.items()}

    def fill(self, seed: int) -> None:
        """Other inputs in the same buffers."""
        new = peaky(N, D, V, seed=seed, bias=True)
        self.take(new, {"ref_logps": torch.empty(N).uniform_(-9, -5), "advantages": torch.randn(6)})

    def take(self, p: Problem, side: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name in ("hidden", "weight", "bias", "labels"):
                getattr(self.p, name).copy_(getattr(p, name))
            self.logits.copy_(self.p.hidden @ self.p.weight.T)
            for name, value in side.items():
                self.side[name].copy_(value)

    def forward(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """What to differentiate, all outputs and the leaves."""
        if self.op == "linear_loss":
            p = self.p
            side = {k: v for k, v in self.side.items() if k in lk.side_inputs(self.objective)}
            out = lk.linear_loss(
                self.objective, p.hidden, p.weight, p.labels, self.seq, bias=p.bias,
                **side, return_outputs=True, **self.options,
            )  # fmt: skip
            outputs = [*(t for t in out if torch.is_tensor(t)), *out.metrics.values()]
            return out.loss, outputs, self.wanted
        if self.op == "linear_logprob":
            found = score(self.p, mask=self.side["ref_logps"] > -8.5, **self.options)
        else:
            found = lk.logprob(self.logits, self.p.labels, backend=self.options["backend"])
        total = (found.logps + 0.1 * found.entropy).sum() + found.lse.sum()
        return total, list(found), self.wanted if self.op == "linear_logprob" else [self.logits]

    def __call__(self) -> list[Tensor]:
        total, found, wanted = self.forward()
        return [*(t.detach() for t in found), *torch.autograd.grad(total, wanted)]
