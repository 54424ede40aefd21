"""One rank and two gloo ranks train the same model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


def train(folder: Path, ranks: int, size: int, steps: int, *resume: str) -> list[dict]:
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
        if ranks > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            env |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            env |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        module = [sys.executable, "-m", "tests.lolrl.ranks_worker"]
        command = [*module, str(folder), str(size), str(steps), *resume]
        processes.append(
            subprocess.Popen(
                command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    try:
        outputs = [p.communicate(timeout=240)[0].decode() for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert all(p.returncode == 0 for p in processes), "\n".join(o[-2000:] for o in outputs)
    return [
        {
            "parameters": load_file(folder / f"rank{rank}.safetensors"),
            "log": json.loads((folder / f"rank{rank}.json").read_text()),
        }
        for rank in range(ranks)
    ]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("ranks") / "two"
    return folder, train(folder, 2, 2, 2)


def compare_with_one(ranks: list[dict], folder: Path) -> None:
    (one,) = train(folder, 1, 8, 1)
    first, second = ranks
    for name, value in one["parameters"].items():
        assert torch.equal(first["parameters"][name], second["parameters"][name]), name
        assert (first["parameters"][name] - value).abs().max() <= 1e-10, name
    assert len(one["log"]) == len(first["log"]) == 2
    figures = ("loss", "ratio/min", "ratio/mean", "ratio/max", "kl", "clip_ratio", "entropy")
    figures += ("logps/mean", "advantage/mean", "positive_share", "num_tokens", "grad_norm")
    for mine, theirs in zip(first["log"], one["log"], strict=True):
        for name in figures:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-9, abs=1e-12), name


def test_two_ranks_equal_one(two: tuple[Path, list[dict]], tmp_path: Path) -> None:
    """Uneven completions and rows without weight on either rank; 8 updates in float64."""
    compare_with_one(two[1], tmp_path / "one")


@pytest.mark.slow
def test_two_ranks_without_accumulation_equal_one(tmp_path: Path) -> None:
    compare_with_one(train(tmp_path / "two", 2, 4, 1), tmp_path / "one")


def test_two_ranks_resume_to_the_same_bits(two: tuple[Path, list[dict]], tmp_path: Path) -> None:
    """From the middle of a log window, whose sums came from both ranks."""
    folder, whole = two
    resumed = train(tmp_path / "resumed", 2, 2, 2, str(folder / "checkpoint-4"))
    for mine, theirs in zip(resumed, whole, strict=True):
        for name, value in theirs["parameters"].items():
            assert torch.equal(mine["parameters"][name], value), name
    for mine, theirs in zip(resumed[0]["log"], whole[0]["log"], strict=True):
        for name in ("loss", "ratio/min", "ratio/mean", "ratio/max", "kl", "num_tokens"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-12), name
