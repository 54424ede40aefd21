"""Is the working tree faster or slower than another commit? Both versions, turn by turn.

python benchmarks/compare.py main
python benchmarks/compare.py HEAD~3 --ops linear_loss score --shapes 1024,768,50257,128
python benchmarks/compare.py main --fail-above 1.03        (for a script: exit status 1)

BASE is checked out in a temporary worktree and HEAD, with its uncommitted changes, is copied beside
it; both are built there by the same compiler. Each version then runs in a process of its own, which
uses public names of the library alone, and the two take turns: base, head, head, base. A round's
ratio is the head's time over the base's. Before any timing the two must agree on the results.

The interval holds the median ratio with a confidence of 99% (order statistics: no assumption about
the noise). A version is called faster or slower only where the whole interval lies beyond a margin.
"""

from __future__ import annotations

import argparse
import hashlib
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import CLIP, Inputs, Shape, make_inputs
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


# --- statistics -----------------------------------------------------------------------------------


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
    return {
        "base_ms": 1e3 * statistics.median(base),
        "head_ms": 1e3 * statistics.median(head),
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "verdict": verdict or "no difference shown",
    }


# --- the two trees --------------------------------------------------------------------------------


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


@contextmanager
def checkout(commit: str, tree: Path) -> Iterator[None]:
    git("worktree", "add", "--quiet", "--detach", str(tree), commit)
    try:
        yield
    finally:
        git("worktree", "remove", "--force", str(tree))


def copy_head(tree: Path) -> None:
    """The working tree's sources as they are: uncommitted and new files too, ignored ones not."""
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *SOURCES)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # a deleted file is still listed
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)


