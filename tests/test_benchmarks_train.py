"""benchmarks/train.py: its gate, its record, its deadline, and memory beside the formula."""

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lolrl.losscost import peak_bytes

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--model", "test", "--device", "cpu", "--sequences", "4", "--seq-len", "16"]


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("train")
    finally:
        sys.path[:] = before


def case(train: ModuleType, mode: str = "full", dtype: str = "fp32", **sizes: Any) -> Any:
    return train.Case("test", mode, sizes.get("sequences", 4), 16, dtype, "cpu")


@pytest.fixture
def measured(train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Stands in for the processes that measure memory; lists what they were asked for."""
    asked: list[tuple[str, int]] = []

    def measure(tried: Any, contestant: str) -> tuple[int, int]:
        asked.append((contestant, tried.sequences))
        step = tried.step(contestant)
        return step.weights + step.states, int(1.02 * step.working)

    monkeypatch.setattr(train, "peak_in_process", measure)
    return asked


def call(train: ModuleType, out: Path, *flags: str) -> tuple[int, dict[str, Any], str]:
    code = train.main([*FLAGS, "--rounds", "2", "--out", str(out), *flags])
    return (
        code,
        json.loads(out.with_suffix(".json").read_text()),
        out.with_suffix(".md").read_text(),
    )


def test_a_run_writes_json_and_the_markdown_made_from_it(
    train: ModuleType, measured: list[tuple[str, int]], tmp_path: Path
) -> None:
    memory = 8 * 2**20
    code, record, page = call(train, tmp_path / "run", "--memory", "8MiB")
    assert code == 0
    assert {"device", "torch", "transformers", "commit"} <= set(record["environment"])
    assert "benchmarks/train.py --model test" in record["environment"]["command"]
    assert [c["title"].split(", ")[1] for c in record["cases"]] == ["all weights", "LoRA"]
    for shown, mode in zip(record["cases"], ("full", "lora"), strict=True):
        assert f"### {shown['title']}" in page and "T=64 D=32 V=1000 L=16" in shown["title"]
        rows = {row["label"]: row for row in shown["rows"]}
        assert set(rows) == {"fused", "eager", "full logits"} and shown["floor"] in rows
        for name, row in rows.items():
            assert len(row["times_ms"]) == 2 and min(row["times_ms"]) > 0
            assert row["tokens_per_s"] == pytest.approx(64e3 / row["median_ms"])
            assert row["gradient_error"] < 1e-4 and row["loss_error"] < 1e-5
            step = case(train, mode).step(name)
            assert (row["formula_bytes"], row["formula_peak_bytes"]) == (step.working, step.peak)
            assert row["extra_bytes"] == int(1.02 * step.working)
            assert row["error"] is None
            if name == "full logits":
                assert row["largest"] == {}
                continue
            # Within the resolution: the batch found fits, and one a twentieth larger does not.
            ((tokens, formula),) = row["largest"].values()
            found = tokens // 16
            for sequences, fits in ((found, True), (found + max(1, found // 20) + 1, False)):
                tried = case(train, mode, sequences=sequences).step(name)
                taken = tried.weights + tried.states + int(1.02 * tried.working)
                assert (taken <= memory) is fits
            assert found <= formula // 16 and f"| {tokens:,} |" in page
        assert max(rows["fused"]["largest"].values()) > max(rows["eager"]["largest"].values())
    assert all(goal["met"] for goal in record["goals"] if "formula" in goal["text"])


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_three_losses_are_one(train: ModuleType, mode: str, dtype: str) -> None:
    run = train.Run(case(train, mode, dtype))
    found = train.errors(run)
    assert set(found) == set(train.LOSSES)
    if dtype == "fp32":
        assert max(max(pair) for pair in found.values()) < 1e-4
    trained = sum(p.numel() for p in run.trained)
    assert run.gradients(train.LOSSES["fused"])[0] != 0 and trained > 0
    # The batch has ratios on both sides of one, and none of its sequences is without weight.
    assert bool((run.batch.advantages > 0).all())
    assert run.batch.ref_logps.shape == (4 * 8,)


def spoilt(honest: Callable[..., torch.Tensor], how: str) -> Callable[..., torch.Tensor]:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        value = honest(model, batch)
        if how == "loss":
            return value + 0.02 * value.detach()
        if how == "gradient":
            return 1.05 * value - 0.05 * value.detach()
        return value * torch.nan

    return loss


@pytest.mark.parametrize("how", ["loss", "gradient", "nan"])
@pytest.mark.parametrize(
    ("name", "dtype"), [("fused", "fp32"), ("fused", "bf16"), ("eager", "fp32")]
)
def test_the_gate_refuses_a_wrong_loss(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, how: str, name: str, dtype: str
) -> None:
    run = train.Run(case(train, dtype=dtype))
    monkeypatch.setitem(train.LOSSES, name, spoilt(train.LOSSES[name], how))
    with pytest.raises(RuntimeError, match=f"{name} is wrong: its loss is off by"):
        train.errors(run)


def test_nothing_is_timed_that_is_wrong(
    train: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    measured: list[tuple[str, int]],
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(train.LOSSES, "fused", spoilt(train.LOSSES["fused"], "gradient"))
    code, record, page = call(train, tmp_path / "wrong", "--mode", "full")
    assert code == 1 and measured == []
    for row in record["cases"][0]["rows"]:
        assert row["times_ms"] == [] and "fused is wrong" in row["error"]
    assert "fused is wrong" in page


def test_no_time_was_left(train: ModuleType, measured: list[tuple[str, int]]) -> None:
    shown = train.measure_case(case(train), [2**23], 5, time.monotonic())
    rows = {row["label"]: row for row in shown["rows"]}
    assert "the time was up" in shown["title"] and not rows["eager"]["largest"]
    assert len(rows["eager"]["times_ms"]) == 1  # the first round ends


def test_the_largest_batch(train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(case=case(train))
    asked: list[int] = []
    most = 40

    def peak(run: Any, contestant: str, sequences: int, memory: int) -> tuple[int, int] | None:
        asked.append(sequences)
        return None if sequences > most else (1, 1)

    monkeypatch.setattr(train, "peak_of", peak)
    assert 38 <= train.largest_batch(run, "fused", 1000, time.monotonic() + 60)[0] <= 40
    asked.clear()
    most = 480
    step = replace(run.case, sequences=500).step("fused")
    found, formula = train.largest_batch(run, "fused", step.peak, time.monotonic() + 60)
    assert formula == 500 and 456 <= found <= 480
    assert asked[0] == 500 and len(asked) <= 5  # the formula is where the search starts


def test_a_larger_batch_is_made_of_the_sequences_that_are_here(train: ModuleType) -> None:
    run = train.Run(case(train))
    batch = run.sized(6)
    assert batch.input_ids.shape == (6, 16) and batch.ref_logps.shape == (6 * 8,)
    assert torch.equal(batch.input_ids[4:], run.batch.input_ids[:2])
    assert torch.equal(batch.ref_logps[32:], run.batch.ref_logps[:16])
    value = train.LOSSES["fused"](run.model, batch)
    assert torch.isfinite(value)


def test_out_of_memory_is_a_row_and_the_search_goes_on(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: Any, contestant: str, batch: Any = None) -> None:
        if contestant == "eager":
            raise torch.OutOfMemoryError("no memory")

    def peak(run: Any, contestant: str, sequences: int, memory: int | None = None) -> Any:
        return (1, 1) if sequences <= (3 if contestant == "eager" else 8) else None

    monkeypatch.setattr(train.Run, "step", step)
    monkeypatch.setattr(train, "peak_of", peak)
    shown = train.measure_case(case(train), [2**30], 2)
    rows = {row["label"]: row for row in shown["rows"]}
    assert rows["eager"]["error"] == "out of memory" and rows["fused"]["error"] is None
    assert rows["eager"]["largest"]["1 GiB"][0] == 3 * 16
    assert rows["fused"]["largest"]["1 GiB"][0] == 8 * 16
    assert "| eager | out of memory |" in train.table(shown)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_formula_is_what_the_allocator_gives(
    train: ModuleType, dtype: str, mode: str, checkpointing: bool
) -> None:
    tried = train.Case("test", mode, 64, 32, dtype, "cpu", checkpointing)
    run = train.Run(tried)
    run.step("fused", run.batch.first(2))  # the optimiser's states
    for name in train.LOSSES:
        taken = peak_bytes(partial(run.step, name))
        # What a block's backward takes, which counts with checkpointing, is an estimate.
        rel = 0.12 if checkpointing and name == "fused" else 0.03
        assert taken == pytest.approx(tried.step(name).working, rel=rel), name
    fixed = tried.step("fused").weights + tried.step("fused").states
    assert run.fixed_bytes() == fixed


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_formula_where_the_update_is_the_peak(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: str, tied: bool
) -> None:
    monkeypatch.setitem(train.MODELS, "small", replace(train.MODELS["test"], tied=tied))
    tried = train.Case("small", "full", 2, 2, dtype, "cpu")
    run = train.Run(tried)
    run.step("fused")
    for name in ("fused", "eager"):
        taken = peak_bytes(partial(run.step, name))
        assert taken == pytest.approx(tried.step(name).working, rel=0.01), name


def test_a_smaller_budget_takes_less_memory(train: ModuleType) -> None:
    taken = []
    for budget in (None, 2**17):
        tried = train.Case("test", "lora", 64, 32, "fp32", "cpu", memory_budget=budget)
        run = train.Run(tried)
        run.step("fused", run.batch.first(2))
        taken.append(peak_bytes(partial(run.step, "fused")))
        assert taken[-1] == pytest.approx(tried.step("fused").working, rel=0.03)
    assert taken[1] < taken[0] - 2**20


def test_memory_is_measured_in_a_process_of_its_own(train: ModuleType) -> None:
    asked = case(train, sequences=512)  # 4096 scored rows of 1000 logits: 47 MiB for eager
    found = {n: train.peak_in_process(asked, n) for n in ("fused", "eager")}
    for name, (fixed, extra) in found.items():
        step = asked.step(name)
        assert fixed == step.weights + step.states
        assert 0.7 <= extra / step.working <= 1.4, (name, extra, step)
    assert found["fused"][1] < 0.8 * found["eager"][1]


def test_a_process_that_fails_says_why(train: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"measuring memory failed.*none such"):
        train.peak_in_process(replace(case(train), model="none such"), "fused")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sequences", "1"], "--sequences must be >= 2"),
        (["--rounds", "0"], "--rounds must be >= 1"),
        (["--memory", "lots"], "--memory must be like 24GiB"),
        (["--memory-budget", "some"], "--memory-budget must be like 24GiB"),
        (["--model", "gpt2"], "invalid choice"),  # its blocks are not built here
    ],
)
def test_bad_flags_are_named(
    train: ModuleType, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main([*FLAGS, *flags])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_without_a_gpu_cuda_is_refused(
    train: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        train.main(["--device", "cuda"])
    assert "torch sees no GPU" in capsys.readouterr().err
