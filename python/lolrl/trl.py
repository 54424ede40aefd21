"""TRL: its trainers on lolkernels' log-probs.

SFT, DPO, KTO, GRPO and RLOO of TRL 1.15 and 1.16 give their models a fused head, whose one kernel
is `trl.trainer.utils._ChunkedLogProbFunction`. `use_lolkernels` stands in for it:

    from lolrl.trl import use_lolkernels

    use_lolkernels()
    trl.SFTTrainer(...).train()

Nothing else of a trainer, a script or a model changes. `lolkernels.fuse_lm_head` has no effect on a
model in a TRL trainer, whose own forward takes its place, and does no harm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import trl
from packaging.version import Version
from torch import Tensor
from trl.trainer import utils

import lolkernels as lk

__all__ = ["use_lolkernels"]

FIRST, LAST = Version("1.15"), Version("1.17")  # the seam: from, and before
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
ROWS, COLUMNS = 2048, 4096  # of a tile of logits
# Of a computed top logit, in units of the last place: two roundings of the label's, one of each.
ULPS = 8


class use_lolkernels:  # noqa: N801
    """TRL's trainers compute log-probs with `lolkernels.linear_logprob`, until `undo`.

    It acts at once, for every model that TRL has given or will give its fused head; as a context
    manager it ends with the block. Losses, gradients and metrics are TRL's, computed from fp32
    logits: in bf16 they differ by what TRL rounds. On a CPU only the labelled positions are
    scored, where TRL scores all. A label outside the vocabulary raises. `mean_logits` under a
    soft-cap, `log_sum_sq_probs` (DPO's `use_weighting`) and the `is_top1` of a label that is the
    likeliest at p <= 1/2 cost a further product without gradient.

    Args:
        backend, memory_budget: see `lolkernels.linear_logprob`.
        entropy_grad: the loss uses the gradient of the entropy (GRPO's `entropy_coef`): logits are
            held for it. Without it that gradient is as right, and costs one product more.

    Raises:
        ImportError: the installed TRL has no such seam, or one that is not known.
        ValueError: of `linear_logprob`, in the first step: among others for a `logit_scale` or a
            temperature that is not above zero.
    """

    def __init__(
        self,
        *,
        backend: str | None = None,
        memory_budget: int | None = None,
        entropy_grad: bool = False,
    ) -> None:
        installed = Version(Version(trl.__version__).base_version)
        if not FIRST <= installed < LAST:
            raise ImportError(
                f"trl {trl.__version__} is installed, and lolkernels can take the place of the "
                f"kernel of trl >= {FIRST}, < {LAST}: pip install 'trl>={FIRST},<{LAST}'"
            )
        self.options = {
            "backend": backend,
            "memory_budget": memory_budget,
            "entropy_grad": entropy_grad,
        }
        self._found = {"_ChunkedLogProbFunction": utils._ChunkedLogProbFunction}
        utils._ChunkedLogProbFunction = self
        if hasattr(utils, "_use_triton"):  # what decides whether masked rows are left out
            self._found["_use_triton"] = utils._use_triton
            utils._use_triton = _leaves_rows_out

    def undo(self) -> None:
        """Put back what was there before."""
        for name, value in self._found.items():
            setattr(utils, name, value)

    def __enter__(self) -> use_lolkernels:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def apply(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """TRL's call: logps, and of OUTPUTS those asked for, each (N,), else None.

        `chunk_size` is TRL's tile; ours follows `memory_budget`.
        """
        unknown = set(outputs) - {"log_probs", *OUTPUTS}
        if unknown:
            raise ValueError(f"outputs={sorted(unknown)} are not known; they are {OUTPUTS}")
        head = {"bias": bias, "softcap": final_logit_softcapping, "logit_scale": logit_scale}
        with _saved_without_copies(weight, bias):
            out = lk.linear_logprob(
                hidden, weight, targets, temperature=temperature, **head, **self.options
            )
        squares = means = top = None
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            logps, lse = out.logps.detach(), out.lse.detach()
            if "log_sum_sq_probs" in outputs:
                # sum p^2 = sum exp(2 z) / (sum exp z)^2, and 2 z are the logits at half temperature
                double = lk.linear_logprob(
                    hidden,
                    weight,
                    targets,
                    temperature=temperature / 2,
                    backend=self.options["backend"],
                    memory_budget=self.options["memory_budget"],
                    **head,
                )
                squares = double.lse - 2 * lse
            if "mean_logits" in outputs:
                means = _mean_logits(hidden, weight, **head) / temperature
            if "is_top1" in outputs:
                near = ULPS * torch.finfo(lse.dtype).eps * (lse.abs() + out.max_logit.abs())
                top = logps + lse >= out.max_logit - near
                # Above 1/2 it has no rival; elsewhere the first of equals wins, as in argmax.
                rows = (top & (logps <= -0.5)).nonzero().squeeze(1)
                top[rows] = ~_tied(hidden[rows], weight, targets[rows], **head)
        return out.logps, out.entropy if "entropy" in outputs else None, squares, means, top


def _leaves_rows_out(device: torch.device) -> bool:
    return True


def _mean_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Tensor:
    """The mean of softcap(logit_scale (hidden W^T + bias)) over the vocabulary, (N,) fp32."""
    if softcap is None:
        mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
        return logit_scale * (mean if bias is None else mean + bias.float().mean())
    total = torch.zeros(len(hidden), device=hidden.device)
    for rows, _, z in _tiles(hidden, weight, bias, softcap, logit_scale):
        total[rows] += z.sum(1)
    return total / len(weight)


def _tied(hidden: Tensor, weight: Tensor, targets: Tensor, **head: Any) -> Tensor:
    """Whether a token before the label has exactly its logit, (N,) bool."""
    own = torch.zeros(len(hidden), device=hidden.device)
    before = torch.full_like(own, -torch.inf)
    for rows, columns, z in _tiles(hidden, weight, **head):
        place = targets[rows, None] - columns.start
        held = (place >= 0) & (place < z.shape[1])
        picked = z.gather(1, place.clamp(0, z.shape[1] - 1))
        own[rows] = torch.where(held, picked, own[rows, None]).squeeze(1)
        later = torch.arange(z.shape[1], device=z.device) >= place
        before[rows] = torch.maximum(before[rows], z.masked_fill(later, -torch.inf).amax(1))
    return before == own


def _tiles(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Logits in fp32, tile by tile, and where each stands."""
    for n in range(0, len(hidden), ROWS):
        h = hidden[n : n + ROWS].float()
        for v in range(0, len(weight), COLUMNS):
            columns = slice(v, v + COLUMNS)
            b = None if bias is None else bias[columns].float()
            z = logit_scale * F.linear(h, weight[columns].float(), b)
            yield (
                slice(n, n + ROWS),
                columns,
                z if softcap is None else softcap * (z / softcap).tanh(),
            )


@contextlib.contextmanager
def _saved_without_copies(*parameters: Tensor | None) -> Iterator[None]:
    """Under ZeRO-3 the head is whole inside TRL's block only: gather it again for the backward."""
    shards = [p for p in parameters if p is not None and hasattr(p, "ds_id")]
    if not shards:
        yield
        return

    def pack(tensor: Tensor) -> Any:
        return next((p for p in shards if p.data_ptr() == tensor.data_ptr()), tensor)

    def unpack(kept: Any) -> Tensor:
        if not any(kept is p for p in shards):
            return kept
        with utils.maybe_gather_lm_head_ctx(kept):
            return kept.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
