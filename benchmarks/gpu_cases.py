"""What is measured on a GPU: inputs, float64 truth, and one builder for each contestant."""

from __future__ import annotations

import importlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gpu_measure as gm
import peers
import torch
from gpu_measure import Check, Contestant
from shapes import CLIP, Result
from torch import Tensor

import lolkernels as lk
from lolkernels import planner
from lolkernels.backends import TABLE

SUM_NAT = 1e-3  # the contract: nat a sequence
# Relative errors of a whole gradient. bf16 rounds each logit's gradient once and the result once.
GRADIENT = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}
ROW = 4  # the worst row's error, over the largest row, may be this many times that
TRUTH_ROWS = 1024  # rows of float64 logits at a time


@dataclass(frozen=True)
class Problem:
    """Rows of hidden states in sequences of `shortest` to `longest` tokens; bf16."""

    name: str
    rows: int
    hidden: int
    vocab: int
    shortest: int = 128
    longest: int = 1024

    def lengths(self) -> list[int]:
        draw, left, found = random.Random(0), self.rows, []
        while left:
            n = draw.randint(self.shortest, self.longest)
            if left - n < self.shortest:  # what is left becomes one sequence, or two
                n = left if left <= self.longest else left - self.shortest
            found.append(n)
            left -= n
        return found

    def __str__(self) -> str:
        lengths = f"sequences of {self.shortest}-{self.longest}"
        return f"N={self.rows} D={self.hidden} V={self.vocab}, {lengths}, bf16"


@dataclass
class Inputs:
    problem: Problem
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (N,)
    seq: lk.Sequences
    ref_logps: Tensor  # (N,)
    advantages: Tensor  # (S,) all positive: every row works
    upstream: Tensor  # (N,)

    def frozen(self) -> Inputs:
        return replace(self, weight=self.weight.detach())


def make_inputs(problem: Problem, device: torch.device) -> Inputs:
    """Peaky inputs as in shapes.make_inputs: logits spread by 2 nat, the label's raised by 9."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    n, d, v = problem.rows, problem.hidden, problem.vocab
    weight = normal(v, d)
    labels = torch.randint(v, (n,), generator=generator, device=device)
    hidden = normal(n, d) * (2 / d**0.5) + weight[labels] * (9 / d)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    lengths = problem.lengths()
    seq = lk.Sequences.from_lengths(torch.tensor(lengths)).to(device)
    logps = torch.empty(n, device=device)
    wide = weight.float()
    for rows in torch.arange(n, device=device).split(TRUTH_ROWS):
        z = hidden[rows].float() @ wide.T
        logps[rows] = z.log_softmax(-1).gather(-1, labels[rows, None]).squeeze(-1)
    return Inputs(
        problem,
        hidden.requires_grad_(),
        weight.requires_grad_(),
        labels,
        seq,
        logps + 0.05 * normal(n),
        normal(len(lengths)).abs() + 0.1,
        normal(n),
    )


def truth(op: str, inputs: Inputs) -> Result:
    """The result in float64 from the formulas alone, in blocks of whole sequences."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach().double()
    n, cu = hidden.shape[0], inputs.seq.cu_seqlens.tolist()
    frozen = op == "score" or not inputs.weight.requires_grad
    logps = torch.empty(n, dtype=torch.float64, device=hidden.device)
    dhidden = None if op == "score" else torch.zeros_like(hidden, dtype=torch.float64)
    dweight = None if frozen else torch.zeros_like(weight)
    s = 0
    while s < len(cu) - 1:
        last = s + 1
        while last < len(cu) - 1 and cu[last + 1] - cu[s] <= TRUTH_ROWS:
            last += 1
        rows = slice(cu[s], cu[last])
        h, labels = hidden[rows].double(), inputs.labels[rows, None]
        log_p = (h @ weight.T).log_softmax(-1)
        logps[rows] = log_p.gather(-1, labels).squeeze(-1)
        if dhidden is not None:
            coef = inputs.upstream[rows].double()
            if op == "linear_loss":
                drift = (logps[rows] - inputs.ref_logps[rows].double()).split(
                    [cu[i + 1] - cu[i] for i in range(s, last)]
                )
                ratio = torch.stack([d.sum() for d in drift]).exp().clamp(1 - CLIP, 1 + CLIP)
                per_sequence = -inputs.advantages[s:last].double() * ratio / (len(cu) - 1)
                coef = per_sequence[inputs.seq.token_to_sequence[rows] - s]
            dz = log_p.exp_().mul_(-coef[:, None])
            dz.scatter_add_(-1, labels, coef[:, None])
            dhidden[rows] = dz @ weight
            if dweight is not None:
                dweight.addmm_(dz.T, h)
        s = last
    return Result(logps, dhidden, dweight)


