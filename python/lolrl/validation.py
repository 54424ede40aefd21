"""Evaluation during training: reward of generated responses, likelihood of the rows' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction

import lolkernels as lk
from lolrl.annotate import RewardFuncs, call_reward_funcs, shared_columns
from lolrl.collate import MODEL_INPUTS
from lolrl.config import LoLConfig
from lolrl.data import Record
from lolrl.tokens import LoLDataset, completion_text, prompt_text
from lolrl.value import evaluation_mode

ABOUT_COMPLETIONS = ("completion", "chosen", "rejected", "value", "advantage", "ref_logps")


def generated_rewards(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    reward_funcs: RewardFuncs,
    args: LoLConfig,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    *,
    messages: bool = False,
) -> dict[str, float]:
    """`reward` (mean), `reward_std` and `length` (words) of one generated response a prompt.

    With `messages` the reward functions see conversational rows as messages, not as text.
    """
    from lolrl.evaluate import generate

    completions = generate(
        model,
        tokenizer,
        [r.prompt for r in records],
        max_new_tokens=args.eval_max_new_tokens,
        temperature=args.eval_temperature,
        top_p=args.eval_top_p,
        seed=args.eval_seed,
        batch_size=args.per_device_eval_batch_size,
        max_prompt_length=args.max_prompt_length,
    )
    prompts = [prompt_text(r.prompt) for r in records]
    columns = shared_columns(records)
    # What the data says of its own completions does not describe the generated ones.
    for name in list(columns):
        stem = name.removesuffix("_chosen").removesuffix("_rejected")
        if stem in (*ABOUT_COMPLETIONS, *args.reward_columns):
            del columns[name]
    shown: list[tuple[Any, Any]] = list(zip(prompts, completions, strict=True))
    if messages:
        for i, record in enumerate(records):
            if not isinstance(record.prompt, str):
                shown[i] = record.prompt, [{"role": "assistant", "content": completions[i]}]
    values = call_reward_funcs(
        reward_funcs,
        [prompt for prompt, _ in shown],
        [completion for _, completion in shown],
        weights=args.reward_func_weights,
        columns=columns,
    )
    rewards = torch.tensor(values, dtype=torch.float64)
    metrics = {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std(unbiased=False)),
        "length": sum(len(completion_text(c).split()) for c in completions) / len(completions),
    }
    if compute_metrics is not None:
        prediction = EvalPrediction(
            predictions=completions,  # type: ignore[arg-type]
            label_ids=rewards.numpy(),
            inputs=prompts,  # type: ignore[arg-type]
        )
        metrics.update(compute_metrics(prediction))
    return metrics


def row_losses(
    model: Any,
    rows: LoLDataset,
    collate: Callable[..., dict[str, Tensor]],
    args: LoLConfig,
    objective: Callable[..., Tensor],
    needed: dict[str, str],
    options: dict[str, Any],
) -> dict[str, float]:
    """`nll` (nats per completion token), and `loss`, the objective's mean over rows.

    `loss` is left out where the rows do not have the objective's side inputs.
    """
    size, device = args.per_device_eval_batch_size, args.device
    known = {"ref_logps": rows.ref_logps, "advantages": rows.advantages, "rewards": rows.rewards}
    required = [name for name, kind in needed.items() if kind != "option"]
    groups = args.group_size
    with_loss = all(known.get(name) is not None for name in required)
    if with_loss and len(rows) % groups:
        raise ValueError(
            f"eval_dataset has {len(rows)} rows, which are no whole groups of {groups}"
        )
    nll = tokens = loss = 0.0
    with evaluation_mode(model):
        for start in range(0, len(rows), size):
            batch = collate([rows[i] for i in range(start, min(start + size, len(rows)))])
            batch = {name: value.to(device) for name, value in batch.items()}
            inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
            out = model(**inputs, temperature=args.temperature)
            nll -= float(out.logps.double().sum())
            tokens += out.seq.num_tokens
            if with_loss:
                mask = batch["completion_mask"]
                side = {n: batch[n][mask] if batch[n].dim() == 2 else batch[n] for n in required}
                stats = {
                    "logps": out.logps,
                    "lse": out.lse,
                    "entropy": out.entropy,
                    "max_logit": out.max_logit,
                    "target_logit": out.logps + out.lse,
                }
                seq = lk.Sequences.from_lengths(out.seq.lengths, group_size=groups)
                weights = torch.ones(seq.num_groups, device=device)
                found = lk.objectives.evaluate(objective, stats, seq, weights, side | options)
                loss += float(found.seq_loss.double().sum())
    metrics = {"nll": nll / tokens}
    if with_loss:
        metrics["loss"] = loss / (len(rows) // groups)
    return metrics
