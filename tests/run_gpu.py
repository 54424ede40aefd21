"""Runs the GPU tests on a machine as it is: no installs, no network, one report.

    PYTHONPATH=.:python python3 tests/run_gpu.py

1. on a GPU, unless they are there and newer than csrc: the CUDA kernels, built in place with nvcc
   (PATH, CUDA_HOME) for this device alone
2. seconds from import to the first result, in processes of their own: measured, not judged
3. a matrix: every backend x dtype x op on the device, against float64
4. pytest -m 'gpu and not slow' on tests/gpu, a process for each file: a failed kernel spoils one
   file, not the rest
5. compute-sanitizer, four tools, on the tests named `sanitizer`

Writes OUT.json and OUT.md after each step (default: benchmarks/results/<device>-tests).
Exit status: 0 all passed, 1 something failed, 2 it could not run. What follows `--` goes to pytest.
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from the source tree, not installed

import torch

import lolkernels as lk
from lolkernels import testing

ROOT = Path(__file__).resolve().parents[1]
MARK = "gpu and not slow"
ENOUGH = 5  # seconds: with less left nothing is begun
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OPS = ("linear_loss", "linear_loss frozen", "linear_logprob", "score", "logprob")
LENGTHS = [1, 40, 7, 64, 16]
NEVER_RAN = "a process of its own printed no numbers"


# --- the CUDA kernels -----------------------------------------------------------------------------


def build(seconds: float) -> dict[str, Any]:
    """{"result": built | there | not built | failed, "seconds", "text"}.

    Before the backends are asked: what they say of themselves is remembered.
    """
    library = ROOT / "lolkernels" / "_CUDA.abi3.so"
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()] + [ROOT / "setup.py"]
    newest = max(p.stat().st_mtime for p in sources)
    if library.exists() and library.stat().st_mtime >= newest:
        return {"result": "there", "seconds": 0.0, "text": "newer than their sources"}
    if torch.version.cuda is None:
        return {"result": "not built", "seconds": 0.0, "text": "this torch is not for NVIDIA GPUs"}
    major, minor = torch.cuda.get_device_capability()
    target = f"{major}.{minor}{'a' if major == 9 else ''}"
    target = os.environ.get("TORCH_CUDA_ARCH_LIST") or target
    began = time.monotonic()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    code, output = run(command, seconds, TORCH_CUDA_ARCH_LIST=target)
    taken = round(time.monotonic() - began, 1)
    if code == 0 and library.exists() and library.stat().st_mtime >= newest:
        return {"result": "built", "seconds": taken, "text": f"for sm {target}"}
    said = [line for line in output.splitlines() if "is built without its CUDA" in line]
    text = shorten(said[0] if said else output[-600:], 600)
    wanting = "no nvcc" in text or "LOLKERNELS_BUILD_CUDA=0" in text
    return {"result": "not built" if wanting else "failed", "seconds": taken, "text": text}


# --- from import to the first result --------------------------------------------------------------

STEPS = ("import torch", "import lolkernels", "device", "first loss", "second loss")
FIRST = """
import json, sys, time
device, backend = sys.argv[1:]
times = [time.perf_counter()]
tick = lambda: times.append(time.perf_counter())
import torch
tick()
import lolkernels as lk
tick()
hidden = torch.randn(64, 128, device=device, dtype=torch.bfloat16).requires_grad_()
weight = torch.randn(1000, 128, device=device, dtype=torch.bfloat16).requires_grad_()
labels = torch.arange(64, device=device)
seq = lk.Sequences.from_lengths([40, 24]).to(device)
side = {"ref_logps": torch.full((64,), -9.0, device=device)}
side["advantages"] = torch.ones(2, device=device)
float(hidden.detach().sum())
tick()
for _ in range(2):
    loss = lk.linear_loss(
        lk.objectives.a_lol, hidden, weight, labels, seq, backend=backend, **side
    )
    loss.backward()
    assert hidden.grad.isfinite().all() and loss.isfinite()
    tick()
