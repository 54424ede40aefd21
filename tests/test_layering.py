"""The import rules of the project, checked on the syntax trees.

csrc <- backends <- ops, chunked <- head      sequences, distributed, objectives: torch only
lolkernels (public names only) <- lolrl       transformers only in lolrl, trl only in lolrl/trl.py
testing <- tests, benchmarks                  nobody imports tests or benchmarks
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lolkernels

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "lolkernels"
TRAINER = ROOT / "python" / "lolrl"
STDLIB = set(sys.stdlib_module_names)

# What each module of lolkernels may import from lolkernels. A backend imports no other module at
# all; its toolchain is listed in TOOLCHAINS.
INTERNAL: dict[str, set[str]] = {
    "sequences": set(),
    "distributed": set(),
    "checks": set(),
    "objectives": {"sequences"},
    "planner": {"sequences"},
    "backends": {"backends.*"},
    "deferred": {"checks"},
    "gemm": set(),
    "chunked": {"", "gemm", "planner"},
    "ops": {"backends", "chunked", "deferred"},
    "loss_op": {"backends", "chunked", "deferred", "objectives", "planner", "sequences"},
    "functional": {"backends", "checks", "chunked", "loss_op", "objectives", "ops", "sequences"},
    "head": {"backends", "checks", "functional", "objectives", "sequences"},
    "info": {"", "backends", "backends.*", "chunked", "planner"},
    "plan": {"planner"},
    "testing": {"", "backends", "backends.*", "objectives", "sequences"},
}
TOOLCHAINS: dict[str, set[str]] = {
    "backends.triton_kernels": {"triton"},
    "backends.triton_onchip": {"triton"},
    "backends.triton_onchip_kernels": {"triton"},
}
# Modules of one toolchain.
SIBLINGS = {
    "backends.cpu": {"backends.compiled"},
    "backends.cuda": {"backends.compiled"},
    "backends.cuda_hopper": {"backends.cuda"},
    "backends.triton": {"backends.triton_kernels"},
    "backends.triton_onchip": {"backends.triton", "backends.triton_onchip_kernels"},
    "backends.triton_onchip_kernels": {"backends.triton_kernels"},
}
THIRD_PARTY = {"torch"}


def modules(folder: Path, package: str) -> list[tuple[str, Path]]:
    """Lists (dotted name inside the package, path); a package's __init__ has its package's name."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = list(path.relative_to(folder).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found.append((".".join(parts), path))
    assert found, f"{package} has no modules under {folder}"
    return found


def imports(path: Path, package: str) -> Iterator[tuple[str, int]]:
    """Yields (absolute dotted module or name imported, line), wherever in the file it stands."""
    parts = path.relative_to(ROOT / "python" if package == "lolrl" else ROOT).with_suffix("").parts
    here = list(parts[:-1])  # the package that a leading dot means
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            for name in node.names:
                yield f"{stem}.{name.name}", node.lineno


def names_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def internal_target(dotted: str) -> str:
    """The module of lolkernels that an import reaches: `lolkernels.ops.logprob` -> `ops`."""
    while dotted and not names_module(dotted):
        dotted = dotted.rpartition(".")[0]
    return dotted.partition(".")[2]


KERNEL_MODULES = modules(KERNELS, "lolkernels")
TRAINER_MODULES = modules(TRAINER, "lolrl")


@pytest.mark.parametrize(("name", "path"), KERNEL_MODULES, ids=[n for n, _ in KERNEL_MODULES])
def test_kernel_library_imports_torch_and_its_own_layer_only(name: str, path: Path) -> None:
    if name.startswith("backends."):
        allowed = SIBLINGS.get(name, set())
    elif name == "":
        allowed = {inner.partition(".")[0] for inner, _ in KERNEL_MODULES} | {"backends"}
    else:
        package = name.partition(".")[0]
        assert package in INTERNAL, f"lolkernels/{name}: give its layer in INTERNAL"
        allowed = INTERNAL[package] | {f"{package}.*"}
    outside = THIRD_PARTY | TOOLCHAINS.get(name, set())
    for dotted, line in imports(path, "lolkernels"):
        top = dotted.partition(".")[0]
        if top in STDLIB:
            continue
        if top != "lolkernels":
            assert top in outside, f"{path}:{line} imports {dotted}"
            continue
        target = internal_target(dotted)
        wildcard = f"{target.partition('.')[0]}.*"
        assert target in allowed or wildcard in allowed, f"{path}:{line} imports {dotted}"


def test_kernel_library_uses_relative_imports_inside_itself() -> None:
    for name, path in KERNEL_MODULES:
        if name in ("info", "testing"):  # clients of the public names
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert not (node.module or "").startswith("lolkernels"), f"{path}:{node.lineno}"
            if isinstance(node, ast.Import):
                for alias in node.names:
                    assert not alias.name.startswith("lolkernels"), f"{path}:{node.lineno}"


