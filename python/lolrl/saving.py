"""How `LoLTrainer` saves and loads: checkpoints with a manifest, without pickle; whole models."""

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
from lolrl.states import load_state, random_state, save_state, set_random_state

OPTIMIZER, SCHEDULER, SCALER = (
    f"{name}.safetensors" for name in ("optimizer", "scheduler", "scaler")
)


class SavingTrainer(Trainer):
    """The saving half of `LoLTrainer`: safetensors, JSON and YAML only.

    Sharded optimisers (FSDP, DeepSpeed) keep the formats of those libraries.
    """

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
        meter = self._meter.state(self.accelerator.gather)
        # Every rank's files are on the disk before the manifest vouches for them.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            assert self._sampler is not None
            write_json(
                folder / STATE,
                {
                    "step": self.state.global_step,
                    "sampler": self._sampler.fingerprint(),
                    "meter": meter,
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

    @property
    def _plain(self) -> bool:
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._plain:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            save_state(Path(output_dir) / OPTIMIZER, self.optimizer.state_dict())
            save_state(Path(output_dir) / SCHEDULER, self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._plain:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif (Path(checkpoint) / OPTIMIZER).exists():
            self.optimizer.load_state_dict(load_state(Path(checkpoint) / OPTIMIZER))
            self.lr_scheduler.load_state_dict(load_state(Path(checkpoint) / SCHEDULER))

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            save_state(Path(output_dir) / SCALER, scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint and scaler is not None and (Path(checkpoint) / SCALER).exists():
            scaler.load_state_dict(load_state(Path(checkpoint) / SCALER))

    def _rng_file(self, folder: str) -> Path:
        return Path(folder) / f"rng_state_{self.args.process_index}.safetensors"

    def _save_rng_state(self, output_dir: str) -> None:
        save_state(self._rng_file(output_dir), random_state())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._rng_file(checkpoint).exists():
            set_random_state(load_state(self._rng_file(checkpoint)))

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
        if self.is_fsdp_enabled:
            # The base class writes no model where checkpoints are in shards, FSDP2's default.
            self._save(str(fresh), self.accelerator.get_state_dict(self.model))
        else:
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
