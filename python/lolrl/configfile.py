"""Configuration files: strict YAML in, the same YAML out, and nothing executable in between."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import types
import typing
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lolrl.files import write_atomic

MAX_CONFIG_BYTES = 1 << 16
MAX_DEPTH = 20

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A configuration value or file that cannot be used; the message says what to change."""


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
    """The mapping in a YAML file: plain data, no tags, aliases or duplicate keys, at most 64 KiB.

    Raises:
        ConfigError: naming the file, and the line where the parser knows it.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: {len(raw)} bytes is more than a configuration needs (64 KiB)")
    try:
        text = raw.decode("utf-8")
        _check_tokens(text)
        loader = _StrictLoader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason})") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path}: not plain YAML: {problem}") from error
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{path}: must be a mapping from field names to values")
    return value


def _check_tokens(text: str) -> None:
    """Refuse aliases, which can expand without bound, and nesting no field has."""
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.AliasToken):
            raise ConfigError("aliases (*name) are not supported; write the value out")
        name = type(token).__name__
        depth += name.endswith("StartToken") - name.endswith("EndToken")
        if depth > MAX_DEPTH:
            raise ConfigError(f"nested more than {MAX_DEPTH} deep; no field needs that")


def _read_mapping(name: str, value: Any) -> dict[str, Any] | None:
    """A mapping given as one, as JSON text or as the path of a JSON file.

    transformers would open whatever else stands here: a path, or the descriptor of that number.
    """
    if value is None or isinstance(value, dict):
        return value
    accepted = f"{name}={value!r} must be a mapping, its JSON text or the path of a JSON file"
    if not isinstance(value, str):
        raise ConfigError(accepted)
    text = value
    try:
        if not value.startswith("{"):
            path = Path(value).expanduser()
            if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
                raise ConfigError(f"{accepted} of at most 64 KiB")
            text = path.read_text(encoding="utf-8")
        mapping = json.loads(text)
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # a RecursionError is a RuntimeError
        raise ConfigError(f"{accepted} ({error})") from error
    if not isinstance(mapping, dict):
        raise ConfigError(accepted)
    return mapping


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
        kinds = {typing.get_origin(option) or option for option in plain}
        if {dict, str} <= kinds:
            return _read_mapping(name, value)
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
    except Exception as error:
        # transformers raises any kind over a value: AttributeError, ImportError, KeyError, OSError.
        kind = "" if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: "
        raise ConfigError(f"{source}: {kind}{error}") from error


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
    # Escaped: PyYAML writes some Unicode line breaks as they are and reads them back as spaces.
    text = yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=False)
    return write_atomic(path, text.encode("utf-8"))
