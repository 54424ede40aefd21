"""A run that test_crash.py kills: trains the toy policy with a checkpoint after every update."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch

from lolrl.annotate import annotate
from lolrl.checkpoints import CheckpointError, last_complete
from lolrl.config import AnnotateConfig
from lolrl.trainer import LoLTrainer
from tests.lolrl.toys import make_config, make_llama, make_rows, make_tokenizer


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    config = AnnotateConfig(keep="all", cache_dir=str(folder / "cache"))
    model = make_llama(len(tokenizer))
    rows = annotate(model, tokenizer, make_rows(27), config=config, progress=False).dataset
    trainer = LoLTrainer(
        model,
        args=make_config(
            folder,
            max_steps=40,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            save_best_and_last=True,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    try:
        last_complete(folder)
        resume = True
    except CheckpointError:
        resume = False
    trainer.train(resume_from_checkpoint=resume)
    digest = hashlib.sha256()
    for _, parameter in sorted(trainer.model.named_parameters()):
        digest.update(parameter.detach().numpy().tobytes())
    print("DONE", digest.hexdigest(), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