def relative_error(got: Tensor, want: Tensor) -> tuple[float, float]:
    """(Frobenius norm of the error over the truth's, worst row's error over the largest row)."""
    off = torch.cat(
        [
            (g.double() - w).norm(dim=1)
            for g, w in zip(got.split(8192), want.split(8192), strict=True)
        ]
    )
    size = torch.cat([w.norm(dim=1) for w in want.split(8192)])
    return float(off.norm() / size.norm()), float(off.max() / size.max())


def judge(got: Result, want: Result, lengths: list[int], *, strict: bool = True) -> Check:
    """Ours (strict): the contract. A peer: its errors, and a fault only where it is nonsense.

    A peer that rounds logits to bf16 misses the contract by its design; its row says by how much.
    """
    check = Check()
    assert got.logps is not None and want.logps is not None
    off = (got.logps.double() - want.logps).split(lengths)
    check.sum_nat = float(torch.stack([part.sum().abs() for part in off]).max())
    if not check.sum_nat <= (SUM_NAT if strict else 30):
        check.faults.append(f"summed log-prob off by {check.sum_nat:.2e} nat")
    for name in ("dhidden", "dweight"):
        ours, exact = getattr(got, name), getattr(want, name)
        if exact is None:
            continue
        if ours is None or ours.shape != exact.shape:
            check.faults.append(f"{name} is missing or misshapen")
            continue
        error, row = relative_error(ours, exact)
        check.gradients[name] = error
        limit = GRADIENT[ours.dtype] if strict else 1.0
        if not (error <= limit and row <= ROW * limit):
            check.faults.append(f"{name} off by {error:.2e} (worst row {row:.2e}) of its size")
    return check


# --- the ops from hidden states -------------------------------------------------------------------


def _taken(inputs: Inputs) -> tuple[Tensor | None, Tensor | None]:
    found = inputs.hidden.grad, inputs.weight.grad
    inputs.hidden.grad = inputs.weight.grad = None
    return found


def _gradient_bytes(result: Result) -> int:
    return sum(g.nbytes for g in (result.dhidden, result.dweight) if g is not None)


def gemm_count(op: str, inputs: Inputs) -> int:
    if op == "score":
        return 1
    return {"linear_loss": 2, "linear_logprob": 3}[op] + inputs.weight.requires_grad


def _flops(op: str, inputs: Inputs) -> tuple[int, str]:
    p, count = inputs.problem, gemm_count(op, inputs)
    return count * 2 * p.rows * p.vocab * p.hidden, f"{count} x 2 N V D flop"


def documented_bytes(op: str, inputs: Inputs, budget: int | None) -> int:
    """The library's own statement of the extra memory."""
    device, p = inputs.hidden.device, inputs.problem
    cu = inputs.seq.cu_seqlens.tolist()
    held = planner.chunk_rows(p.vocab, 4, budget, device)
    chunks = planner.plan_chunks(cu, [True] * (len(cu) - 1), held)
    return planner.extra_bytes(
        op,
        longest_chunk=max(sum(piece.end - piece.start for piece in c) for c in chunks),
        num_rows=p.rows,
        hidden_size=p.hidden,
        vocab=p.vocab,
        hidden_bytes=2,
        weight_bytes=2,
        frozen_weight=not inputs.weight.requires_grad,
        memory_budget=budget,
        device=device,
    )


def run_lolkernels(op: str, inputs: Inputs, backend: str, budget: int | None = None) -> Result:
    settings: dict[str, Any] = {"backend": backend, "memory_budget": budget}
    if op == "score":
        with torch.no_grad():
            out = lk.linear_logprob(inputs.hidden, inputs.weight, inputs.labels, **settings)
        return Result(out.logps)
    if op == "linear_logprob":
        out = lk.linear_logprob(inputs.hidden, inputs.weight, inputs.labels, **settings)
        out.logps.backward(inputs.upstream)
        return Result(out.logps.detach(), *_taken(inputs))
    full = lk.linear_loss(
        lk.objectives.a_lol,
        inputs.hidden,
        inputs.weight,
        inputs.labels,
        inputs.seq,
        ref_logps=inputs.ref_logps,
        advantages=inputs.advantages,
        clip=CLIP,
        return_outputs=True,
        **settings,
    )
    full.loss.backward()
    return Result(full.logps, *_taken(inputs))


def ours(
    label: str, op: str, inputs: Inputs, want: Result, backend: str, budget: int | None = None
) -> Contestant:
    flops, work = _flops(op, inputs)

    def call() -> Result:
        return run_lolkernels(op, inputs, backend, budget)

    return Contestant(
        label,
        call,
        lambda: judge(call(), want, inputs.seq.lengths.tolist()),
        flops=flops,
        work=work,
        returned=_gradient_bytes,
        formula=documented_bytes(op, inputs, budget),
    )


