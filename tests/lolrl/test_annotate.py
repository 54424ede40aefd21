"""Annotation: the reference's log-probs, advantages, and a cache that is never stale."""

import copy
import json
import operator
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from tokenizers import Tokenizer

from lolrl import cache
from lolrl.annotate import annotate, call_reward_funcs, score_logps
from lolrl.cache import StaleCacheError
from lolrl.config import AnnotateConfig, ValueConfig
from lolrl.data import DataError, read_records
from lolrl.tokens import LoLDataset
from lolrl.value import ValueHead, predict_values
from tests.lolrl.toys import CHAT, make_dataset, make_llama, make_rows, make_tokenizer, row_logps


def eager_logps(model: Any, item: dict[str, Any]) -> torch.Tensor:
    """log-softmax of the model's own logits, one row alone, float64."""
    with torch.no_grad():
        return row_logps(copy.deepcopy(model).double(), item)


def head_of(seed: int = 0, **kw: Any) -> ValueHead:
    torch.manual_seed(seed)
    config = ValueConfig(**{"num_heads": 4, "min_value": -0.5, "max_value": 0.5, **kw})
    return ValueHead(32, config).eval()


def test_logps_are_those_of_the_model(llama, tokenizer) -> None:
    dataset = make_dataset(tokenizer, 12)
    llama.train()
    scored = score_logps(llama, dataset, pad_token_id=2, batch_size=5)
    assert llama.training
    plain = make_llama(len(tokenizer)).eval()
    for i, mine in enumerate(scored):
        theirs = eager_logps(plain, dataset[i])
        assert mine.dtype == torch.float32 and mine.shape == theirs.shape
        assert (mine.double() - theirs).abs().max() <= 2e-5
        assert (mine.double() - theirs).sum().abs() <= 1e-4 and bool((mine <= 0).all())


def test_autocast_scores_as_mixed_precision_does(llama, tokenizer) -> None:
    dataset = make_dataset(tokenizer, 4)
    exact = torch.cat(score_logps(llama, dataset, pad_token_id=2))
    mixed = torch.cat(score_logps(llama, dataset, pad_token_id=2, autocast="bf16"))
    assert mixed.dtype == torch.float32
    assert 1e-4 < float((mixed - exact).abs().max()) < 0.2


def test_temperature_divides_the_logits(llama, tokenizer) -> None:
    dataset = make_dataset(tokenizer, 3)
    hot = score_logps(llama, dataset, pad_token_id=2, temperature=2.0)
    with torch.no_grad():
        llama.eval().lm_head.weight.div_(2.0)  # and with it the embedding, which is put back
        llama.model.embed_tokens.weight = torch.nn.Parameter(llama.lm_head.weight * 2.0)
    assert (hot[1] - eager_logps(llama, dataset[1])).abs().max() < 2e-5


def test_advantage_is_reward_minus_value(llama, tokenizer) -> None:
    rows = make_rows(20)
    result = annotate(llama, tokenizer, rows, config=AnnotateConfig(keep="all"), progress=False)
    expected = [r["reward"] - r["value"] for r in rows]
    assert result.dataset.advantages.tolist() == expected
    assert result.report["cache"] == "off" and result.report["share_kept"] == 1.0
    kept = annotate(llama, tokenizer, rows, progress=False)
    positive = [i for i, a in enumerate(expected) if a > 0]
    assert 0 < len(positive) < 20
    assert [r.line - 1 for r in kept.dataset.records] == positive
    assert kept.report["share_kept"] == len(positive) / 20 and kept.report["num_rows"] == 20
    assert kept.report["advantage_mean"] == pytest.approx(sum(expected) / 20)
    # The kept rows keep their own tokens' scores.
    for place, row in enumerate(positive):
        assert torch.equal(kept.dataset.ref_logps[place], result.dataset.ref_logps[row])


def test_values_come_from_the_head_and_advantages_of_the_data_win(llama, tokenizer) -> None:
    rows = [{k: v for k, v in r.items() if k != "value"} for r in make_rows(10)]
    head, config = head_of(), AnnotateConfig(keep="all")
    result = annotate(llama, tokenizer, rows, value_head=head, config=config, progress=False)
    values = predict_values(head, llama, tokenizer, [r["prompt"] for r in rows], batch_size=16)
    assert torch.equal(result.dataset.values, values)
    assert torch.equal(result.dataset.advantages, result.dataset.rewards - values)
    rows = [{**r, "advantage": i / 4 - 0.5} for i, r in enumerate(rows)]
    result = annotate(llama, tokenizer, rows, value_head=head, config=config, progress=False)
    assert result.dataset.advantages.tolist() == [i / 4 - 0.5 for i in range(10)]


