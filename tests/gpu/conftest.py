"""Marks everything here `gpu`; what each test starts from. The device is chosen in on_device.py."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import judges
import pytest
import torch

from lolkernels import deferred
from lolkernels.backends import TABLE

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # for on_device
# on_device is imported where it is used: without its device it skips whoever imports it.


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _clean_device() -> Iterator[None]:
    """fp32 products in fp32; no flag and little memory left to the next test."""
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        deferred._flags.clear()
        if torch.cuda.memory_reserved() > 2**34:
            gc.collect()
            torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run walks as on a GPU, where the gradients of half-precision logits are rounded once
    before the last products: eager's error and one more rounding.
    """
    from on_device import HALF, ON_GPU

    if not ON_GPU:
        monkeypatch.setitem(TABLE, "reference", TABLE["reference"]._replace(panels=False))
    for dtype in HALF:
        monkeypatch.setitem(judges.GRADIENT_TOL, dtype, 2 * judges.GRADIENT_TOL[dtype])


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a dry run values are checked as on a GPU, without waiting."""
    from on_device import ON_GPU

    if not ON_GPU:
        monkeypatch.setattr(deferred, "immediate", lambda device: False)
    yield
    deferred._flags.clear()
