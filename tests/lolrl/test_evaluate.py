"""Generation and the report: sampling against the model's own distribution, figures by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from lolrl.evaluate import EvalReport, bootstrap_interval, distinct, evaluate, generate
from lolrl.policies import lora
from lolrl.sampling import Sample, sample, sequence_logps
from lolrl.tokens import encode_prompt
from tests.lolrl.toys import make_llama

PROMPTS = ["the movie", "a", "nobody laughed , everybody", "it moves slowly but", "the"]


def words(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(c.split())) for c in completions]


# --- generation ---


def greedy_by_hand(model: Any, ids: list[int], count: int, end: int) -> list[int]:
    drawn: list[int] = []
    while len(drawn) < count and (not drawn or drawn[-1] != end):
        with torch.no_grad():
            drawn.append(int(model(torch.tensor([ids + drawn])).logits[0, -1].argmax()))
    return drawn


def test_greedy_is_the_argmax_whatever_the_padding(llama, tokenizer) -> None:
    llama.eval()
    for batch_size in (1, 2, 5):
        samples = sample(
            llama, tokenizer, PROMPTS, temperature=0.0, max_new_tokens=6, batch_size=batch_size
        )
        for prompt, drawn in zip(PROMPTS, samples, strict=True):
            ids = encode_prompt(tokenizer, prompt)
            assert drawn.prompt_ids == ids
            assert not any(mark in drawn.text for mark in ("<eos>", "<pad>", "<bos>"))
            assert drawn.completion_ids == greedy_by_hand(llama, ids, 6, tokenizer.eos_token_id)


def test_samples_follow_the_models_distribution(llama, tokenizer) -> None:
    ids = torch.tensor([encode_prompt(tokenizer, "the movie")])
    with torch.no_grad():
        p = llama(ids).logits[0, -1].double().softmax(-1)
    prompts = ["the movie"] * 4000
    drawn = sample(llama, tokenizer, prompts, max_new_tokens=1, batch_size=4000, seed=1)
    first = torch.tensor([s.completion_ids[0] for s in drawn])
    counts = torch.bincount(first, minlength=len(p)).double()
    # Six standard deviations of each count.
    bound = 6 * (4000 * p * (1 - p)).sqrt() + 1
    assert bool(((counts - 4000 * p).abs() <= bound).all())
    assert int((counts > 0).sum()) > 3


def test_top_p_keeps_the_smallest_set_that_reaches_it(llama, tokenizer) -> None:
    ids = torch.tensor([encode_prompt(tokenizer, "the movie")])
    with torch.no_grad():
        p, order = llama(ids).logits[0, -1].softmax(-1).sort(descending=True)
    size = int((p.cumsum(0) < 0.5).sum()) + 1
    drawn = sample(llama, tokenizer, ["the movie"] * 500, max_new_tokens=1, top_p=0.5, seed=2)
    assert {s.completion_ids[0] for s in drawn} == set(order[:size].tolist())


def test_the_seed_decides_and_nothing_else_is_touched(llama, tokenizer) -> None:
    llama.train()
    state, settings = torch.get_rng_state(), dict(llama.generation_config.to_dict())
    first = generate(llama, tokenizer, PROMPTS, max_new_tokens=8, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = sample(llama, tokenizer, PROMPTS, max_new_tokens=8, seed=3)
    assert [s.text for s in again] == first
    assert generate(llama, tokenizer, PROMPTS, max_new_tokens=8, seed=4) != first
    assert llama.training
    assert llama.generation_config.to_dict() == settings
    assert tokenizer.padding_side == "right"


def test_completions_stop_at_any_end_token(llama, tokenizer) -> None:
    free = sample(llama, tokenizer, PROMPTS, temperature=0.0, max_new_tokens=6)
    longest = max(free, key=lambda s: len(s.completion_ids))
    stop = longest.completion_ids[2]
    llama.generation_config.eos_token_id = [stop]
    drawn = sample(llama, tokenizer, PROMPTS, temperature=0.0, max_new_tokens=6)
    cut = drawn[free.index(longest)].completion_ids
    assert cut == longest.completion_ids[: longest.completion_ids.index(stop) + 1]


def test_long_prompts_keep_their_end(llama, tokenizer) -> None:
    (drawn,) = sample(llama, tokenizer, ["the movie was"], max_new_tokens=1, max_prompt_length=4)
    whole = encode_prompt(tokenizer, "the movie was")
    assert drawn.prompt_ids == [whole[0], *whole[-3:]]


def test_texts_have_no_special_tokens_and_are_in_order(llama, tokenizer) -> None:
    samples = sample(llama, tokenizer, PROMPTS, max_new_tokens=8, seed=3, batch_size=2)
    texts = generate(llama, tokenizer, PROMPTS, max_new_tokens=8, seed=3, batch_size=2)
    assert texts == [s.text for s in samples]
    assert [s.prompt_ids for s in samples] == [encode_prompt(tokenizer, p) for p in PROMPTS]
    assert not any("<eos>" in t or "<pad>" in t or "<bos>" in t for t in texts)


def test_messages_go_through_the_chat_template(chat_tokenizer) -> None:
    prompt = [{"role": "user", "content": "the movie"}]
    model = make_llama(len(chat_tokenizer))
    (drawn,) = sample(model, chat_tokenizer, [prompt], max_new_tokens=2)
    assert chat_tokenizer.decode(drawn.prompt_ids) == "<bos><|user|>the movie<eos><|assistant|>"


def test_peft_models_generate_and_score(llama, tokenizer) -> None:
    from peft import get_peft_model

    plain = generate(llama, tokenizer, PROMPTS, max_new_tokens=8)
    wrapped = get_peft_model(llama, lora(2))
    assert generate(wrapped, tokenizer, PROMPTS, max_new_tokens=8) == plain  # B starts at zero
    sums, counts = sequence_logps(wrapped, [Sample([0, 5], [6, 7, 1], "")])
    assert sums.shape == counts.shape == (1,)
    assert counts[0] == 3


def test_bad_options_are_named(llama, tokenizer) -> None:
    for options, cause in (
        ({"temperature": -0.5}, "temperature must be finite and >= 0"),
        ({"temperature": math.nan}, "temperature must be finite"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"max_new_tokens": 0}, "max_new_tokens and batch_size must be >= 1"),
        ({"batch_size": 0}, "max_new_tokens and batch_size must be >= 1"),
    ):
        with pytest.raises(ValueError, match=cause):
            generate(llama, tokenizer, PROMPTS, **options)


# --- scoring ---


def test_sequence_logps_are_those_of_the_full_softmax(llama, tokenizer) -> None:
    samples = sample(llama, tokenizer, PROMPTS, max_new_tokens=9, seed=5)
    expected = []
    for s in samples:
        ids = torch.tensor([s.prompt_ids + s.completion_ids])
        with torch.no_grad():
            logps = llama(ids).logits[0].double().log_softmax(-1)
        at = range(len(s.prompt_ids), ids.shape[1])
        expected.append(sum(float(logps[t - 1, ids[0, t]]) for t in at))
    for batch_size in (1, 3, 8):
        sums, counts = sequence_logps(llama, samples, batch_size=batch_size)
        np.testing.assert_allclose(sums, expected, rtol=0, atol=2e-5 * 9)
        assert counts.tolist() == [len(s.completion_ids) for s in samples]


# --- figures ---


def test_distinct_counts_word_ngrams_over_all_texts() -> None:
    texts = ["a b a b", "a b c", "a"]
    assert distinct(texts, 1) == 3 / 8
    assert distinct(texts, 2) == 3 / 5  # ab ba ab | ab bc
    assert distinct(texts, 3) == 3 / 3  # aba bab | abc
    assert distinct(["a"], 2) == 0.0


def test_bootstrap_interval_is_the_normal_one_for_many_values() -> None:
    values = np.random.default_rng(0).normal(0.3, 1.0, size=2000)
    low, high = bootstrap_interval(values, resamples=4000)
    error = values.std() / 2000**0.5
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert bootstrap_interval([2.0, 2.0]) == (2.0, 2.0)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    with pytest.raises(ValueError, match="values is empty"):
        bootstrap_interval([])


def reports(tokenizer: Any) -> tuple[EvalReport, EvalReport, Any, Any]:
    reference, policy = make_llama(len(tokenizer)), make_llama(len(tokenizer), seed=1)
    options: dict[str, Any] = {"reference": reference, "max_new_tokens": 10, "top_p": 1.0}
    baseline = evaluate(reference, tokenizer, PROMPTS, words, name="sft", **options)
    report = evaluate(
        policy, tokenizer, PROMPTS, words, name="p", baseline=baseline, judge=words, **options
    )
    return baseline, report, reference, policy


def test_report_figures_follow_from_its_samples(tokenizer) -> None:
    baseline, report, _, _ = reports(tokenizer)
    texts = [s["completion"] for s in report.samples]
    rewards = [float(len(t.split())) for t in texts]
    base = [float(len(s["completion"].split())) for s in baseline.samples]
    assert [s["prompt"] for s in report.samples] == PROMPTS
    assert [s["reward"] for s in report.samples] == rewards
    assert report.reward == pytest.approx(np.mean(rewards))
    assert (report.reward_low, report.reward_high) == bootstrap_interval(rewards)
    assert report.words == report.judge == report.reward
    # The reward counts words, so cutting to the baseline's length is a minimum.
    assert report.matched == pytest.approx(np.mean(np.minimum(rewards, base)))
    wins = [1.0 if r > b else 0.5 if r == b else 0.0 for r, b in zip(rewards, base, strict=True)]
    assert report.improved == pytest.approx(np.mean(wins))
    assert report.distinct == tuple(distinct(texts, n) for n in (1, 2, 3))
    assert report.unique == len(set(texts)) / len(texts)
    assert report.to_dict()["prompts"] == len(PROMPTS)
    assert "samples" not in report.to_dict()


def test_divergence_and_perplexity_are_those_of_the_samples(tokenizer) -> None:
    baseline, report, reference, policy = reports(tokenizer)
    assert baseline.divergence == pytest.approx(0.0, abs=1e-6)
    samples = sample(policy, tokenizer, PROMPTS, max_new_tokens=10)
    own, counts = sequence_logps(policy, samples)
    ref, _ = sequence_logps(reference, samples)
    assert report.divergence == pytest.approx((own - ref).mean(), abs=1e-6)
    assert report.divergence_per_token == pytest.approx((own - ref).sum() / counts.sum(), abs=1e-6)
    assert report.ppl_ref == pytest.approx(math.exp(-ref.sum() / counts.sum()), rel=1e-6)
    assert report.divergence > 0.1


def test_divergence_estimates_the_kl(llama, tokenizer) -> None:
    """With one token a completion, KL(pi || pi_ref) is a finite sum."""
    policy = make_llama(len(tokenizer), seed=1)
    ids = torch.tensor([encode_prompt(tokenizer, "the")])
    with torch.no_grad():
        p = policy(ids).logits[0, -1].double().log_softmax(-1)
        q = llama(ids).logits[0, -1].double().log_softmax(-1)
    ratio, probability = p - q, p.exp()
    kl = float((probability * ratio).sum())
    deviation = float((probability * (ratio - kl) ** 2).sum().sqrt())
    options: dict[str, Any] = {"max_new_tokens": 1, "top_p": 1.0, "batch_size": 3000}
    options |= {"reference": llama, "resamples": 10}
    report = evaluate(policy, tokenizer, ["the"] * 3000, words, **options)
    assert kl > 0.1
    assert report.divergence == pytest.approx(kl, abs=5 * deviation / 3000**0.5)


def test_what_was_not_given_is_none(llama, tokenizer) -> None:
    report = evaluate(llama, tokenizer, PROMPTS, words, max_new_tokens=2)
    assert report.matched is report.judge is report.improved is None
    assert report.ppl_ref is report.divergence is None


def test_bad_inputs_are_named(llama, tokenizer) -> None:
    with pytest.raises(ValueError, match="prompts is empty"):
        evaluate(llama, tokenizer, [], words)
    baseline = evaluate(llama, tokenizer, PROMPTS, words, max_new_tokens=2)
    with pytest.raises(ValueError, match="other prompts"):
        evaluate(llama, tokenizer, PROMPTS[:2], words, baseline=baseline)
    with pytest.raises(ValueError, match="returned 1 values for 5"):
        evaluate(llama, tokenizer, PROMPTS, lambda p, c: [0.0], max_new_tokens=2)
