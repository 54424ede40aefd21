"""Shapes and inputs of the benchmarks, and the float64 truth that a result must match first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CLIP = 0.9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """T rows of hidden states, width D, V columns of the head, sequences of `seq_len` rows."""

    tokens: int
    hidden: int
    vocab: int
    seq_len: int
    dtype: str = "fp32"
    prompt_share: float = 0.0  # share of each sequence's rows that carry no loss

    def __post_init__(self) -> None:
        if self.tokens % self.seq_len:
            raise ValueError(f"tokens={self.tokens} must be a multiple of seq_len={self.seq_len}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")

    @property
    def sequences(self) -> int:
        return self.tokens // self.seq_len

    @property
    def scored(self) -> int:
        """Rows that carry loss."""
        return self.sequences * (self.seq_len - int(self.seq_len * self.prompt_share))

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        text = f"T={self.tokens} D={self.hidden} V={self.vocab} L={self.seq_len} {self.dtype}"
        return text + (f" prompt={self.prompt_share:g}" if self.prompt_share else "")


SHAPES = {
    "tiny": Shape(64, 32, 1000, 16),
    "demo": Shape(512, 128, 2048, 32),
    "gpt2": Shape(1024, 768, 50257, 128),
    "smollm2": Shape(1024, 576, 49152, 128),
    "llama3": Shape(1024, 2048, 128256, 128),
    "qwen3": Shape(1024, 1024, 151936, 128),
}


def parse_shape(text: str) -> Shape:
    """Reads a name of SHAPES, or `T,D,V,seq_len`.

    Raises:
        ValueError: neither a name nor four positive integers.
    """
    if text in SHAPES:
        return SHAPES[text]
    try:
        tokens, hidden, vocab, seq_len = (int(part) for part in text.split(","))
    except ValueError:
        names = ", ".join(SHAPES)
        raise ValueError(f"--shape must be one of {names} or T,D,V,seq_len; got {text!r}") from None
    return Shape(tokens, hidden, vocab, seq_len)


class Inputs(NamedTuple):
    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (T,) int64
    mask: Tensor  # (S, L) bool: rows that carry loss
    ref_logps: Tensor  # (N,) fp32, N = mask.sum()
    advantages: Tensor  # (S,) fp32, all positive so that no row is skipped
    upstream: Tensor  # (N,) fp32, gradient given to per-token log-probs


def make_inputs(shape: Shape, *, frozen_head: bool = False) -> Inputs:
    """Peaky inputs: logits of standard deviation 2, the label's raised by about 9.

    The reference's log-probs lie close to the policy's, so that sequence ratios spread around one
    and some of them are clipped.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    dtype, width = DTYPES[shape.dtype], shape.hidden
    weight = normal(shape.vocab, width)
    labels = torch.randint(shape.vocab, (shape.tokens,), generator=generator)
    hidden = normal(shape.tokens, width) * (2 / width**0.5) + weight[labels] * (9 / width)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    mask = torch.ones(shape.sequences, shape.seq_len, dtype=torch.bool)
    mask[:, : int(shape.seq_len * shape.prompt_share)] = False
    rows = mask.view(-1)
    logps = torch.empty(shape.scored)
    for part in torch.arange(shape.scored).split(256):  # small pieces: this is not measured
        scored = rows.nonzero().view(-1)[part]
        logits = hidden[scored].float() @ weight.float().T
        logps[part] = logits.log_softmax(-1).gather(-1, labels[scored, None]).squeeze(-1)
    return Inputs(
        hidden.requires_grad_(),
        weight.requires_grad_(not frozen_head),
        labels,
        mask,
        logps + 0.05 * normal(shape.scored),
        normal(shape.sequences).abs() + 0.1,
        normal(shape.scored),
    )


def make_logits(inputs: Inputs) -> Tensor:
    """The logits (T, V) in the inputs' dtype, for the op that starts from logits."""
    with torch.no_grad():
        return (inputs.hidden.float() @ inputs.weight.float().T).to(inputs.hidden.dtype)


