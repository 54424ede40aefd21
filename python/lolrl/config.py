"""Configuration of every stage, as dataclasses whose fields explain themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available

import lolkernels as lk
from lolrl.configfile import (
    ConfigError,
    dump_config,
    from_mapping,
    load_config,
    load_yaml,
    to_mapping,
)

__all__ = [
    "AnnotateConfig",
    "ConfigError",
    "LoLConfig",
    "ValueConfig",
    "dump_config",
    "from_mapping",
    "load_config",
    "load_yaml",
    "to_mapping",
]


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _choice(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(str, allowed))}")


def _positive(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise unless `value` is a finite number above zero (or at zero, if `zero`)."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and not zero):
        bound = ">= 0" if zero else "> 0"
        raise ConfigError(f"{name}={value!r} must be a finite number {bound}")


def _number_or_auto(name: str, value: Any) -> Any:
    """`value`, a number in place of its text (YAML 1.1 reads 1e-4 as a string)."""
    if isinstance(value, (bool, list, dict)) or (value is None and name != "clip"):
        raise ConfigError(f"{name}={value!r} must be a number, or auto: the objective's own")
    if not isinstance(value, str) or value == "auto":
        return value
    try:
        return float(value)
    except ValueError:
        raise ConfigError(
            f"{name}={value!r} must be a number, or auto: the objective's own"
        ) from None


def _check_rewards(
    columns: list[str], weights: list[float] | None, functions: list[float] | None
) -> None:
    if not columns or not all(isinstance(c, str) and c for c in columns):
        raise ConfigError(f"reward_columns={columns!r} must be a list of at least one column name")
    if len(set(columns)) != len(columns):
        raise ConfigError(f"reward_columns={columns!r} names a column twice")
    if weights is not None and (
        len(weights) != len(columns) or not all(math.isfinite(w) for w in weights)
    ):
        raise ConfigError(
            f"reward_weights={weights!r} must hold one finite weight for each of {columns!r}"
        )
    if functions is not None and not all(math.isfinite(w) for w in functions):
        raise ConfigError(f"reward_func_weights={functions!r} must hold finite weights")


@dataclass
class LoLConfig(TrainingArguments):
    """Arguments of `LoLTrainer`: those of `transformers.TrainingArguments` and the ones below.

    Three defaults of the base class differ: `logging_steps` is 10, `report_to` is TensorBoard where
    it is installed, and columns are never dropped (`remove_unused_columns=False`), because the
    objective's side inputs are columns.

    Raises:
        ConfigError: (a `ValueError`) for a value out of range, naming the field.
    """

    logging_steps: float = field(
        default=10, metadata=_help("Log the metrics every this many updates.")
    )
    report_to: str | list[str] | None = field(
        default="auto",
        metadata=_help(
            "Where log lines go beside console and metrics.jsonl; auto: TensorBoard if installed."
        ),
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata=_help("Must stay False: the side inputs of the objective are columns."),
    )
    objective: str = field(
        default="a_lol",
        metadata=_help(
            f"The loss: {', '.join(lk.objectives.REGISTRY)}. A callable goes to LoLTrainer."
        ),
    )
    objective_args: dict[str, Any] | None = field(
        default=None, metadata=_help("Further options of the objective, by parameter name.")
    )
    clip: float | str | None = field(
        default="auto",
        metadata=_help(
            "eps of the ratio's bounds [1 - eps, 1 + eps]; null: no clip; 0 is refused; auto: the "
            "objective's own (0.9 for A-LoL)."
        ),
    )
    beta: float | str = field(
        default="auto",
        metadata=_help("Weight of a KL term, or scale of a preference; auto: the objective's own."),
    )
    floor: float | str = field(
        default="auto",
        metadata=_help("Lower bound of r_gold's token probability; auto: the objective's own."),
    )
    group_size: int = field(
        default=1,
        metadata=_help(
            "Consecutive rows that one loss value couples: 2 for pairs (a chosen/rejected row is "
            "one), K for ranked lists, best first."
        ),
    )
    temperature: float = field(
        default=1.0, metadata=_help("Divides the logits in training and in the reference's scores.")
    )
    reduction: str = field(
        default="seq-mean",
        metadata=_help("Over an update: seq-mean, token-mean, seq-mean-token-mean or sum."),
    )
    advantage_filter: str = field(
        default="auto",
        metadata=_help(
            "positive: train only on rows with advantage > 0; none: on all; auto: what the "
            "objective declares (positive for A-LoL)."
        ),
    )
    sampling: str = field(
        default="auto",
        metadata=_help(
            "advantage: draw rows in proportion to max(advantage, 0), without replacement inside "
            "an update; uniform: a permutation each epoch; auto: what the objective declares "
            "(advantage for A-LoL)."
        ),
    )
    disable_dropout: bool = field(
        default=True, metadata=_help("Set every dropout probability of the policy to zero.")
    )
    step0_gate: bool = field(
        default=True,
        metadata=_help(
            "Before the first update, require |sum of log-ratios| <= step0_tolerance on "
            "step0_rows rows. Switch it off only when the policy does not start from the reference."
        ),
    )
    step0_tolerance: float = field(
        default=1e-3, metadata=_help("Bound of the step-0 gate, in nats per row.")
    )
    step0_rows: int = field(default=64, metadata=_help("Rows the step-0 gate scores."))
    memory_budget: int | None = field(
        default=None, metadata=_help("Bytes the fused loss may use for logits; null: its default.")
    )
    backend: str | None = field(
        default=None, metadata=_help("Kernel backend by name; null: the best one for the device.")
    )
    packing: bool = field(
        default=False,
        metadata=_help(
            "Put the rows of a micro-batch one behind the other into one row, without padding; "
            "whether the model's attention keeps them apart is tried once."
        ),
    )
    max_prompt_length: int | None = field(
        default=512, metadata=_help("Tokens of the prompt kept: its end, and BOS. null: all.")
    )
    max_completion_length: int | None = field(
        default=512, metadata=_help("Tokens of the completion kept: its start. null: all.")
    )
    reward_columns: list[str] = field(
        default_factory=lambda: ["reward"], metadata=_help("Columns that hold rewards.")
    )
    reward_weights: list[float] | None = field(
        default=None, metadata=_help("Weights of reward_columns in the sum; null: all one.")
    )
    reward_func_weights: list[float] | None = field(
        default=None, metadata=_help("Weights of the reward functions in the sum; null: all one.")
    )
    on_bad: str = field(
        default="error", metadata=_help("Malformed rows: error stops, skip drops and counts them.")
    )
    cache_dir: str | None = field(
        default=None, metadata=_help("Folder of the reference's scores; null: in output_dir.")
    )
    stale_cache: str = field(
        default="error",
        metadata=_help("A cache made by other inputs: error stops, rebuild rewrites."),
    )
    eval_max_new_tokens: int = field(
        default=64, metadata=_help("Length limit of the responses generated for evaluation.")
    )
    eval_temperature: float = field(
        default=0.0, metadata=_help("Temperature of those responses; 0 is greedy.")
    )
    eval_top_p: float = field(default=1.0, metadata=_help("Nucleus of those responses."))
    eval_prompts: int | None = field(
        default=None, metadata=_help("Evaluate on the first this many prompts; null: on all.")
    )
    eval_seed: int = field(default=0, metadata=_help("Seed of those responses."))
    save_best_and_last: bool = field(
        default=True,
        metadata=_help(
            "Keep the model of the best evaluation in best/ and the final one in last/."
        ),
    )

    def __post_init__(self) -> None:
        _choice("objective", self.objective, tuple(lk.objectives.REGISTRY))
        _choice(
            "reduction", self.reduction, ("seq-mean", "token-mean", "seq-mean-token-mean", "sum")
        )
        _choice("advantage_filter", self.advantage_filter, ("auto", "positive", "none"))
        _choice("sampling", self.sampling, ("auto", "advantage", "uniform"))
        _choice("on_bad", self.on_bad, ("error", "skip"))
        _choice("stale_cache", self.stale_cache, ("error", "rebuild"))
        for name in ("clip", "beta", "floor"):
            setattr(self, name, _number_or_auto(name, getattr(self, name)))
        if self.clip not in (None, "auto"):
            # Zero would mean "weight one" to some and "no clip" to others; both have their name.
            _positive("clip (null switches it off, a_lol_ref_free is weight one)", self.clip)
        for name in ("temperature", "step0_tolerance", "step0_rows", "eval_max_new_tokens"):
            _positive(name, getattr(self, name))
        self._check_groups()
        for name in ("beta", "floor", "eval_temperature"):
            if getattr(self, name) != "auto":
                _positive(name, getattr(self, name), zero=True)
        for name in ("memory_budget", "max_prompt_length", "max_completion_length", "eval_prompts"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if not 0 < self.eval_top_p <= 1:
            raise ConfigError(f"eval_top_p={self.eval_top_p!r} must be in (0, 1]")
        if self.objective_args is not None and not isinstance(self.objective_args, dict):
            raise ConfigError(f"objective_args={self.objective_args!r} must be a mapping or null")
        _check_rewards(self.reward_columns, self.reward_weights, self.reward_func_weights)
        if self.remove_unused_columns:
            raise ConfigError(
                "remove_unused_columns=True would drop advantages and ref_logps; leave it False"
            )
        if self.label_smoothing_factor:
            raise ConfigError(
                "label_smoothing_factor does not apply to these objectives; set it to 0"
            )
        if self.train_sampling_strategy != "random":
            raise ConfigError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} does not apply; "
                "choose the order of rows with sampling, and leave this at 'random'"
            )
        if self.use_liger_kernel:
            raise ConfigError(
                "use_liger_kernel replaces the fused forward of lolkernels; set it to False"
            )
        if self.report_to == "auto":
            self.report_to = "tensorboard" if is_tensorboard_available() else "none"
        super().__post_init__()

    def _check_groups(self) -> None:
        size = self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"group_size={size!r} must be an integer >= 1")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, name) % size:
                raise ConfigError(f"{name}={getattr(self, name)} must hold whole groups of {size}")
        if size > 1:
            for name, value in (
                ("on_bad", "skip"),
                ("advantage_filter", "positive"),
                ("sampling", "advantage"),
            ):
                if getattr(self, name) == value:
                    raise ConfigError(f"{name}={value!r} would tear groups of {size} rows apart")


@dataclass
class AnnotateConfig:
    """Arguments of `annotate`; the meanings are those of the fields of `LoLConfig`."""

    max_prompt_length: int | None = field(
        default=512, metadata=_help("Tokens of the prompt kept: its end, and BOS. null: all.")
    )
    max_completion_length: int | None = field(
        default=512, metadata=_help("Tokens of the completion kept: its start. null: all.")
    )
    reward_columns: list[str] = field(
        default_factory=lambda: ["reward"], metadata=_help("Columns that hold rewards.")
    )
    reward_weights: list[float] | None = field(
        default=None, metadata=_help("Weights of reward_columns in the sum; null: all one.")
    )
    reward_func_weights: list[float] | None = field(
        default=None, metadata=_help("Weights of the reward functions in the sum; null: all one.")
    )
    on_bad: str = field(
        default="error", metadata=_help("Malformed rows: error stops, skip drops and counts them.")
    )
    keep: str = field(
        default="positive",
        metadata=_help("positive: return rows with advantage > 0; all: every row."),
    )
    temperature: float = field(default=1.0, metadata=_help("Divides the reference's logits."))
    autocast: str | None = field(
        default=None,
        metadata=_help("Score in mixed precision, as a bf16 or fp16 training will: bf16, fp16."),
    )
    batch_size: int = field(default=16, metadata=_help("Rows scored at a time."))
    backend: str | None = field(
        default=None, metadata=_help("Kernel backend by name; null: the best.")
    )
    memory_budget: int | None = field(
        default=None,
        metadata=_help("Bytes the fused scoring may use for logits; null: its default."),
    )
    cache_dir: str | None = field(default=None, metadata=_help("Folder of the cache; null: none."))
    stale_cache: str = field(
        default="error",
        metadata=_help("A cache made by other inputs: error stops, rebuild rewrites."),
    )

    def __post_init__(self) -> None:
        _choice("on_bad", self.on_bad, ("error", "skip"))
        _choice("keep", self.keep, ("positive", "all"))
        _choice("autocast", self.autocast, (None, "bf16", "fp16"))
        _choice("stale_cache", self.stale_cache, ("error", "rebuild"))
        _positive("temperature", self.temperature)
        _positive("batch_size", self.batch_size)
        for name in ("memory_budget", "max_prompt_length", "max_completion_length"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        _check_rewards(self.reward_columns, self.reward_weights, self.reward_func_weights)


@dataclass
class ValueConfig:
    """Shape and fit of the value head. `min_value`/`max_value` null: taken from the rewards."""

    num_heads: int = field(
        default=8, metadata=_help("Attention heads; they must divide the width.")
    )
    dropout: float = field(default=0.1, metadata=_help("Dropout on the states while fitting."))
    min_value: float | None = field(
        default=None, metadata=_help("Lowest value; null: lowest reward.")
    )
    max_value: float | None = field(
        default=None, metadata=_help("Highest value; null: highest reward.")
    )
    learning_rate: float = field(default=1e-3, metadata=_help("AdamW's learning rate."))
    weight_decay: float = field(default=0.01, metadata=_help("AdamW's weight decay."))
    epochs: int = field(default=20, metadata=_help("Epochs at most; the held-out part picks one."))
    batch_size: int = field(default=32, metadata=_help("Prompts in an update."))
    held_out: float = field(default=0.2, metadata=_help("Share of prompts that chooses the epoch."))
    seed: int = field(
        default=0, metadata=_help("Seed of split, initial weights, order and dropout.")
    )

    def __post_init__(self) -> None:
        for name in ("num_heads", "learning_rate", "epochs", "batch_size"):
            _positive(name, getattr(self, name))
        _positive("weight_decay", self.weight_decay, zero=True)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout!r} must be in [0, 1)")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out!r} must be in (0, 1)")
        low, high = self.min_value, self.max_value
        if low is not None and high is not None and not low < high:
            raise ConfigError(f"min_value={low!r} must be below max_value={high!r}")
