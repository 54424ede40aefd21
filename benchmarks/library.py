"""What the benchmarks ask lolkernels for beyond its public names, each looked up here alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lolkernels as lk
from lolkernels.backends import TABLE
from lolkernels.memory import extra_bytes, kept_rows
from lolkernels.packing import plan_blocks
from lolrl import plan
from lolrl.plan import ModelShape, Setup

__all__ = [
    "TABLE",
    "ModelShape",
    "Setup",
    "devices",
    "distinct",
    "extra_bytes",
    "function",
    "has_gemm",
    "kept_rows",
    "plan",
    "plan_blocks",
    "usable",
]


def devices(name: str) -> tuple[str, ...] | None:
    """The kinds of device that a backend takes; None: any."""
    return TABLE[name].devices


def function(name: str, what: str) -> Callable[..., Any] | None:
    """A row function of a backend, or its GEMM; None where it has none."""
    found: Callable[..., Any] | None = getattr(TABLE[name], what, None)
    return found


def has_gemm(name: str) -> bool:
    return function(name, "gemm") is not None


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
