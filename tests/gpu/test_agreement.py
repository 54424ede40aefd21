"""Backends of the GPU, reference on both devices and the compiled CPU one, on one corpus."""

import pytest
import torch
from judges import eager, fuzz
from on_device import BACKENDS, DEVICE, ON_GPU, gradients, judge, leaves, moved, score
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives

CPU = torch.device("cpu")
CORPUS, BLOCK = (100, 10) if ON_GPU else (12, 4)
AVAILABLE = [name for name, why in lk.available_backends().items() if why is None]
PLACES = [(name, DEVICE) for name in BACKENDS if name in AVAILABLE]
PLACES += [(n, CPU) for n in ("cpu", "reference")[: 1 + ON_GPU] if n in AVAILABLE]


@pytest.mark.parametrize("start", range(0, CORPUS, BLOCK))
def test_every_backend_on_one_corpus(start: int) -> None:
    assert len(PLACES) > 1
    for seed in range(start, start + BLOCK):
        p = fuzz(seed)
        n, truth = len(p.labels), eager(p.double())
        generator = torch.Generator().manual_seed(seed)
        g = {k: torch.randn(n, generator=generator) for k in ("logps", "lse", "entropy")}
        scale = max(1.0, float(truth.max_logit.abs().max()) / 30)
        seen: list[Tensor] = []
        for backend, device in PLACES:
            q, wanted = leaves(moved(p, device))
            seq = lk.Sequences.from_lengths([n // 3, 0, n - n // 3]).to(device)
            out = score(q, backend=backend)
            there = {k: v.to(device) for k, v in g.items()}
            grads = gradients(out, wanted, there)
            loss = lk.linear_loss(
                objectives.nll, q.hidden, q.weight, q.labels, seq, bias=q.bias, backend=backend,
                reduction="token-mean", return_outputs=True, **q.options,
            )  # fmt: skip
            found = [t.detach().cpu() for t in (*out, loss.logps)]
            for got, want, factor in zip(
                found, (*truth, truth.logps), (1, 1, 3, 1, 1), strict=True
            ):
                error = float((got - want).abs().max())
                assert error <= 2e-5 * factor * scale, (seed, backend, device, error)
            seen.append(found[0])
            mean = {"logps": torch.full((n,), -1 / n)}
            for got, upstream in ((grads, g), (torch.autograd.grad(loss.loss, wanted), mean)):
                try:
                    judge(p, [t.cpu() for t in got], False, upstream)
                except AssertionError as error:
                    raise AssertionError(f"seed {seed}, {backend}, {device}: {error}") from None
        for other in seen[1:]:
            assert float((other - seen[0]).abs().max()) <= 4e-5 * scale
