"""``linear_loss``: every objective, chunked, against the unfused formula in float64."""

import functools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import judges
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cases import DTYPES, HALF, fuzz_test, rounded_sizes
from judges import LAYOUTS, Problem, RedZones, eager, fuzz, peaky
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives
from lolkernels.backends import TABLE
from lolkernels.objectives import PerSequence, PerToken

REDUCTIONS = ("seq-mean", "token-mean", "seq-mean-token-mean", "sum")


# A user's objectives: of a whole sequence, and of a pair.
def length_normalised(
    logps: Tensor, rewards: PerSequence, seq: lk.Sequences, *, power: float = 1.0
) -> Tensor:
    return rewards * torch.log1p(-seq.mean(logps) * power)


def pairwise(logps: Tensor, ref_logps: PerToken, seq: lk.Sequences, *, beta: float = 0.1) -> Tensor:
    chosen, rejected = seq.sum(logps - ref_logps).view(-1, 2).unbind(1)
    return -F.logsigmoid(beta * (chosen - rejected))


OBJECTIVES: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
    (objectives.nll, {}),
    (objectives.wbc, {}),
    (objectives.r_gold, {"floor": 0.05}),
    (objectives.r_lol, {"clip": 0.5}),
    (objectives.r_lol, {"clip": None}),
    (objectives.a_lol, {}),
    (objectives.a_lol, {"clip": 1.5}),
    (objectives.a_lol_seq, {"clip": 0.2}),
    (objectives.a_lol_seq, {"clip": None}),
    (objectives.a_lol_ref_free, {}),
    (objectives.a_lol_kl, {"beta": 0.3}),
    (objectives.r_lol_kl, {}),
    (length_normalised, {"power": 0.5}),
    (pairwise, {"beta": 0.4}),
]


class Drawn:
    """Sequences, side inputs, budget and reduction of a fuzz case over its problem's rows."""

    def __init__(self, seed: int, problem: Problem) -> None:
        r = random.Random(f"loss {seed}")
        generator = torch.Generator().manual_seed(seed)
        n, v = problem.labels.shape[0], problem.weight.shape[0]
        self.objective, self.options = r.choice(OBJECTIVES)
        group = 2 if self.objective is pairwise else 1
        cuts = sorted(r.randint(0, n) for _ in range(r.randint(0, 6)))
        offsets = [0, *cuts, n]
        if (len(offsets) - 1) % group:
            offsets.append(n)  # an empty sequence
        self.seq = lk.Sequences.from_cu_seqlens(offsets, group_size=group)
        if r.random() < 0.3:
            self.seq = self.seq.with_totals(num_sequences=9, num_tokens=101)
        self.reduction = r.choice(REDUCTIONS)
        self.budget = r.choice((None, 1, v * 4 * 3, v * 4 * 13, 10_000))
        truth = eager(problem.double()).logps
        s = self.seq.num_sequences
        side = {
            "ref_logps": (
                truth + torch.randn(n, generator=generator) * r.choice((0.02, 0.3))
            ).clamp(max=0),
            "advantages": torch.randn(s, generator=generator),
            "rewards": torch.rand(s, generator=generator) + 0.1,
        }
        wide = torch.float64 if problem.hidden.dtype == torch.float64 else torch.float32
        needed = lk.side_inputs(self.objective)
        self.side = {k: t.to(wide) for k, t in side.items() if k in needed}
        self.upstream = r.choice((1.0, -0.25, 3.0))
        self.frozen = r.choice(((), (), ("weight", "bias"), ("hidden",), ("bias",)))
        self.layout: Callable[[], str] = lambda: r.choice(LAYOUTS)


