"""Blocks of rows: every row once, whole groups, the stated size. Rows that a budget holds."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lolkernels import memory
from lolkernels.packing import longest_group, plan_blocks

Plan = tuple[list[int], int, int, bool]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    group = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(0, 20), max_size=12))
    lengths = lengths[: len(lengths) // group * group]
    offsets = [0, *itertools.accumulate(lengths)]
    return offsets, draw(st.integers(1, 30)), group, group == 1 and draw(st.booleans())


@given(plans())
def test_every_row_once_in_whole_groups(plan: Plan) -> None:
    offsets, most, group, local = plan
    blocks = plan_blocks(offsets, most, group_size=group, token_local=local)
    rows = [r for b in blocks for r in range(b.start, b.stop)]
    assert rows == list(range(offsets[-1]))
    for b in blocks:
        assert 0 <= b.first <= b.last <= len(offsets) - 1
        assert offsets[b.first] <= b.start <= b.stop <= offsets[b.last]
        if local:
            assert b.stop - b.start <= most
            assert offsets[b.last - 1] <= b.stop and b.start <= offsets[b.first + 1]
        else:
            assert (b.start, b.stop) == (offsets[b.first], offsets[b.last])
            assert b.first % group == 0 and b.last % group == 0
            ends = offsets[b.first : b.last + 1 : group]
            filled = sum(y > x for x, y in itertools.pairwise(ends))
            assert b.stop - b.start <= most or filled == 1
    if not local:
        assert [s for b in blocks for s in range(b.first, b.last)] == list(range(len(offsets) - 1))


@given(plans())
def test_no_two_neighbours_fit_into_one(plan: Plan) -> None:
    offsets, most, group, local = plan
    blocks = plan_blocks(offsets, most, group_size=group, token_local=local)
    for a, b in itertools.pairwise(blocks):
        following = b.stop if local else offsets[b.first + group]
        assert following - a.start > most


def test_the_longest_group() -> None:
    assert longest_group([0, 3, 7, 7, 9], 1) == 4
    assert longest_group([0, 3, 7, 7, 9], 2) == 7
    assert longest_group([0], 1) == 0


def test_rows_that_a_budget_holds() -> None:
    held = memory.kept_rows
    assert held(1000, 64, 4, 4000 * 7 + 3999) == 7
    assert held(1000, 64, 4, 1) == 1
    assert held(5000, 64, 4, None) == 48 * 2**20 // (5000 * 4)
    assert held(151936, 64, 4, None) == 256
    assert held(151936, 896, 4, None) == 896  # as much as the weight's gradient
    cuda = torch.device("cuda")
    assert held(128256, 4096, 2, None, cuda, card=80 * 2**30) == 80 * 2**30 // 16 // (2 * 128256)
    budget = 2**30  # half of it for a chunk of logits, the rest for exponentials
    rows = held(128256, 4096, 2, budget, cuda)
    chunk = memory.chunk_rows(8192, 128256, budget, cuda)
    assert (
        rows * 2 * 128256 + chunk * 4 * 128256 <= budget < (rows + 1) * 2 * 128256 + 2**29 + 2**20
    )


@pytest.mark.parametrize("vocab", [32000, 128256, 151936, 262144])
@pytest.mark.parametrize("rows", [1, 1000, 1281, 4096, 8192, 10007])
def test_chunks_of_a_gpu_are_equal_and_end_just_under_whole_waves(rows: int, vocab: int) -> None:
    size = memory.chunk_rows(rows, vocab, None, processors=132)
    count = -(-rows // size)
    assert 1 <= size <= 1280 and (rows <= 1280) == (count == 1)
    waves = [
        -(-(-(-min(size, rows - i) // 128) * -(-vocab // 256)) // 132) for i in range(0, rows, size)
    ]
    ideal = -(-rows // 128) * -(-vocab // 256) / 132
    assert sum(waves) <= 1.05 * ideal + 1
