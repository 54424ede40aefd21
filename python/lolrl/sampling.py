"""Draw completions from a policy, and score the tokens that were drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from lolrl.annotate import score_logps
from lolrl.data import Record, Text
from lolrl.tokens import LoLDataset, encode_prompt
from lolrl.value import evaluation_mode


@dataclass(frozen=True)
class Sample:
    """One sampled completion: the ids the model saw and drew (end token included where drawn)."""

    prompt_ids: list[int]
    completion_ids: list[int]
    text: str


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a completion: the tokenizer's, and all of the model's own."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    if not ends:
        raise ValueError("tokenizer has no eos_token: set one, or completions never end")
    return ends


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    *,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    max_prompt_length: int | None = None,
    progress: bool = False,
) -> list[Sample]:
    """Like `generate`, with the token ids beside each text."""
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            f"max_new_tokens and batch_size must be >= 1: got {max_new_tokens}, {batch_size}"
        )
    if temperature < 0 or not math.isfinite(temperature):
        raise ValueError(f"temperature must be finite and >= 0 (0 is greedy): got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1]: got {top_p}")
    from transformers import GenerationConfig

    ends = _end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    settings: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        settings = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
        use_cache=True,
        **settings,
    )
    ids = [encode_prompt(tokenizer, p, max_prompt_length=max_prompt_length) for p in prompts]
    # Neighbours in length share a batch, so that little is padded.
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    samples: list[Sample | None] = [None] * len(ids)
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with evaluation_mode(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        starts = range(0, len(order), batch_size)
        for start in tqdm(starts, desc="generate", unit="batch", disable=not progress, leave=False):
            rows = order[start : start + batch_size]
            width = max(len(ids[row]) for row in rows)
            tokens = torch.full((len(rows), width), pad, device=device)
            mask = torch.zeros_like(tokens)
            for i, row in enumerate(rows):
                tokens[i, width - len(ids[row]) :] = torch.tensor(ids[row], device=device)
                mask[i, width - len(ids[row]) :] = 1
            drawn = model.generate(input_ids=tokens, attention_mask=mask, generation_config=config)
            for row, new in zip(rows, drawn[:, width:].tolist(), strict=True):
                stop = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
                text = tokenizer.decode(new[:stop], skip_special_tokens=True)
                samples[row] = Sample(ids[row], new[:stop], text)
    return [s for s in samples if s is not None]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    *,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    max_prompt_length: int | None = None,
    progress: bool = False,
) -> list[str]:
    """One completion per prompt, as text without special tokens, in the order of `prompts`.

    prompts: strings or conversational messages. temperature 0 is greedy; top_p keeps the smallest
    set of tokens whose probability reaches it. The model's mode and the global random state are
    left as left as they were; the same seed, prompts and batch_size give the same completions.
    max_prompt_length keeps the end of a longer prompt, as in training; progress shows a bar.

    Raises ValueError on a temperature, top_p, max_new_tokens or batch_size out of range, or a
    tokenizer without an end token.
    """
    samples = sample(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        max_prompt_length=max_prompt_length,
        progress=progress,
    )
    return [s.text for s in samples]


def sequence_logps(
    model: Any, samples: Sequence[Sample], *, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """(sum of log pi over the completion's tokens in nats, number of those tokens) of each sample.

    float64 and int64 arrays of shape (S,). The tokens scored are those that were drawn, at
    temperature 1 over the whole vocabulary, by the no-gradient fused head.
    """
    dataset = LoLDataset(
        [s.prompt_ids + s.completion_ids for s in samples],
        [len(s.prompt_ids) for s in samples],
        [Record("", s.text) for s in samples],
    )
    logps = score_logps(model, dataset, pad_token_id=0, batch_size=batch_size)
    sums = np.array([float(row.double().sum()) for row in logps])
    return sums, np.array([len(row) for row in logps], dtype=np.int64)
