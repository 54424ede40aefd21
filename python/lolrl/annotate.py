"""What the frozen reference says about fixed data, computed once: log-probs, values, advantages.

For each row: `ref_logps` per completion token by the fused no-gradient kernel, the reward (from the
data or from reward functions), V(x) by a value head, and the advantage A = R - V(x).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import lolkernels as lk
from lolrl import cache
from lolrl.cache import StaleCacheError
from lolrl.collate import LoLCollator
from lolrl.config import AnnotateConfig
from lolrl.files import canonical_json, sha256_text
from lolrl.tokens import LoLDataset, as_dataset, completion_text, prompt_text
from lolrl.value import ValueHead, evaluation_mode, predict_values

RewardFuncs = Callable[..., Sequence[float]] | Sequence[Callable[..., Sequence[float]]]


@dataclass
class Annotated:
    """Annotated rows and how they came about.

    dataset: the kept rows, with `ref_logps`, and `rewards`, `values`, `advantages` where known.
    report: num_rows, num_kept, share_kept, num_skipped, means of reward, value and advantage over
    all rows (None where unknown), `cache` ("hit", "built" or "off"), `key` (its hash), seconds.
    """

    dataset: LoLDataset
    report: dict[str, Any]


def call_reward_funcs(
    reward_funcs: RewardFuncs,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> list[float]:
    """sum_i weights[i] * f_i(prompts, completions, **columns), one float a completion.

    Raises:
        ValueError: a function returns another number of rewards, or one that is not finite; or the
            number of weights is not the number of functions.
        TypeError: a function is not callable or returns something else than numbers.
    """
    functions = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if not functions or len(weights) != len(functions):
        raise ValueError(
            f"reward_func_weights has {len(weights)} entries for {len(functions)} reward_funcs; "
            "give one weight for each function"
        )
    total = [0.0] * len(completions)
    for function, weight in zip(functions, weights, strict=True):
        name = getattr(function, "__name__", type(function).__name__)
        if not callable(function):
            raise TypeError(f"reward_funcs holds a {name}, which is not callable")
        values = list(function(prompts, completions, **(columns or {})))
        if len(values) != len(completions):
            raise ValueError(
                f"reward function {name} returned {len(values)} values for {len(completions)} "
                "completions; return one float for each"
            )
        for i, value in enumerate(values):
            try:
                number = float(value)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"reward function {name} returned {value!r} for completion {i}; return a float"
                ) from error
            if not math.isfinite(number):
                raise ValueError(
                    f"reward function {name} returned {number} for completion {i}; "
                    "return a finite float"
                )
            total[i] += weight * number
    return total


def shared_columns(records: Sequence[Any]) -> dict[str, list[Any]]:
    """The further columns that every record has, as lists in the order of the records."""
    if not records:
        return {}
    names = set(records[0].columns).intersection(*(r.columns for r in records[1:]))
    reserved = {"prompts", "completions"}
    return {name: [r.columns[name] for r in records] for name in sorted(names - reserved)}


def score_logps(
    model: nn.Module,
    dataset: LoLDataset,
    *,
    pad_token_id: int,
    batch_size: int = 16,
    temperature: float = 1.0,
    autocast: str | None = None,
    backend: str | None = None,
    memory_budget: int | None = None,
    progress: bool = False,
) -> list[Tensor]:
    """log p(y_t | x, y_<t) of every completion token of every row, without gradient or logits.

    The model is fused in place (`lolkernels.fuse_lm_head`), scored in eval mode, and left in the
    mode it was in. `autocast` is None, "bf16" or "fp16".

    Returns:
        n tensors (completion length,), float32 nats on the CPU, in the dataset's order.
    """
    fused = lk.fuse_lm_head(model, backend=backend, memory_budget=memory_budget)
    device = next(model.parameters()).device
    collate = LoLCollator(pad_token_id)
    lengths = dataset.lengths.tolist()
    order = sorted(range(len(dataset)), key=lambda i: (-lengths[i], i))
    result: list[Tensor] = [torch.empty(0)] * len(dataset)
    bar = tqdm(total=len(order), desc="score", unit="row", disable=not progress, leave=False)
    dtype = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}[autocast]
    mixed = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    with evaluation_mode(model), mixed, bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = collate([dataset[i] for i in rows])
            out = fused(
                temperature=temperature,
                **{
                    name: batch[name].to(device)
                    for name in ("input_ids", "attention_mask", "position_ids", "completion_mask")
                },
            )
            logps = out.logps.float().cpu()
            parts = logps.split(batch["completion_mask"].sum(1).tolist())
            for i, part in zip(rows, parts, strict=True):
                result[i] = part.clone()
            bar.update(len(rows))
    return result


def cache_key(
    model: nn.Module,
    tokenizer: Any,
    dataset: LoLDataset,
    config: AnnotateConfig,
    *,
    value_head: ValueHead | None = None,
    reward_funcs: RewardFuncs | None = None,
) -> dict[str, Any]:
    """Everything that determines the annotations of `dataset`, field by field.

    Not in it, since the result does not depend on them: batch size, memory budget, progress, where
    files are, the name of the data file, and whether rows without advantage are kept.
    """
    functions = [] if reward_funcs is None else reward_funcs
    functions = [functions] if callable(functions) else list(functions)
    records = [[r.prompt, r.completion, r.reward, r.value, r.advantage] for r in dataset.records]
    given = {
        name: column
        for name, column in (
            ("rewards", dataset.rewards),
            ("values", dataset.values),
            ("advantages", dataset.advantages),
        )
        if column is not None
    }
    tokens = cache.tensors_digest(
        {"ids": dataset.ids, "offsets": dataset.offsets, "prompt_lengths": dataset.prompt_lengths}
    )
    columns = shared_columns(dataset.records) if functions else {}
    return {
        **cache.versions_key(),
        **cache.model_key(model),
        **cache.tokenizer_key(tokenizer),
        "rows": sha256_text(canonical_json([records, cache.tensors_digest(given)])),
        "columns": sha256_text(repr(sorted(columns.items()))),
        "tokens": tokens,
        "num_rows": len(dataset),
        "max_prompt_length": config.max_prompt_length,
        "max_completion_length": config.max_completion_length,
        "truncation": "keep_end",
        "temperature": float(config.temperature),
        "autocast": config.autocast,
        "backend": config.backend,
        "reward_columns": list(config.reward_columns),
        "reward_weights": None if config.reward_weights is None else list(config.reward_weights),
        "reward_funcs": [cache.function_key(f) for f in functions],
        "reward_func_weights": config.reward_func_weights,
        "value_head": None if value_head is None else cache.tensors_digest(value_head.state_dict()),
        "value_config": None if value_head is None else canonical_json(asdict(value_head.config)),
    }


def annotate(
    model: nn.Module,
    tokenizer: Any,
    data: Any,
    *,
    value_head: ValueHead | None = None,
    reward_funcs: RewardFuncs | None = None,
    config: AnnotateConfig | None = None,
    progress: bool = True,
) -> Annotated:
    """Score fixed data with the frozen reference and turn rewards into advantages.

    Rewards of the data win; `reward_funcs` fill in where a row has none. V(x) is the row's `value`,
    else the value head's. An `advantage` in the data is taken as it is, else A = R - V(x). Without
    value head and values there are no advantages, and every row is kept.

    With `config.cache_dir`, a second call with the same inputs reads the result back.

    Raises:
        StaleCacheError: the cache was made by other inputs, which it names.
        DataError: a malformed row; a reference log-prob or an advantage that is not finite.
    """
    config = config or AnnotateConfig()
    started = time.monotonic()
    dataset = as_dataset(data, tokenizer, model, config)
    arrays: dict[str, Tensor] | None = None
    status, key = "off", None
    if config.cache_dir is not None:
        key = cache_key(
            model, tokenizer, dataset, config, value_head=value_head, reward_funcs=reward_funcs
        )
        try:
            arrays = cache.load(config.cache_dir, key)
        except StaleCacheError:
            if config.stale_cache != "rebuild":
                raise
        status = "built" if arrays is None else "hit"
    if arrays is None:
        arrays = _compute(model, tokenizer, dataset, value_head, reward_funcs, config, progress)
        if key is not None and config.cache_dir is not None:
            cache.save(config.cache_dir, key, arrays)
    counts = dataset.completion_lengths.tolist()
    whole = dataset.with_columns(
        ref_logps=list(arrays["ref_logps"].split(counts)),
        rewards=arrays.get("rewards"),
        values=arrays.get("values"),
        advantages=arrays.get("advantages"),
    )
    kept = whole
    if config.keep == "positive" and whole.advantages is not None:
        positive = (whole.advantages > 0).nonzero().flatten().tolist()
        if not positive:
            raise dataset.records[0].error(
                "reward", "of no row exceeds its value", "check the rewards and the value head"
            )
        kept = whole.select(positive)
    report = {
        "num_rows": len(whole),
        "num_kept": len(kept),
        "share_kept": len(kept) / len(whole),
        "num_skipped": len(whole.skipped),
        **{
            f"{name}_mean": None if column is None else float(column.mean())
            for name, column in (
                ("reward", whole.rewards),
                ("value", whole.values),
                ("advantage", whole.advantages),
            )
        },
        "cache": status,
        "key": None if key is None else cache.key_hash(key),
        "seconds": time.monotonic() - started,
    }
    return Annotated(kept, report)


def _compute(
    model: nn.Module,
    tokenizer: Any,
    dataset: LoLDataset,
    value_head: ValueHead | None,
    reward_funcs: RewardFuncs | None,
    config: AnnotateConfig,
    progress: bool,
) -> dict[str, Tensor]:
    records = dataset.records
    for name in ("value", "advantage"):
        given = [getattr(r, name) is not None for r in records]
        if any(given) and not all(given):
            raise records[given.index(False)].error(
                name, "is missing, but other rows have it", "give it in every row, or in none"
            )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    logps = score_logps(
        model,
        dataset,
        pad_token_id=pad,
        batch_size=config.batch_size,
        temperature=config.temperature,
        autocast=config.autocast,
        backend=config.backend,
        memory_budget=config.memory_budget,
        progress=progress,
    )
    for record, row in zip(records, logps, strict=True):
        if not bool(torch.isfinite(row).all()):
            raise record.error(
                "completion",
                f"has log-prob {float(row[~torch.isfinite(row)][0])} under the reference",
                "check the reference's weights; a token it gives probability 0 cannot be used",
            )
    arrays = {"ref_logps": torch.cat(logps)}
    rewards = _rewards(dataset, reward_funcs, config)
    if rewards is not None:
        arrays["rewards"] = rewards
    if dataset.values is not None:
        arrays["values"] = dataset.values
    elif value_head is not None:
        arrays["values"] = predict_values(
            value_head,
            model,
            tokenizer,
            [r.prompt for r in records],
            max_prompt_length=config.max_prompt_length,
            batch_size=config.batch_size,
        )
    if dataset.advantages is not None:
        arrays["advantages"] = dataset.advantages
    elif rewards is not None and "values" in arrays:
        arrays["advantages"] = rewards - arrays["values"]
    for name in ("values", "advantages"):
        if name in arrays and not bool(torch.isfinite(arrays[name]).all()):
            bad = int((~torch.isfinite(arrays[name])).nonzero()[0])
            raise records[bad].error(
                name[:-1], f"is {float(arrays[name][bad])}", "fit the value head again"
            )
    return arrays


def _rewards(
    dataset: LoLDataset, reward_funcs: RewardFuncs | None, config: AnnotateConfig
) -> Tensor | None:
    if dataset.rewards is not None:
        return dataset.rewards
    records = dataset.records
    missing = [i for i, r in enumerate(records) if r.reward is None]
    if reward_funcs is None:
        if len(missing) < len(records):
            raise records[missing[0]].error(
                config.reward_columns[0],
                "is missing",
                "give every row a reward, or a reward function",
            )
        return None
    rows = [records[i] for i in missing]
    computed = call_reward_funcs(
        reward_funcs,
        [prompt_text(r.prompt) for r in rows],
        [completion_text(r.completion) for r in rows],
        weights=config.reward_func_weights,
        columns=shared_columns(rows),
    )
    rewards = [r.reward if r.reward is not None else 0.0 for r in records]
    for i, value in zip(missing, computed, strict=True):
        rewards[i] = value
    return torch.tensor(rewards, dtype=torch.float64)
