"""Infinities, nan, the smallest shapes and ratios that overflow."""

import math
from typing import Any

import judges
import pytest
import torch
from on_device import (
    DEVICE,
    DTYPES,
    each_backend,
    each_dtype,
    judge,
    leaves,
    peaky,
    same,
    score,
    size,
)
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives

INF = math.inf
N, D, V = 16, 32, size(9000, 300)
THIRD = V // 3


def all_but(keep: Tensor) -> Tensor:
    bias = torch.full((V,), -INF, device=DEVICE)
    bias[keep] = 0.0
    return bias


def out_of_reach(name: str, labels: Tensor) -> Tensor:
    """A bias that is -inf over whole tiles."""
    bias = torch.zeros(V, device=DEVICE)
    if name == "only labels":
        return all_but(labels)
    start = {"first": 0, "middle": THIRD, "last": V - THIRD}[name]
    bias[start : start + THIRD] = -INF
    bias[labels] = 0.0
    return bias


@each_backend
@each_dtype
@pytest.mark.parametrize("where", ["first", "middle", "last", "only labels"])
def test_a_bias_of_minus_infinity(where: str, dtype: torch.dtype, backend: str) -> None:
    p = peaky(N, D, V, dtype=dtype)
    bias = out_of_reach(where, p.labels).to(dtype)
    p = judges.Problem(p.hidden, p.weight, p.labels, bias)
    q, wanted = leaves(p)
    out, truth = score(q, backend=backend), judges.eager(p.double())
    judges.accept_logprobs(out.logps, truth.logps)
    assert float((out.entropy - truth.entropy).abs().max()) <= 6e-5
    got = torch.autograd.grad(out.logps.sum(), wanted)
    judge(p, list(got[:2]), False, {"logps": torch.ones(N, device=DEVICE)})
    assert not got[1][bias == -INF].any() and not got[2][bias == -INF].any()


@each_backend
@each_dtype
@pytest.mark.parametrize("value", [INF, math.nan])
def test_a_spoilt_row_stays_a_row(value: float, dtype: torch.dtype, backend: str) -> None:
    logits = torch.randn(N, V, device=DEVICE).to(dtype)
    labels = torch.randint(1, V, (N,), device=DEVICE)
    spoilt = logits.clone()
    spoilt[3, 0] = value

    def run(x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        out = lk.logprob(x, labels, backend=backend)
        return [*(t.detach() for t in out), *torch.autograd.grad(out.logps.sum(), x)]

    good = torch.arange(N, device=DEVICE) != 3
    want, got = run(logits), run(spoilt)
    same([t[good] for t in got], [t[good] for t in want])
    logps, lse, entropy, largest, grad = (t[3] for t in got)
    assert logps.isnan() and lse.isnan() and entropy.isnan() and grad.isnan().all()
    assert largest == INF or math.isnan(value)


@each_backend
@each_dtype
def test_a_nan_hidden_row_stays_a_row(dtype: torch.dtype, backend: str) -> None:
    p, _ = leaves(peaky(N, D, V, dtype=dtype), frozen=True)

    def run() -> list[Tensor]:
        seq = lk.Sequences.from_lengths([1] * N).to(DEVICE)
        scored = score(p, backend=backend)
        (a,) = torch.autograd.grad(scored.logps.sum(), p.hidden)
        out = lk.linear_loss(
            objectives.nll, p.hidden, p.weight, p.labels, seq,
            backend=backend, return_outputs=True,
        )  # fmt: skip
        (b,) = torch.autograd.grad(out.loss, p.hidden)
        return [scored.logps.detach(), a, out.logps, out.seq_loss, b]

    want = run()
    with torch.no_grad():
        p.hidden[3] = math.nan
    got = run()
    good = torch.arange(N, device=DEVICE) != 3
    same([t[good] for t in got], [t[good] for t in want])
    assert all(t[3].isnan().all() for t in got)


@each_backend
@each_dtype
@pytest.mark.parametrize("shift", [100.0, -100.0])
def test_shifted_logits(shift: float, dtype: torch.dtype, backend: str) -> None:
    """And a row of -inf beside them: no word is possible, its log-prob is not a number."""
    logits = (torch.randn(N, V, device=DEVICE) + shift).to(dtype)
    logits[1] = -INF
    labels, good = torch.randint(V, (N,), device=DEVICE), torch.arange(N, device=DEVICE) != 1
    out = lk.logprob(logits, labels, backend=backend)
    assert out.logps[1].isnan() and out.lse[1] == -INF and out.max_logit[1] == -INF
    plain = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0}
    truth = judges.eager_logits(logits.double(), labels, **plain)
    assert float((out.logps - truth.logps)[good].abs().max()) <= 2e-5
    assert float((out.entropy - truth.entropy)[good].abs().max()) <= 6e-5


