"""Flags and YAML of the command line: every field of a stage's configuration is both.

A YAML file (`--config`) holds the flags of its verb with underscores, and any field of the stage's
configuration. A flag on the command line wins over the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from typing import Any

from lolrl.config import ConfigError, LoLConfig, from_mapping, load_yaml

Options = typing.TypeVar("Options")

# The fields of transformers.TrainingArguments that get a flag; the others go through --set.
TRAINING_FLAGS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "seed",
    "bf16",
    "gradient_checkpointing",
    "use_cpu",
    "report_to",
)


def parse_value(text: str) -> Any:
    """A flag's text as plain data: null, true, false, a number, a JSON list or mapping, or text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def _text(text: str) -> str | None:
    return None if text == "null" else text


def _plain(hint: Any) -> list[Any]:
    """The types a hint allows besides None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [t for t in typing.get_args(hint) if t is not type(None)]
    return [hint]


def add_config_flags(
    parser: argparse._ActionsContainer, cls: type, *, prefix: str = "", only: Sequence[str] = ()
) -> None:
    """A flag for each field of a configuration class (of `only` these, if given).

    Flags that are not given leave no trace, so that a YAML file or the default can speak.
    """
    hints = typing.get_type_hints(cls)
    taken = {option for action in parser._actions for option in action.option_strings}
    for field in dataclasses.fields(cls):
        flag = f"--{prefix}{field.name}".replace("_", "-")
        if flag in taken or (only and field.name not in only):
            continue
        allowed = _plain(hints[field.name])
        options: dict[str, Any] = {
            "dest": f"{prefix}{field.name}".replace("-", "_"),
            "default": argparse.SUPPRESS,
            # argparse formats help with %; transformers' texts hold bare ones.
            "help": " ".join(str(field.metadata.get("help", "")).split()).replace("%", "%%"),
        }
        if allowed == [bool]:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = "VALUE"
            options["type"] = _text if str in allowed else parse_value
            if typing.get_origin(allowed[0]) in (list, tuple):
                options["nargs"] = "+"
                options["type"] = str if str in typing.get_args(allowed[0]) else parse_value
        parser.add_argument(flag, **options)


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Every field of `LoLConfig` of our own, `TRAINING_FLAGS`, and `--set` for the rest."""
    base = {field.name for field in dataclasses.fields(LoLConfig.__mro__[1])}
    own = [f.name for f in dataclasses.fields(LoLConfig) if f.name not in base]
    own.remove("objective_args")  # a mapping: only in YAML
    add_config_flags(
        parser.add_argument_group("objective, data and evaluation"),
        LoLConfig,
        only=own,
    )
    add_config_flags(
        parser.add_argument_group("training (transformers)"),
        LoLConfig,
        only=TRAINING_FLAGS,
    )
    parser.add_argument(
        "--set",
        dest="set_fields",
        metavar="FIELD=VALUE",
        action="append",
        default=argparse.SUPPRESS,
        help="any other field of LoLConfig or transformers.TrainingArguments; repeatable",
    )


def merge(args: argparse.Namespace) -> dict[str, Any]:
    """Option and field names with their values, from the YAML file and the flags, flags winning.

    Raises ConfigError for a malformed --set, or a file that names code to run.
    """
    given = {k: v for k, v in vars(args).items() if k not in ("verb", "debug", "config")}
    for item in given.pop("set_fields", []):
        name, separator, text = item.partition("=")
        if not separator or not name.isidentifier():
            raise ConfigError(f"--set {item!r} must be FIELD=VALUE")
        given[name] = parse_value(text)
    merged = (load_yaml(args.config) if args.config is not None else {}) | given
    # A file must not choose what code runs; a person at the command line may.
    if ":" in str(merged.get("reward", "")) and "reward" not in given:
        raise ConfigError("reward: package.module:function is taken from --reward only")
    if merged.get("trust_remote_code") and "trust_remote_code" not in given:
        raise ConfigError("trust_remote_code is taken from --trust-remote-code only")
    return merged


def take(cls: type[Options], merged: dict[str, Any], *, required: Sequence[str] = ()) -> Options:
    """`cls` from its fields in `merged`, which are removed there.

    Raises ConfigError naming the flag of a required field that is absent or null, or a field of the
    wrong type.
    """
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    own = {name: merged.pop(name) for name in names if name in merged}
    missing = [name for name in required if own.get(name) is None]
    if missing:
        flag = "--" + missing[0].replace("_", "-")
        raise ConfigError(f"{flag} is missing: give it as a flag or in --config")
    return from_mapping(cls, own, source="options")
