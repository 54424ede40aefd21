"""The scaling benchmark: its fit and its flatness on known numbers, and a run of tiny points."""

import json
from pathlib import Path

import measure
import pytest
import report
import run
import scaling
import torch

SIZES = [256.0, 1024.0, 4096.0, 65536.0]


def test_the_fit_finds_a_known_line() -> None:
    line = scaling.fit(SIZES, [3.0 + 0.02 * x for x in SIZES])
    assert line["slope"] == pytest.approx(0.02, rel=1e-9)
    assert line["intercept"] == pytest.approx(3.0, rel=1e-9)
    assert line["r2"] == pytest.approx(1.0)


def test_the_intercept_survives_noise_of_the_largest_point() -> None:
    """5% off at the largest point is 65 ms; unweighted least squares would lose the 3 ms."""
    times = [3.0 + 0.02 * x for x in SIZES]
    times[-1] *= 1.05
    line = scaling.fit(SIZES, times)
    assert line["slope"] == pytest.approx(0.02, rel=0.06)
    assert line["intercept"] == pytest.approx(3.0, rel=0.3)
    assert 0.99 < line["r2"] < 1


def test_a_flat_cost_has_no_slope_and_a_line_needs_two_sizes() -> None:
    line = scaling.fit(SIZES, [7.0] * 4)
    assert line["slope"] == pytest.approx(0.0, abs=1e-12) and line["r2"] == 1.0
    with pytest.raises(ValueError, match="two sizes"):
        scaling.fit([5.0, 5.0], [1.0, 2.0])


def row(contestant: str, x: int, ms: float, extra: int | None, full: bool = True) -> dict:
    known = {"contestant": contestant, "x": x, "median_ms": ms, "full_chunks": full}
    return {**known, "extra_bytes": extra, "formula_bytes": extra}


@pytest.fixture
def case() -> dict:
    rows = [
        row("lolkernels", 100, 12.0, 10 * 2**20, full=False),
        row("gemms", 100, 10.0, None, full=False),
        row("lolkernels", 200, 23.0, 40 * 2**20),
        row("gemms", 200, 20.0, None),
        row("lolkernels", 400, 45.0, 42 * 2**20),
        row("eager", 400, 90.0, 900 * 2**20),
    ]
    made = {
        "title": "Cost against tokens",
        "axis": "tokens",
        "field": "tokens",
        "unit": "token",
        "base": {"tokens": 100, "hidden": 8, "vocab": 50, "seq_len": 4, "dtype": "fp32"},
        "rows": rows,
    }
    return {**made, "lines": scaling.lines(made), "flatness": scaling.flatness(made)}


def test_flatness_counts_from_the_first_full_chunk(case: dict) -> None:
    assert case["flatness"] == {"from": 200, "to": 400, "ratio": pytest.approx(1.05)}
    alone = {"rows": [r for r in case["rows"] if r["x"] == 400]}
    assert scaling.flatness(alone) is None


def test_lines_have_units(case: dict) -> None:
    ours, floor = case["lines"]  # eager has one point: no line
    assert ours["slope_ns"] == pytest.approx(110_000, rel=1e-6)
    assert ours["intercept_ms"] == pytest.approx(1.0, rel=1e-6)
    assert floor["slope_ns"] == pytest.approx(100_000, rel=1e-6)


def test_the_page_is_made_from_the_record(case: dict) -> None:
    where = report.environment(command="python x.py")
    page = scaling.markdown({"environment": where, "rounds": 5, "cases": [case], "goals": []})
    assert f"# {where['device']}" in page and "python x.py" in page
    assert "| 200 | 23.0 | 20.0 | 1.150 |  | 40.0 | 40.0 |  |" in page
    assert "| 400 | 45.0 |  |  | 90.0 | 42.0 | 42.0 | 900.0 |" in page
    assert "| lolkernels | 3 | 110.000 µs | 1.100 | 1.00 | 1.0000 |" in page
    assert "from 200 to 400 (chunks are full): the largest is 1.050 x" in page


