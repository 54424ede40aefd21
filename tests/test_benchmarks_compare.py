"""The comparison of two versions: its statistics, its errors, and a version against itself."""

import math
import os
import subprocess
import sys
from pathlib import Path

import compare
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git repository")


def test_the_interval_is_made_of_the_order_statistics_of_the_sign_test() -> None:
    # n = 8: both ends miss with 2 / 2^8 = 0.8%; n = 12: the second from either end with 0.6%.
    assert compare.interval([3, 1, 2, 8, 5, 7, 6, 4]) == (1, 8)
    assert compare.interval(list(range(12))) == (1, 10)
    assert compare.interval(list(range(12)), level=0.95) == (2, 9)
    assert compare.fewest_rounds() == 8
    with pytest.raises(ValueError, match="7 rounds are too few"):
        compare.interval(list(range(7)))


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 12, generator=generator).exp()  # skewed, median 1
    held = [low <= 1 <= high for low, high in map(compare.interval, noise.tolist())]
    assert sum(held) / len(held) >= 0.985


def times(median: float, rounds: int = 12) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    return (median * (1 + 0.02 * torch.randn(rounds, generator=generator))).tolist()


@pytest.mark.parametrize(
    ("factor", "want"),
    [
        (1.2, "slower"),
        (0.8, "faster"),
        (1.0, "no difference shown"),
        (1.005, "no difference shown"),
    ],
)
def test_verdicts_on_known_times(factor: float, want: str) -> None:
    base = times(0.1)
    found = compare.summary(base, [factor * value for value in base], 0.01)
    assert found["verdict"] == want
    assert math.isclose(found["ratio"], factor)
    assert found["low"] <= found["ratio"] <= found["high"]


def test_the_noise_of_a_shared_round_cancels() -> None:
    drift = [1, 1.5, 2, 3, 1, 1, 4, 1.2, 1, 2, 1, 1]  # the machine is busy now and then
    base = [a * b for a, b in zip(times(0.1), drift, strict=True)]
    assert compare.summary(base, [1.1 * value for value in base], 0.01)["verdict"] == "slower"


def test_results_that_differ_are_not_timed() -> None:
    shape = compare.Shape(8, 4, 50, 4)
    one = torch.linspace(1, 2, 32)
    assert compare.disagreement(one, one * (1 + 1e-6), "dhidden", shape) is None
    assert "dhidden differs by" in compare.disagreement(one, one * 1.01, "dhidden", shape)
    logps = -torch.linspace(1, 2, 8)
    assert compare.disagreement(logps, logps + 1e-4, "logps", shape) is None
    assert "nat" in compare.disagreement(logps, logps + 1e-3, "logps", shape)
    for spoilt in (one * torch.nan, one * torch.inf):
        assert compare.disagreement(one, spoilt, "dweight", shape)
        assert compare.disagreement(one[:8], spoilt[:8], "logps", shape)


def test_a_broken_build_shows_the_compilers_last_lines(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text("print('gcc: error: no such thing')\n")
    (tmp_path / "lolkernels").mkdir()
    with pytest.raises(compare.CompareError, match=r"base cannot be built(.|\n)*no such thing"):
        compare.build("base", tmp_path, "cpu")


@needs_git
def test_the_head_is_copied_as_it_stands(tmp_path: Path) -> None:
    compare.copy_head(tmp_path)
    assert compare.native(tmp_path) == compare.native(ROOT)
    name = Path("lolkernels") / "__init__.py"
    assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
    assert not any(tmp_path.rglob("*.so"))
    (tmp_path / "csrc" / "contract.h").write_text("")
    assert compare.native(tmp_path) != compare.native(ROOT)


def worktrees() -> set[str]:
    listed = subprocess.run(
        ["git", "worktree", "list", "--porcelain"], cwd=ROOT, text=True, capture_output=True
    )
    return {line for line in listed.stdout.splitlines() if "bench-compare-" in line}


@needs_git
@pytest.mark.ci
@pytest.mark.compiled
def test_a_version_agrees_with_itself_and_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert compare.main(["no-such-commit"]) == 2
    assert "is no commit of this repository" in capsys.readouterr().err
    before, flags = worktrees(), ["--shapes", "64,32,1000,16", "--rounds", "8", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "benchmarks/run.py", "compare", "HEAD", *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if "| T=64 " in line]
    assert len(rows) == 5
    assert not [row for row in rows if "not compared" in row]
    # A busy machine may fake a difference in one row, hardly in most.
    assert sum("no difference shown" in row for row in rows) >= 3
    assert worktrees() == before