def native(tree: Path) -> str:
    """A hash of what the compiled part is made from."""
    digest = hashlib.sha256()
    for path in sorted([*(tree / "csrc").rglob("*"), tree / "setup.py"]):
        if path.is_file():
            digest.update(path.relative_to(tree).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


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


def build_both(base: Path, head: Path, device: str) -> None:
    """Where the native sources are the same, one binary serves both."""
    build("base", base, device)
    if native(base) != native(head):
        build("head", head, device)
        return
    for path in (base / "lolkernels").glob("*.so"):
        shutil.copyfile(path, head / "lolkernels" / path.name)


# --- a version in a process of its own ------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    op: str
    frozen_head: bool
    shape: Shape

    @property
    def title(self) -> str:
        return self.op + (", frozen head" if self.frozen_head else "")


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
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
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


def build_call(
    op: str, inputs: Inputs, frozen_head: bool
) -> Callable[[], dict[str, Tensor | None]]:
    """One forward and backward (a forward for `score`); returns log-probs and gradients."""
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(not frozen_head)
    labels, shape = inputs.labels, inputs.shape
    cu = torch.arange(0, shape.tokens + 1, shape.seq_len, device=labels.device)
    leaves = {"dhidden": hidden, "dweight": weight}
    if op == "logprob":
        with torch.no_grad():
            logits = (hidden.float() @ weight.float().T).to(hidden.dtype)
        leaves = {"dlogits": logits.requires_grad_()}
    side = {"ref_logps": inputs.ref_logps, "advantages": inputs.advantages, "clip": CLIP}

    def call() -> dict[str, Tensor | None]:
        if op == "linear_loss":
            seq = lk.Sequences.from_cu_seqlens(cu)
            given = (lk.objectives.a_lol, hidden, weight, labels, seq)
            out = lk.linear_loss(*given, **side, return_outputs=True)
            out.loss.backward()
        elif op == "score":
            with torch.no_grad():
                return {"logps": lk.linear_logprob(hidden, weight, labels).logps}
        else:
            given = (logits, labels) if op == "logprob" else (hidden, weight, labels)
            out = (lk.logprob if op == "logprob" else lk.linear_logprob)(*given)
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
        self.inputs: Inputs | None = None
        self.call: Callable[[], Any] = dict

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "case" not in request:
            return {"seconds": self.time(request["repeats"])}
        case, folder = request["case"], Path(request["folder"])
        shape = Shape(**case["shape"])
        self.call = dict  # the last case's tensors go first
        if self.inputs is None or shape != self.inputs.shape:
            self.inputs = None
            self.inputs = make_inputs(shape, device=self.device)
        self.call = build_call(case["op"], self.inputs, case["frozen_head"])
        sizes = {}
        for name, tensor in self.call().items():
            if tensor is not None:
                sizes[name] = tensor.numel()
                path = folder.with_name(f"{folder.name}-{name}")
                kept = torch.from_file(str(path), shared=True, size=tensor.numel())
                kept.copy_(tensor.detach().reshape(-1))
        return {"sizes": sizes, "seconds": self.time(2)}

    def time(self, repeats: int) -> float:
        """Seconds of the median call."""
        wait = partial(torch.cuda.synchronize, self.device) if self.device.type == "cuda" else dict
        times = []
        for _ in range(repeats):
            wait()
            start = time.perf_counter()
            self.call()
            wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def serve() -> None:
    """A worker: answers each line of JSON on stdin with a line on stdout, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def reply(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    worker = None
    for line in sys.stdin:
        try:
            if worker is None:
                worker = Worker(**json.loads(line))
                there = [name for name, why in lk.available_backends().items() if why is None]
                reply(file=str(Path(lk.__file__).resolve()), backends=there)
            else:
                reply(**worker.answer(json.loads(line)))
        except Exception as error:  # whatever the version fails with is for the other end to show
            reply(error=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")


# --- the comparison -------------------------------------------------------------------------------


def disagreement(base: Tensor, head: Tensor, name: str, shape: Shape) -> str | None:
    """Says how far two versions' results lie apart, where that is too far."""
    base, head = base.double(), head.double()
    if name == "logps":
        worst = (head - base).view(-1, shape.seq_len).sum(1).abs().max().item()
        return None if worst <= 1e-3 else f"summed log-probs differ by {worst:.1e} nat"
    apart = ((head - base).norm() / base.norm()).item()
    limit = APART[shape.dtype]
    return None if apart <= limit else f"{name} differs by {apart:.1e} of its norm (> {limit:g})"


def compare(case: Case, base: Version, head: Version, rounds: int, margin: float) -> dict[str, Any]:
    """Checks that the results agree, then times rounds of base, head, head, base."""
    with tempfile.TemporaryDirectory() as folder:
        sides = (base, head)
        ready = [s.ask(case=asdict(case), folder=f"{folder}/{s.name}") for s in sides]
        sizes = [one["sizes"] for one in ready]
        if sizes[0] != sizes[1]:
            raise CompareError(f"the results differ in size: base {sizes[0]}, head {sizes[1]}")
        for name, size in sizes[0].items():
            pair = [torch.from_file(f"{folder}/{s.name}-{name}", size=size) for s in sides]
            if fault := disagreement(pair[0], pair[1], name, case.shape):
                raise CompareError(f"the versions do not agree: {fault}")
    repeats = max(1, math.ceil(SAMPLE_SECONDS / ready[0]["seconds"]))
    times: dict[str, list[float]] = {"base": [], "head": []}
    for turn in range(rounds):
        # Every other round begins with the head: neither always comes after the round's pause.
        first, second = (base, head) if turn % 2 == 0 else (head, base)
        order = (first, second, second, first)
        seen = [float(side.ask(repeats=repeats)["seconds"]) for side in order]
        times[first.name].append((seen[0] + seen[3]) / 2)
        times[second.name].append((seen[1] + seen[2]) / 2)
    return summary(times["base"], times["head"], margin)


def line(case: Case, found: dict[str, Any]) -> str:
    start = f"| {case.title} | {case.shape} |"
    if "error" in found:
        return f"{start} {found['error']} | | | | not compared |"
    return (
        f"{start} {found['base_ms']:.3f} | {found['head_ms']:.3f} | {found['ratio']:.3f} "
        f"| {found['low']:.3f} to {found['high']:.3f} | {found['verdict']} |"
    )


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    commit = resolve(arguments.base)
    shapes = arguments.shapes or SHAPES[arguments.device]
    names = [name.partition("-") for name in arguments.ops]
    cases = [Case(op, bool(frozen), shape) for shape in shapes for op, _, frozen in names]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-compare-")))
        trees = {"base": folder / "base", "head": folder / "head"}
        stack.enter_context(checkout(commit, trees["base"]))
        copy_head(trees["head"])
        build_both(trees["base"], trees["head"], arguments.device)
        sides = []
        for name, tree in trees.items():
            sides.append(Version(name, tree, arguments.device, arguments.threads))
            stack.callback(sides[-1].close)
            print(f"{name}: backends {', '.join(sides[-1].about['backends'])}")
        changed = " with local changes" if git("status", "--porcelain") else ""
        now = git("rev-parse", "--short", "HEAD").strip()
        print(
            f"base {commit[:7]}, head {now}{changed}; {arguments.device}, "
            f"{arguments.threads} threads, torch {torch.__version__}, {arguments.rounds} rounds\n"
        )
        print(f"| op | shape | base ms | head ms | head / base | {LEVEL:.0%} interval | |")
        print("|---|---|---:|---:|---:|---:|---|", flush=True)
        found = []
        for case in cases:
            try:
                row = compare(case, sides[0], sides[1], arguments.rounds, arguments.margin)
            except CompareError as error:
                if any(side.process.poll() is not None for side in sides):
                    raise
                row = {"error": str(error)}
            found.append(row)
            print(line(case, row), flush=True)
    return found


def shape_of(text: str) -> Shape:
    sizes = text.split(",")
    dtype = [] if sizes[-1].isdigit() else [sizes.pop()]
    try:
        return Shape(*(int(size) for size in sizes), *dtype)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"give T,D,V,seq_len[,dtype]; got {text!r} ({error})"
        ) from None


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("base", help="the commit to compare the working tree with")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--ops", nargs="+", choices=OPS, default=list(OPS))
    add("--shapes", nargs="+", type=shape_of, metavar="T,D,V,L", help="or T,D,V,L,bf16")
    add("--rounds", type=int, default=12, help="of four turns each (default: 12)")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--margin", type=float, default=0.01, help="a smaller difference is not called (0.01)")
    add("--fail-above", type=float, metavar="RATIO", help="exit 1 if an interval lies above it")
    arguments = parser.parse_args(argv)
    least = fewest_rounds()
    if arguments.rounds < least:
        parser.error(f"--rounds must be at least {least} for a {LEVEL:.0%} interval")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device (try --device cpu)")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worktree is removed
    try:
        found = run(arguments)
    except CompareError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    limit = arguments.fail_above
    if limit is not None and any(row.get("low", 0) > limit for row in found):
        return 1
    return 2 if any("error" in row for row in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