def unfused(problem: Problem, drawn: Drawn, kind: torch.dtype | None) -> dict[str, Tensor]:
    """Eager loss and gradients; ``kind`` float64 gives the truth."""
    p = problem.double() if kind == torch.float64 else problem
    operands = {"hidden": p.hidden, "weight": p.weight, "bias": p.bias}
    leaves = {k: t.detach().clone().requires_grad_() for k, t in operands.items() if t is not None}
    logps = eager(replace(p, **leaves)).logps
    side = {k: t.to(logps.dtype) for k, t in drawn.side.items()}
    per_sequence = drawn.objective(logps=logps, seq=drawn.seq, **side, **drawn.options)
    loss = lk.aggregate(per_sequence, drawn.seq, drawn.reduction)
    coef, *grads = torch.autograd.grad(loss * drawn.upstream, [logps, *leaves.values()])
    return {
        "loss": loss.detach(),
        "seq_loss": per_sequence.detach(),
        "logps": logps.detach(),
        "coef": coef,
        **dict(zip(leaves, grads, strict=True)),
    }


def check_case(seed: int, backend: str) -> tuple[float, int]:
    """One fuzz case between red zones. Largest error of the loss (relative), canaries rejected."""
    problem = fuzz(seed, DTYPES[backend])
    drawn = Drawn(seed, problem)
    seq = drawn.seq
    zones = RedZones()
    operands = {"hidden": problem.hidden, "weight": problem.weight, "bias": problem.bias}
    placed = {
        k: zones.place(k, t, drawn.layout()).requires_grad_(k not in drawn.frozen)
        for k, t in operands.items()
        if t is not None
    }
    side = {k: zones.place(k, t, drawn.layout()) for k, t in drawn.side.items()}
    out = lk.linear_loss(
        drawn.objective,
        placed["hidden"],
        placed["weight"],
        zones.place("labels", problem.labels, drawn.layout()),
        seq,
        bias=placed.get("bias"),
        reduction=drawn.reduction,
        backend=backend,
        memory_budget=drawn.budget,
        return_outputs=True,
        **problem.options,
        **side,
        **drawn.options,
    )
    trainable = {k: t for k, t in placed.items() if t.requires_grad}
    grads = torch.autograd.grad(out.loss * drawn.upstream, list(trainable.values()))
    zones.check()

    true, peer = unfused(problem, drawn, torch.float64), unfused(problem, drawn, None)
    wide = torch.float64 if problem.hidden.dtype == torch.float64 else torch.float32
    assert out.loss.dtype == wide and out.loss.shape == ()
    computed = ~out.logps.isnan()
    skipped = torch.zeros_like(computed)
    if not bool(computed.all()):  # whole sequences whose advantage is not positive
        assert drawn.objective in (
            objectives.a_lol,
            objectives.a_lol_seq,
            objectives.a_lol_ref_free,
        )
        skipped = seq.expand(drawn.side["advantages"] <= 0)
    assert torch.equal(computed, ~skipped)
    canaries = judges.accept_logprobs(out.logps[computed], true["logps"][computed])

    # An error of d in each log-prob moves the loss by sum |coef| d (and by the ratio's own share).
    atol = 1e-12 if wide == torch.float64 else judges.LOGPROB_ATOL
    size = max(1.0, true["logps"].abs().sum().item())
    blur = atol * (true["coef"].abs().sum().item() / abs(drawn.upstream)) * size + 1e-6 * abs(
        true["loss"].item()
    ) * (1e-6 if wide == torch.float64 else 1)
    off = abs(out.loss.item() - true["loss"].item())
    assert off <= blur + 1e-13, f"loss off by {off:.1e}, bound {blur:.1e}"
    seq_off = (out.seq_loss.double() - true["seq_loss"]).abs()
    seq_size = 1 + true["seq_loss"].abs()
    assert float((seq_off / seq_size).max()) <= atol * 60, "seq_loss"

    sizes = judges.gradient_sizes(problem, {"logps": true["coef"]})
    # The coefficient itself holds exp(sum of log-ratios), known to an error per token of each.
    longest = max(1, int(seq.lengths.max()))
    more = {name: (math.sqrt(longest) - 1) * size for name, size in sizes.items()}
    if not TABLE[backend].panels:
        weights = objectives.reduction_weights(seq, drawn.reduction)
        # Of float16 in units of the largest weight, half its smallest number.
        half = problem.hidden.dtype == torch.float16
        tiny = half * 2.0**-25 * abs(drawn.upstream) * float(weights.max())
        sizes = rounded_sizes(sizes, problem, tiny)
    for name, grad in zip(trainable, grads, strict=True):
        assert grad.dtype == trainable[name].dtype
        try:
            size = sizes[name] + more[name]
            canaries += judges.accept_gradient(grad, peer[name], true[name], size)
        except AssertionError as error:
            raise AssertionError(f"d{name} of {drawn.objective.__name__}: {error}") from None
    return off / max(1e-3, abs(true["loss"].item())), canaries


