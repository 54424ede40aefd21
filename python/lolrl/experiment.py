"""One seed of the demo: reference, value head, advantages, every method, measured on test prompts.

Each step is a stage of lolrl that a user can call: `sft`, `fit_value_head`, `annotate`, `train`,
`evaluate`. Only the rows differ from a user's own.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

import lolkernels as lk
from lolrl.annotate import annotate, score_logps
from lolrl.collate import LoLCollator
from lolrl.config import AnnotateConfig, LoLConfig, ValueConfig
from lolrl.data import read_records
from lolrl.evaluate import EvalReport, evaluate, generate
from lolrl.files import write_jsonl
from lolrl.losscost import LossCost, compare_losses
from lolrl.moviedata import Splits
from lolrl.policies import load_policy, load_smollm2, lora
from lolrl.rewards import RidgeJudge, vader_reward
from lolrl.settings import DemoSettings
from lolrl.tiny import build_model, build_tokenizer
from lolrl.tokens import LoLDataset
from lolrl.trainer import LoLTrainer, sft, train
from lolrl.value import fit_value_head

REFERENCE = "sft"

Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One seed: table rows (the reference first), loss comparison, facts, logs and samples."""

    rows: list[Row]
    cost: LossCost
    facts: Row
    logs: dict[str, list[Row]]
    samples: dict[str, list[Row]]


