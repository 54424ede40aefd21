"""States without pickle: what goes in comes out, bit for bit, and nothing else can get in."""

import math
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from lolrl.states import load_state, pack, random_state, save_state, set_random_state

PLAIN = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
KEYS = st.text(max_size=4) | st.integers(-5, 5)


@settings(max_examples=100)
@given(
    st.recursive(
        PLAIN,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(KEYS, inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_nested_data_survives(tmp_path_factory: Any, value: Any) -> None:
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    save_state(path, value)
    assert repr(load_state(path)) == repr(value)


def test_tensors_survive_in_every_dtype(tmp_path) -> None:
    value = {
        "state": {
            0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 4)},
            7: {"half": torch.randn(2).bfloat16(), "empty": torch.empty(0, 3)},
        },
        "view": torch.arange(12.0).view(3, 4).t()[1],
        "array": np.arange(624, dtype=np.uint32),
        "bytes": torch.randint(0, 255, (5,), dtype=torch.uint8),
    }
    save_state(tmp_path / "s.safetensors", value)
    back = load_state(tmp_path / "s.safetensors")
    assert list(back["state"]) == [0, 7]
    for a, b in (
        (back["state"][0]["exp_avg"], value["state"][0]["exp_avg"]),
        (back["state"][7]["half"], value["state"][7]["half"]),
        (back["state"][7]["empty"], value["state"][7]["empty"]),
        (back["view"], value["view"]),
        (back["bytes"], value["bytes"]),
    ):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert back["array"].dtype == np.uint32 and np.array_equal(back["array"], value["array"])


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor", "LBFGS", "Adagrad"])
def test_optimizers_go_on_as_if_nothing_happened(name, tmp_path) -> None:
    def setting() -> tuple:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        kw = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {"lr": 0.1}
        optimizer = getattr(torch.optim, name)(layer.parameters(), **kw)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return layer, optimizer, schedule

    def step(layer: Any, optimizer: Any, schedule: Any) -> None:
        def closure() -> Any:
            optimizer.zero_grad()
            loss = layer(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        schedule.step()

    first = setting()
    for _ in range(3):
        step(*first)
    save_state(tmp_path / "o", first[1].state_dict())
    save_state(tmp_path / "s", first[2].state_dict())
    second = setting()
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(load_state(tmp_path / "o"))
    second[2].load_state_dict(load_state(tmp_path / "s"))
    for _ in range(3):
        step(*first)
        step(*second)
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, setting()[0].weight)
    assert first[2].get_last_lr() == second[2].get_last_lr()


def test_random_streams_go_on(tmp_path) -> None:
    random.gauss(0, 1)  # leaves a number in waiting
    np.random.standard_normal()
    save_state(tmp_path / "r", random_state())

    def draw() -> tuple:
        numpy = np.random.standard_normal()
        return random.random(), random.gauss(0, 1), numpy, torch.rand(3).tolist()

    first = draw()
    assert draw() != first
    set_random_state(load_state(tmp_path / "r"))
    assert draw() == first


def test_what_is_not_data_is_refused(tmp_path) -> None:
    for value in (object(), {1, 2}, lambda: 0, Path("x"), 3 + 4j, b"bytes"):
        with pytest.raises(TypeError, match="cannot be stored"):
            pack({"deep": [value]}, {})
    save_state(tmp_path / "v", float("nan"))
    assert math.isnan(load_state(tmp_path / "v"))


def test_other_files_are_refused_and_run_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    class Attack:
        def __reduce__(self) -> Any:
            return (Path.touch, (Path("CANARY"),))

    path = tmp_path / "state.safetensors"
    torch.save({"a": Attack()}, path)
    hostile = [path.read_bytes(), pickle.dumps(Attack()), b"", b"{}"]
    hostile.append(b"\x08" + b"\0" * 7 + b"{}" * 4)
    hostile.append(save({"x": torch.ones(2)}))
    for state in ('{"$code": "1"}', '{"a": 1, "b": 2}', '{"$tensor": "9"}', "[" * 10**5, "x"):
        hostile.append(save({"x": torch.ones(2)}, {"format": "lolrl.state.1", "state": state}))
    for data in hostile:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_state(path)
    assert not (tmp_path / "CANARY").exists()
