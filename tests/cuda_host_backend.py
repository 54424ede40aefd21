"""A backend of the tests: csrc/cuda compiled by g++ (see tests/cuda_host), on CPU tensors.

The conftest enters it in the table of backends as ``cuda_host``: the tests of every backend judge
the CUDA kernels too where there is no GPU. It is built at the first call and kept in build/, named
by what it is made of.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lolkernels.backends import cuda, cuda_gemm
from lolkernels.backends.contract import Exps, RowStats

ROOT = Path(__file__).resolve().parents[1]
CXX = shutil.which("g++")
FLAGS = ["-std=c++20", "-g1", "-Wall", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-fPIC"]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_unavailable() -> str | None:
    return None if CXX and sys.platform == "linux" else "needs g++ on Linux: install it"


def compile_host(tree: Path, library: Path, *flags: str) -> Path:
    source = tree / "tests" / "cuda_host" / "kernels.cpp"
    command = [CXX, *FLAGS, *flags, "-shared", f"-I{source.parent}", "-o", library, source]
    done = subprocess.run([str(part) for part in command], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return library


def build() -> Path:
    """The library of this source tree, compiled unless it is there already."""
    digest = hashlib.sha256(" ".join([str(CXX), *FLAGS]).encode())
    for folder in ("csrc", "csrc/cuda", "tests/cuda_host"):
        for path in sorted((ROOT / folder).glob("*.*")):
            digest.update(f"{path.name}\n".encode() + path.read_bytes())
    library = ROOT / "build" / "cuda_host" / f"{digest.hexdigest()[:24]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        for older in library.parent.glob("*.so"):
            older.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            os.replace(compile_host(ROOT, Path(folder) / "host.so", "-O2"), library)
    return library


def _words(*values: int) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _numbers(*values: float) -> Any:
    return (ctypes.c_double * len(values))(*values)


def _scaling(*, scale: float = 1.0, softcap: float = 0.0, temperature: float = 1.0) -> Any:
    return _numbers(scale, softcap, temperature)


def _matrix(t: Tensor) -> Any:
    return _words(t.data_ptr(), CODES[t.dtype], *t.shape, *t.stride())


def _vectors(size: int, dtype: torch.dtype, *tensors: Tensor) -> Any:
    for t in tensors:
        assert t.dtype == dtype and t.shape == (size,), (t.dtype, t.shape)
    return _words(*(word for t in tensors for word in (t.data_ptr(), t.stride(0))))


def _narrower(logits: Tensor, out: Tensor) -> bool:
    """Whether out lies over logits with narrower elements."""
    assert out.shape == logits.shape
    return out.data_ptr() == logits.data_ptr() and out.element_size() < logits.element_size()


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def _bias(bias: Tensor | None, logits: Tensor) -> Any:
    if bias is None:
        return None
    assert bias.dtype == torch.float32 and bias.shape == logits.shape[1:] and bias.is_contiguous()
    return _address(bias)


def _address(t: Tensor) -> Any:
    return ctypes.c_void_p(t.data_ptr())


class Host:
    """The row functions of one compiled library, with what csrc/cuda/ops.cu does around them."""

    def __init__(self, library: Path | None = None) -> None:
        self.library = library

    @cached_property
    def kernels(self) -> Any:
        # Fibers share one state: PyDLL keeps Python's lock, so that one thread at a time is there.
        return ctypes.PyDLL(str(self.library or build()))

    def order(self, last_first: int) -> None:
        self.kernels.host_order(last_first)

    def threads(self, cols: int, columns: int) -> int:
        found: int = self.kernels.host_threads(ctypes.c_int64(cols), ctypes.c_int64(columns))
        return found

    def exps_(
        self,
        logits: Tensor,
        labels: Tensor,
        anchor: Tensor | None = None,
        *,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        **scaling: float,
    ) -> Exps:
        return self.sweep(logits, labels, anchor, logits if out is None else out, bias, **scaling)

    def sums(
        self, logits: Tensor, labels: Tensor, *, bias: Tensor | None = None, **scaling: float
    ) -> Exps:
        return self.sweep(logits, labels, None, None, bias, **scaling)

    def sweep(
        self,
        logits: Tensor,
        labels: Tensor,
        anchor: Tensor | None,
        target: Tensor | None,
        bias: Tensor | None,
        **scaling: float,
    ) -> Exps:
        n = len(logits)
        sums = Exps(*(torch.empty(n) for _ in Exps._fields))
        if n:
            status = self.kernels.host_exps(
                *(_matrix(logits), _words(*[0] * 6) if target is None else _matrix(target)),
                _vectors(n, torch.int64, labels),
                _words(0, 0) if anchor is None else _vectors(n, torch.float32, anchor),
                _scaling(**scaling),
                int(target is not None and _narrower(logits, target)),
                _pointers(sums),
                _bias(bias, logits),
            )
            assert status == 0
        return sums

    def dlogits_(
        self,
        logits: Tensor,
        labels: Tensor,
        lse: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        *,
        out: Tensor | None = None,
        logps: Tensor | None = None,
        bias: Tensor | None = None,
        **scaling: float,
    ) -> Tensor:
        target, n = logits if out is None else out, len(logits)
        if logits.numel():
            status = self.kernels.host_dlogits(
                _matrix(logits),
                _matrix(target),
                _vectors(n, torch.int64, labels),
                _vectors(n, torch.float32, lse, a, b, c),
                _scaling(**scaling),
                int(_narrower(logits, target)),
                _words(0, 0) if logps is None else _vectors(n, torch.float32, logps),
                _bias(bias, logits),
            )
            assert status == 0
        return target

    def sequence_coef(
        self,
        logps: Tensor,
        ref_logps: Tensor | None,
        cu_seqlens: Tensor,
        weight: Tensor,
        *,
        ratio: int,
        log_low: float,
        log_high: float,
        beta: float = 0.0,
        scale: Tensor | None = None,
        flags: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, s, wide = len(logps), len(weight), torch.float32
        result = (torch.empty(s), torch.empty(n), torch.empty(s), torch.empty(s))
        if s:
            status = self.kernels.host_sequence_coef(
                _vectors(n, wide, logps),
                _words(0, 0) if ref_logps is None else _vectors(n, wide, ref_logps),
                _vectors(s + 1, torch.int64, cu_seqlens),
                _vectors(s, wide, weight),
                ctypes.c_int64(s),
                ctypes.c_int64(ratio),
                _numbers(log_low, log_high, beta),
                *map(_address, result),
                _words(0, 0) if scale is None else _vectors(s, wide, scale),
                None if flags is None else _address(flags),
            )
            assert status == 0
        return result

    def finish_rows(
        self,
        sums: Exps,
        labels: Tensor,
        vocab: int,
        out: RowStats,
        flags: Tensor | None = None,
        unit: Tensor | None = None,
        table: Tensor | None = None,
    ) -> None:
        n = len(labels)
        for t in (*sums, *out):
            _vectors(n, torch.float32, t)
            assert t.is_contiguous()
        if n:
            status = self.kernels.host_finish(
                *(_vectors(n, torch.int64, labels), ctypes.c_int64(n), ctypes.c_int64(vocab)),
                *(_pointers(sums), _pointers(out), None if flags is None else _address(flags)),
                None if unit is None else _address(unit),
                ctypes.c_int64(0 if unit is None else unit.stride(0)),
                None if unit is None or table is None else _matrix(table),
            )
            assert status == 0

    def add_labels(
        self,
        table: Tensor,
        labels: Tensor,
        rows: Tensor,
        a: Tensor,
        both: Tensor | None,
        stats: RowStats,
    ) -> None:
        n = len(labels)
        if rows.numel():
            own = (a.data_ptr(), a.stride(0))
            more = (0, 0) if both is None else (both.data_ptr(), both.stride(0))
            status = self.kernels.host_add_labels(
                *(_matrix(table), _matrix(rows), _vectors(n, torch.int64, labels)),
                *(_words(*own, *more), _pointers([stats.logps, stats.rest, stats.slope])),
            )
            assert status == 0

    def finish(
        self,
        products: Tensor,  # (n, V) float32: hidden weight^T
        bias: Tensor | None,
        labels: Tensor,
        anchor: Tensor,
        out: Tensor | None,
        *,
        tile: str = "128x256",
        **scaling: float,
    ) -> Exps:
        """The epilogue of the GEMM for Hopper, and the kernel that makes rows of its spans."""
        n, v = products.shape
        span = cuda_gemm.TILES[tile][1]
        parts, sums = torch.full((3, -(-v // span), n), torch.nan), torch.full((6, n), torch.nan)
        if bias is not None:
            bias = torch.nn.functional.pad(bias.float(), (0, -v % span))
        data, stride = (0, 0) if out is None else (out.data_ptr(), out.stride(0))
        if n:
            labels, anchor = labels.contiguous(), anchor.contiguous()
            status = self.kernels.host_linear_exps(
                *(_address(products), ctypes.c_int64(products.stride(0))),
                *(_words(data, n, v, stride), _address(parts)),
                None if bias is None else _address(bias),
                *(_address(labels), _address(anchor), _scaling(**scaling)),
                *(ctypes.c_int64(span), _address(sums)),
            )
            assert status == 0
        return Exps(*sums)

    def gemm(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        anchor: Tensor,
        out: Tensor | None,
        **options: Any,
    ) -> Exps:
        cuda_gemm.check_operands(hidden, weight, out)
        products = hidden.float() @ weight.float().T
        return self.finish(products, bias, labels, anchor, out, **options)


_host = Host()
exps_, sums = _host.exps_, _host.sums
dlogits_, sequence_coef = _host.dlogits_, _host.sequence_coef
BACKEND = cuda.BACKEND._replace(
    name="cuda_host",
    devices=("cpu",),
    why_unavailable=why_unavailable,
    exps_=exps_,
    sums=sums,
    dlogits_=dlogits_,
    sequence_coef=sequence_coef,
    finish=_host.finish_rows,
    add_labels=_host.add_labels,
)
# With the epilogue of the GEMM for Hopper behind torch's product.
GEMM_BACKEND = BACKEND._replace(
    name="cuda_host_gemm", gemm=_host.gemm, gemm_dtypes=cuda_gemm.GEMM_DTYPES
)
