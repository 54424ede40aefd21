"""Log-probs, losses and gradients against float64 on the device, each judgement with its canaries.

A gradient of linear_loss is judged for the log-probs that were returned (their own error is judged
apart): a ratio is the exponential of a sum of them.
"""

from typing import Any

import judges
import pytest
import torch
from judges import Problem
from on_device import (
    DEVICE,
    HALF,
    ON_GPU,
    a_lol,
    accept_gradient,
    each_backend,
    each_dtype,
    gradients,
    judge,
    leaves,
    loss_inputs,
    peaky,
    score,
    size,
    split,
)
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives

FULL = [  # rows, hidden size, vocabulary
    (1, 8, 1),
    (5, 17, 2),
    (33, 64, 3),
    (65, 17, 127),
    (64, 8, 129),
    (257, 64, 1023),
    (4096, 64, 1025),
    (96, 4096, 32003),
    (512, 1024, 50257),
    (48, 1024, 128256),
    (40, 1024, 151936),
]
DRY = [(1, 8, 1), (5, 17, 2), (33, 64, 3), (20, 17, 127), (16, 8, 1025)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True, "temperature": 0.7},
    {"bias": True, "softcap": 30.0},
    {"logit_scale": 0.0625, "temperature": 1.7},
    {"bias": True, "softcap": 5.0, "logit_scale": 2.5},
]
# Every shape with one set of options, a medium one with each.
CASES = [(s, OPTIONS[i % 4]) for i, s in enumerate(FULL if ON_GPU else DRY)]
CASES += [((size(130, 12), 64, size(1025, 130)), o) for o in OPTIONS]
each_case = pytest.mark.parametrize(
    ("shape", "options"), CASES, ids=lambda x: "x".join(map(str, x)) or "plain"
)


def judge_loss(
    p: Problem, objective: Any, lengths: list[int], backend: str, frozen: bool, **options: Any
) -> None:
    truth = judges.eager(p.double()).logps
    seq, side = loss_inputs(len(truth), lengths, truth)
    side = {k: v for k, v in side.items() if k in lk.side_inputs(objective)}
    q, wanted = leaves(p, frozen)
    out = lk.linear_loss(
        objective, q.hidden, q.weight, q.labels, seq, bias=q.bias, **q.options,
        **side, backend=backend, return_outputs=True, **options,
    )  # fmt: skip
    got = list(torch.autograd.grad(out.loss, wanted))
    judges.accept_logprobs(out.logps, truth, lengths)
    reduction = options.get("reduction", "seq-mean")
    given = {k: v.double() for k, v in side.items()}
    loss, coef, _ = lk.loss_and_coef(objective, out.logps.double(), seq, reduction, **given)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    judge(p, got, frozen, {"logps": coef})


@each_backend
@each_dtype
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@each_case
def test_a_lol(
    shape: tuple[int, ...], options: Any, frozen: bool, dtype: torch.dtype, backend: str
) -> None:
    p = peaky(*shape, dtype=dtype, **options)
    judge_loss(p, objectives.a_lol, split(shape[0]), backend, frozen)


@each_backend
@each_dtype
@pytest.mark.parametrize("rows", [8, 1000], ids=["made again", "kept"])
@pytest.mark.parametrize("wide", [False, True], ids=["weight's dtype", "float32"])
def test_a_buffer_takes_the_gradient_of_weight(
    wide: bool, rows: int, dtype: torch.dtype, backend: str
) -> None:
    n, v = size(130, 12), size(1025, 130)
    p, (hidden, weight) = leaves(peaky(n, 64, v, dtype=dtype))
    seq = lk.Sequences.from_lengths(split(n)).to(DEVICE)
    budget = rows * v * 8

    def loss(**more: Any) -> Tensor:
        return lk.linear_loss(
            objectives.nll, hidden, weight, p.labels, seq, backend=backend, **more
        )

    want = torch.autograd.grad(loss(), [hidden, weight])
    buffer = torch.zeros_like(weight, dtype=torch.float32 if wide else dtype, requires_grad=False)
    for times in (1, 2):
        loss(accumulate_into=buffer, memory_budget=budget).backward()
        for got, g in ((hidden.grad, want[0]), (buffer, want[1])):
            off = (got.double() - times * g.double()).abs().max()
            eps = max(torch.finfo(dtype).eps, torch.finfo(got.dtype).eps)
            assert float(off) <= 8 * times * (eps + 1e-6) * float(g.abs().max())
    assert weight.grad is None


@each_backend
@each_dtype
@pytest.mark.parametrize("objective", [objectives.nll, objectives.a_lol_seq, objectives.a_lol_kl])
@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "sum"])
def test_objectives_and_reductions(
    objective: Any, reduction: str, dtype: torch.dtype, backend: str
) -> None:
    n = size(300, 12)
    p = peaky(n, 64, size(2049, 130), dtype=dtype, bias=True)
    judge_loss(p, objective, split(n), backend, False, reduction=reduction)


@each_backend
@each_dtype
@each_case
def test_linear_logprob(
    shape: tuple[int, ...], options: Any, dtype: torch.dtype, backend: str
) -> None:
    p = peaky(*shape, dtype=dtype, **options)
    q, wanted = leaves(p)
    out = score(q, backend=backend)
    truth = judges.eager(p.double())
    judges.accept_logprobs(out.logps, truth.logps, split(shape[0]))
    for name, factor in (("lse", 1), ("entropy", 3), ("max_logit", 1)):
        want = getattr(truth, name)
        bound = factor * 2e-5 * max(1.0, float(want.abs().max()) / 30)
        assert float((getattr(out, name) - want).detach().abs().max()) <= bound, name
    upstream = {k: torch.randn(shape[0], device=DEVICE) for k in ("logps", "lse", "entropy")}
    judge(p, gradients(out, wanted, upstream), False, upstream)


