"""Is the working tree faster or slower than another commit? Both versions, turn by turn.

python benchmarks/run.py compare main
python benchmarks/run.py compare HEAD~3 --ops linear_loss score --shapes 1024,768,50257,128
python benchmarks/run.py compare main --fail-above 1.03        (for a script: exit status 1)

BASE is checked out in a temporary worktree and HEAD, with its uncommitted changes, is copied beside
it; both are built there by the same compiler. Each version then runs in a process of its own, which
uses public names of the library alone, and the two take turns: base, head, head, base. A round's
ratio is the head's time over the base's. Before any timing the two must agree on the results.

The interval holds the median ratio with a confidence of 99% (order statistics: no assumption about
the noise). A version is called faster or slower only where the whole interval lies beyond a margin.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import CLIP, Inputs, Shape, make_inputs, parse_shape
from torch import Tensor

import lolkernels as lk  # in a worker, the version's own

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("lolkernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")
OPS = ("linear_loss", "linear_loss-frozen", "score", "linear_logprob", "logprob")
SHAPES = {
    "cpu": [Shape(512, 128, 2048, 32), Shape(1024, 768, 50257, 128)],
    "cuda": [Shape(1024, 2048, 32000, 128, "bf16"), Shape(8192, 4096, 128256, 512, "bf16")],
}
LEVEL = 0.99
SAMPLE_SECONDS = 0.05  # short calls are repeated to fill this
# How far two versions' gradients may lie apart, as a share of their norm.
APART = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-3}


class CompareError(Exception):
    """What keeps the two versions from being compared, and the fix."""


def interval(values: list[float], level: float = LEVEL) -> tuple[float, float]:
    """Two order statistics that hold the median of the distribution with at least `level`.

    The k-th smallest and the k-th largest of n values miss it with a probability of
    2 P(Binomial(n, 1/2) < k); k is the largest that keeps this below 1 - level.

    Raises:
        ValueError: too few values for any interval at this level.
    """
    n, k, missed = len(values), 0, 0.0
    while k < n and missed + 2 * math.comb(n, k) / 2**n <= 1 - level:
        missed += 2 * math.comb(n, k) / 2**n
        k += 1
    if k == 0:
        raise ValueError(f"{n} rounds are too few for a {level:.0%} interval")
    ordered = sorted(values)
    return ordered[k - 1], ordered[n - k]


def fewest_rounds(level: float = LEVEL) -> int:
    return math.ceil(math.log2(2 / (1 - level)))


def summary(base: list[float], head: list[float], margin: float) -> dict[str, Any]:
    """The ratio head/base of paired rounds: median, interval and verdict."""
    ratios = [over / under for under, over in zip(base, head, strict=True)]
    low, high = interval(ratios)
    verdict = "faster" if high < 1 - margin else "slower" if low > 1 + margin else None
    times = {"base_ms": 1e3 * statistics.median(base), "head_ms": 1e3 * statistics.median(head)}
    found = {"ratio": statistics.median(ratios), "low": low, "high": high}
    return {**times, **found, "verdict": verdict or "no difference shown"}


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        raise CompareError(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout


def resolve(base: str) -> str:
    try:
        found = git("rev-parse", "--verify", "--end-of-options", f"{base}^{{commit}}")
    except CompareError:
        raise CompareError(
            f"BASE={base!r} is no commit of this repository: give a branch, a tag or a hash that "
            "`git log` shows"
        ) from None
    return found.strip()


def copy_head(tree: Path) -> None:
    """The working tree's sources as they are: uncommitted and new files too, ignored ones not."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *SOURCES)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # a deleted file is still listed
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)


def build(name: str, tree: Path, device: str) -> None:
    """Builds the extension in place. Only a GPU's Triton kernels can do without it."""
    environment = {**os.environ, **({"LOLKERNELS_BUILD_CUDA": "0"} if device == "cpu" else {})}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=tree, env=environment, text=True, **pipes)
    if not done.returncode and any((tree / "lolkernels").glob("_C*.so")):
        return
    lines = [text for text in done.stdout.splitlines() if not re.match(r"\[\d+/\d+\]", text)]
    said = "\n".join(text[:200] for text in lines[-15:])  # without the compiler's command lines
    if device == "cpu":
        raise CompareError(f"{name} cannot be built; the compiler's last lines:\n{said}")
    print(f"{name} has no compiled CPU kernels:\n{said}", file=sys.stderr)


