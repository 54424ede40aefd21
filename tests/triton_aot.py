"""Compiles Triton kernels ahead of time, on a machine without a GPU, and reports what came out.

    python tests/triton_aot.py [substring of the names]

prints one JSON object {case name: {field of Compiled: value} | {"error": text}}. It must run
without TRITON_INTERPRET=1, under which ``triton.jit`` makes functions that cannot be compiled.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Compiled:
    spill_bytes: int  # of the local-memory stores and loads in the machine code
    stack_bytes: int  # per thread
    shared_bytes: int  # per block
    opcodes: list[str]  # of the machine code, with their modifiers: "LDG.E.128"

    def has_opcode(self, *parts: str) -> bool:
        """Some instruction has all of these among its dotted parts."""
        return any(set(parts) <= set(opcode.split(".")) for opcode in self.opcodes)


def compile_kernel(case: Case) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # In the order of the arguments: some versions of Triton rely on it.
    names, given = case.fn.arg_names, case.constexprs
    types = {k: "constexpr" if k in given else case.signature[k] for k in names}
    attrs = {(names.index(k),): [["tt.divisibility", 16]] for k in case.aligned}
    source = ASTSource(fn=case.fn, signature=types, constexprs=dict(given), attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    sass, usage = (_dump(kernel.asm["cubin"], flag) for flag in ("-sass", "--dump-resource-usage"))
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    found = re.search(r"REG:\d+ STACK:(\d+)", usage)
    assert found, usage
    return Compiled(
        spill_bytes=sum(_width(op) for op in opcodes if op[:3] in ("STL", "LDL")),
        stack_bytes=int(found[1]),
        shared_bytes=kernel.metadata.shared,
        opcodes=sorted(set(opcodes)),
    )


def _width(opcode: str) -> int:
    bits = [int(part) for part in opcode.split(".") if part in ("64", "128")]
    return bits[0] // 8 if bits else 4


def _dump(cubin: bytes, flag: str) -> str:
    """What cuobjdump prints of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"  # cuobjdump calls nvdisasm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), flag, file.name]
        return subprocess.check_output(command, env={**os.environ, "PATH": path}, text=True)


_cases: list[Case] = []


def _compile(index: int) -> dict[str, Any]:
    try:
        return dataclasses.asdict(compile_kernel(_cases[index]))
    except Exception as error:  # one case that does not compile must not hide the others
        inner: BaseException = error
        while inner.__cause__:  # the outer ones say where, the innermost what
            inner = inner.__cause__
        return {"error": f"{type(inner).__name__}: {inner}\n{error}"}


def run(only: str) -> dict[str, Compiled | str]:
    """Compiles the cases of triton_cases in a process of its own, with an empty cache."""
    here = Path(__file__).resolve()
    with tempfile.TemporaryDirectory() as cache:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env["TRITON_CACHE_DIR"] = cache
        env["PYTHONPATH"] = os.pathsep.join([str(here.parents[1]), env.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, str(here), only], env=env, capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(f"{here.name} failed:\n{done.stderr[-4000:]}")
    results = json.loads(done.stdout.splitlines()[-1])
    return {k: r["error"] if "error" in r else Compiled(**r) for k, r in results.items()}


def main(only: str) -> None:
    sys.modules.setdefault("triton_aot", sys.modules["__main__"])  # one Case class
    import triton_cases

    _cases[:] = [case for case in triton_cases.compile_cases() if only in case.name]
    with get_context("fork").Pool(WORKERS) as pool:
        results = pool.map(_compile, range(len(_cases)), chunksize=1)
    names = [case.name for case in _cases]
    print(json.dumps(dict(zip(names, results, strict=True))))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
