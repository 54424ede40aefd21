"""The epilogue of the Hopper GEMM and what follows it, on the CPU: what nvcc sees, built by g++.

Float32 products stand in for the GEMM's accumulators, tests/cuda_host for CUDA.
"""

import ctypes
import math
import mmap
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_host_backend import CODES, CXX, ROOT, compile_host
from test_backends_rows import close, logit_map, true_gradient, true_stats, zoned
from test_cuda_host import NORESERVE, SANITIZE, fuzz_sanitized, seed_fault
from torch import Tensor

from lolkernels import planner
from lolkernels.backends import cuda_hopper, reference

HALF = (torch.bfloat16, torch.float16)
SPAN = cuda_hopper.SPAN
WIDTHS = (1, 7, 8, 9, 31, 255, 256, 257, 264, 511, 600, 1030)
OPTIONS: tuple[dict[str, float], ...] = (
    {},
    {"scale": 0.5, "temperature": 0.7},
    {"softcap": 30.0},
    {"scale": 2.0, "softcap": 15.0, "temperature": 1.3},
)

pytestmark = pytest.mark.skipif(CXX is None, reason="needs g++")


def compile_spans(library: Path, *flags: str, tree: Path = ROOT) -> Path:
    return compile_host(tree, library, *flags, name="spans.cpp")


