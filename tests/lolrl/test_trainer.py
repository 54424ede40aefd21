"""The trainer's arithmetic: one update by hand, accumulation, fused against eager, resume."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import lolkernels as lk
import lolrl.saving
from lolrl.annotate import annotate
from lolrl.checkpoints import CheckpointError, last_complete
from lolrl.config import AnnotateConfig, LoLConfig
from lolrl.data import DataError
from lolrl.tokens import LoLDataset
from lolrl.trainer import LoLTrainer, sft, train
from tests.lolrl.toys import make_config, make_llama, make_rows, parameters, reload, run

OBJECTIVES = ["nll", "wbc", "r_gold", "r_lol", "a_lol", "a_lol_seq", "a_lol_ref_free", "a_lol_kl"]
OBJECTIVES += ["r_lol_kl"]
REPORTS = "metrics" in lk.LinearLossOutput._fields
CLIPS = ("clip_ratio",) if REPORTS else ()


@pytest.fixture(scope="module")
def rows(tokenizer_module: Any) -> LoLDataset:
    """27 annotated rows, of which some have a negative advantage; scores by the float64 model."""
    model = make_llama(len(tokenizer_module), dtype=torch.float64)
    config = AnnotateConfig(keep="all")
    return annotate(model, tokenizer_module, make_rows(27), config=config, progress=False).dataset


@pytest.fixture(scope="module")
def tokenizer_module() -> Any:
    from tests.lolrl.toys import make_tokenizer

    return make_tokenizer()


def loss_by_hand(model: Any, rows: LoLDataset, index: list[int], name: str) -> torch.Tensor:
    """The table of objectives, row by row, from the model's own logits."""
    total = torch.zeros((), dtype=torch.float64)
    for i in index:
        item = rows[i]
        ids, p = item["input_ids"], item["prompt_length"]
        logits = model._unfused_forward(input_ids=ids[None]).logits[0]
        l = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[p - 1 :, 0]  # noqa: E741
        ref = item["ref_logps"].double()
        # Batches carry side inputs as float32.
        a = max(float(torch.tensor(item["advantage"]).float()), 0.0)
        r = float(torch.tensor(item["reward"]).float())
        ratio = (l.sum() - ref.sum()).exp().clamp(0.1, 1.9).detach()
        tokens = (l - ref).exp().clamp(0.1, 1.9).detach()
        total = (
            total
            + {
                "nll": lambda: -l.sum(),  # noqa: B023
                "wbc": lambda: -r * l.sum(),  # noqa: B023
                "r_gold": lambda: -r * (l.exp().clamp(min=0.1).detach() * l).sum(),  # noqa: B023
                "r_lol": lambda: -r * ratio * l.sum(),  # noqa: B023
                "a_lol": lambda: -a * ratio * l.sum(),  # noqa: B023
                "a_lol_seq": lambda: -a * (tokens * l).sum(),  # noqa: B023
                "a_lol_ref_free": lambda: -a * l.sum(),  # noqa: B023
                "a_lol_kl": lambda: -a * l.sum() + 0.1 * (l - ref).sum(),  # noqa: B023
                "r_lol_kl": lambda: -r * l.sum() + 0.1 * (l - ref).sum(),  # noqa: B023
            }[name]()
        )
    return total / len(index)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_of_one_update_is_the_formula_s(name, rows, tokenizer_module, tmp_path) -> None:
    """Two micro-batches of four against the eight rows at once, by hand in float64."""
    trainer = run(
        tmp_path,
        rows,
        tokenizer_module,
        objective=name,
        sampling="uniform",
        advantage_filter="none",
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0.0,
    )
    index = list(trainer._sampler)[:8]
    model = lk.fuse_lm_head(make_llama(len(tokenizer_module), dtype=torch.float64))
    loss = loss_by_hand(model, rows, index, name)
    loss.backward()
    assert any(float(rows.advantages[i]) < 0 for i in index)
    for key, parameter in model.named_parameters():
        mine, theirs = trainer.gradients[0][key], parameter.grad
        assert (mine - theirs).abs().max() <= 1e-8 * theirs.abs().max() + 1e-12, key
        # A canary: two per cent off would be seen.
        assert (1.02 * mine - theirs).abs().max() > 1e-3 * theirs.abs().max()
    logged = trainer.state.log_history[0]["loss"]
    assert logged == pytest.approx(float(loss.detach()), rel=1e-8)


