"""The trainer's arithmetic: one update by hand, accumulation, fused against eager, resume."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

import lolrl.saving
from lolrl.annotate import annotate
from lolrl.checkpoints import CheckpointError, last_complete
from lolrl.config import LoLConfig, ValueConfig, load_config
from lolrl.data import DataError
from lolrl.tokens import LoLDataset
from lolrl.trainer import LoLTrainer, sft
from lolrl.value import fit_value_head
from tests.lolrl.toys import (
    build,
    make_config,
    make_llama,
    make_rows,
    parameters,
    reload,
    row_logps,
    run,
    same_parameters,
)

EVERY_ROW: dict[str, Any] = {"sampling": "uniform", "advantage_filter": "none"}


def clipped(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.exp().clamp(0.1, 1.9).detach()


# The table of objectives for one row: log-probs and reference (T,), advantage and reward.
FORMULAS: dict[str, Any] = {
    "nll": lambda lp, ref, a, r: -lp.sum(),
    "wbc": lambda lp, ref, a, r: -r * lp.sum(),
    "r_gold": lambda lp, ref, a, r: -r * (lp.exp().clamp(min=0.1).detach() * lp).sum(),
    "r_lol": lambda lp, ref, a, r: -r * clipped((lp - ref).sum()) * lp.sum(),
    "a_lol": lambda lp, ref, a, r: -a * clipped((lp - ref).sum()) * lp.sum(),
    "a_lol_seq": lambda lp, ref, a, r: -a * (clipped(lp - ref) * lp).sum(),
    "a_lol_ref_free": lambda lp, ref, a, r: -a * lp.sum(),
    "a_lol_kl": lambda lp, ref, a, r: -a * lp.sum() + 0.1 * (lp - ref).sum(),
    "r_lol_kl": lambda lp, ref, a, r: -r * lp.sum() + 0.1 * (lp - ref).sum(),
}


def loss_by_hand(model: Any, rows: LoLDataset, index: list[int], name: str) -> torch.Tensor:
    losses = []
    for i in index:
        item = rows[i]
        # Batches carry side inputs as float32.
        advantage = max(float(torch.tensor(item["advantage"]).float()), 0.0)
        reward = float(torch.tensor(item["reward"]).float())
        ref = item["ref_logps"].double()
        losses.append(FORMULAS[name](row_logps(model, item), ref, advantage, reward))
    return torch.stack(losses).mean()


def lines_of(trainer: Any) -> list[dict[str, Any]]:
    """The lines that updates have logged."""
    return [line for line in trainer.state.log_history if "entropy" in line]


@pytest.mark.parametrize("name", FORMULAS)
def test_gradient_of_one_update_is_the_formula_s(name, rows, tokenizer, tmp_path) -> None:
    """Two micro-batches of four against the eight rows at once, by hand in float64."""
    accumulated = {"gradient_accumulation_steps": 2, "max_steps": 1, "max_grad_norm": 0.0}
    trainer = run(tmp_path, rows, tokenizer, objective=name, **EVERY_ROW, **accumulated)
    index = list(trainer._sampler)[:8]
    model = make_llama(len(tokenizer), dtype=torch.float64)
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
def test_accumulation_does_not_matter(name, rows, tokenizer, tmp_path) -> None:
    """1 x 8 = 2 x 4 = 4 x 2 = 8 x 1 over 20 updates, uneven rows and a partial last window.

    Rows with a negative advantage make whole micro-batches of the 1 x 8 run empty for A-LoL.
    """
    kw = {"objective": name, "max_steps": 20, "learning_rate": 3e-3, **EVERY_ROW}

    def attempt(size: int) -> Any:
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        return run(tmp_path / str(size), rows, tokenizer, **kw, **sizes)

    whole = attempt(8)
    start = parameters(make_llama(len(tokenizer), dtype=torch.float64))
    assert max((p - start[n]).abs().max() for n, p in parameters(whole.model).items()) > 1e-3
    # 27 rows: the fourth update of an epoch has three.
    tokens = [line["completion_tokens"] for line in lines_of(whole)]
    assert tokens[3] < 0.6 * tokens[0]
    for parted in map(attempt, (4, 2, 1)):
        for key, gradient in whole.gradients[0].items():
            error = (parted.gradients[0][key] - gradient).abs().max()
            assert error <= 1e-12 * max(1.0, float(gradient.abs().max())), key
        same_parameters(parted.model, whole.model, 1e-10)
        for a, b in zip(lines_of(parted), lines_of(whole), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-9, abs=1e-12)
            assert a["ratio/max"] == pytest.approx(b["ratio/max"], rel=1e-9)


def figures_by_hand(model: Any, rows: LoLDataset, index: list[int]) -> dict[str, float]:
    logps, sums, entropy = [], [], []
    for item in (rows[i] for i in index):
        with torch.no_grad():
            logps.append(row_logps(model, item))
            every = model(input_ids=item["input_ids"][None]).logits[0].log_softmax(-1)
        sums.append(float(logps[-1].sum() - item["ref_logps"].double().sum()))
        entropy.append(-(every.exp() * every).sum(-1)[item["prompt_length"] - 1 : -1])
    ratios = torch.tensor(sums, dtype=torch.float64).exp()
    return {
        "logps/mean": float(torch.cat(logps).mean()),
        "entropy": float(torch.cat(entropy).mean()),
        "ratio/min": float(ratios.min()),
        "ratio/mean": float(ratios.mean()),
        "ratio/max": float(ratios.max()),
        "kl": sum(sums) / len(sums),
        "advantage/mean": float(rows.advantages[index].mean()),
        "reward/mean": float(rows.rewards[index].mean()),
        "positive_share": 1.0,
        "clip_ratio": float(((ratios < 0.1) | (ratios > 1.9)).double().mean()),
        "completion_tokens": float(rows.completion_lengths[index].sum()),
    }


def test_fused_equals_eager_and_the_figures_are_those_of_the_batches(
    rows, tokenizer, tmp_path
) -> None:
    """A hand-written loop with log-softmax and AdamW over several epochs, and its log lines."""
    trainer = run(tmp_path, rows, tokenizer, max_steps=20, learning_rate=1e-2, optim="adamw_torch")
    kept, stream = trainer.train_dataset, []
    for epoch in range(20):
        trainer._sampler.set_epoch(epoch)
        order = list(trainer._sampler)
        stream += [order[s : s + 4] for s in range(0, len(order), 4)]
    model = make_llama(len(tokenizer), dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-8, weight_decay=0.0)
    tokens = 0
    for index, line in zip(stream[:20], lines_of(trainer), strict=True):
        for name, value in figures_by_hand(model, kept, index).items():
            assert line[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        tokens += sum(len(kept[i]["input_ids"]) for i in index)
        assert line["num_tokens"] == tokens
        assert line["tokens_per_second"] > 0 and line["step_time"] > 0
        optimizer.zero_grad()
        loss = loss_by_hand(model, kept, index, "a_lol")
        assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-7)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    same_parameters(trainer.model, model, 1e-9)
    # The learning rate is large enough for the clip to be seen.
    assert any(0 < x["clip_ratio"] <= 1 and x["ratio/max"] > 1.9 for x in lines_of(trainer))


def test_unlearned_share_counts_rows_below_beta(rows, tokenizer, tmp_path) -> None:
    kw = {"objective": "a_lol_kl", "beta": 0.4, "max_steps": 1, **EVERY_ROW}
    trainer = run(tmp_path, rows, tokenizer, **kw)
    index = list(trainer._sampler)[:4]
    expected = float((rows.advantages[index].clamp(min=0) < 0.4).double().mean())
    assert trainer.state.log_history[0]["unlearned_share"] == expected


def test_fp32_curve_stays_with_fp64(rows, tokenizer, tmp_path) -> None:
    """Point difference 1e-4, mean difference 1e-5 of the loss, over 60 updates."""
    curves = []
    for dtype in (torch.float32, torch.float64):
        settings = {"dtype": dtype, "max_steps": 60, "learning_rate": 3e-4}
        trainer = run(tmp_path / str(dtype), rows, tokenizer, **settings)
        curves.append([line["loss"] for line in lines_of(trainer)])
    single, double = (torch.tensor(c, dtype=torch.float64) for c in curves)
    assert len(double) == 60 and float(double.max() - double.min()) > 1.0
    relative = (single - double) / double.abs().mean()
    assert float(relative.abs().max()) <= 1e-4 and abs(float(relative.mean())) <= 1e-5


def test_empty_micro_batch_is_loss_zero_and_gradient_zero(rows, tokenizer, tmp_path) -> None:
    trainer = run(tmp_path, rows, tokenizer, max_steps=1)
    batch = trainer.data_collator([rows[0], rows[1]])
    batch["completion_mask"][:] = False
    trainer.model.zero_grad()
    trainer._totals = (0.0, 0.0)
    loss = trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_prompt_and_padding_cannot_reach_the_loss(rows, tokenizer, tmp_path) -> None:
    """A masked row changes neither numerator nor denominator."""
    trainer = run(tmp_path, rows, tokenizer, max_steps=1)

    def update(batch: dict) -> tuple[float, dict[str, torch.Tensor]]:
        trainer.model.train().zero_grad()
        (batch,), count = trainer.get_batch_samples(iter([batch]), 1, "cpu")
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
        return float(loss.detach()), gradients

    items = [rows[i] for i in range(6)]
    five, six = trainer.data_collator(items[:5]), trainer.data_collator(items)
    six["completion_mask"][5] = False
    six["advantages"][5] = 1e6
    six["ref_logps"][~six["completion_mask"]] = float("nan")
    loss_five, gradients_five = update(five)
    loss_six, gradients_six = update(six)
    assert loss_six == pytest.approx(loss_five, rel=1e-12)
    for key, gradient in gradients_five.items():
        assert (gradients_six[key] - gradient).abs().max() <= 1e-12


# --- resume ---


def same_state(a: Any, b: Any) -> None:
    same_parameters(a.model, b.model)
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


def metrics_file(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "ratio/mean" in line]


def saving(every: int, updates: int, **more: Any) -> dict[str, Any]:
    return {"max_steps": updates, "save_strategy": "steps", "save_steps": every, **more}


FIGURES = ("loss", "grad_norm", "learning_rate", "ratio/min", "ratio/mean", "ratio/max", "kl")
FIGURES += ("entropy", "logps/mean", "clip_ratio", "advantage/mean", "num_tokens", "epoch")


def test_resume_is_bit_equal(rows, tokenizer, tmp_path) -> None:
    """Killed after any of these updates, the run ends with the same bits and the same log.

    Steps in the middle of an epoch, of a log window, at an epoch's end, one before the end, and the
    end itself, after which there is no update.
    """
    kw = saving(1, 12, dtype=torch.float32, logging_steps=3, learning_rate=3e-3)
    kw |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    kw |= {"lr_scheduler_type": "linear"}
    whole = run(tmp_path / "whole", rows, tokenizer, **kw)
    assert whole.state.epoch > 2
    for step in (2, 4, 7, 11, 12):
        folder = tmp_path / f"resumed{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        torch.rand(step)  # the global generator is elsewhere
        resumed = run(folder, rows, tokenizer, resume=True, seed=5, **kw)
        same_state(resumed, whole)
        again, lines = lines_of(resumed), lines_of(whole)
        assert len(again) == len(lines) == 4
        for mine, theirs in zip(again, lines, strict=True):
            for name in FIGURES:
                assert mine[name] == theirs[name], (step, name)
        after = [x["loss"] for x in metrics_file(tmp_path / "whole") if x["step"] > step]
        assert [x["loss"] for x in metrics_file(folder)] == after
    no_pickle(tmp_path)
    # The test can tell: a run from other weights ends elsewhere.
    other = run(tmp_path / "other", rows, tokenizer, seed=5, step0_gate=False, **kw)
    with pytest.raises(AssertionError):
        same_state(other, whole)


def test_resume_with_dropout_is_bit_equal(rows, tokenizer, tmp_path) -> None:
    """The global generator is restored too, so dropout draws what it would have drawn."""

    def attempt(folder: str, resume: str | None = None) -> Any:
        model = make_llama(len(tokenizer), attention_dropout=0.2)
        kw = saving(2, 6, objective="nll", disable_dropout=False)
        return run(tmp_path / folder, rows, tokenizer, model=model, resume=resume, **kw)

    whole = attempt("whole")
    for step in (2, 4):
        same_state(attempt("b", str(tmp_path / "whole" / f"checkpoint-{step}")), whole)


def test_metrics_file_after_a_crash_has_each_step_once(rows, tokenizer, tmp_path) -> None:
    run(tmp_path, rows, tokenizer, **saving(2, 4))
    shutil.rmtree(tmp_path / "checkpoint-4")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # torn by a crash
    run(tmp_path, rows, tokenizer, resume=True, **saving(2, 4))
    assert [line["step"] for line in metrics_file(tmp_path)] == [1, 2, 3, 4]


def test_damaged_checkpoints_are_not_resumed_from(rows, tokenizer, tmp_path) -> None:
    kw = saving(1, 4)
    run(tmp_path, rows, tokenizer, **kw)
    (tmp_path / "checkpoint-4" / "manifest.json").unlink()
    weights = tmp_path / "checkpoint-3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    state = tmp_path / "checkpoint-2" / "optimizer.safetensors"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(bytes(data))
    assert last_complete(tmp_path).name == "checkpoint-1"
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors does not match"):
        run(tmp_path, rows, tokenizer, resume=str(tmp_path / "checkpoint-2"), **kw)
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        run(tmp_path, rows, tokenizer, resume=True, **kw)


def test_resume_with_other_rows_is_refused(rows, tokenizer, tmp_path) -> None:
    run(tmp_path, rows, tokenizer, **saving(2, 4))
    changed: list[tuple[dict[str, Any], str]] = [
        ({"data_seed": 1}, "seed"),
        ({"given": {"args": make_config(tmp_path, **saving(2, 4, seed=1))}}, "seed"),
        ({"per_device_train_batch_size": 2}, "update_batch_size"),
        ({"sampling": "uniform"}, "weights"),
        (EVERY_ROW, "num_rows"),
    ]
    for changes, field in changed:
        with pytest.raises(CheckpointError, match=field):
            run(tmp_path, rows, tokenizer, resume=True, **saving(2, 4, **changes))


CRASHES = {
    "weights": (LoLTrainer, "_save"),
    "optimizer": (LoLTrainer, "_save_optimizer_and_scheduler"),
    "rng": (LoLTrainer, "_save_rng_state"),
    "state": (lolrl.saving, "write_json"),
    "manifest": (lolrl.saving, "write_manifest"),
    "rotate": (lolrl.saving, "rotate_checkpoints"),
}


def test_a_crash_inside_save_loses_nothing(rows, tokenizer, tmp_path, monkeypatch) -> None:
    """Whatever was being written, the run resumes to the same bits."""
    kw = saving(2, 6, save_total_limit=1, dtype=torch.float32)
    whole = run(tmp_path / "whole", rows, tokenizer, **kw)
    for point, target in CRASHES.items():
        original, calls = getattr(*target), []

        def crash(*args: Any, original: Any = original, calls: list = calls, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(*args, **options)

        folder = tmp_path / point
        with monkeypatch.context() as patch:
            patch.setattr(*target, crash)
            with pytest.raises(KeyboardInterrupt):
                run(folder, rows, tokenizer, **kw)
        left = "checkpoint-4" if point == "rotate" else "checkpoint-2"
        assert last_complete(folder).name == left, point
        same_state(run(folder, rows, tokenizer, resume=True, seed=5, **kw), whole)
        assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-6"]


# --- what the run leaves behind ---


def short_is_good(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    assert columns.keys() == {"index"}
    return [-float(len(c)) for c in completions]


def test_evaluation_best_and_last(rows, tokenizer, tmp_path) -> None:
    """The best evaluation's model is in best/, the final one in last/, and both load."""
    evaluated = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, model=None, **kw) -> None:
            evaluated.append((metrics["eval_reward"], parameters(model)))

    data = [{**r, "index": i} for i, r in enumerate(make_rows(4))]
    given = {"eval_dataset": data, "reward_funcs": short_is_good, "callbacks": [Watch()]}
    settings = {"max_steps": 6, "learning_rate": 2e-2, "save_best_and_last": True}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "eval_max_new_tokens": 8}
    trainer = run(tmp_path, rows, tokenizer, dtype=torch.float32, given=given, **settings)
    assert len(evaluated) == 3 and trainer.args.metric_for_best_model == "reward"
    best = max(evaluated, key=lambda at: at[0])
    assert trainer.state.best_metric == best[0]
    assert trainer.best_model_dir == tmp_path / "best"
    for folder, values in (("best", best[1]), ("last", evaluated[-1][1])):
        stored = parameters(reload(tmp_path / folder))
        assert all(torch.equal(stored[key], value) for key, value in values.items())
    line = next(x for x in trainer.state.log_history if "eval_reward" in x)
    assert {"eval_reward", "eval_reward_std", "eval_length", "eval_nll"} <= set(line)
    assert trainer.summary["updates"] == 6 and trainer.summary["rows"] == 27
    no_pickle(tmp_path)


