"""Every pair of backends on one shared corpus: row functions and whole calls, judged by float64."""

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives, testing
from lolkernels.backends import TABLE, triton
from lolkernels.testing import LAYOUTS, LOGPROB_ATOL, VOCABULARIES, RedZones, eager, fuzz

HALF = (torch.float32, torch.bfloat16, torch.float16)
CORPUS = 500
BLOCK = 25
# Those that take the CPU's tensors.
ROWS = [name for name, m in TABLE.items() if m.devices is None or "cpu" in m.devices]
WHOLE_ROWS = {name for name, m in TABLE.items() if not m.panels}


def corpus(pairs: list[tuple[str, str]], both: int = 0) -> list[Any]:
    """Pairs of backends by blocks of the corpus; those of a GPU are slow on a CPU.

    Of a pair of two such backends ``both`` cases are for every run.
    """
    quick = (150, 50, both)
    return [
        pytest.param(
            first,
            second,
            start,
            marks=() if start < quick[len({first, second} & WHOLE_ROWS)] else pytest.mark.slow,
            id=f"{first}-{second}-{start}",
        )
        for first, second in pairs
        for start in range(0, CORPUS, BLOCK)
    ]


PAIRS = list(itertools.combinations(ROWS, 2))


def row_case(seed: int) -> tuple[Tensor, Tensor, list[Tensor], dict[str, float], random.Random]:
    """Logits, labels (some without a target in these columns), a, b, c and the options."""
    r = random.Random(f"rows {seed}")
    generator = torch.Generator().manual_seed(seed)
    n, v = r.randint(1, 30), r.choice(VOCABULARIES)
    logits = torch.randn(n, v, generator=generator) * r.uniform(1, 6)
    labels = torch.randint(-3, v + 3, (n,), generator=generator)
    if r.random() < 0.3:
        logits[torch.rand(n, v, generator=generator) < 0.3] = -torch.inf
        logits[:, 0] = 0.0
    options = {
        "scale": r.choice((1.0, 0.25, 3.0)),
        "softcap": r.choice((0.0, 0.0, 7.0)),
        "temperature": r.choice((1.0, 0.5)),
    }
    abc = [torch.randn(n, generator=generator) for _ in range(3)]
    if r.random() < 0.5:
        abc = [abc[0], -abc[0], torch.zeros(n)]
    return logits.to(r.choice(HALF)), labels, abc, options, r


@pytest.mark.parametrize(("first", "second", "start"), corpus(PAIRS, both=BLOCK))
def test_row_functions(first: str, second: str, start: int) -> None:
    for seed in range(start, start + BLOCK):
        logits, labels, abc, options, r = row_case(seed)
        results = {}
        for name in (first, second):
            zones = RedZones()
            x = zones.place("logits", logits, r.choice(LAYOUTS))
            y = zones.place("labels", labels, r.choice(LAYOUTS))
            stats = TABLE[name].row_stats(x, y, **options)
            given = [zones.place(k, t) for k, t in zip("abc", abc, strict=True)]
            lse = zones.place("lse", stats[1])
            out = zones.output("out", tuple(x.shape), x.dtype, r.choice(LAYOUTS))
            TABLE[name].dlogits_(x, y, lse, *given, **options, out=out)
            zones.check()
            own = logits.clone()
            assert torch.equal(TABLE[name].dlogits_(own, y, lse, *given, **options), out)
            results[name] = (stats, out.clone())
        exact = TABLE["reference"].row_stats(logits.double(), labels, **options)
        true = TABLE["reference"].dlogits_(
            logits.double(), labels, exact[1], *(t.double() for t in abc), **options
        )
        size = max(1.0, float(exact[3].abs().max()) / 30)
        for i, factor in enumerate((1, 1, 3, 1)):
            a, b = results[first][0][i], results[second][0][i]
            for got in (a, b):
                same = (got == exact[i]) | ((got - exact[i]).abs() <= factor * size * LOGPROB_ATOL)
                assert bool(same.all()), f"seed {seed}, statistic {i}"
            assert torch.equal(a.isinf(), b.isinf())
        # Terms of dz before they cancel, times what z - lse in float32 leaves.
        z = exact[3].abs()[:, None] + exact[1].abs()[:, None]
        terms = (abc[0].abs() + abc[1].abs())[:, None] + abc[2].abs()[:, None] * z
        rounding = torch.finfo(logits.dtype).eps / 2
        if logits.dtype == torch.bfloat16 and triton.INTERPRETED:
            rounding *= 2  # Triton's interpreter cuts bfloat16 off, compiled kernels round it
        chain = options["scale"] / options["temperature"]
        allowed = 1e-5 * chain * terms + rounding * true.abs() + 1e-7
        for name in (first, second):
            error = (results[name][1].double() - true).abs()
            assert bool((error <= allowed).all()), f"seed {seed}: {name}"
            wrong = 1.02 * results[name][1].double() - true
            if float((0.02 * true.abs() - 2 * allowed).max()) > 0:
                assert not bool((wrong.abs() <= allowed).all())