class ProgressBar(TrainerCallback):
    """One bar a training on stderr, and none where that is no terminal."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.name, unit="update", disable=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


class Experiment:
    """The stages in order, sharing what later ones need. All artefacts go below `folder`."""

    def __init__(
        self,
        splits: Splits,
        settings: DemoSettings,
        folder: Path,
        *,
        seed: int,
        say: Callable[[str], None] = print,
    ) -> None:
        self.settings, self.folder, self.seed, self._say = settings, folder, seed, say
        self._start = time.perf_counter()
        self.splits = splits
        self.train_rows = splits.train[: settings.train_rows]
        self.rows: list[Row] = []
        self.logs: dict[str, list[Row]] = {}
        self.samples: dict[str, list[Row]] = {}
        self.facts: Row = {
            "seed": seed,
            "train_rows": len(self.train_rows),
            "threads": torch.get_num_threads(),
        }
        self.baseline: EvalReport | None = None
        self.curve_start: list[Row] = []

    def run(self) -> Outcome:
        """All stages, in order."""
        self.prepare()
        fitted = self.fit_reference()
        dataset = self.annotate()
        cost = self.loss_cost(dataset)
        self.measure(REFERENCE, self.reference, fitted, kept=1.0)
        for method in self.settings.methods:
            self.train_method(method, dataset)
        self.facts["seconds"] = time.perf_counter() - self._start
        return Outcome(self.rows, cost, self.facts, self.logs, self.samples)

    def _train(self, stage: Callable[..., LoLTrainer], *args: Any, **options: Any) -> LoLTrainer:
        """Run a training stage with a bar in place of its log lines, which metrics.jsonl keeps."""
        config: LoLConfig = args[-1]
        bar = ProgressBar(Path(str(config.output_dir)).name)
        with contextlib.redirect_stdout(io.StringIO()):
            return stage(*args, callbacks=[bar], **options)

    def _tell(self, text: str) -> None:
        self._say(f"[{time.perf_counter() - self._start:5.0f} s] {text}")

    def prepare(self) -> None:
        """Reward the training rows, write the splits, fit the judge."""
        texts = [row["completion"] for row in self.train_rows]
        rewards = vader_reward([row["prompt"] for row in self.train_rows], texts)
        self.train_rows = [
            row | {"reward": reward} for row, reward in zip(self.train_rows, rewards, strict=True)
        ]
        parts = (self.train_rows, self.splits.validation, self.splits.test)
        for name, rows in zip(("train", "validation", "test"), parts, strict=True):
            write_jsonl(self.folder / "data" / f"{name}.jsonl", rows)
        # The judge reads the whole training split, and no other; no policy learns from it.
        self.judge = RidgeJudge.fit(
            [row["prompt"] + row["completion"] for row in self.splits.train],
            [row["rating"] for row in self.splits.train],
            seed=self.seed,
        )
        self.facts["judge_r"] = self.judge.heldout_r
        self._tell(f"judge: correlation {self.judge.heldout_r:.2f} with held-out human ratings")

    def fit_reference(self) -> LoLTrainer:
        """Fine-tune the starting model on the training rows and freeze it."""
        settings = self.settings
        if settings.model == "smollm2":
            model, tokenizer = load_smollm2()
        else:
            tokenizer = build_tokenizer(
                [row["prompt"] + row["completion"] for row in self.train_rows],
                settings.vocab_size,
            )
            model = build_model(
                tokenizer, layers=settings.layers, width=settings.width, seed=self.seed
            )
        parameters = sum(p.numel() for p in model.parameters())
        self.facts["parameters"] = parameters
        self._tell(f"{REFERENCE}: {parameters / 1e6:.2f}M parameters, {len(self.train_rows)} rows")
        trainer = self._train(
            sft,
            model,
            tokenizer,
            self.train_rows,
            self.config(
                REFERENCE,
                objective="nll",
                num_train_epochs=settings.sft_epochs,
                gradient_accumulation_steps=settings.sft_batch // settings.micro_batch,
                learning_rate=settings.sft_learning_rate,
                lr_scheduler_type="cosine",
            ),
            peft_config=lora(settings.lora_rank),
        )
        # The methods start from files, as a user's would; an adapter is merged into the weights.
        merged = trainer.model.merge_and_unload() if settings.lora_rank else trainer.model
        self.reference_folder = self.folder / "reference"
        merged.save_pretrained(self.reference_folder)
        tokenizer.save_pretrained(self.reference_folder)
        self.reference, self.tokenizer = load_policy(self.reference_folder)
        self.reference.requires_grad_(False)
        held_out = LoLDataset.from_records(read_records(self.splits.validation), self.tokenizer)
        logps = score_logps(
            self.reference, held_out, pad_token_id=0, batch_size=settings.generation_batch
        )
        self.facts["reference_nll"] = -float(torch.cat(logps).mean())
        self._tell(
            f"{REFERENCE}: {self.facts['reference_nll']:.3f} nats per token on validation rows"
        )
        return trainer

    def annotate(self) -> LoLDataset:
        """Fit the value head on the reference's own answers, then score and value every row."""
        prompts = [row["prompt"] for row in self.splits.validation]
        answers = generate(self.reference, self.tokenizer, prompts, **self._sampling())
        self._tell(f"value head: {len(prompts)} validation prompts answered by the reference")
        rewards = vader_reward(prompts, answers)
        if self.settings.curve_prompts:
            watched = rewards[: self.settings.curve_prompts]
            self.curve_start = [{"step": 0, "eval_reward": statistics.fmean(watched)}]
        head, value_report = fit_value_head(
            self.reference,
            self.tokenizer,
            prompts,
            rewards,
            config=ValueConfig(seed=self.seed),
        )
        annotated = annotate(
            self.reference,
            self.tokenizer,
            self.train_rows,
            value_head=head,
            config=AnnotateConfig(keep="all", batch_size=self.settings.generation_batch),
            progress=False,
        )
        dataset: LoLDataset = annotated.dataset
        assert dataset.advantages is not None  # there is a value head
        self.positive = float((dataset.advantages > 0).double().mean())
        self.facts |= {"positive_share": self.positive, "value_head": asdict(value_report)}
        self._tell(f"annotate: {self.positive:.0%} of the rows have a positive advantage")
        return dataset

    def train_method(self, method: str, dataset: LoLDataset) -> None:
        """Train `method` from the reference for the given updates, and measure it."""
        settings = self.settings
        policy, _ = load_policy(self.reference_folder)
        watched = self.splits.validation[: settings.curve_prompts]
        curves = {}
        if settings.curve_prompts:
            steps = -(-settings.updates // settings.curve_points)
            curves = {"eval_strategy": "steps", "eval_steps": steps}
        trainer = self._train(
            train,
            policy,
            self.tokenizer,
            dataset,
            self.config(
                method,
                objective=method,
                max_steps=settings.updates,
                learning_rate=settings.learning_rate,
                **curves,
            ),
            eval_data=[{"prompt": row["prompt"]} for row in watched] if curves else None,
            reward_funcs=vader_reward if curves else None,
            peft_config=lora(settings.lora_rank),
        )
        filtered = lk.objectives.traits(lk.objectives.REGISTRY[method]).positive_only
        self.measure(method, trainer.model, trainer, kept=self.positive if filtered else 1.0)

    def measure(self, name: str, model: Any, trainer: LoLTrainer, *, kept: float) -> None:
        """Evaluate on the test prompts and add the table's row, the log and the samples."""
        report = evaluate(
            model,
            self.tokenizer,
            [row["prompt"] for row in self.splits.test],
            vader_reward,
            name=name,
            reference=self.reference,
            baseline=self.baseline,
            judge=self.judge,
            **self._sampling(),
        )
        row = report.to_dict()
        if self.baseline is None:
            self.baseline = report
            # Its own length is the measure: cutting it to itself changes nothing.
            row |= {f"matched{end}": row[f"reward{end}"] for end in ("", "_low", "_high")}
        log = trainer.state.log_history
        times = [row["step_time"] for row in log if row.get("step_time") is not None]
        self.rows.append(
            row
            | {
                "updates": trainer.state.global_step,
                "kept": kept,
                "step_seconds": statistics.median(times) if times else None,
            }
        )
        # Every method's curve starts at the reference's own answers.
        self.logs[name] = log if name == REFERENCE else self.curve_start + log
        self.samples[name] = report.samples
        self._tell(f"{name}: reward {report.reward:.3f}")

    def loss_cost(self, dataset: LoLDataset) -> LossCost:
        """The fused loss beside the eager one, on the first rows with a positive advantage."""
        assert dataset.advantages is not None
        rows = (dataset.advantages > 0).nonzero()[: self.settings.batch, 0].tolist()
        batch = LoLCollator(self.tokenizer.pad_token_id)([dataset[row] for row in rows])
        ids, mask = batch["input_ids"], batch["completion_mask"]
        with torch.no_grad():
            hidden = self.reference.base_model(
                input_ids=ids, attention_mask=batch["attention_mask"]
            ).last_hidden_state
        return compare_losses(
            hidden[:, :-1][mask[:, 1:]],
            self.reference.get_output_embeddings().weight.detach(),
            ids[mask],
            batch["ref_logps"][mask],
            batch["advantages"],
            lk.Sequences.from_mask(mask),
        )

    def config(self, name: str, **changes: Any) -> LoLConfig:
        """What `sft` and `train` share: constant learning rate, no dropout, one seed."""
        settings = self.settings
        common: Row = {
            "output_dir": str(self.folder / name),
            "seed": self.seed,
            "per_device_train_batch_size": settings.micro_batch,
            "gradient_accumulation_steps": settings.batch // settings.micro_batch,
            "per_device_eval_batch_size": settings.generation_batch,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 10,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "logging_steps": min(5, settings.updates),
            "eval_max_new_tokens": settings.max_new_tokens,
            "eval_temperature": 1.0,
            "eval_top_p": settings.top_p,
            "eval_seed": self.seed,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
        return LoLConfig(**common | changes)

    def _sampling(self) -> Row:
        settings = self.settings
        return {
            "max_new_tokens": settings.max_new_tokens,
            "top_p": settings.top_p,
            "seed": self.seed,
            "batch_size": settings.generation_batch,
        }
