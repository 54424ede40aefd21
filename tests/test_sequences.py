"""``Sequences``: construction, sums, means, expansion, packing and denominators."""

import pytest
import torch

import lolkernels as lk


def test_three_ways_to_say_the_same() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    built = [
        lk.Sequences.from_mask(mask),
        lk.Sequences.from_mask(mask.int()),
        lk.Sequences.from_mask(mask.view(1, -1), cu_seqlens=torch.tensor([0, 4, 8, 12])),
        lk.Sequences.from_lengths([2, 0, 4]),
        lk.Sequences.from_lengths(torch.tensor([2, 0, 4], dtype=torch.int32)),
        lk.Sequences.from_cu_seqlens([0, 2, 2, 6]),
        lk.Sequences.from_cu_seqlens(torch.tensor([0, 2, 2, 6])),
    ]
    for seq in built:
        assert (seq.num_sequences, seq.num_tokens, seq.num_groups) == (3, 6, 3)
        assert seq.cu_seqlens.tolist() == [0, 2, 2, 6]
        assert seq.cu_seqlens.dtype == torch.int64 and seq.cu_seqlens.device.type == "cpu"
        assert seq.lengths.tolist() == [2, 0, 4]
        assert seq.token_to_sequence.tolist() == [0, 0, 2, 2, 2, 2]
        assert (seq.total_sequences, seq.total_tokens) == (3, 6)


def test_sum_mean_expand() -> None:
    seq = lk.Sequences.from_lengths([2, 0, 3])
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert seq.sum(x).tolist() == [3, 0, 12]
    assert seq.mean(x).tolist() == [1.5, 0, 4]
    assert seq.expand(torch.tensor([7.0, 8.0, 9.0])).tolist() == [7, 7, 9, 9, 9]


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.int64, torch.float32),
    ],
    ids=str,
)
def test_sums_are_at_least_float32(dtype: torch.dtype, result: torch.dtype) -> None:
    seq = lk.Sequences.from_lengths([300, 1])
    got = seq.sum(torch.ones(301).to(dtype))
    assert got.dtype == result and got.tolist() == [300, 1]


def test_sum_and_expand_are_differentiable() -> None:
    seq = lk.Sequences.from_lengths([2, 0, 3])
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(seq.sum, (x,))
    assert torch.autograd.gradcheck(seq.mean, (x,))
    assert torch.autograd.gradcheck(seq.expand, (y,))


def test_pack_selects_what_the_mask_selects() -> None:
    mask = torch.rand(4, 6) < 0.5
    seq = lk.Sequences.from_mask(mask)
    x = torch.randn(4, 6, 3, requires_grad=True)
    assert torch.equal(seq.pack(x), x[mask])
    assert torch.equal(seq.pack(x[..., 0]), x[..., 0][mask])
    seq.pack(x).sum().backward()
    assert torch.equal(x.grad[..., 0], mask.float())


def test_totals_are_those_of_a_larger_update() -> None:
    seq = lk.Sequences.from_mask(torch.ones(2, 3, dtype=torch.bool), group_size=2)
    larger = seq.with_totals(num_sequences=8, num_tokens=100)
    assert (larger.total_sequences, larger.total_tokens) == (8, 100)
    assert (larger.num_sequences, larger.num_tokens, larger.group_size) == (2, 6, 2)
    assert torch.equal(larger.rows, seq.rows)
    once_more = larger.with_totals(num_tokens=7)
    assert (once_more.total_sequences, once_more.total_tokens) == (8, 7)
    assert (seq.total_sequences, seq.total_tokens) == (2, 6)


def test_to_keeps_everything() -> None:
    seq = lk.Sequences.from_mask(torch.ones(2, 3, dtype=torch.bool), group_size=2)
    moved = seq.with_totals(num_sequences=4, num_tokens=9).to("cpu")
    assert (moved.total_sequences, moved.total_tokens, moved.group_size) == (4, 9, 2)
    assert torch.equal(moved.token_to_sequence, seq.token_to_sequence)
    assert moved.mask_shape == (2, 3) and torch.equal(moved.rows, seq.rows)


def test_it_prints_its_counts() -> None:
    text = repr(lk.Sequences.from_lengths([2, 3]).with_totals(num_tokens=50))
    assert "num_sequences=2" in text and "num_tokens=5" in text and "total_tokens=50" in text