@pytest.mark.parametrize("name", ["a_lol", "a_lol_seq", "nll"])
def test_accumulation_does_not_matter(name, rows, tokenizer_module, tmp_path) -> None:
    """T1: 1 x 8 = 2 x 4 = 4 x 2 = 8 x 1 over 20 updates, uneven rows and a partial last window.

    Rows with a negative advantage make whole micro-batches of the 1 x 8 run empty for A-LoL.
    """
    runs = {}
    for size, steps in ((8, 1), (4, 2), (2, 4), (1, 8)):
        runs[size] = run(
            tmp_path / str(size),
            rows,
            tokenizer_module,
            objective=name,
            sampling="uniform",
            advantage_filter="none",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=20,
            learning_rate=3e-3,
        )
    reference = runs[8]
    start = parameters(make_llama(len(tokenizer_module), dtype=torch.float64))
    moved = max(float((p - start[n]).abs().max()) for n, p in parameters(reference.model).items())
    assert moved > 1e-3
    # 27 rows: the fourth update of an epoch has three.
    assert (
        reference.state.log_history[3]["completion_tokens"]
        < 0.6 * (reference.state.log_history[0]["completion_tokens"])
    )
    for size in (4, 2, 1):
        for key, gradient in reference.gradients[0].items():
            error = (runs[size].gradients[0][key] - gradient).abs().max()
            assert error <= 1e-12 * max(1.0, float(gradient.abs().max())), key
        mine, theirs = parameters(runs[size].model), parameters(reference.model)
        for key in theirs:
            assert (mine[key] - theirs[key]).abs().max() <= 1e-10, (size, key)
        for a, b in zip(runs[size].state.log_history, reference.state.log_history, strict=False):
            if "ratio/mean" in b:
                assert a["loss"] == pytest.approx(b["loss"], rel=1e-9, abs=1e-12)
                assert a["ratio/max"] == pytest.approx(b["ratio/max"], rel=1e-9)


def test_fused_equals_eager_over_20_updates(rows, tokenizer_module, tmp_path) -> None:
    """A hand-written loop with log-softmax and AdamW ends at the same parameters."""
    trainer = run(
        tmp_path,
        rows,
        tokenizer_module,
        objective="a_lol",
        per_device_train_batch_size=4,
        max_steps=20,
        learning_rate=1e-3,
        max_grad_norm=1.0,
        optim="adamw_torch",
    )
    kept = trainer.train_dataset
    model = lk.fuse_lm_head(make_llama(len(tokenizer_module), dtype=torch.float64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-8, weight_decay=0.0)
    losses = []
    sampler = trainer._sampler
    stream: list[list[int]] = []
    for epoch in range(20):
        sampler.set_epoch(epoch)
        order = list(sampler)
        stream += [order[s : s + 4] for s in range(0, len(order), 4)]
    for index in stream[:20]:
        optimizer.zero_grad()
        loss = loss_by_hand(model, kept, index, "a_lol")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    logged = [line["loss"] for line in trainer.state.log_history if "ratio/mean" in line]
    assert logged == pytest.approx(losses, rel=1e-7)
    theirs = parameters(model)
    for key, mine in parameters(trainer.model).items():
        assert (mine - theirs[key]).abs().max() <= 1e-9, key


def test_fp32_curve_stays_with_fp64(rows, tokenizer_module, tmp_path) -> None:
    """T10 on a toy: point difference 1e-4, mean difference 1e-5 of the loss, over 60 updates."""
    kw = {"objective": "a_lol", "max_steps": 60, "learning_rate": 3e-4}
    curves = []
    for dtype in (torch.float32, torch.float64):
        trainer = run(tmp_path / str(dtype), rows, tokenizer_module, dtype=dtype, **kw)
        curves.append([x["loss"] for x in trainer.state.log_history if "ratio/mean" in x])
    single, double = (torch.tensor(c, dtype=torch.float64) for c in curves)
    assert len(double) == 60 and float(double.max() - double.min()) > 1.0
    relative = (single - double) / double.abs().mean()
    assert float(relative.abs().max()) <= 1e-4 and abs(float(relative.mean())) <= 1e-5


def test_empty_micro_batch_is_loss_zero_and_gradient_zero(rows, tokenizer_module, tmp_path) -> None:
    trainer = run(tmp_path, rows, tokenizer_module, max_steps=1)
    batch = trainer.data_collator([rows[0], rows[1]])
    batch["completion_mask"][:] = False
    trainer.model.zero_grad()
    trainer._totals = (0.0, 0.0)
    loss = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_prompt_and_padding_cannot_reach_the_loss(rows, tokenizer_module, tmp_path) -> None:
    """A masked row changes neither numerator nor denominator."""
    trainer = run(tmp_path, rows, tokenizer_module, max_steps=1, objective="a_lol")
    items = [rows[i] for i in range(6)]

    def update(batch: dict) -> tuple[float, dict[str, torch.Tensor]]:
        trainer.model.zero_grad()
        batches, items_in_batch = trainer.get_batch_samples(iter([batch]), 1, "cpu")
        loss = trainer.compute_loss(
            trainer.model.train(), batches[0], num_items_in_batch=items_in_batch
        )
        loss.backward()
        return float(loss.detach()), {
            n: p.grad.clone() for n, p in trainer.model.named_parameters()
        }

    five, six = trainer.data_collator(items[:5]), trainer.data_collator(items)
    six["completion_mask"][5] = False
    six["advantages"][5] = 1e6
    six["ref_logps"][5] = float("nan")
    six["ref_logps"][~six["completion_mask"]] = float("nan")
    loss_five, gradients_five = update(five)
    loss_six, gradients_six = update(six)
    assert loss_six == pytest.approx(loss_five, rel=1e-12)
    for key, gradient in gradients_five.items():
        assert (gradients_six[key] - gradient).abs().max() <= 1e-12
    assert math.isfinite(loss_six)


# --- resume ---


def same_state(a: Any, b: Any) -> None:
    for key, value in parameters(a.model).items():
        assert torch.equal(value, parameters(b.model)[key]), key
    left, right = a.optimizer.state_dict()["state"], b.optimizer.state_dict()["state"]
    assert left.keys() == right.keys() and len(left) > 0
    for key in left:
        for name, value in left[key].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[key][name])), name
        assert float(left[key]["exp_avg"].abs().max()) > 0
    assert a.lr_scheduler.state_dict() == b.lr_scheduler.state_dict()


