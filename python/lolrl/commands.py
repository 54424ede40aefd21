"""What each verb of the command line does: its options, the stage it calls, its summary.

A verb is an options class and a function. Every function writes `run.yaml` into its output folder:
the options and fields it was given, which `lolrl VERB --config run.yaml` repeats.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import yaml

from lolrl.config import AnnotateConfig, ConfigError, LoLConfig, ValueConfig, from_mapping
from lolrl.files import write_atomic, write_json, write_jsonl
from lolrl.flags import take
from lolrl.options import (
    AnnotateOptions,
    DemoOptions,
    EvaluateOptions,
    SftOptions,
    TrainOptions,
)

Mapping = dict[str, Any]


def _echo(verb: str, given: Mapping, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(given, sort_keys=True, allow_unicode=True)
    write_atomic(output / "run.yaml", f"# lolrl {verb} --config run.yaml\n{text}".encode())


def _prompt_rows(path: str) -> list[Any]:
    from lolrl.data import read_prompts

    return list(read_prompts(path))


def _bars() -> bool:
    return sys.stderr.isatty()


def _config(merged: Mapping, output: str, **fixed: Any) -> LoLConfig:
    # Without a terminal the trainer prints its log lines in place of a bar.
    defaults = {"disable_tqdm": not _bars()}
    mapping = defaults | merged | fixed | {"output_dir": output}
    return from_mapping(LoLConfig, mapping, source="options")


def _trained(trainer: Any, verb: str, output: Path) -> list[str]:
    summary = dict(getattr(trainer, "summary", None) or {})
    write_json(output / "summary.json", summary)
    last = next((r for r in reversed(trainer.state.log_history) if r.get("loss") is not None), {})
    loss = f", last loss {last['loss']:.4f}" if last else ""
    lines = [f"{verb}: {trainer.state.global_step} updates{loss}"]
    lines += [f"model: {trainer.last_model_dir}", f"log: {output / 'metrics.jsonl'}"]
    return lines


def _refuse_rest(verb: str, merged: Mapping) -> None:
    if merged:
        raise ConfigError(f"{verb} has no option {next(iter(merged))!r}")


def run_sft(merged: Mapping) -> list[str]:
    """Fine-tune `model` on `data` (objective nll): the reference of the later stages."""
    given = dict(merged)
    options = take(SftOptions, merged, required=("model", "data", "output_dir"))
    output = Path(str(options.output_dir))
    if merged.get("objective", "nll") != "nll":
        raise ConfigError(f"sft has objective nll: give {merged['objective']!r} to lolrl train")
    config = _config(merged, str(output), objective="nll")
    from lolrl.policies import lora
    from lolrl.trainer import sft

    model, tokenizer = options.load()
    _echo("sft", given, output)
    trainer = sft(
        model,
        tokenizer,
        options.data,
        config,
        eval_data=options.eval_data,
        peft_config=lora(options.lora_rank),
        resume_from_checkpoint=_checkpoint(options.resume),
    )
    return _trained(trainer, "sft", output)


def run_annotate(merged: Mapping) -> list[str]:
    """Score `data` with the reference and turn rewards into advantages: annotated.jsonl."""
    given = dict(merged)
    options = take(AnnotateOptions, merged, required=("model", "data", "output_dir"))
    config = from_mapping(AnnotateConfig, merged, source="options")
    if options.value_data is not None and options.reward is None:
        raise ConfigError("--value-data needs --reward: the reference's answers are rewarded by it")
    if options.value_data is not None and options.value_head is not None:
        raise ConfigError("--value-data and --value-head exclude each other: give one")
    from lolrl.annotate import annotate, call_reward_funcs
    from lolrl.rewards import reward_by_name
    from lolrl.sampling import generate
    from lolrl.tokens import prompt_text
    from lolrl.value import ValueHead, fit_value_head

    reward = None if options.reward is None else reward_by_name(options.reward)
    model, tokenizer = options.load()
    output = Path(str(options.output_dir))
    _echo("annotate", given, output)
    head, lines = None, []
    if options.value_head is not None:
        head = ValueHead.load(options.value_head)
    elif options.value_data is not None and reward is not None:
        prompts = [row.prompt for row in _prompt_rows(options.value_data)]
        answers = generate(
            model,
            tokenizer,
            prompts,
            max_prompt_length=config.max_prompt_length,
            progress=_bars(),
            **options.sampling(),
        )
        head, fit = fit_value_head(
            model,
            tokenizer,
            prompts,
            call_reward_funcs(reward, [prompt_text(p) for p in prompts], answers),
            config=ValueConfig(
                epochs=options.value_epochs,
                learning_rate=options.value_learning_rate,
                seed=options.seed,
            ),
            max_prompt_length=config.max_prompt_length,
        )
        head.save(output / "value_head")
        lines.append(f"value head: R2 {fit.r2:.3f} on {fit.num_held_out} held-out prompts")
    annotated = annotate(
        model,
        tokenizer,
        options.data,
        value_head=head,
        reward_funcs=reward,
        config=config,
        progress=_bars(),
    )
    write_jsonl(output / "annotated.jsonl", annotated_rows(annotated.dataset))
    write_json(output / "summary.json", annotated.report)
    report = annotated.report
    lines.append(f"annotate: {report['num_kept']} of {report['num_rows']} rows kept")
    return [*lines, f"rows: {output / 'annotated.jsonl'}"]


def annotated_rows(dataset: Any) -> list[Mapping]:
    """The rows of an annotated dataset as JSON Lines rows, one log-prob per completion token."""
    rows = []
    for index, record in enumerate(dataset.records):
        row = dict(record.columns) | {"prompt": record.prompt, "completion": record.completion}
        for column, key in (
            (dataset.rewards, "reward"),
            (dataset.values, "value"),
            (dataset.advantages, "advantage"),
        ):
            if column is not None:
                row[key] = float(column[index])
        rows.append(row | {"ref_logps": dataset.ref_logps[index].tolist()})
    return rows


def run_train(merged: Mapping) -> list[str]:
    """Train a policy on rewarded data by any objective."""
    given = dict(merged)
    options = take(TrainOptions, merged, required=("model", "data", "output_dir"))
    output = Path(str(options.output_dir))
    config = _config(merged, str(output))
    from lolrl.policies import lora
    from lolrl.rewards import reward_by_name
    from lolrl.trainer import train

    reward = None if options.reward is None else reward_by_name(options.reward)
    model, tokenizer = options.load()
    reference = options.load(options.ref_model)[0] if options.ref_model is not None else None
    _echo("train", given, output)
    trainer = train(
        model,
        tokenizer,
        options.data,
        config,
        eval_data=options.eval_data,
        ref_model=reference,
        reward_funcs=reward,
        peft_config=lora(options.lora_rank),
        resume_from_checkpoint=_checkpoint(options.resume),
    )
    return _trained(trainer, f"train {config.objective}", output)


def _checkpoint(resume: str | None) -> str | bool | None:
    if resume is None:
        return None
    if resume == "last":
        return True
    if not Path(resume).is_dir():
        raise ConfigError(f"--resume {resume!r} is not a checkpoint folder")
    return resume


def run_evaluate(merged: Mapping) -> list[str]:
    """Measure a policy, and its reference, on held-out prompts."""
    given = dict(merged)
    options = take(EvaluateOptions, merged, required=("model", "data", "reward", "output_dir"))
    _refuse_rest("evaluate", merged)
    from lolrl import report
    from lolrl.evaluate import evaluate
    from lolrl.rewards import RidgeJudge, reward_by_name

    reward = reward_by_name(str(options.reward))
    prompts = [row.prompt for row in _prompt_rows(str(options.data))]
    judge = None
    if options.judge_data is not None:
        judge = RidgeJudge.fit(*_rated(options.judge_data), seed=options.seed)
    output = Path(str(options.output_dir))
    model, tokenizer = options.load()
    reference = baseline = None
    shared: Mapping = {"judge": judge, "progress": _bars()} | options.sampling()
    _echo("evaluate", given, output)
    reports = []
    if options.reference is not None:
        reference, _ = options.load(options.reference)
        baseline = evaluate(
            reference, tokenizer, prompts, reward, name="reference", reference=reference, **shared
        )
        reports.append(baseline)
    # The last folder alone is often called "last" or "best".
    name = "/".join(Path(str(options.model)).parts[-2:])
    reports.append(
        evaluate(
            model,
            tokenizer,
            prompts,
            reward,
            name=name,
            reference=reference,
            baseline=baseline,
            **shared,
        )
    )
    rows = [r.to_dict() for r in reports]
    write_json(output / "results.json", {"seed": options.seed, "rows": rows})
    write_jsonl(
        output / "samples.jsonl", [{"method": r.name} | row for r in reports for row in r.samples]
    )
    table = report.results_table(rows)
    write_atomic(output / "results.md", f"{table}\n".encode())
    return [table, "", report.legend(), "", f"everything: {output}"]


def _rated(path: str) -> tuple[list[str], list[float]]:
    from lolrl.data import read_records
    from lolrl.rewards import full_texts

    texts, ratings = [], []
    for record in read_records(path):
        rating = record.columns.get("rating")
        if isinstance(rating, bool) or not isinstance(rating, (int, float)):
            raise record.error("rating", f"is {rating!r}", "give the human rating as a number")
        texts += full_texts([record.prompt], [record.completion])
        ratings.append(float(rating))
    return texts, ratings


def run_demo(merged: Mapping) -> list[str]:
    """The whole recipe on real movie reviews."""
    given = dict(merged)
    options = take(DemoOptions, merged)
    from lolrl.demo import SETTINGS, run_demo
    from lolrl.settings import DemoSettings

    if options.model not in SETTINGS:
        raise ConfigError(f"--model {options.model!r} must be one of {sorted(SETTINGS)}")
    start = dataclasses.asdict(SETTINGS[options.model])
    settings = from_mapping(DemoSettings, start | merged, source="options")
    settings = dataclasses.replace(settings, methods=tuple(settings.methods))
    output = Path(options.output_dir)
    _echo("demo", given, output)
    run_demo(
        output,
        settings=settings,
        seed=options.seed,
        seeds=options.seeds,
        data_dir=None if options.data_dir is None else Path(options.data_dir),
    )
    return []


def run_plan(merged: Mapping) -> list[str]:
    """The largest batch that a given memory holds, by formula."""
    from lolrl.plan import PlanOptions

    options = take(PlanOptions, merged, required=("model_shape", "memory"))
    _refuse_rest("plan", merged)
    return [options.report()]


def run_env(merged: Mapping) -> list[str]:
    """Versions, backends and device, for a bug report."""
    from lolrl.env import environment_text

    return [environment_text()]
