"""Which rows a block of ``linear_loss`` takes: whole groups of sequences, pieces of long ones."""

from __future__ import annotations

import itertools
from typing import NamedTuple


class Block(NamedTuple):
    """Rows start:stop, which are the sequences first:last; those at its ends may be cut."""

    start: int
    stop: int
    first: int
    last: int


def plan_blocks(
    offsets: list[int], max_rows: int, *, group_size: int = 1, token_local: bool = False
) -> list[Block]:
    """Pack whole groups of sequences into blocks of at most ``max_rows`` rows.

    A longer group is a block of its own (the rows beyond have their logits made twice), unless the
    objective is token-local: then its sequence is cut into pieces.
    """
    blocks: list[Block] = []
    start, first, stop = offsets[0], 0, offsets[0]
    for s in range(0, len(offsets) - 1, group_size):
        end = offsets[s + group_size]
        if stop > start and end - start > max_rows:
            blocks.append(Block(start, stop, first, s))
            start, first = stop, s
        while token_local and end - start > max_rows:
            blocks.append(Block(start, start + max_rows, first, s + 1))
            start, first = start + max_rows, s
        stop = end
    if offsets[1:]:
        blocks.append(Block(start, stop, first, len(offsets) - 1))
    return blocks


def longest_group(offsets: list[int], group_size: int) -> int:
    """Rows of the longest group."""
    ends = offsets[::group_size]
    return max((b - a for a, b in itertools.pairwise(ends)), default=0)
