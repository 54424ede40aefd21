"""The epilogue of the Hopper GEMM and the rows of its spans, on the CPU: what nvcc sees, by g++.

Float32 products stand in for the GEMM's accumulators, tests/cuda_host for CUDA.
"""

import math
import mmap
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import seed_fault
from cuda_host_backend import ROOT, Host, compile_host, why_unavailable
from test_backends_rows import OPTIONS, close, draw, logit_map, zoned
from test_cuda_host import NORESERVE, SANITIZE, fuzz_sanitized
from torch import Tensor

from lolkernels.backends import TABLE, cuda_gemm, reference
from lolkernels.backends.contract import SHIFT, Exps
from lolkernels.backends.finish import statistics

BF16 = torch.bfloat16
EPS = torch.finfo(BF16).eps
WIDTHS = (1, 7, 8, 9, 31, 191, 192, 193, 255, 256, 257, 264, 384, 511, 600, 1030)

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


def aligned_rows(n: int, v: int) -> Any:
    """Poisoned memory with rows that start at multiples of 16 bytes."""
    stride = -(-v // 8) * 8 + 16
    whole = torch.full((128 + n * stride,), math.nan, dtype=BF16)
    return SimpleNamespace(whole=whole, view=whole.as_strided((n, v), (stride, 1), 64))


def intact(place: Any) -> bool:
    """Nothing but the rows and the rest of their last eight columns is written."""
    n, v = place.view.shape
    kept = place.whole.clone()
    kept.as_strided((n, -(-v // 8) * 8), place.view.stride(), 64).fill_(math.nan)
    return bool(kept.isnan().all())


def anchors(x: Tensor, labels: Tensor, **options: float) -> Tensor:
    """As the caller makes them, from a product of their own."""
    z = logit_map(x, **{"scale": 1.0, "softcap": 0.0, "temperature": 1.0, **options})
    return z.gather(1, labels[:, None])[:, 0].float() + SHIFT


def compare(
    got: Exps, e: Tensor, x: Tensor, labels: Tensor, anchor: Tensor, **options: Any
) -> None:
    """With the reference's sums and exponentials in float64."""
    exact = torch.zeros(x.shape, dtype=torch.float64)
    want = reference.exps_(x.double(), labels, anchor.double(), **options, out=exact)
    assert close(got.anchor, want.anchor, 2e-5)
    want = reference.exps_(x.double(), labels, got.anchor.double(), **options, out=exact)
    assert bool(((got.rest - want.rest).abs() <= 2e-5 * want.rest).all())
    assert bool(((got.deviation - want.deviation).abs() <= 2e-3 * (1e-9 + want.rest)).all())
    for name in ("max_logit", "target_logit", "slope"):
        assert close(getattr(got, name), getattr(want, name), 2e-5), name
    # Where a row is scaled to its maximum its exponentials are rounded twice.
    bound = (EPS + 4e-5) * exact.abs() + 1e-37
    if options.get("softcap"):  # 1 - tanh^2 comes from a difference
        z = logit_map(x, **{"scale": 1.0, "temperature": 1.0, **options})
        bound += 1e-6 * abs(options.get("scale", 1.0)) * (z - want.anchor[:, None]).exp()
    assert bool(((e.double() - exact).abs() <= bound).all())


def check(
    host: Host, n: int, v: int, tile: str, *, with_bias: bool, reach: bool, **options: float
) -> None:
    """With `reach` a row stands out of its anchor's reach, in some of its spans or all."""
    raw, labels = torch.randn(n, v) * 3, torch.randint(v, (n,))
    labels[0], labels[-1] = v - 1, 0
    if reach:
        raw[-1, torch.randint(v, (4,))] += 60.0 + 20.0 * torch.rand(4)
        raw[-1, 0] = 1.0
    products, bias = zoned(raw), torch.randn(v) if with_bias else None
    x = products.view if bias is None else products.view + bias
    anchor = anchors(x, labels, **options)
    if reach:
        anchor[0] = draw((-math.inf, math.nan, -60.0))
    if n > 2:
        labels[1] = draw((-1, v, v + 9))
    place = aligned_rows(n, v)
    got = host.finish(products.view, bias, labels, anchor, place.view, **options, tile=tile)
    assert intact(place)
    compare(got, place.view, x, labels, anchor, **options)
    sums = host.finish(products.view, bias, labels, anchor, None, **options, tile=tile)
    assert all(torch.equal(a, b) for a, b in zip(sums, got, strict=True))


@pytest.mark.parametrize("reach", [False, True])
@pytest.mark.parametrize("tile", ["128x256", "128x192"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_width(host: Host, tile: str, options: dict[str, float], reach: bool) -> None:
    for v in WIDTHS:
        check(host, 3, v, tile, with_bias=v % 2 == 0, reach=reach, **options)


@pytest.mark.parametrize("n", [1, 8, 9, 63, 64, 65, 130])
def test_every_height(host: Host, n: int) -> None:
    check(host, n, 300, ("128x256", "128x192")[n % 2], with_bias=True, reach=True)


def test_labels_outside_have_no_target(compiled: Host) -> None:
    v = 300
    labels = torch.tensor([-100, -1, 0, 255, 256, 299, 300, 511, 512, 2**40])
    x, place = torch.randn(len(labels), v), aligned_rows(len(labels), v)
    for anchor in (torch.full((10,), -math.inf), torch.linspace(-70, 20, 10)):
        got = compiled.finish(x, None, labels, anchor, place.view)
        compare(got, place.view, x, labels, anchor)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.999, 1 - 4e-6, 1 - 3e-8])
def test_a_confident_label_keeps_its_digits(compiled: Host, p: float) -> None:
    v, labels = 600, torch.tensor([300])
    x = torch.full((1, v), -math.log(p / (1 - p) * (v - 1)))
    x[0, 300] = 0.0
    stats = statistics(compiled.finish(x, None, labels, torch.tensor([SHIFT]), None))
    assert abs(float(stats.rest) / (1 - p) - 1) < 2e-5
    assert abs(float(stats.logps) / math.log(p) - 1) < 2e-5


def test_special_rows(compiled: Host) -> None:
    """Columns of -inf, a span of nothing else, a nan, an infinity; far-off and shifted rows."""
    v = 700
    x = torch.randn(9, v)
    x[0, ::3] = -math.inf
    x[1, :256] = -math.inf
    x[2, 256:] = -math.inf
    x[3, 500] = math.nan
    x[4] += 1e4
    x[5] -= 1e4
    x[6] *= 300.0
    x[7, 5] = math.inf
    x[8] = -math.inf
    labels = torch.tensor([1, 300, 5, 7, 699, 0, int(x[6].argmin()), 6, 0])
    place = aligned_rows(9, v)
    anchor = anchors(x, labels)
    got = compiled.finish(x, None, labels, anchor, place.view)
    for i in (0, 1, 2, 4, 5, 6, 8):
        one = slice(i, i + 1)
        compare(Exps(*(t[one] for t in got)), place.view[one], x[one], labels[one], anchor[one])
    for i in (3, 7):
        assert bool(statistics(got).lse[i].isnan()), i
        assert bool(place.view[i].isnan().any()), "a spoilt row says so"
    assert bool(got.max_logit[3].isnan()) and float(got.max_logit[7]) == math.inf


def test_offsets_beyond_two_to_the_31(compiled: Host) -> None:
    stride, v = 2**31 + 16, 40  # memory that is never touched costs nothing
    space = mmap.mmap(-1, 2 * (stride + v) + 64, flags=mmap.MAP_PRIVATE | NORESERVE)
    place = torch.frombuffer(space, dtype=BF16).as_strided((2, v), (stride, 1))
    x, labels = torch.randn(2, v), torch.tensor([3, 39])
    anchor = torch.tensor([-math.inf, 16.0])
    compare(compiled.finish(x, None, labels, anchor, place), place, x, labels, anchor)


def test_a_row_gives_the_same_bits_in_any_company(compiled: Host) -> None:
    x, labels = torch.randn(1100, 900), torch.randint(900, (1100,))
    anchor = anchors(x, labels).index_fill(0, torch.arange(0, 1100, 3), -60.0)

    def both(rows: slice) -> list[Tensor]:
        place = aligned_rows(len(x[rows]), 900)
        sums = compiled.finish(x[rows], None, labels[rows], anchor[rows], place.view)
        return [*sums, place.view]

    few = slice(1097, None)
    for many, alone in zip(both(slice(None)), both(few), strict=True):
        assert torch.equal(many[few], alone)


@pytest.mark.parametrize(
    ("hidden", "weight", "out", "text"),
    [
        ((4, 24), (9, 24), torch.zeros(4, 16, dtype=torch.float16)[:, :9], "out.*bfloat16"),
        ((4, 20), (9, 20), None, "hidden.*multiple of 8"),
        (torch.zeros(24, 4).T, (9, 24), None, r"hidden.*contiguous"),
        ((4, 24), torch.zeros(24, 9).T, None, r"weight.*contiguous"),
        (torch.zeros(100).as_strided((4, 24), (25, 1)), (9, 24), None, r"hidden.*16 bytes"),
        (torch.zeros(104)[4:100].view(4, 24), (9, 24), None, r"hidden.*clone"),
        ((4, 24), (9, 24), torch.zeros(4, 9, dtype=BF16), "out.*multiple of 8"),
    ],
)
def test_operands_it_cannot_take(hidden: Any, weight: Any, out: Any, text: str) -> None:
    def operand(t: Any) -> Tensor:
        if isinstance(t, tuple):
            return torch.zeros(t, dtype=BF16)
        stored = torch.zeros(256, dtype=BF16)
        return stored.as_strided(t.shape, t.stride(), t.storage_offset())

    with pytest.raises(ValueError, match=text):
        cuda_gemm.check_operands(operand(hidden), operand(weight), out)


def test_the_gemm_is_reached_by_name(compiled: Host) -> None:
    """And it is what exps_ makes of the product."""
    backends = [TABLE[f"cuda_gemm_{tile}"] for tile in ("128x256", "64x256", "128x192")]
    assert [b.gemm.keywords["tile"] for b in backends] == ["128x256", "64x256", "128x192"]
    assert all(b.gemm_dtypes == (BF16,) for b in backends)
    assert list(TABLE).index("reference") < min(map(list(TABLE).index, (b.name for b in backends)))
    text = (ROOT / "csrc" / "cuda" / "hopper.h").read_text()
    for tile, (number, columns) in cuda_gemm.TILES.items():
        assert f"m{tile.replace('x', 'n')} = {number}" in text and tile.endswith(f"x{columns}")
    hidden, weight = torch.randn(5, 24).to(BF16), torch.randn(700, 24).to(BF16)
    labels, place = torch.randint(700, (5,)), aligned_rows(5, 700)
    x = hidden.float() @ weight.float().T
    got = compiled.gemm(hidden, weight, None, labels, anchors(x, labels), place.view)
    compare(got, place.view, x, labels, anchors(x, labels))


def fuzz(library: Path, seeds: int) -> None:
    """What the sanitized process runs."""
    host = Host(library)
    for reverse in (0, 1):
        host.order(reverse)
        torch.manual_seed(reverse)
        check(host, 33, 3001, "128x256", with_bias=False, reach=bool(reverse))
        for seed in range(seeds):
            torch.manual_seed(seed)
            v, options = WIDTHS[seed % len(WIDTHS)], OPTIONS[seed // 3 % len(OPTIONS)]
            tile, with_bias = draw(("128x256", "128x192")), seed % 5 < 2
            check(host, 1 + seed % 3, v, tile, with_bias=with_bias, reach=seed % 4 < 3, **options)
    print("clean")


def compile_spans(tree: Path, folder: Path) -> Path:
    return compile_host(tree, folder / "host.so", "-O1", "-DSPANS_ALONE", *SANITIZE)


def test_under_the_sanitizers(tmp_path: Path) -> None:
    fuzz_sanitized(__file__, compile_spans(ROOT, tmp_path), 24)


MUTANTS = [
    ("spans.cuh", "sent = upper ? words[i] : words[i + step]", "sent = words[i]"),
    ("spans.cuh", "if (columns <= 0) return;", ""),
    ("spans.cuh", ">= left - 2 * q) x[i]", "> left - 2 * q) x[i]"),
    ("spans.cuh", "(gain - z * z * bend)", "gain"),
    ("spans.cuh", "== at_label) x[i] = -HUGE_VALF", "== at_label) x[i] = x[i]"),
    (
        "spans.cuh",
        "return within_reach(top, anchor) ? anchor : finite_or_zero(top)",
        "return anchor",
    ),
    ("spans.cuh", "return m == -HUGE_VALF ? 0.0f : m;", "return m;"),
    ("spans.cuh", "if (inside && column < left)", "if (column < left)"),
    ("spans.cuh", "dev[i % kQuad] += e * depth(z, base)", "dev[i % kQuad] += e * z"),
    ("span_rows.cuh", "tops[warp][lane] = top;\n  __syncthreads();", "tops[warp][lane] = top;"),
    ("span_rows.cuh", "  }\n  __syncthreads();\n  if (warp == 0", "  }\n  if (warp == 0"),
    ("span_rows.cuh", "Fall(base_of(next.m, anchor), base).move(next);", ""),
    ("span_rows.cuh", "if (within_reach(highest, anchor)) continue;", "continue;"),
    ("span_rows.cuh", "column / span_columns * rows", "0 * rows"),
    ("span_rows.cuh", "label < 0 || label >= args.cols", "label < 0"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "old", "new"), [("spans.cuh", "", ""), *MUTANTS])
def test_a_seeded_fault_is_found(file: str, old: str, new: str, tmp_path: Path) -> None:
    seed_fault(tmp_path, f"cuda/{file}", old, new)
    library = compile_spans(tmp_path, tmp_path)
    if old == "":  # the control
        fuzz_sanitized(__file__, library, 24)
        return
    with pytest.raises(AssertionError):
        fuzz_sanitized(__file__, library, 24)


if __name__ == "__main__":
    fuzz(Path(sys.argv[1]), int(sys.argv[2]))