def no_pickle(folder: Path) -> None:
    """Every file of a run is safetensors, JSON, YAML or text."""
    kinds = {p.suffix for p in folder.rglob("*") if p.is_file()}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".yaml", ".jinja", ".md"}, kinds


FIGURES = ("loss", "grad_norm", "learning_rate", "ratio/min", "ratio/mean", "ratio/max", "kl")
FIGURES += ("entropy", "logps/mean", *CLIPS, "advantage/mean", "num_tokens", "epoch")


def test_resume_is_bit_equal(rows, tokenizer_module, tmp_path) -> None:
    """Killed after any of these updates, the run ends with the same bits and the same log.

    Steps in the middle of an epoch, of a log window, at an epoch's end and one before the end.
    """
    kw: dict[str, Any] = {
        "objective": "a_lol",
        "dtype": torch.float32,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 12,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "lr_scheduler_type": "linear",
        "learning_rate": 3e-3,
    }
    whole = run(tmp_path / "whole", rows, tokenizer_module, **kw)
    assert whole.state.epoch > 2
    lines = [line for line in whole.state.log_history if "ratio/mean" in line]
    for step in (2, 4, 7, 11):
        folder = tmp_path / f"resumed{step}"
        folder.mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        torch.rand(step)  # the global generator is elsewhere
        resumed = run(folder, rows, tokenizer_module, resume=True, seed=5, **kw)
        same_state(resumed, whole)
        again = [line for line in resumed.state.log_history if "ratio/mean" in line]
        assert len(again) == len(lines) == 4
        for mine, theirs in zip(again, lines, strict=True):
            for name in FIGURES:
                assert mine[name] == theirs[name], (step, name)
        files = [
            [json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()]
            for f in (folder, tmp_path / "whole")
        ]
        after = [[x["loss"] for x in f if "ratio/mean" in x and x["step"] > step] for f in files]
        assert after[0] == after[1]
    no_pickle(tmp_path)
    # The test can tell: a run from other weights ends elsewhere.
    other = run(tmp_path / "other", rows, tokenizer_module, seed=5, step0_gate=False, **kw)
    with pytest.raises(AssertionError):
        same_state(other, whole)


def test_resume_with_dropout_is_bit_equal(rows, tokenizer_module, tmp_path) -> None:
    """The global generator is restored too, so dropout draws what it would have drawn."""
    kw: dict[str, Any] = {
        "objective": "nll",
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_dropout": False,
        "dtype": torch.float32,
    }

    def attempt(folder: Path, resume: Any) -> Any:
        model = make_llama(len(tokenizer_module), attention_dropout=0.2)
        trainer = LoLTrainer(
            model,
            args=make_config(folder, **{k: v for k, v in kw.items() if k != "dtype"}),
            train_dataset=rows,
            processing_class=tokenizer_module,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = attempt(tmp_path / "whole", None)
    for step in (2, 4):
        same_state(attempt(tmp_path / "b", str(tmp_path / "whole" / f"checkpoint-{step}")), whole)


def test_metrics_file_after_a_crash_has_each_step_once(rows, tokenizer_module, tmp_path) -> None:
    kw: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    run(tmp_path, rows, tokenizer_module, **kw)
    shutil.rmtree(tmp_path / "checkpoint-4")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # torn by a crash
    run(tmp_path, rows, tokenizer_module, resume=True, **kw)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "ratio/mean" in x] == [1, 2, 3, 4]


