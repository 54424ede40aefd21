"""The row functions in C++ (csrc/cpu): float32, bfloat16 and float16 on the CPU, any strides.

Float64 is not here: the reference backend computes it. Results are bit-identical for any number of
threads. The formulas, shapes and special values are those of the reference backend.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

DEVICES = ("cpu",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WHOLE_ROWS = False  # on a CPU the driver hands over panels of columns

_LIBRARY = Path(__file__).resolve().parent.parent / "_C.abi3.so"


@cache
def why_unavailable() -> str | None:
    """None where the compiled kernels can run, else the reason and what to do about it."""
    if not _LIBRARY.exists():
        return (
            f"the compiled kernels are missing ({_LIBRARY.name} is not in the package): with a C++ "
            "compiler at hand run `pip install --no-build-isolation .` in the source tree"
        )
    try:
        torch.ops.load_library(_LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        return (
            f"the compiled kernels do not load with torch {torch.__version__} ({error}): run `pip "
            "install --no-build-isolation .` in the source tree to compile them for it"
        )
    return None


def isa() -> str:
    """The instruction set in use: `avx512`, `avx2` or `baseline`."""
    name: str = _ops().cpu_isa()
    return name


def row_stats(
    logits: Tensor,  # (n, V)
    labels: Tensor,  # (n,) int64
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`target_logit, lse, expected_logit, max_logit`, each (n,) float32, in one sweep."""
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

    `out` may have another dtype and other strides, but shares no memory with `logits` unless it is
    the same view.
    """
    target = logits if out is None else out
    _ops().dlogits(logits, labels, lse, a, b, c, scale, softcap, temperature, out=target)
    return target


def sequence_coef(
    logps: Tensor,  # (n,) float32
    ref_logps: Tensor | None,  # (n,) float32
    cu_seqlens: Tensor,  # (s + 1,) int64
    weight: Tensor,  # (s,) float32
    *,
    ratio: int,
    log_low: float,
    log_high: float,
    beta: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`loss (s,), coef (n,), log_ratio (s,), clipped (s,)`, float32, for the A-LoL family."""
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _ops().sequence_coef(
        logps, ref_logps, cu_seqlens, weight, ratio, log_low, log_high, beta
    )
    return result


def _ops() -> "torch._ops._OpNamespace":
    reason = why_unavailable()
    if reason is not None:
        raise ValueError(f"backend 'cpu' is not available: {reason}")
    return torch.ops.lolkernels
