"""Backends of the GPU, reference on both devices and the compiled CPU one, on one corpus."""

from typing import Any

import pytest
import torch
from on_device import BACKENDS, DEVICE, ON_GPU, accept_gradient, leaves, moved
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives, testing
from lolkernels.testing import Problem, eager, fuzz

CPU = torch.device("cpu")
CORPUS, BLOCK = (100, 10) if ON_GPU else (12, 4)
AVAILABLE = [name for name, why in lk.available_backends().items() if why is None]
PLACES = [(name, DEVICE) for name in BACKENDS if name in AVAILABLE]
PLACES += [(name, CPU) for name in ("cpu", "reference") if name in AVAILABLE and ON_GPU]
PLACES += [("cpu", CPU)] if not ON_GPU and "cpu" in AVAILABLE else []


def run(
    p: Problem, lengths: list[int], g: dict[str, Tensor], place: tuple[str, torch.device]
) -> Any:
    """Everything a backend returns for a case, moved to the host."""
    backend, device = place
    q, wanted = leaves(moved(p, device))
    seq = lk.Sequences.from_lengths(lengths).to(device)
    call = (q.hidden, q.weight, q.labels)
    out = lk.linear_logprob(*call, bias=q.bias, backend=backend, **q.options)
    total = sum((getattr(out, k) * v.to(device)).sum() for k, v in g.items())
    grads = torch.autograd.grad(total, wanted)
    loss = lk.linear_loss(
        objectives.nll, *call, seq, bias=q.bias, backend=backend, reduction="token-mean",
        return_outputs=True, **q.options,
    )  # fmt: skip
    loss_grads = torch.autograd.grad(loss.loss, wanted)
    return (
        [t.detach().cpu() for t in (*out, loss.logps, loss.loss)],
        [t.cpu() for t in grads],
        [t.cpu() for t in loss_grads],
    )


@pytest.mark.parametrize("start", range(0, CORPUS, BLOCK))
def test_every_backend_on_one_corpus(start: int) -> None:
    assert len(PLACES) > 1
    for seed in range(start, start + BLOCK):
        p = fuzz(seed)
        n = len(p.labels)
        lengths = [n // 3, 0, n - n // 3]
        generator = torch.Generator().manual_seed(seed)
        g = {k: torch.randn(n, generator=generator) for k in ("logps", "lse", "entropy")}
        exact, peers = [], []
        truth = eager(p.double())
        for q, into in ((p.double(), exact), (p, peers)):
            for upstream in (g, {"logps": torch.full((n,), -1 / n)}):
                own, wanted = leaves(q)
                out = eager(own)
                total = sum((getattr(out, k).double() * v).sum() for k, v in upstream.items())
                into.append(torch.autograd.grad(total, wanted))
        sizes = [
            testing.gradient_sizes(p, upstream)
            for upstream in (g, {"logps": torch.full((n,), 1 / n)})
        ]
        stats = []
        for place in PLACES:
            if p.hidden.dtype == torch.bfloat16 != torch.bfloat16:
                continue
            found, *grads = run(p, lengths, g, place)
            stats.append(found)
            scale = max(1.0, float(truth.max_logit.abs().max()) / 30)
            for got, want, factor in zip(
                found, (*truth, truth.logps), (1, 1, 3, 1, 1), strict=False
            ):
                error = float((got - want).abs().max())
                assert error <= 2e-5 * factor * scale, (seed, place, error)
            for i in range(2):
                for got, peer, want, bound in zip(
                    grads[i], peers[i], exact[i], sizes[i].values(), strict=False
                ):
                    try:
                        accept_gradient(got, peer, want, bound)
                    except AssertionError as error:
                        raise AssertionError(f"seed {seed}, {place}: {error}") from None
        for other in stats[1:]:
            assert float((other[0] - stats[0][0]).abs().max()) <= 4e-5 * scale
