"""What nvcc makes of csrc/cuda: no spills, no stack, the stated registers, 16-byte accesses.

Nothing runs here and no GPU is needed.
"""

import importlib.util
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("80", "90a", "100")
THREADS, BLOCKS = 256, 3  # kMaxThreads and kMinBlocks of rows.cuh
REGISTERS = 65536 // (THREADS * BLOCKS) // 8 * 8  # they are handed out by eights
SEQUENCE_REGISTERS = 128  # two blocks of 256 threads on a processor, or four of 128
# exps, dlogits, sequence_coef, finish, add_labels, merge_spans
KERNELS = 56 + 44 + 3 + 3 + 9 + 1

pytestmark = [pytest.mark.ci, pytest.mark.skipif(NVCC is None, reason="needs nvcc")]


class Kernel(NamedTuple):
    arch: str
    name: str
    stack: int
    spills: int
    registers: int


class Built(NamedTuple):
    library: Path
    kernels: list[Kernel]


def demangle(text: str) -> str:
    """Kernels as `dlogits<float, __half, false, true, true>`: only the template's arguments."""
    plain = subprocess.check_output(["c++filt"], input=text, text=True)
    pattern = r"(?:void )?lolkernels::cuda::(\w+)_kernel(<.*>)?\(lolkernels::\w+Args.*"
    plain = re.sub(pattern, r"\1\2", plain)
    return plain.replace("(bool)0", "false").replace("(bool)1", "true")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    library = tmp_path_factory.mktemp("cuda") / "_CUDA.so"
    command = [str(NVCC), "-std=c++20", "-O3", "-Xptxas", "-v", "-DUSE_CUDA", "-shared"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-Xcompiler", "-fPIC"]
    command += ["-DLOLKERNELS_HOPPER"]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    for arch in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["-o", str(library), str(ROOT / "csrc" / "cuda" / "ops.cu")]
    done = subprocess.run(command, text=True, capture_output=True, timeout=900)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "warning" not in said, said[-4000:]
    return Built(library, reported(said))


def reported(said: str) -> list[Kernel]:
    """What ptxas -v says."""
    found = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        said,
        flags=re.DOTALL,
    )
    names = demangle("\n".join(row[0] for row in found)).splitlines()
    return [
        Kernel(arch, name, int(stack), int(stores) + int(loads), int(registers))
        for name, (_, arch, stack, stores, loads, registers) in zip(names, found, strict=True)
    ]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_registers_suffice(built: Built, arch: str) -> None:
    kernels = [kernel for kernel in built.kernels if kernel.arch == arch]
    assert len({kernel.name for kernel in kernels}) == len(kernels) == KERNELS
    for kernel in kernels:
        assert kernel.stack == 0 and kernel.spills == 0, kernel
        few = kernel.name.startswith(("sequence_coef", "add_labels"))
        assert kernel.registers <= (SEQUENCE_REGISTERS if few else REGISTERS), kernel


def test_the_bounds_are_those_of_the_source() -> None:
    text = (ROOT / "csrc" / "cuda" / "rows.cuh").read_text()
    assert f"kMaxThreads = {THREADS};" in text and f"kMinBlocks = {BLOCKS};" in text