def test_damaged_checkpoints_are_not_resumed_from(rows, tokenizer_module, tmp_path) -> None:
    kw: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    run(tmp_path, rows, tokenizer_module, **kw)
    (tmp_path / "checkpoint-4" / "manifest.json").unlink()
    weights = tmp_path / "checkpoint-3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    state = tmp_path / "checkpoint-2" / "optimizer.safetensors"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(bytes(data))
    assert last_complete(tmp_path).name == "checkpoint-1"
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors does not match"):
        run(tmp_path, rows, tokenizer_module, resume=str(tmp_path / "checkpoint-2"), **kw)
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        run(tmp_path, rows, tokenizer_module, resume=True, **kw)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"per_device_train_batch_size": 2}, "update_batch_size"),
        ({"sampling": "uniform"}, "weights"),
        ({"advantage_filter": "none", "sampling": "uniform"}, "num_rows"),
    ],
)
def test_resume_with_other_rows_is_refused(
    changes, field, rows, tokenizer_module, tmp_path
) -> None:
    kw: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def attempt(resume: bool, **more: Any) -> None:
        trainer = LoLTrainer(
            make_llama(len(tokenizer_module)),
            args=make_config(tmp_path, **{**kw, **more}),
            train_dataset=rows,
            processing_class=tokenizer_module,
        )
        trainer.train(resume_from_checkpoint=resume)

    attempt(False)
    with pytest.raises(CheckpointError, match=field):
        attempt(True, **changes)


# --- what the run leaves behind ---


def test_logged_figures_are_those_of_the_batch(rows, tokenizer_module, tmp_path) -> None:
    """Every figure of a log line, recomputed from the rows the sampler drew."""
    trainer = run(
        tmp_path, rows, tokenizer_module, objective="a_lol", max_steps=3, learning_rate=2e-2
    )
    kept = trainer.train_dataset
    model = lk.fuse_lm_head(make_llama(len(tokenizer_module), dtype=torch.float64)).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, eps=1e-8, weight_decay=0.0)
    order = list(trainer._sampler)
    lines = [x for x in trainer.state.log_history if "ratio/mean" in x]
    assert len(lines) == 3
    for step, line in enumerate(lines):
        index = order[4 * step : 4 * step + 4]
        l, sums, entropy, tokens = [], [], [], 0  # noqa: E741
        for i in index:
            item = kept[i]
            ids, p = item["input_ids"], item["prompt_length"]
            with torch.no_grad():
                logits = model._unfused_forward(input_ids=ids[None]).logits[0].log_softmax(-1)
            row = logits[:-1].gather(1, ids[1:, None])[p - 1 :, 0]
            l.append(row)
            sums.append(float(row.sum() - item["ref_logps"].double().sum()))
            entropy.append(-(logits.exp() * logits).sum(-1)[p - 1 : -1])
            tokens += len(ids)
        ratios = torch.tensor(sums, dtype=torch.float64).exp()
        expected = {
            "logps/mean": float(torch.cat(l).mean()),
            "entropy": float(torch.cat(entropy).mean()),
            "ratio/min": float(ratios.min()),
            "ratio/mean": float(ratios.mean()),
            "ratio/max": float(ratios.max()),
            "kl": sum(sums) / 4,
            "advantage/mean": float(kept.advantages[index].mean()),
            "reward/mean": float(kept.rewards[index].mean()),
            "positive_share": 1.0,
            "completion_tokens": float(kept.completion_lengths[index].sum()),
        }
        if REPORTS:
            expected["clip_ratio"] = float(((ratios < 0.1) | (ratios > 1.9)).double().mean())
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (step, name)
        assert line["num_tokens"] == pytest.approx(
            tokens + (lines[step - 1]["num_tokens"] if step else 0)
        )
        assert line["tokens_per_second"] > 0 and line["step_time"] > 0
        optimizer.zero_grad()
        loss_by_hand(model, kept, index, "a_lol").backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    # The learning rate is large enough for the clip to be seen.
    assert lines[-1]["ratio/max"] > 1.9
    assert not REPORTS or 0 < lines[-1]["clip_ratio"] <= 1


@pytest.mark.skipif(not REPORTS, reason="the fused output holds no metrics")
def test_unlearned_share_counts_rows_below_beta(rows, tokenizer_module, tmp_path) -> None:
    trainer = run(
        tmp_path,
        rows,
        tokenizer_module,
        objective="a_lol_kl",
        beta=0.4,
        advantage_filter="none",
        sampling="uniform",
        max_steps=1,
    )
    index = list(trainer._sampler)[:4]
    expected = float((rows.advantages[index].clamp(min=0) < 0.4).double().mean())
    assert trainer.state.log_history[0]["unlearned_share"] == expected


