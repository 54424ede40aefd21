"""Heads and sequences in parts, and engines that train in parallel, on gloo processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ROOT
from judges import peaky

import lolkernels as lk
from tests.ranks import context, engines, vocabulary  # noqa: F401  they register
from tests.ranks.harness import SCENARIOS

ENGINES = {name for name, (run, _) in SCENARIOS.items() if run.__module__ == engines.__name__}
CASES = [
    pytest.param(n, name, marks=pytest.mark.ci if n > 2 or name in ENGINES else ())
    for name, (_, worlds) in SCENARIOS.items()
    for n in worlds
]


def launch(ranks: int, folder: Path, names: set[str]) -> list[dict[str, Any]]:
    """What each rank found, by torchrun as users start it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "tests.ranks.worker", str(folder), *names]
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "python", "tests"))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)
    files = [folder / f"rank{rank}.json" for rank in range(ranks)]
    assert all(f.exists() for f in files), done.stderr[-4000:]
    return [json.loads(f.read_text()) for f in files]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What ranks found of the engines, or of the rest: from one launch each."""
    known: dict[tuple[int, bool], list[dict[str, Any]]] = {}

    def of(ranks: int, name: str) -> list[dict[str, Any]]:
        key = ranks, name in ENGINES
        if key not in known:
            names = ENGINES if name in ENGINES else set(SCENARIOS) - ENGINES
            known[key] = launch(ranks, tmp_path_factory.mktemp(f"ranks{ranks}"), names)
        return known[key]

    return of


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_on_ranks(ranks: int, name: str, found: Any) -> None:
    for rank, results in enumerate(found(ranks, name)):
        assert name in results, f"rank {rank} never came to it: {list(results)[-1:]} stopped it"
        problem, _ = results[name]
        assert not problem, f"rank {rank}: {problem}"


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("budget", [None, 2000], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_the_weight_only_itself_is_saved(
    dtype: torch.dtype, budget: int | None, frozen: bool
) -> None:
    """FSDP2 and ZeRO-3 release and gather a weight: a view or a copy of it would not follow."""
    p = peaky(9, 8, 300, dtype=dtype, bias=True)
    h, w = p.hidden.requires_grad_(), p.weight.requires_grad_(not frozen)
    seq = lk.Sequences.from_lengths([4, 5])
    options = {"bias": p.bias, "softcap": 30.0, "memory_budget": budget}
    calls = [
        lambda: lk.linear_logprob(h, w, p.labels, **options).logps.sum(),
        lambda: lk.linear_logprob(h, w, p.labels, entropy_grad=True, **options).entropy.sum(),
        lambda: lk.linear_loss(lk.objectives.nll, h, w, p.labels, seq, **options),
    ]
    for call in calls:
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            call().backward()
        assert any(t is w for t in saved)
        for t in saved:
            shared = t.untyped_storage().data_ptr() == w.untyped_storage().data_ptr()
            assert t is w or not (shared or t.shape == w.shape)
