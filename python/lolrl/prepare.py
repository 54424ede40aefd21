"""What a training run needs before its first step: objective, options, rows."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lolkernels as lk
from lolrl.annotate import RewardFuncs, annotate
from lolrl.config import AnnotateConfig, ConfigError, LoLConfig
from lolrl.data import Record, read_prompts, read_records
from lolrl.tokens import LoLDataset, as_dataset

Objective = Callable[..., Tensor]
COLUMNS = {"ref_logps": "token", "advantages": "sequence", "rewards": "sequence"}
FITTING = {(held, asked) for held in ("token", "sequence") for asked in (held, "tensor")}


def check_reward_funcs(reward_funcs: RewardFuncs | None, args: LoLConfig) -> None:
    """Fail before training, not at the first evaluation.

    Raises:
        TypeError: an entry is not callable.
        ValueError: the number of weights is not the number of functions.
    """
    if reward_funcs is None:
        return
    functions = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
    for function in functions:
        if not callable(function):
            raise TypeError(f"reward_funcs holds {function!r}, which is not callable")
    weights = args.reward_func_weights
    if not functions or (weights is not None and len(weights) != len(functions)):
        raise ValueError(
            f"reward_func_weights={weights!r} does not fit {len(functions)} reward_funcs; give one "
            "weight for each function"
        )


def wrap_peft(model: Any, peft_config: Any, args: LoLConfig) -> Any:
    """`peft.get_peft_model(model, peft_config)`.

    Raises:
        ImportError: peft is not installed.
        ValueError: the model is a PEFT model already.
    """
    try:
        from peft import PeftModel, get_peft_model
    except ImportError as error:
        raise ImportError("peft_config needs peft; pip install peft") from error
    if isinstance(model, PeftModel):
        raise ValueError(
            "peft_config is given, but model is a PeftModel already; give one of the two"
        )
    if args.gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
        # Checkpointed blocks of a frozen trunk would otherwise see no input that needs a gradient.
        model.enable_input_require_grads()
    # The adapter's first weights follow the seed, not whatever was drawn before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        return get_peft_model(model, peft_config)


def resolve_objective(args: LoLConfig, objective: Objective | None) -> tuple[str, Objective]:
    """Name and function: `args.objective`, or a callable, whose name gets the prefix `custom:`."""
    if objective is None:
        return args.objective, lk.objectives.REGISTRY[args.objective]
    if not callable(objective):
        raise TypeError(
            f"objective is a {type(objective).__name__}; give a callable, or args.objective"
        )
    inner = objective.func if isinstance(objective, functools.partial) else objective
    name = getattr(inner, "__name__", type(inner).__name__)
    known = lk.objectives.REGISTRY.get(name) is inner
    return (name if known else f"custom:{name}"), objective


def objective_options(args: LoLConfig, needed: dict[str, str], name: str) -> dict[str, Any]:
    """The options that the user has set: clip, beta and floor, then `objective_args`.

    The others keep the objective's own defaults.

    Raises:
        ConfigError: an option that the objective does not have.
    """
    known = [n for n, kind in needed.items() if kind == "option"]
    set_here = {n: getattr(args, n) for n in ("clip", "beta", "floor")}
    options = {n: value for n, value in set_here.items() if value != "auto"}
    for source, given in (("", options), ("objective_args: ", args.objective_args or {})):
        for key in given:
            if key not in known:
                has = ", ".join(known) or "none"
                raise ConfigError(f"{source}{name} has no option {key!r} (options: {has})")
    return options | (args.objective_args or {})


def resolve_auto(
    args: LoLConfig, objective: Objective, options: dict[str, Any], *, has_rewards: bool
) -> None:
    """Replace "auto" by what it means for this objective, so that the echoed file says it."""
    declared = lk.objectives.traits(objective)
    if args.sampling == "auto":
        args.sampling = declared.sampling
    if args.advantage_filter == "auto":
        args.advantage_filter = "positive" if declared.positive_only else "none"
    used = lk.objectives.defaults(objective) | options
    for name in ("clip", "beta", "floor"):
        value = used.get(name, "auto")
        if isinstance(value, (int, float)) or (value is None and name == "clip"):
            setattr(args, name, value)
    if args.metric_for_best_model is None and args.eval_strategy != "no":
        args.metric_for_best_model = "reward" if has_rewards else "nll"
        args.greater_is_better = has_rewards


def check_columns(needed: dict[str, str], name: str) -> None:
    """Refuse an objective that needs what no row holds.

    Raises:
        ConfigError: naming the input.
    """
    for column, kind in needed.items():
        if kind != "option" and (COLUMNS.get(column), kind) not in FITTING:
            raise ConfigError(
                f"objective {name} needs {column} (per {kind}), and rows hold "
                f"{', '.join(f'{c} (per {k})' for c, k in COLUMNS.items())}: give a data_collator "
                "that adds it, or choose another objective"
            )


def check_groups(dataset: LoLDataset, args: LoLConfig) -> None:
    """Refuse rows that do not come in whole groups of one prompt each.

    Raises:
        ConfigError: the objective's recipe draws single rows.
        DataError: naming the row that is torn from its group.
    """
    size = args.group_size
    if size == 1:
        return
    if args.sampling == "advantage" or args.advantage_filter == "positive":
        raise ConfigError(
            f"group_size={size}: the objective's recipe filters and draws single rows; set "
            "sampling='uniform' and advantage_filter='none', or choose another objective"
        )
    for start in range(0, len(dataset), size):
        group = dataset.records[start : start + size]
        for record in group:
            if record.prompt != group[0].prompt:
                how = f"give {size} consecutive rows of one prompt, best first"
                raise record.error("prompt", f"differs from that of its group of {size}", how)
        if len(group) < size:
            how = f"give {size} consecutive rows per prompt"
            raise group[-1].error("prompt", f"stands in a group of {len(group)} rows", how)


def warn_of_negative_rewards(
    objective: Objective, needed: dict[str, str], options: dict[str, Any], dataset: LoLDataset
) -> None:
    """Warn once where the objective pushes rows' likelihood down without a bound."""
    family = lk.objectives.traits(objective).family
    if family is not None:
        columns = {n: getattr(dataset, n) for n in ("rewards", "advantages") if n in needed}
        seq = lk.Sequences.from_lengths(dataset.completion_lengths)
        given = lk.objectives.defaults(objective) | options | columns
        lk.objectives.warn_unlearned(objective, family(seq=seq, **given))


