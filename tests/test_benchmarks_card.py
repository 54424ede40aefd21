"""The script for a machine with a card, run whole on a CPU, with a fault at each of its stages."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import bundle
import card
import card_page
import card_worker
import journal
import measure
import pytest
import report

ROOT = Path(__file__).resolve().parents[1]


def a_card(folder: Path, *flags: str) -> card.Card:
    return card.Card(card.parse(["--out", str(folder), "--device", "cpu", *flags]))


# --- the dry run ----------------------------------------------------------------------------------

INJECTED = """
import os, signal, time
from dataclasses import replace
import card_worker

def faulty(make, faults):
    def tasks(*given):
        return [replace(t, **faults.get(t.name, {})) for t in make(*given)]
    return tasks

def raises():
    raise RuntimeError("a kernel that raises")

def dies():
    os.kill(os.getpid(), signal.SIGSEGV)

def loses():
    def lost(self):
        raise RuntimeError("an illegal memory access was encountered")
    card_worker.measure.Cpu.sync = lost
    lost(None)

check = "check triton odd {}"
checks = {check.format("fp32 score"): {"run": raises}, check.format("fp32 logprob"): {"run": dies}}
card_worker.checks = faulty(card_worker.checks, checks)
hangs = {"run": lambda: time.sleep(60), "limit": 0.5}
card_worker.parts_tasks = faulty(card_worker.parts_tasks, {"parts products": hangs})
bench = {"linear_loss-frozen llama-8b 24": {"run": loses}, "score llama-8b 24": {"run": dies}}
card_worker.bench_tasks = faulty(card_worker.bench_tasks, bench)
"""
TESTS = """
import os, pytest, signal, time
pytestmark = pytest.mark.gpu
SOUND = "SOUND" in os.environ
def test_before(): pass
def test_hangs(): SOUND or time.sleep(60)
def test_between(): pass
def test_dies(): SOUND or os.kill(os.getpid(), signal.SIGSEGV)
def test_after(): pass
def test_fails(): assert SOUND, "not equal"
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_row(backend): pass
def test_skipped(): pytest.skip("not here")
"""
ONLY = "check triton odd fp32|parts (products|sweeps)|^(linear_loss|score).* 24|train test"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, list[Any], str]]:
    """A run with every fault, then the same command without: exit status, journal and page."""
    folder = tmp_path_factory.mktemp("card")
    (folder / "injected.py").write_text(INJECTED)
    (folder / "suite").mkdir()
    (folder / "suite" / "test_some.py").write_text(TESTS)
    with zipfile.ZipFile(folder / "good-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_here.py", "answer = 42\n")
    (folder / "bundle" / "wheels").mkdir(parents=True)
    good = (folder / "good-1-py3-none-any.whl").rename(
        folder / "bundle/wheels/good-1-py3-none-any.whl"
    )
    digest = hashlib.sha256(good.read_bytes()).hexdigest()
    wheels = {"absent-1-py3-none-any.whl": "0" * 64, good.name: digest}
    manifest = json.dumps({"objects": {}, "wheels": wheels})
    (folder / "bundle" / "manifest.json").write_text(manifest)
    command = [sys.executable, "benchmarks/card.py", "--out", str(folder / "out")]
    command += ["--device", "cpu", "--backends", "triton", "--only", ONLY]
    command += ["--tests", str(folder / "suite"), "--test-limit", "4", "--jobs", "2"]
    command += ["--bundle", str(folder / "bundle"), "--rounds", "1"]
    found = []
    for flags, extra in ((["--plugin", "injected"], {}), ([], {"SOUND": "1"})):
        done = subprocess.run(
            [*command, *flags],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(folder), **extra},
            text=True,
            capture_output=True,
            timeout=300,
        )
        lines = [json.loads(x) for x in (folder / "out/journal.jsonl").read_text().splitlines()]
        page = (folder / "out" / "report.md").read_text() + done.stderr
        found.append((done.returncode, lines, page))
    return found


FAULTS = {
    "wheel absent-1-py3-none-any.whl": "is missing from bundle",
    "check triton odd fp32 score": "a kernel that raises",
    "check triton odd fp32 logprob": "died by SIGSEGV",
    "parts products": "still running after 2 s",
    "linear_loss-frozen llama-8b 24": "illegal memory access",
    "score llama-8b 24": "died by SIGSEGV",
    "test_some::test_hangs": "still running after 4 s",
    "test_some::test_dies": "died by SIGSEGV",
}


@pytest.mark.ci
def test_a_fault_at_each_stage_costs_its_task_alone(
    runs: list[tuple[int, list[Any], str]],
) -> None:
    code, lines, page = runs[0]
    assert code == 1
    faults = {x["task"]: x["reason"] for x in lines if x["kind"] == "fault"}
    assert set(faults) == set(FAULTS), page
    for task, reason in FAULTS.items():
        assert reason in faults[task] and f"* **{task}**" in page.partition("\n## What")[0]
    done = {x["task"]: x for x in lines if x["kind"] == "result"}
    for op in ("linear_loss", "linear_loss frozen", "linear_logprob"):
        assert not done[f"check triton odd fp32 {op}"]["wrong"]
    sweeps = {row["label"]: row for row in done["parts sweeps"]["case"]["rows"]}
    assert sweeps["exps_ fp32, triton"]["times_ms"] and sweeps["sums fp32, triton"]["times_ms"]
    rows = {r["label"]: r for r in done["linear_loss llama-8b 24"]["case"]["rows"]}
    assert rows["triton"]["times_ms"] and rows["eager"]["times_ms"]
    # What faulted as a whole was tried contestant by contestant.
    alone = done["linear_loss-frozen llama-8b 24 / eager"]["case"]
    assert [row["label"] for row in alone["rows"]] == ["eager", "gemms", "gemms fp32 out"]
    (steps,) = (row for row in done["train test full"]["case"]["rows"] if row["label"] == "fused")
    assert len(steps["times_ms"]) == 1 and steps["gradient_errors"]["gradient"] < 1e-4
    assert "### test, all weights" in page
    tests = {name.partition("::")[2]: x["outcome"] for name, x in done.items() if "outcome" in x}
    expected = dict.fromkeys(("test_before", "test_between", "test_after"), "passed")
    expected |= {"test_fails": "failed", "test_skipped": "skipped", "test_row[triton]": "passed"}
    assert tests == expected
    assert [x["pairs"] for x in lines if x["kind"] == "collected"] == [
        [["test_some.py", ""], ["test_some.py", "reference"], ["test_some.py", "triton"]]
    ]
    assert "not equal" in page and "| test_some triton | 1 | 0 | 0 |" in page


@pytest.mark.ci
def test_the_page_says_where_and_what(runs: list[tuple[int, list[Any], str]]) -> None:
    _, lines, page = runs[0]
    (header,) = (x for x in lines if x["kind"] == "header")
    where = header["environment"]
    for name in ("device", "torch", "triton", "commit", "source", "date"):
        assert str(where[name]) in page
    assert "python3 benchmarks/card.py --out" in page and "--device cpu" in page
    assert "| triton | odd | fp32 | ok" in page and "### Row kernels, V=130" in page
    assert "wheel good-1-py3-none-any.whl: unpacked" in page
    assert "object _CUDA" in page


@pytest.mark.ci
def test_the_same_command_does_what_is_left(runs: list[tuple[int, list[Any], str]]) -> None:
    code, lines, page = runs[1]
    before = [x for x in runs[0][1] if x["kind"] == "result" and not x.get("wrong")]
    new = lines[len(runs[0][1]) :]
    begun = {x["task"] for x in new if x["kind"] == "begin"}
    again = {x["task"] for x in before if x["job"] != "prepare"} & begun
    assert not again, "measured twice"
    missing = set(FAULTS) - {"wheel absent-1-py3-none-any.whl"}
    assert missing | {"test_some::test_fails"} <= begun
    assert {x["task"] for x in new if x["kind"] == "fault"} == set(FAULTS) - missing
    assert code == 1 and page.partition("\n## What")[0].count("\n* **") == 1  # the wheel


# --- what it is made of ---------------------------------------------------------------------------


def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path: Path) -> None:
    first = journal.Journal(tmp_path, "a")
    first.write("header", identity={"source": "1"}, task="environment")
    first.write("result", job="x", task="sound")
    first.write("result", job="x", task="unsound", wrong=["off by 1"])
    first.write("fault", job="x", task="fell", reason="it fell")
    assert first.settled() == {"environment", "sound", "unsound", "fell"} - {"environment"}
    with first.path.open("a") as file:
        file.write('{"kind": "result", "task": "cut')
    journal.mend(tmp_path)
    second = journal.Journal(tmp_path, "b")
    second.write("header", identity={"source": "1"}, task="environment")
    assert second.settled() == {"sound"}  # what went wrong is tried again
    third = journal.Journal(tmp_path, "c")
    third.write("header", identity={"source": "2"}, task="environment")
    assert third.settled() == set() and len(third.lines()) == 6
    third.write("result", job="x", task="late")
    assert third.settled() == {"late"} and len(third.lines()) == 7  # read on from where it was


def test_an_object_says_what_it_was_made_from(tmp_path: Path) -> None:
    hashes = bundle.wanted()
    assert set(hashes) == {"_C", "_CUDA"} and len({len(h) for h in hashes.values()}) == 1
    fresh = b"\x7fELF..." + bundle.NOTE + bytes.fromhex(hashes["_C"]) + b"..."
    (tmp_path / "new.so").write_bytes(fresh)
    (tmp_path / "old.so").write_bytes(b"\x7fELF no note")
    assert bundle.built_from(tmp_path / "new.so") == hashes["_C"]
    assert bundle.built_from(tmp_path / "old.so") is None
    assert bundle.built_from(tmp_path / "none.so") is None


def test_a_stale_object_is_told_by_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "ROOT", tmp_path)
    target, carried = tmp_path / "lolkernels" / "_C.abi3.so", tmp_path / "bundle" / "_C.abi3.so"
    for path in (target, carried):
        path.parent.mkdir()
    want, other = "ab" * 20, "cd" * 20

    def made(path: Path, source: str) -> None:
        path.write_bytes(bundle.NOTE + bytes.fromhex(source))

    def placed(**options: bool) -> str:
        flags = {"building": False, "compiler": True, **options}
        text: str = bundle.place_object("_C", want, carried.parent, **flags)
        return text

    with pytest.raises(bundle.BundleError, match="neither here nor carried"):
        placed()
    made(target, other)
    os.utime(target, (2**31, 2**31))  # younger than everything, and stale all the same
    made(carried, want)
    assert "carried" in placed() and bundle.built_from(target) == want
    assert "there" in placed()
    made(target, other)
    made(carried, other)
    with pytest.raises(bundle.BundleError, match="made from other sources"):
        placed()
    monkeypatch.setattr(bundle, "run_build", lambda: made(target, want))
    assert placed(building=True) == "built here"
    target.unlink()
    monkeypatch.setattr(bundle, "run_build", lambda: None)
    with pytest.raises(bundle.BundleError, match="could not be built"):
        placed(building=True)


def test_a_large_wheel_comes_out_of_its_archive_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "big-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("big/__init__.py", "size = 1\n")
        archive.writestr("big/lib/static.a", "not needed to run\n")
    bundle.repack(path)
    (packed,) = tmp_path.glob("*.xz")
    assert not path.exists()
    bundle.unpack(packed, tmp_path / "out")
    assert (tmp_path / "out" / "big" / "__init__.py").read_text() == "size = 1\n"
    assert not (tmp_path / "out" / "big" / "lib").exists()


def test_rows_for_a_card_are_shapes_with_goals() -> None:
    w = card_worker
    tasks = w.bench_tasks(w.CUDA, ["triton", "cuda"], measure.Cpu(), 1, 0.0)
    names = [task.name for task in tasks]
    assert len(set(names)) == len(names)
    order = ["linear_loss llama-8b 4096", "peers torch all gradients", "flag autocast"]
    order += ["train llama-3.2-1b full", "linear_loss qwen3-8b 4096", "peers cce frozen head"]
    order += ["logprob gemma3-1b 4096"]
    places = [names.index(name) for name in order]
    assert places == sorted(places) and places[0] == 0
    for name in ("score qwen3-8b 4096", "logprob gemma3-1b 4096", "linear_loss llama-8b 1024"):
        assert name in names
    assert {"train llama-3.2-1b full", "train llama-3.1-8b lora"} <= set(names)
    for shape in (w.CUDA.odd, w.CUDA.real, *w.CUDA.heads.values()):
        assert sum(shape.lengths()) == shape.tokens


def test_the_docs_say_what_was_measured_on_a_card() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    section = card_page.docs_section(card_page.published())
    assert card_page.in_docs(text, section) == text, "python benchmarks/report.py --docs"


def test_the_docs_section_is_made_from_the_record() -> None:
    where = {"device": "NVIDIA H200", "torch": "2.11", "commit": "abc", "date": "today"}
    row = {**report.BLANK, "times_ms": [2.0], "median_ms": 2.0, "extra_bytes": 2**20}
    rows = [{**row, "label": "cuda"}, {**row, "label": "gemms", "times_ms": [1.6]}]
    case = {**report.case("t", [], ["gemms"], name="linear_loss x"), "rows": rows}
    record = {"environment": where, "cases": [case], "goals": [{"met": True}], "faults": []}
    section = card_page.docs_section([record])
    assert "one NVIDIA H200" in section and "results/h200.md" in section
    assert "1 goals met, 0 missed, 0 faults" in section
    assert "| linear_loss x, cuda | 2.00 | 1.25 | 1.0 |" in section and "gemms |" not in section
    assert card_page.docs_section([]) == card_page.NOTHING


def test_a_folder_without_a_run_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert card_page.main(["nowhere"]) == 2
    assert "holds no run that began" in capsys.readouterr().err


def test_a_run_that_is_told_to_end_leaves_no_process_behind(tmp_path: Path) -> None:
    run = a_card(tmp_path)
    words = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
    job = card.Job("bench", [sys.executable, "-c", words + "time.sleep(60)"])
    timer = threading.Timer(3.0, run.end)
    timer.start()
    began = time.monotonic()
    run.go(job, run.until)
    assert time.monotonic() - began < 30
    assert [x["kind"] for x in run.journal.lines()] == ["left"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


TOOL = """#!/bin/sh
tool=$2
while [ "$1" != -m ]; do python=$1; shift; done
[ $tool = racecheck ] && { echo "========= RACECHECK SUMMARY: 2 hazards displayed"; exit 99; }
[ $tool = memcheck ] && exec "$python" "$@"
exit 0
"""


def test_any_report_of_the_sanitizer_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, suite = tmp_path / "compute-sanitizer", tmp_path / "suite"
    program.write_text(TOOL)
    program.chmod(0o755)
    suite.mkdir()
    (suite / "test_sanitizer.py").write_text(TESTS.partition("def test_hangs")[0])
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    run = a_card(tmp_path, "--tests", str(suite))
    run.sanitizer()
    lines = run.journal.lines()
    faults = {x["task"]: (x["reason"], x["text"]) for x in lines if x["kind"] == "fault"}
    assert set(faults) == {"tests test_sanitizer racecheck"}
    reason, text = faults["tests test_sanitizer racecheck"]
    assert reason == "exit status 99" and "2 hazards" in text
    outcomes = {x["task"]: x["outcome"] for x in lines if x["kind"] == "result"}
    assert outcomes == {"memcheck test_sanitizer::test_before": "passed"}
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    run.sanitizer()
    assert "was not found" in run.journal.lines()[-1]["why"]


def test_what_cannot_begin_says_why(tmp_path: Path) -> None:
    run = a_card(tmp_path)
    words = "import sys; sys.exit('no such device')"
    run.go(card.Job("environment", [sys.executable, "-c", words]), run.until)
    faults = [x for x in run.journal.lines() if x["kind"] == "fault"]
    assert faults and "no such device" in faults[0]["text"] and len(faults) == 2
    assert faults[0]["reason"] == "exit status 1"
