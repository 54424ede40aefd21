"""Builds the compiled kernels where that is possible; the metadata is in pyproject.toml.

The extension speaks PyTorch's stable ABI and no Python C API: one object serves every CPython and
every torch from the floors below. Without torch in the build environment, without a C++ compiler,
or when compiling fails, the install goes on as pure Python and says so in one line.

The CUDA kernels are an object of their own, built where there is an nvcc; torch may be a CPU build
and no GPU is needed. LOLKERNELS_BUILD_CUDA=0 leaves them out, TORCH_CUDA_ARCH_LIST names other
architectures, MAX_JOBS bounds the compilers at work. Either object may fail without harm to the
other. Among the CUDA kernels is a GEMM for sm_90a, which needs CUTLASS's headers: the package
nvidia-cutlass's, or those in CUTLASS_PATH.

On Linux an object's build id is a hash of what it was made from (:func:`sources_hash`), so that a
stale one can be told wherever it was carried.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

PYTHON_FLOOR = "cp310"
TORCH_FLOOR = "0x020a000000000000"  # 2.10
CUDA_ARCHITECTURES = "8.0+PTX;9.0a;10.0"  # of 8.0 the PTX too: other GPUs translate it when loading


def tools():
    """torch's own for building; imported late, for it takes seconds."""
    from torch.utils import cpp_extension

    return cpp_extension


def warn(reason):
    print(
        f"warning: lolkernels is built without its compiled kernels ({reason}); "
        "it will use the reference backend",
        file=sys.stderr,
    )


