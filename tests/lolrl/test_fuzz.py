"""Mutated files give a documented error or a good result, quickly, and write nothing."""

import json
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lolrl import cache
from lolrl.checkpoints import CheckpointError, problems, read_state, write_manifest
from lolrl.config import (
    ConfigError,
    LoLConfig,
    ValueConfig,
    dump_config,
    from_mapping,
    load_config,
    to_mapping,
)
from lolrl.data import DataError, read_records
from lolrl.files import write_json, write_jsonl
from lolrl.value import ValueHead
from tests.lolrl.toys import make_config, make_rows

MUTATIONS = 1000
TOKENS = [bytes([byte]) for byte in b'{}[]":,\n\x00\xff']
TOKENS += [b"null", b"NaN", b"1e999", b"[" * 200, b"9" * 400, b"-" * 50, b"\\ud800", b"  ", b"---"]
TOKENS += [b"!!python/object/apply:os.system", b"&a", b"*a", b"<<:", b"\x80\x04\x95", b"../../x"]

Target = tuple[Path, Callable[[], Any], type[Exception]]


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


def config_target(folder: Path) -> Target:
    # No path of this machine may stand in the file, or its mutations differ between machines. The
    # folder that a mutated output_dir names must not be made by reading.
    path = dump_config(make_config("out", clip=0.5), folder / "config.yaml")
    return path, lambda: load_config(LoLConfig, path, {"use_cpu": True}), ConfigError


def rows_target(folder: Path, **options: Any) -> Target:
    path = write_jsonl(folder / "rows.jsonl", make_rows(6))
    return path, lambda: read_records(path, **options), DataError


def cache_target(folder: Path, name: str) -> Target:
    key = {"rows": "x", "number": 3, "none": None}
    cache.save(folder, key, {"ref_logps": torch.randn(20), "rewards": torch.randn(4)})
    return folder / name, lambda: cache.load(folder, key), cache.StaleCacheError


def head_target(folder: Path) -> Target:
    config = ValueConfig(num_heads=2, min_value=0.0, max_value=1.0)
    path = ValueHead(8, config).save(folder)
    return path, lambda: ValueHead.load(folder), ValueError


def checkpoint_target(folder: Path, name: str) -> Target:
    write_json(folder / "lolrl_state.json", {"step": 3, "sampler": {}})
    (folder / "model.safetensors").write_bytes(b"weights" * 30)
    write_manifest(folder)
    return folder / name, lambda: (problems(folder), read_state(folder)), CheckpointError


TARGETS: dict[str, Callable[[Path], Target]] = {
    "config": config_target,
    "rows skipped": partial(rows_target, on_bad="skip"),
    "rows strict": partial(rows_target, require_reward=True),
    "cache manifest": partial(cache_target, name=cache.MANIFEST),
    "cache arrays": partial(cache_target, name=cache.ARRAYS),
    "value head": head_target,
    "checkpoint manifest": partial(checkpoint_target, name="manifest.json"),
    "checkpoint state": partial(checkpoint_target, name="lolrl_state.json"),
}


@pytest.fixture(autouse=True)
def _ordered_headers(monkeypatch) -> None:
    """safetensors writes its metadata in another order in every process; here it is sorted."""
    save = safetensors.torch.save

    def ordered(*arguments: Any) -> bytes:
        data = save(*arguments)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        return data[:8] + text.ljust(length) + data[8 + length :]

    monkeypatch.setattr(safetensors.torch, "save", ordered)


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "files"
    folder.mkdir()
    path, load, documented = TARGETS[name](folder)
    good = path.read_bytes()
    load()
    assert tmp_path.name.encode() not in good  # or the mutations differ between machines
    before = sorted(p.name for p in tmp_path.rglob("*"))
    rng, refused, slowest = random.Random(0), 0, 0.0
    for _ in range(MUTATIONS):
        data = mutate(good, rng)
        path.write_bytes(data)
        started = time.process_time()
        try:
            load()
            assert name != "cache arrays" or data == good  # other contents are never loaded
        except documented as error:
            refused += 1
            assert 10 < len(str(error)) < 3000
        slowest = max(slowest, time.process_time() - started)
    assert refused > 10
    assert slowest < 1.0
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    path.write_bytes(good)
    load()


JSON_FIELDS = LoLConfig._VALID_DICT_FIELDS  # transformers reads JSON text or a file here


@pytest.mark.parametrize("field", JSON_FIELDS)
def test_a_mapping_may_be_json_text_or_a_file_and_nothing_else(
    field, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "large.json").write_text("{" + " " * (1 << 16) + "}")
    (tmp_path / "torn.json").write_bytes(b"{\xff")
    os.mkfifo(tmp_path / "pipe")  # would wait for a writer
    texts = ["s", "", "folder", "list.json", "large.json", "torn.json", "pipe", "\0", "x" * 5000]
    # A number is a file descriptor to open(), and reading 0 would wait for the terminal.
    for value in [*texts, "{", '{"a":' * 9999, "{}]", 0, 1, True, 0.5, [], ["a.json"]]:
        with pytest.raises(ConfigError, match=field):
            from_mapping(LoLConfig, {"output_dir": "out", "use_cpu": True, field: value})
    if field == "deepspeed":  # not installed: ImportError in transformers
        with pytest.raises(ConfigError):
            from_mapping(LoLConfig, {"output_dir": "out", "use_cpu": True, field: '{"a": 1}'})
        return
    content = {"split_batches": True} if field == "accelerator_config" else {"min_num_params": 1}
    (tmp_path / "good.json").write_text(json.dumps(content))
    for value in (content, json.dumps(content), "good.json"):
        config = from_mapping(LoLConfig, {"output_dir": "out", "use_cpu": True, field: value})
        assert to_mapping(config)[field].items() >= content.items()


def test_a_manifest_cannot_point_outside(tmp_path) -> None:
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
