"""One rank: runs the scenarios of its number of ranks and writes what went wrong in each."""

from __future__ import annotations

import datetime
import json
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from lolrl.cli import leave
from tests.ranks import context, engines, vocabulary  # noqa: F401  they register
from tests.ranks.harness import SCENARIOS


def main(folder: Path, *names: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    rank, world = dist.get_rank(), dist.get_world_size()
    found: dict[str, tuple[str, float]] = {}
    for name, (run, worlds) in SCENARIOS.items():
        if world not in worlds or (names and name not in names):
            continue
        torch.manual_seed(0)
        start, problem = time.perf_counter(), ""
        try:
            run()
        except Exception:
            problem = traceback.format_exc()
        seconds = time.perf_counter() - start
        found[name] = problem, round(seconds, 2)
        (folder / f"rank{rank}.json").write_text(json.dumps(found))
        wrong = torch.tensor(int(bool(problem)))
        dist.all_reduce(wrong)
        if wrong:
            break  # what the ranks say to each other no longer fits
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
