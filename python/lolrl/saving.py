"""How `LoLTrainer` saves: checkpoints with a manifest, and the best and last model whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from lolrl.checkpoints import STATE, write_manifest
from lolrl.config import LoLConfig, dump_config
from lolrl.files import write_json
from lolrl.metrics import Meter
from lolrl.sampler import UpdateSampler


class SavingTrainer(Trainer):
    """The saving half of `LoLTrainer`. Nothing of its own is pickled."""

    args: LoLConfig
    _sampler: UpdateSampler | None
    _meter: Meter
    _skipped_in_a_row: int

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        run_dir = self._get_output_dir(trial=trial)
        folder = Path(run_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            assert self._sampler is not None
            write_json(
                folder / STATE,
                {
                    "step": self.state.global_step,
                    "sampler": self._sampler.fingerprint(),
                    "meter": self._meter.state(),
                    "skipped_in_a_row": self._skipped_in_a_row,
                },
            )
            write_manifest(folder)
            # Older checkpoints go only when this one is known to be whole.
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Model (safetensors), tokenizer, configuration (YAML); the base class pickles the last."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(folder, state_dict=state_dict)
        self.processing_class.save_pretrained(folder)
        dump_config(self.args, folder / "config.yaml")

    def _save_named(self, name: str) -> None:
        """Save the model in `output_dir/name`; a reader finds the old folder or the new, whole."""
        folder = Path(self.args.output_dir) / name
        fresh, old = folder.with_name(f".{name}.new"), folder.with_name(f".{name}.old")
        if self.args.should_save:
            shutil.rmtree(fresh, ignore_errors=True)
        self.save_model(str(fresh), _internal_call=True)
        if self.args.should_save:
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            fresh.rename(folder)
            shutil.rmtree(old, ignore_errors=True)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = super()._determine_best_metric(metrics, trial)
        if best and self.args.save_best_and_last:
            self._save_named("best")
        return best

    @property
    def last_model_dir(self) -> Path:
        """Folder of the model at the end of training."""
        return Path(self.args.output_dir) / "last"

    @property
    def best_model_dir(self) -> Path:
        """Folder of the model of the best evaluation; the last one's where there was none."""
        best = Path(self.args.output_dir) / "best"
        return best if self.state.best_metric is not None and best.is_dir() else self.last_model_dir
