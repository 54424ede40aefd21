"""The row functions in CUDA C++ (csrc/cuda): float32, bfloat16 and float16 on NVIDIA GPUs.

Any strides; nothing is compiled when it runs. Results are bit-reproducible. Nothing here waits for
the device.
"""

from functools import cache

import torch

from .compiled import Compiled
from .contract import Backend
from .finish import add_labels, finish

compiled = Compiled("_CUDA.abi3.so", "lolkernels_cuda", "CUDA", "nvcc")


@cache
def why_unavailable() -> str | None:
    """None where the compiled kernels can run, else the reason and what to do about it."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return (
            "torch sees no NVIDIA GPU: install a CUDA build of torch on a machine that has one "
            "(torch.version.cuda and torch.cuda.is_available() tell)"
        )
    return compiled.why_unavailable


BACKEND = Backend(
    name="cuda",
    devices=("cuda",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    panels=False,
    why_unavailable=why_unavailable,
    row_stats=compiled.row_stats,
    exps_=compiled.exps_,
    dlogits_=compiled.dlogits_,
    sequence_coef=compiled.sequence_coef,
    finish=finish,
    add_labels=add_labels,
)
