"""The step-0 gate: before the first update the policy is the reference, so every ratio is one.

A-LoL exponentiates a sum of log-ratios. Dropout in the policy alone, a tokenizer that cuts the text
elsewhere, or scores of other weights make that sum noise, and nothing downstream would notice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lolrl.collate import MODEL_INPUTS
from lolrl.tokens import encode

# exp(0.5) is far off one, but a long row of bfloat16 log-probs can be that far by rounding alone.
LOW_PRECISION_NOISE = 0.5


class StepZeroError(RuntimeError):
    """Policy and reference disagree before training; the message says on which row and why."""


def dropout_modules(model: nn.Module) -> list[str]:
    """Names of modules (or `module.attribute`) with a dropout probability above zero."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            found.append(f"{name} (p={module.p})")
        for attribute, value in vars(module).items():
            named = "dropout" in attribute or attribute == "layerdrop"
            if named and isinstance(value, float) and value > 0:
                found.append(f"{name}.{attribute} ({value})")
    return found


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability to zero, the functional ones that are attributes too."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for attribute, value in list(vars(module).items()):
            named = "dropout" in attribute or attribute == "layerdrop"
            if named and isinstance(value, float):
                setattr(module, attribute, 0.0)


def gate_rows(dataset: Any, count: int) -> list[int]:
    """`count` rows spread over the dataset, and the longest."""
    size = len(dataset)
    picked = {int(i) for i in torch.linspace(0, size - 1, min(count, size)).round()}
    return sorted(picked | {int(dataset.lengths.argmax())})


@torch.no_grad()
def log_ratios(
    model: Any, dataset: Any, rows: list[int], collate: Any, batch_size: int, **options: Any
) -> Tensor:
    """sum_t (l_t - l^r_t) of each row, (len(rows),) float64 nats, in the mode the model is in."""
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(rows), batch_size):
        batch = collate([dataset[i] for i in rows[start : start + batch_size]])
        inputs = {name: batch[name].to(device) for name in MODEL_INPUTS if name in batch}
        out = model(**inputs, **options)
        ref = batch["ref_logps"].to(device)[inputs["completion_mask"]].double()
        sums = torch.zeros(out.seq.num_sequences, dtype=torch.float64, device=device)
        parts.append(sums.index_add(0, out.seq.token_to_sequence, out.logps.double() - ref).cpu())
    return torch.cat(parts)


def check_step_zero(
    model: Any,
    dataset: Any,
    collate: Any,
    *,
    tokenizer: Any,
    config: Any,
    eos_ids: list[int],
) -> dict[str, float]:
    """Hold every gate row's |sum of log-ratios| to `config.step0_tolerance`, as training would run.

    The model runs in training mode with the training batch size, which is not the batch shape the
    reference's scores were made with.

    Returns:
        {"max": largest |sum|, "mean": mean |sum|, "rows": rows checked}, in nats.

    Raises:
        StepZeroError: naming the worst row, its value, and the cause as far as it can be told.
    """
    rows = gate_rows(dataset, config.step0_rows)
    size = config.per_device_train_batch_size
    options = {"temperature": config.temperature}
    was_training = model.training
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices):
        try:
            model.train()
            sums = log_ratios(model, dataset, rows, collate, size, **options)
            worst = int(torch.nan_to_num(sums.abs(), nan=torch.inf).argmax())
            value = float(sums[worst])
            if abs(value) <= config.step0_tolerance:
                return {
                    "max": abs(value),
                    "mean": float(sums.abs().mean()),
                    "rows": float(len(rows)),
                }
            # The same batch in eval mode: batch shape must not be taken for dropout.
            start = worst // size * size
            model.eval()
            batch = log_ratios(model, dataset, rows[start : start + size], collate, size, **options)
            calm = float(batch[worst - start])
        finally:
            model.train(was_training)
    record = dataset.records[rows[worst]]
    reason = _cause(model, dataset, rows[worst], calm, tokenizer, config, eos_ids)
    raise StepZeroError(
        f"{record.source}, line {record.line}: before the first update the sum of log-ratios is "
        f"{value:.3g} nats, above step0_tolerance={config.step0_tolerance:g}. {reason}"
    )


def _low_precision(model: Any, config: Any) -> bool:
    narrow = (torch.bfloat16, torch.float16)
    return config.bf16 or config.fp16 or any(p.dtype in narrow for p in model.parameters())


def _cause(
    model: Any, dataset: Any, row: int, calm: float, tokenizer: Any, config: Any, eos_ids: list[int]
) -> str:
    if abs(calm) <= config.step0_tolerance:
        active = dropout_modules(model)
        where = f": {', '.join(active[:3])}" if active else ""
        return (
            "In eval mode it agrees, so dropout (or another layer that differs in training) is on"
            f"{where}. Leave disable_dropout=True."
        )
    record = dataset.records[row]
    have = dataset[row]["input_ids"].tolist()
    if tokenizer is not None:
        ids, _ = encode(
            tokenizer,
            record.prompt,
            record.completion,
            max_prompt_length=config.max_prompt_length,
            max_completion_length=config.max_completion_length,
            eos_ids=eos_ids,
        )
        if ids != have:
            return (
                f"The row was tokenised otherwise: {len(have)} ids against {len(ids)} by "
                "processing_class and these length limits. Annotate with the tokenizer and limits "
                "of the training."
            )
    if abs(calm) < LOW_PRECISION_NOISE and _low_precision(model, config):
        return (
            "Scores and policy differ by the noise of 16-bit arithmetic, which moves with the "
            "batch's shape. Annotate in the precision of the training (AnnotateConfig.autocast) "
            "and raise step0_tolerance to about 0.05, or train in float32."
        )
    return (
        f"In eval mode it is {calm:.3g} too, and the tokens agree: ref_logps were made by other "
        "weights, dtype or attention (a stale cache), or the policy does not start from the "
        "reference. Annotate again with the model training starts from; only if it is meant to "
        "differ, set step0_gate=False."
    )
