"""The cuda backend with a GEMM of its own for NVIDIA's Hopper: no float32 logits in memory.

For x = hidden W^T + bias (fp32 accumulation) the GEMM's epilogue makes the exponentials and sums of
``exps_`` while the logits are in registers: 2 bytes per logit go through memory instead of 10.

Chosen by name only: where it is faster than the vendor's GEMM with a sweep over its logits has not
been measured. The names hold the rows and columns of a tile; two warpgroups work together on one of
128 x 256, and take turns with those of 64 x 256 and 128 x 192.
"""

from functools import cache, partial

import torch
from torch import Tensor

from . import cuda
from .contract import Exps

GEMM_DTYPES = (torch.bfloat16,)
TILES = {"128x256": (0, 256), "64x256": (1, 256), "128x192": (2, 192)}  # csrc/cuda/hopper.h


@cache
def why_unavailable() -> str | None:
    """None where the GEMM can run, else the reason and what to do about it."""
    reason: str | None = cuda.why_unavailable()
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return (
            "it needs a GPU of compute capability 9.0 (Hopper), this one has "
            f"{capability[0]}.{capability[1]}: use backend='cuda'"
        )
    if not hasattr(cuda.compiled.ops, "linear_exps"):
        return (
            "the CUDA kernels were built without CUTLASS: `pip install --no-deps nvidia-cutlass`, "
            "then `pip install --no-build-isolation .` in the source tree"
        )
    return None


def check_operands(hidden: Tensor, weight: Tensor, out: Tensor | None) -> None:
    """bfloat16, and rows of adjacent elements from addresses that are multiples of 16 bytes."""
    for name, t in {"hidden": hidden, "weight": weight, "out": out}.items():
        if t is None:
            continue
        if t.dtype not in GEMM_DTYPES:
            raise ValueError(
                f"the cuda_gemm backends need {name} to be bfloat16, not {t.dtype}: float16 has "
                "not the range of exponentials that are anchored at the label. Use backend='cuda'"
            )
        if name != "out" and (t.shape[1] % 8 or t.shape[1] == 0):
            raise ValueError(
                f"the cuda_gemm backends need {name} to have a multiple of 8 columns, not "
                f"{t.shape[1]}: use backend='cuda'"
            )
        rows, columns = t.stride()
        room = -(-t.shape[1] // 8) * 8  # the last 16 bytes of a row are written whole
        if (columns != 1 and t.shape[1] > 1) or (t.shape[0] > 1 and (rows < room or rows % 8)):
            raise ValueError(
                f"the cuda_gemm backends need {name} with rows of adjacent elements that start at "
                f"multiples of 16 bytes, not strides {t.stride()}: pass {name}.contiguous(), or "
                "for out the first columns of a matrix whose width is a multiple of 8"
            )
        if t.data_ptr() % 16:
            raise ValueError(
                f"the cuda_gemm backends need {name} to start at a multiple of 16 bytes: pass "
                f"{name}.clone()"
            )


def gemm(
    hidden: Tensor,  # (n, D) bfloat16, D a multiple of 8
    weight: Tensor,  # (V, D) bfloat16
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64
    anchor: Tensor,  # (n,) float32: about the label's z + SHIFT
    out: Tensor | None,  # (n, V) bfloat16; None: the sums only
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    temperature: float = 1.0,
    tile: str = "128x256",
) -> Exps:
    """What ``exps_`` makes of hidden W^T + bias, the exponentials in `out`.

    The label's logit comes from the same product as the others. Rows of the three matrices are
    adjacent elements and start at multiples of 16 bytes; those of `out` have room for a multiple of
    8 columns. 2 n V D flops; 2 n V bytes are written, beside 12 n of sums for each span of
    columns. Exponentials of rows out of their anchor's reach are read and written once more.

    Raises:
        ValueError: operands that it does not take; the text says which, and what to pass.
    """
    check_operands(hidden, weight, out)
    number, columns = TILES[tile]
    if bias is not None:
        bias = torch.nn.functional.pad(bias.float(), (0, -weight.shape[0] % columns))
    return Exps(
        *cuda.compiled.ops.linear_exps(
            hidden, weight, bias, labels, anchor, out, scale, softcap, temperature, number
        )
    )


BACKENDS = tuple(
    cuda.BACKEND._replace(
        name=f"cuda_gemm_{tile}",
        why_unavailable=why_unavailable,
        gemm=partial(gemm, tile=tile),
        gemm_dtypes=GEMM_DTYPES,
    )
    for tile in TILES
)