def test_process_groups_stay_in_distributed() -> None:
    for name, path in KERNEL_MODULES:
        if name in ("distributed", "sequences"):  # the sequence sums take a context-parallel group
            continue
        for dotted, line in imports(path, "lolkernels"):
            assert not dotted.startswith("torch.distributed"), f"{path}:{line} imports {dotted}"


def test_the_layer_table_has_no_stale_rows() -> None:
    present = {name for name, _ in KERNEL_MODULES}
    planned = {"distributed", "testing"}  # named in the design; the rule may precede the file
    assert set(INTERNAL) - planned <= present


def lolkernels_names(path: Path) -> Iterator[tuple[str, int]]:
    """Yields each dotted name below `lolkernels` that a file reaches, with its line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "lolkernels":
                    yield name.name.partition(".")[2], node.lineno
                    bound[name.asname or "lolkernels"] = name.name if name.asname else "lolkernels"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lolkernels":
            for name in node.names:
                dotted = f"{node.module}.{name.name}"
                yield dotted.partition(".")[2], node.lineno
                bound[name.asname or name.name] = dotted
    for node in ast.walk(tree):
        chain: list[str] = []
        inner: ast.expr | ast.AST = node
        while isinstance(inner, ast.Attribute):
            chain.insert(0, inner.attr)
            inner = inner.value
        if chain and isinstance(inner, ast.Name) and inner.id in bound:
            yield ".".join([bound[inner.id], *chain]).partition(".")[2], node.lineno


def is_public(dotted: str) -> bool:
    """True for "", for a name in lolkernels.__all__, and for what a public object offers openly."""
    if dotted in ("", "__version__"):
        return True
    first, *rest = dotted.split(".")
    if first not in lolkernels.__all__:
        return False
    value = getattr(lolkernels, first)
    exported = getattr(value, "__all__", None)
    if rest and exported is not None and rest[0] not in exported:
        return False
    return not any(part.startswith("_") for part in rest)


@pytest.mark.parametrize(("name", "path"), TRAINER_MODULES, ids=[n for n, _ in TRAINER_MODULES])
def test_trainer_uses_public_names_only(name: str, path: Path) -> None:
    for dotted, line in lolkernels_names(path):
        assert is_public(dotted), f"{path}:{line} uses lolkernels.{dotted}"


@pytest.mark.parametrize(("name", "path"), TRAINER_MODULES, ids=[n for n, _ in TRAINER_MODULES])
def test_trl_is_imported_by_its_own_module_only(name: str, path: Path) -> None:
    for dotted, line in imports(path, "lolrl"):
        assert dotted.split(".")[0] != "trl" or name == "trl", f"{path}:{line} imports {dotted}"


def test_nobody_imports_tests_or_benchmarks_and_testing_stays_out_of_the_products() -> None:
    for package, found in (("lolkernels", KERNEL_MODULES), ("lolrl", TRAINER_MODULES)):
        for name, path in found:
            for dotted, line in imports(path, package):
                top = dotted.split(".")[0]
                assert top not in ("tests", "benchmarks", "conftest"), f"{path}:{line} {dotted}"
                itself = name.partition(".")[0] == "testing"
                assert itself or not dotted.startswith("lolkernels.testing"), f"{path}:{line}"
                if package == "lolkernels":
                    assert top != "lolrl", f"{path}:{line} {dotted}"
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        for dotted, line in imports(path, "benchmarks"):
            assert dotted.split(".")[0] != "tests", f"{path}:{line} imports {dotted}"


SAMPLES = [
    ("import lolkernels as lk\nlk.Sequences", True),
    ("from lolkernels import objectives\nobjectives.a_lol", True),
    ("import lolkernels as lk\nlk.objectives.a_lol\nlk.__version__", True),
    ("from lolkernels.ops import linear_logprob", False),
    ("from lolkernels import backends", False),
    ("import lolkernels.backends.cpu", False),
    ("import lolkernels as lk\nlk.ops.linear_logprob", False),
    ("import lolkernels as lk\nlk.Sequences._offsets", False),
    ("import lolkernels\nlolkernels.testing.peaky", False),
    ("from lolkernels import objectives as o\no._weights", False),
]


@pytest.mark.parametrize(("source", "clean"), SAMPLES)
def test_the_public_name_check_tells_good_from_bad(
    source: str, clean: bool, tmp_path: Path
) -> None:
    sample = tmp_path / "sample.py"
    sample.write_text(source)
    assert all(is_public(dotted) for dotted, _ in lolkernels_names(sample)) is clean
