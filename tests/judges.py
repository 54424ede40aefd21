"""Inputs at a realistic scale, float64 truth, an eager baseline, tolerances, canaries, red zones.

A result is judged three ways: against the same formula in float64
on the same (already rounded) inputs, beside what eager torch reaches in the inputs' dtype. Every
judgement must also reject wrong results (:func:`accept`), and every tensor of a fuzz case lies
between red zones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lolkernels.backends.contract import RowStats
from lolkernels.backends.finish import statistics

LOGPROB_ATOL = 2e-5  # nat per token
SEQUENCE_ATOL = 1e-3  # nat per sequence
# A few units in the last place of a gradient whose largest entry is one.
GRADIENT_TOL = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 4e-3,
}
# What float32 statistics (z - lse near 40, 2e-6 nat) leave of a gradient that cancels.
STATISTICS_TOL = {
    torch.float64: 1e-13,
    torch.float32: 5e-6,
    torch.float16: 5e-6,
    torch.bfloat16: 5e-6,
}
# Powers of two and their neighbours, primes, and both sides of one and two column panels.
VOCABULARIES = (1, 2, 3, 17, 127, 128, 129, 500, 1023, 1025, 2047, 2048, 2049, 4097)
LAYOUTS = ("plain", "offset", "sliced", "transposed")

Judge = Callable[[Tensor], list[str]]


# --- inputs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Inputs of ``linear_logprob``."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (N,) int64
    bias: Tensor | None = None  # (V,)
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }

    def double(self) -> Problem:
        """The same values in float64."""
        bias = None if self.bias is None else self.bias.detach().double()
        return Problem(
            self.hidden.detach().double(),
            self.weight.detach().double(),
            self.labels,
            bias,
            **self.options,
        )


def peaky(
    n: int,
    d: int,
    v: int,
    *,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    bias: bool = False,
    std: float = 3.0,
    lift: float = 6.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    seed: int = 0,
) -> Problem:
    """A problem whose logits z spread by ``std`` nats, with the label's raised by about ``lift``.

    Flat random logits prove little: their softmax is uniform and every gradient is tiny. The bias
    has standard deviation one.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    weight = normal(v, d)
    labels = torch.randint(v, (n,), generator=generator)
    size = weight[labels].square().sum(1, keepdim=True).clamp(min=d / 2)
    hidden = normal(n, d) * (std / d**0.5) + weight[labels] * (lift / size)
    hidden = hidden * (temperature / logit_scale)
    return Problem(
        hidden.to(dtype),
        weight.to(weight_dtype or dtype),
        labels,
        normal(v).to(weight_dtype or dtype) if bias else None,
        temperature,
        softcap,
        logit_scale,
    )


def fuzz(
    seed: int,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16),
    *,
    max_rows: int = 40,
    max_hidden: int = 48,
) -> Problem:
    """The fuzz case of this number: shape, dtype, bias, temperature, softcap and scale vary."""
    r = random.Random(seed)
    dtype = r.choice(dtypes)
    mixed = dtype != torch.float64 and r.random() < 0.15
    temperature = r.choice((1.0, 1.0, 0.5, 0.7, 1.7))
    return peaky(
        r.randint(1, max_rows),
        r.randint(1, max_hidden),
        r.choice(VOCABULARIES) if r.random() < 0.8 else r.randint(1, 3000),
        dtype=dtype,
        weight_dtype=r.choice([t for t in dtypes if t != torch.float64]) if mixed else None,
        bias=r.random() < 0.5,
        std=r.uniform(1.0, 6.0),
        lift=r.uniform(0.0, 10.0),
        temperature=temperature,
        softcap=r.choice((None, None, 5.0, 30.0)),
        logit_scale=r.choice((1.0, 1.0, 0.0625, 2.5)),
        seed=seed,
    )


# --- truth and baseline ---------------------------------------------------------------------------


class Eager(NamedTuple):
    """What eager torch gives; differentiable."""

    logps: Tensor  # (N,)
    lse: Tensor  # (N,)
    entropy: Tensor  # (N,)
    max_logit: Tensor  # (N,)


