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

STATISTICS = ("target_logit", "lse", "expected_logit", "max_logit")


@dataclass
class Rows:
    """Logits that are already there, and what a row kernel takes beside them."""

    logits: Tensor  # (n, V)
    labels: Tensor  # (n,)
    coef: Tensor  # (n,)
    some: Tensor  # rows whose results are checked: the first, the last, and some between

    def truth(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """Of the checked rows: the four statistics, and dlogits for a = coef, b = -coef, c = 0."""
        z, labels = self.logits[self.some].double(), self.labels[self.some, None]
        lse, p = z.logsumexp(-1), z.softmax(-1)
        target, coef = z.gather(-1, labels).squeeze(-1), self.coef[self.some, None].double()
        dz = (-coef * p).scatter_add_(-1, labels, coef)
        return (target, lse, (p * z).sum(-1), z.amax(-1)), dz


def make_rows(n: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Rows:
    generator = torch.Generator(device).manual_seed(1)
    logits = torch.empty(n, vocab, dtype=dtype, device=device)
    for part in logits.split(1024):
        part.copy_(2 * torch.randn(part.shape, generator=generator, device=device))
    labels = torch.randint(vocab, (n,), generator=generator, device=device)
    logits[torch.arange(n, device=device), labels] += 9
    coef = torch.randn(n, generator=generator, device=device)
    return Rows(logits, labels, coef, torch.linspace(0, n - 1, min(n, 64), device=device).long())


def judged(
    nats: dict[str, tuple[Tensor, Tensor]], got: Tensor | None = None, want: Tensor | None = None
) -> Check:
    """Values in nat, each beside the exact one, and a gradient (or exponentials)."""
    found = Check()
    for name, (ours, exact) in nats.items():
        error = float((ours.double() - exact).abs().max())
        if not error <= (1e-4 if name == "expected_logit" else 2e-5):
            found.faults.append(f"{name} off by {error:.2e} nat")
    if got is not None and want is not None:
        error, row = relative_error(got, want)
        found.gradients, limit = {"dlogits": error}, GRADIENT[got.dtype]
        if not (error <= limit and row <= ROW * limit):
            found.faults.append(f"dlogits off by {error:.2e} (worst row {row:.2e}) of its size")
    return found


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


def sums(rows: Rows, backend: str) -> Contestant:
    """What the row's statistics are made of, in one read."""
    kernel, x = kernel_of(backend, "sums"), rows.logits

    def check() -> Check:
        stats = library.statistics(kernel(x, rows.labels))
        four = (stats.target_logit, stats.lse, stats.lse - stats.entropy, stats.max_logit)
        got = (t[rows.some] for t in four)
        return judged(dict(zip(STATISTICS, zip(got, rows.truth()[0], strict=True), strict=True)))

    size, work = x.nbytes + 32 * len(x), f"read {x.dtype.itemsize} n V"
    return Contestant(lambda: kernel(x, rows.labels), check, bytes=size, work=work)


def dlogits(rows: Rows, backend: str) -> Contestant:
    """In place; of fp32 logits bf16 in the first half of each row."""
    narrow = rows.logits.dtype == torch.float32
    if narrow and backend == "cpu":
        raise UnavailableError("the cpu backend writes gradients in the logits' dtype")
    kernel, work = kernel_of(backend, "dlogits_"), torch.empty_like(rows.logits)
    out = work.view(torch.bfloat16)[:, : work.shape[1]] if narrow else work
    lse = torch.cat([part.float().logsumexp(-1) for part in rows.logits.split(1024)])
    abc = (rows.coef, -rows.coef, torch.zeros_like(rows.coef))

    def prepare() -> None:
        work.copy_(rows.logits)

    def call() -> Any:
        return kernel(work, rows.labels, lse, *abc, out=out)

    def check() -> Check:
        prepare()
        call()
        return judged({}, out[rows.some], rows.truth()[1])

    sizes = rows.logits.dtype.itemsize, out.dtype.itemsize
    counted = f"read {sizes[0]} n V, write {sizes[1]} n V"
    return Contestant(call, check, prepare, bytes=sum(sizes) * rows.logits.numel(), work=counted)


def exps(rows: Rows, backend: str) -> Contestant:
    """Anchored exponentials in bf16, in one read and one write."""
    z, labels, kernel = rows.logits, rows.labels, kernel_of(backend, "exps_")
    out = torch.empty(z.shape, dtype=torch.bfloat16, device=z.device)

    def check() -> Check:
        sums = kernel(z, labels, out=out)
        anchor, rest = (t[rows.some].double() for t in (sums.anchor, sums.rest))
        (target, lse, *_), _ = rows.truth()
        want = (z[rows.some].double() - anchor[:, None]).exp_()
        want.scatter_(-1, labels[rows.some, None], 0.0)
        got = torch.logaddexp(anchor + rest.log(), target)
        return judged({"lse": (got, lse)}, out[rows.some], want)

    size, work = z.dtype.itemsize, f"read {z.dtype.itemsize} n V, write 2 n V"
    call = lambda: kernel(z, labels, out=out)  # noqa: E731
    return Contestant(call, check, bytes=(size + 2) * z.numel(), work=work)


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
        (target, lse, *_), want = rows.truth()
        got = call()
        assert got.logps is not None and got.dhidden is not None
        pair = got.logps[rows.some], target - lse
        return judged({"log-prob": pair}, got.dhidden[rows.some], want)

    work, returned = f"2 reads, 1 write of {leaf.dtype.itemsize} n V", leaf.nbytes
    return Contestant(call, check, bytes=3 * returned, work=work, returned=lambda _: returned)


def build(name: str, shape: Shape, backend: str | None, device: torch.device) -> Contestant:
    """A contestant of the op `logprob` at a shape: lolkernels, eager or copy."""
    rows = make_rows(shape.tokens, shape.vocab, DTYPES[shape.dtype], device)
    if name == "copy":
        return copy(rows.logits.nbytes, device)
    if name not in ("lolkernels", "eager"):
        raise UnavailableError("logprob starts from logits: lolkernels, eager and copy only")
    return logprob(rows, backend, eager=name == "eager")


def overhead(backend: str, device: Any) -> list[dict[str, Any]]:
    """Host time of one small call, launches a chunk and host syncs: facts with a unit each."""
    rows, vocab = 16, 1024
    calls: dict[int, Callable[[], Result]] = {}
    for chunks in (4, 8):
        inputs = make_inputs(Shape(rows * chunks, 64, vocab, rows, "bf16"), device=device.device)
        settings = {"backend": backend, "budget": rows * vocab * 4}
        calls[chunks] = peers.build_lolkernels("linear_loss", inputs, **settings)
    facts = []
    for chunks, call in calls.items():
        for _ in range(5):
            call()
        device.sync()
        spent, waited = [], []
        for _ in range(50):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
            device.sync()
            waited.append(time.perf_counter() - start)
        label = f"linear_loss forward + backward, {chunks} chunks"
        facts.append((f"{label}: until it returns", 1e6 * statistics.median(spent), "us"))
        facts.append((f"{label}: until the device is done", 1e6 * statistics.median(waited), "us"))
    for what, count in (("launches", device.launches), ("host syncs", device.syncs)):
        few, many = (count(call) for call in calls.values())
        facts += [(f"{what}, 4 chunks", few, ""), (f"{what}, 8 chunks", many, "")]
        facts.append((f"{what} a chunk", (many - few) / 4, ""))
    return [dict(zip(("label", "value", "unit"), fact, strict=True)) for fact in facts]
