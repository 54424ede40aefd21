"""The options of each verb of the command line: every field is a flag, and a key of its YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class ModelOptions:
    """How a model is found and loaded; shared by every stage."""

    model: str | None = field(
        default=None, metadata=_help("Folder (or cached hub name) of the model.")
    )
    output_dir: str | None = field(default=None, metadata=_help("Folder to write into."))
    gguf_file: str | None = field(
        default=None, metadata=_help("A .gguf file of the model's folder.")
    )
    download: bool = field(
        default=False,
        metadata=_help("Allow fetching the model from its hub; off: local files only."),
    )
    trust_remote_code: bool = field(
        default=False, metadata=_help("Run code that the model's folder holds.")
    )

    def load(self, source: str | None = None) -> tuple[Any, Any]:
        from lolrl.policies import load_policy

        gguf_file = self.gguf_file if source is None else None
        return load_policy(
            source or str(self.model),
            gguf_file=gguf_file,
            download=self.download,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass
class SftOptions(ModelOptions):
    """Flags of `lolrl sft`."""

    data: str | None = field(default=None, metadata=_help("JSON Lines with prompt, completion."))
    eval_data: str | None = field(
        default=None, metadata=_help("The same, held out: its loss is logged.")
    )
    lora_rank: int = field(default=0, metadata=_help("Train a LoRA of this rank; 0: every weight."))
    resume: str | None = field(
        default=None, metadata=_help("Checkpoint folder to go on from, or last: the newest one.")
    )


@dataclass
class TrainOptions(SftOptions):
    """Flags of `lolrl train`."""

    data: str | None = field(
        default=None,
        metadata=_help("JSON Lines with rewards; best the annotated.jsonl of annotate."),
    )
    eval_data: str | None = field(
        default=None,
        metadata=_help("JSON Lines to evaluate on: prompts (with --reward), or whole rows."),
    )
    reward: str | None = field(
        default=None,
        metadata=_help("Reward of those generations: vader or package.module:function."),
    )
    ref_model: str | None = field(
        default=None, metadata=_help("The reference, where the data holds no ref_logps.")
    )


@dataclass
class SamplingOptions:
    """How completions are drawn."""

    max_new_tokens: int = field(default=64, metadata=_help("Length limit of a completion."))
    generation_temperature: float = field(
        default=1.0, metadata=_help("Temperature of the draw; 0 is greedy.")
    )
    top_p: float = field(default=0.9, metadata=_help("Nucleus of the draw."))
    seed: int = field(default=0, metadata=_help("Seed of the draw and of every fit."))
    generation_batch: int = field(default=32, metadata=_help("Prompts generated at a time."))

    def sampling(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.generation_temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "batch_size": self.generation_batch,
        }


@dataclass
class AnnotateOptions(SamplingOptions, ModelOptions):
    """Flags of `lolrl annotate`."""

    data: str | None = field(
        default=None, metadata=_help("JSON Lines with prompt, completion, reward.")
    )
    reward: str | None = field(
        default=None,
        metadata=_help(
            "Fills in missing rewards, and scores the reference's answers: as in train."
        ),
    )
    value_data: str | None = field(
        default=None,
        metadata=_help("JSON Lines with validation prompts: the value head is fitted on them."),
    )
    value_head: str | None = field(
        default=None, metadata=_help("Folder of a fitted value head, instead of --value-data.")
    )
    value_epochs: int = field(default=20, metadata=_help("Epochs of the value head's fit at most."))
    value_learning_rate: float = field(default=1e-3, metadata=_help("Learning rate of that fit."))


@dataclass
class EvaluateOptions(SamplingOptions, ModelOptions):
    """Flags of `lolrl evaluate`."""

    data: str | None = field(default=None, metadata=_help("JSON Lines with held-out prompts."))
    reward: str | None = field(default=None, metadata=_help("vader or package.module:function."))
    reference: str | None = field(
        default=None, metadata=_help("The reference: measured too, and compared with.")
    )
    judge_data: str | None = field(
        default=None,
        metadata=_help(
            "JSON Lines with prompt, completion, rating: a ridge judge is fitted on them."
        ),
    )


@dataclass
class DemoOptions:
    """Flags of `lolrl demo`."""

    model: str = field(default="tiny", metadata=_help("tiny (from scratch) or smollm2 (LoRA)."))
    seed: int = field(default=0, metadata=_help("First seed."))
    seeds: int = field(default=1, metadata=_help("Number of seeds; several print their spread."))
    output_dir: str = field(default="demo-output", metadata=_help("Folder to write into."))
    data_dir: str | None = field(
        default=None,
        metadata=_help("Folder that keeps the fetched text; default: the user's cache."),
    )