def scaled(logits: Tensor, temperature: float, softcap: float | None, logit_scale: float) -> Tensor:
    """z = softcap(logit_scale x) / temperature, with softcap(x) = cap tanh(x / cap)."""
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def eager_logits(logits: Tensor, labels: Tensor, **options: Any) -> Eager:
    """The four statistics from logits, reduced in float32 (float64), as a careful loop does it."""
    z = scaled(logits if logits.dtype == torch.float64 else logits.float(), **options)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0.0, p * log_p.clamp(min=-1e30)).sum(-1)
    logps = log_p.gather(-1, labels[..., None]).squeeze(-1)
    return Eager(logps, torch.logsumexp(z, -1), entropy, z.amax(-1))


def eager(problem: Problem) -> Eager:
    """The same from hidden states. Called on ``problem.double()`` this is the truth."""
    p = problem
    weight = p.weight if p.weight.dtype == p.hidden.dtype else p.weight.float()
    logits = p.hidden.to(weight.dtype) @ weight.T
    if p.bias is not None:
        logits = logits + p.bias.to(logits.dtype)
    return eager_logits(logits, p.labels, **p.options)


def four(stats: RowStats) -> tuple[Tensor, ...]:
    """`target_logit, lse, expected_logit, max_logit`, each (n,)."""
    return stats.target_logit, stats.lse, stats.lse - stats.entropy, stats.max_logit


def row_stats(backend: Any, logits: Tensor, labels: Tensor, **scaling: Any) -> tuple[Tensor, ...]:
    """These four, of a backend's sums."""
    return four(statistics(backend.sums(logits, labels, **scaling)))


# --- judgements: a list of faults, empty where the result is right --------------------------------


def logprob_faults(logps: Tensor, truth: Tensor, lengths: list[int] | None = None) -> list[str]:
    """2e-5 nat per token, 1e-3 nat per sequence (of ``lengths`` tokens), and never above zero."""
    if logps.shape != truth.shape:
        return [f"shape {tuple(logps.shape)} instead of {tuple(truth.shape)}"]
    if logps.numel() == 0:
        return []
    if not bool(logps.isfinite().all()):
        return ["not finite"]
    faults = []
    error = logps.double() - truth
    double = logps.dtype == torch.float64
    atol = 1e-12 * max(1.0, float(truth.abs().max())) if double else LOGPROB_ATOL
    if not float(error.abs().max()) <= atol:
        faults.append(f"off by {float(error.abs().max()):.2e} nat per token, bound {atol:.1e}")
    worst = max(abs(float(part.sum())) for part in torch.split(error, lengths or [len(error)]))
    if not worst <= SEQUENCE_ATOL:
        faults.append(f"off by {worst:.2e} nat per sequence, bound {SEQUENCE_ATOL:.0e}")
    if not bool((logps <= 0).all()):
        faults.append(f"a log-prob of {float(logps.max()):.2e} > 0")
    return faults


