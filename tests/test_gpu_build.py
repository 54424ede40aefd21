"""setup.py: an object tells its sources, and one that fails does not take the other along."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from setuptools import Distribution
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The functions of setup.py, which builds nothing here."""
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py")


def test_a_hash_changes_with_the_sources_of_its_own_object(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "setup.py",
        "csrc/shared.h",
        "csrc/bindings.cpp",
        "csrc/cpu/a.h",
        "csrc/cuda/b.cu",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.chdir(tmp_path)

    def hashes() -> tuple[str, str]:
        return script["sources_hash"]("_C"), script["sources_hash"]("_CUDA")

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


def test_the_linkers_are_told_the_hash(script: dict[str, Any]) -> None:
    flags = script["build_id"]("_C")
    if not flags:
        pytest.skip("linkers write a build id on Linux")
    assert flags == [f"--build-id=0x{script['sources_hash']('_C')}"]
    assert script["cpu_extension"]().extra_link_args == [f"-Wl,{flags[0]}"]


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("cuda", [True, False])
def test_either_object_may_fail_alone(
    script: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cpu: bool,
    cuda: bool,
) -> None:
    def compile_cpu(self: Any) -> None:
        if not cpu:
            raise RuntimeError("no compiler")

    asked = []
    monkeypatch.setattr(cpp_extension.BuildExtension, "run", compile_cpu)
    options = script["build_options"]()
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
    wheel = script["TaggedWheel"](distribution)
    wheel.ensure_finalized()
    assert (wheel.get_tag()[2] == "any") is not (cpu or cuda)
