"""What the compiled backends share: loading a shared object, and its row functions."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .contract import Exps


class Compiled:
    """The row functions of one shared object, which torch calls through its stable ABI.

    The formulas, shapes and special values are those of the reference backend.
    """

    def __init__(self, library: str, namespace: str, kernels: str, tool: str) -> None:
        self.library = Path(__file__).resolve().parent.parent / library
        self.namespace, self.kernels, self.tool = namespace, kernels, tool

    @cached_property
    def why_unavailable(self) -> str | None:
        """None where the object loads, else the reason and what to do about it."""
        build = "`pip install --no-build-isolation .` in the source tree"
        if not self.library.exists():
            return (
                f"the {self.kernels} kernels are missing ({self.library.name} is not in the "
                f"package): with {self.tool} at hand run {build}"
            )
        try:
            torch.ops.load_library(self.library)  # type: ignore[no-untyped-call]
        except OSError as error:
            return (
                f"the {self.kernels} kernels do not load with torch {torch.__version__} ({error}): "
                f"run {build} to compile them for it"
            )
        return None

    @property
    def ops(self) -> Any:
        if self.why_unavailable is not None:
            raise ValueError(f"backend is not available: {self.why_unavailable}")
        return getattr(torch.ops, self.namespace)

    def exps_(
        self,
        logits: Tensor,  # (n, V)
        labels: Tensor,  # (n,) int64
        anchor: Tensor | None = None,  # (n,) float32; None: the label's own logit + SHIFT
        *,
        out: Tensor | None = None,  # (n, V)
        **scaling: Any,
    ) -> Exps:
        """`exp(z - anchor) dz/dx`, 0 at the label, over `logits` or into `out`, and its sums.

        `out` as for :meth:`dlogits_`. Memory traffic: each logit is read once and its exponential
        written once; twice in rows that reach too far above their anchor, and in float16.
        """
        target = logits if out is None else out
        return Exps(*self.ops.exps(logits, labels, anchor, **scaling, out=target))

    def sums(self, logits: Tensor, labels: Tensor, **scaling: Any) -> Exps:
        """The sums of :meth:`exps_`; nothing is written.

        Memory traffic: each logit is read once; twice in rows that reach too far above their label.
        """
        return Exps(*self.ops.exps(logits, labels, None, **scaling, out=None))

    def dlogits_(
        self,
        logits: Tensor,  # (n, V)
        labels: Tensor,  # (n,) int64
        lse: Tensor,  # (n,) float32, and so are a, b, c
        a: Tensor,
        b: Tensor,
        c: Tensor,
        *,
        out: Tensor | None = None,  # (n, V)
        logps: Tensor | None = None,  # (n,) float32
        **scaling: Any,
    ) -> Tensor:
        """`(a [v == y] + exp(z - lse) (b + c z)) dz/dx`, written over `logits` or into `out`.

        `out` may have another dtype and other strides, but shares no memory with `logits` unless it
        is the same view; on a GPU also where its rows begin where those of `logits` do, with
        narrower elements. ``logps`` has the digits of 1 - p that z - lse at the label has lost.
        Memory traffic: each logit is read once, each gradient written once.
        """
        target = logits if out is None else out
        self.ops.dlogits(logits, labels, lse, a, b, c, **scaling, out=target, logps=logps)
        return target

    def sequence_coef(
        self,
        logps: Tensor,  # (n,) float32
        ref_logps: Tensor | None,  # (n,) float32
        cu_seqlens: Tensor,  # (s + 1,) int64; its values are checked on a CPU only
        weight: Tensor,  # (s,) float32
        *,
        ratio: int,
        log_low: float,
        log_high: float,
        beta: float = 0.0,
        scale: Tensor | None = None,  # (s,) float32
        flags: Tensor | None = None,  # () int32, on a GPU
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`loss (s,), coef (n,), log_ratio (s,), clipped (s,)`, float32, for the A-LoL family."""
        result: tuple[Tensor, Tensor, Tensor, Tensor] = self.ops.sequence_coef(
            *(logps, ref_logps, cu_seqlens, weight, ratio, log_low, log_high, beta, scale, flags)
        )
        return result
