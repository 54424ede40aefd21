"""The order of rows: its law, its independence of everything but seed, epoch and place."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lolrl.sampler import UpdateSampler


def successive_sampling(weights: list[float], count: int) -> dict[tuple[int, ...], float]:
    """Exact probability of each ordered draw without replacement, by the weights left."""
    law = {}
    for order in itertools.permutations(range(len(weights)), count):
        probability, left = 1.0, sum(weights)
        for row in order:
            probability *= weights[row] / left
            left -= weights[row]
        law[order] = probability
    return law


def test_law_of_one_update_is_successive_sampling() -> None:
    weights = [0.5, 3.0, 1.0, 0.0, 2.0, 1.5]
    sampler = UpdateSampler(torch.tensor(weights), 6, update_batch_size=2, seed=7)
    draws = 20_000
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(draws):
        sampler.set_epoch(epoch)
        order = tuple(sampler.draw(0, 2))
        counts[order] = counts.get(order, 0) + 1
    law = {order: p for order, p in successive_sampling(weights, 2).items() if p > 0}
    assert set(counts) <= set(law) and len(law) == 20
    chi2 = sum((counts.get(o, 0) - draws * p) ** 2 / (draws * p) for o, p in law.items())
    # 19 degrees of freedom: P(chi2 > 43.8) = 0.001. A sampler that ignored the weights is at ~1e4.
    assert chi2 < 43.8
    uniform = sum((counts.get(o, 0) - draws / 20) ** 2 / (draws / 20) for o in law)
    assert uniform > 1000


@settings(max_examples=100)
@given(
    st.lists(st.floats(0, 1e3), min_size=1, max_size=40).filter(lambda w: any(x > 0 for x in w)),
    st.integers(1, 12),
    st.integers(-5, 2**40),
)
def test_no_row_is_twice_in_an_update(weights: list[float], size: int, seed: int) -> None:
    sampler = UpdateSampler(
        torch.tensor(weights, dtype=torch.float64), len(weights), update_batch_size=size, seed=seed
    )
    rows = list(sampler)
    positive = [i for i, w in enumerate(weights) if w > 0]
    assert len(rows) == len(sampler) == len(positive)
    for start in range(0, len(rows), sampler.update_batch_size):
        update = rows[start : start + sampler.update_batch_size]
        assert len(set(update)) == len(update) and set(update) <= set(positive)


@settings(max_examples=100)
@given(st.integers(1, 200), st.integers(1, 32), st.integers(0, 1000), st.integers(0, 5))
def test_uniform_epoch_is_a_permutation(n: int, size: int, seed: int, epoch: int) -> None:
    sampler = UpdateSampler(None, n, update_batch_size=size, seed=seed)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(n))


@pytest.mark.parametrize("weights", [None, torch.arange(1.0, 101.0)])
def test_stream_depends_on_seed_epoch_and_nothing_else(weights) -> None:
    def stream(seed: int, epoch: int) -> list[int]:
        sampler = UpdateSampler(weights, 100, update_batch_size=8, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = stream(0, 0)
    torch.rand(1000)
    state = torch.random.get_rng_state()
    assert stream(0, 0) == first
    # Nothing is drawn from the global generator.
    assert torch.equal(torch.random.get_rng_state(), state)
    assert stream(1, 0) != first and stream(0, 1) != first and stream(1, 0) != stream(0, 1)


def test_suffix_after_resume_is_the_same() -> None:
    sampler = UpdateSampler(torch.rand(50), 50, update_batch_size=4, seed=3)
    sampler.set_epoch(2)
    whole = list(sampler)
    for skipped in range(0, 48, 4):
        again = UpdateSampler(sampler.weights, 50, update_batch_size=4, seed=3)
        again.set_epoch(2)
        assert list(itertools.islice(again, skipped, None)) == whole[skipped:]


def test_rows_of_an_update_come_longest_first_and_are_the_same_rows() -> None:
    lengths = torch.randint(1, 100, (60,))
    for weights in (None, torch.rand(60) + 0.1):
        plain = UpdateSampler(weights, 60, update_batch_size=16, seed=1)
        by_length = UpdateSampler(weights, 60, update_batch_size=16, seed=1, lengths=lengths)
        a, b = list(plain), list(by_length)
        for start in range(0, 60, 16):
            update = b[start : start + 16]
            assert set(update) == set(a[start : start + 16])
            sizes = [int(lengths[i]) for i in update]
            assert sizes == sorted(sizes, reverse=True)


def test_tiny_weights_are_drawn_and_zero_ones_never() -> None:
    weights = torch.tensor([1e-300, 0.0, 1e-300, 1e-310], dtype=torch.float64)
    sampler = UpdateSampler(weights, 4, update_batch_size=2, seed=0)
    seen = set()
    for epoch in range(50):
        sampler.set_epoch(epoch)
        seen |= set(sampler)
    assert seen >= {0, 2} and 1 not in seen


def test_share_of_draws_follows_the_weights() -> None:
    """With updates much smaller than the data, a row's share of draws is its share of weight."""
    weights = torch.linspace(0.1, 2.0, 400, dtype=torch.float64)
    sampler = UpdateSampler(weights, 400, update_batch_size=1, seed=5)
    counts = torch.zeros(400, dtype=torch.float64)
    for epoch in range(60):
        sampler.set_epoch(epoch)
        counts += torch.bincount(torch.tensor(list(sampler)), minlength=400)
    low, high = counts[:200].sum() / counts.sum(), weights[:200].sum() / weights.sum()
    # 24,000 draws: standard deviation 0.003.
    assert math.isclose(low, high, abs_tol=0.012)


