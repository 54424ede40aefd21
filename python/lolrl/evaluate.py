"""Report how good, how varied and how far from its reference a policy's text is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lolrl.annotate import call_reward_funcs
from lolrl.data import Text
from lolrl.rewards import RewardFunc
from lolrl.sampling import generate, sample, sequence_logps
from lolrl.tokens import prompt_text

__all__ = ["EvalReport", "bootstrap_interval", "distinct", "evaluate", "generate"]


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct-n: different word n-grams over all word n-grams of all texts, 0 where none is."""
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        words = text.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0


def bootstrap_interval(
    values: Sequence[float], *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`, resampled as whole prompts."""
    data = np.asarray(values, dtype=np.float64)
    if not data.size:
        raise ValueError("values is empty: a mean needs at least one")
    draws = np.random.default_rng(seed).integers(0, data.size, size=(resamples, data.size))
    tail = 50 * (1 - level)
    low, high = np.percentile(data[draws].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class EvalReport:
    """What `evaluate` measures, over one completion for each prompt.

    reward, reward_low, reward_high: mean reward with its 95% bootstrap interval over prompts.
    matched, matched_low, matched_high: the same with each completion cut to at most as many words
    as the baseline's completion of the same prompt.
    judge: mean of the judge.
    improved: share of prompts with a reward above the baseline's, ties counting half (0.5 is no
    difference).
    distinct: distinct-1, -2, -3 over words. words: mean length. unique: share of different
    completions.
    ppl_ref: perplexity of the completions under the reference, per token.
    divergence: mean over completions of log pi - log pi_ref, in nats per sequence, at temperature
    1; it estimates KL(pi || pi_ref) where completions are drawn at temperature 1 and top_p 1.
    divergence_per_token: the same in nats per token.
    None: the input that a figure needs was not given.
    """

    name: str
    prompts: int
    seed: int
    reward: float
    reward_low: float
    reward_high: float
    matched: float | None
    matched_low: float | None
    matched_high: float | None
    judge: float | None
    improved: float | None
    distinct: tuple[float, float, float]
    words: float
    unique: float
    ppl_ref: float | None
    divergence: float | None
    divergence_per_token: float | None
    samples: list[dict[str, Any]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the samples, ready for JSON."""
        row = dataclasses.asdict(self)
        del row["samples"]
        return row


def evaluate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    reward_func: RewardFunc,
    *,
    name: str = "model",
    reference: Any = None,
    baseline: EvalReport | None = None,
    judge: RewardFunc | None = None,
    columns: dict[str, list[Any]] | None = None,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    top_p: float = 0.9,
    seed: int = 0,
    batch_size: int = 100,
    max_prompt_length: int | None = None,
    progress: bool = False,
    resamples: int = 2000,
) -> EvalReport:
    """Sample one completion for each prompt and measure it: see `EvalReport` for every figure.

    reference: the frozen reference model (for perplexity and divergence). baseline: the report of
    the reference on the same prompts (for `improved` and `matched`). columns: further columns of
    the prompts, handed to reward_func and judge. The rest as in `generate`.

    Raises ValueError where prompts are empty, or baseline is a report on other prompts.
    """
    if not prompts:
        raise ValueError("prompts is empty: give at least one")
    if baseline is not None and [s["prompt"] for s in baseline.samples] != list(prompts):
        raise ValueError("baseline was measured on other prompts: evaluate it on these first")
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
    texts = [s.text for s in samples]
    questions = [prompt_text(prompt) for prompt in prompts]
    rewards = call_reward_funcs(reward_func, questions, texts, columns=columns)
    ratings = (
        call_reward_funcs(judge, questions, texts, columns=columns) if judge is not None else None
    )

    improved = matched = matched_low = matched_high = None
    if baseline is not None:
        wins = [
            1.0 if r > s["reward"] else 0.5 if r == s["reward"] else 0.0
            for r, s in zip(rewards, baseline.samples, strict=True)
        ]
        improved = sum(wins) / len(wins)
        cut = [
            _first_words(text, len(s["completion"].split()))
            for text, s in zip(texts, baseline.samples, strict=True)
        ]
        cut_rewards = call_reward_funcs(reward_func, questions, cut, columns=columns)
        matched = float(np.mean(cut_rewards))
        matched_low, matched_high = bootstrap_interval(cut_rewards, resamples=resamples)

    ppl_ref = divergence = per_token = None
    if reference is not None:
        own, counts = sequence_logps(model, samples, batch_size=batch_size)
        ref, _ = sequence_logps(reference, samples, batch_size=batch_size)
        tokens = max(1, int(counts.sum()))
        ppl_ref = math.exp(-float(ref.sum()) / tokens)
        divergence = float((own - ref).mean())
        per_token = float((own - ref).sum()) / tokens

    low, high = bootstrap_interval(rewards, resamples=resamples)
    rows = [
        {"prompt": prompt, "completion": text, "reward": reward}
        for prompt, text, reward in zip(prompts, texts, rewards, strict=True)
    ]
    for row, rating in zip(rows, ratings or [], strict=False):
        row["judge"] = rating
    return EvalReport(
        name=name,
        prompts=len(prompts),
        seed=seed,
        reward=float(np.mean(rewards)),
        reward_low=low,
        reward_high=high,
        matched=matched,
        matched_low=matched_low,
        matched_high=matched_high,
        judge=None if ratings is None else float(np.mean(ratings)),
        improved=improved,
        distinct=(distinct(texts, 1), distinct(texts, 2), distinct(texts, 3)),
        words=float(np.mean([len(text.split()) for text in texts])),
        unique=len(set(texts)) / len(texts),
        ppl_ref=ppl_ref,
        divergence=divergence,
        divergence_per_token=per_token,
        samples=rows,
    )


def _first_words(text: str, count: int) -> str:
    """The first `count` words, with the space before the first one kept."""
    head = " " if text[:1].isspace() else ""
    return head + " ".join(text.split()[:count])