def gradient_faults(
    grad: Tensor, baseline: Tensor, truth: Tensor, size: Tensor | float = 0.0
) -> list[str]:
    """Largest error, each element's error, length along the truth, and direction by row blocks.

    With everything scaled so that the truth's largest entry is one: the error is at most twice the
    baseline's plus two roundings; each element's at most the baseline's plus ``GRADIENT_TOL``; the
    component along the truth is one within ``GRADIENT_TOL``; and 1 - cosine, of the whole and of
    eight row blocks, at most 1e-6 plus twice that of the baseline and of the rounded truth.

    ``size`` is the gradient before terms cancel (see :func:`gradient_sizes`), or its largest entry.
    A gradient that nearly vanishes, because p is near one, is known to ``STATISTICS_TOL`` of that
    size only: an entry to that of the largest one, the length along the truth to what the errors
    of all entries add up to at worst.
    """
    if grad.shape != truth.shape:
        return [f"shape {tuple(grad.shape)} instead of {tuple(truth.shape)}"]
    if grad.numel() == 0:
        return []
    if not bool(grad.isfinite().all()):
        return ["not finite"]
    dtype, top = grad.dtype, float(truth.abs().max())
    unknown = _unknown(grad, truth, size)  # of each entry
    known = float(unknown.max())
    if top <= 1e-3 * known:  # an exact zero, or the truth's own rounding
        return [] if float(grad.abs().max()) <= known else ["not zero"]
    g, e, t = (x.detach().double() / top for x in (grad, baseline, truth))
    known, unknown = known / top, unknown / top
    faults = []
    error, peer, tol = (g - t).abs(), (e - t).abs(), GRADIENT_TOL[dtype]
    low = t.to(dtype)
    bound = 2 * float(peer.max()) + 2 * float(((low + 0.3) - 0.3 - low).abs().max()) + known
    if not float(error.max()) <= bound:
        faults.append(f"largest error {float(error.max()):.2e}, bound {bound:.2e}")
    if not bool((error <= peer + tol + known).all()):
        faults.append(f"an element off by {float((error - peer).max()):.2e} more than eager")
    rounded = (t * top).to(dtype).double() / top  # float16 has few digits below 6e-5
    along, bound = _stretch(g, t), tol + float((unknown * t.abs()).sum() / (t * t).sum())
    bound += 2 * abs(_stretch(rounded, t))
    if not abs(along) <= bound:
        faults.append(f"length along the truth off by {along:.2e}, bound {bound:.0e}")
    for part in (slice(None), *_row_blocks(t.shape[0])):
        norm = float(t[part].norm())
        blur = known * t[part].numel() ** 0.5
        if norm <= blur:
            continue
        turn = _turn(g[part], t[part])
        bound = 1e-6 + (blur / norm) ** 2
        bound += 2 * _turn(e[part], t[part]) + 2 * _turn(rounded[part], t[part])
        if not turn <= bound:
            faults.append(f"1 - cosine {turn:.2e} in rows {part}, bound {bound:.2e}")
    return faults


