"""Killed at random moments, the run goes on by itself and ends with the same bits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path) -> subprocess.Popen:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.lolrl.crash_worker", str(folder)]
    return subprocess.Popen(
        command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def outcome(process: subprocess.Popen) -> str | None:
    output = process.communicate(timeout=300)[0]
    done = [line for line in output.splitlines() if line.startswith("DONE ")]
    assert done or process.returncode == -9, output[-3000:]
    return done[0] if done else None


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    whole = outcome(start(tmp_path / "whole"))
    assert whole is not None
    rng, kills, final = random.Random(0), 0, None
    folder = tmp_path / "killed"
    for _ in range(60):
        process = start(folder)
        # Past the imports: wait for the first sign of work, then a random moment of it.
        marks = [folder / "config.yaml", folder / "cache"]
        stamp = time.time()
        while process.poll() is None and time.time() - stamp < 120:
            if kills < 2 and marks[1].exists():
                break
            if marks[0].exists() and marks[0].stat().st_mtime > stamp:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0.2, 2.0))
        process.kill()
        final = outcome(process)
        if final is not None:
            break
        kills += 1
    assert final == whole
    assert kills >= 3
