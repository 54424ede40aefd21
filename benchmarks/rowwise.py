"""Contestants that start from logits: a copy, the row kernels, `logprob`; and a call's overhead."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import library
import peers
import torch
import torch.nn.functional as F  # noqa: N812
from peers import Contestant, UnavailableError
from shapes import DTYPES, Shape, make_inputs
from torch import Tensor
from truth import GRADIENT, ROW, Check, Result, relative_error

import lolkernels as lk


@dataclass
class Rows:
    """Logits that are already there, and what a row kernel takes beside them."""

    logits: Tensor  # (n, V)
    labels: Tensor  # (n,)
    coef: Tensor  # (n,)
    some: Tensor  # rows whose results are checked: the first, the last, and some between


def make_rows(n: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Rows:
    generator = torch.Generator(device).manual_seed(1)
    logits = torch.empty(n, vocab, dtype=dtype, device=device)
    for part in logits.split(1024):
        part.copy_(2 * torch.randn(part.shape, generator=generator, device=device))
    labels = torch.randint(vocab, (n,), generator=generator, device=device)
    logits[torch.arange(n, device=device), labels] += 9
    coef = torch.randn(n, generator=generator, device=device)
    some = torch.linspace(0, n - 1, min(n, 64), device=device).long()
    return Rows(logits, labels, coef, some)


def _truth(rows: Rows) -> tuple[tuple[Tensor, ...], Tensor]:
    """Of the checked rows: the four statistics, and dlogits for a = coef, b = -coef, c = 0."""
    z, labels = rows.logits[rows.some].double(), rows.labels[rows.some, None]
    lse, p = z.logsumexp(-1), z.softmax(-1)
    target = z.gather(-1, labels).squeeze(-1)
    coef = rows.coef[rows.some, None].double()
    dz = -coef * p
    dz.scatter_add_(-1, labels, coef)
    return (target, lse, (p * z).sum(-1), z.amax(-1)), dz


def copy(size: int, device: torch.device) -> Contestant:
    """The ceiling of memory traffic: torch's own copy of a buffer this large."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.zeros_like(source)

    def check() -> Check:
        target.copy_(source)
        return Check([] if torch.equal(source, target) else ["the copy differs"])

    work = "read + write of the logits' bytes"
    return Contestant(lambda: target.copy_(source), check, bytes=2 * size, work=work)


def kernel_of(backend: str, name: str) -> Callable[..., Any]:
    """Raises UnavailableError where the backend has no such row function."""
    found = library.function(backend, name)
    if found is None:
        raise UnavailableError(f"{backend} has no {name}")
    return found


def row_stats(rows: Rows, backend: str) -> Contestant:
    kernel = kernel_of(backend, "row_stats")

    def call() -> Any:
        return kernel(rows.logits, rows.labels)

    def check() -> Check:
        want, _ = _truth(rows)
        got = tuple(t[rows.some].double() for t in call())
        found = Check()
        names = ("target_logit", "lse", "expected_logit", "max_logit")
        for name, ours, exact in zip(names, got, want, strict=True):
            error = float((ours - exact).abs().max())
            if not error <= (1e-4 if name == "expected_logit" else 2e-5):
                found.faults.append(f"{name} off by {error:.2e} nat")
        return found

    x = rows.logits
    work = f"read {x.dtype.itemsize} n V"
    return Contestant(call, check, bytes=x.nbytes + 24 * x.shape[0], work=work)


def dlogits(rows: Rows, backend: str, *, narrow: bool) -> Contestant:
    """In place; ``narrow`` writes bf16 into the first half of each fp32 row."""
    if narrow and backend == "cpu":
        raise UnavailableError("the cpu backend writes gradients in the logits' dtype")
    kernel, work = kernel_of(backend, "dlogits_"), torch.empty_like(rows.logits)
    out = work.view(torch.bfloat16)[:, : work.shape[1]] if narrow else work
    lse = torch.cat([part.float().logsumexp(-1) for part in rows.logits.split(1024)])
    minus, zero = -rows.coef, torch.zeros_like(rows.coef)

    def prepare() -> None:
        work.copy_(rows.logits)

    def call() -> Any:
        return kernel(work, rows.labels, lse, rows.coef, minus, zero, out=out)

    def check() -> Check:
        prepare()
        call()
        _, want = _truth(rows)
        return _gradient_check(out[rows.some], want)

    sizes = rows.logits.dtype.itemsize, out.dtype.itemsize
    counted = f"read {sizes[0]} n V, write {sizes[1]} n V"
    return Contestant(call, check, prepare, bytes=sum(sizes) * rows.logits.numel(), work=counted)


