"""Every example runs by the command in its docstring; it judges its own result."""

import ast
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from cases import ROOT

EXAMPLES = sorted((ROOT / "python" / "examples").glob("*.py"))


def skip_without(code: str) -> None:
    """Skips where a trainer that the code imports is not installed."""
    trainers = "lightning|trl|peft|datasets|deepspeed|torchtitan"  # make test installs the others
    for name in re.findall(rf"^(?:import|from) ({trainers})", code, re.M):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_it_says(example: Path, tmp_path: Path) -> None:
    """A word in capitals stands for a folder."""
    text = example.read_text(encoding="utf-8")
    skip_without(text)
    where = example.relative_to(ROOT).as_posix()
    lines = [line for line in str(ast.get_docstring(ast.parse(text))).splitlines() if where in line]
    words = [str(tmp_path) if word.isupper() else word for word in shlex.split(lines[0])]
    words[words.index(where)] = str(example)
    run = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    done = subprocess.run(
        [sys.executable, *run, *words[1:]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