def short_is_good(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    assert columns.keys() == {"index"}
    return [-float(len(c)) for c in completions]


def test_evaluation_best_and_last(rows, tokenizer_module, tmp_path) -> None:
    """The best evaluation's model is in best/, the final one in last/, and both load."""
    evaluated = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, model=None, **kw) -> None:
            evaluated.append((metrics["eval_reward"], parameters(model)))

    data = [{**r, "index": i} for i, r in enumerate(make_rows(4))]
    trainer = train(
        make_llama(len(tokenizer_module)),
        tokenizer_module,
        rows,
        make_config(
            tmp_path,
            max_steps=6,
            learning_rate=2e-2,
            eval_strategy="steps",
            eval_steps=2,
            eval_max_new_tokens=8,
            save_best_and_last=True,
        ),
        eval_data=data,
        reward_funcs=short_is_good,
        callbacks=[Watch()],
    )
    assert len(evaluated) == 3 and trainer.args.metric_for_best_model == "reward"
    rewards = [reward for reward, _ in evaluated]
    assert trainer.state.best_metric == max(rewards)
    best = evaluated[rewards.index(max(rewards))][1]
    for key, value in parameters(reload(trainer.best_model_dir)).items():
        assert torch.equal(value, best[key])
    for key, value in parameters(reload(trainer.last_model_dir)).items():
        assert torch.equal(value, evaluated[-1][1][key])
    lines = [x for x in trainer.state.log_history if "eval_reward" in x]
    assert {"eval_reward", "eval_reward_std", "eval_length", "eval_nll"} <= set(lines[0])
    assert trainer.summary["updates"] == 6 and trainer.summary["rows"] == 27
    no_pickle(tmp_path)


def test_evaluation_does_not_disturb_training(rows, tokenizer_module, tmp_path) -> None:
    kw: dict[str, Any] = {"max_steps": 4, "disable_dropout": False, "objective": "nll"}

    def attempt(folder: str, **more: Any) -> Any:
        trainer = LoLTrainer(
            make_llama(len(tokenizer_module), attention_dropout=0.2),
            args=make_config(tmp_path / folder, **kw, **more),
            train_dataset=rows,
            eval_dataset=rows if more else None,
            reward_funcs=(lambda prompts, completions, **c: [0.0] * len(prompts)) if more else None,
            processing_class=tokenizer_module,
        )
        trainer.train()
        return trainer

    quiet = attempt("quiet")
    loud = attempt(
        "loud", eval_strategy="steps", eval_steps=1, eval_temperature=1.0, eval_max_new_tokens=4
    )
    same_state(loud, quiet)


def test_evaluation_figures(rows, tokenizer_module, tmp_path) -> None:
    trainer = LoLTrainer(
        make_llama(len(tokenizer_module), dtype=torch.float64),
        args=make_config(tmp_path, objective="a_lol_seq", per_device_eval_batch_size=5),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer_module,
    )
    metrics = trainer.evaluate()
    model = lk.fuse_lm_head(make_llama(len(tokenizer_module), dtype=torch.float64)).eval()
    with torch.no_grad():
        everything = list(range(len(rows)))
        loss = loss_by_hand(model, rows, everything, "a_lol_seq")
        nll = loss_by_hand(model, rows, everything, "nll") * len(rows)
    assert metrics["eval_loss"] == pytest.approx(float(loss), rel=1e-6)
    assert metrics["eval_nll"] == pytest.approx(
        float(nll / rows.completion_lengths.sum()), rel=1e-6
    )


def test_config_is_echoed_resolved(rows, tokenizer_module, tmp_path) -> None:
    from lolrl.config import LoLConfig, load_config

    run(tmp_path, rows, tokenizer_module, max_steps=1)
    back = load_config(LoLConfig, tmp_path / "config.yaml")
    assert (back.sampling, back.advantage_filter, back.objective) == (
        "advantage",
        "positive",
        "a_lol",
    )


def test_sft_lowers_the_loss_and_uses_every_row(tokenizer_module, tmp_path) -> None:
    args = make_config(tmp_path, max_steps=40, learning_rate=1e-2, save_best_and_last=True)
    trainer = sft(make_llama(len(tokenizer_module)), tokenizer_module, make_rows(27), args)
    losses = [x["loss"] for x in trainer.state.log_history if "ratio/mean" in x or "entropy" in x]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert trainer.objective_name == "nll" and trainer.train_report["share_kept"] == 1.0
    assert trainer.step0 is None and args.objective == "a_lol"
    for key, value in parameters(reload(trainer.last_model_dir)).items():
        assert torch.equal(value, dict(trainer.model.named_parameters())[key])


