"""benchmarks/train.py: its gate, its record, its deadline, and memory beside the formula."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import measure
import pytest
import torch
import train
import train_cases
from peers import UnavailableError

from lolrl.losscost import peak_bytes

FLAGS = ["--model", "test", "--device", "cpu", "--sequences", "4", "--seq-len", "16"]
CPU = measure.Cpu()


def case(mode: str = "full", dtype: str = "fp32", sequences: int = 4, **more: Any) -> Any:
    return train.Case("test", mode, sequences, 16, dtype, "cpu", **more)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Stands in for the processes that measure memory; lists what they were asked for."""
    asked: list[tuple[str, int]] = []

    def step_bytes(tried: Any, name: str) -> int:
        asked.append((name, tried.sequences))
        return int(1.02 * (tried.step(name) or tried.step("eager")).working)

    monkeypatch.setattr(train, "step_bytes", step_bytes)
    return asked


def call(out: Path, *flags: str) -> tuple[int, dict[str, Any], str]:
    code = train.main([*FLAGS, "--rounds", "2", "--out", str(out), *flags])
    record = json.loads(out.with_suffix(".json").read_text())
    return code, record, out.with_suffix(".md").read_text()


def test_a_run_writes_json_and_the_markdown_made_from_it(
    measured: list[tuple[str, int]], tmp_path: Path
) -> None:
    memory = 8 * 2**20
    code, record, page = call(tmp_path / "run", "--memory", "8MiB")
    assert code == 0
    assert {"device", "torch", "commit"} <= set(record["environment"])
    assert "transformers" in record["environment"]["peers"]
    assert "benchmarks/run.py train --model test" in record["environment"]["command"]
    assert [c["title"].split(", ")[1] for c in record["cases"]] == ["all weights", "LoRA"]
    for shown, mode in zip(record["cases"], ("full", "lora"), strict=True):
        assert f"### {shown['title']}" in page and "T=64 D=32 V=1000 L=16" in shown["title"]
        rows = {row["label"]: row for row in shown["rows"]}
        assert set(rows) == {"fused", "eager", "full logits", "trl"} and shown["floor"] in rows
        for name, row in rows.items():
            if row["skipped"]:
                continue
            step = case(mode).step(name)
            assert len(row["times_ms"]) == 2 and min(row["times_ms"]) > 0
            assert f"| {64e3 / row['median_ms']:,.0f} tokens/s |" in page
            assert row["gradient_errors"]["gradient"] < 1e-4 and not row["error"]
            assert row["gradient_errors"]["loss"] < 1e-5
            assert row["formula_bytes"] == (step.working if step else None)
            assert row["extra_bytes"] == int(1.02 * (step or case(mode).step("eager")).working)
        step = case(mode).step("fused")
        fixed = (step.weights + step.states) / 2**20  # measured, and by formula
        assert [fact["value"] for fact in shown["facts"]] == [fixed, fixed]
        found = {one["contestant"]: one for one in shown["fits"]}
        assert set(found) == {"eager", "trl", "fused"} - {n for n in rows if rows[n]["skipped"]}
        for name, one in found.items():
            # Within the resolution: the batch found fits, and one a twentieth larger does not.
            n = one["measured"] // 16
            for sequences, fits in ((n, True), (n + max(1, n // 20) + 1, False)):
                step = case(mode, sequences=sequences).step("eager" if name == "trl" else name)
                taken = step.weights + step.states + int(1.02 * step.working)
                assert (taken <= memory) is fits
            assert f"| {one['measured']:,} |" in page
            assert (one["formula"] is None) is (name == "trl")
            assert name == "trl" or n <= one["formula"] // 16
        assert found["fused"]["measured"] > found["eager"]["measured"]
    assert all(goal["met"] for goal in record["goals"] if "formula" in goal["text"])


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_losses_are_one(mode: str, dtype: str) -> None:
    run = train.Run(case(mode, dtype))
    found = run.checks()
    assert set(found) == set(train.LOSSES)
    for check in found.values():
        if not isinstance(check, UnavailableError):
            assert not check.faults
            assert dtype != "fp32" or max(check.gradients.values()) < 1e-4
    assert run.gradients(train.LOSSES["fused"])[0] != 0 and run.trained
    # The batch has ratios on both sides of one, and none of its sequences is without weight.
    assert bool((run.batch.advantages > 0).all()) and run.batch.ref_logps.shape == (4 * 8,)
    larger = run.sized(6)  # made of the sequences that are here
    assert larger.input_ids.shape == (6, 16) and larger.ref_logps.shape == (6 * 8,)
    assert torch.equal(larger.input_ids[4:], run.batch.input_ids[:2])
    assert torch.equal(larger.ref_logps[32:], run.batch.ref_logps[:16])
    assert torch.isfinite(train.LOSSES["fused"](run.model, larger))


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
def test_what_is_wrong_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, measured: list[Any], how: str, name: str, dtype: str
) -> None:
    monkeypatch.setitem(train.LOSSES, name, spoilt(train.LOSSES[name], how))
    shown = train.measure_case(case(dtype=dtype), [2**23], 1, CPU)
    row = next(row for row in shown["rows"] if row["label"] == name)
    assert "its loss is off by" in row["wrong"][0] and not row["times_ms"]
    assert name not in {one for one, _ in measured} and train.report.faults(shown)


def test_a_wrong_loss_of_ours_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, measured: list[Any], tmp_path: Path
) -> None:
    monkeypatch.setitem(train.LOSSES, "fused", spoilt(train.LOSSES["fused"], "gradient"))
    code, record, page = call(tmp_path / "wrong", "--mode", "full", "--memory")
    rows = {row["label"]: row for row in record["cases"][0]["rows"]}
    assert code == 1 and rows["fused"]["times_ms"] == [] and "fused" not in dict(measured)
    assert "| fused | WRONG: its loss is off by" in page


def test_no_time_was_left(measured: list[tuple[str, int]]) -> None:
    shown = train.measure_case(case(), [2**23], 5, CPU, time.monotonic())
    assert "the time was up" in shown["title"] and not shown["fits"]
    assert {len(row["times_ms"]) for row in shown["rows"] if not row["skipped"]} == {1}


@pytest.mark.parametrize(("most", "memory"), [(40, 1000), (480, None)])
def test_the_largest_batch(most: int, memory: int | None) -> None:
    asked: list[int] = []
    memory = memory or replace(case(), sequences=500).step("fused").peak

    def fits(sequences: int) -> bool:
        asked.append(sequences)
        return sequences <= most

    found, formula = train.largest_batch(case(), "fused", memory, fits)
    assert 0.95 * most <= found <= most
    if most == 480:  # the formula is where the search starts
        assert formula == asked[0] == 500 and len(asked) <= 5


def test_out_of_memory_is_a_row_leaves_no_gradient_and_the_search_goes_on(
    monkeypatch: pytest.MonkeyPatch, measured: list[Any]
) -> None:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        train_cases.eager_loss(model, batch).backward()
        if len(batch.input_ids) > 2:  # beyond the gate's batch
            raise torch.OutOfMemoryError("no memory")
        model.zero_grad(set_to_none=True)
        return train_cases.eager_loss(model, batch)

    monkeypatch.setitem(train.LOSSES, "eager", loss)

    def fits(run: Any, name: str, sequences: int, **memory: int) -> bool:
        return sequences <= (3 if name == "eager" else 8)

    monkeypatch.setattr(measure.Cpu, "extra_bytes", lambda self, c: c.call())
    monkeypatch.setattr(train, "fits", fits)
    shown = train.measure_case(case(), [2**30], 1, CPU)
    largest = {one["contestant"]: one["measured"] for one in shown["fits"]}
    assert (largest["eager"], largest["fused"]) == (3 * 16, 8 * 16)
    rows = {row["label"]: row for row in shown["rows"]}
    assert "no memory" in rows["eager"]["error"] and not rows["fused"]["error"]
    assert "| eager | failed: OutOfMemoryError: no memory |" in train.report.table(shown)
    run = train.Run(case())
    with pytest.raises(torch.OutOfMemoryError):
        run.step("eager")
    assert all(p.grad is None for p in run.trained)


def taken(run: Any, name: str) -> int:
    return peak_bytes(partial(run.step, name))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_formula_is_what_the_allocator_gives(
    dtype: str, mode: str, checkpointing: bool
) -> None:
    tried = train.Case("test", mode, 64, 32, dtype, "cpu", checkpointing)
    run = train.Run(tried)
    run.step("fused", run.batch.first(2))  # the optimiser's states
    for name in train.plan.LOSSES:
        # What a block's backward takes, which counts with checkpointing, is an estimate.
        rel = 0.12 if checkpointing and name == "fused" else 0.03
        assert taken(run, name) == pytest.approx(tried.step(name).working, rel=rel), name
    assert run.fixed_bytes() == tried.step("fused").weights + tried.step("fused").states


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_formula_where_the_update_is_the_peak(
    monkeypatch: pytest.MonkeyPatch, dtype: str, tied: bool
) -> None:
    monkeypatch.setitem(train.MODELS, "small", replace(train.MODELS["test"], tied=tied))
    tried = train.Case("small", "full", 2, 2, dtype, "cpu")
    run = train.Run(tried)
    run.step("fused")
    for name in ("fused", "eager"):
        assert taken(run, name) == pytest.approx(tried.step(name).working, rel=0.01), name


def test_a_smaller_budget_takes_less_memory() -> None:
    found = []
    for budget in (None, 2**17):
        tried = train.Case("test", "lora", 64, 32, "fp32", "cpu", memory_budget=budget)
        run = train.Run(tried)
        run.step("fused", run.batch.first(2))
        found.append(taken(run, "fused"))
        assert found[-1] == pytest.approx(tried.step("fused").working, rel=0.03)
    assert found[1] < found[0] - 2**20


@pytest.mark.ci
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    asked = case(sequences=512)  # 4096 scored rows of 1000 logits: 47 MiB for eager
    found = {name: train.step_bytes(asked, name) for name in ("fused", "eager")}
    for name, extra in found.items():
        assert 0.7 <= extra / asked.step(name).working <= 1.4, (name, extra)
    assert found["fused"] < 0.8 * found["eager"]
    with pytest.raises(RuntimeError, match=r"fused: .*none such"):
        train.step_bytes(replace(asked, model="none such"), "fused")
