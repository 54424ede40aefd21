"""What the contracts in pyproject.toml (`make lint`) cannot say about imports.

Of the standard library and of torch import-linter sees the first name only, it has no list of what
is allowed, and it does not see a module reached as an attribute.
"""

import re
import sys
from pathlib import Path

import grimp

import lolkernels

ROOT = Path(__file__).resolve().parents[1]
KERNELS = [(path, path.read_text("utf-8")) for path in (ROOT / "lolkernels").rglob("*.py")]
TRAINER = [(path, path.read_text("utf-8")) for path in (ROOT / "python" / "lolrl").glob("*.py")]


def test_the_kernels_import_torch_and_only_the_triton_backend_triton() -> None:
    graph = grimp.build_graph("lolkernels", include_external_packages=True, cache_dir=None)
    own = {name for name in graph.modules if name.split(".")[0] == "lolkernels"}
    assert graph.modules - own - set(sys.stdlib_module_names) == {"torch", "triton"}
    users = graph.find_modules_that_directly_import("triton")
    assert all(name.startswith("lolkernels.backends.triton") for name in users), users


def test_process_groups_stay_in_distributed() -> None:
    # The sums of sequences take a context-parallel group.
    users = {p.stem for p, text in KERNELS if re.search(r"torch(\.| import )distributed", text)}
    assert users <= {"distributed", "sequences"}


def inner_names(text: str) -> list[str]:
    """What a text reaches of lolkernels, as an attribute, that is not public."""
    chains = re.findall(r"\b(?:lk|lolkernels)\.([\w.]+)", text)
    public = {*lolkernels.__all__, "__version__"}
    return [c for c in chains if c.split(".")[0] not in public or re.search(r"\._[a-z]", c)]


def test_the_trainer_uses_public_names_only() -> None:
    for path, text in TRAINER:
        assert not inner_names(text), path


def test_the_check_of_names_tells_good_from_bad() -> None:
    assert not inner_names("lk.Sequences(lk.objectives.a_lol, lk.__version__)")
    inner = ["lk.ops.linear_logprob", "lk.Sequences._offsets", "lolkernels.testing.check_objective"]
    for text in [*inner, "lk.objectives._weights"]:
        assert inner_names(text), text