def test_a_callable_objective(rows, tokenizer_module, tmp_path) -> None:
    def focal(logps, advantages, seq, *, power: float = 1.0):
        return -advantages.clamp(min=0) * seq.sum(logps) * power

    def go(folder: str, **kw: Any) -> dict[str, torch.Tensor]:
        trainer = LoLTrainer(
            make_llama(len(tokenizer_module), dtype=torch.float64),
            args=make_config(tmp_path / folder, **kw.pop("config", {})),
            train_dataset=rows,
            processing_class=tokenizer_module,
            **kw,
        )
        trainer.train()
        return parameters(trainer.model)

    recipe = {"sampling": "advantage", "advantage_filter": "positive"}
    mine = go("a", objective=focal, config=dict(recipe))
    known = go("b", config={"objective": "a_lol_ref_free"})
    assert all((mine[k] - known[k]).abs().max() < 1e-12 for k in mine)
    scaled = go("c", objective=focal, config={"objective_args": {"power": 0.0}, **recipe})
    start = parameters(make_llama(len(tokenizer_module), dtype=torch.float64))
    assert all(torch.equal(scaled[k], start[k]) for k in scaled)
    with pytest.raises(ValueError, match="no option 'powder'"):
        go("d", objective=focal, config={"objective_args": {"powder": 1}})


def test_non_finite_gradients_are_left_out_and_counted(rows, tokenizer_module, tmp_path) -> None:
    """T7: a poisoned update changes nothing; five in a row stop the run."""

    class Poison(TrainerCallback):
        def __init__(self, steps: set[int]) -> None:
            self.steps = steps

        def on_step_begin(self, args, state, control, model=None, **kw) -> None:
            hooked = state.global_step in self.steps
            model.model.norm.weight.register_hook(
                lambda g: g * float("nan") if hooked and self.live(state) else g
            )

        def live(self, state: Any) -> bool:
            return state.global_step in self.steps

    def attempt(folder: str, steps: set[int]) -> Any:
        trainer = LoLTrainer(
            make_llama(len(tokenizer_module)),
            args=make_config(tmp_path / folder, max_steps=8),
            train_dataset=rows,
            processing_class=tokenizer_module,
            callbacks=[Poison(steps)],
        )
        trainer.train()
        return trainer

    trainer = attempt("two", {1, 4})
    assert trainer.summary["skipped_steps"] == 2
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
    with pytest.raises(RuntimeError, match="5 updates in a row"):
        attempt("many", set(range(8)))


def test_missing_inputs_are_named(rows, tokenizer_module, tmp_path) -> None:
    bare = rows.with_columns(advantages=None, rewards=None)
    for objective, name in (("a_lol", "advantage"), ("wbc", "reward")):
        with pytest.raises(DataError, match=f"'{name}': is missing, and {objective} needs"):
            run(tmp_path, bare, tokenizer_module, objective=objective)
    data = make_rows(5)
    del data[3]["reward"]
    with pytest.raises(DataError) as caught:
        run(tmp_path, data, tokenizer_module, objective="wbc")
    assert (caught.value.line, caught.value.field) == (4, "reward")
    with pytest.raises(ValueError, match="positive advantage"):
        run(tmp_path, rows.with_columns(advantages=-torch.ones(27).double()), tokenizer_module)
    with pytest.raises(ValueError, match="sampling='advantage'"):
        run(tmp_path, bare, tokenizer_module, objective="nll", sampling="advantage")
    with pytest.raises(ValueError, match="advantage_filter"):
        run(tmp_path, bare, tokenizer_module, objective="nll", advantage_filter="positive")
    with pytest.raises(ValueError, match="processing_class"):
        LoLTrainer(make_llama(300), args=make_config(tmp_path), train_dataset=rows)
    several = make_config(tmp_path)
    several._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs"):
        LoLTrainer(make_llama(300), args=several, processing_class=tokenizer_module)
    with pytest.raises(TypeError, match="LoLConfig"):
        LoLTrainer(make_llama(300), args=3, processing_class=tokenizer_module)
    with pytest.raises(ValueError, match="reward_funcs"):
        LoLTrainer(
            make_llama(300),
            args=make_config(tmp_path),
            eval_dataset=[{"prompt": "a"}],
            processing_class=tokenizer_module,
        )


def test_reference_is_scored_when_rows_have_no_scores(rows, tokenizer_module, tmp_path) -> None:
    """Rows without ref_logps are scored by ref_model or the initial policy, and cached."""
    bare = rows.with_columns(ref_logps=None)
    trainer = run(tmp_path / "a", bare, tokenizer_module, max_steps=2)
    expected = run(tmp_path / "b", rows, tokenizer_module, max_steps=2)
    same_state(trainer, expected)
    assert (tmp_path / "a" / "annotations" / "annotations.json").exists()
    reference = make_llama(len(tokenizer_module), dtype=torch.float64, seed=9)
    other = LoLTrainer(
        make_llama(len(tokenizer_module), dtype=torch.float64),
        reference,
        make_config(tmp_path / "c", step0_gate=False),
        train_dataset=bare,
        processing_class=tokenizer_module,
    )
    gap = other.train_dataset.ref_logps[0] - trainer.train_dataset.ref_logps[0]
    assert float(gap.abs().max()) > 0.1