def test_every_default_point_is_a_shape() -> None:
    for axes in scaling.AXES.values():
        assert list(axes) == ["tokens", "vocab", "hidden", "seq-len"]
        for axis in axes.values():
            assert len(axis.shapes()) == len(set(axis.points)) >= 5
        assert (axes["tokens"].points[0], axes["tokens"].points[-1]) == (256, 131072)
        assert (axes["vocab"].points[0], axes["vocab"].points[-1]) == (32768, 262144)


@pytest.mark.ci
def test_a_tiny_run_writes_json_and_markdown(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    flags = ["--axis", "tokens", "--shape", "64,32,1000,16", "--points", "128", "64"]
    given = [*flags, "--rounds", "2", "--threads", "1", "--out", str(out)]
    assert run.main(["scaling", *given]) == 0
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["environment"]["command"].startswith("python benchmarks/run.py scaling --axis")
    (case,) = record["cases"]
    assert {(r["contestant"], r["x"]) for r in case["rows"]} == {
        (name, x) for name in ("lolkernels", "gemms", "eager") for x in (64, 128)
    }
    assert all(len(r["times_ms"]) == 2 and min(r["times_ms"]) > 0 for r in case["rows"])
    ours = [r for r in case["rows"] if r["contestant"] == "lolkernels"]
    assert all(r["extra_bytes"] > 0 and r["formula_bytes"] > 0 for r in ours)
    assert all(r["sum_error_nat"] <= 1e-3 for r in ours)
    assert [line["contestant"] for line in case["lines"]] == ["lolkernels", "gemms", "eager"]
    assert "### Cost against tokens" in out.with_suffix(".md").read_text()


def test_a_sequence_longer_than_a_chunk_has_no_formula(monkeypatch) -> None:
    seen = []

    def measured(entries, rounds, device):
        seen.append(entries[0].shape.seq_len)
        made = row("lolkernels", 0, 1.0, 2**20)
        return [{**made, "shape": str(entries[0].shape)}]

    monkeypatch.setattr(scaling, "measure_point", measured)
    base = scaling.Shape(4096, 8, 8192, 64)  # 48 MiB hold 1536 rows of 8192 logits
    axis = scaling.Axis("seq_len", "token", base, (64, 1024, 2048))
    case = scaling.measure_axis("seq-len", axis, 1, False, measure.Cpu())
    assert seen == [64, 1024, 2048]
    assert [r["full_chunks"] for r in case["rows"]] == [True, True, False]
    assert [r["formula_bytes"] for r in case["rows"]] == [2**20, 2**20, None]
    assert case["flatness"] == {"from": 64, "to": 1024, "ratio": 1.0}


def test_a_failing_eager_goes_out_and_a_failing_lolkernels_ends_the_run(
    monkeypatch, capsys
) -> None:
    shape = scaling.Shape(64, 8, 500, 16)
    entries = scaling.entries_at(shape, False, torch.device("cpu"))
    honest = measure.time_entries

    def fails(contestant):
        def time_entries(entries, rounds, device):
            rows = honest(entries, rounds, device)
            for found in rows:
                if found.contestant == contestant:
                    found.wrong = ["off by 7 nat"]
            return rows

        return time_entries

    cpu = measure.Cpu()
    monkeypatch.setattr(measure, "peak_memory", lambda entry: 1)
    monkeypatch.setattr(measure, "time_entries", fails("eager"))
    rows = scaling.measure_point(entries, 2, cpu)
    assert [r["contestant"] for r in rows] == ["lolkernels", "gemms"]
    assert "without eager: off by 7 nat" in capsys.readouterr().err
    monkeypatch.setattr(measure, "time_entries", fails("lolkernels"))
    with pytest.raises(RuntimeError, match=r"lolkernels.*off by 7 nat"):
        scaling.measure_point(entries, 2, cpu)