@each_backend
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("v", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_the_smallest_shapes(n: int, v: int, dtype: torch.dtype, backend: str) -> None:
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("float64 is for the reference backend")
    h = torch.randn(n, 2, device=DEVICE).to(dtype).requires_grad_()
    w = torch.randn(v, 2, device=DEVICE).to(dtype).requires_grad_()
    labels = torch.randint(v, (n,), device=DEVICE)
    want = torch.log_softmax(h.double() @ w.double().T, -1).gather(-1, labels[:, None]).squeeze(-1)
    truth = torch.autograd.grad(want.sum(), (h, w))
    seq = lk.Sequences.from_lengths([0, n, 0]).to(DEVICE)
    out = lk.linear_logprob(h, w, labels, backend=backend)
    loss = lk.linear_loss(
        objectives.nll, h, w, labels, seq, reduction="sum", backend=backend
    )  # fmt: skip
    tolerance = {torch.bfloat16: 0.05, torch.float16: 5e-3}.get(dtype, 1e-5)
    assert abs(float(loss + want.sum())) <= 1e-5
    assert float((out.logps - want).abs().sum()) <= 2e-5
    for call in (out.logps.sum(), -loss):
        for got, exact in zip(torch.autograd.grad(call, (h, w)), truth, strict=True):
            assert got.shape == exact.shape and got.dtype == dtype
            assert float((got - exact).abs().sum()) <= tolerance * (1 + float(exact.abs().sum()))
    logits = torch.randn(n, v, device=DEVICE).to(dtype).requires_grad_()
    scored = lk.logprob(logits, labels, backend=backend)
    (grad,) = torch.autograd.grad(scored.logps.sum(), logits)
    assert grad.shape == (n, v) and (v > 1 or not grad.any())


@each_backend
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens_at_all(lengths: list[int], backend: str) -> None:
    h = torch.randn(0, D, device=DEVICE, requires_grad=True)
    w = torch.randn(V, D, device=DEVICE, requires_grad=True)
    seq = lk.Sequences.from_lengths(lengths).to(DEVICE)
    side = {"ref_logps": torch.ones(0), "advantages": torch.ones(len(lengths))}
    loss = lk.linear_loss(
        objectives.a_lol, h, w, torch.ones(0, dtype=torch.int64, device=DEVICE), seq,
        backend=backend, **{k: t.to(DEVICE) for k, t in side.items()},
    )  # fmt: skip
    grads = torch.autograd.grad(loss, (h, w))
    assert loss.item() == 0 and not grads[1].any() and grads[0].shape == (0, D)


@each_backend
@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("clip", [0.9, 1.5])
@pytest.mark.parametrize("name", ["a_lol", "a_lol_seq", "r_lol"])
def test_a_ratio_that_overflows_lands_on_its_side_of_the_clip(
    name: str, clip: float, sign: float, backend: str
) -> None:
    """exp overflows float32 at 88.72 nats; 0.043 nat a token are enough over 2,048 tokens."""
    objective: Any = getattr(objectives, name)
    seq = lk.Sequences.from_lengths([6]).to(DEVICE)
    p = peaky(6, 4, 9)
    unlikely = (p.hidden @ p.weight.T).argmin(1)
    for log_ratio in (50.0, 88.7, 89.0, 200.0, 1e4, -50.0, -89.0, -200.0, -300.0):
        q, wanted = leaves(
            p if log_ratio > 0 else judges.Problem(100 * p.hidden, p.weight, unlikely)
        )
        with torch.no_grad():
            logps = score(q, backend=backend).logps
        ref = logps - (log_ratio if name == "a_lol_seq" else log_ratio / 6)
        if log_ratio < 0:
            assert float(ref.max()) <= 0
        weight = "rewards" if name == "r_lol" else "advantages"
        side = {"ref_logps": ref, weight: torch.tensor([sign], device=DEVICE)}
        loss = lk.linear_loss(
            objective, q.hidden, q.weight, q.labels, seq, clip=clip, backend=backend, **side
        )
        grads = torch.autograd.grad(loss, wanted)
        assert loss.isfinite() and all(g.isfinite().all() for g in grads)
        low = 1 - clip if clip < 1 else 0.0
        bound = 1 + clip if log_ratio > 0 else low
        effective = sign if name == "r_lol" else max(sign, 0.0)
        want = -effective * bound * float(logps.double().sum())
        assert abs(loss.item() - want) <= 1e-4 * max(1.0, abs(want)), log_ratio
