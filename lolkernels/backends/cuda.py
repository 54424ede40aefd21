"""The row functions in CUDA C++ (csrc/cuda): float32, bfloat16 and float16 on NVIDIA GPUs.

Any strides; nothing is compiled when it runs. Results are bit-reproducible. Nothing here waits for
the device.
"""

from functools import cache

import torch
from torch import Tensor

from .compiled import Compiled
from .contract import Backend, Exps, RowStats

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


def finish(
    sums: Exps,  # each (n,) float32
    labels: Tensor,  # (n,) int64
    vocab: int,
    out: RowStats,  # each (n,) float32
    flags: Tensor | None = None,  # () int32
    unit: Tensor | None = None,  # (n, D) float32, rows of adjacent elements
    table: Tensor | None = None,  # (V, D)
) -> None:
    """The statistics of whole rows into ``out``, and E W becomes d logp / d hidden. One launch."""
    compiled.ops.finish(labels, vocab, list(sums), list(out), flags, unit, table)


def add_labels(
    table: Tensor,  # (V, D)
    labels: Tensor,  # (n,) int64
    rows: Tensor,  # (n, D)
    a: Tensor,  # (n,) float32
    both: Tensor | None,  # (n,) float32
    stats: RowStats,  # each (n,) float32
) -> None:
    """``table[label] += at_label row``, in the order of the rows, rounded once. One launch."""
    own = (stats.logps, stats.rest, stats.slope)
    compiled.ops.add_labels(table, labels, rows, a, both, *own)


BACKEND = Backend(
    name="cuda",
    devices=("cuda",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    panels=False,
    why_unavailable=why_unavailable,
    exps_=compiled.exps_,
    sums=compiled.sums,
    dlogits_=compiled.dlogits_,
    sequence_coef=compiled.sequence_coef,
    finish=finish,
    add_labels=add_labels,
)
