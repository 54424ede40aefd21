"""What follows a sweep of whole rows: the kernels beside their definition in torch, in float64."""

import pytest
import torch
from torch import Tensor

from lolkernels.backends import TABLE, finish, triton
from lolkernels.backends.contract import Exps, RowStats

pytestmark = [
    pytest.mark.parametrize("backend", ["triton", "cuda_host", "reference"]),
    pytest.mark.filterwarnings("ignore:.*encountered in"),  # numpy's, in Triton's interpreter
]
INF, NAN = torch.inf, torch.nan
# anchor, rest, deviation, max, target, slope: plain; the label far below, far above, masked; nearly
# certain; alone; +inf and nan among the others, at the label; nothing but -inf
SUMS = torch.tensor(
    [
        [18.0, 3e-4, -2e-3, 9.5, 2.0, 0.7],
        [60.0, 1.5, -0.5, 60.0, -90.0, 0.7],
        [-90.0, 40.0, -60.0, 60.0, 60.0, 0.7],
        [4.0, 2.5, -1.5, 4.0, -INF, 0.7],
        [26.0, 4e-13, -7e-12, 10.0, 10.0, 0.7],
        [3.0, 0.0, 0.0, 3.0, 3.0, 0.7],
        [18.0, INF, INF, INF, 2.0, 0.7],
        [18.0, NAN, NAN, NAN, 2.0, 0.7],
        [0.0, 1.0, -0.5, INF, INF, 0.0],
        [0.0, 0.0, 0.0, -INF, -INF, 0.7],
    ]
).T


def stats_of(n: int, dtype: torch.dtype = torch.float32) -> RowStats:
    return RowStats(*(torch.full((n,), NAN, dtype=dtype) for _ in RowStats._fields))


def close(got: RowStats, want: RowStats) -> None:
    for name, a, b in zip(got._fields, got, want, strict=True):
        atol = 2e-6 if name == "entropy" else 1e-30  # it is a difference
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=atol, equal_nan=True)


def test_statistics_of_every_kind_of_row(backend: str) -> None:
    sums, n, v = Exps(*SUMS.contiguous()), SUMS.shape[1], 100
    labels = torch.arange(2 * n)[::2]
    got, want = stats_of(n), stats_of(n, torch.float64)
    TABLE[backend].finish(sums, labels, v, got)
    finish.finish(Exps(*(t.double() for t in sums)), labels, v, want)
    close(got, want)
    assert torch.equal(got.lse.isnan(), torch.tensor([False] * 6 + [True] * 3 + [False]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [1, 24, 1029])
def test_rows_and_bad_labels(backend: str, d: int, dtype: torch.dtype) -> None:
    if (backend, dtype) == ("triton", torch.bfloat16):
        pytest.skip("the interpreter cuts bfloat16 off")
    n, v = 5, 30
    sums = Exps(*SUMS[:, :1].expand(6, n).contiguous())
    table = torch.randn(v, d).to(dtype)
    for place in (table, torch.empty(d, v, dtype=dtype).T.copy_(table)):
        unit, labels, flags = torch.randn(n, d), torch.tensor([0, 7, 29, 7, 3]), torch.tensor(2)
        flags = flags.int()
        wide, out, want = unit.double(), stats_of(n), stats_of(n, torch.float64)
        TABLE[backend].finish(sums, labels, v, out, flags, unit, place)
        exact = Exps(*(t.double() for t in sums))
        finish.finish(exact, labels, v, want, flags.clone(), wide, table)
        close(out, want)
        torch.testing.assert_close(unit.double(), wide, rtol=1e-5, atol=1e-6)
        assert int(flags) == 2
    for bad in (-1, v, 2**40, -(2**40)):
        labels[2] = bad
        flags.fill_(2)
        TABLE[backend].finish(sums, labels, v, out, flags, unit, table)
        spoilt = torch.arange(n) == 2
        for name in ("logps", "lse", "entropy", "share"):
            assert torch.equal(getattr(out, name).isnan(), spoilt), name
        assert torch.equal(unit.isnan().all(1), spoilt) and not unit[~spoilt].isnan().any()
        assert int(flags) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("d", [3, 30])
def test_rows_of_labels_are_added_in_order(
    backend: str, d: int, both: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (backend, dtype) == ("triton", torch.bfloat16):
        pytest.skip("the interpreter cuts bfloat16 off")
    monkeypatch.setattr(triton, "WIDTH", 16)  # of labels and of columns: several of either
    n, v = 70, 40
    labels = torch.randint(3, (n,)) * 7  # most rows share theirs
    labels[[0, 50, n - 1]] = torch.tensor([39, 20, 39])
    table, rows = torch.randn(v, d).to(dtype), torch.randn(d, n).to(dtype).T
    stats = stats_of(n)
    for name in ("logps", "rest", "slope"):
        getattr(stats, name).copy_(-torch.rand(n) if name == "logps" else torch.rand(n))
    a = torch.randn(())[None].expand(n)
    z = torch.randn(n) if both else None
    exact = [None if t is None else t.double() for t in (a, z, *stats)]
    want = table.double()
    finish.add_labels(want, labels, rows.double(), *exact[:2], RowStats(*exact[2:]))
    results: list[Tensor] = []
    for _ in range(2):
        results.append(table.clone())
        TABLE[backend].add_labels(results[-1], labels, rows, a, z, stats)
    assert torch.equal(*results)
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    off = (results[0].double() - want).abs()
    assert bool((off <= 1e-5 + rounding * want.abs()).all())
    untouched = torch.ones(v, dtype=torch.bool).index_fill_(0, labels, False)
    assert torch.equal(results[0][untouched], table[untouched])
