"""The fused loss in a plain transformers Trainer, as a function and as a subclass.

    python python/examples/transformers_trainer.py OUTPUT_FOLDER

`fuse_lm_head` alone changes no Trainer: what it is asked for does. Both ways need
`remove_unused_columns=False`, which keeps `completion_mask` and the side inputs, and for evaluation
`prediction_loss_only=True` and `label_names`. Both divide by the whole update's sequences or
tokens, so that accumulating gradients changes nothing.
"""

import sys

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lolkernels as lk


def nll(outputs, labels, num_items_in_batch=None):
    """For `Trainer(compute_loss_func=)`: any loss of per-token log-probs, three matrix products.

    The Trainer counts `num_items_in_batch` in `labels`, over the whole update and all processes.
    """
    tokens = outputs.logps.numel() if num_items_in_batch is None else num_items_in_batch
    return -outputs.logps.sum() / tokens


class ALoLTrainer(Trainer):
    """A-LoL on batches of input_ids, attention_mask, completion_mask, ref_logps and advantages."""

    loss_is_scaled_for_ga = True  # by the totals

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        masks = [batch["completion_mask"] for batch in batches]
        counts = torch.tensor([[len(m), int(m.sum())] for m in masks], device=device).sum(0)
        self.totals = self.accelerator.gather(counts[None]).sum(0).tolist()
        return batches, self.totals[0]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        totals = None if num_items_in_batch is None else self.totals
        out = model(**inputs, objective=lk.objectives.a_lol, clip=0.9, totals=totals)
        # Data parallelism averages over processes; the totals are sums over them.
        loss = out.loss if totals is None else out.loss * self.accelerator.num_processes
        return (loss, out) if return_outputs else loss


def collate(rows):
    """Right padding; `labels` is what the Trainer counts tokens in."""
    keys = [key for key in rows[0] if key != "advantages"]
    batch = {key: pad_sequence([row[key] for row in rows], batch_first=True) for key in keys}
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    width = batch["input_ids"].shape[1]
    batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    if "advantages" in rows[0]:
        batch["advantages"] = torch.stack([row["advantages"] for row in rows])
    else:
        batch["labels"] = batch["input_ids"].masked_fill(~batch["completion_mask"], -100)
    return batch


def tiny_model():
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return lk.fuse_lm_head(LlamaForCausalLM(config))


def random_rows(count, side):
    """Prompts of three tokens and completions of 4 to 11; with ``side`` A-LoL's inputs."""
    rows = []
    for i in range(count):
        ids = torch.randint(3, 20, (7 + i % 8,))  # of 97: something to learn
        row = {"input_ids": ids, "completion_mask": torch.arange(len(ids)) >= 3}
        if side:
            row |= {"ref_logps": torch.full((len(ids),), -4.6), "advantages": torch.rand(())}
        rows.append(row)
    return rows


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder),
        remove_unused_columns=False,
        prediction_loss_only=True,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )


def main(folder):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 5}
    model = tiny_model()
    for side, kind, more in (
        (False, Trainer, {"compute_loss_func": nll}),
        (True, ALoLTrainer, {}),
    ):
        trainer = kind(
            model=model,
            args=arguments(folder, label_names=["advantages" if side else "labels"], **options),
            train_dataset=random_rows(32, side),
            eval_dataset=random_rows(8, side),
            data_collator=collate,
            **more,
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        sys.stdout.write(f"{kind.__name__}: {before:.3f} -> {after:.3f}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
