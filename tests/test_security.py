"""S1: no source file of the project can run code found in data.

The lint walks the syntax trees of the library, the trainer, the benchmarks and setup.py. It is
itself tested on planted samples, one per rule, and on harmless look-alikes.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("lolkernels", "python", "benchmarks", "examples")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
SOURCES.append(ROOT / "setup.py")

UNSAFE_MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "jsonpickle",
}
UNSAFE_CALLS = {
    "torch.load": "torch.load unpickles",
    "torch.hub.load": "torch.hub.load runs downloaded code",
    "torch.package.PackageImporter": "torch.package runs packaged code",
    "pandas.read_pickle": "read_pickle unpickles",
    "yaml.load": "yaml.load can build any object",
    "yaml.load_all": "yaml.load_all can build any object",
    "yaml.full_load": "yaml.full_load can build objects",
    "yaml.full_load_all": "yaml.full_load_all can build objects",
    "yaml.unsafe_load": "yaml.unsafe_load runs code",
    "yaml.unsafe_load_all": "yaml.unsafe_load_all runs code",
    "eval": "eval runs text",
    "exec": "exec runs text",
    "builtins.eval": "eval runs text",
    "builtins.exec": "exec runs text",
    "os.system": "os.system starts a shell",
    "os.popen": "os.popen starts a shell",
    "subprocess.getoutput": "getoutput starts a shell",
    "subprocess.getstatusoutput": "getstatusoutput starts a shell",
}
NUMPY_LOADERS = {"numpy.load", "numpy.lib.format.read_array"}
# A keyword that must never be given as anything but the literal False.
UNSAFE_KEYWORDS = {"shell": "shell=", "allow_pickle": "allow_pickle="}


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


class _Lint(ast.NodeVisitor):
    """Collects `line: reason` for each unsafe construct, following import aliases."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.aliases: dict[str, str] = {}

    def _flag(self, node: ast.AST, reason: str) -> None:
        self.found.append(f"{getattr(node, 'lineno', 0)}: {reason}")

    def _dotted(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            base = self._dotted(node.value)
            return None if base is None else f"{base}.{node.attr}"
        return None

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            if name.name.split(".")[0] in UNSAFE_MODULES:
                self._flag(node, f"imports {name.name}")
            if name.asname:
                self.aliases[name.asname] = name.name

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level == 0 and module.split(".")[0] in UNSAFE_MODULES:
            self._flag(node, f"imports from {module}")
        for name in node.names:
            if node.level == 0:
                self.aliases[name.asname or name.name] = f"{module}.{name.name}"

    # A reference is enough: `loader = torch.load` is as unsafe as the call.
    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._check_name(node)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self._check_name(node)

    def _check_name(self, node: ast.Attribute | ast.Name) -> None:
        dotted = self._dotted(node)
        if dotted in UNSAFE_CALLS:
            self._flag(node, UNSAFE_CALLS[dotted])
        elif isinstance(node, ast.Attribute) and node.attr in ("read_pickle", "to_pickle"):
            self._flag(node, f"{node.attr} uses pickle")

    def visit_Call(self, node: ast.Call) -> None:
        dotted = self._dotted(node.func)
        first = node.args[0] if node.args else None
        if dotted in ("importlib.import_module", "__import__"):
            module = str(first.value) if isinstance(first, ast.Constant) else ""
            if module.split(".")[0] in UNSAFE_MODULES:
                self._flag(node, f"imports {module}")
        if dotted in NUMPY_LOADERS and len(node.args) > 2 and not _is_false(node.args[2]):
            self._flag(node, "np.load with allow_pickle by position")
        for keyword in node.keywords:
            if keyword.arg in UNSAFE_KEYWORDS and not _is_false(keyword.value):
                self._flag(node, f"{UNSAFE_KEYWORDS[keyword.arg]} is not the literal False")
            if keyword.arg == "trust_remote_code" and _is_true(keyword.value):
                self._flag(node, "trust_remote_code=True")
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            name = key.value if isinstance(key, ast.Constant) else None
            if name == "trust_remote_code" and _is_true(value):
                self._flag(node, "trust_remote_code: True")
            if name in UNSAFE_KEYWORDS and _is_true(value):
                self._flag(node, f"{name}: True")
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = node.args
        positional = arguments.posonlyargs + arguments.args
        defaults = list(zip(reversed(positional), reversed(arguments.defaults), strict=False))
        defaults += list(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
        for argument, default in defaults:
            if argument.arg == "trust_remote_code" and default is not None and _is_true(default):
                self._flag(node, "trust_remote_code defaults to True")
        self.generic_visit(node)


def unsafe_constructs(source: str) -> list[str]:
    """Returns one `line: reason` for each construct of `source` that could run code from data."""
    lint = _Lint()
    lint.visit(ast.parse(source))
    return lint.found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_has_no_way_to_run_data(path: Path) -> None:
    assert unsafe_constructs(path.read_text(encoding="utf-8")) == []


def test_the_lint_reads_the_whole_project() -> None:
    names = {str(path.relative_to(ROOT)) for path in SOURCES}
    assert {"setup.py", "lolkernels/__init__.py", "benchmarks/run.py"} <= names
    assert any(name.startswith("python/lolrl/") for name in names)


PLANTED = [
    "import pickle",
    "import pickle as p",
    "import joblib.numpy_pickle",
    "from pickle import loads",
    "from shelve import open as o",
    "import marshal",
    "def f():\n    import dill",
    "import importlib\nimportlib.import_module('pickle')",
    "from importlib import import_module as m\nm('cloudpickle')",
    "__import__('pickle')",
    "import torch\ntorch.load('x', weights_only=True)",
    "import torch as t\nt.load('x')",
    "from torch import load\nload('x')",
    "from torch import load as read\nread('x')",
    "import torch\nreader = torch.load",
    "import torch\ntorch.hub.load('a', 'b')",
    "import numpy as np\nnp.load('x', allow_pickle=True)",
    "import numpy as np\nflag = True\nnp.load('x', allow_pickle=flag)",
    "import numpy\nnumpy.load('x', None, True)",
    "import numpy as np\nnp.load('x', **{'allow_pickle': True})",
    "import pandas\npandas.read_pickle('x')",
    "frame.to_pickle('x')",
    "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
    "from yaml import full_load\nfull_load(text)",
    "import yaml as y\ny.unsafe_load(text)",
    "eval('1')",
    "f = exec",
    "import builtins\nbuiltins.eval('1')",
    "import subprocess\nsubprocess.run('ls', shell=True)",
    "import subprocess\nsubprocess.Popen('ls', shell=flag)",
    "import os\nos.system('ls')",
    "from os import popen\npopen('ls')",
    "AutoModel.from_pretrained('x', trust_remote_code=True)",
    "kwargs = {'trust_remote_code': True}",
    "def load(path, trust_remote_code=True): ...",
    "def load(path, *, trust_remote_code=True): ...",
]


@pytest.mark.parametrize("sample", PLANTED)
def test_the_lint_finds_a_planted_sample(sample: str) -> None:
    assert len(unsafe_constructs(sample)) >= 1


HARMLESS = [
    "model.eval()",
    "import json\njson.load(file)",
    "import yaml\nyaml.safe_load(text)",
    "from safetensors.torch import load_file\nload_file('x')",
    "import numpy as np\nnp.load('x')\nnp.load('x', allow_pickle=False)",
    "import subprocess\nsubprocess.run(['ls'], shell=False, check=True)",
    "AutoModel.from_pretrained('x', trust_remote_code=False)",
    "AutoModel.from_pretrained('x', trust_remote_code=args.trust_remote_code)",
    "def load(path, *, trust_remote_code=False): ...",
    "import torch\ntorch.ops.load_library('x')",
    "text = 'import pickle'",
    "from .pickle import jar",
]


@pytest.mark.parametrize("sample", HARMLESS)
def test_the_lint_leaves_a_harmless_sample_alone(sample: str) -> None:
    assert unsafe_constructs(sample) == []
