"""The compiled backend as a citizen: layouts, threads, 64-bit offsets, bad input, absence."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cases import PRINT_PEAK, each_dtype, run_python
from judges import row_stats
from torch import Tensor

from lolkernels.backends import cpu

pytestmark = pytest.mark.skipif(
    cpu.why_unavailable() is not None, reason=str(cpu.why_unavailable())
)


def gradient(x: Tensor, labels: Tensor, out: Tensor | None = None) -> Tensor:
    """d/dx of sum_t k_t * logp_t with k = 1, 2, ..."""
    lse = row_stats(cpu, x, labels)[1]
    k = torch.arange(1.0, len(x) + 1)
    return cpu.dlogits_(x, labels, lse, k, -k, torch.zeros_like(k), out=out)


def exps(x: Tensor, labels: Tensor, out: Tensor | None = None) -> list[Tensor]:
    """The sums and the exponentials; every second row stands out of reach of its anchor."""
    anchor = torch.arange(len(x)) % 2 * -80.0
    return [*cpu.exps_(x, labels, anchor, out=out), x if out is None else out]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_layout_gives_the_same_bits(dtype: torch.dtype) -> None:
    n, v = 5, 2100
    x = (torch.randn(n, v) * 3).to(dtype)
    labels = torch.randint(v, (n,))
    sums = cpu.sums(x, labels)
    grad = gradient(x, labels, out=torch.empty(n, v))
    made = exps(x, labels, out=torch.empty(n, v))
    layouts: dict[str, Tensor] = {
        "transposed": x.t().contiguous().t(),
        "every second column": torch.stack([x, -x], 2).flatten(1)[:, ::2],
        "every second row": torch.stack([x, -x], 1).flatten(0, 1)[::2],
        "offset": torch.cat([-x, x], 1)[:, v:],
        "both strided": torch.empty(2 * n, 3 * v, dtype=dtype)[::2, 1::3].copy_(x),
    }
    for name, view in layouts.items():
        for got, want in zip(cpu.sums(view, labels), sums, strict=True):
            assert torch.equal(got, want), name
        assert torch.equal(gradient(view, labels, out=torch.empty(v, n).t()), grad), name
        for got, want in zip(exps(view, labels, torch.empty(v, n).t()), made, strict=True):
            assert torch.equal(got, want), name
        if dtype == torch.float32:
            for got, want in zip(exps(view.clone(), labels), made, strict=True):
                assert torch.equal(got, want), name
            assert torch.equal(gradient(view, labels), grad), name
    row = x[:1].expand(n, v)
    for got, want in zip(cpu.sums(row, labels[:1].expand(n)), sums, strict=True):
        assert torch.equal(got, want[:1].expand(n))
    assert torch.equal(cpu.sums(row, labels).max_logit, sums.max_logit[:1].expand(n))


def test_classes_at_minus_infinity_change_no_bit() -> None:
    x, labels = torch.randn(6, 1500) * 3, torch.randint(1500, (6,))
    longer = torch.nn.functional.pad(x, (0, 5000), value=-torch.inf)
    for got, want in zip(cpu.sums(longer, labels), cpu.sums(x, labels), strict=True):
        assert torch.equal(got, want)
    grad, longer = gradient(x.clone(), labels), gradient(longer, labels)
    assert torch.equal(longer[:, :1500], grad) and (longer[:, 1500:] == 0).all()


def test_column_panels_combine_to_the_whole_row() -> None:
    x, labels = torch.randn(7, 3000) * 3, torch.randint(3000, (7,))
    panels = [(0, 1000), (1000, 1001), (1001, 3000)]
    parts = [row_stats(cpu, x[:, i:j], labels - i) for i, j in panels]
    target, lse, expected, top = row_stats(cpu, x, labels)
    assert torch.equal(torch.stack([p[0] for p in parts]).amax(0), target)
    assert torch.equal(torch.stack([p[3] for p in parts]).amax(0), top)
    part_lse = torch.stack([p[1] for p in parts]).double()
    torch.testing.assert_close(part_lse.logsumexp(0), lse.double(), rtol=0, atol=2e-6)
    mean = (torch.stack([p[2] for p in parts]) * (part_lse - lse).exp()).sum(0)
    torch.testing.assert_close(mean, expected.double(), rtol=0, atol=2e-5)
    k = torch.randn(7)
    whole = cpu.dlogits_(x.clone(), labels, lse, k, -k, k)
    for i, j in panels:
        cpu.dlogits_(x[:, i:j], labels - i, lse, k, -k, k)
    assert torch.equal(x, whole)


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (3, 0)])
def test_nothing_to_do(shape: tuple[int, int]) -> None:
    n = shape[0]
    x, labels = torch.empty(shape), torch.zeros(n, dtype=torch.int64)
    target, lse, expected, top = row_stats(cpu, x, labels)
    assert all(t.shape == (n,) for t in (target, lse, expected, top))
    assert (lse == -torch.inf).all() and (top == -torch.inf).all() and expected.isnan().all()
    assert gradient(x, labels).shape == shape
    assert (cpu.exps_(x, labels).rest == 0).all()


@each_dtype
@pytest.mark.parametrize(
    ("n", "v", "runs"),
    [(61, 5003, 60), (1, 300_000, 2), (3, 70_001, 2), (513, 1000, 2), (4000, 33, 2)],
)
def test_results_are_bit_identical_for_any_number_of_threads(
    n: int, v: int, runs: int, dtype: torch.dtype
) -> None:
    x, labels = (torch.randn(n, v) * 3).to(dtype), torch.randint(v, (n,))
    threads, runs = torch.get_num_threads(), runs if dtype == torch.float32 else 2

    def run() -> list[Tensor]:
        made = exps(x, labels, out=torch.empty_like(x))
        return [*cpu.sums(x, labels), gradient(x, labels, out=torch.empty_like(x)), *made]

    try:
        torch.set_num_threads(1)
        first = run()
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            for _ in range(runs):
                for got, want in zip(run(), first, strict=True):
                    assert torch.equal(got, want), count
    finally:
        torch.set_num_threads(threads)


SPARSE = """
import torch
from lolkernels.backends import cpu

