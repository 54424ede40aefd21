"""The row functions in Triton: float32, bfloat16 and float16 on NVIDIA and AMD GPUs, any strides.

With TRITON_INTERPRET=1 in the environment before the first use, the same kernels run on the CPU,
slowly: for tests. Results are bit-reproducible. The formulas, shapes and special values are those
of the reference backend. Nothing here waits for the device.
"""

import contextlib
import importlib
import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .contract import REACH, SHIFT, Backend, Exps, RowStats

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
SEQUENCE_BLOCK = 512  # tokens at a time in sequence_coef
WIDTH = 1024  # columns of hidden, and labels, at a time
STAGES = 1  # the sweeps have no dot product to pipeline: many programs per processor hide latency


@cache
def why_unavailable() -> str | None:
    """None where the kernels can run, else the reason and what to do about it."""
    if importlib.util.find_spec("triton") is None:
        return (
            "Triton is not installed: pip install 'lolkernels[gpu]' (it needs Triton 3.4 or later)"
        )
    if not (INTERPRETED or torch.cuda.is_available()):
        return (
            "torch sees no GPU (torch.cuda.is_available() is False): install a CUDA or ROCm build "
            "of torch, or set TRITON_INTERPRET=1 to run the kernels on the CPU for tests"
        )
    return None


