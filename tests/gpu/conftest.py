"""Marks everything here `gpu` and skips it where its device is missing."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # for on_device

from on_device import DEVICE, HALF, ON_GPU  # noqa: E402

from lolkernels import deferred, testing  # noqa: E402
from lolkernels.backends import reference  # noqa: E402


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if ON_GPU and not torch.cuda.is_available():
                item.add_marker(missing)


@pytest.fixture(autouse=True)
def _clean_device() -> Iterator[None]:
    """fp32 products in fp32; no flag and no memory left to the next test."""
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    if ON_GPU:
        torch.cuda.synchronize()
        deferred._flags.clear()
        gc.collect()
        if torch.cuda.memory_reserved() > 2**33:
            torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run walks as on a GPU, where the gradients of half-precision logits are rounded once
    before the last products: eager's error and one more rounding.
    """
    if not ON_GPU:
        monkeypatch.setattr(reference, "WHOLE_ROWS", True)
    for dtype in HALF:
        monkeypatch.setitem(testing.GRADIENT_TOL, dtype, 2 * testing.GRADIENT_TOL[dtype])


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a CPU, a dry run: values are checked as on a GPU, without waiting."""
    if not ON_GPU:
        monkeypatch.setattr(deferred, "immediate", lambda device: False)
    yield
    deferred._flags.clear()


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A context in which whatever waits for the device raises."""
    yield _Unsynchronized()


class _Unsynchronized:
    def __enter__(self) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: object) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
