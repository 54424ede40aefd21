"""What a call launches and multiplies on a GPU, counted with kernels that do nothing."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import predict

N, D, V = 4096, 64, 3000
UNIT = 2 * N * D * V  # flops of one product


def chunks_of(there: predict.Count) -> int:
    return there.launched["exps_"] + there.launched["sums"]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("op", ["a_lol", "nll", "linear_logprob", "score"])
def test_few_launches_a_call_and_four_a_chunk(op: str, frozen: bool) -> None:
    one, (many, back) = (
        predict.count(op, 1024, D, V, frozen)[0],
        predict.count(op, N, D, V, frozen),
    )
    assert chunks_of(one) == 1 and chunks_of(many) == 4
    products = 1 if op == "score" else 2
    assert many.launches - one.launches == 3 * (products + 2), many  # exps_ and finish
    assert one.launches - (products + 2) <= 12, one
    assert back.launches <= (9 if op == "linear_logprob" else 6), back


@pytest.mark.parametrize("op", ["a_lol", "linear_logprob", "score"])
def test_a_heads_bias_rides_in_the_sweep(op: str) -> None:
    """One launch a call, which widens it, and none a chunk."""
    plain, _ = predict.count(op, N, D, V, True)
    there, _ = predict.count(op, N, D, V, True, bias=True)
    assert there.launches == plain.launches + 1, there


@pytest.mark.parametrize(
    ("op", "frozen", "products"),
    [
        ("a_lol", False, 3),
        ("a_lol", True, 2),
        ("linear_logprob", False, 3),
        ("linear_logprob", True, 2),
        ("score", True, 1),
    ],
)
def test_products_and_bytes(op: str, frozen: bool, products: int) -> None:
    there, back = predict.count(op, N, D, V, frozen)
    assert sum(there.products + back.products) == products * UNIT
    assert (there.logit_bytes + back.logit_bytes) / (N * V) == pytest.approx(
        6 if op == "score" else 8, rel=0.01
    )
