"""One rank and two gloo ranks train the same model, under each launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.lolrl.toys import parameters, reload

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.ci


ACCELERATE = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes", "2"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
FSDP2 = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_reshard_after_forward", "true"]
FSDP2 += ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
FSDP2 += ["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
LAUNCHERS = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [*ACCELERATE, "--multi_gpu"],
    "fsdp2": [*ACCELERATE, *FSDP2],
    "zero3": [*ACCELERATE, "--use_deepspeed", "--deepspeed_config_file", "zero3.json"],
}
ZERO3 = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,  # else in shards
    },
    "zero_force_ds_cpu_optimizer": False,
}


def launch(options: list[str], *worker: str) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env["CUDA_VISIBLE_DEVICES"] = ""  # FSDP2 shards over what there is
    command = [sys.executable, *options, "-m", *worker]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]


def outcome(folder: Path, ranks: int) -> list[dict]:
    return [
        {
            "parameters": load_file(folder / f"rank{rank}.safetensors"),
            "log": json.loads((folder / f"rank{rank}.json").read_text()),
        }
        for rank in range(ranks)
    ]


def train(launcher: str, folder: Path, size: int, steps: int, *resume: str) -> list[dict]:
    folder.mkdir()
    (folder / "zero3.json").write_text(json.dumps(ZERO3))
    options = [str(folder / o) if o == "zero3.json" else o for o in LAUNCHERS[launcher]]
    launch(options, "tests.lolrl.ranks_worker", str(folder), str(size), str(steps), *resume)
    found = outcome(folder, 1 if launcher == "python" else 2)
    saved, trained = parameters(reload(folder / "last")), found[0]["parameters"]
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], value) for name, value in trained.items())
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return train("python", tmp_path_factory.mktemp("ranks") / "one", 8, 1)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("ranks") / "two"
    return folder, train("accelerate", folder, 2, 2)


def compare(ranks: list[dict], one: dict, bound: float = 1e-10, logged: float = 1e-9) -> None:
    first, second = ranks
    for name, value in one["parameters"].items():
        assert torch.equal(first["parameters"][name], second["parameters"][name]), name
        assert (first["parameters"][name] - value).abs().max() <= bound, name
    assert len(one["log"]) == len(first["log"]) == 2
    figures = ("loss", "ratio/min", "ratio/mean", "ratio/max", "kl", "clip_ratio", "entropy")
    figures += ("logps/mean", "advantage/mean", "positive_share", "num_tokens", "grad_norm")
    for mine, theirs in zip(first["log"], one["log"], strict=True):
        for name in figures:
            assert mine[name] == pytest.approx(theirs[name], rel=logged, abs=1e-12), name


def test_two_ranks_equal_one(two: tuple[Path, list[dict]], one: dict) -> None:
    """Uneven completions and rows without weight on either rank; 8 updates in float64."""
    compare(two[1], one)


@pytest.mark.slow
def test_two_ranks_without_accumulation_equal_one(one: dict, tmp_path: Path) -> None:
    compare(train("torchrun", tmp_path / "two", 4, 1), one)


def test_two_ranks_of_fsdp2_equal_one(one: dict, tmp_path: Path) -> None:
    """Every parameter is in shards; checkpoints are written in between."""
    compare(train("fsdp2", tmp_path / "two", 2, 2), one)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
def test_two_ranks_of_zero3_equal_one(one: dict, tmp_path: Path) -> None:
    """In float32; 8 updates of 3e-3 each move the parameters."""
    compare(train("zero3", tmp_path / "two", 2, 2), one, bound=1e-4, logged=1e-3)


def test_two_ranks_resume_to_the_same_bits(two: tuple[Path, list[dict]], tmp_path: Path) -> None:
    """From the middle of a log window, whose sums came from both ranks."""
    folder, whole = two
    resumed = train("torchrun", tmp_path / "resumed", 2, 2, str(folder / "checkpoint-4"))
    for mine, theirs in zip(resumed, whole, strict=True):
        for name, value in theirs["parameters"].items():
            assert torch.equal(mine["parameters"][name], value), name
    for mine, theirs in zip(resumed[0]["log"], whole[0]["log"], strict=True):
        for name in ("loss", "ratio/min", "ratio/mean", "ratio/max", "kl", "num_tokens"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-12), name


# --- TRL's trainers -------------------------------------------------------------------------------

METHODS = ("sft", "dpo", "lora")
ENGINES = ("ddp", "fsdp2", *(["zero3"] if find_spec("deepspeed") else []))


@pytest.fixture(scope="module")
def trl_runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """ranks -> a folder for each method and engine, from one launch each."""
    pytest.importorskip("trl", reason="the extra trl is not installed")
    known: dict[int, Path] = {}

    def of(ranks: int) -> Path:
        if ranks not in known:
            known[ranks] = tmp_path_factory.mktemp(f"trl{ranks}")
            options = [*LAUNCHERS["torchrun"][:-1], str(ranks)]
            # First each rank trains by itself, before there is a process group.
            cases = [f"{method}-{engine}" for engine in ("one", *ENGINES) for method in METHODS]
            launch(options, "tests.lolrl.trl_ranks_worker", str(known[ranks]), *cases)
        return known[ranks]

    return of


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", METHODS)
def test_trls_trainers_on_ranks_equal_one(
    method: str, engine: str, ranks: int, trl_runs: Any
) -> None:
    """Parameters and log lines; under FSDP2 and ZeRO-3 every parameter is in shards."""
    (one,) = outcome(trl_runs(ranks) / f"{method}-one", 1)
    found = outcome(trl_runs(ranks) / f"{method}-{engine}", ranks)
    narrow = engine == "zero3"  # in float32
    for name, value in one["parameters"].items():
        for rank in found:
            assert torch.equal(rank["parameters"][name], found[0]["parameters"][name]), name
        error = (found[0]["parameters"][name] - value).abs().max()
        assert error <= (1e-4 if narrow else 1e-10), name
    assert len(one["log"]) == len(found[0]["log"]) == 8
    # transformers adds losses up in float32, and TRL makes its mean logits in it.
    rounded = ("loss", "logits/chosen", "logits/rejected")
    floor = 1e-5 if narrow else 1e-12  # a reward is a difference of log-probs near -60
    for mine, theirs in zip(found[0]["log"], one["log"], strict=True):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            bound = 1e-3 if narrow else 1e-6 if name in rounded else 1e-9
            assert mine[name] == pytest.approx(theirs[name], rel=bound, abs=floor), name
