"""Configuration: every field explained, strict in, the same out."""

import dataclasses
from typing import Any

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

NAN, INF = float("nan"), float("inf")
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


REFUSED: list[tuple[type, str, list[Any]]] = [
    (LoLConfig, "objective", ["ppo2"]),
    (LoLConfig, "clip", [0, 0.0, -0.5, NAN, INF, "small", True, [0.9], "nan"]),
    (LoLConfig, "beta", [-1.0, "small", True, [0.9], "nan", None]),
    (LoLConfig, "floor", [NAN, "small", True, [0.9], "nan", None]),
    (LoLConfig, "temperature", [0.0]),
    (LoLConfig, "advantage_filter", ["some"]),
    (LoLConfig, "sampling", ["random"]),
    (LoLConfig, "step0_tolerance", [0]),
    (LoLConfig, "step0_rows", [0]),
    (LoLConfig, "memory_budget", [0]),
    (LoLConfig, "max_prompt_length", [0]),
    (LoLConfig, "max_completion_length", [-3]),
    (LoLConfig, "reward_columns", [[], ["a", "a"]]),
    (LoLConfig, "reward_weights", [[1.0, 2.0], [INF]]),
    (LoLConfig, "reward_func_weights", [[NAN]]),
    (LoLConfig, "on_bad", ["ignore"]),
    (LoLConfig, "stale_cache", ["use"]),
    (LoLConfig, "eval_top_p", [0.0, 1.5]),
    (LoLConfig, "eval_temperature", [-1.0]),
    (LoLConfig, "objective_args", [[1]]),
    (LoLConfig, "reduction", ["mean"]),
    (LoLConfig, "remove_unused_columns", [True]),
    (LoLConfig, "label_smoothing_factor", [0.1]),
    (LoLConfig, "train_sampling_strategy", ["group_by_length"]),
    (LoLConfig, "use_liger_kernel", [True]),
    (ValueConfig, "num_heads", [0]),
    (ValueConfig, "dropout", [1.0]),
    (ValueConfig, "held_out", [0.0, 1.0]),
    (ValueConfig, "epochs", [0]),
    (ValueConfig, "learning_rate", [INF]),
    (ValueConfig, "weight_decay", [-0.1]),
    (AnnotateConfig, "autocast", ["fp8"]),
    (AnnotateConfig, "keep", ["best"]),
    (AnnotateConfig, "batch_size", [0]),
    (AnnotateConfig, "temperature", [-1.0]),
    (AnnotateConfig, "reward_columns", [[]]),
    (AnnotateConfig, "max_prompt_length", [0]),
]


@pytest.mark.parametrize(("cls", "name", "values"), REFUSED)
def test_a_value_out_of_range_names_its_field(cls, name, values) -> None:
    base = {"output_dir": "out", **CPU} if cls is LoLConfig else {}
    for value in values:
        with pytest.raises(ConfigError, match=name):
            cls(**base, **{name: value})


def test_clip_none_is_the_only_way_to_say_off(tmp_path) -> None:
    assert LoLConfig(output_dir=str(tmp_path), clip=None, **CPU).clip is None
    with pytest.raises(ConfigError, match="null switches it off"):
        LoLConfig(output_dir=str(tmp_path), clip=0.0, **CPU)
    for name in ("beta", "floor"):
        with pytest.raises(ConfigError, match=f"{name}=None must be a number, or auto"):
            LoLConfig(output_dir=str(tmp_path), **{name: None}, **CPU)
    with pytest.raises(ConfigError, match="min_value"):
        ValueConfig(min_value=1.0, max_value=1.0)


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
    """What is loaded is what was written."""
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


def test_text_of_a_number_is_a_number() -> None:
    config = LoLConfig(output_dir="out", **CPU)
    assert (config.clip, config.beta, config.floor) == ("auto", "auto", "auto")
    config = LoLConfig(output_dir="out", clip="5e-1", beta="0.25", **CPU)
    assert (config.clip, config.beta, config.floor) == (0.5, 0.25, "auto")


def test_the_choices_are_the_registry(tmp_path) -> None:
    def fresh(logps, seq):
        return -seq.sum(logps)

    with pytest.raises(ConfigError, match="fresh"):
        LoLConfig(output_dir=str(tmp_path), objective="fresh", **CPU)
    lk.objectives.objective()(fresh)
    try:
        assert LoLConfig(output_dir=str(tmp_path), objective="fresh", **CPU).objective == "fresh"
    finally:
        del lk.objectives.REGISTRY["fresh"]


def test_secrets_are_not_written(tmp_path) -> None:
    config = LoLConfig(output_dir=str(tmp_path), hub_token="s3cret", **CPU)
    path = dump_config(config, tmp_path / "config.yaml")
    assert "s3cret" not in path.read_text() and "hub_token" not in path.read_text()
    assert load_config(LoLConfig, path).hub_token is None


def test_flags_win_over_the_file(tmp_path) -> None:
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
def test_bad_yaml_names_the_file(name, tmp_path, monkeypatch) -> None:
    text, message = BAD_YAML[name]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(LoLConfig, path, {"output_dir": str(tmp_path), "use_cpu": True})
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "CANARY").exists()


def test_missing_and_empty_files(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_yaml(tmp_path / "empty.yaml") == {}


def test_annotate_and_value_configs_round_trip(tmp_path) -> None:
    for config in (
        AnnotateConfig(max_prompt_length=None, reward_weights=[0.5], keep="all"),
        ValueConfig(min_value=-2.5, dropout=0.3),
    ):
        path = dump_config(config, tmp_path / "c.yaml")
        assert load_config(type(config), path) == config
        assert from_mapping(type(config), to_mapping(config)) == config