def test_evaluation_does_not_disturb_training(rows, tokenizer, tmp_path) -> None:
    def attempt(folder: str, **more: Any) -> Any:
        model = make_llama(len(tokenizer), attention_dropout=0.2)
        kw = {"max_steps": 4, "disable_dropout": False, "objective": "nll", **more}
        return run(tmp_path / folder, rows, tokenizer, model=model, **kw)

    reward = {"reward_funcs": lambda prompts, completions, **columns: [0.0] * len(prompts)}
    loud = {"eval_strategy": "steps", "eval_steps": 1, "eval_max_new_tokens": 4}
    loud |= {"eval_temperature": 1.0, "given": {"eval_dataset": rows, **reward}}
    same_state(attempt("loud", **loud), attempt("quiet"))


def test_evaluation_figures(rows, tokenizer, tmp_path) -> None:
    settings = {"objective": "a_lol_seq", "per_device_eval_batch_size": 5}
    trainer = build(tmp_path, rows, tokenizer, given={"eval_dataset": rows}, **settings)
    metrics = trainer.evaluate()
    model, every = make_llama(len(tokenizer), dtype=torch.float64).eval(), list(range(27))
    with torch.no_grad():
        loss = float(loss_by_hand(model, rows, every, "a_lol_seq"))
        nll = float(27 * loss_by_hand(model, rows, every, "nll") / rows.completion_lengths.sum())
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["eval_nll"] == pytest.approx(nll, rel=1e-6)


