"""Building and installing: without a compiler, as a wheel, through make, and from pinned hashes."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from setuptools import Distribution
from torch.utils import cpp_extension

import lolkernels as lk

ROOT = Path(__file__).resolve().parents[1]
TREE = ("csrc", "lolkernels", "python", "requirements")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "README.md", "LICENSE")
NO_COMPILER = "/nonexistent/compiler"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


def copy_tree(folder: Path) -> Path:
    """Copies what a build reads, without anything that was built here."""
    tree = folder / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.o", "*.egg-info", "build")
    for name in TREE:
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in FILES:
        shutil.copy2(ROOT / name, tree / name)
    return tree


def pip(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    flags = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    return subprocess.run(
        [*command, *flags],
        cwd=cwd,
        env={**os.environ, "MAX_JOBS": "1", **environment},
        text=True,
        capture_output=True,
        timeout=900,
    )


def fake_nvcc(folder: Path, *lines: str) -> str:
    """Writes a CUDA compiler that does `lines` into a folder; returns a PATH that begins there."""
    folder.mkdir()
    nvcc = folder / "nvcc"
    nvcc.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    nvcc.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_a_machine_without_a_compiler_gets_a_working_library(tmp_path: Path) -> None:
    tree, target = copy_tree(tmp_path), tmp_path / "site"
    # The CUDA kernels are an object of their own: their compiler is tried all the same.
    path = fake_nvcc(tmp_path / "bin", f"touch {tmp_path}/nvcc-ran", "exit 1")
    done = pip(
        "install", f"--target={target}", ".", cwd=tree, CC=NO_COMPILER, CXX=NO_COMPILER, PATH=path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "nvcc-ran").exists()
    assert not list(target.rglob("*.so"))

    script = """
import warnings, torch
import lolkernels as lk
why = lk.available_backends()
assert why["reference"] is None, why
assert why["cpu"], why
hidden, weight = torch.randn(4, 8), torch.randn(11, 8)
labels = torch.tensor([0, 10, 3, 3])
expected = torch.log_softmax(hidden.double() @ weight.double().T, -1)[range(4), labels]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(3):
        out = lk.linear_logprob(hidden, weight, labels)
said = [str(w.message) for w in said if "reference" in str(w.message)]
assert len(said) == 1, said
torch.testing.assert_close(out.logps.double(), expected, atol=2e-5, rtol=0)
try:
    lk.linear_logprob(hidden, weight, labels, backend="cpu")
except ValueError as error:
    assert "backend" in str(error) and "cpu" in str(error), error
else:
    raise AssertionError("a missing backend was accepted")
print(lk.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target), "TRITON_INTERPRET": "0"},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(target))


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_where_there_is_a_compiler_the_compiled_backend_is_there() -> None:
    # Tests of a missing backend are skipped: this one keeps a broken build from hiding that way.
    assert lk.available_backends()["cpu"] is None


@pytest.mark.ci
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_the_wheel_holds_the_packages_and_an_abi3_library(tmp_path: Path) -> None:
    # A CUDA part that does not compile takes nothing with it.
    path = fake_nvcc(tmp_path / "bin", f"touch {tmp_path}/nvcc-ran", "exit 1")
    tree = copy_tree(tmp_path)
    done = pip("wheel", f"--wheel-dir={tmp_path}", ".", cwd=tree, CUDA_HOME="", PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "nvcc-ran").exists()
    (wheel,) = tmp_path.glob("lolkernels-*.whl")
    assert "-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("lolkernels/__init__.py", "lolkernels/backends/cpu.py", "lolkernels/py.typed"):
        assert name in names
    assert {f"lolrl/{path.name}" for path in (ROOT / "python" / "lolrl").glob("*.py")} <= set(names)
    libraries = [name for name in names if name.endswith((".so", ".pyd", ".dylib"))]
    assert libraries == ["lolkernels/_C.abi3.so"]
    assert {name.split("/")[0] for name in names} == {
        "lolkernels",
        "lolrl",
        f"lolkernels-{metadata.version('lolkernels')}.dist-info",
    }
    zipfile.ZipFile(wheel).extract(libraries[0], tmp_path)
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(tmp_path / libraries[0])],
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    # Only the C shim of torch's stable ABI may be needed: no C++ symbol of torch, c10 or at.
    assert not re.findall(r"_ZNK?(?:2at|3c10|5torch)\w+", symbols)
    assert "aoti_torch_" in symbols or "torch_" in symbols


