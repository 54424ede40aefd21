"""The chunk planner: every active row once, whole groups, the stated size; the memory formula."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lolkernels as lk
from lolkernels import planner
from lolkernels.planner import Piece


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[int], list[bool], int, int, bool]:
    group = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(0, 20), max_size=12))
    lengths = lengths[: len(lengths) // group * group]
    active = draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    offsets = [0, *itertools.accumulate(lengths)]
    return offsets, active, draw(st.integers(1, 30)), group, draw(st.booleans())


@given(plans())
def test_plan(plan: tuple[list[int], list[bool], int, int, bool]) -> None:
    offsets, active, max_rows, group, local = plan
    chunks = planner.plan_chunks(offsets, active, max_rows, group_size=group, token_local=local)
    cut = local and group == 1
    covered: list[int] = []
    seen: list[int] = []
    for chunk in chunks:
        assert chunk
        rows = sum(p.end - p.start for p in chunk)
        groups = {p.sequence // group for p in chunk}
        for p in chunk:
            assert offsets[p.sequence] <= p.start <= p.end <= offsets[p.sequence + 1]
            covered += range(p.start, p.end)
        if cut:
            assert rows <= max_rows
        else:  # whole groups; more rows than allowed only for one long group
            assert rows <= max_rows or len(groups) == 1
            for g in groups:
                members = list(range(g * group, (g + 1) * group))
                assert [p.sequence for p in chunk if p.sequence // group == g] == members
            for p in chunk:
                assert (p.start, p.end) == (offsets[p.sequence], offsets[p.sequence + 1])
        seen += sorted(groups)
    live = [any(active[s] for s in range(g, g + group)) for g in range(0, len(active), group)]
    want = [
        row
        for s in range(len(active))
        if live[s // group]
        for row in range(offsets[s], offsets[s + 1])
    ]
    assert covered == want  # each active row exactly once, in order
    if not cut:
        assert seen == [g for g, on in enumerate(live) if on]


@given(plans())
def test_chunks_are_filled(plan: tuple[list[int], list[bool], int, int, bool]) -> None:
    """No two neighbouring chunks would fit into one."""
    offsets, active, max_rows, group, local = plan
    chunks = planner.plan_chunks(offsets, active, max_rows, group_size=group, token_local=local)
    sizes = [sum(p.end - p.start for p in chunk) for chunk in chunks]
    for chunk, (size, following) in zip(chunks[1:], itertools.pairwise(sizes), strict=True):
        first = chunk[0].sequence // group
        next_group = sum(p.end - p.start for p in chunk if p.sequence // group == first)
        assert size + (next_group if not local or group > 1 else following) > max_rows


@given(plans())
def test_the_index_of_a_chunk_lists_its_rows(
    plan: tuple[list[int], list[bool], int, int, bool],
) -> None:
    offsets, active, max_rows, group, local = plan
    everything = torch.arange(offsets[-1])
    for chunk in planner.plan_chunks(
        offsets, active, max_rows, group_size=group, token_local=local
    ):
        index, n = planner.chunk_index(chunk, torch.device("cpu"))
        rows = [row for p in chunk for row in range(p.start, p.end)]
        assert everything[index].tolist() == rows and n == len(rows)
        if rows and rows == list(range(rows[0], rows[-1] + 1)):
            assert isinstance(index, slice)  # adjacent rows are not copied


def test_chunk_sequences_keep_group_and_totals() -> None:
    seq = lk.Sequences.from_lengths([3, 4, 5, 6], group_size=2).with_totals(num_tokens=99)
    here = planner.chunk_sequences([Piece(2, 7, 12), Piece(3, 12, 18)], seq)
    assert here.lengths.tolist() == [5, 6] and here.group_size == 2
    assert (here.total_tokens, here.total_sequences) == (99, 4)


def test_rows_that_a_budget_holds() -> None:
    assert planner.chunk_rows(1000, 4, 4000 * 7 + 3999) == 7
    assert planner.chunk_rows(1000, 4, 1) == 1
    assert planner.chunk_rows(5000, 4, None) == planner.DEFAULT_BUDGET // (5000 * 4)
    assert planner.chunk_rows(151936, 4, None) == planner.MIN_ROWS
    assert planner.default_budget(100) == planner.DEFAULT_BUDGET


SHAPE: dict[str, Any] = {"longest_chunk": 100, "num_rows": 400, "hidden_size": 64, "vocab": 5000}


def test_the_memory_formula() -> None:
    panel, panels, d, n, v = 2048, 3, 64, 400, 5000
    fp32 = planner.extra_bytes("linear_loss", **SHAPE)
    assert fp32 == 100 * (4 * v + 4 * d + 32 * panels)
    # Rounded gradients stand beside their accumulators when they are handed over.
    half = planner.extra_bytes("linear_loss", **SHAPE, hidden_bytes=2, weight_bytes=2)
    accumulated, rounded = 4 * (n + v) * d, 2 * (n + v) * d
    chunk = 100 * (4 * v + 8 * d + 32 * panels) + 4 * panel * d
    assert half == accumulated + max(chunk, rounded) - rounded
    frozen = planner.extra_bytes(
        "linear_loss", **SHAPE, hidden_bytes=2, weight_bytes=2, frozen_weight=True
    )
    assert frozen == chunk + 2 * n * d
    score = planner.extra_bytes("score", **SHAPE)
    assert score == n * (4 * panel + 32 * panels)
    vectors = 16 * n * panels + 28 * n
    assert planner.extra_bytes("linear_logprob", **SHAPE) == 4 * n * panel + vectors
    mixed = planner.extra_bytes("linear_logprob", **SHAPE, hidden_bytes=2, weight_bytes=2)
    assert mixed == 4 * n * panel + vectors + 6 * n * d + 8 * panel * d
    for rows, measured in ((1024, 8.4), (4096, 33.7)):  # MiB, by benchmarks/measure.py
        stated = planner.extra_bytes(
            "linear_logprob", longest_chunk=rows, num_rows=rows, hidden_size=768, vocab=50257
        )
        assert stated / 2**20 == pytest.approx(measured, rel=0.05)
    small = planner.extra_bytes("score", **SHAPE, memory_budget=panel * 4 * 10)
    assert small == 10 * (4 * panel + 32 * panels)


def test_the_memory_formula_knows_its_ops() -> None:
    with pytest.raises(ValueError, match="op must be"):
        planner.extra_bytes("logprob", **SHAPE)
