"""What the benchmarks ask lolkernels for beyond its public names, each looked up here alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lolkernels as lk
from lolkernels import plan
from lolkernels.backends import TABLE
from lolkernels.plan import ModelShape, Setup
from lolkernels.planner import chunk_rows, extra_bytes, plan_chunks

__all__ = [
    "TABLE",
    "ModelShape",
    "Setup",
    "chunk_rows",
    "devices",
    "distinct",
    "extra_bytes",
    "function",
    "has_gemm",
    "plan",
    "plan_chunks",
    "usable",
]


def devices(name: str) -> tuple[str, ...] | None:
    """The kinds of device that a backend takes; None: any."""
    backend = TABLE[name]
    found: tuple[str, ...] | None = getattr(backend, "devices", getattr(backend, "DEVICES", None))
    return found


def function(name: str, what: str) -> Callable[..., Any] | None:
    """A row function of a backend, or its GEMM; None where it has none."""
    found: Callable[..., Any] | None = getattr(TABLE[name], what, None)
    return found


def has_gemm(name: str) -> bool:
    return function(name, "gemm") is not None or function(name, "linear_spans") is not None


def usable(kind: str) -> dict[str, str | None]:
    """Every backend -> None where it runs on this kind of device, else why not."""
    found = {}
    for name, why in lk.available_backends().items():
        taken = devices(name)
        if why is None and taken is not None and kind not in taken:
            why = f"takes tensors on {', '.join(taken)}"
        found[name] = why
    return found


def distinct(names: list[str], *functions: str) -> list[str]:
    """Without the backends whose functions of these names are those of an earlier one."""
    found: dict[tuple[Any, ...], str] = {}
    for name in names:
        found.setdefault(tuple(function(name, f) for f in functions), name)
    return list(found.values())
