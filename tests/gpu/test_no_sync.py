"""No call waits for the device: under torch's sync debug mode whatever waits raises.

(A dry run on a CPU only shows that the calls work.)
"""

from typing import Any

import pytest
import torch
from on_device import (
    DEVICE,
    ON_GPU,
    a_lol,
    each_backend,
    each_dtype,
    leaves,
    needs_gpu,
    peaky,
    same,
    score,
    size,
)
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives

LENGTHS = [31, 0, 64, 7, 90, 16] if ON_GPU else [3, 0, 6, 1, 9, 2]
N, D, V = sum(LENGTHS), 64, size(5003, 131)
BUDGETS = {"whole": None, "chunks": 4 * V * (N // 2), "long groups": 4 * V * (N // 10)}
each_budget = pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)


def seq_and_side() -> tuple[lk.Sequences, dict[str, Tensor]]:
    advantages = torch.tensor([1.0, 0.5, -1.0, 2.0, 0.7, 0.0])
    side = {"ref_logps": torch.linspace(-9, -5, N), "advantages": advantages}
    return lk.Sequences.from_lengths(LENGTHS).to(DEVICE), {k: v.to(DEVICE) for k, v in side.items()}


def users(logps: Tensor, ref_logps: Tensor, advantages: Tensor, seq: lk.Sequences) -> Tensor:
    """A loss of the user's own: its coefficient comes from autograd."""
    return -advantages * (seq.sum(logps - ref_logps) + 0.1 * seq.sum(logps.square()))


users.__annotations__["advantages"] = objectives.PerSequence


@needs_gpu
def test_the_judgement_notices_a_wait(no_sync: Any) -> None:
    x = torch.ones(3, device=DEVICE)
    with no_sync, pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


@each_backend
@each_dtype
@each_budget
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("objective", [objectives.a_lol, objectives.nll, users])
def test_linear_loss(
    objective: Any,
    frozen: bool,
    budget: int | None,
    dtype: torch.dtype,
    backend: str,
    no_sync: Any,
) -> None:
    p, wanted = leaves(peaky(N, D, V, dtype=dtype, bias=True), frozen)
    seq, side = seq_and_side()
    side = {k: v for k, v in side.items() if k in lk.side_inputs(objective)}

    def run() -> list[Tensor]:
        loss = lk.linear_loss(
            objective, p.hidden, p.weight, p.labels, seq, bias=p.bias,
            backend=backend, memory_budget=budget, **side,
        )  # fmt: skip
        return [loss.detach(), *torch.autograd.grad(loss, wanted)]

    run()  # compiles
    with no_sync:
        found = run()
    assert all(t.isfinite().all() for t in found)
    lk.check_errors()


@each_backend
@each_dtype
@each_budget
def test_linear_logprob(budget: int | None, dtype: torch.dtype, backend: str, no_sync: Any) -> None:
    p, wanted = leaves(peaky(N, D, V, dtype=dtype, bias=True))
    mask = torch.arange(N, device=DEVICE) % 4 > 0
    upstream = torch.ones(N, device=DEVICE)

    def run() -> None:
        out = score(p, mask=mask, backend=backend, memory_budget=budget)
        torch.autograd.grad((out.logps + out.entropy), wanted, upstream)
        with torch.no_grad():
            score(p, mask=mask, backend=backend, memory_budget=budget)

    run()
    with no_sync:
        run()


@each_backend
@each_dtype
def test_logprob(dtype: torch.dtype, backend: str, no_sync: Any) -> None:
    logits = torch.randn(N, V, device=DEVICE).to(dtype).requires_grad_()
    labels = torch.randint(V, (N,), device=DEVICE)

    def run() -> None:
        out = lk.logprob(logits, labels, backend=backend)
        torch.autograd.grad((out.logps + out.entropy).sum(), logits)

    run()
    with no_sync:
        run()


@each_backend
@pytest.mark.parametrize("pinned", [False, True])
@each_budget
def test_advantages_on_the_host_skip_what_they_can(
    budget: int | None, pinned: bool, backend: str, no_sync: Any
) -> None:
    """They are known without waiting: sequences with none above zero enter no product."""
    p, wanted = leaves(peaky(N, D, V))
    seq, side = seq_and_side()
    skipped = seq.expand(side["advantages"] <= 0)
    host = dict(side, advantages=side["advantages"].cpu())
    if pinned and ON_GPU:
        host["advantages"] = host["advantages"].pin_memory()

    def run(given: dict[str, Tensor]) -> tuple[Any, list[Tensor]]:
        out = a_lol(p, seq, given, backend=backend, memory_budget=budget)
        return out, list(torch.autograd.grad(out.loss, wanted))

    want, want_grads = run(side)
    run(host)
    with no_sync:
        out, grads = run(host)
    assert torch.equal(out.logps.isnan(), skipped)
    torch.testing.assert_close(out.logps[~skipped], want.logps[~skipped], rtol=0, atol=2e-5)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-4, atol=1e-5)
    for got, truth in zip(grads, want_grads, strict=True):
        scale = float(truth.abs().max())
        torch.testing.assert_close(got, truth, rtol=0, atol=1e-4 * scale)
    assert not grads[0][skipped].any()


@each_backend
def test_a_mask_and_padded_rows_do_not_wait(backend: str, no_sync: Any) -> None:
    """Sequences.from_mask waits, once; everything after it does not."""
    mask = torch.arange(12, device=DEVICE) < torch.tensor([[5], [0], [12]], device=DEVICE)
    seq = lk.Sequences.from_mask(mask)
    p = peaky(36, D, V)
    hidden = p.hidden.view(3, 12, D).clone().requires_grad_()

    def run() -> list[Tensor]:
        labels = p.labels.view(3, 12)
        loss = lk.linear_loss(objectives.nll, hidden, p.weight, labels, seq, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss, hidden)]

    want = run()
    with no_sync:
        got = run()
    same(got, want)