def _mm32(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:  # a CPU has no such product
        torch.mm(a.float(), b.float(), out=out)


def _mm16(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a, b, out=out)


def gradient_logits(inputs: Inputs) -> Tensor:
    """Gradients of logits (N, V) in bf16: a product runs faster on zeros than on these."""
    dz = torch.empty(
        inputs.problem.rows, inputs.problem.vocab, dtype=torch.bfloat16, device=inputs.hidden.device
    )
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    for rows in torch.arange(inputs.problem.rows, device=dz.device).split(TRUTH_ROWS):
        p = (hidden[rows] @ weight.T).float().softmax(-1)
        p.scatter_add_(-1, inputs.labels[rows, None], -torch.ones_like(p[:, :1]))
        dz[rows] = p.bfloat16()
    return dz


def gemms(label: str, op: str, inputs: Inputs, dz: Tensor, *, wide: bool) -> Contestant:
    """The floor: the op's matrix products over all rows at once, and nothing else.

    bf16 -> bf16 is what a user's own code would call; ``wide`` writes fp32.
    """
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    out, mm = (torch.float32, _mm32) if wide else (torch.bfloat16, _mm16)
    logits = torch.empty(dz.shape, dtype=out, device=dz.device)
    dhidden, dweight = torch.empty_like(hidden, dtype=out), torch.empty_like(weight, dtype=out)
    forwards = {"score": 1, "linear_loss": 1, "linear_logprob": 2}[op]
    trainable = inputs.weight.requires_grad

    def call() -> None:
        for _ in range(forwards):
            mm(hidden, weight.T, logits)
        if op != "score":
            mm(dz, weight, dhidden)
            if trainable:
                mm(dz.T, hidden, dweight)

    def check() -> Check:
        for t in (logits, dhidden, dweight):
            t.fill_(torch.nan)
        call()
        found = Check()
        pairs = [("logits", logits[:8], hidden[:8].double() @ weight.double().T)]
        if op != "score":
            pairs.append(("dhidden", dhidden[:8], dz[:8].double() @ weight.double()))
            if trainable:
                pairs.append(("dweight", dweight[:8], dz[:, :8].T.double() @ hidden.double()))
        for name, got, want in pairs:
            error, _ = relative_error(got, want)
            if not error <= 1e-2:
                found.faults.append(f"{name} off by {error:.2e}")
        return found

    flops, work = _flops(op, inputs)
    return Contestant(label, call, check, flops=flops, work=work)


# --- peers: any per-token log-prob, with A-LoL on top in plain torch ------------------------------

TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]


def _cut_cross_entropy() -> TokenLogps:
    found = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, labels: -found(hidden, weight, labels, reduction="none").float()


def _liger() -> TokenLogps:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    found = module.LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda hidden, weight, labels: -found(weight, hidden, labels).float()


def _quack() -> TokenLogps:
    importlib.import_module("quack")
    raise RuntimeError("its fused loss returns a sum or a mean: no weight a token can be given")


def _torch_op() -> TokenLogps:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has no linear_cross_entropy")
    return peers.token_logps_torch


PEERS: dict[str, Callable[[], TokenLogps]] = {
    "eager": lambda: peers.token_logps_eager,
    "torch.compile": lambda: torch.compile(peers.token_logps_eager, dynamic=False),
    "torch linear_cross_entropy": _torch_op,
    "cut-cross-entropy": _cut_cross_entropy,
    "Liger": _liger,
    "quack": _quack,
}


def peer(label: str, inputs: Inputs, want: Result, box: float) -> Contestant:
    """A-LoL on a peer's log-probs; its first call may take ``box`` seconds (compilation)."""
    token_logps = PEERS[label]()

    def call() -> Result:
        logps = token_logps(inputs.hidden, inputs.weight, inputs.labels)
        loss = lk.objectives.a_lol(
            logps, inputs.ref_logps, inputs.advantages, inputs.seq, clip=CLIP
        )
        lk.aggregate(loss, inputs.seq).backward()
        return Result(logps.detach(), *_taken(inputs))

    def check() -> Check:
        _taken(inputs)
        with gm.time_box(box):
            result = call()
        return judge(result, want, inputs.seq.lengths.tolist(), strict=False)

    flops, work = _flops("linear_loss", inputs)
    return Contestant(label, call, check, flops=flops, work=work, returned=_gradient_bytes)


# --- the row kernels ------------------------------------------------------------------------------


@dataclass
class Rows:
    """Logits that are already there, and what a row kernel takes beside them."""

    logits: Tensor  # (n, V)
    labels: Tensor  # (n,)
    coef: Tensor  # (n,)
    some: Tensor  # rows whose results are checked: the first, the last, and some between


