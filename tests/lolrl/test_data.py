"""Rows: what is accepted, and a hundred malformed ones, each named by file, line and field."""

import functools
import json
from typing import Any

import datasets
import pytest

from lolrl.data import MAX_LINE_BYTES, DataError, read_prompts, read_records
from lolrl.files import write_jsonl
from lolrl.tokens import LoLDataset
from tests.lolrl.toys import make_tokenizer

GOOD = {"prompt": "a film ", "completion": "to love", "reward": 0.5}
USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "hello"}
PAIR = {
    "prompt": "a film ",
    "chosen": "to love",
    "rejected": "to hate",
    "reward_chosen": 1,
    "reward_rejected": -1,
}


def row(base: dict[str, Any] = GOOD, **changes: Any) -> dict[str, Any]:
    """A good row with columns changed; ... removes one."""
    return {k: v for k, v in {**base, **changes}.items() if v is not ...}


chat = functools.partial(row, {"prompt": [USER], "completion": [REPLY], "reward": 1.0})
pair = functools.partial(row, PAIR)


# Lines that are no row at all.
LINES = [b"{", b"[1, 2]", b"3", b'"text"', b"null", b"true", b"{'prompt': 'a'}", b"\x00\x01\x02"]
LINES += [b'{"prompt": "a" "completion": "b"}']
LINES += [b'{"prompt": "\xff", "completion": "b", "reward": 1}']
LINES += [b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"]
LINES += [b'{"prompt": "' + b"x" * (10 << 20) + b'"}']
ENDS = [b"1} trailing", b"NaN}", b"Infinity}", b"-Infinity}", b"1,}", b"1" + b"0" * 5000 + b"}"]
LINES += [b'{"prompt": "a", "completion": "b", "reward": ' + end for end in ENDS]


def message(**changes: Any) -> list[dict[str, Any]]:
    return [row(USER, **changes)]


# By the field that must be named: raw lines, or rows.
MALFORMED: dict[str, list[Any]] = {
    "*": LINES,
    "role": [b'{"prompt": [{"role": "user", "role": "x", "content": "a"}]}'],
    "prompt": [
        b'{"prompt": "a", "prompt": "b", "completion": "c", "reward": 1}',
        *(row(prompt=p) for p in (..., None, 3, 1.5, True, {}, USER, [], "\ud800")),
        *({}, {"text": "a"}, {"instruction": "a", "output": "b"}),
        pair(prompt=...),
        pair(prompt=..., chosen=[USER], rejected=[REPLY]),
    ],
    "completion": [
        *(row(completion=c) for c in (..., None, "", " ", "\n\t \n", "\u3000\u2003", 7, False)),
        *(row(completion=c) for c in ({}, [], [REPLY], "\udfff end")),
        *(chat(prompt="hi"), chat(completion="hello"), pair(completion="x")),
    ],
    "completion[0]": [row(completion=["a"])],
    "reward": [
        b'{"prompt": "a", "completion": "c", "reward": 1, "reward": 2}',
        *(row(reward=r) for r in (..., None, "0.5", "good", "", True, [0.5], {"a": 1}, 10**400)),
    ],
    "advantage": [row(advantage=a) for a in ("high", True, [1.0], 10**400)],
    "value": [row(value=v) for v in ("low", [0.1], False)],
    "ref_logps": [row(ref_logps=logps) for logps in (0.5, [], "-1,-2")],
    "ref_logps[0]": [row(ref_logps=logps) for logps in (["-1.0"], [True], [[-1.0]])],
    "ref_logps[1]": [row(ref_logps=logps) for logps in ([-1.0, 0.5], [-1.0, None])],
    "prompt[0]": [chat(prompt=p) for p in (["hi"], [None], [[USER]])],
    "prompt[0].role": [chat(prompt=p) for p in ([{}], *(message(role=r) for r in (..., 1, "")))],
    "prompt[0].content": [chat(prompt=message(content=c)) for c in (..., None, 3, ["hi"])],
    "prompt[1].content": [chat(prompt=[USER, *message(content="\ud800")])],
    "completion[0].content": [chat(completion=message(content=c)) for c in ("", "  ")],
    "completion[1].content": [chat(completion=[REPLY, {"role": "assistant"}])],
    "chosen": [pair(chosen=c) for c in (..., "", 5, [REPLY])],
    "rejected": [pair(rejected=r) for r in (..., None, "  ", [])],
    "reward_chosen": [pair(reward_chosen=r) for r in (..., "1")],
    "reward_rejected": [pair(reward_rejected=None)],
}


def as_line(item: Any) -> bytes:
    return item if isinstance(item, bytes) else json.dumps(item).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("field", MALFORMED)
def test_malformed_rows_are_named(field, tmp_path) -> None:
    """The error names file, line and field, and says what to change; skip counts the row."""
    path = tmp_path / "rows.jsonl"
    for item in MALFORMED[field]:
        shown = as_line(item)[:100]
        path.write_bytes(as_line(GOOD) + b"\n" + as_line(item) + b"\n" + as_line(GOOD) + b"\n")
        with pytest.raises(DataError) as caught:
            read_records(path, require_reward=True)
        error = caught.value
        assert (error.source, error.line, error.field) == (str(path), 2, field), shown
        assert f"{path}, line 2, field {field!r}: " in str(error), shown
        assert len(error.fix) > 8 and str(error).endswith(error.fix), shown
        assert len(str(error)) < 600, shown
        records = read_records(path, require_reward=True, on_bad="skip")
        assert [r.line for r in records] == [1, 3], shown
        assert [(e.line, e.field) for e in records.skipped] == [(2, field)], shown
        if isinstance(item, dict):
            with pytest.raises(DataError) as caught:
                read_records([GOOD, item], require_reward=True)
            error = caught.value
            assert (error.source, error.line, error.field) == ("rows", 2, field), shown


def test_not_finite_numbers_in_memory() -> None:
    for name in ("reward", "advantage", "value"):
        for value in (float("nan"), float("inf"), -float("inf")):
            with pytest.raises(DataError, match="finite") as caught:
                read_records([GOOD, GOOD, row(**{name: value})])
            assert (caught.value.line, caught.value.field) == (3, name)


def test_files_without_rows(tmp_path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"\n  \n")
    with pytest.raises(DataError, match="no usable row"):
        read_records(empty)
    empty.write_bytes(b"{\n[]\n")
    with pytest.raises(DataError, match="2 malformed"):
        read_records(empty, on_bad="skip")
    with pytest.raises(DataError, match="cannot be opened"):
        read_records(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="cannot be opened"):
        read_records(tmp_path)
    for wrong in (3, None, GOOD):
        with pytest.raises(TypeError, match="data is"):
            read_records(wrong)
    with pytest.raises(DataError) as caught:
        read_records([GOOD, "text"])
    assert caught.value.line == 2


def test_a_long_line_costs_no_memory_and_the_next_line_is_read(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    long = b'{"prompt": "' + b"x" * (3 * MAX_LINE_BYTES) + b'"}'
    path.write_bytes(long + b"\n" + as_line(GOOD))
    records = read_records(path, on_bad="skip")
    assert [(r.line, r.prompt) for r in records] == [(2, "a film ")]
    assert "longer than" in str(records.skipped[0])


def test_good_rows_keep_every_value(tmp_path) -> None:
    rows = [
        row(advantage=-1, value=0.25, ref_logps=[-0.5, 0], source="imdb", id=7),
        chat(),
        row(prompt="", completion="x", reward=-3),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n\n".join(as_line(r) for r in rows) + b"\r\n")
    first, second, third = read_records(path)
    assert (first.prompt, first.completion, first.reward) == ("a film ", "to love", 0.5)
    assert (first.advantage, first.value, first.ref_logps) == (-1.0, 0.25, [-0.5, 0.0])
    assert first.columns == {"source": "imdb", "id": 7} and first.line == 1
    assert second.prompt == [USER] and second.completion == [REPLY] and second.line == 3
    assert (third.prompt, third.reward, third.line) == ("", -3.0, 5)
    assert read_records([row(reward=...)])[0].reward is None  # unless it is required


def test_rewards_are_summed_by_weight() -> None:
    rows = [{"prompt": "p", "completion": "c", "helpful": 2, "harmless": -0.5}]
    columns = ("helpful", "harmless")
    assert read_records(rows, reward_columns=columns)[0].reward == 1.5
    weighted = read_records(rows, reward_columns=columns, reward_weights=(0.25, 4))
    assert weighted[0].reward == -1.5
    assert weighted[0].columns == {}
    with pytest.raises(DataError) as caught:
        read_records([{"prompt": "p", "completion": "c", "helpful": 2}], reward_columns=columns)
    assert caught.value.field == "harmless"
    with pytest.raises(ValueError, match="reward_weights"):
        read_records(rows, reward_columns=columns, reward_weights=(1.0,))


def test_pairs_become_two_rows() -> None:
    chosen, rejected = read_records([pair(topic="film", advantage_chosen=0.5)])
    assert (chosen.prompt, chosen.completion, chosen.reward) == ("a film ", "to love", 1.0)
    assert (rejected.prompt, rejected.completion, rejected.reward) == ("a film ", "to hate", -1.0)
    assert chosen.advantage == 0.5 and rejected.advantage is None
    assert chosen.columns["topic"] == rejected.columns["topic"] == "film"


def test_conversational_pair_without_prompt_shares_its_first_messages() -> None:
    system = {"role": "system", "content": "be brief"}
    good, bad = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
    rows = [{"chosen": [system, USER, good], "rejected": [system, USER, bad]}]
    chosen, rejected = read_records(rows)
    assert chosen.prompt == rejected.prompt == [system, USER]
    assert chosen.completion == [good] and rejected.completion == [bad]


def test_a_datasets_dataset_reads_like_a_list() -> None:
    rows = [row(id=i, reward=i / 3, value=None) for i in range(5)]
    rows[3]["value"] = 0.5
    from_dataset = read_records(datasets.Dataset.from_list(rows))
    for a, b in zip(read_records(rows), from_dataset, strict=True):
        for name in ("prompt", "completion", "reward", "value"):
            assert getattr(a, name) == getattr(b, name)
        assert a.columns["id"] == b.columns["id"]


def test_prompts_alone() -> None:
    records = read_prompts([{"prompt": "a", "topic": 1}, {"prompt": [USER], "completion": "x"}])
    assert [r.prompt for r in records] == ["a", [USER]]
    assert records[0].columns == {"topic": 1} and records[1].columns == {"completion": "x"}
    with pytest.raises(DataError) as caught:
        read_prompts([{"prompt": "a"}, {"text": "a"}])
    assert (caught.value.line, caught.value.field) == (2, "prompt")


def test_write_jsonl_round_trip_and_refusal(tmp_path) -> None:
    rows = [row(completion='quote " and \u00e9 and \n newline'), row(reward=-0.1)]
    path = write_jsonl(tmp_path / "out" / "rows.jsonl", rows)
    back = read_records(path)
    assert [r.completion for r in back] == [r["completion"] for r in rows]
    assert [r.reward for r in back] == [r["reward"] for r in rows]
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write_jsonl(path, [row(reward=float("nan"))])
    # The old file is untouched and no temporary one is left.
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


TOKEN_FAULTS = {
    "only padding": ({"completion": "<pad><pad><pad>"}, "completion", "padding"),
    "only end": ({"completion": "<eos>"}, "completion", "padding"),
    "id outside the head": ({"completion": "the end"}, "completion", "rows"),
    "id of the prompt outside": ({"prompt": "the film "}, "prompt", "rows"),
    "ref_logps of other tokens": ({"ref_logps": [-1.0]}, "ref_logps", "completion tokens"),
}


@pytest.mark.parametrize("name", TOKEN_FAULTS)
def test_rows_whose_tokens_cannot_be_trained_on(name, tmp_path) -> None:
    changes, field, problem = TOKEN_FAULTS[name]
    tokenizer = make_tokenizer()
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, row(**changes)])
    options = {}
    if "outside" in name:
        whole = LoLDataset.from_records(read_records([GOOD]), tokenizer)
        options["vocab_size"] = int(whole.ids.max()) + 1
        assert options["vocab_size"] < len(tokenizer)
    records = read_records(path)
    with pytest.raises(DataError, match=problem) as caught:
        LoLDataset.from_records(records, tokenizer, **options)
    assert (caught.value.source, caught.value.line, caught.value.field) == (str(path), 2, field)
    kept = LoLDataset.from_records(records, tokenizer, on_bad="skip", **options)
    assert len(kept) == 1 and [e.line for e in kept.skipped] == [2]


def test_the_largest_id_must_be_below_the_number_of_rows() -> None:
    """transformers#33819: a tokenizer larger than the head."""
    tokenizer = make_tokenizer()
    records = read_records([GOOD])
    largest = int(LoLDataset.from_records(records, tokenizer).ids.max())
    assert len(LoLDataset.from_records(records, tokenizer, vocab_size=largest + 1)) == 1
    with pytest.raises(DataError, match=f"token {largest} "):
        LoLDataset.from_records(records, tokenizer, vocab_size=largest)