def test_sft_lowers_the_loss_and_uses_every_row(tokenizer, tmp_path) -> None:
    args = make_config(tmp_path, max_steps=40, learning_rate=1e-2, save_best_and_last=True)
    trainer = sft(make_llama(len(tokenizer)), tokenizer, make_rows(27), args)
    losses = [line["loss"] for line in lines_of(trainer)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert trainer.objective_name == "nll" and trainer.train_report["share_kept"] == 1.0
    assert trainer.step0 is None and args.objective == "a_lol"
    stored = parameters(reload(trainer.last_model_dir))
    trained = dict(trainer.model.named_parameters())
    assert all(torch.equal(trained[key], value) for key, value in stored.items())


def test_a_callable_objective(rows, tokenizer, tmp_path) -> None:
    def focal(logps, advantages, seq, *, power: float = 1.0):
        return -advantages.clamp(min=0) * seq.sum(logps) * power

    settings = {"sampling": "advantage", "advantage_filter": "positive"}
    mine = run(tmp_path / "a", rows, tokenizer, given={"objective": focal}, **settings)
    known = run(tmp_path / "b", rows, tokenizer, objective="a_lol_ref_free")
    same_parameters(mine.model, known.model, 1e-12)
    start = make_llama(len(tokenizer), dtype=torch.float64)
    settings |= {"given": {"objective": focal}, "objective_args": {"power": 0.0}}
    same_parameters(run(tmp_path / "c", rows, tokenizer, **settings).model, start)
    settings["objective_args"] = {"powder": 1}
    with pytest.raises(ValueError, match="no option 'powder'"):
        build(tmp_path / "d", rows, tokenizer, **settings)


def test_non_finite_gradients_are_left_out_and_counted(rows, tokenizer, tmp_path) -> None:
    """A poisoned update changes nothing; five in a row stop the run."""

    class Poison(TrainerCallback):
        def __init__(self, steps: set[int]) -> None:
            self.steps = steps

        def on_train_begin(self, args, state, control, model=None, **kw) -> None:
            def spoil(grad: torch.Tensor) -> torch.Tensor:
                return grad * float("nan") if state.global_step in self.steps else grad

            model.model.norm.weight.register_hook(spoil)

    def attempt(folder: str, steps: set[int]) -> Any:
        given = {"callbacks": [Poison(steps)]}
        return run(tmp_path / folder, rows, tokenizer, given=given, max_steps=8)

    trainer = attempt("two", {1, 4})
    assert trainer.summary["skipped_steps"] == 2
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
    with pytest.raises(RuntimeError, match="5 updates in a row"):
        attempt("many", set(range(8)))


def test_missing_inputs_are_named(rows, tokenizer, tmp_path) -> None:
    bare = rows.with_columns(advantages=None, rewards=None)
    no_reward = make_rows(5)
    del no_reward[3]["reward"]
    negative = rows.with_columns(advantages=-torch.ones(27).double())
    prompts, several = {"eval_dataset": [{"prompt": "a"}]}, make_config(tmp_path)
    several._n_gpu = 2
    refused: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (bare, {}, DataError, "'advantage': is missing, and a_lol needs"),
        (bare, {"objective": "wbc"}, DataError, "'reward': is missing, and wbc needs"),
        (no_reward, {"objective": "wbc"}, DataError, "line 4, field 'reward'"),
        (negative, {}, ValueError, "positive advantage"),
        (bare, {"objective": "nll", "sampling": "advantage"}, ValueError, "sampling='advantage'"),
        (
            bare,
            {"objective": "nll", "advantage_filter": "positive"},
            ValueError,
            "advantage_filter",
        ),
        (rows, {"given": {"processing_class": None}}, ValueError, "processing_class"),
        (rows, {"given": {"args": several}}, ValueError, "2 GPUs"),
        (rows, {"given": {"args": 3}}, TypeError, "LoLConfig"),
        (rows, {"given": prompts}, ValueError, "reward_funcs"),
        (
            rows,
            {"given": {"reward_funcs": short_is_good}, "reward_func_weights": [1.0, 2.0]},
            ValueError,
            "reward_func_weights",
        ),
        (rows, {"given": {"reward_funcs": []}}, ValueError, "reward_func_weights"),
        (rows, {"given": {"reward_funcs": [short_is_good, "vader"]}}, TypeError, "not callable"),
    ]
    for data, arguments, error, message in refused:
        with pytest.raises(error, match=message):
            build(tmp_path, data, tokenizer, **arguments)