def test_a_total_of_zero_needs_an_empty_batch() -> None:
    """A rank without tokens is fine; an update without any has nothing to average."""
    seq = lk.Sequences.from_lengths([2, 3])
    for count in ({"num_sequences": 0}, {"num_tokens": 0.0}):
        with pytest.raises(ValueError, match=r"total_\w+ must be a finite count > 0, got 0"):
            seq.with_totals(**count)
    none = lk.Sequences.from_lengths([])  # has a mean of 0, not 0 / 0
    assert (none.total_sequences, none.total_tokens) == (1, 1)
    empty = lk.Sequences.from_lengths([0, 0])
    assert empty.with_totals(num_sequences=0, num_tokens=0).totals.tolist() == [1, 1]
    assert empty.with_totals(num_sequences=7).total_sequences == 7


@pytest.mark.parametrize("lengths", [[1.5, 2.0], [1, 2.0], [True, False]])
def test_lengths_that_are_no_integers_are_refused(lengths: list[float]) -> None:
    for build in (lk.Sequences.from_lengths, lk.Sequences.from_cu_seqlens):
        with pytest.raises(TypeError, match="must hold integers"):
            build(lengths)


@pytest.mark.parametrize(
    ("which", "rows", "lengths", "whole"),
    [
        (slice(0, 2), slice(0, 5), [3, 2], [3, 2]),
        (slice(1, 3), slice(4, 7), [1, 2], [2, 4]),  # the ends are cut
        (slice(2, 3), slice(6, 8), [2], [4]),
        ([0, 2], torch.tensor([0, 1, 2, 8]), [3, 1], [3, 4]),  # not adjacent
        (slice(0, 2), torch.tensor([0, 2, 4]), [2, 1], [3, 2]),
    ],
)
def test_a_piece_keeps_the_length_and_the_mean_of_its_sequence(which, rows, lengths, whole) -> None:
    seq = lk.Sequences.from_lengths([3, 2, 4]).with_totals(num_sequences=30)
    part = seq.part(which, rows, lengths)
    assert part.lengths.tolist() == whole
    assert part.num_sequences == len(lengths) and part.num_tokens == sum(lengths)
    assert part.offsets.tolist() == part.cu_seqlens.tolist()
    assert part.offsets.diff().tolist() == lengths
    assert part.total_sequences == 30 and part.total_tokens == 9
    x = torch.arange(9.0)[rows]
    assert part.mean(x).tolist() == pytest.approx(
        [float(p.sum()) / n for p, n in zip(torch.split(x, lengths), whole, strict=True)]
    )
    assert part.to("cpu").offsets.diff().tolist() == lengths


def test_means_over_pieces_add_up() -> None:
    seq = lk.Sequences.from_lengths([5])
    x = torch.randn(5, dtype=torch.float64)
    first, second = seq.part(slice(0, 1), slice(0, 2), [2]), seq.part([0], slice(2, 5), [3])
    assert torch.allclose(first.mean(x[:2]) + second.mean(x[2:]), seq.mean(x))
    for reduction in ("seq-mean-token-mean", "token-mean"):
        loss = sum(
            lk.aggregate(part.sum(y), part, reduction)
            for part, y in ((first, x[:2]), (second, x[2:]))
        )
        assert torch.allclose(loss, lk.aggregate(seq.sum(x), seq, reduction))


def test_the_value_of_the_next_token_stops_at_the_end_of_a_sequence() -> None:
    seq = lk.Sequences.from_lengths([3, 0, 1, 2])
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    assert seq.following(x).tolist() == [2, 3, 0, 0, 6, 0]
    assert seq.following(x).dtype == torch.float64
    assert lk.Sequences.from_lengths([0]).following(torch.zeros(0)).shape == (0,)
    with pytest.raises(ValueError, match=r"\(6,\)"):
        seq.following(torch.zeros(4))


def test_sequences_of_inference_mode_can_be_differentiated_through() -> None:
    with torch.inference_mode():
        seq = lk.Sequences.from_lengths([2, 1])
    x = torch.randn(3, requires_grad=True)
    seq.for_autograd().mean(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.5, 0.5, 1.0]
    plain = lk.Sequences.from_lengths([2, 1])
    assert plain.for_autograd() is plain
