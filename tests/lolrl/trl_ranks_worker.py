"""One rank of test_ranks.py: TRL's trainers on the toy policy, and what each ended with."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import trl
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import lolkernels as lk
from lolrl.cli import leave
from lolrl.trl import use_lolkernels
from tests.lolrl.ranks_worker import shard_on_a_cpu
from tests.lolrl.toys import make_llama, make_rows, make_tokenizer

STEPS = 8
ROWS = 4  # of an update, over all ranks
ZERO3 = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_force_ds_cpu_optimizer": False,
}
FSDP2 = {
    "fsdp_version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "reshard_after_forward": True,
}
ENGINES: dict[str, dict[str, Any]] = {
    "one": {},
    "ddp": {"ddp_backend": "gloo"},
    "fsdp2": {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": FSDP2},
    "zero3": {"deepspeed": ZERO3},
}
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    others = rows[1:] + rows[:1]
    return [
        {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
        for a, b in zip(rows, others, strict=True)
    ]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Nothing tells accelerate of the other ranks."""
    hidden = {name: os.environ.pop(name) for name in TORCHRUN}
    yield
    os.environ.update(hidden)


def train(folder: Path, rank: int, method: str, engine: str) -> None:
    """Trains for some steps, and writes the whole parameters and the lines of the log."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]  # an engine leaves them to the next
    dtype = torch.float32 if engine == "zero3" else torch.float64  # the widest that it takes
    tokenizer = make_tokenizer()
    rows = [{k: row[k] for k in ("prompt", "completion")} for row in make_rows(24)]
    given: dict[str, Any] = {}
    if method == "dpo":
        rows = pairs(rows)
        given["ref_model"] = make_llama(len(tokenizer), dtype=dtype)
    if method == "lora":
        given["peft_config"] = peft.LoraConfig(**LORA)
    trainer, config = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "lora": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
    }[method]
    world = 1 if engine == "one" else int(os.environ["WORLD_SIZE"])
    made = trainer(
        model=make_llama(len(tokenizer), dtype=dtype),
        args=config(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            per_device_train_batch_size=ROWS // world,
            learning_rate=3e-3,
            adam_epsilon=1e-5,  # else gradients that are rounding alone move weights
            logging_steps=1,
            save_strategy="no",
            max_steps=STEPS,
            seed=0,
            **ENGINES[engine],
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **given,
    )
    made.train()
    assert made.accelerator.num_processes == world
    model = made.accelerator.unwrap_model(made.model)
    parameters = dict(model.named_parameters())
    sharded = {
        "zero3": lambda p: p.numel() == 0,
        "fsdp2": lambda p: isinstance(p, DTensor),
    }.get(engine)
    assert sharded is None or all(map(sharded, parameters.values()))
    gathered: Any = contextlib.nullcontext()
    if engine == "zero3":
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(parameters.values()))
    with gathered:
        whole = {n: p.full_tensor() if engine == "fsdp2" else p for n, p in parameters.items()}
        state = {n: p.detach().contiguous() for n, p in whole.items()}
        files = folder / f"{method}-{engine}"
        files.mkdir(exist_ok=True)
        save_file(state, files / f"rank{rank}.safetensors")
    lines = [line for line in made.state.log_history if "grad_norm" in line]
    (files / f"rank{rank}.json").write_text(json.dumps(lines))


def main(folder: Path, *cases: str) -> None:
    torch.set_num_threads(1)
    shard_on_a_cpu()
    rows, own, rank = 0, lk.linear_logprob, int(os.environ["RANK"])

    def counted(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal rows
        rows += len(hidden)
        return own(hidden, *args, **kwargs)

    lk.linear_logprob = counted
    with use_lolkernels():
        for case in cases:
            before = rows
            method, engine = case.split("-")
            with alone() if engine == "one" else contextlib.nullcontext():
                train(folder, rank, method, engine)
            assert rows > before, "TRL's own kernel ran"
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
