"""The row functions in C++ (csrc/cpu): float32, bfloat16 and float16 on the CPU, any strides.

Float64 is not here: the reference backend computes it. Results are bit-identical for any number of
threads.
"""

import torch

from .compiled import Compiled
from .contract import Backend
from .finish import add_labels, finish

_compiled = Compiled("_C.abi3.so", "lolkernels", "compiled", "a C++ compiler")
exps_, sums = _compiled.exps_, _compiled.sums
dlogits_, sequence_coef = _compiled.dlogits_, _compiled.sequence_coef


def why_unavailable() -> str | None:
    """None where the compiled kernels can run, else the reason and what to do about it."""
    return _compiled.why_unavailable


def isa() -> str:
    """The instruction set in use: `avx512`, `avx2` or `baseline`."""
    name: str = _compiled.ops.cpu_isa()
    return name


BACKEND = Backend(
    name="cpu",
    devices=("cpu",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    panels=True,
    why_unavailable=why_unavailable,
    exps_=exps_,
    sums=sums,
    dlogits_=dlogits_,
    sequence_coef=sequence_coef,
    finish=finish,
    add_labels=add_labels,
)