def exps(rows: Rows, backend: str | None) -> Contestant:
    """Anchored exponentials in bf16, in one read and one write. No backend: sweep.py's kernel."""
    z, labels = rows.logits, rows.labels
    out = torch.empty(z.shape, dtype=torch.bfloat16, device=z.device)
    if backend is None:
        try:
            import sweep
        except ImportError as error:
            raise UnavailableError(f"needs Triton: {error}") from None

        def call() -> tuple[Tensor, Tensor]:
            rest = sweep.exps(z, labels, out)
            return z.gather(-1, labels[:, None]).squeeze(-1).float() + sweep.SHIFT, rest
    else:
        kernel = kernel_of(backend, "exps_")

        def call() -> tuple[Tensor, Tensor]:
            sums = kernel(z, labels, out=out)
            return sums.anchor, sums.rest

    def check() -> Check:
        anchor, rest = (t[rows.some].double() for t in call())
        (target, lse, *_), _ = _truth(rows)
        got = torch.logaddexp(anchor + rest.log(), target)
        want = (z[rows.some].double() - anchor[:, None]).exp_()
        want.scatter_(-1, labels[rows.some, None], 0.0)
        found = _gradient_check(out[rows.some], want)
        error = float((got - lse).abs().max())
        if not error <= 2e-5:
            found.faults.append(f"lse off by {error:.2e} nat")
        return found

    size = z.dtype.itemsize + 2
    work = f"read {z.dtype.itemsize} n V, write 2 n V"
    return Contestant(call, check, bytes=size * z.numel(), work=work)


def logprob(rows: Rows, backend: str | None, *, eager: bool = False) -> Contestant:
    """Per-token log-probs of given logits, and the logits' gradient: forward and backward."""
    leaf = rows.logits.detach().requires_grad_()

    def call() -> Result:
        if eager:
            logps = -F.cross_entropy(leaf.float(), rows.labels, reduction="none")
        else:
            logps = lk.logprob(leaf, rows.labels, backend=backend).logps
        logps.backward(rows.coef)
        gradient, leaf.grad = leaf.grad, None
        return Result(logps.detach(), gradient)

    def check() -> Check:
        (target, lse, *_), want = _truth(rows)
        got = call()
        assert got.logps is not None and got.dhidden is not None
        found = _gradient_check(got.dhidden[rows.some], want)
        error = float((got.logps[rows.some].double() - (target - lse)).abs().max())
        if not error <= 2e-5:
            found.faults.append(f"log-prob off by {error:.2e} nat")
        return found

    x = rows.logits
    work = f"2 reads, 1 write of {x.dtype.itemsize} n V"
    returned = leaf.nbytes
    return Contestant(call, check, bytes=3 * x.nbytes, work=work, returned=lambda _: returned)


def _gradient_check(got: Tensor, want: Tensor) -> Check:
    error, row = relative_error(got, want)
    found, limit = Check(gradients={"dlogits": error}), GRADIENT[got.dtype]
    if not (error <= limit and row <= ROW * limit):
        found.faults.append(f"dlogits off by {error:.2e} (worst row {row:.2e}) of its size")
    return found


def build(name: str, shape: Shape, backend: str | None, device: torch.device) -> Contestant:
    """A contestant of the op `logprob` at a shape: lolkernels, eager or copy."""
    rows = make_rows(shape.tokens, shape.vocab, DTYPES[shape.dtype], device)
    if name == "copy":
        return copy(rows.logits.nbytes, device)
    if name not in ("lolkernels", "eager"):
        raise UnavailableError("logprob starts from logits: lolkernels, eager and copy only")
    return logprob(rows, backend, eager=name == "eager")


# --- what a call costs beside its kernels ---------------------------------------------------------


def overhead(backend: str, device: Any) -> list[dict[str, Any]]:
    """Host time of one small call, launches a chunk and host syncs: facts with a unit each."""
    rows_a_chunk, vocab = 16, 1024
    budget = rows_a_chunk * vocab * 4

    def small(chunks: int) -> Callable[[], Result]:
        shape = Shape(rows_a_chunk * chunks, 64, vocab, rows_a_chunk, "bf16")
        inputs = make_inputs(shape, device=device.device)
        return peers.build_lolkernels("linear_loss", inputs, backend=backend, budget=budget)

    four, eight = small(4), small(8)
    facts: list[dict[str, Any]] = []

    def fact(label: str, value: float, unit: str) -> None:
        facts.append({"label": label, "value": value, "unit": unit})

    for chunks, call in ((4, four), (8, eight)):
        for _ in range(5):
            call()
        device.sync()
        spent, waited = [], []
        for _ in range(50):
            start = time.perf_counter()
            call()
            spent.append(1e6 * (time.perf_counter() - start))
            device.sync()
            waited.append(1e6 * (time.perf_counter() - start))
        label = f"linear_loss forward + backward, {chunks} chunks"
        fact(f"{label}: until it returns", statistics.median(spent), "us")
        fact(f"{label}: until the device is done", statistics.median(waited), "us")
    for what, count in (("launches", device.launches), ("host syncs", device.syncs)):
        few, many = count(four), count(eight)
        fact(f"{what}, 4 chunks", few, "")
        fact(f"{what}, 8 chunks", many, "")
        fact(f"{what} a chunk", (many - few) / 4, "")
    return facts
