"""The scripts for GPU machines, tried on the CPU: records, gates, deadline, resumption."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lolkernels.backends import TABLE

ROOT = Path(__file__).resolve().parents[1]
Flags = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    """benchmarks/gpu.py; its modules find one another, and torch.compile stays out of the way."""
    folder = str(ROOT / "benchmarks")
    before = list(sys.path)
    sys.path.insert(0, folder)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield importlib.import_module("gpu")
    finally:
        sys.path[:] = before


@pytest.fixture
def bench(gpu: ModuleType, tmp_path: Path) -> Flags:
    """Runs it: (exit status, record, page)."""

    def call(*flags: str) -> tuple[int, dict[str, Any], str]:
        out = tmp_path / "dry"
        fixed = ["--device", "cpu", "--out", str(out), "--backends", "reference"]
        code = gpu.main([*fixed, "--rounds", "2", *flags])
        record = json.loads((tmp_path / "dry.json").read_text())
        return code, record, (tmp_path / "dry.md").read_text()

    return call


def test_every_task_runs_and_the_markdown_is_made_from_the_json(
    bench: Flags, gpu: ModuleType
) -> None:
    code, record, page = bench()
    assert code == 0
    expected = {"device", "torch", "triton", "python", "commit", "dirty", "command", "date"}
    assert expected <= set(record["environment"])
    assert record["left"] == []
    kinds = {case["name"].split("-")[0] for case in record["cases"]}
    expected = {"linear_loss", "score", "linear_logprob", "kernels", "chunks", "overhead", "peers"}
    assert kinds == expected
    for case in record["cases"]:
        assert "error" not in case and f"### {case['title']}" in page
        for row in case["rows"]:
            assert not row["wrong"] and not row["error"], row
            if row["skipped"]:
                assert case["name"].startswith("peers") or row["label"] == "gemms fp32 out", row
                continue
            assert len(row["times_ms"]) == 2
            assert f"| {row['label']} {row['version']}".strip() in page
            assert f" | {row['median_ms']:.{1 if row['median_ms'] >= 100 else 3}f} |" in page
    peers = {row["label"] for case in record["cases"] for row in case["rows"]}
    assert set(gpu.PEERS) - {"cce torch_compile"} <= peers
    goals = page.split("## Goals")[1]
    texts = ("three GEMMs", "two GEMMs", "one GEMM", "row_stats", "dlogits_", "logprob bf16")
    for text in (*texts, "against lol-rl", "against liger"):
        assert text in goals
    assert "--rounds 2" in page


def cases(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {case["name"]: case for case in record["cases"]}


SEEDS = {
    "row_stats": lambda f: lambda *a, **k: [t + 3e-4 * (i == 1) for i, t in enumerate(f(*a, **k))],
    "dlogits_": lambda f: lambda *a, **k: f(*a, **k).mul_(1.02),
}


def seed_fault(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    honest = TABLE["reference"]
    seeded = honest._replace(**{name: SEEDS[name](getattr(honest, name))})
    monkeypatch.setitem(TABLE, "reference", seeded)


@pytest.mark.parametrize("name", SEEDS)
def test_a_wrong_kernel_has_no_time(
    name: str, bench: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed_fault(monkeypatch, name)
    code, record, page = bench("--only", "linear_loss-llama-4096|kernels-129")
    assert code == 1
    for task, label in (("linear_loss-llama-4096", "reference"), ("kernels-129", name)):
        rows = [r for r in cases(record)[task]["rows"] if r["label"].startswith(label)]
        assert rows and all(row["wrong"] and not row["times_ms"] for row in rows)
    assert "WRONG" in page and "MISSED (" in page.split("## Goals")[1]


def test_a_second_run_goes_on_where_the_first_ended(
    bench: Flags, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.report, "source", lambda: "unchanged")
    _, first, _ = bench("--only", "overhead|kernels-129")
    _, second, _ = bench("--only", "overhead|kernels")
    assert set(cases(second)) == {"overhead", "kernels-129", "kernels-500"}
    assert all(cases(second)[name] == task for name, task in cases(first).items())
    monkeypatch.setattr(gpu.report, "source", lambda: "changed")
    _, third, _ = bench("--only", "overhead")
    assert set(cases(third)) == {"overhead"}


def test_no_task_begins_after_the_deadline(bench: Flags) -> None:
    code, record, page = bench("--minutes", "0")
    assert code == 0 and record["cases"] == [] and len(record["left"]) > 10
    assert "no time was left" in page


HANGS = """
import gpu, sys, time
gpu.LONGEST = 2
plan = gpu.plan
gpu.plan = lambda *given: plan(*given)[::-1]  # it comes first
gpu.kernels.overhead = lambda *_: time.sleep(60)
gpu.main(sys.argv[1:])
raise SystemExit("the process went on")
"""
DIES = """
import gpu, sys
def dead(*_):
    raise RuntimeError("an illegal memory access was encountered")
