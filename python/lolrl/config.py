"""Configuration of every stage: dataclasses, and strict YAML in both directions.

Nothing here is executable: YAML is read by a safe loader that refuses duplicate keys, unknown
fields are an error, and `from_mapping(cls, to_mapping(c))` gives `c` back.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available

from lolrl.files import write_atomic

OBJECTIVES = (
    "nll",
    "wbc",
    "r_gold",
    "r_lol",
    "a_lol",
    "a_lol_seq",
    "a_lol_ref_free",
    "a_lol_kl",
    "r_lol_kl",
)
MAX_CONFIG_BYTES = 1 << 20

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A configuration value or file that cannot be used; the message says what to change."""


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}")


def _positive(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise unless `value` is a finite number above zero (or at zero, if `zero`)."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and not zero):
        bound = ">= 0" if zero else "> 0"
        raise ConfigError(f"{name}={value!r} must be a finite number {bound}")


def _check_rewards(columns: list[str], weights: list[float] | None) -> None:
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


@dataclass
class LoLConfig(TrainingArguments):
    """Arguments of `LoLTrainer`: those of `transformers.TrainingArguments` and the ones below.

    Three defaults of the base class differ: `logging_steps` is 10, `report_to` is TensorBoard where it
    is installed, and columns are never dropped (`remove_unused_columns=False`), because the
    objective's side inputs are columns.

    Raises:
        ConfigError: (a `ValueError`) for a value out of range, naming the field.
    """

    logging_steps: float = field(
        default=10, metadata=_help("Log the metrics every this many updates.")
    )
    report_to: None | str | list[str] = field(
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
        metadata=_help("The loss: " + ", ".join(OBJECTIVES) + ". A callable goes to LoLTrainer."),
    )
    objective_args: dict[str, Any] | None = field(
        default=None, metadata=_help("Further options of the objective, by parameter name.")
    )
    clip: float | None = field(
        default=0.9,
        metadata=_help(
            "eps of the ratio's bounds [1 - eps, 1 + eps]; null switches the clip off, 0 is refused."
        ),
    )
    beta: float = field(
        default=0.1, metadata=_help("Weight of the KL term of a_lol_kl and r_lol_kl.")
    )
    floor: float = field(default=0.1, metadata=_help("Lower bound of r_gold's token probability."))
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
            "positive: train only on rows with advantage > 0; none: on all; auto: positive for the "
            "objectives that take advantages."
        ),
    )
    sampling: str = field(
        default="auto",
        metadata=_help(
            "advantage: draw rows in proportion to max(advantage, 0), without replacement inside an "
            "update; uniform: a permutation each epoch; auto: advantage for the objectives that take "
            "advantages."
        ),
    )
    disable_dropout: bool = field(
        default=True, metadata=_help("Set every dropout probability of the policy to zero.")
    )
    step0_gate: bool = field(
        default=True,
        metadata=_help(
            "Before the first update, require |sum of log-ratios| <= step0_tolerance on step0_rows rows. "
            "Switch it off only when the policy does not start from the reference."
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
        _choice("objective", self.objective, OBJECTIVES)
        _choice(
            "reduction", self.reduction, ("seq-mean", "token-mean", "seq-mean-token-mean", "sum")
        )
        _choice("advantage_filter", self.advantage_filter, ("auto", "positive", "none"))
        _choice("sampling", self.sampling, ("auto", "advantage", "uniform"))
        _choice("on_bad", self.on_bad, ("error", "skip"))
        _choice("stale_cache", self.stale_cache, ("error", "rebuild"))
        if self.clip is not None:
            # Zero would mean "weight one" to some and "no clip" to others; both have their own name.
            _positive("clip (null switches it off, a_lol_ref_free is weight one)", self.clip)
        for name in ("temperature", "step0_tolerance", "step0_rows", "eval_max_new_tokens"):
            _positive(name, getattr(self, name))
        for name in ("beta", "floor", "eval_temperature"):
            _positive(name, getattr(self, name), zero=True)
        for name in ("memory_budget", "max_prompt_length", "max_completion_length", "eval_prompts"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if not 0 < self.eval_top_p <= 1:
            raise ConfigError(f"eval_top_p={self.eval_top_p!r} must be in (0, 1]")
        if self.objective_args is not None and not isinstance(self.objective_args, dict):
            raise ConfigError(f"objective_args={self.objective_args!r} must be a mapping or null")
        _check_rewards(self.reward_columns, self.reward_weights)
        if self.remove_unused_columns:
            raise ConfigError(
                "remove_unused_columns=True would drop advantages and ref_logps; leave it False"
            )
        if self.label_smoothing_factor:
            raise ConfigError(
                "label_smoothing_factor does not apply to these objectives; set it to 0"
            )
        if self.use_liger_kernel:
            raise ConfigError(
                "use_liger_kernel replaces the fused forward of lolkernels; set it to False"
            )
        if self.report_to == "auto":
            self.report_to = "tensorboard" if is_tensorboard_available() else "none"
        super().__post_init__()


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
        default=None, metadata=_help("Weights of reward_columns, or of the reward functions.")
    )
    on_bad: str = field(
        default="error", metadata=_help("Malformed rows: error stops, skip drops and counts them.")
    )
    keep: str = field(
        default="positive",
        metadata=_help("positive: return rows with advantage > 0; all: every row."),
    )
    temperature: float = field(default=1.0, metadata=_help("Divides the reference's logits."))
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
        _choice("stale_cache", self.stale_cache, ("error", "rebuild"))
        _positive("temperature", self.temperature)
        _positive("batch_size", self.batch_size)
        for name in ("memory_budget", "max_prompt_length", "max_completion_length"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if not self.reward_columns:
            raise ConfigError("reward_columns=[] must name at least one column")


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


class _StrictLoader(yaml.SafeLoader):
    """`yaml.SafeLoader` that refuses a mapping with the same key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ConfigError(
                    f"line {key_node.start_mark.line + 1}: a key must be a plain name"
                )
            if key in seen:
                raise ConfigError(
                    f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice; keep one"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file. Only plain data: no tags, no duplicate keys, at most 1 MiB.

    Raises:
        ConfigError: naming the file, and the line where the parser knows it.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: {len(raw)} bytes is more than a configuration may have (1 MiB)")
    try:
        loader = _StrictLoader(raw.decode("utf-8"))
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(raw.decode("utf-8"))):
            # Nested aliases expand exponentially; no field of ours needs them.
            raise ConfigError("aliases (*name) are not supported; write the value out")
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason})") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path}: not plain YAML: {text}") from error
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{path}: must be a mapping from field names to values")
    return value


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type, where the type is plain; YAML 1.1 reads 1e-4 as a string."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        plain = [option for option in options if option is not type(None)]
        if len(plain) == 1:
            return _coerce(name, value, plain[0])
        return value
    if origin is list and typing.get_args(hint)[0] in (str, int, float):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name}={value!r} must be a list")
        return [_coerce(f"{name}[{i}]", v, typing.get_args(hint)[0]) for i, v in enumerate(value)]
    if hint is float:
        try:
            if not isinstance(value, (bool, list, dict)) and value is not None:
                # An integer stays one: transformers reads 500 as steps and 0.5 as a share.
                return value if isinstance(value, int) else float(value)
        except ValueError:
            pass
        raise ConfigError(f"{name}={value!r} must be a number")
    if hint is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise ConfigError(f"{name}={value!r} must be an integer")
    if hint is bool and not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be true or false")
    if hint is str and not isinstance(value, str):
        raise ConfigError(f"{name}={value!r} must be a string")
    return value


def from_mapping(
    cls: type[Config], mapping: dict[str, Any], *, source: str = "configuration"
) -> Config:
    """`cls(**mapping)` with unknown names refused and plain types checked.

    Raises:
        ConfigError: naming `source`, the field, and for an unknown name the nearest known one.
    """
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    values = {}
    for name, value in mapping.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{source}: {cls.__name__} has no field {name!r}{hint}")
        try:
            values[name] = _coerce(name, value, hints[name])
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error


def load_config(
    cls: type[Config],
    path: str | os.PathLike[str] | None = None,
    overrides: dict[str, Any] | None = None,
) -> Config:
    """`cls` from a YAML file (optional) with `overrides` (flags) on top.

    Raises:
        ConfigError: see `load_yaml` and `from_mapping`.
    """
    mapping = {} if path is None else load_yaml(path)
    return from_mapping(cls, {**mapping, **(overrides or {})}, source=str(path or "flags"))


def to_mapping(config: Any) -> dict[str, Any]:
    """Every field of a configuration as plain data: strings, numbers, lists, dictionaries, None."""
    source = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
    # The hub's token is a secret: it is never written, and has to be given again.
    names = [f.name for f in dataclasses.fields(config) if f.init and f.name != "hub_token"]
    return {name: _plain(source[name]) for name in names if name in source}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value.value if hasattr(value, "value") else value
    return str(value)


def dump_config(config: Any, path: str | os.PathLike[str]) -> Path:
    """Write every field to a YAML file that `load_config` reads back to an equal configuration."""
    text = yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True)
    return write_atomic(path, text.encode("utf-8"))
