"""The benchmark refuses wrong results, and its report says what was measured, where and how."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        capture_output=True,
        timeout=600,
    )


@pytest.mark.parametrize("op", ["linear_loss", "linear_logprob", "score", "logprob"])
def test_one_op_writes_json_and_the_markdown_made_from_it(op: str, tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "run.py")
    out = tmp_path / "here"
    flags = ["--shape", "tiny", "--rounds", "2", "--threads", "1", "--out", str(out)]
    memory = op == "linear_loss"  # a process of its own for each contestant: once is enough
    flags += ["--memory"] if memory else []
    done = run(script, "--op", op, *flags)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.with_suffix(".json").read_text())
    assert {"device", "torch", "lolkernels", "commit", "command"} <= set(record["environment"])
    (case,) = record["cases"]
    rows = {row["label"]: row for row in case["rows"]}
    assert {"lolkernels", "eager", case["floor"]} <= set(rows)
    assert all(len(row["times_ms"]) == 2 and min(row["times_ms"]) > 0 for row in rows.values())
    assert rows["lolkernels"]["sum_error_nat"] <= 1e-3
    for name in ("lolkernels", "eager"):
        assert (rows[name]["extra_bytes"] is not None) is memory
    assert (rows["lolkernels"]["formula_bytes"] is not None) is memory
    page = out.with_suffix(".md").read_text()
    assert (
        f"| lolkernels | T=64 D=32 V=1000 L=16 fp32 | {rows['lolkernels']['median_ms']:.1f} |"
        in page
    )
    assert f"--op {op}" in page


GATE = """
import torch
import measure, peers
from shapes import SHAPES, Result

torch.set_num_threads(1)
spoil = {
    "zeros": lambda t: torch.zeros_like(t),
    "scaled": lambda t: 1.02 * t,
    "rolled": lambda t: t.roll(1, 0),
}
honest = peers.build_lolkernels
for op in ("linear_loss", "linear_logprob"):
    entry = measure.Entry("lolkernels", "lolkernels", op, SHAPES["tiny"])
    measure.check_and_time([entry], rounds=1)
    for field in Result._fields:
        for how, change in spoil.items():
            def build(op, inputs, backend=None):
                call = honest(op, inputs)
                def wrong():
                    result = call()
                    return result._replace(**{field: change(getattr(result, field))})
                return wrong
            peers.build_lolkernels = build
            try:
                measure.check_and_time([entry], rounds=1)
            except RuntimeError as error:
                assert "off by" in str(error), error
            else:
                raise SystemExit(f"{op}: {field} {how} was timed")
            peers.build_lolkernels = honest
print("refused")
"""


def test_a_wrong_result_is_never_timed() -> None:
    done = run("-c", GATE)
    assert done.returncode == 0 and done.stdout.strip() == "refused", done.stdout + done.stderr


GOALS = """
from measure import Row
from run import Goal, judge

def row(label, median, extra=None, formula=None, tokens=100):
    return Row(label, label, "score", "", tokens, False, [median], median, 0.0, extra, formula)

rows = {"a": row("a", 21.0, 105, 100, tokens=200), "b": row("b", 20.0, 210)}
for kind, over, under, want in (
    ("time", "a", "b", 1.05), ("rate", "a", "b", 0.525), ("memory", "a", "b", 0.5),
    ("formula", "a", "a", 0.05),
):
    for limit, met in ((want + 1e-6, True), (want - 1e-6, False)):
        found = judge(Goal("g", over, under, limit, kind), rows)
        assert abs(found["measured"] - want) < 1e-12 and found["met"] is met, found
"""


def test_goals_are_judged_by_their_definition() -> None:
    done = run("-c", GOALS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shape", "no-such"], "--shape must be one of"),
        (["--shape", "100,8,50,7"], "must be a multiple of seq_len=7"),
        (["--op", "softmax"], "invalid choice"),
    ],
)
def test_bad_flags_say_what_to_change(flags: list[str], message: str) -> None:
    done = run(str(ROOT / "benchmarks" / "run.py"), *flags)
    assert done.returncode == 2 and message in done.stderr
