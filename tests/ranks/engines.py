"""A fused model trained by DDP, FSDP2 and ZeRO-3 in a hand-written loop, against one process."""

from __future__ import annotations

import contextlib
import functools
import runpy
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import peft
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import ROOT
from judges import peaky
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lolkernels as lk
from tests.lolrl.toys import make_llama
from tests.ranks.harness import close, raises, scenario
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


def state(model: Any, of: Callable[[Any], Any] = lambda p: p.detach()) -> dict[str, Tensor]:
    """Whole parameters, or what is theirs, by the names that they have without a wrapper."""
    values = {n.removeprefix("module."): of(p) for n, p in model.named_parameters()}
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in values.items()}


@functools.cache
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
    for tied in (True, False) if dist.get_world_size() == 2 else (False,):
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
    kinds = [(False, True), (True, False), (False, False)]
    for tied, own_head in kinds if dist.get_world_size() == 2 else kinds[:1]:
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
            model = shard(build(False, frozen_head=frozen), everyone(), own_head=True)
            lk.fuse_lm_head(model, memory_budget=3 * VOCAB * 8)
            train(model, range(STEPS), loss, **ranks())
            equal(model, want)


@scenario(2)
def the_example() -> None:
    """From the reference on, training follows the advantages; all ranks print the same."""
    example = runpy.run_path(str(ROOT / "python" / "examples" / "fsdp2.py"))
    model = example["shard"](LlamaForCausalLM(example["TINY"]), "cpu")
    ratios = example["train"](model, 12, "cpu")
    assert abs(ratios[0] - 1) < 1e-3 < ratios[-1] - 1
    close({"ratios": torch.tensor(ratios)}, {"ratios": everywhere(torch.tensor(ratios))[0]})


def everywhere(t: Tensor) -> list[Tensor]:
    found = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(found, t)
    return found


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


