"""The demo's corpus: 10,605 movie-review snippets, each with the mean of twenty human ratings.

They ship in the source distribution of vaderSentiment (MIT licence), as the ground-truth data of
Hutto & Gilbert, "VADER", ICWSM 2014. pip fetches that file once; pip and this module check its
sha256; it is kept in a cache folder. Nothing is unpacked to disk: the two nested archives are read
in memory, member by member, by name.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SDIST = "vaderSentiment-3.3.2.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_RATED = "hutto_ICWSM_2014.tar.gz"
_MOVIES = "movieReviewSnippets_GroundTruth.txt"
_MAX_BYTES = 16 << 20  # no member of the two archives is larger than 3 MB


@dataclass(frozen=True)
class Snippet:
    """One review sentence with its mean human rating, -4 (worst) to 4 (best)."""

    text: str
    rating: float


@dataclass(frozen=True)
class Splits:
    """Rows `{"prompt", "completion", "rating"}`, no prompt in more than one split.

    `validation` and `test` have one row per prompt; `train` keeps every snippet of its prompts.
    """

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    test: list[dict[str, Any]]


def cache_folder() -> Path:
    """`lolrl` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lolrl"


def fetch_sdist(folder: Path | None = None) -> Path:
    """The path of the checked source distribution in `folder`, fetched through pip if missing.

    pip gets the hash too (`--require-hashes`), so that nothing of another file is ever run. Raises
    ValueError where the file in the folder has another sha256, RuntimeError where pip fails.
    """
    folder = folder or cache_folder()
    target = folder / SDIST
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            wanted = Path(temporary) / "requirements.txt"
            wanted.write_text(f"vaderSentiment==3.3.2 --hash=sha256:{SDIST_SHA256}\n")
            command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps"]
            command += ["--no-binary", ":all:", "--no-build-isolation", "--quiet"]
            command += ["--disable-pip-version-check", "--dest", temporary, "-r", str(wanted)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            fetched = Path(temporary) / SDIST
            if done.returncode or not fetched.exists():
                cause = (done.stderr.strip() or "no file").splitlines()[-1]
                raise RuntimeError(
                    f"pip could not fetch {SDIST}: {cause}; put the file into {folder} by hand"
                )
            _check(fetched)
            fetched.replace(target)
    _check(target)
    return target


def _check(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SDIST_SHA256:
        raise ValueError(f"{path} has sha256 {digest}, not {SDIST_SHA256}: delete it and run again")


def _member(archive: bytes, name: str) -> bytes:
    """The bytes of the one regular file called `name` in a tar.gz; paths in it are not followed."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            if member.isfile() and Path(member.name).name == name:
                if member.size > _MAX_BYTES:
                    raise ValueError(f"{name} is {member.size} bytes long: more than expected")
                handle = tar.extractfile(member)
                assert handle is not None  # isfile() holds
                return handle.read()
    raise ValueError(f"the archive holds no file called {name}")


def read_movies(sdist: Path) -> list[Snippet]:
    """The movie snippets of the source distribution, in their order.

    Raises ValueError naming the line that does not have the three fields id, rating, text.
    """
    text = _member(_member(sdist.read_bytes(), _RATED), _MOVIES).decode("utf-8")
    snippets = []
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) != 3:
            raise ValueError(f"{_MOVIES} line {number}: {len(fields)} fields instead of 3")
        try:
            snippets.append(Snippet(" ".join(fields[2].split()), float(fields[1])))
        except ValueError:
            raise ValueError(
                f"{_MOVIES} line {number}: rating {fields[1]!r} is not a number"
            ) from None
    return snippets


def split(
    snippets: Sequence[Snippet],
    *,
    seed: int,
    validation: int = 800,
    test: int = 400,
    words: tuple[int, int] = (6, 34),
    prompt_words: int = 2,
) -> Splits:
    """Snippets of `words[0]` to `words[1]` words, as prompt (the first two words) and completion.

    Whole prompts are dealt to the splits, in an order drawn with `seed`: a test prompt never occurs
    in training. Completions begin with a space, so that prompt + completion is the snippet.
    Raises ValueError where there are too few distinct prompts.
    """
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for text, rating in dict.fromkeys((s.text, s.rating) for s in snippets):
        pieces = text.split()
        if words[0] <= len(pieces) <= words[1]:
            prompt = " ".join(pieces[:prompt_words])
            completion = " " + " ".join(pieces[prompt_words:])
            row = {"prompt": prompt, "completion": completion, "rating": rating}
            by_prompt.setdefault(prompt, []).append(row)
    prompts = sorted(by_prompt)
    if len(prompts) <= validation + test:
        raise ValueError(
            f"validation={validation} and test={test} need more than {len(prompts)} prompts"
        )
    random.Random(seed).shuffle(prompts)
    held = [by_prompt[prompt][0] for prompt in prompts[: validation + test]]
    train = [row for prompt in prompts[validation + test :] for row in by_prompt[prompt]]
    random.Random(seed + 1).shuffle(train)
    return Splits(train, held[:validation], held[validation:])
