"""No call waits for the device: under torch's sync debug mode whatever waits raises.

(A dry run on a CPU only shows that the calls work.)
"""

from typing import Any

import pytest
import torch
from on_device import (
    DEVICE,
    ON_GPU,
    D,
    Step,
    V,
    a_lol,
    each_backend,
    each_budget,
    each_dtype,
    needs_gpu,
    no_sync,
    peaky,
    same,
    score,
)
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives


def users(logps: Tensor, ref_logps: Tensor, advantages: Tensor, seq: lk.Sequences) -> Tensor:
    """A loss of the user's own: its coefficient comes from autograd."""
    return -advantages * (seq.sum(logps - ref_logps) + 0.1 * seq.sum(logps.square()))


users.__annotations__["advantages"] = objectives.PerSequence


@needs_gpu
def test_the_judgement_notices_a_wait() -> None:
    x = torch.ones(3, device=DEVICE)
    with no_sync(), pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


OPS = {f.__name__: ("linear_loss", f) for f in (objectives.a_lol, objectives.nll, users)}
OPS |= {op: (op, None) for op in ("linear_logprob", "logprob")}


@each_backend
@each_dtype
@each_budget
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize(("op", "objective"), OPS.values(), ids=OPS)
def test_forward_and_backward(
    op: str, objective: Any, frozen: bool, budget: int | None, dtype: torch.dtype, backend: str
) -> None:
    step = Step(op, backend, dtype, budget, frozen=frozen, objective=objective)
    step()  # compiles
    with no_sync():
        found = step()
        if op == "linear_logprob":
            with torch.no_grad():
                score(step.p, mask=step.side["ref_logps"] > -8.5, **step.options)
    assert all(t.isfinite().all() for t in found)
    lk.check_errors()


@each_backend
@pytest.mark.parametrize("pinned", [False, True])
@each_budget
def test_advantages_on_the_host_skip_what_they_can(
    budget: int | None, pinned: bool, backend: str
) -> None:
    """They are known without waiting: sequences with none above zero enter no product."""
    step, on_host = (Step("linear_loss", backend, torch.float32, budget) for _ in range(2))
    for one in (step, on_host):
        one.side["advantages"] = torch.tensor([1.0, 0.5, -1.0, 2.0, 0.7, 0.0], device=DEVICE)
    on_host.side["advantages"] = on_host.side["advantages"].cpu()
    if pinned and ON_GPU:
        on_host.side["advantages"] = on_host.side["advantages"].pin_memory()
    skipped = step.seq.expand(step.side["advantages"] <= 0)

    def run(step: Step) -> tuple[Any, list[Tensor]]:
        out = a_lol(step.p, step.seq, step.side, **step.options)
        return out, list(torch.autograd.grad(out.loss, step.wanted))

    want, want_grads = run(step)
    run(on_host)
    with no_sync():
        out, grads = run(on_host)
    assert torch.equal(out.logps.isnan(), skipped)
    torch.testing.assert_close(out.logps[~skipped], want.logps[~skipped], rtol=0, atol=2e-5)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-4, atol=1e-5)
    for got, truth in zip(grads, want_grads, strict=True):
        scale = float(truth.abs().max())
        torch.testing.assert_close(got, truth, rtol=0, atol=1e-4 * scale)
    assert not grads[0][skipped].any()


@each_backend
def test_a_mask_and_padded_rows_do_not_wait(backend: str) -> None:
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
    with no_sync():
        got = run()
    same(got, want)