V = 4
big = torch.empty(2**32 + 64, dtype=torch.bfloat16)  # 8 GiB of addresses, hardly any of memory
row = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.bfloat16)
one, zero, labels = torch.ones(3), torch.zeros(3), torch.tensor([0, 3, 1])
want = cpu.sums(row.expand(3, V), labels)
lse = row.expand(3, V).float().logsumexp(1)
small = cpu.dlogits_(row.repeat(3, 1), labels, lse, one, -one, zero)
strides = {"rows": (2**31 + 5, 1), "columns": (3, (2**32 - 8) // 3), "odd rows": (2**31 - 1, 7)}
for name, stride in strides.items():
    x = big.as_strided((3 if stride[0] < 2**31 - 1 else 2, V), stride)
    n = len(x)
    x.copy_(row.expand(n, V))
    for got, expected in zip(cpu.sums(x, labels[:n]), want):
        assert torch.equal(got, expected[:n]), name
    cpu.dlogits_(x, labels[:n], lse[:n], one[:n], -one[:n], zero[:n])
    assert torch.equal(x, small[:n]), name
    x.copy_(row.expand(n, V))
    e = row.repeat(n, 1)
    sums = cpu.exps_(e, labels[:n])
    assert all(torch.equal(*pair) for pair in zip(cpu.exps_(x, labels[:n]), sums)), name
    assert torch.equal(x, e), name
"""


def test_offsets_beyond_two_to_the_31_elements() -> None:
    assert int(run_python(SPARSE + PRINT_PEAK)) < 2**30  # the memory was never filled


N, V = 3, 8


def arguments(**changes: object) -> dict[str, object]:
    f = torch.zeros(N)
    good = {
        "logits": torch.zeros(N, V),
        "labels": torch.zeros(N, dtype=torch.int64),
        **dict.fromkeys(("lse", "a", "b", "c"), f),
        "scale": 1.0,
        "softcap": 0.0,
        "temperature": 1.0,
        "out": torch.zeros(N, V),
    }
    return good | changes


BUFFER = torch.zeros(4 * N * V)
BAD: list[tuple[str, dict[str, object]]] = [
    ("logits", {"logits": torch.zeros(N)}),
    ("logits", {"logits": torch.zeros(N, V, 1)}),
    ("logits", {"logits": torch.zeros(N, V, dtype=torch.float64)}),
    ("logits", {"logits": torch.zeros(N, V, dtype=torch.int64)}),
    ("labels", {"labels": torch.zeros(N + 1, dtype=torch.int64)}),
    ("labels", {"labels": torch.zeros(N, dtype=torch.int32)}),
    ("labels", {"labels": torch.zeros(N, 1, dtype=torch.int64)}),
    ("temperature", {"temperature": 0.0}),
    ("temperature", {"temperature": float("nan")}),
    ("temperature", {"temperature": float("inf")}),
    ("softcap", {"softcap": -1.0}),
    ("softcap", {"softcap": float("inf")}),
    ("scale", {"scale": float("nan")}),
    *((name, {name: torch.zeros(N - 1)}) for name in ("lse", "a", "b", "c")),
    *((name, {name: torch.zeros(N, dtype=torch.float64)}) for name in ("lse", "a", "b", "c")),
    ("out", {"out": torch.zeros(N, V + 1)}),
    ("out", {"out": torch.zeros(N - 1, V)}),
    ("out", {"out": torch.zeros(N, V, dtype=torch.float64)}),
    ("out", {"out": torch.zeros(1, V).expand(N, V)}),
    ("out", {"out": torch.zeros(N, 1).expand(N, V)}),
    ("out", {"out": BUFFER.as_strided((N, V), (V - 1, 1))}),
    ("out", {"out": BUFFER.as_strided((N, V), (1, N - 1))}),
    ("out", {"logits": BUFFER.view(-1, V)[:N], "out": BUFFER[1 : 1 + N * V].view(N, V)}),
    ("out", {"logits": BUFFER.view(-1, V)[:N], "out": BUFFER.as_strided((N, V), (1, N))}),
    (
        "out",
        {
            "logits": BUFFER[: N * V].view(N, V),
            "out": BUFFER.view(torch.bfloat16)[: N * V].view(N, V),
        },
    ),
]


@pytest.mark.parametrize(("name", "change"), BAD)
def test_the_ops_refuse_what_they_cannot_compute(name: str, change: dict[str, object]) -> None:
    values = arguments(**change)
    out = values.pop("out")
    assert isinstance(out, Tensor)
    before = out.clone()
    with pytest.raises(RuntimeError, match=rf"\b{name} must"):
        torch.ops.lolkernels.dlogits(*values.values(), out=out)
    assert torch.equal(out, before)
    anchor = values["lse"]
    for unused in ("lse", "a", "b", "c"):
        values.pop(unused)
    if name not in ("a", "b", "c"):
        x, y, *scaling = values.values()
        with pytest.raises(RuntimeError, match=rf"\b{name.replace('lse', 'anchor')} must"):
            torch.ops.lolkernels.exps(x, y, anchor, *scaling, out=out)
        assert torch.equal(out, before)
    if name in ("logits", "labels", "temperature", "softcap", "scale"):
        with pytest.raises(RuntimeError, match=rf"\b{name} must"):
            torch.ops.lolkernels.exps(x, y, None, *scaling, out=None)


def test_disjoint_views_of_one_buffer_are_fine() -> None:
    buffer = torch.randn(2 * N * V)
    x, out = buffer[: N * V].view(N, V), buffer[N * V :].view(N, V)
    labels = torch.arange(N)
    want = gradient(x.clone(), labels)
    assert torch.equal(gradient(x, labels, out=out), want)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    def point_to(library: Path) -> None:
        monkeypatch.setattr(cpu._compiled, "library", library)
        vars(cpu._compiled).pop("why_unavailable", None)  # what it found out before

    yield point_to
    vars(cpu._compiled).pop("why_unavailable", None)


def test_a_missing_library_says_what_to_do(
    elsewhere: Callable[[Path], None], tmp_path: Path
) -> None:
    elsewhere(tmp_path / "_C.abi3.so")
    reason = cpu.why_unavailable()
    assert reason is not None and "missing" in reason and "pip install" in reason
    with pytest.raises(ValueError, match="missing"):
        cpu.sums(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))


def test_a_library_that_does_not_load_says_why(
    elsewhere: Callable[[Path], None], tmp_path: Path
) -> None:
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b"not a shared object")
    elsewhere(library)
    reason = cpu.why_unavailable()
    assert reason is not None and torch.__version__ in reason and "pip install" in reason


def test_the_instruction_set_has_a_name() -> None:
    assert cpu.isa() in ("avx512", "avx2", "baseline")
