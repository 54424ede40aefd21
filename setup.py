"""Builds the compiled kernels where that is possible; the metadata is in pyproject.toml.

The extension speaks PyTorch's stable ABI and no Python C API: one object serves every CPython and
every torch from the floors below. Without torch in the build environment, without a C++ compiler,
or when compiling fails, the install goes on as pure Python and says so in one line.

The CUDA kernels are an object of their own, built where there is an nvcc; torch may be a CPU build
and no GPU is needed. LOLKERNELS_BUILD_CUDA=0 leaves them out, TORCH_CUDA_ARCH_LIST names other
architectures, MAX_JOBS bounds the compilers at work. They may fail without harm to the rest.
"""

import os
import shutil
import subprocess
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

try:
    from torch.utils import cpp_extension
except ImportError:
    cpp_extension = None

PYTHON_FLOOR = "cp310"
TORCH_FLOOR = "0x020a000000000000"  # 2.10
CUDA_ARCHITECTURES = "8.0+PTX;9.0a;10.0"  # of 8.0 the PTX too: other GPUs translate it when loading


def warn(reason):
    print(
        f"warning: lolkernels is built without its compiled kernels ({reason}); "
        "it will use the reference backend",
        file=sys.stderr,
    )


def cpu_extension():
    return Extension(
        "lolkernels._C",
        sources=["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        depends=sorted(glob("csrc/*.h") + glob("csrc/cpu/*.h")),
        include_dirs=cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_FLOOR)],
        extra_compile_args={
            "cxx": ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall"]
        },
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


def cuda_command(nvcc, library):
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    flags = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-shared"]
    flags += ["--threads", os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)]
    macros = [f"-DTORCH_TARGET_VERSION={TORCH_FLOOR}", "-DUSE_CUDA"]
    paths = [f"-I{path}" for path in cpp_extension.include_paths()]
    # What a CPU build of torch lacks comes from the libtorch of the machine it is loaded on.
    link = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-Xlinker", "--no-as-needed"]
    sources = sorted(glob("csrc/cuda/*.cu"))
    targets = cuda_targets(architectures)
    return [nvcc, *flags, *macros, *targets, *paths, "-o", library, *sources, *link, "-ltorch"]


def build_cuda(library):
    """Compiles the CUDA kernels into ``library``, or says in one line why not."""
    if os.environ.get("LOLKERNELS_BUILD_CUDA", "1") == "0":
        reason = "LOLKERNELS_BUILD_CUDA=0"
    elif (nvcc := find_nvcc()) is None:
        reason = "there is no nvcc on the PATH or in CUDA_HOME"
    else:
        done = subprocess.run(cuda_command(nvcc, library), text=True, capture_output=True)
        if done.returncode == 0:
            return
        said = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line]
        reason = f"nvcc failed: {said[0] if said else f'exit status {done.returncode}'}"
    if os.path.exists(library):  # an older one would not fit the rest
        os.remove(library)
    print(f"lolkernels is built without its CUDA kernels ({reason})", file=sys.stderr)


class TaggedWheel(bdist_wheel):
    """Tags the wheel by what was built, which is known only after the build."""

    def get_tag(self):
        if self.distribution.has_ext_modules():
            self.py_limited_api = PYTHON_FLOOR
        else:
            self.root_is_pure = True
        return super().get_tag()


def build_options():
    if cpp_extension is None:
        warn(
            "torch is not importable where it is built: install torch, then pip install "
            "--no-build-isolation"
        )
        return {}

    class OptionalBuild(cpp_extension.BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:  # compilers fail in many types; the cause is in the line
                warn(f"compiling failed: {str(error).splitlines()[0]}")
                self.extensions = self.distribution.ext_modules = []
                return
            folder = os.path.dirname(self.get_ext_fullpath("lolkernels._C"))
            build_cuda(os.path.join(folder, "_CUDA.abi3.so"))

    return {"ext_modules": [cpu_extension()], "cmdclass": {"build_ext": OptionalBuild}}


options = build_options()
options.setdefault("cmdclass", {})["bdist_wheel"] = TaggedWheel
setup(**options)
