"""Reward functions and the judge: text in, one float per completion out.

A reward function has the form `f(prompts, completions, **columns) -> list[float]`, TRL's: prompts
and completions are strings or conversational message lists, columns are the other columns of the
data. Nothing is imported, read or fetched before the first call.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from lolrl.data import Text
from lolrl.tokens import completion_text, prompt_text

RewardFunc = Callable[..., list[float]]


def full_texts(prompts: Sequence[Text], completions: Sequence[Text]) -> list[str]:
    """`prompt completion` as one text per pair, joined by one space where neither side has one.

    Raises ValueError where the two differ in number.
    """
    if len(prompts) != len(completions):
        raise ValueError(
            f"prompts and completions must pair up: got {len(prompts)} and {len(completions)}"
        )
    texts = []
    for prompt, completion in zip(
        map(prompt_text, prompts), map(completion_text, completions), strict=True
    ):
        glue = "" if not prompt or prompt[-1].isspace() or completion[:1].isspace() else " "
        texts.append(prompt + glue + completion)
    return texts


@functools.lru_cache(maxsize=1)
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError(
            "the vader reward needs vaderSentiment: pip install 'lolkernels[train]'"
        ) from error
    return SentimentIntensityAnalyzer()


def vader_reward(
    prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
) -> list[float]:
    """VADER compound sentiment of prompt + completion, in [-1, 1], one float per pair.

    The prompt is scored along because a negation may stand in it. Deterministic.
    Source: Hutto & Gilbert, "VADER", ICWSM 2014.
    """
    analyzer = _vader()
    return [analyzer.polarity_scores(t)["compound"] for t in full_texts(prompts, completions)]


def reward_by_name(name: str) -> RewardFunc:
    """The reward function called `name`: a built-in (`vader`) or `package.module:function`.

    The second form imports a module: take it from a command line, never from a data file.
    Raises ValueError where the name is unknown, the module is missing or it is not callable.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, separator, attribute = name.partition(":")
    if not separator or not module or not attribute:
        raise ValueError(
            f"unknown reward {name!r}: use one of {sorted(BUILT_IN)} or package.module:function"
        )
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"reward {name!r} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


class RidgeJudge:
    """Predicts human ratings of a text: ridge regression on TF-IDF of its words and word pairs.

    Fitted on human ratings alone and never used in training, it tells an improvement from reward
    hacking. A judge is itself a reward function: `judge(prompts, completions) -> list[float]`, in
    the unit of the ratings it was fitted to. `heldout_r` is its correlation with the ratings of a
    tenth of the texts kept out of a first fit (the second fit uses all of them).
    """

    def __init__(self, vectorizer: Any, regression: Any, heldout_r: float) -> None:
        self._vectorizer = vectorizer
        self._regression = regression
        self.heldout_r = heldout_r

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        ratings: Sequence[float],  # one per text
        *,
        penalty: float = 1.0,
        seed: int = 0,
    ) -> RidgeJudge:
        """Fit on `texts` and their `ratings`; `penalty` is the ridge's, `seed` draws the held-out
        tenth. Raises ValueError on fewer than 20 texts or a mismatch of the two."""
        if len(texts) != len(ratings) or len(texts) < 20:
            raise ValueError(
                f"texts and ratings must pair up and be at least 20: got {len(texts)} and "
                f"{len(ratings)}"
            )
        import numpy as np
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import Ridge

        def fitted(rows: Any) -> tuple[Any, Any]:
            # Punctuation is kept inside words ("don't"); single letters such as "a" are words.
            vectorizer = TfidfVectorizer(
                ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w[\w']*\b"
            )
            regression = Ridge(alpha=penalty)
            regression.fit(vectorizer.fit_transform([texts[i] for i in rows]), target[rows])
            return vectorizer, regression

        target = np.asarray(ratings, dtype=np.float64)
        order = np.random.default_rng(seed).permutation(len(texts))
        held, rest = order[: len(texts) // 10], order[len(texts) // 10 :]
        vectorizer, regression = fitted(rest)
        predicted = regression.predict(vectorizer.transform([texts[i] for i in held]))
        heldout_r = 0.0
        if predicted.std() > 0 and target[held].std() > 0:
            heldout_r = float(np.corrcoef(predicted, target[held])[0, 1])
        return cls(*fitted(order), heldout_r)

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float]:
        """The predicted rating of each prompt + completion."""
        if not completions:
            return []
        features = self._vectorizer.transform(full_texts(prompts, completions))
        return [float(rating) for rating in self._regression.predict(features)]


BUILT_IN: dict[str, RewardFunc] = {"vader": vader_reward}
