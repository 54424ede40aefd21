"""``logprob`` on logits that are there already: accuracy, layouts, p near one, 64-bit offsets."""

import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lolkernels as lk
from lolkernels import testing
from lolkernels.testing import LAYOUTS, LOGPROB_ATOL, VOCABULARIES, RedZones, eager_logits

ROOT = Path(__file__).resolve().parents[1]
HALF = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = {
    "cpu": HALF,
    "triton": (torch.float32, torch.float16),  # the interpreter cuts bfloat16 off: see test_triton
    "cuda_host": HALF,
    "reference": (*HALF, torch.float64),
}
BLOCK = 25
# Kernels in an interpreter are slow: fewer cases, and most of those in the exhaustive run.
COUNTS = {
    "cpu": (300, 2000),
    "triton": (25, 300),
    "cuda_host": (75, 600),
    "reference": (300, 2000),
}
CASES = [
    pytest.param(
        backend, start, marks=() if start < quick else pytest.mark.slow, id=f"{backend}-{start}"
    )
    for backend, (quick, every) in COUNTS.items()
    for start in range(0, every, BLOCK)
]
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
    canaries = testing.accept_logprobs(out.logps, truth.logps.detach())
    scale = 1e-12 / LOGPROB_ATOL if dtype == torch.float64 else 1.0
    for name, factor in (("lse", 1.0), ("max_logit", 1.0), ("entropy", 3.0)):
        off = float((getattr(out, name).double() - getattr(truth, name)).detach().abs().max())
        size = max(1.0, float(truth.max_logit.detach().abs().max()) / 30)
        assert off <= factor * size * scale * LOGPROB_ATOL, f"{name} off by {off:.1e}"
    head = testing.Problem(logits, torch.eye(v), labels, **options)
    size = testing.gradient_sizes(head, drawn)["hidden"] if v <= 300 else 0.0
    if not size:  # the same bound without an identity of V x V
        biggest = sum(float(g.abs().max()) for g in drawn.values())
        size = 40 * biggest * options["logit_scale"] / options["temperature"]
    canaries += testing.accept_gradient(grad, peer_grad, true_grad, size)
    worst = float((out.logps.detach().double() - truth.logps.detach()).abs().max()) / scale
    return worst, canaries


@pytest.mark.parametrize(("backend", "start"), CASES)
def test_fuzz_against_float64(
    backend: str, start: int, record_property: Callable[[str, object], None]
) -> None:
    worst, canaries, faults = 0.0, 0, []
    for seed in range(start, start + BLOCK):
        try:
            error, rejected = check_case(seed, backend)
        except AssertionError as error_of_case:
            faults.append(f"seed {seed}: {error_of_case}")
            continue
        worst, canaries = max(worst, error), canaries + rejected
    assert not faults, f"{len(faults)} of {BLOCK} cases:\n" + "\n".join(faults)
    assert canaries >= 3 * BLOCK
    record_property("worst nat per token", worst)


@pytest.mark.parametrize("shift", [0.0, 16.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("backend", list(DTYPES))
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999])
def test_gradient_at_a_target_of_high_probability(
    backend: str, p: float, dtype: torch.dtype, shift: float
) -> None:
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

    def judge(g: torch.Tensor) -> list[str]:
        off = (g.double() - truth).abs() - allowed
        return [] if bool((off <= 0).all()) else [f"{off.max().item():.1e} above 1%"]

    assert testing.accept(judge, grad, blind=8 * unit) >= 2
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
    testing.accept_logprobs(out.logps.reshape(-1), want.reshape(-1))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    logits = torch.randn(*shape, 8, requires_grad=True)
    out = lk.logprob(logits, torch.zeros(shape, dtype=torch.int64))
    assert all(t.shape == shape for t in out)
    out.logps.sum().backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("backend", list(DTYPES))
def test_batched_views_of_any_stride(backend: str) -> None:
    base = torch.randn(5, 40, 2, 7)
    for x in (base.permute(0, 2, 3, 1), base[1:, ::2].permute(0, 3, 2, 1), base[:, :, 0].mT):
        labels = torch.randint(x.shape[-1], x.shape[:-1])
        leaf = x.detach().requires_grad_()
        out = lk.logprob(leaf, labels, backend=backend)
        (grad,) = torch.autograd.grad(out.logps.sum(), leaf)
        true = x.double().clone().requires_grad_()
        want = torch.log_softmax(true, -1).gather(-1, labels[..., None]).squeeze(-1)
        testing.accept_logprobs(out.logps.reshape(-1), want.detach().reshape(-1))
        (true_grad,) = torch.autograd.grad(want.sum(), true)
        assert float((grad.double() - true_grad).abs().max()) <= 1e-6


# --- 64-bit offsets -------------------------------------------------------------------------------

# Two rows 2^31 elements apart in a buffer that is never touched in between: offsets overflow int32,
# memory stays small because untouched pages are never backed.
FAR_APART = """
import torch
import lolkernels as lk
stride, v = 2**31 + 11, 1000
for dtype in (torch.bfloat16,):
    buffer = torch.empty(2 * stride + v, dtype=dtype)
    far = torch.as_strided(buffer, (3, v), (stride, 1))
    rows = torch.randn(3, v).to(dtype)
    far.copy_(rows)
    labels = torch.tensor([3, v - 1, 0])
    got = lk.logprob(far, labels, backend="cpu")
    want = lk.logprob(rows, labels, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(got, want)), dtype
    x = far.requires_grad_()
    (grad,) = torch.autograd.grad(lk.logprob(x, labels, backend="cpu").logps.sum(), x)
    near = rows.clone().requires_grad_()
    (want,) = torch.autograd.grad(lk.logprob(near, labels, backend="cpu").logps.sum(), near)
    assert torch.equal(grad, want), dtype
    # Columns 2^31 and more elements apart in one row.
    wide = torch.as_strided(buffer, (2, 3), (1, stride))
    wide = wide.detach()
    wide.copy_(rows[:2, :3])
    labels = torch.tensor([2, 0])
    got, want = lk.logprob(wide, labels), lk.logprob(rows[:2, :3].contiguous(), labels)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(got, want)), dtype
    del buffer, far, wide, x
# Not getrusage: its peak survives exec, and would be that of the process that started this one.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(1024 * int(status["VmHWM"].split()[0]))
"""


@pytest.mark.compiled
def test_rows_and_columns_more_than_2_to_the_31_elements_apart() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAR_APART], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**30  # the memory was never filled


@pytest.mark.slow
def test_more_than_2_to_the_31_logits() -> None:
    """2^31 logits and a few rows more, all read, in the memory of one row."""
    n, v = 2**15 + 3, 2**16
    row = torch.randn(1, v, dtype=torch.float32).to(torch.bfloat16)
    logits = row.expand(n, v)  # stride 0: one row of memory
    labels = torch.arange(n) % v
    got = lk.logprob(logits, labels, backend="cpu").logps
    want = torch.log_softmax(row.double(), -1)[0, labels]
    testing.accept_logprobs(got, want, [1] * n)