@each_backend
@each_dtype
@pytest.mark.parametrize("chunk", [None, 37], ids=["whole", "chunks"])
def test_masked_rows_take_no_part(chunk: int | None, dtype: torch.dtype, backend: str) -> None:
    n, v = size(700, 20), size(5003, 131)
    p = peaky(n, 48, v, dtype=dtype, bias=True)
    mask = torch.rand(n, device=DEVICE) < 0.6
    q, wanted = leaves(p)
    labels = p.labels.clone()
    labels[: n // 5] = -100
    keep = mask & (labels != -100)
    options = {"mask": mask, "backend": backend, "memory_budget": chunk and 4 * v * chunk}
    out = lk.linear_logprob(q.hidden, q.weight, labels, bias=q.bias, **options)
    judges.accept_logprobs(out.logps[keep], judges.eager(p.double()).logps[keep])
    assert not out.logps[~keep].any() and not out.lse[~keep].any()
    g = torch.randn(n, device=DEVICE)
    got = gradients(out, wanted, {"logps": g})
    judge(p, got, False, {"logps": g * keep})
    assert not got[0][~keep].any()


@each_backend
@each_dtype
@each_case
def test_logprob(shape: tuple[int, ...], options: Any, dtype: torch.dtype, backend: str) -> None:
    p = peaky(*shape, dtype=torch.float32, **options)
    logits = p.hidden @ p.weight.T + (0 if p.bias is None else p.bias)
    mine, exact, peer = (
        logits.to(dtype).to(t).requires_grad_() for t in (dtype, torch.float64, dtype)
    )
    out = lk.logprob(mine, p.labels, backend=backend, **p.options)
    want, eager = (judges.eager_logits(t, p.labels, **p.options) for t in (exact, peer))
    judges.accept_logprobs(out.logps, want.logps.detach(), split(shape[0]))
    g = {k: torch.randn(shape[0], device=DEVICE) for k in ("logps", "lse", "entropy")}
    grads = [
        torch.autograd.grad(sum((getattr(o, k) * v).sum() for k, v in g.items()), t)[0]
        for o, t in ((out, mine), (eager, peer), (want, exact))
    ]
    z = want.max_logit.abs() + want.lse.abs()
    terms = 2 * g["logps"].abs() + g["lse"].abs() + g["entropy"].abs() * z
    slope = p.logit_scale / p.temperature
    accept_gradient(*grads, size=slope * float(terms.detach().max()))


@each_backend
@each_dtype
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize(
    "objective", [objectives.a_lol, objectives.a_lol_seq, objectives.nll], ids=lambda f: f.__name__
)
def test_a_sequence_longer_than_a_chunk(
    objective: Any, frozen: bool, dtype: torch.dtype, backend: str
) -> None:
    """a_lol needs its sequence whole; the other two are cut into pieces."""
    rows, v = size(64, 6), size(5003, 131)
    lengths = [rows // 3, 5 * rows + 1, 0, rows, 3]
    p = peaky(sum(lengths), 48, v, dtype=dtype, bias=True)
    judge_loss(p, objective, lengths, backend, frozen, memory_budget=4 * v * rows)


@each_backend
@each_dtype
def test_the_error_of_dweight_does_not_grow_with_chunks(dtype: torch.dtype, backend: str) -> None:
    """Accumulated in bf16 it is seven times larger after 1024 chunks."""
    n, v = size(1024, 32), size(1025, 130)
    p = peaky(n, 64, v, dtype=dtype)
    exact, wanted = leaves(p.double())
    (truth,) = torch.autograd.grad(-judges.eager(exact).logps.mean(), wanted[1:])
    seq = lk.Sequences.from_lengths([n]).to(DEVICE)

    def error(budget: int) -> float:
        q, mine = leaves(p)
        loss = lk.linear_loss(
            objectives.nll, q.hidden, q.weight, q.labels, seq,
            reduction="token-mean", backend=backend, memory_budget=budget,
        )  # fmt: skip
        (dweight,) = torch.autograd.grad(loss, mine[1:])
        return float((dweight.double() - truth).norm() / truth.norm())

    one, many = error(4 * v * n), error(4 * v)
    # In fp32 the two differ by the order of a sum.
    assert many <= max(1.1 * one, 0 if dtype in HALF else 2e-6), (one, many)


@each_backend
@each_dtype
@pytest.mark.parametrize("hidden_size", [64, 1024, 4096])
def test_the_log_prob_of_a_long_sequence(
    hidden_size: int, dtype: torch.dtype, backend: str
) -> None:
    """1e-3 nat over 4096 tokens: A-LoL exponentiates this sum."""
    n = size(4096, 64)
    p = peaky(n, size(hidden_size, 32), size(32003, 130), dtype=dtype)
    with torch.no_grad():
        seq, side = loss_inputs(n, [n], torch.zeros(n, device=DEVICE))
        scored = score(p, backend=backend).logps, a_lol(p, seq, side, backend=backend).logps
        parts = zip(p.hidden.split(512), p.labels.split(512), strict=True)
        exact = (judges.eager(Problem(h, p.weight, y).double()).logps for h, y in parts)
        truth = torch.cat(list(exact))
    for logps in scored:
        error = logps.double() - truth
        assert abs(float(error.sum())) <= 1e-3 and float(error.abs().max()) <= 2e-5
