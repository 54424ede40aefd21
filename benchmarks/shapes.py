"""Shapes of real models' heads, and the inputs of the benchmarks."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

import lolkernels as lk

CLIP = 0.9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """T rows of hidden states, width D, V columns of the head, in sequences of `seq_len` rows.

    With `shortest`, lengths are drawn from shortest to seq_len instead (always the same draw).
    """

    tokens: int
    hidden: int
    vocab: int
    seq_len: int
    dtype: str = "fp32"
    prompt_share: float = 0.0  # share of each sequence's rows that carry no loss
    shortest: int | None = None

    def __post_init__(self) -> None:
        if min(self.tokens, self.hidden, self.vocab, self.seq_len) < 1:
            raise ValueError(f"tokens, hidden, vocab and seq_len must be positive; got {self}")
        if self.shortest is None and self.tokens % self.seq_len:
            raise ValueError(f"tokens={self.tokens} must be a multiple of seq_len={self.seq_len}")
        if self.shortest is not None and not (
            1 <= self.shortest <= self.seq_len // 2 and self.shortest <= self.tokens
        ):
            raise ValueError(
                f"shortest={self.shortest} must lie between 1 and half of seq_len={self.seq_len}, "
                f"and not above tokens={self.tokens}"
            )
        if not 0 <= self.prompt_share < 1:
            raise ValueError(
                f"prompt_share must be at least 0 and below 1; got {self.prompt_share}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")

    def lengths(self) -> list[int]:
        if self.shortest is None:
            return [self.seq_len] * (self.tokens // self.seq_len)
        draw, left, found = random.Random(0), self.tokens, []
        while left:
            n = draw.randint(self.shortest, self.seq_len)
            if left - n < self.shortest:  # what is left becomes one sequence, or two
                n = left if left <= self.seq_len else left - self.shortest
            found.append(n)
            left -= n
        return found

    def prompts(self) -> list[int]:
        """Rows at the start of each sequence that carry no loss."""
        return [int(n * self.prompt_share) for n in self.lengths()]

    @property
    def scored(self) -> int:
        """N, the rows that carry loss."""
        return self.tokens - sum(self.prompts())

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        length = f"{self.shortest}-{self.seq_len}" if self.shortest else f"{self.seq_len}"
        text = f"T={self.tokens} D={self.hidden} V={self.vocab} L={length} {self.dtype}"
        return text + (f" prompt={self.prompt_share:g}" if self.prompt_share else "")


# D and V of the models' heads (without Gemma-2's cap on logits, which not every peer has).
HEADS = {
    "gpt2": (768, 50257),
    "smollm2": (576, 49152),  # 135M
    "smollm2-1.7b": (2048, 49152),
    "llama3.2-1b": (2048, 128256),
    "llama3-8b": (4096, 128256),
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-7b": (3584, 152064),
    "qwen3-0.6b": (1024, 151936),
    "qwen3-8b": (4096, 151936),
    "gemma2-2b": (2304, 256000),
    "gemma3-1b": (1152, 262144),
    "gpt-oss-20b": (2880, 201088),
}
SHAPES = {
    "tiny": Shape(64, 32, 1000, 16),
    "demo": Shape(512, 128, 2048, 32),
    **{name: Shape(1024, *head, 128) for name, head in HEADS.items()},
}


def parse_shape(text: str, tokens: int | None = None, lengths: str | None = None) -> Shape:
    """Reads a name of SHAPES, or `T,D,V,L[,dtype]`; `lengths` is `L` or `shortest-longest`.

    Raises:
        ValueError: neither a name nor four positive integers, or lengths that do not fit.
    """
    if text in SHAPES:
        shape = SHAPES[text]
    elif found := re.fullmatch(r"(\d+),(\d+),(\d+),(\d+)(?:,(\w+))?", text):
        shape = Shape(*map(int, found.groups()[:4]), dtype=found[5] or "fp32")  # type: ignore[misc]
    else:
        names = ", ".join(SHAPES)
        raise ValueError(f"--shape must be one of {names} or T,D,V,L[,dtype]; got {text!r}")
    change: dict[str, int] = {} if tokens is None else {"tokens": tokens}
    if lengths is not None:
        if not re.fullmatch(r"\d+(-\d+)?", lengths):
            raise ValueError(f"--lengths must be N or SHORTEST-LONGEST; got {lengths!r}")
        *shortest, change["seq_len"] = (int(part) for part in lengths.split("-"))
        if shortest:
            change["shortest"] = shortest[0]
    return replace(shape, **change)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a loss on a head takes. N rows of the T carry loss; every advantage is positive."""

    shape: Shape
    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (T,) int64
    mask: Tensor  # (T,) bool: rows that carry loss
    seq: lk.Sequences  # of the N rows
    ref_hidden: Tensor  # (T, D), the reference model's, for who runs its head too
    ref_logps: Tensor  # (N,) fp32, what that head gives
    advantages: Tensor  # (S,) fp32
    upstream: Tensor  # (N,) fp32, gradient given to per-token log-probs

    @cached_property
    def rows(self) -> Tensor:
        """Where the N rows stand among the T."""
        return self.mask.nonzero().view(-1)

    def scored(self) -> tuple[Tensor, Tensor]:
        """Hidden states and labels of the N rows; a copy, part of the call, where rows are out."""
        if self.rows.numel() == self.shape.tokens:
            return self.hidden, self.labels
        return self.hidden[self.rows], self.labels[self.rows]


def make_inputs(
    shape: Shape, *, frozen_head: bool = False, device: torch.device | str = "cpu"
) -> Inputs:
    """Peaky inputs: logits of standard deviation 2, the label's raised by about 9.

    The reference's hidden states lie close to the policy's: a token's log-ratio has a standard
    deviation of about 0.05, so that sequence ratios spread around one and some are clipped.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    t, d, dtype = shape.tokens, shape.hidden, DTYPES[shape.dtype]
    weight = normal(shape.vocab, d)
    labels = torch.randint(shape.vocab, (t,), generator=generator, device=device)
    hidden = normal(t, d) * (2 / d**0.5) + weight[labels] * (9 / d)
    ref_hidden = (hidden + normal(t, d) * (0.05 / d**0.5)).to(dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)

    mask = torch.ones(t, dtype=torch.bool)
    start = 0
    for length, prompt in zip(shape.lengths(), shape.prompts(), strict=True):
        mask[start : start + prompt] = False
        start += length
    lengths = [n - p for n, p in zip(shape.lengths(), shape.prompts(), strict=True)]
    rows = mask.nonzero().view(-1).to(device)
    logps, wide = torch.empty(t, device=device), weight.float()
    for part in rows.split(256):  # small pieces: this is not measured
        logits = ref_hidden[part].float() @ wide.T
        logps[part] = logits.log_softmax(-1).gather(-1, labels[part, None]).squeeze(-1)
    return Inputs(
        shape,
        hidden.requires_grad_(),
        weight.requires_grad_(not frozen_head),
        labels,
        mask.to(device),
        lk.Sequences.from_lengths(lengths).to(device),
        ref_hidden,
        logps[rows],
        normal(len(lengths)).abs() + 0.1,
        normal(shape.scored),
    )