def backend(library: Path) -> ModuleType:
    """A backend as lolkernels.backends.cuda_hopper, whose GEMM is torch's in float32."""
    host = ctypes.CDLL(str(library))

    def address(t: Tensor | None) -> Any:
        assert t is None or t.dim() == 1 or t.is_contiguous()
        return ctypes.c_void_p(0 if t is None else t.data_ptr())

    def held(x: Tensor | None, dtype: torch.dtype, n: int, v: int) -> Any:
        data, stride = (0, 0) if x is None else (x.data_ptr(), x.stride(0))
        return (ctypes.c_int64 * 5)(data, CODES[dtype], n, v, stride)

    def scaling(scale: float = 1.0, softcap: float = 0.0, temperature: float = 1.0) -> Any:
        return (ctypes.c_double * 3)(scale, softcap, temperature)

    def finish(
        products: Tensor, bias: Tensor | None, labels: Tensor, out: Tensor | None, **options: Any
    ) -> Any:
        n, v = products.shape
        parts = torch.full((3, -(-v // SPAN), n), math.nan)
        result = torch.full((5, n), math.nan)
        if bias is not None:
            bias = torch.nn.functional.pad(bias.float(), (0, -v % SPAN))
        dtype = torch.bfloat16 if out is None else out.dtype
        status = n and host.host_linear_spans(
            *(address(products), ctypes.c_int64(products.stride(0))),
            *(held(out, dtype, n, v), address(parts), address(bias), address(labels.contiguous())),
            *(scaling(**options), address(result)),
        )
        assert status == 0
        return tuple(result[:4]), cuda_hopper.Spans(parts, result[0], result[4])

    def linear_spans(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        out: Tensor | None,
        **options: Any,
    ) -> Any:
        cuda_hopper.check_operands(hidden, weight)
        return finish(hidden.float() @ weight.float().T, bias, labels, out, **options)

    def span_dlogits_(
        x: Tensor, spans: Any, labels: Tensor, lse: Tensor, coef: Tensor, **options: Any
    ) -> Tensor:
        given = (labels, spans.target_logit, spans.target_slope, lse, coef)
        vectors = [t.contiguous() for t in given]
        place = held(x, x.dtype, *x.shape)
        status = len(x) and host.host_span_dlogits(
            place, address(spans.parts), *(address(t) for t in vectors), scaling(**options)
        )
        assert status == 0
        return x

    def linear_row_stats(*operands: Any, **options: Any) -> Any:
        return linear_spans(*operands, None, **options)[0]

    module = ModuleType("host")
    for name in ("row_stats", "dlogits_", "sequence_coef"):
        setattr(module, name, getattr(reference, name))
    module.why_unavailable = lambda: None
    module.GEMM_DTYPES, module.finish, module.order = HALF, finish, host.host_order
    module.linear_spans, module.span_dlogits_ = linear_spans, span_dlogits_
    module.linear_row_stats = linear_row_stats
    return module


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return backend(compile_spans(tmp_path_factory.mktemp("spans") / "spans.so", "-O2"))


@pytest.fixture(params=["first thread first", "last thread first"])
def host(compiled: ModuleType, request: pytest.FixtureRequest) -> Any:
    compiled.order(int(request.param.startswith("last")))
    yield compiled
    compiled.order(0)


def aligned_rows(n: int, v: int, dtype: torch.dtype) -> Any:
    """Poisoned memory with rows that start at multiples of 16 elements."""
    stride = planner.padded(v) + 16
    whole = torch.full((128 + n * stride,), math.nan, dtype=dtype)
    return SimpleNamespace(whole=whole, view=whole.as_strided((n, v), (stride, 1), 64))


def intact(place: Any) -> bool:
    """Nothing but the rows and the rest of their last eight columns is written."""
    n, v = place.view.shape
    room = place.whole.as_strided((n, -(-v // 8) * 8), place.view.stride(), 64)
    kept = place.whole.clone()
    kept.as_strided(room.shape, room.stride(), 64).fill_(math.nan)
    return bool(kept.isnan().all())


def check(
    host: ModuleType, n: int, v: int, dtype: torch.dtype, *, with_bias: bool, **options: float
) -> None:
    products = zoned(torch.randn(n, v) * 3)
    bias = torch.randn(v) if with_bias else None
    x = products.view if bias is None else products.view + bias
    labels = torch.randint(v, (n,))
    labels[0], labels[-1] = v - 1, 0
    place = aligned_rows(n, v, dtype)
    stats, spans = host.finish(products.view, bias, labels, place.view, **options)
    for got, want in zip(stats, true_stats(x, labels, **options), strict=True):
        assert close(got, want, 2e-5)
    assert intact(place)

    # The maxima, and e^(z - maximum) dz/dx without its constant part.
    z = logit_map(x, **{"scale": 1.0, "softcap": 0.0, "temperature": 1.0, **options})
    rest = torch.nn.functional.pad(z, (0, -v % SPAN), value=-math.inf).view(n, -1, SPAN)
    assert close(spans.parts[0], rest.amax(2).T, 2e-5)

    coef = torch.randn(n)
    abc = (coef, -coef, torch.zeros(n))
    want = true_gradient(x, labels, stats[1], abc, **options)
    got = host.span_dlogits_(place.view, spans, labels, stats[1], coef, **options)
    finfo = torch.finfo(dtype)
    # Rounded as an exponential and as a gradient. Small exponentials lose digits in float16.
    gain = options.get("scale", 1.0) / options.get("temperature", 1.0)
    small = finfo.tiny * finfo.eps * (1 + gain * coef.abs()[:, None])
    terms = true_gradient(x, labels, stats[1], abc, terms=True, **options)
    bound = 1.01 * finfo.eps * want.abs() + small + 4e-5 * terms
    assert bool(((got.double() - want).abs() <= bound).all()), (got.double() - want).abs().max()
    assert intact(place)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_width(
    host: ModuleType, dtype: torch.dtype, options: dict[str, float], with_bias: bool
) -> None:
    for v in WIDTHS:
        check(host, 3, v, dtype, with_bias=with_bias, **options)


@pytest.mark.parametrize("n", [1, 8, 9, 63, 64, 65, 130])
def test_every_height(host: ModuleType, n: int) -> None:
    check(host, n, 300, HALF[n % 2], with_bias=True)


def test_columns_shared_out_among_blocks(host: ModuleType) -> None:
    check(host, 2, 9001, torch.bfloat16, with_bias=False)


def test_labels_outside_have_no_target(compiled: ModuleType) -> None:
    v = 300
    labels = torch.tensor([-100, -1, 0, 255, 256, 299, 300, 511, 512, 2**40])
    products, place = torch.randn(len(labels), v), aligned_rows(len(labels), v, torch.bfloat16)
    stats, spans = compiled.finish(products, None, labels, place.view)
    for got, want in zip(stats, true_stats(products, labels), strict=True):
        assert close(got, want, 2e-5)
    coef = torch.ones(len(labels))
    got = compiled.span_dlogits_(place.view, spans, labels, stats[1], coef)
    want = true_gradient(products, labels, stats[1], (coef, -coef, 0 * coef))
    assert close(got, want, 4e-3)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("dtype", HALF)
def test_a_confident_label_keeps_its_digits(
    compiled: ModuleType, p: float, dtype: torch.dtype
) -> None:
    v = 600
    products = torch.full((1, v), -math.log(p / (1 - p) * (v - 1)))
    products[0, 300] = 0.0
    labels, coef = torch.tensor([300]), torch.ones(1)
    place = aligned_rows(1, v, dtype)
    stats, spans = compiled.finish(products, None, labels, place.view)
    want = true_gradient(products, labels, true_stats(products, labels)[1], (coef, -coef, 0 * coef))
    got = compiled.span_dlogits_(place.view, spans, labels, stats[1], coef)
    assert abs(float(got[0, 300]) / float(want[0, 300]) - 1) < 1e-2
    assert abs(float(stats[0] - stats[1]) / math.log(p) - 1) < 1e-2


def test_special_rows(compiled: ModuleType) -> None:
    """Columns of -inf, a span of nothing else, a nan, an infinity; far-off and shifted rows."""
    v = 700
    x = torch.randn(8, v)
    x[0, ::3] = -math.inf
    x[1, :256] = -math.inf
    x[2, 256:] = -math.inf
    x[3, 500] = math.nan
    x[4] += 1e4
    x[5] -= 1e4
    x[6] *= 300.0
    x[7, 5] = math.inf
    labels = torch.tensor([1, 300, 5, 7, 699, 0, int(x[6].argmax()), 6])
    place = aligned_rows(8, v, torch.bfloat16)
    stats, spans = compiled.finish(x, None, labels, place.view)
    want = reference.row_stats(x, labels)
    for i in (0, 1, 2, 4, 5, 6):
        for got, exact in zip(stats, true_stats(x, labels), strict=True):
            assert math.isclose(float(got[i]), float(exact[i]), rel_tol=1e-6, abs_tol=2e-5), i
    for i in (3, 7):
        assert math.isnan(float(stats[1][i])) == math.isnan(float(want[1][i])), i
    coef = torch.full((8,), 0.5)
    got = compiled.span_dlogits_(place.view, spans, labels, stats[1], coef)
    exact = true_gradient(x[:3], labels[:3], want[1][:3], (coef[:3], -coef[:3], 0 * coef[:3]))
    assert close(got[:3], exact.nan_to_num(0.0), 4e-3)
    assert bool(got[3].isnan().all()), "a spoilt row has no gradient"
    assert bool(got[[0, 1, 2, 4, 5, 6]].isfinite().all())


def test_offsets_beyond_two_to_the_31(compiled: ModuleType) -> None:
    stride, v = 2**31 + 16, 40  # memory that is never touched costs nothing
    space = mmap.mmap(-1, 2 * (stride + v) + 64, flags=mmap.MAP_PRIVATE | NORESERVE)
    place = torch.frombuffer(space, dtype=torch.bfloat16).as_strided((2, v), (stride, 1))
    products, labels, coef = torch.randn(2, v), torch.tensor([3, 39]), torch.ones(2)
    stats, spans = compiled.finish(products, None, labels, place)
    got = compiled.span_dlogits_(place, spans, labels, stats[1], coef)
    want = true_gradient(products, labels, stats[1], (coef, -coef, 0 * coef))
    assert close(got, want, 4e-3)


def test_a_row_gives_the_same_bits_in_any_company(compiled: ModuleType) -> None:
    x, labels, coef = torch.randn(1100, 900), torch.randint(900, (1100,)), torch.randn(1100)

    def both(rows: slice) -> list[Tensor]:
        place = aligned_rows(len(x[rows]), 900, torch.bfloat16)
        stats, spans = compiled.finish(x[rows], None, labels[rows], place.view)
        compiled.span_dlogits_(place.view, spans, labels[rows], stats[1], coef[rows])
        return [*stats, place.view]

    few = slice(1097, None)
    for many, alone in zip(both(slice(None)), both(few), strict=True):
        assert torch.equal(many[few], alone)


def fuzz(library: Path, seeds: int) -> None:
    """What the sanitized process runs."""
    host = backend(library)
    for reverse in (0, 1):
        host.order(reverse)
        torch.manual_seed(reverse)
        check(host, 2, 9001, HALF[reverse], with_bias=False)
        for seed in range(seeds):
            torch.manual_seed(seed)
            v, options = WIDTHS[seed % len(WIDTHS)], OPTIONS[seed // 3 % len(OPTIONS)]
            check(host, 1 + seed % 3, v, HALF[seed % 2], with_bias=seed % 5 < 2, **options)
    print("clean")


def test_under_the_sanitizers(tmp_path: Path) -> None:
    fuzz_sanitized(__file__, compile_spans(tmp_path / "spans.so", "-O1", *SANITIZE), 24)


MUTANTS = [
    ("spans.cuh", "sent = upper ? words[i] : words[i + step]", "sent = words[i]"),
    ("spans.cuh", "if (rest <= 0) return;", ""),
    ("spans.cuh", ">= left - 2 * q) x[i]", "> left - 2 * q) x[i]"),
    ("spans.cuh", "e * (1.0f - t * t)", "e"),
    ("spans.cuh", "sum + (ones - held(top))", "sum + ones"),
    ("spans.cuh", "if (inside && column < left)", "if (column < left)"),
    ("spans.cuh", "dev[i % kQuad] += e * depth(z, base)", "dev[i % kQuad] += e * z"),
    ("span_rows.cuh", "  __syncthreads();", ""),
    ("span_rows.cuh", "maximum[span * rows] - lse", "maximum[0] - lse"),
    ("span_rows.cuh", "label >= column &&", "label > column &&"),
    ("launch.cuh", "(spans + spans_a_block - 1) / spans_a_block", "1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "old", "new"), [("spans.cuh", "", ""), *MUTANTS])
def test_a_seeded_fault_is_found(file: str, old: str, new: str, tmp_path: Path) -> None:
    seed_fault(tmp_path, file, old, new)
    library = compile_spans(tmp_path / "spans.so", "-O1", *SANITIZE, tree=tmp_path)
    if old == "":  # the control
        fuzz_sanitized(__file__, library, 24)
        return
    with pytest.raises(AssertionError):
        fuzz_sanitized(__file__, library, 24)


@pytest.mark.parametrize(
    ("hidden", "weight", "text"),
    [
        (torch.zeros(4, 20), torch.zeros(9, 20), "multiple of 8"),
        (torch.zeros(24, 4).T, torch.zeros(9, 24), r"hidden.*contiguous"),
        (torch.zeros(4, 24), torch.zeros(24, 9).T, r"weight.*contiguous"),
        (torch.zeros(100).as_strided((4, 24), (25, 1)), torch.zeros(9, 24), r"hidden.*16 bytes"),
        (torch.zeros(100)[1:97].view(4, 24), torch.zeros(9, 24), r"hidden.*clone"),
    ],
)
def test_operands_it_cannot_take(
    compiled: ModuleType, hidden: Tensor, weight: Tensor, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        compiled.linear_spans(hidden, weight, None, torch.zeros(4, dtype=torch.int64), None)


def test_the_columns_of_a_span_are_those_of_the_kernel() -> None:
    text = (ROOT / "csrc" / "cuda" / "spans.cuh").read_text()
    assert f"kSpan = {SPAN};" in text and planner.SPAN == SPAN


if __name__ == "__main__":
    fuzz(Path(sys.argv[1]), int(sys.argv[2]))
