"""Optimizer, scheduler and random states as safetensors: loading one can run no code.

A state is nested Python data with tensors in it. The tensors go into the file under numbered names,
and the rest, as JSON that says where each tensor belongs, into the file's header.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lolrl.files import write_atomic

FORMAT = "lolrl.state.1"


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON data; its tensors are put into `tensors` and named in their places.

    Raises:
        TypeError: something that is neither plain data nor a tensor or array.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        # Text keeps inf and nan, which JSON has no words for, and every bit of the rest.
        return {"$float": repr(value)}
    if isinstance(value, (Tensor, np.ndarray)):
        kind = "$tensor" if isinstance(value, Tensor) else "$array"
        tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(value.copy())
        name = str(len(tensors))
        tensors[name] = tensor.cpu().contiguous().clone()
        return {kind: name}
    if isinstance(value, (list, tuple)):
        items = [pack(item, tensors) for item in value]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict):
        pairs = [[pack(k, tensors), pack(v, tensors)] for k, v in value.items()]
        return {"$dict": pairs}
    raise TypeError(f"a {type(value).__module__}.{type(value).__name__} cannot be stored as data")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `pack` was given.

    Raises:
        ValueError: not the result of `pack`.
    """
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError("a mapping without a single mark")
    ((mark, content),) = value.items()
    if mark == "$float":
        return float(content)
    if mark == "$tensor":
        return tensors[content]
    if mark == "$array":
        return tensors[content].numpy()
    if mark == "$tuple":
        return tuple(unpack(item, tensors) for item in content)
    if mark == "$dict":
        return {unpack(k, tensors): unpack(v, tensors) for k, v in content}
    raise ValueError(f"the unknown mark {mark!r}")


def save_state(path: str | os.PathLike[str], state: Any) -> None:
    """Write nested data with tensors to one safetensors file, atomically."""
    tensors: dict[str, Tensor] = {}
    header = {"format": FORMAT, "state": json.dumps(pack(state, tensors), allow_nan=False)}
    write_atomic(path, safetensors.torch.save(tensors, header))


def load_state(path: str | os.PathLike[str]) -> Any:
    """What `save_state` was given, tensors on the CPU.

    Raises:
        ValueError: the file is damaged or not such a state.
    """
    try:
        with safetensors.safe_open(Path(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise ValueError("it is not a stored state")
        return unpack(json.loads(header["state"]), tensors)
    except (
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
        safetensors.SafetensorError,
    ) as error:
        raise ValueError(f"{path}: cannot be loaded ({error}); resume from another") from error


def random_state() -> dict[str, Any]:
    """State of the generators of Python, numpy, and torch on every device."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from `random_state()`; devices that were not there then are left alone."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    devices = state.get("cuda", [])
    for index in range(min(len(devices), torch.cuda.device_count())):
        torch.cuda.random.set_rng_state(devices[index], index)
