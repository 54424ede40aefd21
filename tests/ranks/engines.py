"""A fused model trained by DDP, FSDP2 and ZeRO-3 in a hand-written loop, against one process."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import lolkernels as lk
from tests.lolrl.toys import make_llama
from tests.ranks.harness import close, scenario
from tests.ranks.vocabulary import F64

VOCAB, ROWS, LENGTH, STEPS = 67, 8, 12, 20
Batch = dict[str, Tensor]


def build(tied: bool = True, *, frozen_head: bool = False) -> Any:
    model = make_llama(VOCAB, dtype=F64, tied=tied)
    model.lm_head.weight.requires_grad_(not frozen_head)
    return model.train()


def update(step: int) -> Batch:
    """The rows of one update. Lengths are uneven, and in every third nothing of the first half,
    which is all that the first ranks get, is to be learnt from."""
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=g)
    ends = torch.randint(3, LENGTH + 1, (ROWS, 1), generator=g)
    at = torch.arange(LENGTH)
    mask = (at >= 2) & (at < ends)
    if step % 3 == 1:
        mask[: ROWS // 2] = False
    return {
        "input_ids": ids,
        "attention_mask": (at < ends).long(),
        "completion_mask": mask,
        "ref_logps": -4 - torch.rand(ROWS, LENGTH, generator=g, dtype=F64),
        "advantages": torch.randn(ROWS, generator=g, dtype=F64) + 0.5,
    }


def fused(model: Any, rows: Batch, totals: tuple[int, int]) -> Tensor:
    out = model(**rows, objective=lk.objectives.a_lol, totals=totals)
    return out.loss


def in_two_steps(model: Any, rows: Batch, totals: tuple[int, int]) -> Tensor:
    """Log-probs from the model, any loss behind it."""
    mask = rows["completion_mask"]
    out = model(rows["input_ids"], attention_mask=rows["attention_mask"], completion_mask=mask)
    seq = out.seq.with_totals(num_sequences=totals[0], num_tokens=totals[1])
    ref = rows["ref_logps"][mask]
    loss = lk.objectives.a_lol(out.logps, ref, rows["advantages"], seq) - 0.1 * seq.sum(out.entropy)
    return lk.aggregate(loss, seq)


Loss = Callable[[Any, Batch, tuple[int, int]], Tensor]


def train(
    model: Any,
    steps: range,
    loss: Loss = fused,
    *,
    pieces: int = 1,
    rank: int = 0,
    world: int = 1,
    hold: Callable[[Any, bool], Any] = lambda model, last: contextlib.nullcontext(),
    optimizer: Any = None,
) -> Any:
    """Updates of this rank's share of the rows, in ``pieces``; the optimiser."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in steps:
        whole = update(step)
        totals = ROWS, int(whole["completion_mask"].sum())
        own = {k: t.chunk(world)[rank].chunk(pieces) for k, t in whole.items()}
        for i in range(pieces):
            rows = {k: t[i] for k, t in own.items()}
            with hold(model, i == pieces - 1):
                # The engines average over the ranks what belongs to a sum over global counts.
                (loss(model, rows, totals) * world).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def state(model: Any) -> dict[str, Tensor]:
    """Whole parameters by the names that they have without a wrapper."""
    return {
        name.removeprefix("module.").replace("_checkpoint_wrapped_module.", ""): (
            p.full_tensor() if hasattr(p, "full_tensor") else p
        ).detach()
        for name, p in model.named_parameters()
    }


def one_process(tied: bool = True, loss: Loss = fused, **kw: Any) -> dict[str, Tensor]:
    model = lk.fuse_lm_head(build(tied, **kw))
    start = {k: v.clone() for k, v in state(model).items()}
    train(model, range(STEPS), loss)
    end = state(model)
    moved = [k for k in end if not torch.equal(end[k], start[k])]
    assert len(moved) == len(end) - bool(kw.get("frozen_head")), "training moves every parameter"
    return end


def ranks() -> dict[str, int]:
    return {"rank": dist.get_rank(), "world": dist.get_world_size()}


