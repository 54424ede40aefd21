"""Batches: exact contents, and log-probs that do not depend on padding or company."""

from typing import Any

import pytest
import torch

import lolkernels as lk
from lolrl.collate import LoLCollator
from tests.lolrl.toys import make_dataset, make_gpt2, make_llama

FIELDS = "input_ids", "prompt_length", "ref_logps", "advantage", "reward"
ROWS = [
    dict(zip(FIELDS, ([5, 6, 7], 1, [-1.0, -2.0], 0.5, 1.0), strict=True)),
    dict(zip(FIELDS, ([8, 9, 4, 3, 1], 3, [-3.0, -4.0], -2.0, 0.0), strict=True)),
]


def test_right_padding() -> None:
    batch = LoLCollator(1)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 1], [8, 9, 4, 3, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]
    assert batch["completion_mask"].int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    assert batch["ref_logps"].tolist() == [[0, -1, -2, 0, 0], [0, 0, 0, -3, -4]]
    assert batch["advantages"].tolist() == [0.5, -2.0] and batch["rewards"].tolist() == [1.0, 0.0]
    assert batch["completion_mask"].dtype == torch.bool


def test_left_padding_and_multiples() -> None:
    batch = LoLCollator(1, padding_side="left", pad_to_multiple_of=4)(ROWS)
    assert batch["input_ids"].tolist() == [[1, 1, 1, 1, 1, 5, 6, 7], [1, 1, 1, 8, 9, 4, 3, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 0, 0, 0, 1, 2], [0, 0, 0, 0, 1, 2, 3, 4]]
    assert batch["completion_mask"].int().tolist() == [[0] * 6 + [1, 1], [0] * 6 + [1, 1]]
    assert batch["ref_logps"].tolist() == [[0] * 6 + [-1, -2], [0] * 6 + [-3, -4]]


def test_a_column_is_there_only_if_every_row_has_it() -> None:
    fewer = {k: v for k, v in ROWS[1].items() if k not in ("ref_logps", "advantage")}
    batch = LoLCollator(1)([dict(ROWS[0]), fewer])
    assert "ref_logps" not in batch and "advantages" not in batch and "rewards" in batch


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="rows is empty"):
        LoLCollator(0)([])
    with pytest.raises(ValueError, match="padding_side"):
        LoLCollator(0, padding_side="middle")
    with pytest.raises(ValueError, match="pad_to_multiple_of"):
        LoLCollator(0, pad_to_multiple_of=0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_left_right_and_no_padding_give_the_same_logps(kind: str, tokenizer: Any) -> None:
    """trl#6800: left padding without position_ids moved GPT-2's sums by tens of nats."""
    make = {"gpt2": make_gpt2, "llama": make_llama}[kind]
    model = lk.fuse_lm_head(make(len(tokenizer)).double()).eval()
    dataset = make_dataset(tokenizer, 9)

    def score(rows: list[int], collate: LoLCollator) -> list[torch.Tensor]:
        with torch.no_grad():
            batch = collate([dataset[i] for i in rows])
            del batch["rewards"]
            out = model(**batch)
        return list(out.logps.split(out.seq.lengths.tolist()))

    every = list(range(9))
    alone = [score([i], LoLCollator(2))[0] for i in every]
    for collate in (
        LoLCollator(2),
        LoLCollator(2, padding_side="left"),
        LoLCollator(0, padding_side="left", pad_to_multiple_of=16),
        LoLCollator(7, pad_to_multiple_of=16),
    ):
        for mine, theirs in zip(score(every, collate), alone, strict=True):
            assert (mine - theirs).abs().max() < 1e-10
    # The test can tell: without position_ids the left-padded GPT-2 is elsewhere.
    if kind == "gpt2":
        batch = LoLCollator(2, padding_side="left")([dataset[i] for i in every])
        del batch["position_ids"], batch["rewards"]
        with torch.no_grad():
            out = model(**batch)
        worst = max(
            float((a.sum() - b.sum()).abs())
            for a, b in zip(out.logps.split(out.seq.lengths.tolist()), alone, strict=True)
        )
        assert worst > 0.1
