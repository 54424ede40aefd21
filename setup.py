"""Builds the compiled kernels where that is possible; the metadata is in pyproject.toml.

The extension speaks PyTorch's stable ABI and no Python C API: one object serves every CPython and
every torch from the floors below. Without torch in the build environment, without a C++ compiler,
or when compiling fails, the install goes on as pure Python and says so in one line.
"""

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

    return {"ext_modules": [cpu_extension()], "cmdclass": {"build_ext": OptionalBuild}}


options = build_options()
options.setdefault("cmdclass", {})["bdist_wheel"] = TaggedWheel
setup(**options)