def equal(model: Any, want: dict[str, Tensor]) -> None:
    close(state(model), want, 1e-10)


# --- DDP ------------------------------------------------------------------------------------------


def no_sync(model: Any, last: bool) -> Any:
    return contextlib.nullcontext() if last else model.no_sync()


@scenario(2, 4)
def ddp() -> None:
    for tied in (True, False):
        want = one_process(tied)
        for pieces in (1, 2):
            model = DistributedDataParallel(lk.fuse_lm_head(build(tied)))
            train(model, range(STEPS), pieces=pieces, hold=no_sync, **ranks())
            equal(model, want)


@scenario(2)
def ddp_with_another_loss_checkpointed() -> None:
    """Log-probs with a loss behind them; layers and the whole fused call computed again."""

    def again(model: Any, rows: Batch, totals: tuple[int, int]) -> Tensor:
        return checkpoint(in_two_steps, model, rows, totals, use_reentrant=False)

    want = one_process(loss=in_two_steps)
    model = lk.fuse_lm_head(build())
    model.gradient_checkpointing_enable()
    model = DistributedDataParallel(model)
    train(model, range(STEPS), in_two_steps, **ranks())
    equal(model, want)
    model = DistributedDataParallel(lk.fuse_lm_head(build()))
    train(model, range(STEPS), again, **ranks())
    equal(model, want)


# --- FSDP2 ----------------------------------------------------------------------------------------


def shard(model: Any, mesh: Any, *, own_head: bool = False) -> Any:
    head = [model.lm_head] if own_head else []
    for part in (*model.model.layers, *head, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    return model


def hold_gradients(model: Any, last: bool) -> Any:
    model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def everyone() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


@scenario(2, 4)
def fsdp2() -> None:
    """The head in a unit of its own, in the root's, and tied; fused before or after sharding."""
    for tied, own_head in ((True, False), (False, False), (False, True)):
        want = one_process(tied)
        for pieces in (1, 2):
            model = build(tied)
            if pieces == 1:
                lk.fuse_lm_head(model)
            model = lk.fuse_lm_head(shard(model, everyone(), own_head=own_head))
            train(model, range(STEPS), pieces=pieces, hold=hold_gradients, **ranks())
            equal(model, want)


@scenario(2)
def fsdp2_every_way_through_the_walk() -> None:
    """Rows that the budget does not hold, a frozen head, a loss behind the log-probs: what a
    backward reads of a weight that was released in between is gathered again."""
    for loss in (fused, in_two_steps):
        for frozen in (False, True):
            want = one_process(False, loss, frozen_head=frozen)
            for budget in (None, 3 * VOCAB * 8):
                model = shard(build(False, frozen_head=frozen), everyone(), own_head=True)
                lk.fuse_lm_head(model, memory_budget=budget)
                train(model, range(STEPS), loss, **ranks())
                equal(model, want)


@scenario(2)
def fsdp2_checkpointed() -> None:
    want = one_process(False, in_two_steps)
    model = build(False)
    model.gradient_checkpointing_enable()
    model = lk.fuse_lm_head(shard(model, everyone(), own_head=True))
    train(model, range(STEPS), in_two_steps, **ranks())
    equal(model, want)


@scenario(4)
def fsdp2_resumes_on_more_ranks() -> None:
    """Half of the training on two ranks, the rest on four, through a distributed checkpoint."""
    want = one_process(False)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    pair = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        mesh = DeviceMesh.from_group(pair, "cpu")
        model = lk.fuse_lm_head(shard(build(False), mesh, own_head=True))
        done = train(model, range(STEPS // 2), rank=dist.get_rank(), world=2)
        weights, moments = get_state_dict(model, done)
        dcp.save({"model": weights, "optim": moments}, checkpoint_id=folder[0], process_group=pair)
    dist.barrier()
    model = lk.fuse_lm_head(shard(build(False), everyone(), own_head=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optim": moments}, checkpoint_id=folder[0])
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    train(model, range(STEPS // 2, STEPS), optimizer=optimizer, **ranks())
    equal(model, want)