def test_reference_is_scored_when_rows_have_no_scores(rows, tokenizer, tmp_path) -> None:
    """Rows without ref_logps are scored by ref_model or the initial policy, and cached."""
    bare = rows.with_columns(ref_logps=None)
    trainer = run(tmp_path / "a", bare, tokenizer)
    same_state(trainer, run(tmp_path / "b", rows, tokenizer))
    assert (tmp_path / "a" / "annotations" / "annotations.json").exists()
    reference = make_llama(len(tokenizer), dtype=torch.float64, seed=9)
    other = build(tmp_path / "c", bare, tokenizer, given={"ref_model": reference})
    gap = other.train_dataset.ref_logps[0] - trainer.train_dataset.ref_logps[0]
    assert float(gap.abs().max()) > 0.1


def test_peft(rows, tokenizer, tmp_path) -> None:
    """LoRA: only the adapter moves, the gate passes, and the adapter is saved and resumed."""
    lora = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
    kw = saving(2, 4, learning_rate=1e-2, save_best_and_last=True, dtype=torch.float32)
    kw["given"] = {"peft_config": lora}
    trainer = run(tmp_path, rows, tokenizer, **kw)
    assert trainer.step0["max"] <= 1e-3
    after = parameters(trainer.model)
    moved = [n for n in after if "lora_B" in n and float(after[n].abs().max()) > 0]
    assert len(moved) == 4
    for name, value in parameters(make_llama(len(tokenizer))).items():
        ends = (name, name.replace(".weight", ".base_layer.weight"))
        (mine,) = (v for n, v in after.items() if n.endswith(ends))
        assert torch.equal(mine, value), name
    assert (tmp_path / "last" / "adapter_model.safetensors").exists()
    resume = str(tmp_path / "checkpoint-2")
    same_state(run(tmp_path / "again", rows, tokenizer, resume=resume, **kw), trainer)


