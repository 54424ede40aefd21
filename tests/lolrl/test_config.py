"""Configuration: every field explained, strict in, the same out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lolkernels as lk
from lolrl.config import (
    AnnotateConfig,
    ConfigError,
    LoLConfig,
    ValueConfig,
    dump_config,
    from_mapping,
    load_config,
    load_yaml,
    to_mapping,
)

CPU = {"use_cpu": True, "report_to": "none"}


def test_every_field_has_help() -> None:
    own = {f.name for f in dataclasses.fields(LoLConfig)} - {
        f.name for f in dataclasses.fields(LoLConfig.__mro__[1])
    }
    assert len(own) >= 25
    for cls in (LoLConfig, AnnotateConfig, ValueConfig):
        for field in dataclasses.fields(cls):
            if cls is not LoLConfig or field.name in own:
                assert len(field.metadata.get("help", "")) > 10, field.name


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"objective": "ppo2"}, "objective"),
        ({"clip": 0}, "clip"),
        ({"clip": 0.0}, "clip"),
        ({"clip": -0.5}, "clip"),
        ({"clip": float("nan")}, "clip"),
        ({"clip": float("inf")}, "clip"),
        ({"beta": -1.0}, "beta"),
        ({"floor": float("nan")}, "floor"),
        ({"temperature": 0.0}, "temperature"),
        ({"advantage_filter": "some"}, "advantage_filter"),
        ({"sampling": "random"}, "sampling"),
        ({"step0_tolerance": 0}, "step0_tolerance"),
        ({"step0_rows": 0}, "step0_rows"),
        ({"memory_budget": 0}, "memory_budget"),
        ({"max_prompt_length": 0}, "max_prompt_length"),
        ({"max_completion_length": -3}, "max_completion_length"),
        ({"reward_columns": []}, "reward_columns"),
        ({"reward_columns": ["a", "a"]}, "reward_columns"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights"),
        ({"reward_weights": [float("inf")]}, "reward_weights"),
        ({"reward_func_weights": [float("nan")]}, "reward_func_weights"),
        ({"on_bad": "ignore"}, "on_bad"),
        ({"stale_cache": "use"}, "stale_cache"),
        ({"eval_top_p": 0.0}, "eval_top_p"),
        ({"eval_top_p": 1.5}, "eval_top_p"),
        ({"eval_temperature": -1.0}, "eval_temperature"),
        ({"objective_args": [1]}, "objective_args"),
        ({"reduction": "mean"}, "reduction"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
    ],
)
def test_a_value_out_of_range_names_its_field(changes: dict, name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=name):
        LoLConfig(output_dir=str(tmp_path), **CPU, **changes)


def test_clip_none_is_the_only_way_to_say_off(tmp_path: Path) -> None:
    assert LoLConfig(output_dir=str(tmp_path), clip=None, **CPU).clip is None
    with pytest.raises(ConfigError, match="null switches it off"):
        LoLConfig(output_dir=str(tmp_path), clip=0.0, **CPU)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_heads": 0}, "num_heads"),
        ({"dropout": 1.0}, "dropout"),
        ({"held_out": 0.0}, "held_out"),
        ({"held_out": 1.0}, "held_out"),
        ({"min_value": 1.0, "max_value": 1.0}, "min_value"),
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ],
)
def test_value_config_refuses(changes: dict, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        ValueConfig(**changes)


@settings(max_examples=60)
@given(
    objective=st.sampled_from(sorted(lk.objectives.REGISTRY)),
    clip=st.none() | st.just("auto") | st.floats(1e-6, 1e6),
    beta=st.just("auto") | st.floats(0, 1e9),
    rate=st.floats(1e-12, 1.0),
    columns=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=3, unique=True),
    options=st.none()
    | st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False) | st.text()),
    steps=st.integers(1, 10**9),
)
def test_round_trip_through_yaml(
    tmp_path_factory, objective, clip, beta, rate, columns, options, steps
) -> None:
    """RELIABILITY 3.2, property 20: load(dump(c)) == c."""
    config = LoLConfig(
        output_dir="runs/x",
        objective=objective,
        clip=clip,
        beta=beta,
        learning_rate=rate,
        reward_columns=columns,
        objective_args=options,
        max_steps=steps,
        **CPU,
    )
    path = dump_config(config, tmp_path_factory.mktemp("config") / "config.yaml")
    back = load_config(LoLConfig, path)
    assert to_mapping(back) == to_mapping(config)
    for field in ("objective", "clip", "beta", "learning_rate", "objective_args", "max_steps"):
        assert getattr(back, field) == getattr(config, field)


def test_text_of_a_number_is_a_number_and_another_word_is_refused(tmp_path: Path) -> None:
    def config(**changes: object) -> LoLConfig:
        return LoLConfig(output_dir=str(tmp_path), **CPU, **changes)

    assert (config().clip, config().beta, config().floor) == ("auto", "auto", "auto")
    assert config(clip="5e-1", beta="0.25").clip == 0.5
    for name in ("clip", "beta", "floor"):
        for value in ("small", True, [0.9], "nan"):
            with pytest.raises(ConfigError, match=name):
                config(**{name: value})
    for name in ("beta", "floor"):
        with pytest.raises(ConfigError, match=f"{name}=None must be a number, or auto"):
            config(**{name: None})


def test_the_choices_are_the_registry(tmp_path: Path) -> None:
    def fresh(logps, seq):
        return -seq.sum(logps)

    with pytest.raises(ConfigError, match="fresh"):
        LoLConfig(output_dir=str(tmp_path), objective="fresh", **CPU)
    lk.objectives.objective()(fresh)
    try:
        assert LoLConfig(output_dir=str(tmp_path), objective="fresh", **CPU).objective == "fresh"
    finally:
        del lk.objectives.REGISTRY["fresh"]


def test_secrets_are_not_written(tmp_path: Path) -> None:
    config = LoLConfig(output_dir=str(tmp_path), hub_token="s3cret", **CPU)
    path = dump_config(config, tmp_path / "config.yaml")
    assert "s3cret" not in path.read_text() and "hub_token" not in path.read_text()
    assert load_config(LoLConfig, path).hub_token is None


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("output_dir: a\nclip: 0.5\nlearning_rate: 1e-4\nuse_cpu: true\n")
    config = load_config(LoLConfig, path, {"clip": None, "max_steps": 7})
    assert (config.clip, config.max_steps, config.output_dir) == (None, 7, "a")
    # YAML 1.1 reads 1e-4 as a string; the field is a number.
    assert config.learning_rate == 1e-4


BAD_YAML = {
    "unknown key": ("cilp: 0.5\n", "did you mean 'clip'"),
    "duplicate key": ("clip: 0.5\nclip: 0.6\n", "given twice"),
    "nested duplicate": ("objective_args: {a: 1, a: 2}\n", "given twice"),
    "python tag": ("clip: !!python/object/apply:os.system ['touch CANARY']\n", "not plain YAML"),
    "python name": ("clip: !!python/name:os.system\n", "not plain YAML"),
    "alias": ("objective_args: &x {a: 1}\nreward_columns: *x\n", "aliases"),
    "list": ("- 1\n- 2\n", "mapping"),
    "scalar": ("hello\n", "mapping"),
    "not yaml": ("clip: [1, 2\n", "not plain YAML"),
    "unhashable key": ("? [1, 2]\n: 3\n", "plain name"),
    "number as key": ("1: 2\n", "mapping"),
    "wrong type": ("max_steps: many\n", "max_steps='many' must be an integer"),
    "float for int": ("step0_rows: 1.5\n", "must be an integer"),
    "string for bool": ("step0_gate: 'yes please'\n", "must be true or false"),
    "string for list": ("reward_columns: reward\n", "must be a list"),
    "list for float": ("clip: [0.9]\n", "must be a number"),
    "bool for float": ("clip: true\n", "must be a number"),
    "word for float": ("beta: small\n", "must be a number"),
    "number for string": ("objective: 3\n", "must be a string"),
    "not utf-8": (b"clip: \xff\xfe\n", "not UTF-8"),
    "deep": ("a: " + "[" * 5000 + "]" * 5000 + "\n", "nested"),
    "deep blocks": ("".join(" " * i + "a:\n" for i in range(60)), "nested"),
    "long": ("# " + "x" * (1 << 16) + "\n", "64 KiB"),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_bad_yaml_names_the_file(name: str, tmp_path: Path, monkeypatch) -> None:
    text, message = BAD_YAML[name]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(LoLConfig, path, {"output_dir": str(tmp_path), "use_cpu": True})
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "CANARY").exists()


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_yaml(tmp_path / "empty.yaml") == {}


def test_annotate_config_refuses() -> None:
    for changes, name in (
        ({"autocast": "fp8"}, "autocast"),
        ({"keep": "best"}, "keep"),
        ({"batch_size": 0}, "batch_size"),
        ({"temperature": -1.0}, "temperature"),
        ({"reward_columns": []}, "reward_columns"),
        ({"max_prompt_length": 0}, "max_prompt_length"),
    ):
        with pytest.raises(ConfigError, match=name):
            AnnotateConfig(**changes)


def test_annotate_and_value_configs_round_trip(tmp_path: Path) -> None:
    for config in (
        AnnotateConfig(max_prompt_length=None, reward_weights=[0.5], keep="all"),
        ValueConfig(min_value=-2.5, dropout=0.3),
    ):
        path = dump_config(config, tmp_path / "c.yaml")
        assert load_config(type(config), path) == config
        assert from_mapping(type(config), to_mapping(config)) == config
