"""The CUDA kernels on the CPU: csrc/cuda compiled by g++ against tests/cuda_host, a fiber a thread.

What runs here is the text that nvcc compiles, launches included. Tensors lie in NaN-filled buffers
as in test_backends_rows, and one run has AddressSanitizer and UndefinedBehaviorSanitizer on.
"""

import math
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_backends_rows as rows
import test_backends_sequences as sequences
import torch
from cases import HALF, seed_fault
from cuda_host_backend import CXX, ROOT, Host, compile_host, why_unavailable
from judges import row_stats
from test_backends_rows import WIDTHS, close, true_gradient, true_stats, zoned
from torch import Tensor

from lolkernels.backends import reference
from lolkernels.backends.finish import statistics

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
NORESERVE = 0x4000  # of mmap, on Linux

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


def aliased(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of narrower elements that begin where the rows of x do."""
    wide = x.as_strided((len(x), x.stride(0)), (x.stride(0), 1))
    return wide.view(dtype).as_strided(x.shape, (wide.view(dtype).stride(0), 1), _offset(x, dtype))


def _offset(x: Tensor, dtype: torch.dtype) -> int:
    return x.storage_offset() * x.element_size() // dtype.itemsize


def check_rows(host: Host, n: int, v: int, dtype: torch.dtype, **options: Any) -> None:
    """Statistics, then the gradient in place, into each dtype, and over the logits themselves."""
    x = zoned((torch.randn(n, v) * 3).to(dtype))
    labels = torch.randint(v, (n,))
    labels[0], labels[-1] = v - 1, 0
    truth = true_stats(x.view, labels, **options)
    stats = row_stats(host, x.view, labels, **options)
    for got, want in zip(stats, truth, strict=True):
        assert close(got, want, 2e-5)
    abc = torch.randn(3, n)
    arguments = (labels, stats[1], *abc)
    want = true_gradient(x.view, labels, stats[1], abc, **options)
    terms = true_gradient(x.view, labels, stats[1], abc, terms=True, **options)

    def right(got: Tensor) -> bool:
        rounding = torch.finfo(got.dtype)
        bound = 4e-5 * terms + 1e-37
        if got.dtype != torch.float32:
            bound = bound + rounding.eps * want.abs() + rounding.smallest_normal
        return bool(((got.double() - want).abs() <= bound).all())

    for out_dtype in HALF:
        out = zoned(torch.zeros(n, v, dtype=out_dtype), "padded")
        assert right(host.dlogits_(x.view, *arguments, **options, out=out.view))
        assert out.intact() and x.intact()
    if dtype == torch.float32:
        for out_dtype in (torch.bfloat16, torch.float16):
            shared = zoned(x.view)
            assert right(
                host.dlogits_(
                    shared.view, *arguments, **options, out=aliased(shared.view, out_dtype)
                )
            )
            assert shared.intact()
    assert right(host.dlogits_(x.view, *arguments, **options))
    assert x.intact()


def check_exps(host: Host, n: int, v: int, dtype: torch.dtype, **options: Any) -> None:
    """Into each dtype, in place and over the logits; one row stands out of its anchor's reach."""
    for out_dtype, over in [(d, over) for d in HALF for over in (False, True)]:
        if over and out_dtype != dtype and out_dtype.itemsize >= dtype.itemsize:
            continue
        raw, labels = torch.randn(n, v) * 3, torch.randint(v, (n,))
        labels[0], labels[-1] = v - 1, 0
        if not options.get("softcap"):
            raw[-1, torch.randint(v, (4,))] += 60.0 + 20.0 * torch.rand(4)
            raw[-1, 0] = 1.0
        x = zoned(raw.to(dtype))
        before = x.view.clone()
        out = zoned(torch.zeros(n, v, dtype=out_dtype), rows.draw(("padded", "columns"))).view
        if over:
            out = x.view if out_dtype == dtype else aliased(x.view, out_dtype)
        sums = host.exps_(x.view, labels, rows.draw((None, torch.randn(n))), **options, out=out)
        rows.check_exps(host, sums, out, before, labels, **options)
        assert x.intact() and (over or torch.equal(x.view, before))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("options", rows.OPTIONS, ids=str)
def test_every_width(host: Host, dtype: torch.dtype, options: dict[str, float]) -> None:
    for v in WIDTHS[:10]:
        check_rows(host, 3, v, dtype, **options)
        check_exps(host, 3, v, dtype, **options)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("v", WIDTHS[10:])
def test_long_rows(host: Host, dtype: torch.dtype, v: int) -> None:
    check_rows(host, 2, v, dtype, softcap=30.0 * (v % 2))
    check_exps(host, 2, v, dtype)


@pytest.mark.parametrize("offset", range(1, 8))
@pytest.mark.parametrize("dtype", HALF)
def test_rows_that_begin_anywhere(compiled: Host, dtype: torch.dtype, offset: int) -> None:
    for v in (1, 5, 8, 9, 40, 700):
        whole = torch.full((2 * v + 200,), math.nan, dtype=dtype)
        x = whole.as_strided((2, v), (v + 3, 1), 64 + offset)
        x.copy_(torch.randn(2, v))
        labels = torch.tensor([v - 1, 0])
        truth, stats = true_stats(x, labels), row_stats(compiled, x, labels)
        for got, want in zip(stats, truth, strict=True):
            assert close(got, want, 2e-5)
        one = torch.ones(2)
        want = true_gradient(x, labels, stats[1], (one, -one, 0 * one))
        e = torch.empty(2, v, dtype=dtype)
        rows.check_exps(compiled, compiled.exps_(x, labels, out=e), e, x, labels)
        compiled.dlogits_(x, labels, stats[1], one, -one, 0 * one)
        assert close(x, want, 1e-5 + torch.finfo(dtype).eps)
        assert int(whole.isnan().sum()) == len(whole) - 2 * v


def test_the_gradient_of_special_rows(compiled: Host) -> None:
    one = torch.ones(1)
    for name, row, (lse, *_) in rows.SPECIAL:
        x, labels = torch.tensor([row]), torch.tensor([0])
        given = (labels, torch.tensor([lse]), one, -one, 0 * one)
        want = reference.dlogits_(x.clone(), *given)
        torch.testing.assert_close(
            compiled.dlogits_(x, *given), want, rtol=1e-5, atol=1e-6, equal_nan=True, msg=name
        )


def test_offsets_beyond_two_to_the_31(compiled: Host) -> None:
    stride, v = 2**31 + 8, 40  # memory that is never touched costs nothing
    space = mmap.mmap(-1, 2 * (stride + v) + 256, flags=mmap.MAP_PRIVATE | NORESERVE)
    whole = torch.frombuffer(space, dtype=torch.bfloat16)
    x = whole.as_strided((2, v), (stride, 1))
    x.copy_(torch.randn(2, v))
    labels = torch.tensor([3, 39])
    stats = row_stats(compiled, x, labels)
    for got, want in zip(stats, true_stats(x, labels), strict=True):
        assert close(got, want, 2e-5)
    e = whole.as_strided((2, v), (stride, 1), 64)
    rows.check_exps(compiled, compiled.exps_(x, labels, out=e), e, x, labels)
    one = torch.ones(2)
    want = true_gradient(x, labels, stats[1], (one, -one, 0 * one))
    assert close(compiled.dlogits_(x, labels, stats[1], one, -one, 0 * one), want, 1e-2)
    tall = whole.as_strided((1, 40), (1, 2**31 // 40))
    tall.copy_(torch.randn(1, 40))
    stats = row_stats(compiled, tall, labels[:1])
    for got, want in zip(stats, true_stats(tall, labels[:1]), strict=True):
        assert close(got, want, 2e-5)


def test_a_row_gives_the_same_bits_in_any_company(compiled: Host) -> None:
    """The order of additions depends on the row alone; shares of its columns change nothing."""
    x, labels = torch.randn(1100, 5000), torch.randint(5000, (1100,))
    some = slice(1098, None)  # two rows: their columns are shared out among blocks
    one = torch.ones(2)
    few = compiled.sums(x[some], labels[some])
    given = (statistics(few).lse, one, -one, 0 * one)
    part = compiled.dlogits_(x[some], labels[some], *given, out=torch.empty(2, 5000))
    for i in (0, 1):
        alone = slice(1098 + i, 1099 + i)
        for all_rows, single in zip(few, compiled.sums(x[alone], labels[alone]), strict=True):
            assert torch.equal(all_rows[i : i + 1], single)
        for all_rows, single in zip(
            *(compiled.exps_(x[r], labels[r], out=torch.empty_like(x[r])) for r in (some, alone)),
            strict=True,
        ):
            assert torch.equal(all_rows[i : i + 1], single)
    many = [t[some].repeat(600, *[1] * (t.dim() - 1)) for t in (x, labels)]
    repeated = [t.repeat(600) for t in given]
    whole = compiled.dlogits_(many[0], many[1], *repeated)
    assert torch.equal(whole[:2], part)


def test_the_table_of_launches(compiled: Host) -> None:
    found = [compiled.threads(v, 16) for v in (1, 512, 513, 2049, 32000, 262144)]
    assert found == [32, 32, 64, 256, 256, 256]


@pytest.mark.parametrize("ratio", [0, 1, 2])
@pytest.mark.parametrize("bounds", sequences.BOUNDS)
def test_sequence_coef(host: Host, ratio: int, bounds: tuple[float, float]) -> None:
    for beta in (0.0, 0.1):
        for with_ref in (True, False):
            sequences.test_the_formulas(host, ratio, bounds, beta, with_ref)


def fuzz(library: Path, seeds: int) -> None:
    """What the sanitized process runs."""
    host = Host(library)
    for reverse in (0, 1):
        host.order(reverse)
        for seed in range(seeds):
            torch.manual_seed(seed)
            n, v, dtype = 1 + seed % 3, rows.draw(WIDTHS[:-1]), rows.draw(HALF)

            def with_bias(seed: int = seed, v: int = v) -> dict[str, Any]:
                # Where fuzz_case has none.
                return rows.with_bias(rows.draw(rows.OPTIONS), host, v, seed + 1)

            check_rows(host, n, v, dtype, **with_bias())
            check_exps(host, n, v, dtype, **with_bias())
            rows.fuzz_case(host, seed)
            rows.fuzz_exps(host, seed)
        for ratio in (0, 1, 2):
            sequences.test_the_formulas(host, ratio, (-0.1, 0.1), 0.1, True)
    print("clean")


def fuzz_sanitized(file: str, library: Path, seeds: int) -> None:
    """Runs the ``fuzz`` of a test file on a library that was built with SANITIZE."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    query = [[str(CXX), f"-print-file-name={name}"] for name in names]
    found = [subprocess.check_output(command, text=True).strip() for command in query]
    done = subprocess.run(
        [sys.executable, file, str(library), str(seeds)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "python", "tests")),
            "LD_PRELOAD": " ".join(found),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        },
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.stdout.strip() == "clean", done.stdout[-2000:] + done.stderr[-6000:]


@pytest.mark.ci
def test_under_the_sanitizers(tmp_path: Path) -> None:
    """Every tensor is a heap block of its own: past its borders AddressSanitizer sees it too."""
    library = compile_host(ROOT, tmp_path / "host.so", "-O1", *SANITIZE)
    fuzz_sanitized(__file__, library, 12)


# file, text, what a fault makes of it
MUTANTS = [
    ("rows.cuh", "if (kAliased) __syncthreads();\n#pragma", "#pragma"),
    ("rows.cuh", "past == 0 ? 0 : static_cast<int>((kLoadBytes - past)", "static_cast<int>((past)"),
    ("rows.cuh", "thread < at.edges()", "thread + 1 < at.edges()"),
    ("rows.cuh", "begin + kBatch * threads <= last", "begin + threads <= last"),
    ("rows.cuh", "begin + thread < last", "begin + thread <= last"),
    ("rows.cuh", "label >= 0 && label < args.logits.cols)", "label < args.logits.cols)"),
    ("rows.cuh", "(pack - first) % threads == thread", "pack % threads == thread + 1"),
    ("rows.cuh", "b, c) * v.slope", "b, c)"),
    ("exps.cuh", "fmaxf(a.m, b.m)", "a.m"),
    ("exps.cuh", "a.dev + b.dev", "a.dev"),
    ("exps.cuh", "if (top != -HUGE_VALF) return top;", "return top;"),
    ("exps.cuh", "  __syncthreads();  // all have", "  // all have"),
    ("exps.cuh", "kAliased ? __syncthreads_or(over) != 0 : over", "over"),
    ("exps.cuh", "over = top > limit", "over = false"),
    ("exps.cuh", "pack < done && pack", "pack"),
    (
        "exps.cuh",
        "if (kWritten && edge_done && has_edge) {\n      narrow(fall",
        "if (false) {\n      narrow(fall",
    ),
    ("exps.cuh", "s.dev + s.rest * fall", "s.dev"),
    ("exps.cuh", "e * half * half", "e * half"),
    ("exps.cuh", "column == label", "column == label + 1"),
    ("exps.cuh", "column(u) + i)", "column(u))"),
    ("exps.cuh", "args.bias, label", "nullptr, label"),
    ("rows.cuh", "args.bias, label", "nullptr, label"),
    ("rows.cuh", "column + i), &dx", "column), &dx"),
    ("exps.cuh", "if (kContiguous && !edge_done)", "if (kContiguous)"),
    ("exps.cuh", "edge_done && has_edge) {\n        const", "has_edge) {\n        const"),
    ("exps.cuh", "own_anchor(top_of_row, target.z)", "top_of_row"),
    ("exps.cuh", "done = begin", "done = at.packs + begin"),
    ("launch.cuh", "return x_past == out_past && x_row == out_row;", "return true;"),
    ("sequences.cuh", "last <= first", "false"),
    ("sequences.cuh", "first + threadIdx.x", "threadIdx.x"),
]


def judge(tree: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The kernels of a source tree before every check of `fuzz` and `specials`."""
    library = compile_host(
        tree, folder / "host.so", "-O1", "-fsanitize=alignment", "-fno-sanitize-recover=all"
    )
    code = "import sys, test_cuda_host as t; p = t.Path(sys.argv[1]); t.fuzz(p, 25); t.specials(p)"
    path = os.pathsep.join(str(ROOT / part) for part in ("", "python", "tests"))
    return subprocess.run(
        [sys.executable, "-c", code, str(library)],
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        capture_output=True,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("file", "old", "new"), MUTANTS)
def test_a_seeded_fault_is_found(file: str, old: str, new: str, tmp_path: Path) -> None:
    seed_fault(tmp_path, f"cuda/{file}", old, new)
    assert judge(tmp_path, tmp_path).returncode != 0


@pytest.mark.slow
def test_no_fault_is_found_in_the_kernels_as_they_are(tmp_path: Path) -> None:
    done = judge(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def specials(library: Path) -> None:
    host = Host(library)
    test_the_gradient_of_special_rows(host)
    rows.test_labels_at_every_boundary_and_outside(host)
    for name, row, want in rows.SPECIAL:
        rows.test_special_rows(name, row, want, "rows", host)


if __name__ == "__main__":
    fuzz(Path(sys.argv[1]), int(sys.argv[2]))
