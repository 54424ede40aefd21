"""Tokens of prompt and completion on four toy tokenizers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lolrl.collate import LoLCollator
from lolrl.data import DataError, Record, read_records
from lolrl.tokens import (
    LoLDataset,
    completion_text,
    encode,
    encode_prompt,
    model_eos_ids,
    prefix_ids,
    prompt_text,
)
from tests.lolrl.toys import CHAT, TOKENIZERS, make_dataset, make_llama, make_rows, make_tokenizer

TEXTS = [
    ("the movie was ", "good and long"),
    ("the movie was", " good and long"),
    ("the mo", "vie was good"),
    ("a", "a"),
    ("x\n", "y\nz"),
    ("été ", "naïve 日本 🎬"),
]


@pytest.mark.parametrize(("prompt", "completion"), TEXTS)
def test_ids_are_those_of_the_whole_text(any_tokenizer, prompt, completion) -> None:
    tokenizer = any_tokenizer
    ids, length = encode(tokenizer, prompt, completion)
    bare = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert ids == bos + bare + [tokenizer.eos_token_id]
    # The boundary is the longest prefix that prompt and whole share.
    alone = bos + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert ids[:length] == alone[:length]
    assert length == len(alone) or ids[length] != alone[length]
    text = tokenizer.decode(ids[len(bos) : -1])
    assert text == prompt + completion


def test_exactly_one_bos_and_one_eos(any_tokenizer) -> None:
    tokenizer = any_tokenizer
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for text in ("good", "good<eos>"):
        ids, _ = encode(tokenizer, "the movie was ", text)
        assert ids.count(eos) == 1 and ids[-1] == eos
        assert ids.count(bos) == (0 if bos is None else 1)
    if bos is not None:
        # A text that carries BOS itself does not get a second one.
        ids, _ = encode(tokenizer, "<bos>the movie was ", "good")
        assert ids == encode(tokenizer, "the movie was ", "good")[0] and ids[0] == bos


def test_prompt_alone_is_how_generation_starts(any_tokenizer) -> None:
    """No EOS behind a prompt, even from a tokenizer that puts one behind every text."""
    ids = encode_prompt(any_tokenizer, "the movie was")
    whole, length = encode(any_tokenizer, "the movie was", " good")
    assert any_tokenizer.eos_token_id not in ids
    assert whole[:length] == ids


def test_pad_equal_to_eos_keeps_the_real_eos_in_the_mask() -> None:
    """trl#1623: a model whose EOS is masked as padding never stops."""
    tokenizer = make_tokenizer(**TOKENIZERS["pad_is_eos"])
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    dataset = make_dataset(tokenizer, 5)
    batch = LoLCollator(tokenizer.pad_token_id)([dataset[i] for i in range(5)])
    for i in range(5):
        scored = batch["input_ids"][i][batch["completion_mask"][i]]
        assert scored[-1] == tokenizer.eos_token_id
        assert (scored == tokenizer.eos_token_id).sum() == 1
        padding = batch["attention_mask"][i] == 0
        assert not bool(batch["completion_mask"][i][padding].any())
        assert len(scored) == int(dataset.completion_lengths[i])


def test_several_eos_ids_end_a_text_already() -> None:
    """trl#7039: a model with three EOS ids."""
    tokenizer = make_tokenizer(**TOKENIZERS["multi_eos"])
    model = make_llama(len(tokenizer))
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("<eos>", "<eot>", "<eom>")]
    model.generation_config.eos_token_id = ends
    assert model_eos_ids(model) == ends
    ids, _ = encode(tokenizer, "the movie ", "was good<eot>", eos_ids=model_eos_ids(model))
    assert ids[-1] == ends[1] and ends[0] not in ids
    ids, _ = encode(tokenizer, "the movie ", "was good", eos_ids=model_eos_ids(model))
    assert ids[-1] == ends[0]


def test_chat_template_writes_the_only_specials(chat_tokenizer) -> None:
    prompt = [{"role": "user", "content": "was it good?"}]
    reply = [{"role": "assistant", "content": "it was"}]
    ids, length = encode(chat_tokenizer, prompt, reply)
    text = "<bos><|user|>was it good?<eos><|assistant|>it was<eos>"
    assert ids == chat_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert chat_tokenizer.decode(ids[length:]) == "it was<eos>"
    assert ids[:length] == encode_prompt(chat_tokenizer, prompt)
    assert ids.count(chat_tokenizer.bos_token_id) == 1


def test_messages_without_template_are_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="chat template"):
        encode(tokenizer, [{"role": "user", "content": "a"}], [{"role": "a", "content": "b"}])
    with pytest.raises(TypeError, match="both"):
        encode(tokenizer, "a", [{"role": "a", "content": "b"}])


