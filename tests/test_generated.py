"""Generated cases are the same on every machine, in every worker, whatever else is loaded."""

import importlib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st


def draws() -> list[Any]:
    drawn: list[Any] = []

    @given(st.integers() | st.floats() | st.text())
    def collect(value: Any) -> None:
        drawn.append(repr(value))

    collect()
    return drawn


def test_loaded_modules_do_not_change_what_is_drawn(tmp_path, monkeypatch) -> None:
    before = draws()
    assert len(set(before)) > 50
    lines = [f"A{i} = {i * 7919 + 12345}, {i}.0625, 'word {i}'" for i in range(50)]
    (tmp_path / "some_local_module.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("some_local_module")
    assert draws() == before