def kernel(*_):
    gpu.measure.Cpu.sync = dead
    dead()
gpu.kernels.overhead = kernel
gpu.main(sys.argv[1:])
raise SystemExit("the process went on")
"""


@pytest.mark.parametrize(("text", "reason"), [(HANGS, "still running"), (DIES, "illegal memory")])
def test_a_lost_device_costs_one_task(text: str, reason: str, tmp_path: Path) -> None:
    out = tmp_path / "lost"
    flags = ["--device", "cpu", "--out", out, "--backends", "reference", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, flags), "--only", "overhead|chunks"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stdout + done.stderr  # of the process that took over
    found = cases(json.loads((tmp_path / "lost.json").read_text()))
    assert reason in found["overhead"]["error"]
    assert found["chunks"]["rows"] and "error" not in found["chunks"]


def test_rounds_are_interleaved_and_ratios_are_the_rounds_own(gpu: ModuleType) -> None:
    m, seen = gpu.measure, []
    clock = {"a": iter(range(2, 99, 2)), "b": iter(range(1, 99))}  # a takes twice as long as b

    class Device(m.Cpu):  # type: ignore[misc, name-defined]
        def time_ms(self, call: Callable[[], Any]) -> float:
            call()
            return float(next(clock[seen[-1]]))

    def made(name: str) -> tuple[Any, Callable[[], Any]]:
        call = partial(seen.append, name)
        options = {"bytes": {"a": 3, "b": 1}[name], "prepare": partial(seen.append, "-")}
        return m.Row(name), lambda: gpu.Contestant(call, m.Check, **options)

    # The time is up: the fewest rounds, in turn there and back.
    rows = m.measure([made("a"), made("b")], Device(), rounds=9, until=0.0)
    assert "".join(seen) == "-a-b" + "-b-a" + "-a-b" and m.MIN_ROUNDS == 3
    a, b = (asdict(row) for row in rows)
    assert (a["times_ms"], b["times_ms"], a["median_ms"]) == ([2, 4, 6], [1, 2, 3], 4)
    assert gpu.report.ratios(a, b)["median"] == pytest.approx(1.5)  # 3 bytes in 2 ms against 1 in 1
    assert gpu.report.ratios({**a, "bytes": 0}, b)["median"] == 2.0


def test_a_slow_contestant_gets_the_fewest_rounds(gpu: ModuleType) -> None:
    m = gpu.measure

    class Device(m.Cpu):  # type: ignore[misc, name-defined]
        def time_ms(self, call: Callable[[], Any]) -> float:
            return float(call())

    build = [
        (m.Row(str(ms)), lambda ms=ms: gpu.Contestant(lambda: ms, m.Check)) for ms in (1, 5000)
    ]
    rows = m.measure(build, Device(), rounds=8)
    assert [len(row.times_ms) for row in rows] == [8, m.MIN_ROUNDS]


def test_a_first_call_has_its_time_box(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs() -> Any:
        while True:
            pass

    monkeypatch.setattr(gpu.measure, "BOX", 0.1)
    (row,) = gpu.measure.measure([(gpu.Row("slow"), hangs)], gpu.measure.Cpu(), rounds=1)
    assert "took longer than" in row.error and not row.times_ms


# --- the test runner ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_gpu", ROOT / "tests" / "run_gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SUITE = """
import pytest
pytestmark = pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2])
def test_passes(n): pass
def test_sanitizer(): pytest.skip("not here")
"""


def test_the_runner_reports_passes_failures_and_crashes(runner: ModuleType, tmp_path: Path) -> None:
    suite, out = tmp_path / "suite", tmp_path / "tests"
    suite.mkdir()

    def call() -> tuple[int, dict[str, Any], str]:
        flags = ["--device", "cpu", "--no-matrix", "--no-sanitizer", "--tests", str(suite)]
        code = runner.main([*flags, "--out", str(out)])
        record = json.loads((tmp_path / "tests.json").read_text())
        return code, record, (tmp_path / "tests.md").read_text()

    code, _, page = call()
    assert code == 1 and "no test file" in page
    (suite / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    (suite / "test_good.py").write_text(SUITE)
    code, record, page = call()
    assert code == 0, page
    assert "2 passed, 0 failed, 1 skipped" in page and "skipped: not here" in page
    assert all(tool["result"] == "not run" for tool in record["sanitizer"])
    mark = "import os, pytest\npytestmark = pytest.mark.gpu\n"
    (suite / "test_bad.py").write_text(mark + "def test_bad():\n    assert 1 == 2, 'not equal'")
    (suite / "test_crash.py").write_text(mark + "def test_x():\n    os._exit(134)")
    code, record, page = call()
    counts = {f["file"]: (f["passed"], f["failed"]) for f in record["files"]}
    assert counts == {"test_good.py": (2, 0), "test_bad.py": (0, 1), "test_crash.py": (0, 1)}
    assert code == 1 and "not equal" in page and "exit status 134" in page


@pytest.mark.parametrize("name", [None, *SEEDS])
def test_the_matrix_finds_a_wrong_backend(
    name: str | None, runner: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name:
        seed_fault(monkeypatch, name)
    for op in runner.OPS:
        faults = runner._faults(op, "reference", torch.bfloat16, 129, "cpu")
        wrong = name == "row_stats" or (name == "dlogits_" and op != "score")
        assert bool(faults) is wrong, (op, faults)


TOOL = """#!/bin/sh
while [ "$1" != -m ]; do [ "$1" = --tool ] && tool=$2; shift; done
case $tool in
  racecheck) echo "========= RACECHECK SUMMARY: 2 hazards displayed"; exit 99;;
  initcheck) exec sleep 60;;
  synccheck) echo "========= Error: Device not supported"; exit 1;;
