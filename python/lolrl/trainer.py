"""`LoLTrainer`: `transformers.Trainer` with a fused offline-RL objective.

The loss is computed inside the model's own forward (`lolkernels.fuse_lm_head`), so whatever wraps
the module sees one ordinary forward. What is here: which rows, which denominators, what is logged,
when to stop. What is not: distribution, mixed precision, optimisers and schedules, which are the
base class's.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback

import lolkernels as lk
from lolrl.annotate import RewardFuncs
from lolrl.checkpoints import CheckpointError, last_complete, read_state
from lolrl.collate import MODEL_INPUTS, LoLCollator, PackingCollator
from lolrl.config import LoLConfig, dump_config
from lolrl.data import Record
from lolrl.gate import StepZeroError, check_step_zero, switch_off_dropout
from lolrl.metrics import JsonLinesCallback, Meter
from lolrl.prepare import (
    check_columns,
    check_groups,
    check_reward_funcs,
    evaluation_rows,
    objective_options,
    resolve_auto,
    resolve_objective,
    training_rows,
    warn_of_negative_rewards,
    wrap_peft,
)
from lolrl.sampler import UpdateSampler
from lolrl.saving import SavingTrainer
from lolrl.tokens import LoLDataset, model_eos_ids
from lolrl.validation import generated_rewards, row_losses

__all__ = ["LoLTrainer", "StepZeroError", "sft", "train"]

MAX_SKIPPED_IN_A_ROW = 5


class _StepCallback(TrainerCallback):
    """Runs the step-0 gate once the model is wrapped, and keeps sampler and meter in step."""

    def __init__(self, trainer: LoLTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # accelerate does not reach a sampler behind both of its wrappers (sharding and skipping),
        # which is where it is after a resume on several ranks.
        batches = len(kwargs["train_dataloader"])
        updates = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
        assert self.trainer._sampler is not None
        self.trainer._sampler.set_epoch(state.global_step // updates)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._meter.begin_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._meter.end_update()


class LoLTrainer(SavingTrainer):
    """Train a causal LM on fixed data with an offline-RL objective.

    The order of the arguments is TRL's.

    Args:
        model: a causal LM, or the path of one (loaded from disk).
        ref_model: the frozen reference, used once to score rows without `ref_logps`. None: the
            policy as it is before training.
        args: a `LoLConfig`.
        data_collator: default `LoLCollator`, or with `args.packing` `PackingCollator`.
        train_dataset: an annotated `LoLDataset`, or anything `read_records` takes.
        eval_dataset: rows with at least `prompt`.
        processing_class: the tokenizer.
        compute_metrics: called with an `EvalPrediction` of (completions, rewards, inputs=prompts).
        callbacks, optimizers: as in `Trainer`.
        peft_config: wraps the model with `peft.get_peft_model`.
        reward_funcs: `f(prompts, completions, **columns) -> list[float]`, one or several; scores
            the responses generated in evaluation, weighted by `args.reward_func_weights`.
        objective: a callable in place of `args.objective` (see `lolkernels.side_inputs`).

    Raises:
        ValueError: naming the argument; among others for rows that lack what the objective needs.
    """

    # `compute_loss` divides by the counts of the whole update.
    loss_is_scaled_for_ga = True
    # Whether reward functions see the messages of conversational rows, or the last one's text.
    reward_messages = False

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: LoLConfig | None = None,
        data_collator: Callable[..., dict[str, Tensor]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        reward_funcs: RewardFuncs | None = None,
        objective: Callable[..., Tensor] | None = None,
    ) -> None:
        args = LoLConfig(output_dir="lolrl_output") if args is None else args
        if not isinstance(args, LoLConfig):
            raise TypeError(f"args is a {type(args).__name__}; give a LoLConfig")
        if processing_class is None:
            raise ValueError("processing_class is missing; give the tokenizer of the model")
        check_reward_funcs(reward_funcs, args)
        if args.n_gpu > 1:
            raise ValueError(
                f"args sees {args.n_gpu} GPUs from one process, and batches split behind the loss "
                "have wrong means; start with torchrun or accelerate launch, or show it one GPU"
            )
        args = copy.copy(args)
        if isinstance(model, (str, os.PathLike)):
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(model)
        if peft_config is not None:
            model = wrap_peft(model, peft_config, args)
        if args.disable_dropout:
            switch_off_dropout(model)
        lk.fuse_lm_head(model, backend=args.backend, memory_budget=args.memory_budget)

        self.objective_name, self.objective = resolve_objective(args, objective)
        self.needed = dict(lk.side_inputs(self.objective))
        self.options = objective_options(args, self.needed, self.objective_name)
        self.reward_funcs = reward_funcs
        self.tokenizer = processing_class
        resolve_auto(args, self.objective, self.options, has_rewards=reward_funcs is not None)
        if data_collator is None:
            check_columns(self.needed, self.objective_name)
        self.train_report: dict[str, Any] = {}
        if train_dataset is not None:
            train_dataset, self.train_report = training_rows(
                model,
                ref_model,
                processing_class,
                train_dataset,
                args,
                self.needed,
                self.objective_name,
            )
            check_groups(train_dataset, args)
            warn_of_negative_rewards(self.objective, self.needed, self.options, train_dataset)
        self.eval_records: list[Record] = []
        self.eval_rows: LoLDataset | None = None
        if eval_dataset is not None:
            self._set_evaluation(model, eval_dataset, args)
        pad = processing_class.pad_token_id
        if pad is None:
            pad = processing_class.eos_token_id or 0
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator
            or (PackingCollator() if args.packing else LoLCollator(pad)),
            train_dataset=train_dataset,
            eval_dataset=self.eval_records or None,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=[*(callbacks or []), JsonLinesCallback(args.output_dir)],
            optimizers=optimizers,
        )
        self.add_callback(_StepCallback(self))
        # Older versions of transformers read this in place of loss_is_scaled_for_ga.
        self.model_accepts_loss_kwargs = True
        self._totals: tuple[float, float] | None = None
        self._skipped_in_a_row = 0
        self._resumed: dict[str, Any] | None = None
        self._sampler: UpdateSampler | None = None
        self._meter = Meter(self.args.device)
        self.step0: dict[str, float] | None = None
        self.summary: dict[str, Any] = {}
        if self.is_world_process_zero():
            dump_config(args, Path(args.output_dir) / "config.yaml")

    def _get_train_sampler(self, train_dataset: Any = None) -> UpdateSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        assert isinstance(dataset, LoLDataset)
        args = self.args
        weights = None
        if args.sampling == "advantage":
            assert dataset.advantages is not None
            weights = dataset.advantages.clamp(min=0)
        update = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._sampler = UpdateSampler(
            weights,
            len(dataset),
            update_batch_size=update,
            seed=args.seed if args.data_seed is None else args.data_seed,
            lengths=dataset.lengths,
            group_size=args.group_size,
        )
        return self._sampler

    # --- one step ---

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of one update, and the number of sequences that all of them hold."""
        if self._resumed is not None and self.state.global_step >= self.state.max_steps:
            # Behind the last update: Trainer looks whether it is done after an update only.
            self.control.should_training_stop = True
            return [], None
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        if not batches:
            return batches, None
        # A row without completion tokens is in no numerator, so it is in no denominator.
        lengths = [
            lk.Sequences.from_mask(b["completion_mask"], cu_seqlens=b.get("cu_seqlens")).lengths
            for b in batches
        ]
        counts = torch.stack([torch.stack([n.count_nonzero(), n.sum()]) for n in lengths]).sum(0)
        counts = self.accelerator.gather(counts.to(device)[None]).reshape(-1, 2).sum(0)
        sequences, tokens = counts.tolist()
        self._totals = (float(sequences), float(tokens))
        return batches, counts[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """sum over this micro-batch's sequences / (sequences of the update), all ranks included."""
        given = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        side = {name: inputs[name] for name in self.needed if name in inputs}
        totals = self._totals if num_items_in_batch is not None else None
        out = model(
            **given,
            **side,
            **self.options,
            objective=self.objective,
            reduction=self.args.reduction,
            totals=totals,
            temperature=self.args.temperature,
            **({"group_size": self.args.group_size} if self.args.group_size > 1 else {}),
        )
        # Data parallelism averages gradients over ranks; the totals are sums over ranks.
        loss = out.loss * self.accelerator.num_processes if totals is not None else out.loss
        if model.training:
            self._meter.add(out._replace(loss=loss), inputs)
        return (loss, out) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm; an update whose gradient is not finite is left out and counted."""
        norm = super()._get_grad_norm(model, grad_norm)
        value = float(norm)
        if math.isfinite(value):
            self._skipped_in_a_row = 0
            return norm
        for parameter in model.parameters():
            parameter.grad = None
        self._meter.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise RuntimeError(
                f"the gradient was {value} in {self._skipped_in_a_row} updates in a row, the last "
                f"at step {self.state.global_step}; lower the learning rate, or check the data "
                "and the weights"
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the meter's figures to a training line, and hand it on."""
        if "loss" in logs and "train_runtime" not in logs:
            logs.update(self._meter.pop(self.accelerator.gather))
        super().log(logs, start_time)

    # --- start, resume, checkpoints ---

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint=True` goes on from the last complete checkpoint.

        Raises:
            StepZeroError: the step-0 gate.
            CheckpointError: the checkpoint is incomplete, damaged, or of other data, seed or batch.
        """
        self._resumed = None
        self._meter = Meter(self.args.device)
        if resume_from_checkpoint:
            folder = (
                last_complete(self.args.output_dir)
                if resume_from_checkpoint is True
                else Path(resume_from_checkpoint)
            )
            self._resumed = read_state(folder)
            resume_from_checkpoint = str(folder)
        output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        if self.args.save_best_and_last:
            self._save_named("last")
        self.summary = {
            "objective": self.objective_name,
            "updates": self.state.global_step,
            **self.train_report,
            "train_loss": output.training_loss,
            "train_runtime": output.metrics.get("train_runtime"),
            "skipped_steps": self._meter.skipped_steps,
            "num_tokens": self._meter.num_tokens,
            "best_metric": self.state.best_metric,
            "best_step": self.state.best_global_step,
            "step0": self.step0,
        }
        return output

    def _begin(self) -> None:
        """Once model and optimiser are ready: take up the checkpoint's state, or pass the gate."""
        assert self._sampler is not None
        if self._resumed is not None:
            stored, mine = self._resumed.get("sampler", {}), self._sampler.fingerprint()
            wrong = sorted(k for k in {*stored, *mine} if stored.get(k) != mine.get(k))
            if wrong:
                raise CheckpointError(
                    f"the checkpoint drew other rows: {', '.join(wrong)} differ; resume with the "
                    "data, seed and batch size it was made with, or train from the start"
                )
            self._meter.load(self._resumed.get("meter", {}), main=self.is_world_process_zero())
            self._skipped_in_a_row = int(self._resumed.get("skipped_in_a_row", 0))
            return
        if self.args.step0_gate and "ref_logps" in self.needed:
            self.step0 = check_step_zero(
                self.model_wrapped,
                self.train_dataset,
                self.data_collator,
                tokenizer=self.tokenizer,
                config=self.args,
                eos_ids=model_eos_ids(self.model),
            )

    # --- evaluation ---

    def _set_evaluation(self, model: Any, data: Any, args: LoLConfig) -> None:
        self.eval_records, self.eval_rows = evaluation_rows(
            model, self.tokenizer, data, args, has_rewards=self.reward_funcs is not None
        )

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean reward of generated responses, and likelihood of the rows' own completions.

        With reward functions: `reward`, `reward_std` and `length` (words) of one response a prompt.
        With completions in the rows: `nll` (nats per completion token), and `loss`, the objective's
        mean over rows, where they have its side inputs. Nothing is drawn from the global generator.
        """
        if eval_dataset is not None:
            self._set_evaluation(self.model, eval_dataset, self.args)
        metrics: dict[str, float] = {}
        if self.reward_funcs is not None and self.eval_records:
            metrics = generated_rewards(
                self.model,
                self.processing_class,
                self.eval_records,
                self.reward_funcs,
                self.args,
                self.compute_metrics,
                messages=self.reward_messages,
            )
        if self.eval_rows is not None:
            metrics |= row_losses(
                self.model,
                self.eval_rows,
                self.data_collator,
                self.args,
                self.objective,
                self.needed,
                self.options,
            )
        if not metrics:
            raise ValueError("eval_dataset is missing; give rows with prompts")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def train(
    model: Any,
    tokenizer: Any,
    data: Any,
    args: LoLConfig,
    *,
    eval_data: Any = None,
    ref_model: Any = None,
    reward_funcs: RewardFuncs | None = None,
    objective: Callable[..., Tensor] | None = None,
    peft_config: Any = None,
    callbacks: Sequence[TrainerCallback] | None = None,
    resume_from_checkpoint: str | bool | None = None,
) -> LoLTrainer:
    """The `train` stage: build a `LoLTrainer`, run it, and return it (see its `summary`)."""
    trainer = LoLTrainer(
        model,
        ref_model,
        args,
        train_dataset=data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        callbacks=list(callbacks or []),
        peft_config=peft_config,
        reward_funcs=reward_funcs,
        objective=objective,
    )
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


def sft(
    model: Any,
    tokenizer: Any,
    data: Any,
    args: LoLConfig,
    *,
    eval_data: Any = None,
    reward_funcs: RewardFuncs | None = None,
    peft_config: Any = None,
    callbacks: Sequence[TrainerCallback] | None = None,
    resume_from_checkpoint: str | bool | None = None,
) -> LoLTrainer:
    """The `sft` stage: fit the reference policy by negative log-likelihood.

    The same trainer with objective `nll`, uniform sampling, every row, and no reference.
    """
    args = copy.copy(args)
    args.objective, args.sampling, args.advantage_filter = "nll", "uniform", "none"
    args.clip = args.beta = args.floor = "auto"
    args.objective_args, args.group_size = None, 1
    return train(
        model,
        tokenizer,
        data,
        args,
        eval_data=eval_data,
        reward_funcs=reward_funcs,
        peft_config=peft_config,
        callbacks=callbacks,
        resume_from_checkpoint=resume_from_checkpoint,
    )