@pytest.mark.parametrize("column", ["value", "advantage"])
def test_a_column_that_some_rows_lack_is_an_error(llama, tokenizer, column) -> None:
    """Those of the others would be replaced by the value head's without a word."""
    rows = [{**r, "advantage": 0.5, "value": 0.1} for r in make_rows(6)]
    del rows[3][column]
    with pytest.raises(DataError, match=f"'{column}': is missing, but other rows") as caught:
        annotate(llama, tokenizer, rows, value_head=head_of(), progress=False)
    assert caught.value.line == 4


def test_reward_functions_fill_in(llama, tokenizer) -> None:
    rows = [{**row, "topic": i} for i, row in enumerate(make_rows(6))]
    for i in (1, 4):
        del rows[i]["reward"]
    calls = []

    def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        calls.append((prompts, columns))
        return [float(len(c)) for c in completions]

    options: dict[str, Any] = {"config": AnnotateConfig(keep="all"), "progress": False}
    result = annotate(llama, tokenizer, rows, reward_funcs=length, **options)
    expected = [r.get("reward", float(len(r["completion"]))) for r in rows]
    assert result.dataset.rewards.tolist() == expected
    assert calls == [([rows[1]["prompt"], rows[4]["prompt"]], {"topic": [1, 4]})]
    with pytest.raises(DataError) as caught:
        annotate(llama, tokenizer, rows, **options)
    assert (caught.value.line, caught.value.field) == (2, "reward")


def test_call_reward_funcs() -> None:
    def one(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(len(p) + len(c)) for p, c in zip(prompts, completions, strict=True)]

    def two(prompts: list[str], completions: list[str], **columns: Any) -> torch.Tensor:
        return torch.tensor(columns["bonus"])

    args = (["a", "bb"], ["c", "d"])
    assert call_reward_funcs(one, *args) == [2.0, 3.0]
    both = call_reward_funcs([one, two], *args, weights=[0.5, -2], columns={"bonus": [1.0, 0.25]})
    assert both == [-1.0, 1.0]
    refused: list[tuple[Any, list[float] | None, type[Exception], str]] = [
        ([one], [1, 2], ValueError, "reward_func_weights"),
        (lambda p, c, **k: [1.0], None, ValueError, "returned 1 values for 2"),
        (lambda p, c, **k: [1.0, float("nan")], None, ValueError, "completion 1"),
        (lambda p, c, **k: [1.0, "good"], None, TypeError, "return a float"),
        (["vader"], None, TypeError, "not callable"),
    ]
    for functions, weights, error, message in refused:
        with pytest.raises(error, match=message):
            call_reward_funcs(functions, *args, weights=weights)


def test_a_reference_with_nan_is_named_by_row(llama, tokenizer) -> None:
    dataset = make_dataset(tokenizer, 4)
    with torch.no_grad():
        llama.lm_head.weight[int(dataset[2]["input_ids"][-2])] = float("nan")
    with pytest.raises(DataError, match="log-prob nan under the reference") as caught:
        annotate(llama, tokenizer, make_rows(4), progress=False)
    assert (caught.value.line, caught.value.field) == (1, "completion")


# --- the cache: what makes it stale and what does not ---