esac
echo "========= ERROR SUMMARY: 0 errors"
"""


def test_the_runner_reads_the_sanitizer(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(TOOL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(runner, "ENOUGH", 0)
    assert runner.find_sanitizer() == str(program)
    found = {t: runner.sanitize(str(program), t, 1.0, tmp_path) for t in runner.TOOLS}
    assert [row["result"] for row in found.values()] == ["passed", "failed", "failed", "not run"]
    assert "2 hazards" in found["racecheck"]["text"] and "0 errors" in found["memcheck"]["text"]
    assert "stopped after" in found["initcheck"]["text"]


SETUP = """
import os, pathlib, sys
assert sys.argv[1:] == ["build_ext", "--inplace"]
{action}
"""


def test_the_runner_builds_the_cuda_kernels_for_its_device(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner.torch.version, "cuda", "13.0")
    monkeypatch.setattr(runner.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    library = tmp_path / "lolkernels" / "_CUDA.abi3.so"
    for folder in ("csrc/cuda", "lolkernels"):
        (tmp_path / folder).mkdir(parents=True)
    source = tmp_path / "csrc" / "cuda" / "ops.cu"
    source.write_text("")

    def outcome(action: str) -> dict[str, Any]:
        (tmp_path / "setup.py").write_text(SETUP.format(action=action))
        found: dict[str, Any] = runner.build(60.0)
        return found

    none = outcome("print('lolkernels is built without its CUDA kernels (there is no nvcc)')")
    assert none["result"] == "not built" and "no nvcc" in none["text"]
    bad = outcome("print('lolkernels is built without its CUDA kernels (nvcc failed: x)')")
    assert bad["result"] == "failed" and "nvcc failed: x" in bad["text"]
    assert outcome("raise SystemExit('no setuptools')")["result"] == "failed"
    made = outcome(f"pathlib.Path({str(library)!r}).write_text(os.environ['TORCH_CUDA_ARCH_LIST'])")
    assert made["result"] == "built" and library.read_text() == "9.0a"
    assert runner.build(60.0)["result"] == "there"
    later = library.stat().st_mtime + 9
    os.utime(source, (later, later))
    assert outcome("pass")["result"] == "failed"  # the object is older than its source


def test_the_runner_measures_the_first_result(
    runner: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", runner.FIRST, "cpu", "reference"]
    code, output = runner.run(command, 120.0)
    assert code == 0, output
    seconds = json.loads(output.splitlines()[-1])
    assert len(seconds) == len(runner.STEPS) and min(seconds) >= 0 and seconds[0] > 0.01

    module = SimpleNamespace(devices=("cpu",))
    monkeypatch.setattr(runner.lk.backends, "TABLE", {"cuda": module, "triton": module})
    monkeypatch.setattr(runner.lk, "available_backends", lambda: {"cuda": None, "triton": "gone"})
    monkeypatch.setattr(runner, "FIRST", "print([1.0, 2.0, 3.0, 4.0, 5.0])")
    rows = runner.first_results("cpu", 60.0)
    assert [row["process"] for row in rows] == ["first", "second", ""]
    assert rows[0]["seconds"]["first loss"] == 4.0 and rows[2]["skipped"] == "gone"
    monkeypatch.setattr(runner, "FIRST", "raise SystemExit('no device')")
    assert "no device" in runner.first_results("cpu", 60.0)[0]["skipped"]


def test_the_sanitizers_report_names_the_backends_that_ran(
    runner: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(
        '<s><testcase name="test_rows[0.0-1-dtype0-triton]"/>'
        '<testcase name="test_rows[0.0-1-dtype0-cuda]"><skipped/></testcase>'
        '<testcase name="test_x[cpu]"><failure/></testcase></s>'
    )
    assert runner.passed_backends(path) == ["triton"]
