"""The row functions in CUDA C++ (csrc/cuda): float32, bfloat16 and float16 on NVIDIA GPUs.

Any strides; nothing is compiled when it runs. Results are bit-reproducible. Nothing here waits for
the device.
"""

from functools import cache

import torch

from .compiled import Compiled
from .contract import Backend

DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_compiled = Compiled("_CUDA.abi3.so", "lolkernels_cuda", "CUDA", "nvcc")
row_stats = _compiled.row_stats
dlogits_ = _compiled.dlogits_
sequence_coef = _compiled.sequence_coef


@cache
def why_unavailable() -> str | None:
    """None where the compiled kernels can run, else the reason and what to do about it."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return (
            "torch sees no NVIDIA GPU: install a CUDA build of torch on a machine that has one "
            "(torch.version.cuda and torch.cuda.is_available() tell)"
        )
    return _compiled.why_unavailable


BACKEND = Backend(
    name="cuda",
    devices=DEVICES,
    dtypes=DTYPES,
    panels=False,
    why_unavailable=why_unavailable,
    row_stats=row_stats,
    exps_=_compiled.exps_,
    dlogits_=dlogits_,
    sequence_coef=sequence_coef,
)
