"""``linear_logprob``: accuracy of log-probs and gradients over fuzzed problems, and its options."""

import random
from collections.abc import Callable
from dataclasses import replace

import judges
import pytest
import torch
from cases import DTYPES, HALF, each_dtype, fuzz_test, judge_outputs, rounded_sizes
from judges import LAYOUTS, Problem, RedZones, eager, eager_logits, fuzz, peaky
from torch import Tensor

import lolkernels as lk
from lolkernels.backends import TABLE


class Drawn:
    """What a fuzz case adds to its problem: rows left out, upstream gradients, the budget."""

    def __init__(self, seed: int, problem: Problem) -> None:
        r = random.Random(f"case {seed}")
        n, v = problem.labels.shape[0], problem.weight.shape[0]
        generator = torch.Generator().manual_seed(seed)
        share = r.choice((0.0, 0.0, 0.3, 0.9, 1.0))
        self.keep = torch.rand(n, generator=generator) >= share
        self.ignored = ~self.keep & (torch.rand(n, generator=generator) < 0.5)
        self.budget = r.choice((None, 1, 3 * 4 * min(v, 2048), 10_000))
        # A backward that ignores the gradient of an output returns zeros where it is alone.
        alone = (("logps",), ("logps",), ("entropy",), ("lse",))
        names = r.choice((*alone, ("logps", "lse", "entropy")))
        self.upstream = {name: torch.randn(n, generator=generator) for name in names}
        self.layout: Callable[[], str] = lambda: r.choice(LAYOUTS)


def gradients(
    problem: Problem, drawn: Drawn, dtype: torch.dtype | None
) -> tuple[list[Tensor], lk.LogprobOutput]:
    """Eager outputs and gradients over the kept rows; ``dtype`` float64 gives the truth."""
    p = problem.double() if dtype == torch.float64 else problem
    keep = drawn.keep
    operands = [p.hidden, p.weight] + ([] if p.bias is None else [p.bias])
    leaves = [t.detach().clone().requires_grad_() for t in operands]
    kept = Problem(
        leaves[0][keep],
        leaves[1],
        p.labels[keep],
        leaves[2] if p.bias is not None else None,
        **p.options,
    )
    out = eager(kept)
    total = sum(
        (getattr(out, name) * g[keep].to(out.lse.dtype)).sum() for name, g in drawn.upstream.items()
    )
    return list(torch.autograd.grad(total, leaves)), out


def check_case(seed: int, backend: str) -> tuple[float, int]:
    """One fuzz case between red zones. Returns its largest log-prob error and canaries rejected."""
    problem = fuzz(seed, DTYPES[backend])
    drawn = Drawn(seed, problem)
    keep = drawn.keep
    zones = RedZones()
    leaves = {
        "hidden": zones.place("hidden", problem.hidden, drawn.layout()).requires_grad_(),
        "weight": zones.place("weight", problem.weight, drawn.layout()).requires_grad_(),
    }
    if problem.bias is not None:
        leaves["bias"] = zones.place("bias", problem.bias, drawn.layout()).requires_grad_()
    labels = torch.where(drawn.ignored, -100, problem.labels)
    out = lk.linear_logprob(
        leaves["hidden"],
        leaves["weight"],
        zones.place("labels", labels, drawn.layout()),
        bias=leaves.get("bias"),
        mask=zones.place("mask", keep | drawn.ignored),
        backend=backend,
        memory_budget=drawn.budget,
        **problem.options,
    )
    dtype = torch.float64 if problem.hidden.dtype == torch.float64 else torch.float32
    upstream = [
        zones.place(f"d{name}", g.to(dtype), drawn.layout()) for name, g in drawn.upstream.items()
    ]
    grads = torch.autograd.grad(
        [getattr(out, name) for name in drawn.upstream], list(leaves.values()), upstream
    )
    zones.check()

    true_grads, truth = gradients(problem, drawn, torch.float64)
    peer_grads, _ = gradients(problem, drawn, None)
    for value in out:
        assert value.dtype == dtype and bool((value[~keep] == 0).all())
    worst, canaries = judge_outputs(out._make(t[keep] for t in out), truth, dtype)
    kept = replace(problem, hidden=problem.hidden[keep], labels=problem.labels[keep])
    sizes = judges.gradient_sizes(problem, {name: g * keep for name, g in drawn.upstream.items()})
    if not TABLE[backend].panels:
        sizes = rounded_sizes(sizes, kept)
    for name, grad, peer, true in zip(leaves, grads, peer_grads, true_grads, strict=True):
        assert grad.dtype == leaves[name].dtype
        try:
            canaries += judges.accept_gradient(grad, peer, true, sizes[name])
        except AssertionError as error:
            raise AssertionError(f"d{name}: {error}") from None
    return worst, canaries


test_fuzz_against_float64 = fuzz_test(check_case, canaries=5)