def test_tensorboard_gets_the_same_figures(rows, tokenizer, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = run(tmp_path, rows, tokenizer, max_steps=3, report_to="auto")
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(events.parent))
    reader.Reload()
    for name in ("loss", "ratio/mean", "kl", "entropy", "clip_ratio"):
        scalars = reader.Scalars(f"train/{name}")
        assert [s.step for s in scalars] == [1, 2, 3]
        logged = [line[name] for line in lines_of(trainer)]
        assert [s.value for s in scalars] == pytest.approx(logged, rel=1e-6)


def test_filter_and_order_of_the_rows(rows, tokenizer, tmp_path) -> None:
    """Only rows with advantage > 0 are drawn, each update's longest first; the file says so."""
    with_zero = rows.advantages.clone()
    with_zero[3] = 0.0
    trainer = run(tmp_path, rows.with_columns(advantages=with_zero), tokenizer, max_steps=1)
    kept = [i for i in range(27) if float(with_zero[i]) > 0]
    assert 3 not in kept and 5 < len(kept) < 27
    assert [r.line - 1 for r in trainer.train_dataset.records] == kept
    assert trainer.train_report["share_kept"] == len(kept) / 27
    batches = [b["attention_mask"].sum(1).tolist() for b in trainer.get_train_dataloader()]
    assert all(b == sorted(b, reverse=True) for b in batches)
    assert any(len(set(b)) > 2 for b in batches)
    back = load_config(LoLConfig, tmp_path / "config.yaml")
    chosen = (back.sampling, back.advantage_filter, back.objective)
    assert chosen == ("advantage", "positive", "a_lol")


