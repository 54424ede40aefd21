"""Micro-benchmarks of what starts from logits that are already there; `make bench`."""

from collections.abc import Callable

import pytest
from run import title_of


@pytest.mark.parametrize("name", ["lolkernels", "copy", "eager"])
def test_logprob(name: str, run: Callable[..., None]) -> None:
    run(title_of("logprob"), name, "logprob")