def sources_hash(name):
    """40 hexadecimal digits: of the sources of ``_C`` or ``_CUDA``, and of this script."""
    own = {"_C": ["csrc/*.cpp", "csrc/cpu/*"], "_CUDA": ["csrc/cuda/*"]}[name]
    digest = hashlib.sha1(usedforsecurity=False)
    for path in sorted({"setup.py", *glob("csrc/*.h"), *(p for one in own for p in glob(one))}):
        with open(path, "rb") as file:
            content = file.read()
        digest.update(f"{path.replace(os.sep, '/')} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def build_id(name):
    """The linker's flag that writes the hash into the object, where linkers have one."""
    return [f"--build-id=0x{sources_hash(name)}"] if sys.platform == "linux" else []


def cpu_extension():
    return Extension(
        "lolkernels._C",
        sources=["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        depends=sorted(glob("csrc/*.h") + glob("csrc/cpu/*.h")),
        include_dirs=tools().include_paths(),
        library_dirs=tools().library_paths(),
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_FLOOR)],
        extra_compile_args={
            "cxx": ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall"]
        },
        extra_link_args=[f"-Wl,{flag}" for flag in build_id("_C")],
        py_limited_api=True,
        language="c++",
    )


def find_nvcc():
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [os.path.join(home, "bin") for home in homes if home]
    path = os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which("nvcc", path=path)


def cuda_targets(architectures):
    """nvcc's flags for a list like TORCH_CUDA_ARCH_LIST: "8.0+PTX;9.0a"."""
    flags = []
    for name in architectures.replace(";", " ").split():
        number = name.removesuffix("+PTX").replace(".", "")
        code = f"sm_{number},compute_{number}" if name.endswith("+PTX") else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code=[{code}]"]
    return flags


def find_cutlass():
    """The folder of CUTLASS's headers, or None."""
    found = importlib.util.find_spec("cutlass_library")
    folders = [os.environ.get("CUTLASS_PATH"), *(found.submodule_search_locations if found else [])]
    for folder in filter(None, folders):
        for include in (
            os.path.join(folder, *inside) for inside in (["include"], ["source", "include"])
        ):
            if os.path.exists(os.path.join(include, "cutlass", "cutlass.h")):
                return include
    return None


def cuda_commands(nvcc, folder, architectures, cutlass):
    """What compiles each source into an object of ``folder``: [(command, object)].

    The GEMM is left out without CUTLASS, and where sm_90a is not among the architectures.
    """
    hopper = cutlass is not None and "9.0a" in architectures.replace("+PTX", "").split(";")
    base = [nvcc, "-c", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    torch_flags = [f"-I{path}" for path in tools().include_paths()]
    torch_flags += ["-std=c++20", f"-DTORCH_TARGET_VERSION={TORCH_FLOOR}", "-DUSE_CUDA"]
    torch_flags += cuda_targets(architectures)
    gemm_flags = ["-std=c++17", "--expt-relaxed-constexpr", "-DNDEBUG", "-isystem", str(cutlass)]
    gemm_flags += cuda_targets("9.0a")
    if hopper:
        torch_flags.append("-DLOLKERNELS_HOPPER")
    commands = []
    for source, flags in (("ops", torch_flags), ("hopper", gemm_flags))[: 1 + hopper]:
        out = os.path.join(folder, f"{source}.o")
        commands.append(([*base, *flags, "-o", out, f"csrc/cuda/{source}.cu"], out))
    return commands


def build_cuda(library):
    """Compiles the CUDA kernels into ``library``: True, or a line that says why not."""
    architectures = (os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES).replace(" ", ";")
    cutlass = find_cutlass()
    if os.environ.get("LOLKERNELS_BUILD_CUDA", "1") == "0":
        reason = "LOLKERNELS_BUILD_CUDA=0"
    elif (nvcc := find_nvcc()) is None:
        reason = "there is no nvcc on the PATH or in CUDA_HOME"
    else:
        # What a CPU build of torch lacks comes from the libtorch of the machine it is loaded on.
        link = [nvcc, "-shared", "-o", library, "-Xlinker", "--no-as-needed", "-ltorch"]
        link += [word for flag in build_id("_CUDA") for word in ("-Xlinker", flag)]
        link += [f"-L{path}" for path in tools().library_paths()]
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
            commands = cuda_commands(nvcc, folder, architectures, cutlass)
            threads = ["--threads", str(max(1, jobs // len(commands)))]
            done = list(pool.map(run, ([*command, *threads] for command, _ in commands)))
            if all(one.returncode == 0 for one in done):
                done.append(run([*link, *(out for _, out in commands)]))
        failed = next((one for one in done if one.returncode != 0), None)
        if failed is None:
            if len(commands) == 1:
                print(
                    "lolkernels is built without its GEMM for Hopper (it needs sm_90a among the "
                    "architectures, and `pip install --no-deps nvidia-cutlass`)",
                    file=sys.stderr,
                )
            return os.path.exists(library)
        said = [line for line in (failed.stdout + failed.stderr).splitlines() if "error" in line]
        reason = f"nvcc failed: {said[0] if said else f'exit status {failed.returncode}'}"
    if os.path.exists(library):  # an older one would not fit the rest
        os.remove(library)
    print(f"lolkernels is built without its CUDA kernels ({reason})", file=sys.stderr)
    return False


def run(command):
    return subprocess.run(command, text=True, capture_output=True)


class TaggedWheel(bdist_wheel):
    """Tags the wheel by what was built, which is known only after the build."""

    def get_tag(self):
        if self.distribution.has_ext_modules() or getattr(self.distribution, "has_cuda", False):
            self.py_limited_api, self.root_is_pure = PYTHON_FLOOR, False
        else:
            self.root_is_pure = True
        return super().get_tag()


def build_options():
    try:
        tools()
    except ImportError:
        warn(
            "torch is not importable where it is built: install torch, then pip install "
            "--no-build-isolation"
        )
        return {}

    class OptionalBuild(tools().BuildExtension):
        def run(self):
            folder = os.path.dirname(self.get_ext_fullpath("lolkernels._C"))
            try:
                super().run()
            except Exception as error:  # compilers fail in many types; the cause is in the line
                warn(f"compiling failed: {str(error).splitlines()[0]}")
                self.extensions = self.distribution.ext_modules = []
            os.makedirs(folder, exist_ok=True)
            self.distribution.has_cuda = build_cuda(os.path.join(folder, "_CUDA.abi3.so"))

    return {"ext_modules": [cpu_extension()], "cmdclass": {"build_ext": OptionalBuild}}


if __name__ == "__main__":
    options = build_options()
    options.setdefault("cmdclass", {})["bdist_wheel"] = TaggedWheel
    setup(**options)
