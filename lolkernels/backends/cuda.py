"""The row functions in CUDA C++ (csrc/cuda): float32, bfloat16 and float16 on NVIDIA GPUs.

Any strides; nothing is compiled when it runs. Results are bit-reproducible. The formulas, shapes
and special values are those of the reference backend. Nothing here waits for the device.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WHOLE_ROWS = True  # a tile is as wide as the vocabulary

_LIBRARY = Path(__file__).resolve().parent.parent / "_CUDA.abi3.so"


@cache
def why_unavailable() -> str | None:
    """None where the compiled kernels can run, else the reason and what to do about it."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return (
            "torch sees no NVIDIA GPU: install a CUDA build of torch on a machine that has one "
            "(torch.version.cuda and torch.cuda.is_available() tell)"
        )
    if not _LIBRARY.exists():
        return (
            f"the CUDA kernels are missing ({_LIBRARY.name} is not in the package): with nvcc at "
            "hand run `pip install --no-build-isolation .` in the source tree"
        )
    try:
        torch.ops.load_library(_LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        return (
            f"the CUDA kernels do not load with torch {torch.__version__} ({error}): run `pip "
            "install --no-build-isolation .` in the source tree to compile them for it"
        )
    return None


def row_stats(
    logits: Tensor,  # (n, V)
    labels: Tensor,  # (n,) int64
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`target_logit, lse, expected_logit, max_logit`, each (n,) float32, in one sweep.

    Memory traffic: each logit is read once.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _ops().row_stats(
        logits, labels, scale, softcap, temperature
    )
    return result


def dlogits_(
    logits: Tensor,  # (n, V)
    labels: Tensor,  # (n,) int64
    lse: Tensor,  # (n,) float32, and so are a, b, c
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    out: Tensor | None = None,  # (n, V)
) -> Tensor:
    """`(a * [v == y] + exp(z - lse) * (b + c * z)) * dz/dx`, written over `logits` or into `out`.

    `out` may have another dtype and other strides. It shares no memory with `logits` unless it is
    the same view, or its rows begin where those of `logits` do, with narrower elements: bfloat16
    gradients over float32 logits. Memory traffic: each logit is read once, each gradient written
    once.
    """
    target = logits if out is None else out
    _ops().dlogits(logits, labels, lse, a, b, c, scale, softcap, temperature, out=target)
    return target


def sequence_coef(
    logps: Tensor,  # (n,) float32
    ref_logps: Tensor | None,  # (n,) float32
    cu_seqlens: Tensor,  # (s + 1,) int64; its values are not checked
    weight: Tensor,  # (s,) float32
    *,
    ratio: int,
    log_low: float,
    log_high: float,
    beta: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`loss (s,), coef (n,), log_ratio (s,), clipped (s,)`, float32, for the A-LoL family.

    One launch. Memory traffic: 8 bytes a token read, 4 written.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _ops().sequence_coef(
        logps, ref_logps, cu_seqlens.to(logps.device), weight, ratio, log_low, log_high, beta
    )
    return result


def _ops() -> "torch._ops._OpNamespace":
    reason = why_unavailable()
    if reason is not None:
        raise ValueError(f"backend 'cuda' is not available: {reason}")
    return torch.ops.lolkernels_cuda
