"""A-LoL on TRL's terms, after its SFT, both with lolkernels.

Without arguments: a tiny model and rows made on the spot, in seconds on a CPU.

python python/examples/trl_alol.py
python python/examples/trl_alol.py --model_name_or_path MODEL --dataset_name DATASET --use_peft \
    --objective a_lol_seq --per_device_train_batch_size 8 --learning_rate 1e-5 --output_dir out

The dataset has columns prompt, completion and reward. MODEL is the reference and the start.
"""

from __future__ import annotations

from typing import Any

import trl
from datasets import Dataset, load_dataset

from lolrl.tiny import build_model, build_tokenizer
from lolrl.trl import ALoLConfig, ALoLTrainer, use_lolkernels

NOUNS = ("film", "plot", "cast", "score", "ending", "script")
GOOD, BAD = ("good", "bright", "moving"), ("dull", "long", "flat")


def tiny_rows() -> Dataset:
    """Every noun with praise and blame; praise is rewarded."""
    rows = [
        {"prompt": f"the {noun} was", "completion": f" {word} and {other}", "reward": reward}
        for noun in NOUNS
        for words, reward in ((GOOD, 1.0), (BAD, -1.0))
        for word in words
        for other in words
    ]
    return Dataset.from_list(rows)


def tiny_reference(rows: Dataset, folder: str) -> tuple[Any, Any]:
    """A model that TRL has fitted to all rows."""
    tokenizer = build_tokenizer([r["prompt"] + r["completion"] for r in rows], 320)
    settings = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    config = trl.SFTConfig(
        f"{folder}/sft", learning_rate=3e-3, num_train_epochs=4, save_strategy="no", **settings
    )
    with use_lolkernels():
        trainer = trl.SFTTrainer(
            build_model(tokenizer, layers=2, width=64),
            config,
            train_dataset=rows.select_columns(["prompt", "completion"]),
            processing_class=tokenizer,
        )
        trainer.train()
    return trainer.model, tokenizer


def praise(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Words of praise minus words of blame in each completion."""
    return [sum((w in GOOD) - (w in BAD) for w in text.split()) for text in completions]


def main() -> None:
    parser = trl.TrlParser((trl.ScriptArguments, ALoLConfig, trl.ModelConfig))
    script, args, chosen = parser.parse_args_and_config()
    if chosen.model_name_or_path is not None:
        data = load_dataset(script.dataset_name, name=script.dataset_config)
        train, model, tokenizer, further = data["train"], chosen.model_name_or_path, None, {}
    else:
        train = tiny_rows()
        args.learning_rate, args.num_train_epochs, args.save_strategy = 1e-3, 3, "no"
        model, tokenizer = tiny_reference(train, args.output_dir)
        prompts = Dataset.from_list([{"prompt": f"the {noun} was"} for noun in NOUNS * 10])
        args.eval_temperature, args.eval_max_new_tokens = 1.0, 8
        further = {"eval_dataset": prompts, "reward_funcs": praise}
    trainer = ALoLTrainer(
        model=model,
        args=args,
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=trl.get_peft_config(chosen),
        **further,
    )
    if further:
        print(f"reward before: {trainer.evaluate()['eval_reward']:.2f}")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if further:
        print(f"reward after: {trainer.evaluate()['eval_reward']:.2f}")
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
