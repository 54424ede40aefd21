"""What the benchmarks ask lolkernels for beyond its public names, each looked up here alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lolkernels as lk
from lolkernels.backends import TABLE
from lolkernels.backends.finish import statistics
from lolkernels.memory import extra_bytes, kept_rows
from lolkernels.packing import plan_blocks
from lolrl import plan
from lolrl.plan import ModelShape, Setup

__all__ = ["ModelShape", "Setup", "extra_bytes", "kept_rows", "plan", "plan_blocks", "statistics"]


def function(name: str, what: str) -> Callable[..., Any] | None:
    """A row function of a backend, or its GEMM; None where it has none."""
    found: Callable[..., Any] | None = getattr(TABLE[name], what, None)
    return found


def usable(kind: str) -> dict[str, str | None]:
    """Every backend -> None where it runs on this kind of device, else why not."""
    found = {}
    for name, why in lk.available_backends().items():
        taken = TABLE[name].devices
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
