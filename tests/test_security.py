"""No source file of the project can run code found in data.

Ruff's rules (`S` and the banned names in pyproject.toml) say so in `make lint`. Patterns add what
ruff cannot see: the value of a keyword, a method's name, a module imported by its name as text.
Both are judged here on planted samples, and on harmless look-alikes.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("lolkernels", "python", "benchmarks")
SOURCES = [ROOT / "setup.py", *(p for name in FOLDERS for p in sorted((ROOT / name).rglob("*.py")))]

# A pattern, and a line that it finds.
PATTERNS = [
    (r"\ballow_pickle\b(?!\s*=\s*False\b)", "np.load('x', **{'allow_pickle': True})"),
    (
        r"\btrust_remote_code\b['\"]?\s*(:\s*bool\s*)?[=:]\s*True\b",
        "trust_remote_code: bool = True",
    ),
    (r"\bshell\b['\"]?\s*[=:]\s*(?!False\b)", "subprocess.Popen('ls', shell=flag)"),
    (r"\b(read|to)_pickle\b", "frame.to_pickle('x')"),
    # The third argument is allow_pickle.
    (r"\b(np|numpy)\.load\([^()]*,[^()]*,", "numpy.load('x', None, True)"),
    (
        r"(import_module|__import__)\(\s*['\"]\w*(pickle|marshal|shelve|dill|joblib)",
        "__import__('dill')",
    ),
    (r"\bimport_module as\b", "from importlib import import_module as m"),
    (r"=\s*(eval|exec)\b(?!\()", "f = exec"),
]
# One sample a line.
PLANTED = """import pickle
import pickle as p
import joblib.numpy_pickle
from pickle import loads
from shelve import open as o
import marshal
def f(): import dill
import importlib; importlib.import_module('pickle')
from importlib import import_module as m; m('cloudpickle')
__import__('pickle')
import torch; torch.load('x', weights_only=True)
import torch as t; t.load('x')
from torch import load; load('x')
from torch import load as read; read('x')
import torch; reader = torch.load
import torch; torch.hub.load('a', 'b')
import numpy as np; np.load('x', allow_pickle=True)
import numpy as np; flag = True; np.load('x', allow_pickle=flag)
import numpy; numpy.load('x', None, True)
import numpy as np; np.load('x', **{'allow_pickle': True})
import pandas; pandas.read_pickle('x')
frame.to_pickle('x')
import yaml; yaml.load(text, Loader=yaml.SafeLoader)
from yaml import full_load; full_load(text)
import yaml as y; y.unsafe_load(text)
eval('1')
f = exec
import builtins; builtins.eval('1')
import subprocess; subprocess.run('ls', shell=True)
import subprocess; subprocess.Popen('ls', shell=flag)
import os; os.system('ls')
from os import popen; popen('ls')
AutoModel.from_pretrained('x', trust_remote_code=True)
kwargs = {'trust_remote_code': True}
def load(path, trust_remote_code=True): ...
def load(path, *, trust_remote_code: bool = True): ...
from tests.lolrl import toys"""

HARMLESS = """model.eval()
import json; json.load(file)
import yaml; yaml.safe_load(text)
from safetensors.torch import load_file; load_file('x')
import numpy as np; np.load('x'); np.load('x', allow_pickle=False)
import subprocess; subprocess.run(['ls'], shell=False, check=True)
AutoModel.from_pretrained('x', trust_remote_code=False)
AutoModel.from_pretrained('x', trust_remote_code=args.trust_remote_code)
def load(path, *, trust_remote_code: bool = False): ...
import torch; torch.ops.load_library('x')
text = 'import pickle'
from .pickle import jar"""


def by_pattern(source: str) -> list[str]:
    return [pattern for pattern, _ in PATTERNS if re.search(pattern, source)]


def found(samples: list[str], folder: Path) -> list[bool]:
    """For each sample, whether ruff, set up as for the library, or a pattern finds anything."""
    paths = []
    for number, sample in enumerate(samples):
        paths.append(folder / f"sample{number}.py")
        paths[-1].write_text(f"{sample}\n")
    options = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", *options, "--output-format", "json", *paths],
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr
    findings = [f for f in json.loads(done.stdout) if re.match(r"S\d|TID251", f["code"])]
    named = {Path(finding["filename"]).name for finding in findings}
    return [p.name in named or bool(by_pattern(p.read_text())) for p in paths]


def test_every_pattern_finds_its_sample() -> None:
    for pattern, sample in PATTERNS:
        assert pattern in by_pattern(sample), sample


def test_every_planted_sample_is_found_and_no_harmless_one(tmp_path: Path) -> None:
    for text, expected in ((PLANTED, True), (HARMLESS, False)):
        samples = text.splitlines()
        wrong = [s for s, f in zip(samples, found(samples, tmp_path), strict=True) if f != expected]
        assert not wrong, wrong


def test_no_source_matches_a_pattern() -> None:
    assert len(SOURCES) > 60
    for path in SOURCES:
        assert by_pattern(path.read_text(encoding="utf-8")) == [], path
