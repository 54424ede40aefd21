"""S3: mutated files give a documented error or a good result, quickly, and write nothing."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lolrl import cache
from lolrl.checkpoints import CheckpointError, problems, read_state, write_manifest
from lolrl.config import ConfigError, LoLConfig, ValueConfig, dump_config, load_config
from lolrl.data import DataError, read_records
from lolrl.files import write_json, write_jsonl
from lolrl.value import ValueHead
from tests.lolrl.toys import make_config, make_rows

MUTATIONS = 1250
TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"\n",
    b"\x00",
    b"\xff",
    b"null",
    b"NaN",
    b"1e999",
]
TOKENS += [b"!!python/object/apply:os.system", b"&a", b"*a", b"<<:", b"---", b"\\ud800", b"-" * 50]
TOKENS += [b"[" * 200, b"9" * 400, b"\x80\x04\x95", b"  ", b"../../x"]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four edits: cut, flip, insert a token, repeat or drop a span."""
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data) + 1)
        span = rng.randint(1, 40)
        kind = rng.randrange(6)
        if kind == 0:
            data = data[:place]
        elif kind == 1 and place < len(data):
            data = data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
        elif kind == 2:
            data = data[:place] + rng.choice(TOKENS) + data[place:]
        elif kind == 3:
            data = data[:place] + data[place : place + span] * 2 + data[place + span :]
        elif kind == 4:
            data = data[:place] + data[place + span :]
        else:
            data = data[:place] + rng.randbytes(span) + data[place:]
    return data


def config_target(folder: Path) -> tuple[Path, Callable[[], Any], tuple]:
    path = dump_config(make_config(folder / "out", clip=0.5), folder / "config.yaml")
    # The folder a mutated output_dir names must not be made by reading.
    return path, lambda: load_config(LoLConfig, path, {"use_cpu": True}), (ConfigError,)


def rows_target(folder: Path) -> tuple[Path, Callable[[], Any], tuple]:
    path = write_jsonl(folder / "rows.jsonl", make_rows(6))
    return path, lambda: read_records(path, on_bad="skip"), (DataError,)


def strict_rows_target(folder: Path) -> tuple[Path, Callable[[], Any], tuple]:
    path = write_jsonl(folder / "rows.jsonl", make_rows(6))
    return path, lambda: read_records(path, require_reward=True), (DataError,)


def cache_target(name: str) -> Callable[[Path], tuple[Path, Callable[[], Any], tuple]]:
    def make(folder: Path) -> tuple[Path, Callable[[], Any], tuple]:
        key = {"rows": "x", "number": 3, "none": None}
        cache.save(folder, key, {"ref_logps": torch.randn(20), "rewards": torch.randn(4)})
        return folder / name, lambda: cache.load(folder, key), (cache.StaleCacheError,)

    return make


def head_target(folder: Path) -> tuple[Path, Callable[[], Any], tuple]:
    config = ValueConfig(num_heads=2, min_value=0.0, max_value=1.0)
    path = ValueHead(8, config).save(folder)
    return path, lambda: ValueHead.load(folder), (ValueError,)


def checkpoint_target(name: str) -> Callable[[Path], tuple[Path, Callable[[], Any], tuple]]:
    def make(folder: Path) -> tuple[Path, Callable[[], Any], tuple]:
        write_json(folder / "lolrl_state.json", {"step": 3, "sampler": {}})
        (folder / "model.safetensors").write_bytes(b"weights" * 30)
        write_manifest(folder)
        return folder / name, lambda: (problems(folder), read_state(folder)), (CheckpointError,)

    return make


TARGETS: dict[str, Callable[[Path], tuple[Path, Callable[[], Any], tuple]]] = {
    "config": config_target,
    "rows skipped": rows_target,
    "rows strict": strict_rows_target,
    "cache manifest": cache_target(cache.MANIFEST),
    "cache arrays": cache_target(cache.ARRAYS),
    "value head": head_target,
    "checkpoint manifest": checkpoint_target("manifest.json"),
    "checkpoint state": checkpoint_target("lolrl_state.json"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "files"
    folder.mkdir()
    path, load, documented = TARGETS[name](folder)
    good = path.read_bytes()
    load()
    before = sorted(p.name for p in tmp_path.rglob("*"))
    rng, refused = random.Random(0), 0
    slowest = 0.0
    for _ in range(MUTATIONS):
        path.write_bytes(mutate(good, rng))
        started = time.process_time()
        try:
            load()
        except documented as error:
            refused += 1
            assert 10 < len(str(error)) < 3000
        slowest = max(slowest, time.process_time() - started)
    assert refused > 10
    assert slowest < 1.0
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    path.write_bytes(good)
    load()


def test_a_cache_is_never_loaded_with_other_contents(tmp_path: Path) -> None:
    """Of every mutation of the arrays, none that changes them is accepted."""
    key = {"rows": "x"}
    logps = torch.randn(20)
    cache.save(tmp_path, key, {"ref_logps": logps})
    path = tmp_path / cache.ARRAYS
    good, rng = path.read_bytes(), random.Random(1)
    for _ in range(MUTATIONS):
        data = mutate(good, rng)
        path.write_bytes(data)
        if data == good:
            continue
        with pytest.raises(cache.StaleCacheError):
            cache.load(tmp_path, key)
    assert json.loads((tmp_path / cache.MANIFEST).read_text())["bytes"] == len(good)


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    write_manifest(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("../secret", str(tmp_path / "secret")):
        manifest["files"] = {name: {"bytes": 1, "sha256": "0"}}
        write_json(folder / "manifest.json", manifest)
        (problem,) = problems(folder)
        assert "outside" in problem
