"""``logprob`` on logits that are there already: accuracy, layouts, p near one, in place."""

import math
import random
from typing import Any

import judges
import pytest
import torch
from cases import DTYPES, each_backend, each_dtype, fuzz_test, judge_outputs
from judges import LAYOUTS, VOCABULARIES, RedZones, eager_logits
from torch import Tensor

import lolkernels as lk
from lolkernels.backends import TABLE

OPTIONS = [
    {"temperature": t, "softcap": s, "logit_scale": f}
    for t in (1.0, 0.6, 2.0)
    for s in (None, 6.0, 30.0)
    for f in (1.0, 0.125)
]


def check_case(seed: int, backend: str) -> tuple[float, int]:
    """Logits of any dtype and layout between red zones against float64. Worst error, canaries."""
    r = random.Random(f"logits {seed}")
    generator = torch.Generator().manual_seed(seed)
    n, v = r.randint(1, 40), r.choice(VOCABULARIES)
    dtype, options = r.choice(DTYPES[backend]), r.choice(OPTIONS)
    labels = torch.randint(v, (n,), generator=generator)
    z = torch.randn(n, v, generator=generator, dtype=torch.float64) * r.uniform(1, 6)
    z[torch.arange(n), labels] += r.uniform(0, 10)
    logits = (z * (options["temperature"] / options["logit_scale"])).to(dtype)
    zones = RedZones()
    x = zones.place("logits", logits, r.choice(LAYOUTS)).requires_grad_()
    out = lk.logprob(
        x, zones.place("labels", labels, r.choice(LAYOUTS)), backend=backend, **options
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    names = r.choice((("logps",), ("logps",), ("logps", "lse", "entropy"), ("lse",)))
    drawn = {name: torch.randn(n, generator=generator, dtype=wide) for name in names}
    upstream = [zones.place(f"d{name}", g, r.choice(LAYOUTS)) for name, g in drawn.items()]
    (grad,) = torch.autograd.grad([getattr(out, name) for name in names], x, upstream)
    zones.check()
    assert grad.dtype == dtype and all(t.dtype == wide and t.shape == (n,) for t in out)

    results = []
    for kind in (torch.float64, dtype):
        leaf = logits.to(kind).requires_grad_()
        e = eager_logits(leaf, labels, **options)
        total = sum((getattr(e, name) * g.to(e.lse.dtype)).sum() for name, g in drawn.items())
        results.append((e, torch.autograd.grad(total, leaf)[0]))
    (truth, true_grad), (_, peer_grad) = results
    worst, canaries = judge_outputs(out, truth, dtype)
    head = judges.Problem(logits, torch.eye(v), labels, **options)
    if v <= 300:
        size = judges.gradient_sizes(head, drawn)["hidden"]
    else:  # the same bound without an identity of V x V
        biggest = sum(float(g.abs().max()) for g in drawn.values())
        size = 40 * biggest * options["logit_scale"] / options["temperature"]
    canaries += judges.accept_gradient(grad, peer_grad, true_grad, size)
    return worst, canaries


test_fuzz_against_float64 = fuzz_test(check_case, canaries=3)


@pytest.mark.parametrize("shift", [0.0, 16.0])
@each_dtype
@each_backend
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999])
def test_gradient_at_a_target_of_high_probability(backend, p, dtype, shift) -> None:
    """bfloat16(p) - 1 is 20% wrong at p = .99 and has no digit left at .999.

    Element by element within 1%, beyond what a float32 log-sum-exp can tell: a unit in its last
    place, which is nothing for logits that are log-probs (but the reference adds up 1 + ... in
    float32, and Triton and CUDA do within a thread's batch), and 2e-6 for logits near 16.
    """
    v = 130
    logits = torch.full((6, v), math.log((1 - p) / (v - 1)), dtype=torch.float64)
    labels = torch.tensor([0, 1, 64, 127, 128, 129])
    logits[torch.arange(6), labels] = math.log(p)
    logits = (logits + shift).to(dtype)
    x = logits.clone().requires_grad_()
    upstream = torch.tensor([1.0, -1.0, 0.5, 2.0, 3.0, 1.0])
    (grad,) = torch.autograd.grad(lk.logprob(x, labels, backend=backend).logps, x, upstream)
    y = logits.double().requires_grad_()
    log_p = torch.log_softmax(y, -1).gather(-1, labels[:, None]).squeeze(-1)
    (truth,) = torch.autograd.grad(log_p, y, upstream.double())
    own = {"cpu": 0.01, "triton": 1.0, "cuda_host": 2.0, "reference": 4.0}[backend]
    unit = torch.finfo(torch.float32).eps * max(shift, own)
    allowed = 0.01 * truth.abs() + unit * upstream.double()[:, None].abs()
    if dtype == torch.float16:  # 1e-5 / 129 lies below its smallest normal number
        allowed = allowed + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps

    def judge(g: Tensor) -> list[str]:
        off = (g.double() - truth).abs() - allowed
        return [] if bool((off <= 0).all()) else [f"{off.max().item():.1e} above 1%"]

    assert judges.accept(judge, grad, blind=8 * unit) >= 2
    # The fault this test is for: p rounded to the logits' dtype before one is subtracted.
    softmax = torch.softmax(y, -1).to(torch.bfloat16).double()
    rounded = -softmax * upstream.double()[:, None]
    rounded[torch.arange(6), labels] += upstream.double()
    if 0.99 <= p <= 0.9999:
        assert judge(rounded)


