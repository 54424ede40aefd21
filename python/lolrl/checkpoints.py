"""Checkpoints that can be trusted: a manifest, written last, vouches for every file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from lolrl.files import sha256_file, write_json

MANIFEST = "manifest.json"
STATE = "lolrl_state.json"


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete, damaged, or of another run."""


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def write_manifest(folder: str | os.PathLike[str]) -> None:
    """Record length and SHA-256 of every file in `folder`, after they reached the disk."""
    folder = Path(folder)
    entries = {}
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entries[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
        }
    write_json(folder / MANIFEST, {"format": "lolrl.checkpoint.1", "files": entries})


def problems(folder: str | os.PathLike[str]) -> list[str]:
    """What is wrong with a checkpoint folder; empty if it is whole."""
    folder = Path(folder)
    try:
        entries = json.loads((folder / MANIFEST).read_bytes())["files"]
        if not isinstance(entries, dict):
            raise ValueError("files is not a mapping")
    except FileNotFoundError:
        return [f"{MANIFEST} is missing: it was not written to its end"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    found = []
    for name, entry in entries.items():
        path = folder / name
        if ".." in path.parts or Path(name).is_absolute():
            found.append(f"{MANIFEST} names {name!r}, which is outside the checkpoint")
            continue
        try:
            if path.stat().st_size != entry["bytes"]:
                found.append(f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}")
            elif sha256_file(path) != entry["sha256"]:
                found.append(f"{name} does not match its SHA-256")
        except (OSError, KeyError, TypeError, ValueError) as error:
            found.append(f"{name} cannot be read ({error})")
    return found


def last_complete(output_dir: str | os.PathLike[str]) -> Path:
    """The checkpoint of the highest step that is whole.

    Raises:
        CheckpointError: there is none; the message says what is wrong with those there are.
    """
    folders: list[tuple[int, Path]] = []
    if Path(output_dir).is_dir():
        for path in Path(output_dir).iterdir():
            match = re.fullmatch(r"checkpoint-(\d+)", path.name)
            if match and path.is_dir():
                folders.append((int(match[1]), path))
    faults = []
    for _, path in sorted(folders, reverse=True):
        found = problems(path)
        if not found:
            return path
        faults.append(f"{path.name}: {found[0]}")
    detail = f" ({'; '.join(faults)})" if faults else ""
    raise CheckpointError(
        f"{output_dir} holds no complete checkpoint{detail}; train without resume_from_checkpoint"
    )


def read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The trainer's own state in a checkpoint, after checking that the checkpoint is whole.

    Raises:
        CheckpointError: it is not.
    """
    found = problems(folder)
    if found:
        raise CheckpointError(f"{folder}: {found[0]}; resume from another checkpoint")
    try:
        state = json.loads((Path(folder) / STATE).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: {STATE} cannot be read ({error})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder}: {STATE} does not hold a mapping")
    return state