REFUSED = [
    (torch.zeros(3), 3, 2, 1, "all zero"),
    (torch.tensor([1.0, -1.0]), 2, 2, 1, "finite and >= 0"),
    (torch.tensor([1.0, math.nan]), 2, 2, 1, "finite and >= 0"),
    (torch.tensor([1.0, math.inf]), 2, 2, 1, "finite and >= 0"),
    (torch.ones(3), 2, 2, 1, "shape"),
    (None, 0, 2, 1, "num_rows"),
    (None, 2, 0, 1, "update_batch_size"),
    (None, 25, 6, 2, "group_size=2 must divide"),
    (None, 24, 5, 2, "group_size=2 must divide"),
    (torch.ones(4), 4, 2, 2, "sampling must be uniform"),
]


@pytest.mark.parametrize(("weights", "n", "size", "group", "message"), REFUSED)
def test_bad_arguments(weights, n, size, group, message) -> None:
    with pytest.raises(ValueError, match=message):
        UpdateSampler(weights, n, update_batch_size=size, seed=0, group_size=group)


def test_fingerprint_tells_streams_apart() -> None:
    def fingerprint(weights: torch.Tensor | None, size: int, seed: int) -> dict:
        return UpdateSampler(weights, 4, update_batch_size=size, seed=seed).fingerprint()

    base, ones = fingerprint(torch.ones(4), 2, 0), torch.ones(4)
    assert fingerprint(ones, 2, 0) == base
    more = torch.tensor([1.0, 1, 1, 2])
    for other in ((ones, 2, 1), (ones, 4, 0), (more, 2, 0), (None, 2, 0)):
        assert fingerprint(*other) != base


def test_groups_stay_together_in_order_and_come_once_an_epoch() -> None:
    lengths = torch.arange(24).flip(0)
    sampler = UpdateSampler(None, 24, update_batch_size=6, seed=3, lengths=lengths, group_size=3)
    rows = list(sampler)
    assert sorted(rows) == list(range(24))
    groups = [rows[i : i + 3] for i in range(0, 24, 3)]
    assert all(g == [g[0], g[0] + 1, g[0] + 2] and g[0] % 3 == 0 for g in groups)
    starts = [g[0] for g in groups]
    assert starts != sorted(starts)
    for update in range(0, 8, 2):  # the longest group of an update comes first
        assert starts[update] < starts[update + 1]
    plain = UpdateSampler(None, 24, update_batch_size=6, seed=3)
    assert "group_size" not in plain.fingerprint() and sampler.fingerprint()["group_size"] == 3
