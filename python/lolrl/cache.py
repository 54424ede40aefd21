"""The annotation cache: what the reference says about the data, and everything that made it.

`annotations.safetensors` holds the arrays and, in its header, the key: a mapping of named fields.
`annotations.json` is written last and holds the same key with the length and SHA-256 of the first
file. A cache is used only if both are whole and every field of the key equals the one asked for.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import lolkernels
from lolrl.files import canonical_json, sha256_file, sha256_text, write_atomic, write_json

FORMAT = "lolrl.annotations.1"
ARRAYS = "annotations.safetensors"
MANIFEST = "annotations.json"


class StaleCacheError(ValueError):
    """A cache that other inputs made, or that is damaged.

    Attributes:
        fields: names of the key's fields that differ; empty for a damaged cache.
    """

    def __init__(self, folder: Path, fields: list[str], problem: str) -> None:
        self.fields = fields
        super().__init__(
            f"{folder}: {problem}; pass stale_cache='rebuild' to write it again, "
            "or another cache_dir"
        )


def tensors_digest(named: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(named):
        tensor = named[name].detach()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        flat = tensor.contiguous().flatten().cpu()
        # Some dtypes (bfloat16) have no numpy twin; their bytes do.
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def model_key(model: nn.Module) -> dict[str, Any]:
    """What of a model decides its log-probs: weights, buffers, configuration, dtype, attention."""
    config: Any = getattr(model, "config", None)
    settings = {}
    if config is not None:
        # Where a model was loaded from, and what generation does with it, do not change its scores.
        skip = {"_name_or_path", "transformers_version", "use_cache", "architectures", "dtype"}
        settings = {k: v for k, v in config.to_dict().items() if k not in skip}
    peft = {
        name: {k: str(v) for k, v in adapter.to_dict().items()}
        for name, adapter in (getattr(model, "peft_config", None) or {}).items()
    }
    dtypes = sorted({str(p.dtype) for p in model.parameters()})
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "weights": tensors_digest(state),
        "model_config": sha256_text(json.dumps([settings, peft], sort_keys=True, default=str)),
        "dtype": ",".join(dtypes),
        "attention": str(getattr(config, "_attn_implementation", None)),
    }


def tokenizer_key(tokenizer: Any) -> dict[str, str]:
    """What of a tokenizer decides ids: vocabulary and rules, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else canonical_json(tokenizer.get_vocab())
    special = {
        "map": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "class": type(tokenizer).__name__,
        "pad": tokenizer.pad_token_id,
        "eos": tokenizer.eos_token_id,
        "bos": tokenizer.bos_token_id,
    }
    template = getattr(tokenizer, "chat_template", None)
    return {
        "tokenizer": sha256_text(rules),
        "special_tokens": sha256_text(json.dumps(special, sort_keys=True, default=str)),
        "chat_template": sha256_text(json.dumps(template, sort_keys=True)),
    }


def function_key(function: Callable[..., Any]) -> str:
    """Identity of a reward function: its `cache_key` attribute, or its name and source text.

    A function whose behaviour depends on data outside of its source (a file, a model) should carry
    a string `cache_key` that changes with it.
    """
    own = getattr(function, "cache_key", None)
    if isinstance(own, str):
        return own
    target = function if inspect.isroutine(function) else type(function)
    name = (
        f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(type(target)))}"
    )
    try:
        source = inspect.getsource(target)
    except (OSError, TypeError):
        source = ""
    return f"{name}:{sha256_text(source)[:16]}"


def versions_key() -> dict[str, str]:
    """Versions of the code that scores."""
    return {"lolkernels": lolkernels.__version__, "format": FORMAT}


def key_hash(key: Mapping[str, Any]) -> str:
    """SHA-256 of the key's canonical JSON."""
    return sha256_text(canonical_json(key))


def stale_fields(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names of fields that differ, are missing or are unknown, sorted."""
    absent = object()
    names = set(stored) | set(wanted)
    return sorted(n for n in names if stored.get(n, absent) != wanted.get(n, absent))


def save(folder: str | os.PathLike[str], key: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    """Write a cache: arrays first, the manifest that makes them valid last, each atomically."""
    folder = Path(folder)
    header = {"format": FORMAT, "key": canonical_json(key)}
    # A manifest of older arrays must not vouch for the ones about to replace them.
    (folder / MANIFEST).unlink(missing_ok=True)
    path = write_atomic(folder / ARRAYS, safetensors.torch.save(arrays, header))
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "key": key,
            "key_sha256": key_hash(key),
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
        },
    )


def load(folder: str | os.PathLike[str], key: dict[str, Any]) -> dict[str, Tensor] | None:
    """The arrays of a cache made by `key`, or None where there is no cache.

    Raises:
        StaleCacheError: the cache is damaged, or made by another key; the fields are named.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ValueError("the manifest is not one of an annotation cache")
        stored = manifest["key"]
        if not isinstance(stored, dict) or key_hash(stored) != manifest["key_sha256"]:
            raise ValueError("the manifest's key does not match its hash")
        path = folder / ARRAYS
        if path.stat().st_size != manifest["bytes"]:
            raise ValueError(f"{ARRAYS} has {path.stat().st_size} bytes, not {manifest['bytes']}")
        if sha256_file(path) != manifest["sha256"]:
            raise ValueError(f"{ARRAYS} does not match its SHA-256")
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise StaleCacheError(folder, [], f"the cache is damaged ({error})") from error
    # JSON has no tuples: compare what was asked for in the form it would be stored in.
    fields = stale_fields(stored, json.loads(canonical_json(key)))
    if fields:
        raise StaleCacheError(folder, fields, f"made by other inputs: {', '.join(fields)}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != canonical_json(key):
                raise ValueError(f"{ARRAYS} was made by another key than its manifest")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (ValueError, safetensors.SafetensorError) as error:
        raise StaleCacheError(folder, [], f"the cache is damaged ({error})") from error
