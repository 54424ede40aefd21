"""Scenarios that run on several ranks, all in one launch: starting processes costs most.

A scenario is a function without arguments that every rank calls; it raises where something is
wrong. What a rank has to say of each goes to a file, which test_distributed.py reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SCENARIOS: dict[str, tuple[Callable[[], None], tuple[int, ...]]] = {}


def scenario(*worlds: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Registers a scenario for these numbers of ranks."""

    def register(fn: Callable[[], None]) -> Callable[[], None]:
        SCENARIOS[fn.__name__] = fn, worlds
        return fn

    return register


def parts(n: int) -> list[int]:
    """n split unevenly over the ranks; the last of four has a single one."""
    if dist.get_world_size() == 2:
        return [n // 3, n - n // 3]
    return [n // 2, n // 5, n - n // 2 - n // 5 - 1, 1]


def own(t: Tensor, sizes: list[int]) -> Tensor:
    return t.split(sizes)[dist.get_rank()]


def close(
    got: dict[str, Any],
    want: dict[str, Any],
    tolerance: float = 1e-12,
    sizes: list[int] | None = None,
) -> None:
    """Equal relative to the largest value, and nan where that is.

    With ``sizes`` dweight, dup and dbias are the rank's rows of what is wanted.
    """
    assert got.keys() == want.keys()
    for name, value in want.items():
        value = value.detach().double()
        scale = value.nan_to_num().abs().max() if value.numel() else 1.0
        value = own(value, sizes) if sizes and name in ("dweight", "dup", "dbias") else value
        mine = got[name]
        assert mine.shape == value.shape, f"{name}: {tuple(mine.shape)}, not {tuple(value.shape)}"
        assert torch.equal(mine.isnan(), value.isnan()), f"{name} is nan elsewhere"
        if value.numel():
            error = (mine.detach().double() - value).nan_to_num().abs().max()
            assert error <= tolerance * scale, f"{name} off by {error / scale:.1e}"


def raises(call: Callable[[], Any], text: str) -> None:
    try:
        call()
    except ValueError as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"nothing was raised: {text}")