# --- long sequences, many chunks ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(b, d, marks=() if TABLE[b].panels else pytest.mark.slow, id=f"{b}-{d}")
        for b in DTYPES
        for d in HALF
        if d in DTYPES[b]
    ],
)
def test_a_sequence_of_4096_tokens_sums_to_a_millinat(backend: str, dtype: torch.dtype) -> None:
    p = peaky(4096, 64, 2501, dtype=dtype, std=3.0)
    with torch.no_grad():
        logps = lk.linear_logprob(p.hidden, p.weight, p.labels, backend=backend).logps
        truth = eager(p.double()).logps
        rounded = eager_logits((p.hidden @ p.weight.T), p.labels, **p.options).logps
    assert judges.accept_logprobs(logps, truth, [4096]) == 3
    if dtype != torch.float32:  # the criterion tells fp32 logits from rounded ones
        assert judges.logprob_faults(rounded, truth, [4096])


@pytest.mark.parametrize("op", ["linear_logprob", "linear_loss"])
@each_dtype
def test_the_error_of_dweight_does_not_grow_with_the_number_of_chunks(
    op: str, dtype: torch.dtype
) -> None:
    """Accumulating dweight in bfloat16 costs a factor of 7 at 1,024 chunks."""
    p = peaky(2048, 32, 300, dtype=dtype, std=2.0)
    upstream = torch.randn(2048)
    coefficient = upstream.double()[:, None]
    q = p.double()
    dz = -torch.softmax(q.hidden @ q.weight.T, -1)
    dz[torch.arange(2048), p.labels] += 1
    truth = (dz * coefficient).T @ q.hidden
    errors = []
    for budget in (2**30, 2 * 300 * 4):
        w = p.weight.clone().requires_grad_()
        if op == "linear_logprob":
            out = lk.linear_logprob(p.hidden, w, p.labels, memory_budget=budget)
            (grad,) = torch.autograd.grad(out.logps, w, upstream)
        else:
            loss = lk.linear_loss(
                lk.objectives.wbc,
                p.hidden,
                w,
                p.labels,
                lk.Sequences.from_lengths([1] * 2048),
                reduction="sum",
                memory_budget=budget,
                rewards=-upstream,
            )
            (grad,) = torch.autograd.grad(loss, w)
        errors.append(float((grad.double() - truth).norm() / truth.norm()))
    if dtype == torch.float32:  # 1,024 additions in float32, against a GEMM's own order
        assert errors[1] <= 1e-6
    else:
        assert errors[1] <= 1.1 * errors[0]
    assert errors[0] > 0


# --- options --------------------------------------------------------------------------------------


def test_masked_and_ignored_rows_are_the_same_as_rows_left_out() -> None:
    p = peaky(50, 16, 300)
    keep = torch.rand(50) < 0.5
    results = []
    for how in ("mask", "ignored", "both", "selected"):
        h, w = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
        labels, mask, rows = p.labels.clone(), None, slice(None)
        if how in ("ignored", "both"):
            labels[~keep] = -100
        if how in ("mask", "both"):
            mask = keep
        if how == "selected":
            rows = keep
        out = lk.linear_logprob(h[rows], w, labels[rows], mask=mask)
        (out.logps.sum() + out.entropy.sum() + out.lse.sum()).backward()
        kept = out if how == "selected" else [t[keep] for t in out]
        results.append([*(t.detach() for t in kept), h.grad, w.grad])
        assert bool((h.grad[~keep] == 0).all())
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_leading_dimensions_and_int32_labels() -> None:
    p = peaky(24, 8, 40)
    flat = lk.linear_logprob(p.hidden, p.weight, p.labels)
    shaped = lk.linear_logprob(
        p.hidden.view(2, 3, 4, 8), p.weight, p.labels.view(2, 3, 4).to(torch.int32)
    )
    for a, b in zip(flat, shaped, strict=True):
        assert b.shape == (2, 3, 4) and torch.equal(a, b.reshape(-1))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    h = torch.randn(*shape, 8, requires_grad=True)
    w = torch.randn(11, 8, requires_grad=True)
    bias = torch.randn(11, requires_grad=True)
    out = lk.linear_logprob(h, w, torch.zeros(shape, dtype=torch.int64), bias=bias)
    assert all(t.shape == shape for t in out)
    (out.logps.sum() + out.lse.sum()).backward()
    assert h.grad.shape == h.shape
    assert float(w.grad.abs().max()) == 0.0 and float(bias.grad.abs().max()) == 0.0


def test_neither_the_budget_nor_the_batch_moves_a_log_prob() -> None:
    """The ratio of step 0 is one whatever the batch: 1e-5 nat a token between any two shapes."""
    p = peaky(64, 48, 5000, std=4.0)
    first = lk.linear_logprob(p.hidden, p.weight, p.labels).logps
    for budget in (1, 2048 * 4 * 5, 2**30):
        again = lk.linear_logprob(p.hidden, p.weight, p.labels, memory_budget=budget).logps
        assert float((first - again).abs().max()) <= 1e-5
    alone = torch.cat(
        [
            lk.linear_logprob(p.hidden[i : i + 1], p.weight, p.labels[i : i + 1]).logps
            for i in range(64)
        ]
    )
    assert float((first - alone).abs().max()) <= 1e-5


def test_outputs_are_differentiable_but_for_the_largest_logit() -> None:
    p = peaky(5, 8, 20)
    out = lk.linear_logprob(p.hidden.requires_grad_(), p.weight, p.labels)
    assert [t.requires_grad for t in out] == [True, True, True, False]
