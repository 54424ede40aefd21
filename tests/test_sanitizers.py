"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

The kernels without torch run in an executable of their own (rows_harness.cpp), on every instruction
set of this machine. The torch binding runs in a Python process into which the sanitizers are
preloaded (binding_fuzz.py). Seeded faults in the kernels have to turn the first one red.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import ROOT, seed_fault
from torch.utils import cpp_extension

CXX = shutil.which("g++")
FLAGS = ["-std=c++20", "-g1", "-Wall", "-fno-omit-frame-pointer"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = [
    pytest.mark.ci,
    pytest.mark.skipif(CXX is None, reason="needs g++ with its sanitizers"),
]


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        text=True,
        capture_output=True,
        env={**os.environ, **environment},
        timeout=1200,
    )


def build_harness(tree: Path, binary: Path, *flags: str) -> Path:
    sources = [
        tree / "tests" / "rows_harness.cpp",
        *sorted((tree / "csrc" / "cpu").glob("rows_*.cpp")),
        tree / "csrc" / "cpu" / "sequences.cpp",
        tree / "csrc" / "cpu" / "dispatch.cpp",
    ]
    done = run(CXX, *FLAGS, *flags, "-o", binary, *sources)
    assert done.returncode == 0, done.stderr
    return binary


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_harness(ROOT, tmp_path_factory.mktemp("rows") / "harness", "-O1", *SANITIZE)


@pytest.fixture(scope="session")
def sanitized_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("binding") / "_C.so"
    done = run(
        CXX,
        *FLAGS,
        "-O1",
        *SANITIZE,
        *("-shared", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *(f"-I{path}" for path in cpp_extension.include_paths()),
        *("-o", library, ROOT / "csrc" / "bindings.cpp"),
        *sorted((ROOT / "csrc" / "cpu").glob("*.cpp")),
        *(f"-L{path}" for path in cpp_extension.library_paths()),
        "-ltorch_cpu",
    )
    assert done.returncode == 0, done.stderr
    return library


def fuzz_rows(harness: Path, cases: int, seed: int) -> None:
    done = run(harness, cases, seed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"cases={cases}" in done.stdout


def fuzz_binding(library: Path, cases: int, seed: int) -> None:
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [run(CXX, f"-print-file-name={name}").stdout.strip() for name in names]
    done = run(
        *(sys.executable, ROOT / "tests" / "binding_fuzz.py", library, cases, seed),
        LD_PRELOAD=" ".join(found),
        ASAN_OPTIONS="detect_leaks=0",  # the interpreter keeps its own allocations
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def test_the_kernels_under_the_sanitizers(harness: Path) -> None:
    fuzz_rows(harness, 3000, seed=0)


def test_the_binding_under_the_sanitizers(sanitized_library: Path) -> None:
    fuzz_binding(sanitized_library, 1500, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_the_kernels_under_the_sanitizers_exhaustively(harness: Path, seed: int) -> None:
    fuzz_rows(harness, 10_000, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_the_binding_under_the_sanitizers_exhaustively(sanitized_library: Path, seed: int) -> None:
    fuzz_binding(sanitized_library, 5000, seed)


def test_the_kernels_as_they_are_shipped(tmp_path: Path) -> None:
    """Optimised, without sanitizers: also the instruction sets that are not picked here."""
    fuzz_rows(build_harness(ROOT, tmp_path / "harness", "-O3", "-ffp-contract=fast"), 3000, seed=3)


# file, text, what a fault makes of it
MUTANTS = [
    ("cpu/rows_impl.h", "col + kLanes <= row.cols", "col < row.cols"),
    ("cpu/rows_impl.h", "i + kLanes <= cols", "i < cols"),
    ("cpu/rows_impl.h", "col + j < row.cols ?", "col + j <= row.cols ?"),
    ("cpu/rows_impl.h", "x.z[j] = -kInf;", "x.z[j] = 0.0f;"),
    ("cpu/rows_impl.h", "label >= 0 && label < cols", "label >= 0 && label <= cols"),
    ("cpu/rows_impl.h", "label >= 0 && label < cols", "label < cols"),
    ("cpu/rows_impl.h", "if (anchor == -kInf) anchor =", "if (false) anchor ="),
    ("cpu/rows_impl.h", "f * (sum.pz + sum.p * shift)", "f * sum.pz"),
    ("cpu/rows_impl.h", "top = block.max > top ? block.max : top;", "top = block.max;"),
    ("cpu/rows_impl.h", "row.stride == 1 && out.stride == 1", "row.stride == 1"),
    ("cpu/rows_impl.h", "x.z, b, c) * x.slope", "x.z, b, c)"),
    ("cpu/rows_impl.h", "t < kExpMin ? F32{} : exp_in_range(near)", "exp_in_range(near)"),
    ("cpu/rows_impl.h", "block.leave_out(label - col);", ""),
    ("cpu/rows_impl.h", "rescale(out, col,", "rescale(out, 0,"),
    ("cpu/rows_impl.h", "top = rest > top ? rest : top;", ""),
    ("cpu/rows_impl.h", "i + kStep <= left", "i < left"),
    ("cpu/rows_impl.h", "store(slope + i, x.slope);", "store(slope + i, splat(1.0f));"),
    ("cpu/vec.h", "x < kExpMin ? F32{} : e", "e"),
    ("cpu/vec.h", "return b > a ? b : a;", "return a > b ? a : b;"),
    ("cpu/vec.h", "small ? 1.0f - near * near", "small ? 1.0f - near"),
    ("cpu/vec.h", "magnitude >= 0x7c00u ? special", "magnitude > 0x7c00u ? special"),
    ("contract.h", "p == V{} ? V{} : p * (b + c * z)", "p * (b + c * z)"),
    ("contract.h", "dlogit(p, z, a + b, c)", "dlogit(p, z, b, c)"),
    ("contract.h", "-std::expm1(logp)", "1.0f - static_cast<float>(std::exp(logp))"),
    ("contract.h", "log_ratio > rule.log_high", "log_ratio >= rule.log_low"),
    ("contract.h", "rule.beta - weight * ratio", "rule.beta + weight * ratio"),
    ("cpu/sequences.cpp", "last == first", "false"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "old", "new"), MUTANTS)
def test_a_seeded_fault_is_found(file: str, old: str, new: str, tmp_path: Path) -> None:
    seed_fault(tmp_path, file, old, new)
    mutant = build_harness(tmp_path, tmp_path / "harness", "-O1", *SANITIZE)
    assert run(mutant, 3000, 0).returncode != 0
