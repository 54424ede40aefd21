"""Everything that a card is wanted for, in one command of ten minutes: smoke, benchmark, tests.

    python3 benchmarks/card.py --out card
    python3 benchmarks/card.py --out card --stages tests      goes on in the same folder
    python3 benchmarks/card.py --out dry --device cpu         a dry run: tiny shapes
    python benchmarks/report.py card --publish --docs         the page, plots, the docs' section

prepare    the compiled kernels: carried in --bundle (see bundle.py), or built, told by hash
smoke      is it right (every op, dtype and backend against float64), and how fast are the parts
bench      rows in the order they are wanted, then whole training steps
tests      tests/gpu, a process for each file and backend, the files that decide first
sanitizer  compute-sanitizer on the tests named so; only where --stages names it

Every task runs in a worker process and is written to OUT/journal.jsonl when it ends. A worker that
dies, hangs or loses the device costs the task in hand: that is written down and a new worker goes
on. The same command again, in the same folder, does what is left. This process imports neither
torch nor the library, so nothing that they do can end it.

Exit status: 0 all went well, 1 something is wrong (the page names it), 2 it could not begin.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import journal
from journal import Journal

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("smoke", "bench", "tests", "sanitizer")
SMOKE = {"cuda": 90.0, "cpu": 600.0}  # seconds
TESTS_SHARE = 0.2  # of the time, kept for the tests where they are asked for
START = {"cuda": 100.0, "cpu": 120.0}  # seconds from a worker's start to its first task
GRACE = 4.0  # seconds between SIGINT and SIGKILL
TIME_IS_UP = "the time of its stage was up"
LOG = 100_000  # bytes that are kept of what a process prints
DEVICE_LOST = 75  # a worker's exit status: it has said so itself, and a new one may go on
# The files whose verdict is wanted first; the others follow by name.
DECIDE = ("test_accuracy", "test_agreement", "test_row_kernels", "test_repeats", "test_graphs")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass
class Job:
    """A process that works through tasks of its own and writes to the journal."""

    name: str
    command: list[str]
    limit: float | None = None  # seconds of one task; None: the task's own
    good: tuple[int, ...] = (0,)  # exit statuses of a process that came to its end
    environment: dict[str, str] = field(default_factory=dict)


class Card:
    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.out: Path = given.out.resolve()
        self.journal = Journal(self.out, f"{time.time_ns():x}")
        self.until = time.time() + 60 * given.minutes
        self.lock = threading.Lock()
        # Not in the folder that is to travel back.
        self.wheels = Path(tempfile.gettempdir()) / f"wheels-{self.journal.run}"

    def end(self, *_: Any) -> None:
        """Ends what runs, and goes on to the page."""
        self.until = 0.0

    def environment(self) -> dict[str, str]:
        wheels = self.wheels
        folders = [ROOT, ROOT / "python", ROOT / "benchmarks", ROOT / "tests" / "gpu", wheels]
        for listed in wheels.glob("*.pth"):  # which count in no folder that PYTHONPATH names
            folders += [wheels / line for line in listed.read_text().split("\n") if line.strip()]
        path = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
        found = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "PYTHONFAULTHANDLER": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if self.given.device == "cpu":
            found |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return found

    def worker(self, *what: str, until: float) -> Job:
        g = self.given
        command = [sys.executable, "-c", "import card_worker; card_worker.main()", *what]
        command += ["--out", str(self.out), "--run", self.journal.run, "--device", g.device]
        command += ["--until", str(until), "--commit", g.commit or ""]
        command += ["--shown", shlex.join(["python3", "benchmarks/card.py", *g.shown])]
        for name in ("plugin", "only", "rounds", "backends"):
            if getattr(g, name) is not None:
                command += [f"--{name}", str(getattr(g, name))]
        return Job(" ".join(what), command)

    def go_all(self, jobs: list[Job], until: float, at_once: int) -> None:
        with ThreadPoolExecutor(max(1, at_once)) as pool:
            list(pool.map(lambda job: self.go(job, until), jobs))

    def go(self, job: Job, until: float) -> None:
        """Runs the job to its end, with a new process after each loss, until the time is up."""
        idle = 0
        while time.time() < min(until, self.until) and idle < 2:
            before = len(self.said_by(job))
            with tempfile.TemporaryFile() as log:
                process = subprocess.Popen(
                    job.command,
                    cwd=ROOT,
                    env={**self.environment(), **job.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                reason = self.watch(process, job, until)
                words = self.keep(log, job)
            task, status = self.open_task(job), process.returncode
            if reason == TIME_IS_UP:
                self.journal.write("left", job=job.name, why=f"{task} was cut short")
                return
            if status in job.good and reason is None:
                return
            if task is not None or reason or status != DEVICE_LOST:
                why = reason or (f"exit status {status}" if status >= 0 else died(-status))
                fault = {"job": job.name, "task": task or job.name, "reason": why, "text": words}
                self.journal.write("fault", **fault)
                print(f"{fault['task']}: {why}", file=sys.stderr, flush=True)
            idle = 0 if len(self.said_by(job)) > before + 1 else idle + 1

    def keep(self, log: IO[bytes], job: Job) -> str:
        """Adds a process's output to OUT/log.txt. Returns its last words."""
        end = log.seek(0, os.SEEK_END)
        log.seek(max(0, end - LOG))
        text = log.read()
        with self.lock, (self.out / "log.txt").open("ab") as file:
            if file.tell() < 2**23:
                file.write(f"\n=== {job.name}\n".encode() + text)
        return " ".join(text.decode(errors="replace").split())[-700:]

    def said_by(self, job: Job) -> list[journal.Line]:
        run = self.journal.run
        return [x for x in self.journal.lines() if x["run"] == run and x.get("job") == job.name]

    def open_task(self, job: Job) -> str | None:
        """The task that was begun and has no end."""
        begun = None
        for line in self.said_by(job):
            if line["kind"] == "begin":
                begun = line["task"]
            elif line.get("task") == begun:
                begun = None
        return begun

    def watch(self, process: subprocess.Popen[bytes], job: Job, until: float) -> str | None:
        """Waits for the process. Says why, where it had to be stopped."""
        started, patience = time.time(), START[self.given.device]
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
                return None
            now = time.time()
            here = [x for x in self.said_by(job) if x["at"] >= started - 0.01]
            last = here[-1] if here else {"kind": "start", "at": started}
            limit = (job.limit or float(last["limit"])) if last["kind"] == "begin" else patience
            reason = {
                "start": f"nothing began within {limit:.0f} s",
                "begin": f"still running after {limit:.0f} s",
            }.get(last["kind"], f"silent for {limit:.0f} s between two tasks")
            up = now > min(until, self.until) + 1
            if up or now - last["at"] > limit:
                stop(process)
                return TIME_IS_UP if up else reason

    def prepare(self) -> None:
        command = [sys.executable, str(ROOT / "benchmarks" / "bundle.py"), "place"]
        command += ["--bundle", str(self.given.bundle), "--out", str(self.out)]
        command += ["--run", self.journal.run, "--device", self.given.device]
        command += ["--wheels", str(self.wheels)]
        command += ["--no-build"] if self.given.no_build else []
        self.go(Job("prepare", command), min(self.until, time.time() + 240))

    def header(self) -> journal.Line | None:
        """Asks a worker where this is; None where it could not say."""
        until = min(self.until, time.time() + 120)
        job = self.worker("environment", until=until)
        self.go(job, until)
        return next((x for x in self.said_by(job) if x["kind"] == "header"), None)

    def smoke(self, backends: list[str]) -> None:
        """The checks of all backends at once, for nothing is timed; then the parts, alone."""
        seconds = SMOKE[self.given.device]
        until = min(self.until, time.time() + seconds)
        half = until - 0.5 * seconds if self.given.device == "cuda" else until
        checks = [self.worker("check", b, until=half) for b in backends]
        self.go_all(checks, half, min(4, self.given.jobs))
        self.go(self.worker("parts", until=until), until)

    def tests(self, backends: list[str]) -> None:
        folder = self.given.tests.resolve()
        collect = self.pytest(folder, "")
        collect.name, collect.good = "tests collect", (0, 1, 2, 5)
        collect.command = [*collect.command[:-2], "--collect-only", "--journal-job", collect.name]
        self.go(collect, self.until)
        found = [x["pairs"] for x in self.said_by(collect) if x["kind"] == "collected"]
        if not found:
            reason = f"no tests could be collected in {folder}"
            self.journal.write("fault", job="tests", task="tests", reason=reason, text="")
            return
        order = {f"{name}.py": place for place, name in enumerate(DECIDE)}
        pairs = sorted(found[-1], key=lambda pair: (order.get(pair[0], len(DECIDE)), pair))
        # "": tests with no backend among their parameters
        jobs = [self.pytest(folder / n, b) for n, b in pairs if b == "" or b in backends]
        self.go_all(jobs, self.until, self.given.jobs)

    def pytest(self, path: Path, backend: str, tool: tuple[str, ...] = ()) -> Job:
        name = " ".join(filter(None, ("tests", path.stem, backend, *tool[2:3])))
        command = [*tool, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "outcomes", "--journal", str(self.out), "--journal-run", self.journal.run]
        command += ["--journal-job", name, "-m", "gpu and not slow", str(path)]
        if not tool:
            command += ["--only-backend", backend]
        environment = {"LOLKERNELS_TEST_DEVICE": self.given.device}
        # 1: tests failed, 5: none was selected; each outcome is in the journal.
        return Job(name, command, self.given.test_limit, (0, 1, 5), environment)

    def sanitizer(self) -> None:
        """Any report is a failure, and so is a red test."""
        places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
        path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{p}/bin" for p in places if p)])
        program = shutil.which("compute-sanitizer", path=path)
        if program is None:
            self.journal.write("left", job="sanitizer", why="compute-sanitizer was not found")
            return
        jobs = []
        flags = ("--error-exitcode", "99", "--print-limit", "20", "--target-processes", "all")
        for tool in TOOLS:
            path = self.given.tests / "test_sanitizer.py"
            job = self.pytest(path, "", (program, "--tool", tool, *flags))
            job.limit, job.good = 600.0, (0, 5)
            # Each tensor is an allocation of its own, so that the tool sees where one ends.
            job.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
            jobs.append(job)
        self.go_all(jobs, self.until, len(jobs))

    def run(self) -> int:
        stages = self.given.stages
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.end)
        self.out.mkdir(parents=True, exist_ok=True)
        journal.mend(self.out)
        self.prepare()
        header = self.header()
        if header is None:
            faults = [x for x in self.journal.lines() if x["kind"] == "fault"]
            print("; ".join(f"{x['reason']}: {x['text']}" for x in faults[-1:]), file=sys.stderr)
            return 2
        backends = header["backends"]
        if "smoke" in stages:
            self.smoke(backends)
        if "bench" in stages:
            kept = TESTS_SHARE * 60 * self.given.minutes if "tests" in stages else 0.0
            until = self.until - kept
            self.go(self.worker("bench", until=until), until)
        if "tests" in stages:
            self.tests(backends)
        if "sanitizer" in stages:
            self.sanitizer()
        page = [sys.executable, str(ROOT / "benchmarks" / "report.py"), str(self.out)]
        with contextlib.suppress(subprocess.TimeoutExpired):  # the journal is what counts
            subprocess.run(page, cwd=ROOT, env=self.environment(), timeout=120)
        shutil.rmtree(self.wheels, ignore_errors=True)
        mine = [x for x in self.journal.lines() if x["run"] == self.journal.run]
        return 1 if any(map(journal.bad, mine)) else 0


