"""The sizes of the two demos."""

from __future__ import annotations

from dataclasses import dataclass, field

import lolkernels as lk
from lolrl.config import ConfigError


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True)
class DemoSettings:
    """Everything a run depends on but the seed and the text.

    The defaults were chosen on validation prompts and by the clock, never on test prompts.
    Raises ConfigError naming a field out of range.
    """

    model: str = field(default="tiny", metadata=_help("tiny or smollm2."))
    methods: tuple[str, ...] = field(
        default=(
            "nll",
            "wbc",
            "r_gold",
            "r_lol",
            "a_lol",
            "a_lol_seq",
            "a_lol_ref_free",
            "a_lol_kl",
        ),
        metadata=_help("Objectives to train from the reference; nll is the control."),
    )
    train_rows: int | None = field(default=None, metadata=_help("Training rows used; null: all."))
    validation: int = field(default=800, metadata=_help("Prompts the value head is fitted on."))
    test: int = field(default=400, metadata=_help("Held-out prompts of the table."))
    vocab_size: int = field(default=2048, metadata=_help("Entries of the tiny model's tokenizer."))
    layers: int = field(default=4, metadata=_help("Layers of the tiny model."))
    width: int = field(default=128, metadata=_help("Width of the tiny model."))
    lora_rank: int = field(default=0, metadata=_help("LoRA rank; 0: every weight is trained."))
    sft_epochs: float = field(default=5.0, metadata=_help("Epochs that fit the reference."))
    sft_batch: int = field(default=32, metadata=_help("Rows of an update of the reference."))
    sft_learning_rate: float = field(
        default=1.5e-3, metadata=_help("Its learning rate, which decays to zero as a cosine.")
    )
    updates: int = field(default=80, metadata=_help("Updates of each method."))
    batch: int = field(default=48, metadata=_help("Rows of one of these updates."))
    micro_batch: int = field(default=16, metadata=_help("Rows of an update at a time."))
    learning_rate: float = field(default=3e-4, metadata=_help("Learning rate of the methods."))
    max_new_tokens: int = field(default=64, metadata=_help("Length limit of a completion."))
    top_p: float = field(default=0.9, metadata=_help("Nucleus of the draws; temperature is 1."))
    generation_batch: int = field(default=100, metadata=_help("Prompts generated at a time."))
    curve_prompts: int = field(
        default=100, metadata=_help("Validation prompts of the training curves; 0: no curve.")
    )
    curve_points: int = field(default=3, metadata=_help("Points of those curves."))

    def __post_init__(self) -> None:
        unknown = [m for m in self.methods if m not in lk.objectives.REGISTRY]
        if unknown or not self.methods:
            raise ConfigError(
                f"methods={unknown or ()} must be among {', '.join(lk.objectives.REGISTRY)}"
            )
        for name in ("validation", "test", "sft_batch", "updates", "batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("sft_batch", "batch"):
            if getattr(self, name) % self.micro_batch:
                raise ConfigError(
                    f"{name}={getattr(self, name)} must be a multiple of {self.micro_batch}"
                )
        if not 0 <= self.curve_prompts <= self.validation:
            raise ConfigError(
                f"curve_prompts={self.curve_prompts} must be between 0 and validation"
            )


TINY = DemoSettings()
SMOLLM2 = DemoSettings(
    model="smollm2",
    methods=("nll", "a_lol", "a_lol_seq"),
    train_rows=800,
    validation=96,
    test=160,
    lora_rank=16,
    sft_epochs=1.0,
    sft_batch=16,
    sft_learning_rate=1e-3,
    updates=20,
    batch=16,
    micro_batch=16,
    learning_rate=1e-3,
    max_new_tokens=40,
    generation_batch=32,
    curve_prompts=0,
)