# Its name, and the one it had before.
CHECKPOINTING = {"activation_checkpointing", "gradient_checkpointing"}


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("flag", sorted(CHECKPOINTING & LoLConfig.__dataclass_fields__.keys()))
def test_activation_checkpointing_changes_nothing(flag, adapter, rows, tokenizer, tmp_path) -> None:
    ends = []
    for switch in (False, True):
        model = make_llama(len(tokenizer), dtype=torch.float64)
        lora = LoraConfig(r=2, target_modules=["q_proj"]) if adapter else None
        kw = {"max_steps": 3, flag: switch, "given": {"peft_config": lora}}
        ends.append(run(tmp_path / str(switch), rows, tokenizer, model=model, **kw).model)
        assert model.model.gradient_checkpointing == switch
    same_parameters(*ends, 1e-12)
    start = parameters(make_llama(len(tokenizer), dtype=torch.float64))
    moved = parameters(ends[0]).items()
    assert any(n not in start or not torch.equal(p, start[n]) for n, p in moved)


def test_constructor_has_trl_s_order() -> None:
    names = list(inspect.signature(LoLTrainer.__init__).parameters)[1:]
    assert names[:5] == ["model", "ref_model", "args", "data_collator", "train_dataset"]
    assert names[5:8] == ["eval_dataset", "processing_class", "compute_metrics"]
    assert names[8:] == ["callbacks", "optimizers", "peft_config", "reward_funcs", "objective"]


