"""One rank of test_ranks.py: trains the toy policy and writes what it ended with."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from lolrl.annotate import annotate
from lolrl.cli import leave
from lolrl.config import AnnotateConfig
from lolrl.trainer import LoLTrainer
from tests.lolrl.toys import make_config, make_llama, make_rows, make_tokenizer


def shard_on_a_cpu() -> None:
    """accelerate drops FSDP without a word where there is no accelerator: it is told of it here."""
    began = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        began(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def main(folder: Path, size: int, steps: int, resume: str | None) -> None:
    torch.set_num_threads(1)
    zero = "ACCELERATE_USE_DEEPSPEED" in os.environ  # which has no float64
    dtype = torch.float32 if zero else torch.float64
    fsdp = "ACCELERATE_USE_FSDP" in os.environ
    if fsdp:
        shard_on_a_cpu()
    tokenizer = make_tokenizer()
    reference = make_llama(len(tokenizer), dtype=dtype)
    rows = annotate(
        reference, tokenizer, make_rows(24), config=AnnotateConfig(keep="all"), progress=False
    ).dataset
    trainer = LoLTrainer(
        make_llama(len(tokenizer), dtype=dtype),
        args=make_config(
            folder,
            objective="a_lol",
            sampling="uniform",
            advantage_filter="none",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=8,
            logging_steps=3,
            save_strategy="steps",
            save_steps=4,
            save_best_and_last=True,
            learning_rate=3e-3,
            ddp_backend="gloo" if "RANK" in os.environ else None,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    rank = trainer.args.process_index
    gathered: Any = contextlib.nullcontext()
    if zero:
        import deepspeed

        assert not any(p.numel() for p in trainer.model.parameters())
        gathered = deepspeed.zero.GatheredParameters(list(trainer.model.parameters()))
    parameters = dict(trainer.model.named_parameters())
    assert not fsdp or all(isinstance(p, DTensor) for p in parameters.values())
    with gathered:
        whole = {n: p.full_tensor() if fsdp else p for n, p in parameters.items()}
        state = {n: p.detach().contiguous() for n, p in whole.items()}
        save_file(state, folder / f"rank{rank}.safetensors")
    lines = [x for x in trainer.state.log_history if "ratio/mean" in x]
    (folder / f"rank{rank}.json").write_text(json.dumps(lines))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *(sys.argv[4:] or [None]))