def make_rows(size: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Rows:
    """About ``size`` bytes of logits."""
    n = max(8, size // (vocab * dtype.itemsize))
    generator = torch.Generator(device).manual_seed(1)
    logits = torch.empty(n, vocab, dtype=dtype, device=device)
    for part in logits.split(1024):
        part.copy_(2 * torch.randn(part.shape, generator=generator, device=device))
    labels = torch.randint(vocab, (n,), generator=generator, device=device)
    logits[torch.arange(n, device=device), labels] += 9
    coef = torch.randn(n, generator=generator, device=device)
    some = torch.linspace(0, n - 1, min(n, 64), device=device).long()
    return Rows(logits, labels, coef, some)


def _row_truth(rows: Rows) -> tuple[tuple[Tensor, ...], Tensor]:
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

    work = "copy: 1 read, 1 write"
    return Contestant("copy", lambda: target.copy_(source), check, bytes=2 * size, work=work)


def row_stats(label: str, rows: Rows, backend: str) -> Contestant:
    kernel = TABLE[backend].row_stats

    def call() -> Any:
        return kernel(rows.logits, rows.labels)

    def check() -> Check:
        want, _ = _row_truth(rows)
        got = tuple(t[rows.some].double() for t in call())
        found = Check()
        names = ("target_logit", "lse", "expected_logit", "max_logit")
        for name, ours, exact in zip(names, got, want, strict=True):
            error = float((ours - exact).abs().max())
            if not error <= (1e-4 if name == "expected_logit" else 2e-5):
                found.faults.append(f"{name} off by {error:.2e} nat")
        return found

    x = rows.logits
    work = f"read {x.dtype.itemsize} n V, n = {x.shape[0]}"
    return Contestant(label, call, check, bytes=x.nbytes + 24 * x.shape[0], work=work)


def dlogits(label: str, rows: Rows, backend: str, *, narrow: bool) -> Contestant:
    """In place; ``narrow`` writes bf16 into the first half of each fp32 row."""
    kernel, work = TABLE[backend].dlogits_, torch.empty_like(rows.logits)
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
        _, want = _row_truth(rows)
        return _gradient_check("dlogits", out[rows.some], want)

    sizes = rows.logits.dtype.itemsize, out.dtype.itemsize
    counted = f"read {sizes[0]} n V, write {sizes[1]} n V, n = {work.shape[0]}"
    return Contestant(
        label, call, check, prepare, bytes=sum(sizes) * rows.logits.numel(), work=counted
    )


def logprob(label: str, rows: Rows, backend: str) -> Contestant:
    leaf = rows.logits.detach().requires_grad_()

    def call() -> Result:
        out = lk.logprob(leaf, rows.labels, backend=backend)
        out.logps.backward(rows.coef)
        gradient, leaf.grad = leaf.grad, None
        return Result(out.logps.detach(), gradient)

    def check() -> Check:
        (target, lse, *_), want = _row_truth(rows)
        got = call()
        assert got.logps is not None and got.dhidden is not None
        found = _gradient_check("dlogits", got.dhidden[rows.some], want)
        error = float((got.logps[rows.some].double() - (target - lse)).abs().max())
        if not error <= 2e-5:
            found.faults.append(f"log-prob off by {error:.2e} nat")
        return found

    x = rows.logits
    work = f"2 reads, 1 write of {x.dtype.itemsize} n V, n = {x.shape[0]}"
    return Contestant(label, call, check, bytes=3 * x.nbytes, work=work, returned=_gradient_bytes)


def _gradient_check(name: str, got: Tensor, want: Tensor) -> Check:
    error, row = relative_error(got, want)
    found, limit = Check(gradients={name: error}), GRADIENT[got.dtype]
    if not (error <= limit and row <= ROW * limit):
        found.faults.append(f"{name} off by {error:.2e} (worst row {row:.2e}) of its size")
    return found


# --- what a call costs beside its kernels ---------------------------------------------------------


def overhead(backend: str, device: gm.Device) -> list[dict[str, Any]]:
    """Host time of one small call, launches a chunk and host syncs: facts with a unit each."""
    rows_a_chunk, vocab = 16, 1024
    budget = rows_a_chunk * vocab * 4

    def small(chunks: int) -> Callable[[], Result]:
        problem = Problem("small", rows_a_chunk * chunks, 64, vocab, rows_a_chunk, rows_a_chunk)
        inputs = make_inputs(problem, device.device)
        return lambda: run_lolkernels("linear_loss", inputs, backend, budget)

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
        fact(f"{label}: until it returns", gm.spread(spent)["median"], "us")
        fact(f"{label}: until the device is done", gm.spread(waited)["median"], "us")
    for what, count in (("launches", device.launches), ("host syncs", device.syncs)):
        few, many = count(four), count(eight)
        fact(f"{what}, 4 chunks", few, "")
        fact(f"{what}, 8 chunks", many, "")
        fact(f"{what} a chunk", (many - few) / 4, "")
    return facts