def died(number: int) -> str:
    return f"died by {signal.Signals(number).name}"


def stop(process: subprocess.Popen[Any]) -> None:
    """SIGINT, so that pytest can end its report; then SIGKILL, to its children too."""
    for number, seconds in ((signal.SIGINT, GRACE), (signal.SIGKILL, 30.0)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            process.wait()
            return


def stages(text: str) -> list[str]:
    found = text.split(",")
    if unknown := set(found) - set(STAGES):
        raise argparse.ArgumentTypeError(
            f"stages are {', '.join(STAGES)}; got {', '.join(sorted(unknown))}"
        )
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the folder of everything found")
    add("--stages", type=stages, default=list(STAGES[:3]), help="comma-separated")
    add("--minutes", type=float, default=9.5)
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    add("--bundle", type=Path, default=ROOT / "gpu-bundle")
    add("--no-build", action="store_true", help="use what is carried")
    add("--only", metavar="PATTERN", help="tasks whose name it finds")
    add("--backends", help="these alone, comma-separated; the first meets the peers")
    add("--rounds", type=int, help="interleaved rounds a task")
    add("--jobs", type=int, default=min(6, os.cpu_count() or 1))
    add("--tests", type=Path, default=ROOT / "tests" / "gpu")
    add("--test-limit", type=float, default=90.0, help="seconds of one test")
    add("--commit", help="to record where the tree has no git")
    add("--plugin", help=argparse.SUPPRESS)  # a module that each worker imports
    given = parser.parse_args(argv)
    given.shown = argv
    return given


def main(argv: list[str] | None = None) -> int:
    return Card(parse(sys.argv[1:] if argv is None else argv)).run()


if __name__ == "__main__":
    raise SystemExit(main())