FAMILY = {
    "no ratio": {"ratio": 0, "log_low": -60.0, "log_high": 60.0},
    "sequence": {"ratio": 1, "log_low": -0.5, "log_high": 0.6},
    "token": {"ratio": 2, "log_low": -0.2, "log_high": 0.18},
    "r_gold": {"ratio": 2, "log_low": -2.3, "log_high": float("inf")},
    "no lower bound": {"ratio": 1, "log_low": float("-inf"), "log_high": 0.9},
}


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("with_ref", [True, False])
@pytest.mark.parametrize("name", list(FAMILY))
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_sequence_coefficients(
    first: str, second: str, name: str, with_ref: bool, beta: float
) -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, 40, (9,), generator=generator)
        cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        n = int(cu[-1])
        logps = -3 * torch.rand(n, generator=generator)
        ref = logps + 0.2 * torch.randn(n, generator=generator) if with_ref else None
        weight = torch.randn(9, generator=generator)
        zones = RedZones()
        placed = [
            zones.place("logps", logps),
            None if ref is None else zones.place("ref", ref),
            zones.place("cu", cu),
            zones.place("weight", weight),
        ]
        results = [
            TABLE[b].sequence_coef(*placed, beta=beta, **FAMILY[name]) for b in (first, second)
        ]
        zones.check()
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape
            assert float((a - b).abs().max()) <= 1e-6 * max(1, float(b.abs().max()))
        assert float(results[0][1].abs().max()) > 0


@pytest.mark.parametrize(("first", "second", "start"), corpus(PAIRS))
def test_whole_calls(first: str, second: str, start: int) -> None:
    """linear_logprob and linear_loss by two backends: both near float64, and near each other."""
    for seed in range(start, start + BLOCK):
        p = fuzz(seed + 10_000, max_rows=25, max_hidden=24)
        n = p.labels.shape[0]
        truth = eager(p.double()).logps
        seq = lk.Sequences.from_lengths([n - n // 3, n // 3])
        ref = (truth + 0.02 * torch.randn(n)).float()
        leaves = [t.requires_grad_() for t in (p.hidden, p.weight)]
        grads, losses = [], []
        for backend in (first, second):
            with lk.use_backend(backend):
                out = lk.linear_logprob(*leaves, p.labels, bias=p.bias, **p.options)
                loss = lk.linear_loss(
                    objectives.a_lol,
                    *leaves,
                    p.labels,
                    seq,
                    bias=p.bias,
                    ref_logps=ref,
                    advantages=torch.tensor([1.0, 0.5]),
                    **p.options,
                )
            testing.accept_logprobs(out.logps, truth)
            losses.append(loss.item())
            grads.append(
                [*torch.autograd.grad(out.logps.sum(), leaves), *torch.autograd.grad(loss, leaves)]
            )
        assert abs(losses[0] - losses[1]) <= 1e-4 * max(1.0, abs(losses[0]))
        sizes = testing.gradient_sizes(p, {"logps": torch.ones(n)})
        by_loss = testing.gradient_sizes(p, {"logps": torch.full((n,), 2.0)})
        bounds = [sizes["hidden"], sizes["weight"], by_loss["hidden"], by_loss["weight"]]
        for a, b, size in zip(*grads, bounds, strict=True):
            # Each may be rounded once, and each knows what cancels to its statistics' accuracy.
            top = float(b.abs().max())
            # Where tiles are whole rows the gradients of the logits are rounded as well.
            roundings = 4 if {first, second} & WHOLE_ROWS else 2
            atol = roundings * testing.GRADIENT_TOL[b.dtype] * top + 4e-5 * size + 1.2e-7

            def judge(x: Tensor, b: Tensor = b, atol: float = atol) -> list[str]:
                off = float((x.double() - b.double()).abs().max())
                return [] if off <= atol else [f"off by {off:.1e}, bound {atol:.1e}"]

            testing.accept(judge, a, blind=2 * atol)