@pytest.fixture
def build_script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The functions of setup.py, which builds nothing here."""
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    monkeypatch.chdir(ROOT)
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "LOLKERNELS_BUILD_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path("setup.py")


def fake_cutlass(folder: Path) -> Path:
    header = folder / "cutlass" / "include" / "cutlass" / "cutlass.h"
    header.parent.mkdir(parents=True)
    header.touch()
    return folder / "cutlass"


@pytest.mark.parametrize("with_cutlass", [False, True])
@pytest.mark.parametrize(
    ("listed", "codes"),
    [
        (None, ["sm_80,compute_80", "sm_90a", "sm_100"]),
        ("9.0a", ["sm_90a"]),
        ("8.6 12.0+PTX", ["sm_86", "sm_120,compute_120"]),
    ],
)
def test_the_cuda_kernels_are_built_for_the_wanted_architectures(
    build_script, monkeypatch, capfd, tmp_path, listed, codes, with_cutlass
) -> None:
    said = tmp_path / "arguments"
    monkeypatch.setenv("PATH", fake_nvcc(tmp_path / "bin", f'echo "$@" >> {said}'))
    monkeypatch.setenv("MAX_JOBS", "3")
    monkeypatch.setenv("CUTLASS_PATH", str(fake_cutlass(tmp_path)) if with_cutlass else "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if listed:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    build_script["build_cuda"](str(tmp_path / "_CUDA.abi3.so"))
    compiled = [line for line in said.read_text().splitlines() if " -c " in f" {line} "]
    (rows,) = (line for line in compiled if "csrc/cuda/ops.cu" in line)
    gemm = [line for line in compiled if "csrc/cuda/hopper.cu" in line]
    assert re.findall(r"code=\[(.*?)\]", rows) == codes
    hopper = with_cutlass and "sm_90a" in codes
    assert ("-DLOLKERNELS_HOPPER" in rows) == hopper == bool(gemm)
    assert all(re.findall(r"code=\[(.*?)\]", line) == ["sm_90a"] for line in gemm)
    assert f"--threads {3 // len(compiled)}" in rows
    assert ("without its GEMM for Hopper" in capfd.readouterr().err) != hopper


def test_why_there_are_no_cuda_kernels_is_one_line(
    build_script, monkeypatch, capfd, tmp_path
) -> None:
    stale = tmp_path / "_CUDA.abi3.so"

    def said() -> str:
        stale.touch()
        build_script["build_cuda"](str(stale))
        assert not stale.exists()  # an older object would not fit
        (line,) = capfd.readouterr().err.splitlines()
        return line

    monkeypatch.setenv("PATH", fake_nvcc(tmp_path / "bin", "echo 'x.cu: error: no' >&2", "exit 1"))
    assert "x.cu: error: no" in said()
    monkeypatch.setenv("LOLKERNELS_BUILD_CUDA", "0")
    assert "LOLKERNELS_BUILD_CUDA=0" in said()
    monkeypatch.delenv("LOLKERNELS_BUILD_CUDA")
    monkeypatch.setattr(shutil, "which", lambda *args, **options: None)
    assert "no nvcc" in said()


def test_a_hash_changes_with_the_sources_of_its_own_object(
    build_script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("setup.py", "csrc/shared.h", "csrc/bindings.cpp", "csrc/cpu/a.h", "csrc/cuda/b.cu")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.chdir(tmp_path)

    def hashes() -> tuple[str, str]:
        return build_script["sources_hash"]("_C"), build_script["sources_hash"]("_CUDA")

    before = hashes()
    assert before == hashes() and before[0] != before[1] and len(before[0]) == 40
    touched = {"setup.py": (1, 1), "csrc/shared.h": (1, 1), "csrc/bindings.cpp": (1, 0)}
    touched |= {"csrc/cpu/a.h": (1, 0), "csrc/cuda/b.cu": (0, 1)}
    for name, changes in touched.items():
        (tmp_path / name).write_text("2")
        after = hashes()
        assert tuple(int(x != y) for x, y in zip(before, after, strict=True)) == changes, name
        before = after
    (tmp_path / "csrc" / "cpu" / "a.h").rename(tmp_path / "csrc" / "cpu" / "c.h")
    assert hashes() != before  # a name is part of it


def test_the_linkers_are_told_the_hash(build_script: dict[str, Any]) -> None:
    flags = build_script["build_id"]("_C")
    if not flags:
        pytest.skip("linkers write a build id on Linux")
    assert flags == [f"--build-id=0x{build_script['sources_hash']('_C')}"]
    assert build_script["cpu_extension"]().extra_link_args == [f"-Wl,{flags[0]}"]


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("cuda", [True, False])
def test_either_object_may_fail_alone(
    build_script, tmp_path, monkeypatch, capsys, cpu, cuda
) -> None:
    def compile_cpu(self: Any) -> None:
        if not cpu:
            raise RuntimeError("no compiler")

    asked = []
    monkeypatch.setattr(cpp_extension.BuildExtension, "run", compile_cpu)
    options = build_script["build_options"]()
    command = options["cmdclass"]["build_ext"]
    made = command.run.__globals__
    monkeypatch.setitem(made, "build_cuda", lambda library: asked.append(Path(library)) or cuda)
    distribution = Distribution({"name": "x", "ext_modules": options["ext_modules"]})
    build = command(distribution)
    build.ensure_finalized()
    build.build_lib = str(tmp_path)
    build.run()
    assert [path.name for path in asked] == ["_CUDA.abi3.so"] and asked[0].parent.is_dir()
    assert ("compiling failed: no compiler" in capsys.readouterr().err) is not cpu
    wheel = build_script["TaggedWheel"](distribution)
    wheel.ensure_finalized()
    assert (wheel.get_tag()[2] == "any") is not (cpu or cuda)


def test_a_plain_install_needs_torch_alone() -> None:
    requirements = metadata.requires("lolkernels") or []
    plain = [line for line in requirements if "extra ==" not in line]
    assert len(plain) == 1 and re.fullmatch(r"torch\W*>=\W*2\.10", plain[0]), plain
    extras = set(metadata.metadata("lolkernels").get_all("Provides-Extra") or [])
    assert {"train", "trl", "gpu", "bench", "test"} <= extras


def test_every_requirement_is_pinned_and_hashed() -> None:
    torch_lines = (ROOT / "requirements" / "torch.txt").read_text().splitlines()
    assert [line for line in torch_lines if not line.startswith("#")] == ["torch==2.13.0"]
    for name in ("dev.txt", "smollm2.txt", "peers.txt", "triton.txt"):
        text = (ROOT / "requirements" / name).read_text().replace("\\\n", " ")
        lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
        assert lines
        for line in lines:
            assert re.match(r"[\w.\-]+==[^\s;]+", line), line
            assert "--hash=sha256:" in line, line
            assert not line.startswith(("torch==", "nvidia-")), line
            assert line.startswith("triton==") == (name == "triton.txt"), line


def make(tree: Path, *targets: str) -> str:
    """Returns the commands that make would run."""
    return subprocess.run(
        ["make", "--dry-run", *targets], cwd=tree, text=True, capture_output=True, check=True
    ).stdout


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_sets_up_in_order_from_nothing(target: str, tmp_path: Path) -> None:
    commands = make(copy_tree(tmp_path), target)
    steps = [
        "-m venv .venv",
        "-r requirements/torch.txt",
        "--require-hashes -r requirements/dev.txt",
        "--require-hashes -r requirements/triton.txt",
        "--no-build-isolation --no-deps -e .",
        {"demo": "lolrl demo", "test": "-m pytest"}[target],
    ]
    positions = [commands.find(step) for step in steps]
    assert -1 not in positions and positions == sorted(positions), commands


def test_a_second_make_rebuilds_only_what_changed(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path)
    (tree / ".venv" / "bin").mkdir(parents=True)
    (tree / ".venv" / "stamps").mkdir()
    (tree / ".venv" / "bin" / "python").touch()
    clock = 2_000_000_000  # later than every copied file
    for step, name in enumerate(("torch", "requirements", "triton", "cutlass", "extension")):
        stamp = tree / ".venv" / "stamps" / name
        stamp.touch()
        os.utime(stamp, (clock + step, clock + step))
    assert "pip install" not in make(tree, "install")

    def touched(name: str) -> str:
        path = tree / name
        before = path.stat()
        os.utime(path, (clock + 9, clock + 9))
        commands = make(tree, "install")
        os.utime(path, (before.st_atime, before.st_mtime))
        return commands

    source = next((tree / "csrc").rglob("*.cpp")).relative_to(tree)
    for name in (str(source), "setup.py", "pyproject.toml"):
        commands = touched(name)
        assert "-e ." in commands and "-r requirements" not in commands, name
    assert "-r requirements/dev.txt" in touched("requirements/dev.txt")
    assert "-r requirements/torch.txt" in touched("requirements/torch.txt")
    assert "-r requirements/triton.txt" in touched("requirements/triton.txt")
    assert "-r requirements/cutlass.txt" in touched("requirements/cutlass.txt")
    assert "install" not in touched("lolkernels/__init__.py").replace("install'.", "")