def native(tree: Path) -> dict[str, bytes]:
    """What the compiled part is made from."""
    paths = [path for path in [*(tree / "csrc").rglob("*"), tree / "setup.py"] if path.is_file()]
    return {path.relative_to(tree).as_posix(): path.read_bytes() for path in paths}


class Version:
    """Talks to one worker: a line of JSON there, a line of JSON back."""

    def __init__(self, name: str, tree: Path, device: str, threads: int) -> None:
        path = os.pathsep.join([str(tree), str(ROOT / "benchmarks")])
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import compare; compare.serve()"],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            self.about = self.ask(device=device, threads=threads)
            if not Path(self.about["file"]).is_relative_to(tree.resolve()):
                raise CompareError(f"{name} imported {self.about['file']}, not the tree at {tree}")
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise CompareError(f"{self.name}'s process ended with status {self.process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise CompareError(f"{self.name}: {reply['error']}")
        return reply

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def build_call(op: str, inputs: Inputs) -> Callable[[], dict[str, Tensor | None]]:
    """One forward and backward (a forward for `score`); returns log-probs and gradients."""
    op, _, frozen = op.partition("-")
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(not frozen)
    labels, seq = inputs.labels, inputs.seq
    leaves = {"dhidden": hidden, "dweight": weight}
    given = (hidden, weight, labels)
    if op == "logprob":
        with torch.no_grad():
            logits = (hidden.float() @ weight.float().T).to(hidden.dtype)
        leaves, given = {"dlogits": logits.requires_grad_()}, (logits, labels)
    side = {"ref_logps": inputs.ref_logps, "advantages": inputs.advantages, "clip": CLIP}

    def call() -> dict[str, Tensor | None]:
        if op == "linear_loss":
            out = lk.linear_loss(lk.objectives.a_lol, *given, seq, **side, return_outputs=True)
            out.loss.backward()
        else:
            with torch.set_grad_enabled(op != "score"):
                out = (lk.logprob if op == "logprob" else lk.linear_logprob)(*given)
            if op == "score":
                return {"logps": out.logps}
            out.logps.backward(inputs.upstream)
        found: dict[str, Tensor | None] = {"logps": out.logps.detach()}
        for name, leaf in leaves.items():
            found[name], leaf.grad = leaf.grad, None
        return found

    return call


class Worker:
    def __init__(self, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.wait = partial(torch.cuda.synchronize, self.device) if device != "cpu" else dict
        self.call: Callable[[], Any] = dict

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "op" not in request:
            return {"seconds": self.time(request["repeats"])}
        self.call = dict  # the last case's tensors go first
        inputs = make_inputs(Shape(**request["shape"]), device=self.device)
        self.call, sizes = build_call(request["op"], inputs), {}
        for name, tensor in self.call().items():
            if tensor is not None:
                sizes[name] = n = tensor.numel()
                kept = torch.from_file(f"{request['file']}-{name}", shared=True, size=n)
                kept.copy_(tensor.detach().reshape(-1))
        return {"sizes": sizes, "seconds": self.time(2)}

    def time(self, repeats: int) -> float:
        """Seconds of the median call."""
        times = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            self.call()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def serve() -> None:
    """A worker: answers each line of JSON on stdin with a line on stdout, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    worker = None
    for line in sys.stdin:
        try:
            if worker is None:
                worker = Worker(**json.loads(line))
                there = [name for name, why in lk.available_backends().items() if why is None]
                reply = {"file": str(Path(lk.__file__).resolve()), "backends": there}
            else:
                reply = worker.answer(json.loads(line))
        except Exception as error:  # whatever the version fails with is for the other end to show
            said = " ".join(str(error).split())[:500]
            reply = {"error": f"{type(error).__name__}: {said}"}
        print(json.dumps(reply), file=answers, flush=True)


def disagreement(base: Tensor, head: Tensor, name: str, shape: Shape) -> str | None:
    """Says how far two versions' results lie apart, where that is too far."""
    base, head = base.double(), head.double()
    if name == "logps":
        worst = (head - base).view(-1, shape.seq_len).sum(1).abs().max().item()
        return None if worst <= 1e-3 else f"summed log-probs differ by {worst:.1e} nat"
    apart = ((head - base).norm() / base.norm()).item()
    limit = APART[shape.dtype]
    return None if apart <= limit else f"{name} differs by {apart:.1e} of its norm (> {limit:g})"


def compare(
    op: str, shape: Shape, base: Version, head: Version, rounds: int, margin: float
) -> dict[str, Any]:
    """Checks that the results agree, then times rounds of base, head, head, base."""
    with tempfile.TemporaryDirectory() as folder:
        sides = (base, head)
        ready = [s.ask(op=op, shape=asdict(shape), file=f"{folder}/{s.name}") for s in sides]
        sizes = [one["sizes"] for one in ready]
        if sizes[0] != sizes[1]:
            raise CompareError(f"the results differ in size: base {sizes[0]}, head {sizes[1]}")
        for name, size in sizes[0].items():
            pair = [torch.from_file(f"{folder}/{s.name}-{name}", size=size) for s in sides]
            if fault := disagreement(pair[0], pair[1], name, shape):
                raise CompareError(f"the versions do not agree: {fault}")
    repeats = max(1, math.ceil(SAMPLE_SECONDS / ready[0]["seconds"]))
    times: dict[str, list[float]] = {"base": [], "head": []}
    for turn in range(rounds):
        # Every other round begins with the head: neither always comes after the round's pause.
        first, second = (base, head) if turn % 2 == 0 else (head, base)
        seen = [s.ask(repeats=repeats)["seconds"] for s in (first, second, second, first)]
        times[first.name].append((seen[0] + seen[3]) / 2)
        times[second.name].append((seen[1] + seen[2]) / 2)
    return summary(times["base"], times["head"], margin)


def line(op: str, shape: Shape, found: dict[str, Any]) -> str:
    cells = [op.replace("-frozen", ", frozen head"), str(shape)]
    if "error" in found:
        cells += [found["error"], "", "", "", "not compared"]
    else:
        cells += [f"{found[key]:.3f}" for key in ("base_ms", "head_ms", "ratio")]
        cells += [f"{found['low']:.3f} to {found['high']:.3f}", found["verdict"]]
    return f"| {' | '.join(cells)} |"


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    commit = resolve(given.base)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-compare-")))
        base, head = folder / "base", folder / "head"
        git("worktree", "add", "--quiet", "--detach", str(base), commit)
        stack.callback(git, "worktree", "remove", "--force", str(base))
        copy_head(head)
        build("base", base, given.device)
        if native(base) != native(head):
            build("head", head, given.device)
        else:  # one binary serves both
            for path in (base / "lolkernels").glob("*.so"):
                shutil.copyfile(path, head / "lolkernels" / path.name)
        sides = []
        for tree in (base, head):
            sides.append(Version(tree.name, tree, given.device, given.threads))
            stack.callback(sides[-1].close)
            print(f"{tree.name}: backends {', '.join(sides[-1].about['backends'])}")
        changed = " with local changes" if git("status", "--porcelain") else ""
        now = git("rev-parse", "--short", "HEAD").strip()
        print(
            f"base {commit[:7]}, head {now}{changed}; {given.device}, {given.threads} threads, "
            f"torch {torch.__version__}, {given.rounds} rounds\n\n"
            f"| op | shape | base ms | head ms | head / base | {LEVEL:.0%} interval | |\n"
            "|---|---|---:|---:|---:|---:|---|",
            flush=True,
        )
        found = []
        for shape in given.shapes or SHAPES[given.device]:
            for op in given.ops:
                try:
                    found.append(compare(op, shape, sides[0], sides[1], given.rounds, given.margin))
                except CompareError as error:
                    if any(side.process.poll() is not None for side in sides):
                        raise
                    found.append({"error": str(error)})
                print(line(op, shape, found[-1]), flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    import report  # a worker has no need of it

    parser = report.parser(__doc__, rounds=12, out=False)
    add = parser.add_argument
    add("base", help="the commit to compare the working tree with")
    add("--ops", nargs="+", choices=OPS, default=list(OPS))
    add("--shapes", nargs="+", help="T,D,V,L, or T,D,V,L,bf16, or a name as in run.py")
    add("--margin", type=float, default=0.01, help="a smaller difference is not called (0.01)")
    add("--fail-above", type=float, metavar="RATIO", help="exit 1 if an interval lies above it")
    given = report.parse(parser, sys.argv[1:] if argv is None else argv, fewest_rounds())
    try:
        given.shapes = [parse_shape(text) for text in given.shapes or []]
    except ValueError as error:
        parser.error(str(error))
    given.threads = torch.get_num_threads()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worktree is removed
    try:
        found = run(given)
    except CompareError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    limit = given.fail_above
    if limit is not None and any(row.get("low", 0) > limit for row in found):
        return 1
    return 2 if any("error" in row for row in found) else 0