def test_template_cannot_run_code(tmp_path, monkeypatch) -> None:
    """A hostile template (server-side template injection) raises and touches nothing."""
    monkeypatch.chdir(tmp_path)
    attack = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}"
    )
    hostile = make_tokenizer(template=attack)
    with pytest.raises(Exception, match=r"unsafe|undefined|no attribute"):
        encode_prompt(hostile, [{"role": "user", "content": "a"}])
    assert not (tmp_path / "CANARY").exists()


def test_prompt_keeps_its_end_and_bos_completion_its_start(any_tokenizer) -> None:
    prompt, completion = "the movie was good and long , nobody laughed", " it moves me slowly"
    ids, length = encode(any_tokenizer, prompt, completion)
    head, tail = ids[:length], ids[length:]
    for limit in range(1, length + 2):
        cut, n = encode(any_tokenizer, prompt, completion, max_prompt_length=limit)
        assert n == min(limit, length) and cut[n:] == tail
        if any_tokenizer.bos_token_id is None:
            assert cut[:n] == head[length - n :]
        else:
            assert cut[:n] == [head[0], *head[length - n + 1 :]]
        assert encode_prompt(any_tokenizer, prompt, max_prompt_length=limit)[0] == cut[0]
    for limit in range(1, len(tail) + 2):
        cut, n = encode(any_tokenizer, prompt, completion, max_completion_length=limit)
        assert cut == head + tail[:limit] and n == length


@settings(max_examples=100)
@given(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
)
def test_any_text_splits_without_loss(prompt: str, completion: str) -> None:
    ids, length = encode(_TOKENIZER, prompt, completion)
    assert 1 <= length < len(ids)
    assert ids[1:-1] == _TOKENIZER(prompt + completion, add_special_tokens=False)["input_ids"]


_TOKENIZER = make_tokenizer()


def test_boundary_inside_a_token_moves_to_the_left() -> None:
    """Where prompt and completion merge into one token, that token belongs to the completion."""
    tokenizer = make_tokenizer()
    the = tokenizer("the", add_special_tokens=False)["input_ids"]
    assert len(the) == 1  # it is one entry of the toy vocabulary
    ids, length = encode(tokenizer, "th", "e")
    assert ids == [tokenizer.bos_token_id, *the, tokenizer.eos_token_id] and length == 1


def test_nothing_before_the_completion_is_an_error() -> None:
    tokenizer = make_tokenizer(**TOKENIZERS["no_bos"])
    for prompt, completion in (("", "good"), ("th", "e")):
        with pytest.raises(DataError, match="nothing predicts") as caught:
            LoLDataset.from_records([Record(prompt, completion, line=4)], tokenizer)
        assert (caught.value.line, caught.value.field) == (4, "prompt")
    with_bos = LoLDataset.from_records([Record("", "good")], make_tokenizer())
    assert int(with_bos.prompt_lengths[0]) == 1


def test_prefix_of_each_tokenizer() -> None:
    assert prefix_ids(make_tokenizer()) == [0]
    assert prefix_ids(make_tokenizer(bos=False)) == []
    assert prefix_ids(make_tokenizer(suffix_eos=True)) == [0]


def test_dataset_columns_and_selection(tokenizer) -> None:
    rows = make_rows(7)
    dataset = LoLDataset.from_records(read_records(rows), tokenizer)
    assert dataset.advantages is None and dataset.ref_logps is None
    assert dataset.rewards.tolist() == [r["reward"] for r in rows]
    for i, row in enumerate(rows):
        ids, length = encode(tokenizer, row["prompt"], row["completion"])
        item = dataset[i]
        assert item["input_ids"].tolist() == ids and item["prompt_length"] == length
        assert item["reward"] == row["reward"] and item["index"] == i
        assert int(dataset.completion_lengths[i]) == len(ids) - length
    logps = [torch.arange(int(n), dtype=torch.float32) for n in dataset.completion_lengths]
    scored = dataset.with_columns(ref_logps=logps, advantages=torch.arange(7.0).double())
    picked = scored.select([5, 2])
    assert picked[0]["advantage"] == 5.0 and picked[1]["reward"] == rows[2]["reward"]
    assert torch.equal(picked[1]["ref_logps"], logps[2])
    assert torch.equal(picked[0]["input_ids"], dataset[5]["input_ids"])
    assert picked.records[0].line == 6
    assert dataset.ref_logps is None
    with pytest.raises(DataError, match="completion tokens"):
        dataset.with_columns(ref_logps=logps[::-1])
    with pytest.raises(ValueError, match="7 rows"):
        dataset.with_columns(rewards=torch.ones(3))
    with pytest.raises(ValueError, match="not a column"):
        dataset.with_columns(ids=torch.ones(3))


def test_texts_of_both_forms() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert prompt_text("x") == "x" and completion_text(messages) == "b"
    assert CHAT.count("add_generation_prompt") == 1
