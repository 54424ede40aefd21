"""Process groups: a head or a sequence in parts, one on each rank. Kernels and ops see none of it.

Two autograd collectives do everything:

    enter     the same tensor on every rank -> itself; the backward adds the ranks' gradients
    gather    a tensor of each rank -> all of them, (R, ...); the backward takes the rank's own

Vocab-parallel: hidden states *enter*, each rank's op sees its rows of the weight, where a label
that stands on another rank has no target, and the ranks' statistics are *gathered*. With l_r, s_r
the log-prob and log-sum-exp within rank r, and o the rank that holds the label,

    lse = log sum_r exp s_r        logps = l_o - log(1 + sum_{r != o} exp(s_r - s_o))

Both terms of logps are negative, so that no digit of a confident label is lost. What follows is
computed alike on every rank: its gradient of hidden is whole there, that of the weight is its own.

Context-parallel: a sum over the tokens of a sequence is the sum of the ranks' sums, *entered* and
*gathered*: the backward differentiates the sum of the ranks' (equal) losses, whatever stands
between two such sums. Averaged over the group, gradients are those of the loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # torch.distributed.ProcessGroup, which a build without torch.distributed lacks


def size(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def enter(x: Tensor, group: Group) -> Tensor:
    """``x``, which every rank has, before each makes something else of it."""
    entered: Tensor = _Enter.apply(x, group)  # type: ignore[no-untyped-call]
    return entered


def gather(group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one shape and dtype -> those of all ranks, (R, *shape) each, by one collective."""
    gathered: tuple[Tensor, ...] = _Gather.apply(group, *tensors)  # type: ignore[no-untyped-call]
    return gathered


def total(x: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' ``x``, the same bits on every rank."""
    return gather(group, enter(x, group))[0].sum(0)


def total_lengths(lengths: Tensor, group: Group) -> Tensor:
    """The tokens of each whole sequence, from the (S,) that the ranks hold of them.

    Raises:
        ValueError: the ranks hold parts of different numbers of sequences.
        TypeError: no process group.
    """
    check_group("cp_group", group)
    counts = gather(group, torch.tensor(lengths.shape, device=lengths.device))[0].tolist()
    if any(count != counts[0] for count in counts):
        raise ValueError(
            f"the ranks of cp_group hold parts of {[n for (n,) in counts]} sequences: each holds a "
            "part, empty or not, of the same sequences in the same order"
        )
    return total(lengths, group)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.rank = dist.get_rank(group)
        # No gradient is None, not zeros: a gradient of the entropy makes the logits once more.
        ctx.set_materialize_grads(False)
        mine = torch.stack(tensors)
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group=group)
        return tuple(t.contiguous() for t in torch.stack(parts, 1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *(None if g is None else g[ctx.rank] for g in grads)


def total_size(rows: int, device: torch.device, group: Group) -> int | Tensor:
    """The rows of the whole vocabulary."""
    return rows if group is None else total(torch.full((), rows, device=device), group)


# --- the vocabulary in shards ---------------------------------------------------------------------


class Shards(NamedTuple):
    """Where labels stand among the ranks' rows of the vocabulary; nothing waits for a GPU."""

    group: Group
    labels: Tensor  # (N,) within this rank's rows; outside of them where it is another rank's
    owner: Tensor  # (N,) the rank that holds the label
    size: Tensor  # () the whole vocabulary
    agree: Tensor  # () bool, whether the ranks were given the same labels


def shards(labels: Tensor, rows: int, group: Group) -> Shards:
    """The ranks' numbers of rows may differ: they are exchanged."""
    place = torch.arange(1, labels.numel() + 1, device=labels.device)
    check = (labels.flatten() * place).sum()
    mine = torch.stack([check.new_full((), rows), check.new_full((), labels.numel()), check])
    sizes, *told = gather(group, mine)[0].unbind(1)
    ends = sizes.cumsum(0)
    rank = dist.get_rank(group)
    owner = torch.bucketize(labels, ends, right=True).clamp(max=sizes.numel() - 1)
    agree = torch.stack([(t == t[0]).all() for t in told]).all()
    return Shards(group, labels - (ends - sizes)[rank], owner, ends[-1], agree)


def combine(local: list[Tensor], where: Shards, poison: Tensor | None) -> list[Tensor]:
    """[logps, lse, entropy, max_logit] of each rank's rows -> of the whole vocabulary, each (N,).

    A row with nan in ``poison`` is spoilt, and so are its gradients.
    """
    logps, lse, entropy, largest = gather(where.group, *local)
    dtype, ranks = lse.dtype, torch.arange(lse.shape[0], device=lse.device)
    mine, s = where.owner[None], lse.double()
    whole = s.logsumexp(0)
    at_owner = s.gather(0, mine).squeeze(0)
    elsewhere = s.masked_fill(ranks[:, None] == mine, -torch.inf).logsumexp(0)
    behind = torch.logaddexp(torch.zeros_like(whole), elsewhere - at_owner)
    share = (s - whole).exp()
    expected = torch.where(share == 0, 0.0, share * (lse - entropy).double()).sum(0)
    if poison is not None:
        whole, behind = whole * (1 + poison), behind * (1 + poison)
    made = [logps.gather(0, mine).squeeze(0).double() - behind, whole, whole - expected]
    return [*(t.to(dtype) for t in made), largest.detach().amax(0)]


def local_shards(weight: Any, bias: Any, group: Group) -> tuple[Any, Any, Group]:
    """The rank's rows of DTensors that are split by rows over one mesh dimension, and its group.

    Raises:
        ValueError: a DTensor placed otherwise, or a group that is not that of its mesh.
        TypeError: no process group.
    """
    found = []
    for name, value in (("weight", weight), ("bias", bias)):
        if hasattr(value, "placements") and hasattr(value, "to_local"):
            mesh, placements = value.device_mesh, value.placements
            if mesh.ndim != 1 or not placements[0].is_shard(0):
                raise ValueError(
                    f"{name} is a DTensor placed {tuple(placements)} on a mesh of {mesh.ndim} "
                    "dimensions: vocab-parallel takes Shard(0) on a one-dimensional mesh. A weight "
                    "that FSDP shards is gathered inside the wrapped module's forward: call the "
                    "head there (see fuse_lm_head)"
                )
            if group is not None and group is not mesh.get_group():
                raise ValueError(f"tp_group is not the group of {name}'s mesh: leave it out")
            value, group = value.to_local(), mesh.get_group()
        found.append(value)
    check_group("tp_group", group)
    return *found, group


def check_group(name: str, group: Any) -> None:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{name} must be a torch.distributed process group that this rank belongs to, got "
            f"{type(group).__name__}: pass mesh.get_group() or torch.distributed.new_group(...)"
        )
