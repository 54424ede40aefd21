"""Compiles Triton kernels ahead of time, on a machine without a GPU, and reports what came out.

    python tests/triton_aot.py triton_cases:compile_cases [substring of the names]

prints one JSON object {case name: {field of Compiled: value} | {"error": text}}. It must run
without TRITON_INTERPRET=1, under which ``triton.jit`` makes functions that cannot be compiled.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Of shared memory, what one block may have.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
WORKERS = 2


@dataclass(frozen=True)
class Case:
    """One kernel as a launcher launches it, and what its machine code must contain."""

    name: str
    fn: Any  # a triton.jit function
    signature: Mapping[str, str]  # of the arguments that are not constexprs: "*bf16", "i64", "fp32"
    constexprs: Mapping[str, Any]  # a pointer that is None belongs here
    arch: int  # 80, 90 or 100
    num_warps: int
    num_stages: int
    aligned: Sequence[str] = ()  # pointers of 16-byte alignment, integers divisible by 16
    vector_loads: bool = False  # 16-byte loads of global memory
    vector_stores: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)  # further options of triton.compile


@dataclass(frozen=True)
class Compiled:
    registers: int  # per thread
    spill_bytes: int  # of the local-memory stores and loads in the machine code
    stack_bytes: int  # per thread
    shared_bytes: int  # per block
    sass_opcodes: dict[str, int]  # with their modifiers: "LDG.E.128"
    ptx: str

    def has_opcode(self, *parts: str) -> bool:
        """Some instruction has all of these among its dotted parts."""
        return any(set(parts) <= set(opcode.split(".")) for opcode in self.sass_opcodes)


def compile_kernel(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    arch: int,
    num_warps: int,
    num_stages: int,
    aligned: Sequence[str] = (),
    **options: Any,
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # In the order of the arguments: some versions of Triton rely on it.
    types = {k: "constexpr" if k in constexprs else signature[k] for k in fn.arg_names}
    attrs = {(fn.arg_names.index(k),): [["tt.divisibility", 16]] for k in aligned}
    source = ASTSource(fn=fn, signature=types, constexprs=dict(constexprs), attrs=attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages, **options}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    sass, usage = _dump(kernel.asm["cubin"])
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Compiled(
        registers=int(found[1]),
        spill_bytes=sum(_width(op) * k for op, k in opcodes.items() if op[:3] in ("STL", "LDL")),
        stack_bytes=int(found[2]),
        shared_bytes=kernel.metadata.shared,
        sass_opcodes=dict(opcodes),
        ptx=kernel.asm["ptx"],
    )


def _width(opcode: str) -> int:
    bits = [int(part) for part in opcode.split(".") if part in ("64", "128")]
    return bits[0] // 8 if bits else 4


def _dump(cubin: bytes) -> tuple[str, str]:
    """The machine code, and the line of resource usage, as cuobjdump prints them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = os.environ["PATH"]  # cuobjdump calls nvdisasm
        env = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{path}"}
        sass, usage = (
            subprocess.run(
                [str(tool), flag, file.name], env=env, capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-sass", "--dump-resource-usage")
        )
    return sass, usage


_cases: list[Case] = []


def _compile(index: int) -> dict[str, Any]:
    case = _cases[index]
    given = {f.name: getattr(case, f.name) for f in dataclasses.fields(Case)}
    for name in ("name", "vector_loads", "vector_stores"):
        del given[name]
    try:
        return dataclasses.asdict(compile_kernel(**given, **given.pop("options")))
    except Exception as error:  # one case that does not compile must not hide the others
        inner: BaseException = error
        while inner.__cause__:  # the outer ones say where, the innermost what
            inner = inner.__cause__
        return {"error": f"{type(inner).__name__}: {inner}\n{error}"}


def compile_all(cases: list[Case]) -> dict[str, dict[str, Any]]:
    _cases[:] = cases
    with get_context("fork").Pool(WORKERS) as pool:
        results = pool.map(_compile, range(len(cases)), chunksize=1)
    return {case.name: result for case, result in zip(cases, results, strict=True)}


def run(target: str, only: str = "") -> dict[str, Compiled | str]:
    """Compiles the cases of "module:function" in one process of its own, with an empty cache."""
    here = Path(__file__).resolve()
    with tempfile.TemporaryDirectory() as cache:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env["TRITON_CACHE_DIR"] = cache
        env["PYTHONPATH"] = os.pathsep.join([str(here.parents[1]), env.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, str(here), target, only], env=env, capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(f"{here.name} failed:\n{done.stderr[-4000:]}")
    results = json.loads(done.stdout.splitlines()[-1])
    return {k: r["error"] if "error" in r else Compiled(**r) for k, r in results.items()}


def main() -> None:
    module, function = sys.argv[1].split(":")
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    sys.modules.setdefault("triton_aot", sys.modules["__main__"])  # one Case class
    cases = getattr(importlib.import_module(module), function)()
    print(json.dumps(compile_all([case for case in cases if only in case.name])))


if __name__ == "__main__":
    main()