def test_leading_dimensions_and_int32_labels() -> None:
    logits, labels = torch.randn(2, 3, 4, 19), torch.randint(19, (2, 3, 4))
    out = lk.logprob(logits, labels.to(torch.int32))
    want = torch.log_softmax(logits.double(), -1).gather(-1, labels[..., None]).squeeze(-1)
    assert out.logps.shape == (2, 3, 4)
    judges.accept_logprobs(out.logps.reshape(-1), want.reshape(-1))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    logits = torch.randn(*shape, 8, requires_grad=True)
    out = lk.logprob(logits, torch.zeros(shape, dtype=torch.int64))
    assert all(t.shape == shape for t in out)
    out.logps.sum().backward()
    assert logits.grad.shape == logits.shape


@each_backend
def test_batched_views_of_any_stride(backend: str) -> None:
    base = torch.randn(5, 40, 2, 7)
    for x in (base.permute(0, 2, 3, 1), base[1:, ::2].permute(0, 3, 2, 1), base[:, :, 0].mT):
        labels = torch.randint(x.shape[-1], x.shape[:-1])
        leaf = x.detach().requires_grad_()
        out = lk.logprob(leaf, labels, backend=backend)
        (grad,) = torch.autograd.grad(out.logps.sum(), leaf)
        true = x.double().clone().requires_grad_()
        want = torch.log_softmax(true, -1).gather(-1, labels[..., None]).squeeze(-1)
        judges.accept_logprobs(out.logps.reshape(-1), want.detach().reshape(-1))
        (true_grad,) = torch.autograd.grad(want.sum(), true)
        assert float((grad.double() - true_grad).abs().max()) <= 1e-6


@pytest.mark.slow
def test_more_than_2_to_the_31_logits() -> None:
    """2^31 logits and a few rows more, all read, in the memory of one row."""
    n, v = 2**15 + 3, 2**16
    row = torch.randn(1, v, dtype=torch.float32).to(torch.bfloat16)
    logits = row.expand(n, v)  # stride 0: one row of memory
    labels = torch.arange(n) % v
    got = lk.logprob(logits, labels, backend="cpu").logps
    want = torch.log_softmax(row.double(), -1)[0, labels]
    judges.accept_logprobs(got, want, [1] * n)


# --- the gradient in the place of the logits ------------------------------------------------------

N, D, V = 6, 8, 50


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype)
    return hidden, weight.requires_grad_(), torch.randint(V, (N,))


