"""A plain transformers Trainer around a fused model, as the example has it."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import transformers_trainer as example

import lolkernels as lk


def trained(trainer: type, model: Any, folder: Path, rows: Any, micro: int, **more: Any) -> Any:
    """One step of plain gradient descent on all rows, ``micro`` at a time."""
    options = {"max_steps": 1, "max_grad_norm": 0.0, "optim": "sgd"}
    args = example.arguments(
        folder,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=len(rows) // micro,
        **options,
    )
    model = copy.deepcopy(model)
    more = {"data_collator": example.collate, **more}
    loss = trainer(model=model, args=args, train_dataset=rows, **more).train().training_loss
    return loss, model


@pytest.mark.parametrize("a_lol", [False, True])
def test_accumulated_micro_batches_are_one_large_batch(a_lol: bool, tmp_path: Path) -> None:
    rows, model = example.random_rows(8, side=a_lol), example.tiny_model()
    trainer = example.ALoLTrainer if a_lol else example.Trainer
    more: dict[str, Any] = {} if a_lol else {"compute_loss_func": example.nll}
    batch = example.collate(rows)
    batch.pop("labels", None)
    objective = lk.objectives.a_lol if a_lol else lk.objectives.nll
    options = {"clip": 0.9} if a_lol else {"reduction": "token-mean"}
    want = model(**batch, objective=objective, **options).loss
    want.backward()
    for micro in (1, 2, 8):
        loss, result = trained(trainer, model, tmp_path, rows, micro, **more)
        assert abs(loss / want.item() - 1) <= 1e-6
        for p, q in zip(model.parameters(), result.parameters(), strict=True):
            step = -1e-2 * p.grad
            assert float((q - p - step).detach().abs().max()) <= 1e-6


def test_the_example_runs_and_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(tmp_path)
    found = re.findall(r"^(\w+): ([\d.]+) -> ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _, _ in found] == ["Trainer", "ALoLTrainer"]
    assert all(float(after) < float(before) for _, before, after in found)


def test_labels_alone_give_the_models_own_loss_and_a_warning(tmp_path: Path) -> None:
    rows, model = example.random_rows(4, side=False), example.tiny_model()
    with pytest.warns(UserWarning, match=r"without completion_mask.*remove_unused_columns"):
        loss, result = trained(example.Trainer, model, tmp_path, rows, 4, data_collator=labelled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = lk.unfuse_lm_head(copy.deepcopy(model))
        same, unfused = trained(example.Trainer, plain, tmp_path, rows, 4, data_collator=labelled)
        result.train()(**labelled(rows))  # says it once
    assert loss == same
    for p, q in zip(result.parameters(), unfused.parameters(), strict=True):
        assert torch.equal(p, q)


def labelled(rows: Any) -> dict[str, Any]:
    batch: dict[str, Any] = example.collate(rows)
    del batch["completion_mask"]
    return batch
