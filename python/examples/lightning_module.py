"""A-LoL under Lightning: the loss is made inside the model's forward, so nothing else changes.

python python/examples/lightning_module.py
"""

from typing import Any

import lightning
import torch
from hand_loop import eager_loss, make_batch, make_model
from torch.utils.data import DataLoader

import lolkernels as lk


class ALoL(lightning.LightningModule):
    """Any causal LM and any objective; the batch holds what both take, by name."""

    def __init__(self, model: Any, lr: float = 3e-3, **options: Any) -> None:
        super().__init__()
        self.model = lk.fuse_lm_head(model)
        self.lr, self.options = lr, {"objective": lk.objectives.a_lol, **options}

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        out = self.model(**batch, **self.options)
        # nan in the rows that were skipped because their weight is zero
        self.log("log_ratio", out.metrics["log_ratio"].nanmean())
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main() -> None:
    module = ALoL(make_model(), clip=0.9)
    batch = make_batch(module.model)
    first = module.model(**batch, **module.options).loss
    torch.testing.assert_close(first, eager_loss(module.model, batch))
    trainer = lightning.Trainer(
        max_epochs=20,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([batch], batch_size=None))
    log_ratio = trainer.callback_metrics["log_ratio"]
    print(f"log-ratio of the completions with a positive advantage: {log_ratio:.3f}")
    assert log_ratio > 1.0


if __name__ == "__main__":
    main()
