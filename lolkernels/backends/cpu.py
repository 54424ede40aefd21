"""The row functions in C++ (csrc/cpu): float32, bfloat16 and float16 on the CPU, any strides.

Float64 is not here: the reference backend computes it. Results are bit-identical for any number of
threads.
"""

import torch

from .compiled import Compiled

DEVICES = ("cpu",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WHOLE_ROWS = False  # on a CPU the driver hands over panels of columns

_compiled = Compiled("_C.abi3.so", "lolkernels", "compiled", "a C++ compiler")
row_stats = _compiled.row_stats
dlogits_ = _compiled.dlogits_
sequence_coef = _compiled.sequence_coef


def why_unavailable() -> str | None:
    """None where the compiled kernels can run, else the reason and what to do about it."""
    return _compiled.why_unavailable


def isa() -> str:
    """The instruction set in use: `avx512`, `avx2` or `baseline`."""
    name: str = _compiled.ops.cpu_isa()
    return name
