"""A-LoL with FSDP2 in a hand-written loop, on as many devices as torchrun starts processes.

    torchrun --nproc-per-node 2 python/examples/fsdp2.py
    torchrun --nproc-per-node 8 python/examples/fsdp2.py --model path/to/model --save out

Without a model a tiny one is made up; the rows are random tokens in either case: put yours in
``rows``. It runs on CPUs too.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lolkernels as lk

TINY = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, tie_word_embeddings=False,
)  # fmt: skip


def rows(vocab: int, device: str, size: int = 4, length: int = 24) -> dict[str, torch.Tensor]:
    """This rank's batch. Prompts have 8 tokens, completions up to 16."""
    ends = torch.randint(9, length + 1, (size, 1))
    at = torch.arange(length)
    batch = {
        "input_ids": torch.randint(vocab, (size, length)),
        "attention_mask": (at < ends).long(),
        "completion_mask": (at >= 8) & (at < ends),
        "advantages": torch.rand(size),  # reward - value; rows with <= 0 cost nothing
    }
    return {name: t.to(device) for name, t in batch.items()}


def shard(model: torch.nn.Module, device: str) -> torch.nn.Module:
    """Fused first, so that the head's results are compared with the model's own logits."""
    lk.fuse_lm_head(model)
    # What the objective gets must stay float32.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    options = {"mesh": init_device_mesh(device, (dist.get_world_size(),))}
    if device == "cuda":
        options["mp_policy"] = policy
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    for unit in (*model.model.layers, *([] if tied else [model.lm_head]), model):
        fully_shard(unit, **options)
    return model


def train(model: torch.nn.Module, steps: int, device: str) -> list[float]:
    """The mean ratio to the reference after each update."""
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(rank)
    vocab = model.config.vocab_size
    batches = [rows(vocab, device) for _ in range(4)]
    with torch.no_grad():  # the reference is the model before training: scored once
        for batch in batches:
            inputs = {k: t for k, t in batch.items() if k != "advantages"}
            batch["ref_logps"] = model(**inputs).logps
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ratios = []
    for step in range(steps):
        batch = batches[step % len(batches)]
        # Denominators of the whole update, or ranks with short rows would weigh more.
        mask = batch["completion_mask"]
        counts = torch.tensor([mask.shape[0], int(mask.sum())], device=device)
        dist.all_reduce(counts)
        out = model(**batch, objective=lk.objectives.a_lol, totals=tuple(counts.tolist()))
        (out.loss * world).backward()  # FSDP averages over ranks; the loss is a part of a sum
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        figures = torch.stack([out.loss.detach(), out.metrics["log_ratio"].exp().mean() / world])
        dist.all_reduce(figures)
        loss, ratio = figures.tolist()
        ratios.append(ratio)
        if rank == 0:
            print(f"step {step}: loss {loss:.4f}, mean ratio {ratio:.3f}")
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a directory or hub name; without it a tiny model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save", help="a folder for a distributed checkpoint")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group()
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    torch.manual_seed(0)
    model = (
        AutoModelForCausalLM.from_pretrained(args.model) if args.model else LlamaForCausalLM(TINY)
    )
    model = shard(model.to(device, torch.float32), device)
    train(model, args.steps, device)
    if args.save:
        # Any number of ranks can load it again, with dcp.load.
        dcp.save({"model": get_state_dict(model, [])[0]}, checkpoint_id=args.save)
    dist.barrier()
    time.sleep(0.2)  # gloo's threads drop their tensors: while Python ends that would abort
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