def test_peft(rows, tokenizer_module, tmp_path) -> None:
    """LoRA: only the adapter moves, the gate passes, and the adapter is what is saved."""
    from peft import LoraConfig

    model = make_llama(len(tokenizer_module))
    before = parameters(model)
    lora = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
    trainer = train(
        model,
        tokenizer_module,
        rows,
        make_config(
            tmp_path,
            max_steps=4,
            learning_rate=1e-2,
            save_best_and_last=True,
            save_strategy="steps",
            save_steps=2,
        ),
        peft_config=lora,
    )
    assert trainer.step0["max"] <= 1e-3
    after = parameters(trainer.model)
    moved = [n for n in after if "lora_B" in n and float(after[n].abs().max()) > 0]
    assert len(moved) == 4
    for name, value in before.items():
        mine = [
            v for n, v in after.items() if n.endswith(name.replace(".weight", ".base_layer.weight"))
        ]
        mine += [v for n, v in after.items() if n.endswith(name)]
        assert torch.equal(mine[0], value), name
    assert (tmp_path / "last" / "adapter_model.safetensors").exists()
    resumed = train(
        make_llama(len(tokenizer_module)),
        tokenizer_module,
        rows,
        make_config(
            tmp_path / "again", max_steps=4, learning_rate=1e-2, save_strategy="steps", save_steps=2
        ),
        peft_config=lora,
        resume_from_checkpoint=str(tmp_path / "checkpoint-2"),
    )
    same_state(resumed, trainer)


def test_reward_functions_are_checked_before_training(rows, tokenizer_module, tmp_path) -> None:
    def attempt(reward_funcs: Any, **kw: Any) -> None:
        LoLTrainer(
            make_llama(len(tokenizer_module)),
            args=make_config(tmp_path, **kw),
            train_dataset=rows,
            processing_class=tokenizer_module,
            reward_funcs=reward_funcs,
        )

    with pytest.raises(ValueError, match="reward_func_weights"):
        attempt(short_is_good, reward_func_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="reward_func_weights"):
        attempt([])
    with pytest.raises(TypeError, match="not callable"):
        attempt([short_is_good, "vader"])


def test_tensorboard_gets_the_same_figures(rows, tokenizer_module, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = run(tmp_path, rows, tokenizer_module, max_steps=3, report_to="auto")
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(events.parent))
    reader.Reload()
    lines = [x for x in trainer.state.log_history if "ratio/mean" in x]
    for name in ("loss", "ratio/mean", "kl", "entropy", *CLIPS):
        scalars = reader.Scalars(f"train/{name}")
        assert [s.step for s in scalars] == [1, 2, 3]
        assert [s.value for s in scalars] == pytest.approx([x[name] for x in lines], rel=1e-6)