def find_cuobjdump() -> str | None:
    """From CUDA, or the one in Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent] if triton and triton.origin else []
    inside = [str(folder / "backends" / "nvidia" / "bin") for folder in folders]
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=":".join(inside))


CUOBJDUMP = find_cuobjdump()


@pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump")
def test_whole_vectors_are_loaded_and_stored(built: Built) -> None:
    dump = subprocess.check_output([str(CUOBJDUMP), "-sass", str(built.library)], text=True)
    codes: dict[str, list[str]] = defaultdict(list)
    for part in dump.split("Function : ")[1:]:
        mangled, _, code = part.partition("\n")
        codes[demangle(mangled).strip()].append(code)
    sizes = {"float": 4, "__half": 2, "__nv_bfloat16": 2}
    contiguous = 0
    for name, versions in codes.items():
        assert len(versions) == len(ARCHITECTURES), name
        kind, _, rest = name.partition("<")
        if kind in ("sequence_coef", "merge_spans"):
            continue
        given = [word.strip() for word in rest.rstrip(">").split(",")]
        sums_only = kind == "exps" and given[1].endswith("Nowhere")
        if sums_only and given[3] == "true":
            bits = None
        elif sums_only:
            continue
        elif kind in ("exps", "dlogits") and given[3] == "true":
            bits = 8 * min(16, 16 // sizes[given[0]] * sizes[given[1]])
        else:
            continue
        contiguous += 1
        for code in versions:
            assert re.search(r"\bLDG\.E\.128", code), name
            assert bits is None or re.search(rf"\bSTG\.E\.{bits}", code), name
            assert not re.search(r"(?<!BAR\.)\b(RED|ATOM|ATOMG)\.", code), name
    assert contiguous == 28 + 22


def test_only_the_c_shim_of_torch_is_needed(built: Built) -> None:
    command = ["nm", "-D", "--undefined-only", str(built.library)]
    symbols = subprocess.check_output(command, text=True)
    assert not re.findall(r"_ZNK?(?:2at|3c10|5torch)\w+", symbols)
    assert "aoti_torch_get_current_cuda_stream" in symbols


# --- the GEMM for Hopper --------------------------------------------------------------------------


def find_cutlass() -> Path | None:
    package = importlib.util.find_spec("cutlass_library")
    folders = (package.submodule_search_locations or []) if package else []
    return next((Path(folder) / "source" / "include" for folder in folders), None)


CUTLASS = find_cutlass()
GEMM_FLAGS = ["-std=c++17", "--expt-relaxed-constexpr", "-DNDEBUG", "-isystem", str(CUTLASS)]
GEMMS = 3  # of the tiles 128 x 256, 64 x 256 and 128 x 192
MOST_REGISTERS = 240  # of a thread that multiplies, where each block has 384
SHARED_MEMORY = 227 * 1024


@pytest.fixture(scope="module")
def gemm(tmp_path_factory: pytest.TempPathFactory) -> Built:
    if CUTLASS is None:
        pytest.skip("needs the headers of nvidia-cutlass")
    library = tmp_path_factory.mktemp("hopper") / "hopper.o"
    command = [str(NVCC), "-c", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC", *GEMM_FLAGS]
    command += ["-gencode", "arch=compute_90a,code=sm_90a", "-o", str(library)]
    command += [str(ROOT / "csrc" / "cuda" / "hopper.cu")]
    done = subprocess.run(command, text=True, capture_output=True, timeout=900)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    return Built(library, reported(said))


def test_the_gemm_does_not_spill(gemm: Built) -> None:
    assert len(gemm.kernels) == GEMMS
    for kernel in gemm.kernels:
        assert kernel.stack == 0 and kernel.spills == 0, kernel


@pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump")
def test_the_gemm_is_made_of_hoppers_instructions(gemm: Built) -> None:
    """TMA into shared memory, wgmma of whole rows, registers from the loaders; 16-byte stores."""
    dump = subprocess.check_output([str(CUOBJDUMP), "-sass", str(gemm.library)], text=True)
    kernels = dump.split("Function : ")[1:]
    assert len(kernels) == GEMMS
    wide = 0
    for code in kernels:
        columns = 192 if "HGMMA.64x192x16" in code else 256
        below = 2 if columns == 192 else 1  # tiles of 64 rows a warpgroup
        wide += columns == 256
        assert len(re.findall(rf"\bHGMMA\.64x{columns}x16\.F32\.BF16", code)) == 8 * below
        assert "UTMALDG.2D.MULTICAST" in code or "UTMALDG.3D.MULTICAST" in code
        assert len(re.findall(r"\bSTG\.E\.128", code)) == 2 * below * columns // 32
        assert "USETMAXREG" in code
        assert not re.search(r"\b(LDL|STL)\b|\b(RED|ATOM|ATOMG)\.E", code)
        assert max(int(n) for n in re.findall(r"\bR(\d+)\b", code)) < MOST_REGISTERS
    assert wide == 2


def test_accumulators_lie_where_the_epilogue_believes(tmp_path: Path) -> None:
    """And the stages of its pipeline fit shared memory. Host code of CUTLASS; nothing launches."""
    if CUTLASS is None:
        pytest.skip("needs the headers of nvidia-cutlass")
    program = tmp_path / "layout"
    command = [str(NVCC), "-O0", *GEMM_FLAGS, "-gencode", "arch=compute_80,code=sm_80"]
    command += ["-o", str(program), str(ROOT / "tests" / "hopper_layout.cu")]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    done = subprocess.run([str(program)], text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert len(done.stdout.splitlines()) == GEMMS
    for line in done.stdout.splitlines():
        _, stages, shared = line.split()
        assert int(stages) >= 4 and int(shared) <= SHARED_MEMORY, line