@each_backend
@each_dtype
def test_the_gradient_is_that_of_the_copying_backward(backend: str, dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(dtype)

    def grad(inplace: bool) -> Tensor:
        logits = hidden @ weight.T
        out = lk.logprob(logits, labels, backend=backend, inplace=inplace, softcap=9.0)
        total = (out.logps * torch.arange(N)).sum() + out.lse.sum()
        return torch.autograd.grad(total, logits)[0].float()

    want = grad(False)  # what is kept has been rounded once more
    rounding, least = torch.finfo(dtype).eps, 1e-6 if dtype == torch.float16 else 1e-30
    torch.testing.assert_close(grad(True), want, rtol=2 * rounding + 1e-5, atol=least)


@pytest.mark.parametrize("inplace", [False, True])
@each_dtype
@each_backend
def test_confident_labels_keep_their_digits(
    backend: str, dtype: torch.dtype, inplace: bool
) -> None:
    """1 - p down to 1e-7, where z - lse in float32 has no digit left."""
    n, v = 60, 700
    labels = torch.randint(v, (n,))
    x = torch.randn(n, v, dtype=torch.float64) + 8
    at = (torch.arange(n), labels)
    x[at] = -torch.inf
    x[at] = x.logsumexp(1) - torch.linspace(math.log(1e-7), math.log(0.5), n, dtype=torch.float64)
    x = x.to(dtype)
    truth = x.double().requires_grad_()
    (want,) = torch.autograd.grad(torch.log_softmax(truth, 1)[at].sum(), truth)
    leaf = x.clone().requires_grad_()
    out = lk.logprob(leaf * 1, labels, backend=backend, inplace=inplace)
    (got,) = torch.autograd.grad(out.logps.sum(), leaf)
    rounding = torch.finfo(dtype).eps
    bound = (2e-3 + rounding) * want.abs() + (6e-8 if dtype == torch.float16 else 0)
    off = (got.double() - want).abs()
    assert bool((off[at] <= bound[at]).all()), (off[at] / want[at]).max()
    assert bool((off <= 2 * bound).all())


@pytest.mark.parametrize("inplace", [False, True])
def test_the_logits_are_read_once_each_way(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def noted(name: str) -> Any:
        real = getattr(TABLE["reference"], name)
        return lambda *args, **options: (called.append(name), real(*args, **options))[1]

    names = ("sums", "exps_", "dlogits_")
    spied = {name: noted(name) for name in names}
    monkeypatch.setitem(TABLE, "reference", TABLE["reference"]._replace(**spied))
    x = torch.randn(3, 9, requires_grad=True)
    lk.logprob(
        x * 1, torch.tensor([1, 2, 3]), backend="reference", inplace=inplace
    ).logps.sum().backward()
    assert called == (["exps_"] if inplace else ["sums", "dlogits_"])
    called.clear()
    with torch.no_grad():  # nobody's gradient: the logits stay
        before = x.clone()
        lk.logprob(x, torch.tensor([1, 2, 3]), backend="reference", inplace=inplace)
    assert called == ["sums"] and torch.equal(x, before)


def test_the_entropy_has_no_gradient_in_place() -> None:
    hidden, weight, labels = problem()
    out = lk.logprob(hidden @ weight.T, labels, inplace=True)
    with pytest.raises(NotImplementedError, match=r"entropy.*inplace=False"):
        out.entropy.sum().backward()


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_it_lies_where_the_logits_were(layout: str) -> None:
    hidden, weight, labels = problem()
    logits = hidden @ weight.T if layout == "rows" else (weight @ hidden.T).T
    place = logits.data_ptr()
    want = torch.softmax(logits.detach(), 1)
    out = lk.logprob(logits, labels, inplace=True)
    (grad,) = torch.autograd.grad(out.logps.sum(), logits, retain_graph=True)
    assert grad.data_ptr() == place and grad.stride() == logits.stride()
    want[range(N), labels] -= 1
    torch.testing.assert_close(grad, -want)
    # Of a view, torch says that it is no longer the one that was used.
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|not have been used"):
        torch.autograd.grad(out.logps.sum(), logits)


def test_another_user_of_the_logits_is_told() -> None:
    hidden, weight, labels = problem()
    logits = hidden @ weight.T
    other = logits.exp().sum() + (logits**2).sum()  # the square needs the logits in its backward
    lk.logprob(logits, labels, inplace=True).logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_under_torch_compile() -> None:
    hidden, weight, labels = problem()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(weight: Tensor) -> Tensor:
        return lk.logprob(hidden @ weight.T, labels, inplace=True).logps.sum()

    (got,) = torch.autograd.grad(loss(weight), weight)
    (want,) = torch.autograd.grad(lk.logprob(hidden @ weight.T, labels).logps.sum(), weight)
    torch.testing.assert_close(got, want)


def test_it_has_no_second_derivative() -> None:
    hidden, weight, labels = problem()
    out = lk.logprob(hidden @ weight.T, labels, inplace=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(out.logps.sum(), weight, create_graph=True)