@pytest.mark.parametrize("point", ["weights", "optimizer", "rng", "state", "manifest", "rotate"])
def test_a_crash_inside_save_loses_nothing(
    point: str, rows, tokenizer_module, tmp_path, monkeypatch
) -> None:
    """T4 by fault injection: whatever was being written, the run resumes to the same bits."""
    kw: dict[str, Any] = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
        "dtype": torch.float32,
    }
    whole = run(tmp_path / "whole", rows, tokenizer_module, **kw)
    target = {
        "weights": (LoLTrainer, "_save"),
        "optimizer": (LoLTrainer, "_save_optimizer_and_scheduler"),
        "rng": (LoLTrainer, "_save_rng_state"),
        "state": (lolrl.saving, "write_json"),
        "manifest": (lolrl.saving, "write_manifest"),
        "rotate": (lolrl.saving, "rotate_checkpoints"),
    }[point]
    original = getattr(*target)
    calls = []

    def crash(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    folder = tmp_path / "crashed"
    with monkeypatch.context() as patch:
        patch.setattr(*target, crash)
        with pytest.raises(KeyboardInterrupt):
            run(folder, rows, tokenizer_module, **kw)
    assert last_complete(folder).name == ("checkpoint-4" if point == "rotate" else "checkpoint-2")
    same_state(run(folder, rows, tokenizer_module, resume=True, seed=5, **kw), whole)
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-6"]


def test_filter_and_order_of_the_rows(rows, tokenizer_module, tmp_path) -> None:
    """Only rows with advantage > 0 are drawn, each update's longest first."""
    with_zero = rows.advantages.clone()
    with_zero[3] = 0.0
    trainer = run(tmp_path, rows.with_columns(advantages=with_zero), tokenizer_module, max_steps=1)
    kept = [i for i in range(27) if float(with_zero[i]) > 0]
    assert 3 not in kept and 5 < len(kept) < 27
    assert [r.line - 1 for r in trainer.train_dataset.records] == kept
    assert trainer.train_report["share_kept"] == len(kept) / 27
    lengths = trainer.train_dataset.lengths
    order = list(trainer._sampler)
    for start in range(0, len(order), 4):
        sizes = [int(lengths[i]) for i in order[start : start + 4]]
        assert sizes == sorted(sizes, reverse=True)
    batches = [b["attention_mask"].sum(1).tolist() for b in trainer.get_train_dataloader()]
    assert all(b == sorted(b, reverse=True) for b in batches)
    assert any(len(set(b)) > 2 for b in batches)


@pytest.mark.parametrize("adapter", [False, True])
def test_activation_checkpointing_changes_nothing(
    adapter, rows, tokenizer_module, tmp_path
) -> None:
    from peft import LoraConfig

    ends = []
    for switch in (False, True):
        fields = LoLConfig.__dataclass_fields__
        new = "activation_checkpointing" in fields
        model = make_llama(len(tokenizer_module), dtype=torch.float64)
        trainer = train(
            model,
            tokenizer_module,
            rows,
            make_config(
                tmp_path / str(switch),
                max_steps=3,
                **{"activation_checkpointing" if new else "gradient_checkpointing": switch},
            ),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if adapter else None,
        )
        assert model.model.gradient_checkpointing == switch
        ends.append(parameters(trainer.model))
    start = parameters(make_llama(len(tokenizer_module), dtype=torch.float64))
    for name, value in ends[0].items():
        assert (ends[1][name] - value).abs().max() <= 1e-12, name
    moved = [n for n, p in ends[0].items() if n not in start or not torch.equal(p, start[n])]
    assert moved


def test_constructor_has_trl_s_order() -> None:

    names = list(inspect.signature(LoLTrainer.__init__).parameters)[1:]
    assert names == [
        "model",
        "ref_model",
        "args",
        "data_collator",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "compute_metrics",
        "callbacks",
        "optimizers",
        "peft_config",
        "reward_funcs",
        "objective",
    ]


def test_conversations_through_every_stage(chat_tokenizer, tmp_path) -> None:
    """Messages: value head, annotation, training and evaluation by reward, from a model on disk."""
    from lolrl.config import ValueConfig
    from lolrl.value import fit_value_head

    data = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
            "reward": row["reward"],
        }
        for row in make_rows(16)
    ]
    model = make_llama(len(chat_tokenizer))
    model.save_pretrained(tmp_path / "model")
    prompts, rewards = [r["prompt"] for r in data], [r["reward"] for r in data]
    config = ValueConfig(num_heads=4, epochs=2)
    head, _ = fit_value_head(model, chat_tokenizer, prompts, rewards, config=config)
    annotated = annotate(model, chat_tokenizer, data, value_head=head, progress=False)
    seen: list[list[str]] = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.append(prompts)
        return [float(len(c)) for c in completions]

    figures = []

    def extra(prediction: Any) -> dict[str, float]:
        figures.append((prediction.predictions, prediction.label_ids.tolist(), prediction.inputs))
        return {"longest": float(max(map(len, prediction.predictions)))}

    trainer = LoLTrainer(
        str(tmp_path / "model"),
        args=make_config(
            tmp_path / "out",
            eval_strategy="steps",
            eval_steps=2,
            eval_max_new_tokens=4,
            eval_prompts=3,
        ),
        train_dataset=annotated.dataset,
        eval_dataset=data,
        processing_class=chat_tokenizer,
        compute_metrics=extra,
        reward_funcs=[reward],
    )
    trainer.train()
    assert trainer.step0["max"] <= 1e-3
    assert seen == [[r["prompt"][0]["content"] for r in data[:3]]]
    completions, values, inputs = figures[0]
    assert values == [float(len(c)) for c in completions] and inputs == seen[0]
    line = next(x for x in trainer.state.log_history if "eval_reward" in x)
    assert line["eval_reward"] == pytest.approx(sum(values) / 3)
    assert line["eval_longest"] == max(values) and line["eval_nll"] > 0
    batch = trainer.data_collator([annotated.dataset[0]])
    scored = batch["input_ids"][batch["completion_mask"]]
    said = annotated.dataset.records[0].completion[0]["content"]
    assert chat_tokenizer.decode(scored) == said + "<eos>"


def test_rows_with_reward_and_value_need_no_annotation(tokenizer_module, tmp_path) -> None:
    """A = R - V is formed from the rows' own columns."""
    data = make_rows(27)
    trainer = run(tmp_path, data, tokenizer_module, objective="a_lol_ref_free", max_steps=1)
    expected = [r["reward"] - r["value"] for r in data if r["reward"] > r["value"]]
    assert trainer.train_dataset.advantages.tolist() == expected