def dlogits_block(vocab: int, cap: bool) -> tuple[int, int]:
    """(BLOCK, num_warps) of ``dlogits_``: 16 columns per thread, 8 where tanh takes registers."""
    columns = 8 if cap else 16
    block = min(_power_of_2(vocab), 256 * columns)
    return block, max(1, min(8, block // (32 * columns)))


def exps_block(vocab: int) -> tuple[int, int]:
    """(BLOCK, num_warps) of ``exps_``: 8 columns per thread, as its sums take registers too."""
    return dlogits_block(vocab, cap=True)


def exps_(
    logits: Tensor,  # (n, V)
    labels: Tensor,  # (n,) int64
    anchor: Tensor | None = None,  # (n,) float32; None: the label's own logit + SHIFT
    *,
    out: Tensor | None = None,  # (n, V)
    **scaling: Any,
) -> Exps:
    """`exp(z - anchor) dz/dx`, 0 at the label, over `logits` or into `out`, and its sums.

    `out` as for :func:`dlogits_`. Memory traffic: each logit is read once and its exponential
    written once; twice in rows that reach too far above their anchor, and in float16.
    """
    return _sweep(logits, labels, anchor, logits if out is None else out, **scaling)


def sums(logits: Tensor, labels: Tensor, **scaling: Any) -> Exps:
    """The sums of :func:`exps_`; nothing is written.

    Memory traffic: each logit is read once; twice in rows that reach too far above their label.
    """
    return _sweep(logits, labels, None, None, **scaling)


def _sweep(
    logits: Tensor,
    labels: Tensor,
    anchor: Tensor | None,
    target: Tensor | None,
    bias: Tensor | None = None,
    **scaling: float,
) -> Exps:
    n, vocab = logits.shape
    scale, softcap, inv_temperature = _scaling(**scaling)
    sums = Exps(*(logits.new_empty(n, dtype=torch.float32) for _ in Exps._fields))
    if n:
        block, warps = exps_block(vocab)
        with _device(logits):
            _kernels("rows").exps[(n,)](
                logits,
                labels,
                anchor,
                target,
                *sums,
                bias,
                vocab,
                *logits.stride(),
                *((0, 0) if target is None else target.stride()),
                labels.stride(0),
                0 if anchor is None else anchor.stride(0),
                *(scale, softcap, inv_temperature),
                SHIFT,
                REACH,
                HAS_ANCHOR=anchor is not None,
                HAS_BIAS=bias is not None,
                CAP=softcap != 0,
                AT_TOP=target is not None and target.dtype == torch.float16,
                WRITE=target is not None,
                BLOCK=block,
                num_warps=warps,
                num_stages=STAGES,
            )
    return sums


def dlogits_(
    logits: Tensor,  # (n, V)
    labels: Tensor,  # (n,) int64
    lse: Tensor,  # (n,) float32, and so are a, b, c
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    out: Tensor | None = None,  # (n, V)
    logps: Tensor | None = None,  # (n,) float32
    bias: Tensor | None = None,  # (V,) float32
    **scaling: float,
) -> Tensor:
    """`(a * [v == y] + exp(z - lse) * (b + c * z)) * dz/dx`, written over `logits` or into `out`.

    `out` may have another dtype and other strides. It shares no memory with `logits` unless it is
    the same view, or its rows begin where those of `logits` do, with narrower elements: bfloat16
    gradients over float32 logits. ``logps`` has the digits of 1 - p that z - lse at the label has
    lost. Memory traffic: each logit is read once, each gradient written once.
    """
    target = logits if out is None else out
    n, vocab = logits.shape
    if n == 0:
        return target
    scale, softcap, inv_temperature = _scaling(**scaling)
    block, warps = dlogits_block(vocab, softcap != 0)
    aliased = target.dtype != logits.dtype and (
        target.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    )
    # Few rows do not fill a device: their columns are shared out among programs.
    parts = 1 if aliased else max(1, min(-(-vocab // block), 1024 // n))
    span = -(-vocab // (parts * block)) * block
    with _device(logits):
        _kernels("rows").dlogits[(n * parts,)](
            logits,
            labels,
            lse,
            a,
            b,
            c,
            logps,
            bias,
            target,
            vocab,
            parts,
            span,
            *logits.stride(),
            *target.stride(),
            *(t.stride(0) for t in (labels, lse, a, b, c)),
            0 if logps is None else logps.stride(0),
            *(scale, softcap, inv_temperature),
            CAP=softcap != 0,
            HAS_LOGPS=logps is not None,
            HAS_BIAS=bias is not None,
            ALIASED=aliased,
            BLOCK=block,
            num_warps=warps,
            num_stages=STAGES,
        )
    return target


def sequence_coef(
    logps: Tensor,  # (n,) float32
    ref_logps: Tensor | None,  # (n,) float32
    cu_seqlens: Tensor,  # (s + 1,) int64, on the device of logps
    weight: Tensor,  # (s,) float32
    *,
    ratio: int,
    log_low: float,
    log_high: float,
    beta: float = 0.0,
    scale: Tensor | None = None,  # (s,) float32
    flags: Tensor | None = None,  # () int32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`loss (s,), coef (n,), log_ratio (s,), clipped (s,)`, float32, for the A-LoL family.

    One launch. Memory traffic: 8 bytes read and 4 written per token.
    """
    num_sequences = weight.shape[0]
    loss, log_ratio, clipped = (
        logps.new_empty(num_sequences, dtype=torch.float32) for _ in range(3)
    )
    coef = logps.new_empty(logps.shape, dtype=torch.float32)
    if num_sequences:
        with _device(logps):
            _kernels("sequences").sequence_coef[(num_sequences,)](
                logps.contiguous(),
                None if ref_logps is None else ref_logps.contiguous(),
                cu_seqlens.to(logps.device).contiguous(),
                weight.contiguous(),
                loss,
                coef,
                log_ratio,
                clipped,
                float(log_low),
                float(log_high),
                float(beta),
                scale,
                flags,
                HAS_SCALE=scale is not None,
                HAS_FLAGS=flags is not None,
                HAS_REF=ref_logps is not None,
                RATIO=ratio,
                HAS_BETA=beta != 0,
                BLOCK=SEQUENCE_BLOCK,
                num_warps=4,
                num_stages=STAGES,
            )
    return loss, coef, log_ratio, clipped


def finish(
    sums: Exps,  # each (n,) float32
    labels: Tensor,  # (n,) int64
    vocab: int,
    out: RowStats,  # each (n,) float32
    flags: Tensor | None = None,  # () int32
    unit: Tensor | None = None,  # (n, D) float32, rows of adjacent elements
    table: Tensor | None = None,  # (V, D)
) -> None:
    """The statistics of whole rows into ``out``, and E W becomes d logp / d hidden.

    One launch. Memory traffic: ``unit`` once each way, and the labels' rows of ``table``.
    """
    n = labels.shape[0]
    if n:
        width = 0 if unit is None else unit.shape[1]
        with _device(labels):
            _kernels("finish").finish[(n,)](
                labels,
                *sums,
                *out,
                flags,
                unit,
                table if unit is not None else None,
                vocab,
                width,
                labels.stride(0),
                0 if unit is None else unit.stride(0),
                *((0, 0) if unit is None or table is None else table.stride()),
                HAS_FLAGS=flags is not None,
                HAS_UNIT=unit is not None,
                BLOCK=WIDTH,
                num_warps=4,
                num_stages=STAGES,
            )


def add_labels(
    table: Tensor,  # (V, D), rows of adjacent elements
    labels: Tensor,  # (n,) int64
    rows: Tensor,  # (n, D)
    a: Tensor,  # (n,) float32
    both: Tensor | None,  # (n,) float32
    stats: RowStats,  # each (n,) float32
) -> None:
    """``table[label] += at_label row``, in the order of the rows, rounded once.

    One launch. Each row reads the labels of the others: 8 n^2 bytes, from cache.
    """
    n, width = rows.shape
    if n and width:
        with _device(labels):
            _kernels("finish").add_labels[(n, -(-width // WIDTH))](
                table,
                labels,
                rows,
                a,
                both,
                stats.logps,
                stats.rest,
                stats.slope,
                n,
                table.shape[0],
                width,
                table.stride(0),
                labels.stride(0),
                *rows.stride(),
                a.stride(0),
                0 if both is None else both.stride(0),
                HAS_BOTH=both is not None,
                SCAN=WIDTH,
                BLOCK=WIDTH,
                num_warps=4,
                num_stages=STAGES,
            )


def _scaling(
    scale: float = 1.0, softcap: float = 0.0, temperature: float = 1.0
) -> tuple[float, float, float]:
    """What the kernels take: without a cap the whole factor is in ``scale``."""
    if softcap:
        return float(scale), float(softcap), 1.0 / temperature
    return scale / temperature, 0.0, 1.0


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@cache
def _kernels(subject: str) -> Any:
    """The module ``triton_<subject>``; importing it imports Triton."""
    reason = why_unavailable()
    if reason is not None:
        raise ValueError(f"backend 'triton' is not available: {reason}")
    return importlib.import_module(f".triton_{subject}", __package__)


BACKEND = Backend(
    name="triton",
    devices=("cuda", "cpu") if INTERPRETED else ("cuda",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    panels=False,
    why_unavailable=why_unavailable,
    exps_=exps_,
    sums=sums,
    dlogits_=dlogits_,
    sequence_coef=sequence_coef,
    finish=finish,
    add_labels=add_labels,
)