def gradient_sizes(problem: Problem, upstream: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each gradient if none of its terms cancelled.

    ``upstream`` holds the gradients (N,) of logps, lse and entropy: dz_v is a sum of g_logp
    ([v = y] - p_v), g_lse p_v and g_entropy p_v (E[z] - z_v); here every term counts as positive.
    """
    p = problem.double()
    z = scaled(p.hidden @ p.weight.T + (0 if p.bias is None else p.bias), **p.options)
    probability = z.softmax(-1)
    dz = torch.zeros_like(z)
    for name, g in upstream.items():
        g = g.double().abs()[:, None]
        if name == "logps":
            dz += g * probability
            dz.scatter_add_(1, p.labels[:, None], g)
        elif name == "lse":
            dz += g * probability
        else:
            mean = (probability * z).sum(1, keepdim=True).abs()
            dz += g * probability * (z.abs() + mean)
    dz *= p.logit_scale / p.temperature
    return {"hidden": dz @ p.weight.abs(), "weight": dz.T @ p.hidden.abs(), "bias": dz.sum(0)}


def _unknown(grad: Tensor, truth: Tensor, size: Tensor | float) -> Tensor:
    """What float32 statistics leave open of each entry; where ``size`` is one number, of all."""
    size = torch.as_tensor(size, dtype=torch.float64, device=truth.device)
    return STATISTICS_TOL[grad.dtype] * size.clamp(min=float(truth.abs().max()))


def _row_blocks(n: int) -> Iterator[slice]:
    size = -(-n // 8)
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def _stretch(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum() / (y * y).sum()) - 1


def _turn(x: Tensor, y: Tensor) -> float:
    x, y = x.flatten(), y.flatten()
    size = float(x.norm() * y.norm())
    return 1.0 if size == 0 else max(0.0, 1 - float(x @ y) / size)


def canaries(result: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Wrong results that look right: zeros, two percent too long, rows moved by one."""
    yield "zeros", torch.zeros_like(result)
    yield "1.02 x", 1.02 * result
    yield "rolled rows", result.roll(1, 0)


def accept(judge: Judge, result: Tensor, *, blind: float = 0.0) -> int:
    """Assert that ``judge`` finds no fault in ``result``, and one in each of its canaries.

    Args:
        blind: canaries that differ from the result by no more than this, everywhere, are left out:
            log-probs of -0.0 have no wrong length.

    Returns:
        the number of canaries the judgement has rejected.

    Raises:
        AssertionError: a fault in the result, or a canary that passes.
    """
    faults = judge(result)
    if faults:
        raise AssertionError("; ".join(faults))
    rejected = 0
    for name, wrong in canaries(result):
        if wrong.numel() == 0 or not float((wrong - result).abs().max()) > blind:
            continue
        if not judge(wrong):
            raise AssertionError(f"the judgement accepts a wrong result: {name}")
        rejected += 1
    return rejected


def accept_logprobs(logps: Tensor, truth: Tensor, lengths: list[int] | None = None) -> int:
    """:func:`accept` with :func:`logprob_faults`."""
    return accept(
        lambda x: logprob_faults(x, truth, lengths), logps.detach(), blind=3 * LOGPROB_ATOL
    )


def accept_gradient(
    grad: Tensor, baseline: Tensor, truth: Tensor, size: Tensor | float = 0.0
) -> int:
    """:func:`accept` with :func:`gradient_faults`."""
    top = float(truth.abs().max()) if truth.numel() else 0.0
    known = float(_unknown(grad, truth, size).max()) if truth.numel() else 0.0
    return accept(
        lambda x: gradient_faults(x, baseline, truth, size),
        grad.detach(),
        # A row that resembles its neighbour to 1% may pass for it.
        blind=max(0.01 * top, 8 * known),
    )


# --- red zones ------------------------------------------------------------------------------------


class RedZones:
    """Places tensors between 64-element borders of NaN (integers: the largest one).

    A kernel that reads too far meets NaN; one that writes too far, or into an input, is found by
    :meth:`check`.
    """

    BORDER = 64

    def __init__(self) -> None:
        self._kept: list[tuple[str, Tensor, Tensor, Tensor | None]] = []

    def place(self, name: str, value: Tensor, layout: str = "plain") -> Tensor:
        """A tensor equal to ``value`` inside a red zone; it must never change."""
        buffer, view = self._allocate(tuple(value.shape), value.dtype, layout)
        view.copy_(value)
        self._kept.append((name, buffer, buffer.clone(), None))
        return view

    def output(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "plain"
    ) -> Tensor:
        """A poisoned tensor to write into; what lies around it must never change."""
        buffer, view = self._allocate(shape, dtype, layout)
        self._kept.append((name, buffer, buffer.clone(), view))
        return view

    def check(self) -> None:
        """Raises AssertionError where a border, a gap between rows or an input has changed."""
        for name, buffer, before, written in self._kept:
            if written is not None:
                inside = torch.as_strided(
                    before, written.size(), written.stride(), written.storage_offset()
                )
                inside.copy_(written)
            if not torch.equal(buffer.view(torch.uint8), before.view(torch.uint8)):
                raise AssertionError(f"{name}: written outside, or an input changed")

    def _allocate(
        self, shape: tuple[int, ...], dtype: torch.dtype, layout: str
    ) -> tuple[Tensor, Tensor]:
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
        inner = shape[-1] if shape else 1
        rows = 1
        for size in shape[:-1]:
            rows *= size
        pitch = {"plain": inner, "transposed": inner, "offset": inner + 7, "sliced": 2 * inner}
        count = rows * pitch[layout]
        poison: Any = True
        if dtype.is_floating_point:
            poison = float("nan")
        elif dtype != torch.bool:
            poison = torch.iinfo(dtype).max
        buffer = torch.full((count + 2 * self.BORDER,), poison, dtype=dtype)
        grid = buffer[self.BORDER : self.BORDER + count]
        if layout == "transposed" and len(shape) == 2:
            return buffer, grid.view(shape[1], shape[0]).T
        view = grid.view(*shape[:-1], pitch[layout]) if shape else grid.view(())
        if layout == "offset":
            view = view[..., 3 : 3 + inner]
        elif layout == "sliced":
            view = view[..., ::2]
        return buffer, view