class World:
    """Everything `annotate` is called with, so that a test can change one thing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = [{k: v for k, v in r.items() if k != "value"} for r in make_rows(8)]
        del self.rows[0]["reward"]
        self.tokenizer = make_tokenizer(extra=("<|user|>", "<|assistant|>"), template=CHAT)
        self.model = make_llama(len(self.tokenizer))
        self.head: ValueHead | None = head_of()
        self.reward_funcs: Any = [first_reward]
        self.config: dict[str, Any] = {"keep": "all", "max_prompt_length": 64}

    def run(self, **kw: Any) -> Any:
        return annotate(
            self.model,
            self.tokenizer,
            self.rows,
            value_head=self.head,
            reward_funcs=self.reward_funcs,
            config=AnnotateConfig(**{**self.config, "cache_dir": str(self.folder), **kw}),
            progress=False,
        )


def first_reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [1.0 for _ in completions]


def second_reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [2.0 for _ in completions]


class Judge:
    """A reward with weights of its own: they enter the key through `cache_key`."""

    def __init__(self, version: str) -> None:
        self.cache_key = f"judge:{version}"


def _config(**changes: Any) -> Any:
    return lambda w: w.config.update(changes)


def _every_row(**changes: Any) -> Any:
    def change(w: World) -> None:
        for row in w.rows:
            row.update(changes)

    return change


def _row(index: int, **changes: Any) -> Any:
    return lambda w: w.rows[index].update(changes)


def _nudge(find: Any) -> Any:
    """Adds 1e-6 to one parameter."""

    def change(w: World) -> None:
        with torch.no_grad():
            find(w).view(-1)[5 % find(w).numel()] += 1e-6

    return change


def _set(target: str, name: str, value: Any) -> Any:
    return lambda w: setattr(operator.attrgetter(target)(w) if target else w, name, value)


def _tokenizer(**kw: Any) -> Any:
    defaults = {"extra": ("<|user|>", "<|assistant|>"), "template": CHAT}
    return lambda w: setattr(w, "tokenizer", make_tokenizer(**{**defaults, **kw}))


def _vocabulary(w: World) -> None:
    core = json.loads(w.tokenizer.backend_tokenizer.to_str())
    core["model"]["merges"] = core["model"]["merges"][:-1]
    w.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(core))


def _topics(w: World) -> None:
    for i, row in enumerate(w.rows):
        row["topic"] = i


# What changes, and the fields of the key that must say so.
CHANGES: dict[str, tuple[Any, str]] = {
    "one character of a completion": (_row(3, completion="goods 3"), "rows tokens"),
    "one character of a prompt": (_row(3, prompt="nobody lauGhe "), "rows tokens"),
    "a reward": (_row(2, reward=0.123), "rows"),
    "a value of the data": (_every_row(value=0.1), "rows"),
    "an advantage of the data": (_every_row(advantage=0.1), "rows"),
    "a column the reward function reads": (_topics, "columns"),
    "the order of rows": (lambda w: w.rows.reverse(), "rows tokens"),
    "a row less": (lambda w: w.rows.pop(), "rows tokens num_rows"),
    "a row twice": (lambda w: w.rows.append(w.rows[-1]), "rows tokens num_rows"),
    "max_prompt_length that cuts": (_config(max_prompt_length=4), "tokens max_prompt_length"),
    "max_prompt_length that does not": (_config(max_prompt_length=65), "max_prompt_length"),
    "max_completion_length": (_config(max_completion_length=3), "tokens max_completion_length"),
    "temperature": (_config(temperature=1.25), "temperature"),
    "mixed precision": (_config(autocast="bf16"), "autocast"),
    "backend": (_config(backend="reference"), "backend"),
    "reward weights": (_config(reward_weights=[0.5]), "rows reward_weights"),
    "weight of the reward function": (_config(reward_func_weights=[2.0]), "reward_func_weights"),
    "reward columns": (_config(reward_columns=["score"]), "rows reward_columns"),
    "reward function": (lambda w: w.reward_funcs.__setitem__(0, second_reward), "reward_funcs"),
    "a further reward function": (lambda w: w.reward_funcs.append(second_reward), "reward_funcs"),
    "no value head": (_set("", "head", None), "value_head value_config"),
    "a weight of the value head": (_nudge(lambda w: w.head.linear.bias), "value_head"),
    "range of the value head": (
        lambda w: setattr(w, "head", head_of(max_value=0.75)),
        "value_config",
    ),
    "a weight of the reference": (_nudge(lambda w: w.model.model.norm.weight), "weights"),
    "dtype of the reference": (lambda w: w.model.bfloat16(), "weights dtype"),
    "attention": (lambda w: w.model.set_attn_implementation("eager"), "attention"),
    "configuration of the model": (_set("model.config", "rms_norm_eps", 1e-5), "model_config"),
    "chat template": (_tokenizer(template=CHAT + " "), "chat_template"),
    "padding token": (_tokenizer(pad="<eos>"), "special_tokens"),
    "BOS": (_tokenizer(bos=False), "tokenizer special_tokens tokens"),
    "a merge of the tokenizer": (_vocabulary, "tokenizer"),
    "kernel version": (None, "lolkernels"),
}

IRRELEVANT: dict[str, Any] = {
    "batch size": _config(batch_size=3),
    "memory budget": _config(memory_budget=1 << 20),
    "which rows are returned": _config(keep="positive"),
    "mode of the model": lambda w: w.model.train(),
    "an equal model": lambda w: setattr(w, "model", make_llama(len(w.tokenizer))),
    "name of the model": _set("model.config", "_name_or_path", "elsewhere"),
    "an equal tokenizer": _tokenizer(),
    "generation settings": _set("model.config", "use_cache", False),
}


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path / "cache")
    assert world.run().report["cache"] == "built"
    return world


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_makes_the_cache_stale(name, world, monkeypatch) -> None:
    """It is refused, with the field named; rebuilding gives what a cold run gives."""
    change, named = CHANGES[name]
    fields = set(named.split())
    if change is None:
        monkeypatch.setattr("lolkernels.__version__", "999")
    else:
        change(world)
    with pytest.raises(StaleCacheError) as caught:
        world.run()
    assert fields <= set(caught.value.fields), caught.value.fields
    assert set(caught.value.fields) <= fields | {"rows", "tokens", "columns"}
    assert all(field in str(caught.value) for field in fields)
    rebuilt = world.run(stale_cache="rebuild")
    assert rebuilt.report["cache"] == "built"
    cold = world.run(cache_dir=str(world.folder.parent / "cold"))
    assert torch.equal(torch.cat(rebuilt.dataset.ref_logps), torch.cat(cold.dataset.ref_logps))
    assert world.run().report["cache"] == "hit"


def test_what_does_not_matter_is_a_hit(world) -> None:
    key = world.run().report["key"]
    for name, change in IRRELEVANT.items():
        change(world)
        after = world.run()
        assert after.report["cache"] == "hit" and after.report["key"] == key, name


def test_cached_equals_online_bit_for_bit(world) -> None:
    online = world.run(cache_dir=None)
    cached = world.run()
    assert (online.report["cache"], cached.report["cache"]) == ("off", "hit")
    for name in ("rewards", "values", "advantages"):
        assert torch.equal(getattr(online.dataset, name), getattr(cached.dataset, name))
    assert all(
        torch.equal(a, b)
        for a, b in zip(online.dataset.ref_logps, cached.dataset.ref_logps, strict=True)
    )


def test_key_is_in_both_files_and_every_field_counts(world) -> None:
    manifest = json.loads((world.folder / cache.MANIFEST).read_text())
    assert len(manifest["key"]) >= 20
    assert manifest["key_sha256"] == cache.key_hash(manifest["key"])
    assert manifest["bytes"] == (world.folder / cache.ARRAYS).stat().st_size
    with safetensors.safe_open(world.folder / cache.ARRAYS, framework="pt") as file:
        assert json.loads(file.metadata()["key"]) == manifest["key"]
    for field in manifest["key"]:
        other = {**manifest["key"], field: "something else"}
        assert cache.stale_fields(manifest["key"], other) == [field]
        assert cache.key_hash(other) != manifest["key_sha256"]
    shorter = {k: v for k, v in manifest["key"].items() if k != "dtype"}
    assert cache.stale_fields(manifest["key"], shorter) == ["dtype"]


def test_torn_flipped_and_hostile_files_are_found(world, tmp_path, monkeypatch) -> None:
    """50 truncations and 50 bit flips of each file: none is loaded, and nothing hostile runs."""
    monkeypatch.chdir(tmp_path)

    class Attack:
        def __reduce__(self) -> Any:
            return (Path.touch, (Path("CANARY"),))

    for name in (cache.ARRAYS, cache.MANIFEST):
        path = world.folder / name
        data = path.read_bytes()
        for k in range(50):
            path.write_bytes(data[: k * len(data) // 50])
            with pytest.raises(StaleCacheError, match="damaged"):
                world.run()
            place = (k * 977) % len(data)
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(StaleCacheError):
                world.run()
        path.write_bytes(pickle.dumps(Attack()))
        with pytest.raises(StaleCacheError):
            world.run()
        path.write_bytes(data)
    assert not (tmp_path / "CANARY").exists()
    assert world.run().report["cache"] == "hit"


def test_a_cache_that_is_not_whole_is_damaged_or_absent(world) -> None:
    arrays = world.folder / cache.ARRAYS
    arrays.write_bytes(arrays.read_bytes()[:-1])
    for damage in (lambda: None, arrays.unlink):
        damage()
        with pytest.raises(StaleCacheError, match="damaged"):
            world.run()
    assert world.run(stale_cache="rebuild").report["cache"] == "built"
    # A run that is killed between the two files leaves no cache, not a wrong one.
    (world.folder / cache.MANIFEST).unlink()
    assert world.run().report["cache"] == "built"


def test_identity_of_reward_functions() -> None:
    assert cache.function_key(first_reward) != cache.function_key(second_reward)
    assert cache.function_key(first_reward).startswith("tests.lolrl.test_annotate.first_reward:")
    assert cache.function_key(Judge("a")) == "judge:a" != cache.function_key(Judge("b"))
    one, two = (lambda p, c, **k: [0.0]), (lambda p, c, **k: [1.0])
    assert isinstance(cache.function_key(one), str) and isinstance(cache.function_key(two), str)


def test_rows_keep_their_scores_under_shuffling(llama, tokenizer) -> None:
    records = read_records(make_rows(11))
    dataset = LoLDataset.from_records(records, tokenizer)
    order = [7, 2, 9, 0, 10, 4, 1, 8, 3, 6, 5]
    shuffled = LoLDataset.from_records([records[i] for i in order], tokenizer)
    a = score_logps(llama, dataset, pad_token_id=2, batch_size=4)
    b = score_logps(llama, shuffled, pad_token_id=2, batch_size=4)
    for place, row in enumerate(order):
        assert (a[row] - b[place]).abs().max() < 1e-5