@scenario(4)
def fsdp2_over_a_sharded_vocabulary() -> None:
    """Two by two: pairs share a batch and a head in two parts, whose rows FSDP2 shards again."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    problem = peaky(24, 16, 41, dtype=F64)
    found = []
    for parallel in (False, True):
        head = Head(problem)
        if parallel:
            head.weight = nn.Parameter(distribute_tensor(head.weight, mesh["tp"], [Shard(0)]))
            fully_shard(head, mesh=mesh["dp"])
        rank, world = (mesh["dp"].get_local_rank(), 2) if parallel else (0, 1)
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
        for _ in range(STEPS):
            (head(rank, world) * world).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(state(head))
    close(found[1], found[0], 1e-10)


class Head(nn.Module):
    """Something trained before a head, and the loss of this rank's share of six sequences."""

    def __init__(self, problem: Any) -> None:
        super().__init__()
        self.problem = problem
        self.weight = nn.Parameter(problem.weight.clone())
        self.scale = nn.Parameter(torch.ones(problem.hidden.shape[1], dtype=F64))

    def forward(self, rank: int, world: int) -> Tensor:
        rows = slice(24 * rank // world, 24 * (rank + 1) // world)
        lengths = torch.tensor([5, 1, 6, 2, 7, 3]).chunk(world)[rank]
        seq = lk.Sequences.from_lengths(lengths)
        hidden = self.problem.hidden[rows] * self.scale
        return lk.linear_loss(
            lk.objectives.nll, hidden, self.weight, self.problem.labels[rows],
            seq.with_totals(num_sequences=6, num_tokens=24),
        )  # fmt: skip


@scenario(2)
def tensor_parallel_by_transformers() -> None:
    """Its plan leaves the head a DTensor in uneven shards; its hooks and ours do not add up."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    alone = lk.fuse_lm_head(build(False))
    if dist.get_rank() == 0:
        alone.save_pretrained(folder[0])
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(folder[0], tp_plan="auto", dtype=F64)
    assert model.lm_head.weight.to_local().shape[0] in (VOCAB // 2, VOCAB - VOCAB // 2)
    lk.fuse_lm_head(model)
    found = []
    for m in (model, alone):
        loss = in_two_steps(m, update(0), (ROWS, 1)) + fused(m, update(3), (ROWS, 1))
        loss.backward()
        found.append({"loss": loss, **state(m, lambda p: p.grad)})
    close(*found, 1e-10)
    spoilt(lk.fuse_lm_head(model))
    raises(lambda: fused(model, update(0), (ROWS, 1)), "head's output differs from x W^T")


# --- PEFT -----------------------------------------------------------------------------------------


def adapted(target_modules: list[str]) -> Any:
    """LoRA whose B is not zero; all else is frozen."""
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, target_modules=target_modules, init_lora_weights=False)
    return peft.get_peft_model(build(False), config).to(F64)


@scenario(2)
def lora() -> None:
    """Adapters in the body and on the head, under DDP and FSDP2."""
    for targets in (["q_proj", "v_proj"], ["q_proj", "lm_head"]):
        alone = lk.fuse_lm_head(adapted(targets))
        start = {k: v.clone() for k, v in state(alone).items()}
        train(alone, range(STEPS))
        want = state(alone)
        for name, p in alone.named_parameters():
            assert p.requires_grad != torch.equal(want[name], start[name]), name
        model = DistributedDataParallel(lk.fuse_lm_head(adapted(targets)))
        train(model, range(STEPS), **ranks())
        equal(model, want)
        for own_head in (True, False):
            model = adapted(targets)
            shard(model.get_base_model(), everyone(), own_head=own_head)
            fully_shard(model, mesh=everyone())
            train(lk.fuse_lm_head(model), range(STEPS), **ranks())
            equal(model, want)


# --- the comparison with the model's own logits ---------------------------------------------------


def spoilt(model: Any) -> Any:
    """Its head's output is not x W^T."""
    model.lm_head.register_forward_hook(lambda head, inputs, out: out * 1.01)
    return model


def refused_at_the_first_call(model: Any, wrapped: Any = None) -> None:
    """Fused without a word, as its weights are in shards; each scoring call refuses it then."""
    rows = {k: t.chunk(dist.get_world_size())[dist.get_rank()] for k, t in update(0).items()}
    for _ in range(2):
        raises(lambda: fused(wrapped or model, rows, (ROWS, 1)), "head's output differs from x W^T")
    logits = model(rows["input_ids"]).logits  # without completion_mask it is what it was
    assert logits.shape == (ROWS // dist.get_world_size(), LENGTH, VOCAB)


@scenario(2)
def fsdp2_checks_at_the_first_call() -> None:
    """The head in a unit of its own, in the root's, tied; sharded before and after fusing, with
    values or on the meta device."""
    for tied, own_head in ((False, True), (True, False), (False, False)):
        model = spoilt(shard(build(tied), everyone(), own_head=own_head))
        refused_at_the_first_call(lk.fuse_lm_head(model))
    for fused_first in (False, True):
        with torch.device("meta"):
            model = LlamaForCausalLM(build(False).config).to(F64)
        if fused_first:
            lk.fuse_lm_head(model)
        shard(model, everyone(), own_head=True)
        if not fused_first:
            lk.fuse_lm_head(model)
        model.to_empty(device="cpu")
        filled(model)
        rows = {k: t.chunk(2)[dist.get_rank()] for k, t in update(0).items()}
        assert fused(model, rows, (ROWS, 1)).isfinite()
        refused_at_the_first_call(spoilt(lk.fuse_lm_head(model)))
    # One that was compared before it was sharded is compared again: other ranks may not have been.
    refused_at_the_first_call(spoilt(shard(lk.fuse_lm_head(build()), everyone())))


def filled(model: Any) -> None:
    """The values of a model that was on the meta device."""
    source = build(False)
    values = dict(source.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(distribute_tensor(values[name], p.device_mesh, p.placements))
    model.model.rotary_emb = source.model.rotary_emb


# --- torch.compile --------------------------------------------------------------------------------


@scenario(2)
def compiled() -> None:
    """The head's two calls traced whole, under DDP and as a unit of FSDP2."""
    for loss in (head_loss, head_logprobs):
        want = compiled_run(loss, lambda m: m, compile_it=False)
        for wrap in (DistributedDataParallel, lambda m: fully_shard(m, mesh=everyone())):
            close(compiled_run(loss, wrap, compile_it=True), want, 1e-10)


def head_loss(hidden: Tensor, weight: Tensor, labels: Tensor, seq: lk.Sequences) -> Tensor:
    return lk.linear_loss(lk.objectives.nll, hidden, weight, labels, seq)


def head_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, seq: lk.Sequences) -> Tensor:
    out = lk.linear_logprob(hidden, weight, labels)
    return -(out.logps + 0.1 * out.lse).sum() / seq.total_sequences


class Compiled(nn.Module):
    def __init__(self, problem: Any, call: Any) -> None:
        super().__init__()
        self.problem, self.call = problem, call
        self.linear = nn.Linear(16, 41, bias=False, dtype=F64)
        self.linear.weight.data.copy_(problem.weight)

    def forward(self, which: Tensor, seq: lk.Sequences) -> Tensor:
        p = self.problem
        return self.call(p.hidden[which], self.linear.weight, p.labels[which], seq)


def compiled_run(loss: Any, wrap: Any, *, compile_it: bool) -> dict[str, Tensor]:
    call = torch.compile(loss, backend="aot_eager", fullgraph=True) if compile_it else loss
    model = wrap(Compiled(peaky(24, 16, 41, dtype=F64), call))
    rank, world = (dist.get_rank(), dist.get_world_size()) if compile_it else (0, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        lengths = torch.tensor([3 + step % 3, 1, 4, 0, 2, 5])
        seq = lk.Sequences.from_lengths(lengths.chunk(world)[rank]).with_totals(num_sequences=6)
        which = torch.randperm(24, generator=torch.Generator().manual_seed(step))[: lengths.sum()]
        own = which.split([int(c.sum()) for c in lengths.chunk(world)])[rank]
        (model(own, seq) * world).backward()
        optimizer.step()
        optimizer.zero_grad()
    return state(model)


# --- ZeRO-3 ---------------------------------------------------------------------------------------


def zero3_config() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "gradient_clipping": 0.0,  # 1.0 where nothing is said
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


@scenario(*((2,) if find_spec("deepspeed") else ()))
def zero3() -> None:
    """In float32, the widest that it takes; fused before, after, or partitioned from birth."""
    import deepspeed

    config = zero3_config()
    for tied, moments in ((True, ["born"]), (False, ["before", "after"])):
        want = moved_alone(build(tied).float())
        for moment in moments:
            model = build(tied).float()
            if moment == "before":
                lk.fuse_lm_head(model)
            elif moment == "born":
                deepspeed.zero.Init(module=model, config_dict_or_path=config)
                lk.fuse_lm_head(model)
            moved_by_zero3(model, want)


def moved_alone(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Where the training of one process starts, and how far each trained parameter goes."""
    lk.fuse_lm_head(model)
    start = {k: v.clone() for k, v in state(model).items()}
    train(model, range(STEPS), optimizer=torch.optim.SGD(model.parameters(), lr=1e-3))
    return start, {k: v - start[k] for k, v in state(model).items()}


def moved_by_zero3(model: Any, want: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    import deepspeed

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero3_config())
    assert not any(p.numel() for p in engine.module.parameters())
    lk.fuse_lm_head(engine.module)
    for step in range(STEPS):
        whole = update(step)
        totals = ROWS, int(whole["completion_mask"].sum())
        rows = {k: t.chunk(engine.world_size)[dist.get_rank()] for k, t in whole.items()}
        engine.backward(fused(engine, rows, totals) * engine.world_size)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        moved = {k: v - want[0][k] for k, v in state(engine.module).items()}
    close(moved, want[1], 1e-3)
    engine.destroy()


@scenario(*((2,) if find_spec("deepspeed") else ()))
def zero3_lora() -> None:
    for targets in (["q_proj", "v_proj"], ["q_proj", "lm_head"]):
        moved_by_zero3(adapted(targets).float(), moved_alone(adapted(targets).float()))


@scenario(*((2,) if find_spec("deepspeed") else ()))
def zero3_checks_at_the_first_call() -> None:
    """Fused partitioned from birth, before and after the engine; a right model is not refused."""
    import deepspeed

    for moment in ("born", "before", "after"):
        model = build(False).float()
        if moment == "born":
            deepspeed.zero.Init(module=model, config_dict_or_path=zero3_config())
        if moment != "after":
            lk.fuse_lm_head(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero3_config())
        rows = {k: t.chunk(2)[dist.get_rank()] for k, t in update(0).items()}
        if moment == "after":
            lk.fuse_lm_head(model)
            assert fused(engine, rows, (ROWS, 1)).isfinite()
            lk.fuse_lm_head(model)
        refused_at_the_first_call(spoilt(model), engine)
        engine.destroy()