test_fuzz_against_float64 = fuzz_test(check_case, canaries=4)


# --- work: which rows enter a GEMM, and how often -------------------------------------------------


def gemm_flops(call: Callable[[], Tensor]) -> int:
    """Flops of all matrix products of a forward and backward."""
    with torch.profiler.profile(record_shapes=True) as profile:
        loss = call()
        if loss.requires_grad:
            loss.backward()
    flops = 0
    for event in profile.key_averages(group_by_input_shape=True):
        if event.key in ("aten::mm", "aten::addmm", "aten::addmm_"):
            first = 0 if event.key == "aten::mm" else 1
            (m, k), (_, n) = event.input_shapes[first : first + 2]
            flops += 2 * m * k * n * event.count
    return flops


def work_of(
    weights: list[float] | None = None,
    *,
    frozen: str = "",
    rows: int = 1000,
    objective: Callable[..., Tensor] = objectives.a_lol,
) -> float:
    """Flops of the GEMMs of one call on 66 rows, in units of one row's product, 2 D V."""
    d, v, lengths = 16, 300, [7, 20, 9, 30]
    h = torch.randn(sum(lengths), d, requires_grad="h" not in frozen)
    w = torch.randn(v, d, requires_grad="w" not in frozen)
    labels, seq = torch.randint(v, (sum(lengths),)), lk.Sequences.from_lengths(lengths)
    side = {"ref_logps": -torch.ones(66), "advantages": torch.tensor(weights or [1.0] * 4)}
    budget = rows * v * 4

    def call() -> Tensor:
        return lk.linear_loss(objective, h, w, labels, seq, memory_budget=budget, **side)

    return gemm_flops(call) / (2 * d * v)


def test_the_gemms_of_a_loss() -> None:
    """Three, and two with a frozen operand; several blocks of rows change nothing."""
    assert work_of() == work_of(rows=30) == 3 * 66
    assert work_of(frozen="w") == work_of(frozen="h") == 2 * 66
    assert work_of(frozen="hw") == 66
    assert work_of(frozen="w", rows=10) == 2 * 66  # groups longer than a block
    # Sequences are cut where a loss is token-local. Elsewhere the rows of a group beyond the budget
    # have their logits made again: (20 - 10) + (30 - 10), and 30 - 25.
    assert work_of(rows=10, objective=objectives.a_lol_seq) == 3 * 66
    assert work_of(rows=10) == 3 * 66 + 10 + 20
    assert work_of(rows=25) == 3 * 66 + 5
    # Sequences without a positive advantage enter none.
    assert work_of([1.0, -2.0, 0.0, 3.0]) == 3 * (7 + 30)
    assert work_of([1.0, -2.0, 0.0, 3.0], frozen="w") == 2 * (7 + 30)
    assert work_of([-1.0] * 4) == 0


