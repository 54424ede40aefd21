"""No source file of the project can run code found in data, beyond what `make lint` refuses.

Ruff's rules (`S` and the banned names in pyproject.toml) know calls and imports. These patterns
add what it cannot see: the value of a keyword, a method's name, a module named as text.
"""

import re
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
HARMLESS = """model.eval()
np.load('x'); np.load('x', allow_pickle=False)
subprocess.run(['ls'], shell=False, check=True)
AutoModel.from_pretrained('x', trust_remote_code=args.trust_remote_code)
def load(path, *, trust_remote_code: bool = False): ...
text = 'import pickle'
"""


def found(source: str) -> list[str]:
    return [pattern for pattern, _ in PATTERNS if re.search(pattern, source)]


def test_every_planted_sample_is_found_and_no_harmless_one() -> None:
    for pattern, sample in PATTERNS:
        assert pattern in found(sample), sample
    assert found(HARMLESS) == []


def test_no_source_matches_a_pattern() -> None:
    assert len(SOURCES) > 60
    for path in SOURCES:
        assert found(path.read_text(encoding="utf-8")) == [], path
