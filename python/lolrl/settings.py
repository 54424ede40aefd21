"""The sizes of the two demos."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoSettings:
    """Everything a run depends on but the seed and the text.

    Sizes were chosen on validation prompts and by the clock, never on test prompts.
    """

    model: str = "tiny"
    methods: tuple[str, ...] = (
        "nll",
        "wbc",
        "r_gold",
        "r_lol",
        "a_lol",
        "a_lol_seq",
        "a_lol_ref_free",
        "a_lol_kl",
    )
    train_rows: int | None = None  # None: all
    validation: int = 800
    test: int = 400
    vocab_size: int = 2048  # of the tiny model
    layers: int = 4
    width: int = 128
    lora_rank: int = 0  # 0: every weight is trained
    sft_epochs: float = 4.0
    sft_batch: int = 32
    sft_learning_rate: float = 2e-3
    updates: int = 100
    batch: int = 64  # sequences of an update
    micro_batch: int = 32  # of them at a time
    learning_rate: float = 5e-4
    max_new_tokens: int = 64
    top_p: float = 0.9
    generation_batch: int = 100
    curve_prompts: int = 100  # validation prompts of the training curves; 0 leaves them out
    curve_points: int = 3


TINY = DemoSettings()
SMOLLM2 = DemoSettings(
    model="smollm2",
    methods=("nll", "a_lol", "a_lol_seq"),
    train_rows=800,
    validation=96,
    test=96,
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
