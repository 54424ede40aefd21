"""Killed at random moments, the run goes on by itself and ends with the same bits."""

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lolrl.annotate import annotate
from lolrl.checkpoints import CheckpointError, last_complete
from lolrl.config import AnnotateConfig
from tests.lolrl.toys import make_llama, make_rows, make_tokenizer, run

ROOT = Path(__file__).resolve().parents[2]


def work(folder: Path) -> None:
    """What is killed: the toy policy with a checkpoint after every update."""
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    config = AnnotateConfig(keep="all", cache_dir=str(folder / "cache"))
    model = make_llama(len(tokenizer))
    rows = annotate(model, tokenizer, make_rows(27), config=config, progress=False).dataset
    settings = {"max_steps": 200, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
    settings |= {"save_steps": 1, "save_total_limit": 2, "save_best_and_last": True}
    try:
        last_complete(folder)
        resume = True
    except CheckpointError:
        resume = False
    trainer = run(folder, rows, tokenizer, model=model, resume=resume, **settings)
    digest = hashlib.sha256()
    for _, parameter in sorted(trainer.model.named_parameters()):
        digest.update(parameter.detach().numpy().tobytes())
    print("DONE", digest.hexdigest(), flush=True)


def start(folder: Path) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.lolrl.test_crash", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=env, cwd=ROOT, **pipes)


def outcome(process: subprocess.Popen) -> str | None:
    output = process.communicate(timeout=300)[0]
    done = [line for line in output.splitlines() if line.startswith("DONE ")]
    assert done or process.returncode == -9, output[-3000:]
    return done[0] if done else None


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(tmp_path) -> None:
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


if __name__ == "__main__":
    work(Path(sys.argv[1]))