def test_conversations_through_every_stage(chat_tokenizer, tmp_path) -> None:
    """Messages: value head, annotation, training and evaluation by reward, from a model on disk."""
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
    annotated = annotate(model, chat_tokenizer, data, value_head=head, progress=False).dataset
    seen, predictions = [], []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.append(prompts)
        return [float(len(c)) for c in completions]

    def extra(prediction: Any) -> dict[str, float]:
        predictions.append(prediction)
        return {"longest": float(max(map(len, prediction.predictions)))}

    given = {"eval_dataset": data, "reward_funcs": [reward], "compute_metrics": extra}
    settings = {"eval_strategy": "steps", "eval_steps": 2, "eval_prompts": 3}
    settings |= {"model": str(tmp_path / "model"), "eval_max_new_tokens": 4}
    trainer = run(tmp_path / "out", annotated, chat_tokenizer, given=given, **settings)
    assert trainer.step0["max"] <= 1e-3
    assert seen == [[r["prompt"][0]["content"] for r in data[:3]]]
    values = [float(len(c)) for c in predictions[0].predictions]
    assert predictions[0].label_ids.tolist() == values and predictions[0].inputs == seen[0]
    line = next(x for x in trainer.state.log_history if "eval_reward" in x)
    assert line["eval_reward"] == pytest.approx(sum(values) / 3)
    assert line["eval_longest"] == max(values) and line["eval_nll"] > 0
    batch = trainer.data_collator([annotated[0]])
    scored = batch["input_ids"][batch["completion_mask"]]
    said = annotated.records[0].completion[0]["content"]
    assert chat_tokenizer.decode(scored) == said + "<eos>"


def test_rows_with_reward_and_value_need_no_annotation(tokenizer, tmp_path) -> None:
    """A = R - V is formed from the rows' own columns."""
    data = make_rows(27)
    trainer = build(tmp_path, data, tokenizer, objective="a_lol_ref_free")
    expected = [r["reward"] - r["value"] for r in data if r["reward"] > r["value"]]
    assert trainer.train_dataset.advantages.tolist() == expected