print(json.dumps([b - a for a, b in zip(times, times[1:])]))
"""


def first_results(device: str, seconds: float) -> list[dict[str, Any]]:
    """A row for each backend and for what its process finds of files and of compiled kernels."""
    rows = []
    until = time.monotonic() + seconds
    for backend in ("cuda", "triton"):
        why, module = lk.available_backends()[backend], lk.backends.TABLE[backend]
        if why is None and device not in module.devices:
            why = f"takes tensors on {', '.join(module.devices)}"
        if why is not None:
            rows.append({"backend": backend, "process": "", "skipped": why})
            continue
        with tempfile.TemporaryDirectory() as cache:
            for process in ("first", "second"):
                command = [sys.executable, "-c", FIRST, device, backend]
                code, output = run(command, until - time.monotonic(), TRITON_CACHE_DIR=cache)
                lines = output.splitlines()
                row: dict[str, Any] = {"backend": backend, "process": process}
                if code == 0 and lines and lines[-1].startswith("["):
                    row["seconds"] = dict(zip(STEPS, json.loads(lines[-1]), strict=True))
                else:
                    row["skipped"] = f"{NEVER_RAN}: {shorten(' '.join(lines[-4:]), 400)}"
                rows.append(row)
    return rows


# --- the matrix -----------------------------------------------------------------------------------


def matrix(device: str) -> list[dict[str, Any]]:
    """One row a backend, dtype and op: ok, or what is wrong. Two odd vocabularies."""
    rows = []
    for backend, why in lk.available_backends().items():
        module = lk.backends.TABLE[backend]
        if why is None and module.devices is not None and device not in module.devices:
            why = f"takes tensors on {', '.join(module.devices)}"
        for dtype in (torch.float32, torch.bfloat16, torch.float16) if why is None else ():
            for op in OPS:
                try:
                    faults = [
                        f for v in (129, 2049) for f in _faults(op, backend, dtype, v, device)
                    ]
                except Exception as error:
                    faults = [f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"]
                name = str(dtype).removeprefix("torch.")
                rows.append({"backend": backend, "dtype": name, "op": op, "faults": faults})
                if device == "cuda":
                    torch.cuda.synchronize()
        if why is not None:
            rows.append({"backend": backend, "dtype": "", "op": "", "skipped": why})
    return rows


def _faults(op: str, backend: str, dtype: torch.dtype, vocab: int, device: str) -> list[str]:
    """Beside float64 and eager in the same dtype, both on the CPU."""
    p = testing.peaky(sum(LENGTHS), 48, vocab, dtype=dtype)
    seq, labels = lk.Sequences.from_lengths(LENGTHS), p.labels.to(device)
    options: dict[str, Any] = {"backend": backend}
    if op == "logprob":
        logits = (p.hidden.float() @ p.weight.float().T).to(dtype)
        ours, exact, eager = ([t.requires_grad_()] for t in _copies(logits, device))
        out = lk.logprob(ours[0], labels, **options)
        want, peer = (testing.eager_logits(t[0], p.labels, **p.options) for t in (exact, eager))
    else:
        frozen = op in ("score", "linear_loss frozen")
        pairs = zip(_copies(p.hidden, device), _copies(p.weight, device), strict=True)
        ours, exact, eager = ([h.requires_grad_(), w.requires_grad_(not frozen)] for h, w in pairs)
        want, peer = (
            testing.eager(testing.Problem(*leaves, p.labels)) for leaves in (exact, eager)
        )
    if op == "score":
        with torch.no_grad():
            out = lk.linear_logprob(*ours, labels, **options)
        return _named(vocab, testing.logprob_faults(out.logps.cpu(), want.logps.detach(), LENGTHS))
    if op == "linear_logprob":
        out = lk.linear_logprob(*ours, labels, **options)
    want.logps.retain_grad()
    if op.startswith("linear_loss"):
        ref = (want.logps.detach() + 0.01).float()
        advantages = torch.rand(len(LENGTHS)) + 0.1
        side = {"ref_logps": ref.to(device), "advantages": advantages.to(device)}
        out = lk.linear_loss(
            *(lk.objectives.a_lol, *ours, labels, seq.to(device)),
            **(side | options),
            return_outputs=True,
        )
        out.loss.backward()
        for logps in (want.logps, peer.logps):
            given = (ref.to(logps.dtype), advantages.to(logps.dtype), seq)
            lk.aggregate(lk.objectives.a_lol(logps, *given), seq).backward()
    else:
        upstream = torch.randn(sum(LENGTHS))
        out.logps.backward(upstream.to(device))
        want.logps.backward(upstream.double())
        peer.logps.backward(upstream.to(peer.logps.dtype))
    assert want.logps.grad is not None
    faults = testing.logprob_faults(out.logps.detach().cpu(), want.logps.detach(), LENGTHS)
    sizes = testing.gradient_sizes(p, {"logps": want.logps.grad})
    bounds = [float(want.logps.grad.abs().max())] if op == "logprob" else sizes.values()
    for got, baseline, truth, size in zip(ours, eager, exact, bounds, strict=False):
        if truth.grad is None:
            continue
        if got.grad is None or baseline.grad is None:
            faults.append("a gradient is missing")
            continue
        faults += testing.gradient_faults(got.grad.cpu(), baseline.grad, truth.grad, size)
    return _named(vocab, faults)


def _copies(t: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """On the device; in float64; in its own dtype on the CPU."""
    return t.clone().to(device), t.double(), t.clone()


def _named(vocab: int, faults: list[str]) -> list[str]:
    return [f"V={vocab}: {fault}" for fault in faults]


# --- pytest ---------------------------------------------------------------------------------------


def run(command: list[str], seconds: float, **environment: str) -> tuple[int | None, str]:
    """(exit status or None where the time ran out, output)."""
    if seconds < ENOUGH:
        return None, "no time was left to begin"
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the tests' own children too
        output, _ = process.communicate()
        return None, output + f"\nstopped after {seconds:.0f} s"


def read_junit(path: Path) -> dict[str, Any]:
    """Counts and the short text of each failure."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "skips": []}
    for case in ET.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        bad = next((e for e in case if e.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        if bad is not None:
            found["failed"] += 1
            found["failures"].append(
                {"test": name, "text": shorten(bad.get("message") or bad.text)}
            )
        elif skipped is not None:
            found["skipped"] += 1
            found["skips"].append({"test": name, "text": shorten(skipped.get("message"))})
        else:
            found["passed"] += 1
    return found


def passed_backends(path: Path) -> list[str]:
    """The backends whose name is a parameter of a test that passed."""
    passed = [c.get("name", "") for c in ET.parse(path).iter("testcase") if len(c) == 0]
    words = {word for name in passed for word in re.split(r"[\[\]-]", name)}
    return [name for name in lk.backends.TABLE if name in words]


def shorten(text: str | None, size: int = 300) -> str:
    return " ".join((text or "").split())[:size]


def run_file(path: Path, seconds: float, extra: list[str], device: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [*PYTEST, "-m", MARK]
        began = time.monotonic()
        command += [f"--junitxml={junit}", *extra, str(path)]
        code, output = run(command, seconds, LOLKERNELS_TEST_DEVICE=device)
        empty = {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "skips": []}
        found = read_junit(junit) if junit.exists() else empty
    found |= {"file": path.name, "seconds": round(time.monotonic() - began, 1)}
    if code is None or code not in (0, 1, 5) or (code == 1 and not found["failed"]):
        # Stopped, crashed, or it could not collect.
        found["failed"] += 1
        ended = "stopped" if code is None else f"exit status {code}"
        lines = " ".join(output.splitlines()[-8:])
        found["failures"].append({"test": path.name, "text": f"{ended}: {shorten(lines, 600)}"})
    return found


# --- compute-sanitizer ----------------------------------------------------------------------------


def find_sanitizer() -> str | None:
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", *glob.glob("/usr/local/cuda-*")]
    candidates = [shutil.which("compute-sanitizer")]
    candidates += [f"{place}/bin/compute-sanitizer" for place in places if place]
    candidates += [f"{place}/compute-sanitizer/compute-sanitizer" for place in places if place]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


def sanitize(program: str, tool: str, seconds: float, folder: Path) -> dict[str, Any]:
    """One tool over the small subset. Any report is a failure, and so is a red test."""
    command = [program, "--tool", tool, "--error-exitcode", "99", "--print-limit", "20"]
    command += ["--target-processes", "all"]
    own = folder / "test_sanitizer.py"
    command += [*PYTEST, "-m", MARK, "-k", "sanitizer", str(own if own.exists() else folder)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        junit = Path(scratch) / "junit.xml"
        # Each tensor is an allocation of its own, so that the tool sees where one ends.
        code, output = run(
            [*command, f"--junitxml={junit}"], seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
        launched = passed_backends(junit) if junit.exists() else []
    found: dict[str, Any] = {"tool": tool, "seconds": round(time.monotonic() - began, 1)}
    found["backends"] = launched
    summary = re.findall(r"=+ (\w+ SUMMARY: .*)", output)
    reports = [line for line in output.splitlines() if line.startswith("=========")]
    tests = re.findall(r"^\d+ (?:passed|failed|skipped|deselected).*", output, re.MULTILINE)
    found["tests"] = tests[-1].strip("= ") if tests else ""
    if code == 5:
        return {**found, "result": "not run", "text": "no test is named sanitizer"}
    if "Device not supported" in output:
        return {**found, "result": "not run", "text": "the tool does not support this device"}
    if code is None:
        return {**found, "result": "failed", "text": shorten(output[-300:])}
    if code == 0:
        return {**found, "result": "passed", "text": shorten(" ".join(summary))}
    text = " ".join([*summary, *reports[:12]] or output.splitlines()[-8:])
    return {**found, "result": "failed", "text": shorten(text, 900)}


# --- the report -----------------------------------------------------------------------------------


def git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, text=True, capture_output=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def header(device: str, commit: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"device": "cpu"}
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found = {"device": about.name, "capability": f"{about.major}.{about.minor}"}
        found["cuda"] = torch.version.cuda
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            done = subprocess.run(query, text=True, capture_output=True, timeout=60)
            found["driver"] = done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
    versions = {"python": platform.python_version(), "lolkernels": lk.__version__}
    for name in ("torch", "triton", "pytest"):
        spec = importlib.util.find_spec(name)
        versions[name] = __import__(name).__version__ if spec else None
    return {
        **found,
        **versions,
        "backends": {name: why or "available" for name, why in lk.available_backends().items()},
        "commit": commit or git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "command": " ".join(["python", "tests/run_gpu.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def failures(record: dict[str, Any]) -> list[str]:
    """One line for each thing that failed."""
    found = []
    for row in record["matrix"]:
        if row.get("faults"):
            found.append(f"{row['backend']} {row['dtype']} {row['op']}: {'; '.join(row['faults'])}")
    for file in record["files"]:
        found += [f"{failure['test']}: {failure['text']}" for failure in file["failures"]]
    for tool in record["sanitizer"]:
        if tool["result"] == "failed":
            found.append(f"{tool['tool']}: {tool['text']}")
    return found + record["problems"]


def markdown(record: dict[str, Any]) -> str:
    where = record["header"]
    names = ("capability", "driver", "cuda", "python", "torch", "triton", "lolkernels", "pytest")
    commit = where["commit"] + (" with local changes" if where["dirty"] else "")
    found = failures(record)
    counts = {k: sum(f[k] for f in record["files"]) for k in ("passed", "failed", "skipped")}
    lines = [
        f"# Tests on {where['device']}",
        "",
        ", ".join(f"{name} {where[name]}" for name in names if where.get(name)),
        f"; commit {commit}; {where['date']}.",
        "",
        f"    {where['command']}",
        "",
        f"**{'FAILED' if found else 'All passed'}**: tests {counts['passed']} passed, "
        f"{counts['failed']} failed, {counts['skipped']} skipped.",
    ]
    lines[2:4] = ["".join(lines[2:4])]
    if found:
        lines += ["", "## Failures", "", *(f"* {line}" for line in found)]
    if record["build"]:
        lines += ["", "## The CUDA kernels", ""]
        lines.append("{result} in {seconds} s: {text}".format(**record["build"]))
    if record["first"]:
        lines += ["", "## Seconds from import to the first result", ""]
        lines.append("Two processes each: the first finds no compiled kernel in Triton's cache.")
        lines += ["", "| backend | process | " + " | ".join(STEPS) + " | all but the last |"]
        lines.append("|---|---|" + "---:|" * (len(STEPS) + 1))
    for row in (row for row in record["first"] if "seconds" in row):
        taken = [row["seconds"][step] for step in STEPS]
        cells = [row["backend"], row["process"], *(f"{t:.2f}" for t in (*taken, sum(taken[:-1])))]
        lines.append(f"| {' | '.join(cells)} |")
    missing = [row for row in record["first"] if "skipped" in row]
    lines += ["", *(f"* {row['backend']}: skipped, {row['skipped']}" for row in missing)]
    lines += ["", "## Backends on the device", ""]
    sound = {}
    for row in record["matrix"]:
        if "skipped" in row:
            lines.append(f"* {row['backend']}: skipped, {row['skipped']}")
            continue
        sound.setdefault((row["backend"], row["dtype"]), {})[row["op"]] = not row["faults"]
    if sound:
        lines += ["", "| backend | dtype | " + " | ".join(OPS) + " |"]
        lines.append("|---|---|" + "---|" * len(OPS))
        for (backend, dtype), ops in sound.items():
            cells = ["ok" if ops.get(op) else "WRONG" for op in OPS]
            lines.append(f"| {backend} | {dtype} | {' | '.join(cells)} |")
    lines += ["", "## Test files", "", "| file | passed | failed | skipped | s |"]
    lines.append("|---|---:|---:|---:|---:|")
    for f in record["files"]:
        counted = f"{f['passed']} | {f['failed']} | {f['skipped']}"
        lines.append(f"| {f['file']} | {counted} | {f['seconds']} |")
    reasons = sorted({s["text"] for f in record["files"] for s in f["skips"]})
    lines += ["", *(f"* skipped: {reason}" for reason in reasons)]
    lines += ["", "## compute-sanitizer", ""]
    for tool in record["sanitizer"]:
        ran = f"of {', '.join(tool['backends'])}." if tool.get("backends") else ""
        about = " ".join(part for part in (tool.get("tests", ""), ran, tool["text"]) if part)
        lines.append(f"* {tool['tool']}: {tool['result']}. {about}")
    return "\n".join(lines) + "\n"


def save(record: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("json", json.dumps(record, indent=1) + "\n"), ("md", markdown(record))):
        part = out.with_name(f"{out.name}.{suffix}.part")
        part.write_text(text)
        os.replace(part, out.with_name(f"{out.name}.{suffix}"))


def slug(device: str) -> str:
    """A file name for a device: "NVIDIA H200" -> "h200"."""
    return re.sub("[^a-z0-9]+", "-", device.lower().replace("nvidia", "")).strip("-") or "device"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--jobs", type=int, default=4, help="test files at a time")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests" / "gpu")
    parser.add_argument("--only", default="", help="test files whose name contains this")
    parser.add_argument("--no-matrix", action="store_true")
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--commit", help="to record where the tree has no git")
    parser.add_argument("--matrix", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("extra", nargs="*", help="flags of pytest, after --")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    a = parse(sys.argv[1:] if argv is None else argv)
    until = time.monotonic() + 60 * a.minutes
    if a.device == "cuda" and not torch.cuda.is_available():
        print("this torch sees no CUDA device", file=sys.stderr)
        return 2
    if a.matrix:
        print(json.dumps(matrix(a.device)))
        return 0
    if importlib.util.find_spec("pytest") is None:
        print(f"{sys.executable} has no pytest: make test-gpu PYTHON=... with one that has it")
        return 2
    built = build(min(240.0, until - time.monotonic())) if a.device == "cuda" else {}
    if built:
        print(f"the CUDA kernels: {built}")
    about = header(a.device, a.commit)
    out = a.out or ROOT / "benchmarks" / "results" / f"{slug(about['device'])}-tests"
    record: dict[str, Any] = {"header": about, "matrix": [], "files": [], "sanitizer": []}
    record |= {"build": built, "first": [], "problems": []}
    if built.get("result") == "failed":
        record["problems"].append(f"the CUDA kernels were not built: {built['text']}")
    save(record, out)

    if not a.no_matrix:
        record["first"] = first_results(a.device, min(90.0, until - time.monotonic()))
        for row in record["first"]:
            print(row)
        command = [sys.executable, __file__, "--matrix", "--device", a.device]
        longest = 180.0 if a.device == "cuda" else 600.0  # Triton's interpreter is slow
        code, output = run(command, min(longest, until - time.monotonic()))
        lines = output.splitlines()
        if code == 0 and lines and lines[-1].startswith("["):
            record["matrix"] = json.loads(lines[-1])
        else:
            text = shorten(" ".join(lines[-6:]), 600)
            record["problems"].append(f"the matrix of backends ended with {code}: {text}")
    ran = {row["backend"] for row in record["matrix"] if "skipped" not in row}
    if a.device == "cuda" and record["matrix"] and not ran - {"reference"}:
        record["problems"].append("no backend but reference ran on the device")
    save(record, out)

    files = [p for p in sorted(a.tests.glob("test_*.py")) if a.only in p.name]
    if not files:
        record["problems"].append(f"no test file in {a.tests}")
    program = None if a.no_sanitizer else find_sanitizer()
    # The sanitizer's tools are slow and come last: they keep a third of the time.
    ends = until - (20 * a.minutes if program else 5)
    with ThreadPoolExecutor(max(1, a.jobs)) as pool:
        tasks = [
            pool.submit(lambda p: run_file(p, ends - time.monotonic(), a.extra, a.device), p)
            for p in files
        ]
        for task in tasks:
            record["files"].append(task.result())
            save(record, out)
            done = record["files"][-1]
            print({k: done[k] for k in ("file", "passed", "failed", "skipped", "seconds")})
    if files and not any(f["passed"] + f["failed"] for f in record["files"]):
        record["problems"].append("no test ran")

    if program is None:
        why = "switched off" if a.no_sanitizer else "compute-sanitizer was not found"
        record["sanitizer"] = [{"tool": t, "result": "not run", "text": why} for t in TOOLS]
    else:
        with ThreadPoolExecutor(len(TOOLS)) as pool:
            record["sanitizer"] = list(
                pool.map(lambda t: sanitize(program, t, until - time.monotonic(), a.tests), TOOLS)
            )
    save(record, out)
    print(markdown(record))
    return 1 if failures(record) else 0


if __name__ == "__main__":
    raise SystemExit(main())