def training_rows(
    model: Any,
    ref_model: Any,
    tokenizer: Any,
    data: Any,
    args: LoLConfig,
    needed: dict[str, str],
    name: str,
) -> tuple[LoLDataset, dict[str, Any]]:
    """The rows that will be drawn from, and a report of how many they are.

    Rows without `ref_logps` are scored by `ref_model`, or by the model as it is, if the objective
    needs them; the scores are cached in `args.cache_dir`, by default in the output folder.

    Raises:
        ValueError: the rows lack what the objective, the filter or the sampler needs.
    """
    dataset = as_dataset(data, tokenizer, model, args)
    if "ref_logps" in needed and dataset.ref_logps is None:
        config = AnnotateConfig(
            max_prompt_length=args.max_prompt_length,
            max_completion_length=args.max_completion_length,
            reward_columns=args.reward_columns,
            reward_weights=args.reward_weights,
            on_bad=args.on_bad,
            keep="all",
            temperature=args.temperature,
            autocast="bf16" if args.bf16 else "fp16" if args.fp16 else None,
            batch_size=2 * args.per_device_train_batch_size,
            backend=args.backend,
            memory_budget=args.memory_budget,
            cache_dir=args.cache_dir or str(Path(args.output_dir) / "annotations"),
            stale_cache=args.stale_cache,
        )
        reference = (model if ref_model is None else ref_model).to(args.device)
        scored = annotate(
            reference, tokenizer, dataset, config=config, progress=not args.disable_tqdm
        )
        dataset = dataset.with_columns(ref_logps=scored.dataset.ref_logps)
    if dataset.advantages is None and dataset.rewards is not None and dataset.values is not None:
        dataset = dataset.with_columns(advantages=dataset.rewards - dataset.values)
    for column, how in (
        ("rewards", "give every row a reward"),
        (
            "advantages",
            "annotate the rows with a value head, or give every row a reward and a value",
        ),
    ):
        if column in needed and getattr(dataset, column) is None:
            missing = (r for r in dataset.records if getattr(r, column[:-1]) is None)
            record = next(missing, dataset.records[0])
            raise record.error(column[:-1], f"is missing, and {name} needs {column}", how)
    total = len(dataset)
    if args.advantage_filter == "positive":
        if dataset.advantages is None:
            raise ValueError(
                "advantage_filter='positive' needs advantages; annotate the rows, or set it to "
                "'none'"
            )
        keep = (dataset.advantages > 0).nonzero().flatten().tolist()
        if not keep:
            raise ValueError(
                "train_dataset has no row with a positive advantage; check rewards and value "
                "head, or set advantage_filter='none'"
            )
        dataset = dataset.select(keep)
    if args.sampling == "advantage" and dataset.advantages is None:
        raise ValueError(
            "sampling='advantage' needs advantages; annotate the rows, or set it to 'uniform'"
        )
    return dataset, {
        "rows": total,
        "rows_kept": len(dataset),
        "share_kept": len(dataset) / total,
        "rows_skipped": len(dataset.skipped),
    }


def evaluation_rows(
    model: Any, tokenizer: Any, data: Any, args: LoLConfig, *, has_rewards: bool
) -> tuple[list[Record], LoLDataset | None]:
    """Prompts to generate from, and the tokenised rows if all of them have completions.

    Raises:
        TypeError: `data` is a mapping of several sets.
        ValueError: neither completions to score nor reward functions to score responses with.
    """
    limit = args.eval_prompts
    if isinstance(data, dict):
        raise TypeError("eval_dataset is a mapping; give one set of rows")
    if isinstance(data, LoLDataset):
        rows = data if limit is None else data.select(range(min(limit, len(data))))
        return list(rows.records), rows
    if not isinstance(data, (str, os.PathLike)) and not hasattr(data, "__len__"):
        data = list(data)
    records = list(read_prompts(data, on_bad=args.on_bad))[:limit]
    scored: LoLDataset | None = None
    if all({"completion", "chosen"} & r.columns.keys() for r in records):
        completions = read_records(
            data,
            reward_columns=args.reward_columns,
            reward_weights=args.reward_weights,
            on_bad=args.on_bad,
        )
        if limit is not None:
            del completions[limit:]
        scored = as_dataset(completions, tokenizer, model, args)
    if scored is None and not has_rewards:
        raise ValueError(
            "eval_dataset holds prompts only, and reward_funcs is missing; give one to score the "
            "generated responses, or rows with completions"
        )
    return records, scored