class Result(NamedTuple):
    """What every contestant returns; a gradient is None where nothing asks for it."""

    logps: Tensor | None  # (N,)
    dhidden: Tensor | None = None  # (T, D)
    dweight: Tensor | None = None  # (V, D)


def truth(op: str, inputs: Inputs) -> Result:
    """The result of `op` in float64, one sequence at a time, from the formulas alone.

    With z = h W^T, l_t = z[y] - lse, w = clip(exp(sum_t (l_t - r_t)), 1 - eps, 1 + eps) and c_t the
    coefficient (-A w / S for the fused A-LoL loss, the upstream gradient otherwise):
    dz_t = c_t ([v = y_t] - softmax(z_t)),  dh = dz W,  dW = dz^T h.
    """
    if op == "logprob":  # dhidden holds the gradient with respect to the logits
        logp = make_logits(inputs).double().log_softmax(-1)
        picked = logp.gather(-1, inputs.labels[:, None])
        gradient = -logp.exp_().mul_(inputs.upstream[:, None].double())
        gradient.scatter_add_(-1, inputs.labels[:, None], inputs.upstream[:, None].double())
        return Result(picked.squeeze(-1), gradient)
    hidden, weight = inputs.hidden.detach().double(), inputs.weight.detach().double()
    sequences, seq_len = inputs.mask.shape
    frozen = op == "score" or not inputs.weight.requires_grad
    dhidden = torch.zeros_like(hidden)
    dweight = None if frozen else torch.zeros_like(weight)
    logps, done = [], 0
    for s in range(sequences):
        rows = inputs.mask[s].nonzero().view(-1) + s * seq_len
        labels = inputs.labels[rows]
        z = hidden[rows] @ weight.T
        logp = z.log_softmax(-1)
        picked = logp.gather(-1, labels[:, None]).squeeze(-1)
        logps.append(picked)
        here = slice(done, done + rows.numel())
        done += rows.numel()
        if op == "score":
            continue
        if op == "linear_loss":
            log_ratio = (picked - inputs.ref_logps[here].double()).sum()
            ratio = log_ratio.exp().clamp(1 - CLIP, 1 + CLIP)
            coef = (-inputs.advantages[s] * ratio / sequences).expand_as(picked)
        else:
            coef = inputs.upstream[here].double()
        dz = -logp.exp_().mul_(coef[:, None])
        dz[torch.arange(rows.numel()), labels] += coef
        dhidden[rows] = dz @ weight
        if dweight is not None:
            dweight.addmm_(dz.T, hidden[rows])
    return Result(torch.cat(logps), None if op == "score" else dhidden, dweight)


def summed_error(inputs: Inputs, got: Result, want: Result) -> float:
    """The largest error of a sequence's summed log-prob, in nat."""
    if got.logps is None or want.logps is None:
        return float("nan")
    error = (got.logps.double() - want.logps).split(inputs.mask.sum(1).tolist())
    return max(float(part.sum().abs()) for part in error)


def gate(inputs: Inputs, got: Result, eager: Result, want: Result) -> list[str]:
    """Returns what is wrong with `got`; an empty list lets its time be printed.

    Summed log-probs lie within 1e-3 nat per sequence of float64 on the same (rounded) inputs.
    Gradients err at most twice as much as eager's in the same dtype, plus two roundings of the
    output dtype, plus what the ratio passes on: it is the exponential of a summed log-ratio, so an
    error of that sum is a relative error of the sequence's gradient.
    """
    faults: list[str] = []
    worst = summed_error(inputs, got, want)
    if not worst <= 1e-3:
        faults.append(f"summed log-prob off by {worst:.2e} nat")
    for name in ("dhidden", "dweight"):
        ours, peer, exact = getattr(got, name), getattr(eager, name), getattr(want, name)
        if exact is None:
            continue
        if ours is None:
            faults.append(f"{name} is missing")
            continue
        rounding = (exact.to(ours.dtype).double() - exact).abs().max()
        bound = 2 * (peer.double() - exact).abs().max() + 2 * rounding + worst * exact.abs().max()
        off = (ours.double() - exact).abs().max()
        if not off <= bound:
            faults.append(f"{name} off by {float(off):.2e}, bound {float(bound):.2e}")
    return faults