def test_prompt_rows_enter_no_gemm() -> None:
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[:, 5:] = True
    h, w = torch.randn(4, 10, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    labels = torch.randint(300, (4, 10))
    flops = gemm_flops(
        lambda: lk.linear_loss(objectives.nll, h, w, labels, lk.Sequences.from_mask(mask))
    )
    assert flops == 3 * 2 * 20 * 16 * 300
    flops = gemm_flops(lambda: lk.linear_logprob(h, w, labels, mask=mask).logps.sum())
    assert flops == 3 * 2 * 20 * 16 * 300


def test_gemms_of_log_probs_for_a_loss_of_ones_own() -> None:
    """Two with a frozen head and three with a trained one; entropy's gradient is announced."""
    h, w = torch.randn(40, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    labels, frozen = torch.randint(300, (40,)), w.detach()

    def gemms(w: Tensor, of: str = "logps", rows: int = 1000, **options: Any) -> float:
        def run() -> Tensor:
            budget = rows * 300 * 4
            out = lk.linear_logprob(h, w, labels, memory_budget=budget, **options)
            return getattr(out, of).square().sum()

        return gemm_flops(run) / (2 * 40 * 16 * 300)

    for of in ("logps", "lse"):
        assert gemms(frozen, of) == 2
        assert gemms(w, of) == 3
        assert gemms(w, of, rows=30) == 3.25  # ten rows have their logits made again
    assert gemms(frozen, "entropy", entropy_grad=True) == 2
    assert gemms(w, "entropy", entropy_grad=True) == 3
    assert gemms(w, "entropy", entropy_grad=True, rows=30) == 3.25
    assert gemms(w, "entropy") == 5  # not announced: d logp / d hidden was made for nothing


def test_the_gemms_of_a_backward_that_is_asked_for_a_part() -> None:
    """A pipeline takes the gradient of hidden first, and that of the head when there is time."""
    h, w = torch.randn(40, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    b, labels = torch.randn(300, requires_grad=True), torch.randint(300, (40,))
    seq = lk.Sequences.from_lengths([10] * 4)

    def logps(h: Tensor, w: Tensor, rows: int) -> Tensor:
        budget = rows * 300 * 4
        return lk.linear_logprob(h, w, labels, bias=b, memory_budget=budget).logps.square().sum()

    def loss(h: Tensor, w: Tensor, rows: int) -> Tensor:
        budget = rows * 300 * 4
        return lk.linear_loss(objectives.nll, h, w, labels, seq, bias=b, memory_budget=budget)

    def gemms(out: Tensor, inputs: list[Tensor], want: tuple[Tensor, ...], how: str) -> float:
        def run() -> Tensor:
            if how == "grad":
                got = torch.autograd.grad(out, inputs, retain_graph=True)
            else:
                out.backward(inputs=inputs, retain_graph=True)
                got = tuple(t.grad for t in inputs)
                for t in inputs:
                    t.grad = None
            torch.testing.assert_close(got, want)
            return torch.zeros(())

        return gemm_flops(run) / (2 * 40 * 16 * 300)

    for call in (logps, loss):
        want = torch.autograd.grad(call(h, w, 1000), [h, w, b])
        for how in ("grad", "backward"):
            # A leaf, and what a layer has made of one.
            for hidden, weight in ((h, w), (1 * h, 1 * w)):
                out = call(hidden, weight, 1000)
                leaves = how == "grad"
                first, second = (hidden, weight) if leaves else (h, w)
                assert gemms(out, [first], want[:1], how) == 0
                assert gemms(out, [second], want[1:2], how) == 1
                assert gemms(out, [b], want[2:], how) == 0  # with a vector
                assert gemms(out, [first, second, b], want, how) == 1
    # Of two blocks the forward has made the head's gradient, and hands it over to the first taker.
    out = loss(h, w, 20)
    assert gemms(out, [h], want[:1], "grad") == gemms(out, [w], want[1:2], "grad") == 0


LOW_RANK = [
    (name, dtype)
    for name in ("cpu", "reference", "cuda_host")
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    if dtype in DTYPES[name]
]


@pytest.mark.parametrize(("backend", "dtype"), LOW_RANK, ids=str)
@pytest.mark.parametrize("rows", [1000, 7])
@pytest.mark.parametrize("weight_trained", [False, True])
@pytest.mark.parametrize("op", ["loss", "entropy", "logps", "announced"])
def test_a_low_rank_part_is_more_columns_of_the_head(
    op: str, weight_trained: bool, rows: int, backend: str, dtype: torch.dtype
) -> None:
    v, lengths = 2100, [7, 0, 12, 1]  # more than a panel
    scale = {"h": 1.0, "low": 0.7, "w": 0.4, "up": 0.3, "b": 1.0}
    shapes = {"h": (20, 16), "low": (20, 3), "w": (v, 16), "up": (v, 3), "b": (v,)}
    drawn = {k: (scale[k] * torch.randn(shape)).to(dtype) for k, shape in shapes.items()}
    labels, seq = torch.randint(v, (20,)), lk.Sequences.from_lengths(lengths)
    advantages = torch.tensor([1.0, 0.5, 2.0, -1.0])
    options: dict[str, Any] = {"softcap": 5.0, "temperature": 0.8}

    def results(wide: bool) -> dict[str, Tensor]:
        """In float64 by torch's own operations: the truth."""
        leaf = {k: t.clone().to(torch.float64 if wide else dtype) for k, t in drawn.items()}
        for k, t in leaf.items():
            t.requires_grad_(k != "w" or weight_trained)
        h, low, w, up, b = leaf.values()
        side = {"ref_logps": torch.full((20,), -7.0), "advantages": advantages}
        side = {k: t.to(t.dtype if not wide else torch.float64) for k, t in side.items()}
        mine = {"backend": backend, "memory_budget": rows * v * 4, **options}
        if wide:
            z = (5.0 * torch.tanh((h @ w.T + low @ up.T + b) / 5.0)) / 0.8
            p = z.log_softmax(-1)
            logps, entropy = p.gather(1, labels[:, None]).squeeze(1), -(p.exp() * p).sum(1)
            if op == "loss":
                out = lk.aggregate(objectives.a_lol(logps, seq=seq, **side), seq)
            else:
                out = ({"logps": logps}.get(op, entropy)).square().sum()
        elif op == "loss":
            out = lk.linear_loss(
                objectives.a_lol, h, w, labels, seq, bias=b, low_rank=(low, up), **side, **mine
            )
        else:
            made = lk.linear_logprob(
                h, w, labels, bias=b, low_rank=(low, up), entropy_grad=op == "announced", **mine
            )
            out = (made.logps if op == "logps" else made.entropy).square().sum()
        out.backward()
        found = {k: t.grad for k, t in leaf.items() if t.requires_grad}
        return {"loss": out.detach(), **{k: g for k, g in found.items() if g is not None}}

    want, got = results(True), results(False)
    assert want.keys() == got.keys() and len(got) == 5 + weight_trained
    for k, true in want.items():
        off = float((got[k].double() - true).abs().max() / true.abs().max())
        bound = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
        assert off <= bound, (k, off)


def test_the_gemms_of_a_low_rank_part() -> None:
    """Beside a frozen weight its gradient takes a product with its own columns only."""
    h, w = torch.randn(40, 16, requires_grad=True), torch.randn(300, 16)
    low, up = torch.randn(40, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    labels, seq = torch.randint(300, (40,)), lk.Sequences.from_lengths([10] * 4)

    def units(run: Callable[[], Tensor]) -> float:
        return gemm_flops(run) / (2 * 40 * 300)

    def loss(budget: int) -> Tensor:
        both = {"low_rank": (low, up), "memory_budget": budget}
        return lk.linear_loss(objectives.nll, h, w, labels, seq, **both)

    for budget in (2**20, 20 * 300 * 4):
        assert units(functools.partial(loss, budget)) == 2 * (16 + 4) + 4
    both = (low, up)
    assert units(lambda: lk.linear_logprob(h, w, labels, low_rank=both).logps.sum()) == 44
    w.requires_grad_()
    assert units(lambda: lk.linear_logprob(h, w, labels, low_rank=both).logps.sum()) == 60


# --- an objective that looks across groups --------------------------------------------------------


def whitened(logps: Tensor, rewards: PerSequence, seq: lk.Sequences) -> Tensor:
    return -(rewards - rewards.mean()) * seq.sum(logps)


def over_the_batch(logps: Tensor, seq: lk.Sequences) -> Tensor:
    return -seq.sum(logps) / seq.num_sequences


def of_whole_lengths(logps: Tensor, seq: lk.Sequences) -> Tensor:
    return -seq.mean(logps) * seq.lengths.sqrt()


@objectives.objective(token_local=True)
def said_to_be_token_local(logps: Tensor, seq: lk.Sequences) -> Tensor:
    return -seq.sum(logps).square()


objectives.REGISTRY.pop("said_to_be_token_local")


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize(
    ("objective", "refused"),
    [
        (whitened, True),
        (over_the_batch, True),
        (said_to_be_token_local, True),
        (of_whole_lengths, False),
    ],
)
def test_no_value_depends_on_the_memory_budget(
    objective: Callable[..., Tensor], refused: bool, rows: int
) -> None:
    h, w = torch.randn(20, 6, requires_grad=True), torch.randn(50, 6, requires_grad=True)
    labels, seq = torch.randint(50, (20,)), lk.Sequences.from_lengths([5, 3, 8, 4])
    side = {"rewards": torch.tensor([1.0, 3.0, -2.0, 0.5])} if objective is whitened else {}
    logps = lk.linear_logprob(h, w, labels).logps
    want = lk.aggregate(objective(logps, seq=seq, **side), seq)

    def run() -> Tensor:
        return lk.linear_loss(objective, h, w, labels, seq, memory_budget=rows * 200, **side)

    if refused and rows < 20:
        with pytest.raises(ValueError, match=r"group \d has loss .* evaluated together"):
            run()
        return
    got = run()
    assert abs(got.item() - want.item()) <= 1e-5 * abs(want.item())
    grads = [torch.autograd.grad(loss, (h, w)) for loss in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@pytest.mark.parametrize("wrong", ["label", "ref_logps"])
def test_a_skipped_sequence_is_checked_all_the_same(wrong: str) -> None:
    labels, ref = torch.arange(9), -torch.ones(9)
    if wrong == "label":
        labels[5] = 11
    else:
        ref[5] = torch.nan
    seq, advantages = lk.Sequences.from_lengths([3, 4, 2]), torch.tensor([1.0, -1.0, 2.0])
    call = (objectives.a_lol, torch.randn(9, 4), torch.randn(11, 4), labels, seq)
    with pytest.raises(ValueError, match=r"labels\[5\]|ref_logps\[5\] = nan"):
        lk.linear_loss(*call, ref_logps=ref, advantages=advantages)


def test_a_skipped_sequence_has_no_statistics_and_no_gradient() -> None:
    h, w = torch.randn(9, 4, requires_grad=True), torch.randn(11, 4)
    seq, labels = lk.Sequences.from_lengths([3, 4, 2]), torch.arange(9)
    side = {"advantages": torch.tensor([1.0, -1.0, 2.0]), "return_outputs": True}
    out = lk.linear_loss(objectives.a_lol_ref_free, h, w, labels, seq, **side)
    out.loss.backward()
    assert bool((h.grad[3:7] == 0).all()) and bool((h.grad[:3] != 0).any())
    for t in (out.logps, out.lse, out.entropy, out.max_logit):
        assert torch.equal(t.isnan(), torch.tensor([False] * 3 + [True] * 4 + [False] * 2))
        assert not t.requires_grad
    assert float(out.seq_loss[1]) == 0.0 and not out.seq_loss.requires_grad


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_tokens_is_a_loss_of_zero(lengths: list[int], reduction: str) -> None:
    h, w = torch.zeros(0, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    seq = lk.Sequences.from_lengths(lengths)
    loss = lk.linear_loss(objectives.nll, h, w, labels, seq, reduction=reduction)
    loss.backward()
    assert loss.item() == 0.0 and h.grad.shape == (0, 4) and float(w.grad.abs().max()) == 0.0


# --- what an objective may be ---------------------------------------------------------------------


def test_a_lambda_a_partial_and_an_object_are_objectives() -> None:

    p = peaky(8, 4, 11)
    seq = lk.Sequences.from_lengths([5, 3])

    class Scaled:
        def __call__(self, logps: Tensor, seq: lk.Sequences) -> Tensor:
            return -2.0 * seq.sum(logps)

    def scaled(logps: Tensor, seq: lk.Sequences, *, factor: float = 1.0) -> Tensor:
        return -factor * seq.sum(logps)

    want = 2 * lk.linear_loss(objectives.nll, p.hidden, p.weight, p.labels, seq)
    found = [
        lambda logps, seq: -2.0 * seq.sum(logps),
        Scaled(),
        functools.partial(scaled, factor=2.0),
    ]
    for objective in found:
        got = lk.linear_loss(objective, p.hidden, p.weight, p.labels, seq)
        assert torch.equal(got, want)


def test_options_with_defaults_and_without() -> None:
    p, seq = peaky(8, 4, 11), lk.Sequences.from_lengths([5, 3])
    side = {"ref_logps": (eager(p).logps - 0.5).clamp(max=0), "advantages": torch.tensor([0.7, 1])}
    losses = [
        lk.linear_loss(objectives.a_lol, p.hidden, p.weight, p.labels, seq, **side, **options)
        for options in ({}, {"clip": 0.9}, {"clip": 0.1}, {"clip": None})
    ]
    assert torch.equal(losses[0], losses[1])
    assert len({loss.item() for loss in losses}) == 3  # the option arrives


def test_step_zero_ratio_is_one_whatever_the_batch_shape() -> None:
    """Reference log-probs scored in one batch shape, the policy in another: |sum| <= 1e-3 nat."""
    for dtype in HALF:
        p = peaky(600, 64, 5000, dtype=dtype, std=4.0)
        seq = lk.Sequences.from_lengths([400, 50, 150])
        head = (p.hidden, p.weight, p.labels)
        parts = [(p.hidden[i : i + 7], p.weight, p.labels[i : i + 7]) for i in range(0, 600, 7)]
        ref = torch.cat([lk.linear_logprob(*part).logps for part in parts])
        options = {"memory_budget": 5000 * 4 * 60, "clip": None, "return_outputs": True}
        side = {"ref_logps": ref, "advantages": torch.ones(3)}
        out = lk.linear_loss(objectives.a_lol, *head, seq, **side, **options)
        assert float(seq.sum(out.logps - ref).abs().max()) <= 1e-3
        ratio = -out.seq_loss / seq.sum(out.logps)
        assert float((ratio - 1).abs().max()) <= 1e-3


def test_the_denominators_may_be_those_of_a_larger_update() -> None:
    """1 x 8 = 2 x 4 = 4 x 2 = 8 x 1, sequences of uneven length, one without tokens."""
    lengths = [3, 9, 1, 0, 14, 2, 5, 6]
    p = peaky(sum(lengths), 8, 31, dtype=torch.float64)
    advantages = torch.rand(8, dtype=torch.float64) + 0.1
    for reduction in REDUCTIONS:
        outcomes = []
        for parts in (1, 2, 4, 8):
            h, w = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
            total, row, size = 0.0, 0, 8 // parts
            for i in range(0, 8, size):
                seq = lk.Sequences.from_lengths(lengths[i : i + size])
                rows = slice(row, row := row + seq.num_tokens)
                seq = seq.with_totals(num_sequences=8, num_tokens=sum(lengths))
                options = {"reduction": reduction, "advantages": advantages[i : i + size]}
                batch = (h[rows], w, p.labels[rows], seq)
                loss = lk.linear_loss(objectives.a_lol_ref_free, *batch, **options)
                loss.backward()
                total += loss.item()
            outcomes.append((torch.tensor(total, dtype=torch.float64), h.grad, w.grad))
        for other in outcomes[1:]:
            for x, y in zip(outcomes[0], other, strict=True):
                assert float((x - y).abs().max()) <= 1e-12 * max(1, float(y.abs().max()))
