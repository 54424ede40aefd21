"""Offline fixtures: toy tokenizers of four kinds and a tiny model (see toys.py)."""

import os
from typing import Any

import pytest
import torch

from lolrl.annotate import annotate
from lolrl.config import AnnotateConfig
from lolrl.tokens import LoLDataset
from tests.lolrl.toys import TOKENIZERS, make_llama, make_rows, make_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", params=list(TOKENIZERS))
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    return make_tokenizer(**TOKENIZERS[request.param])


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> Any:
    return make_tokenizer(**TOKENIZERS["template_bos"])


@pytest.fixture(scope="session")
def rows(tokenizer: Any) -> LoLDataset:
    """27 annotated rows, of which some have a negative advantage; scores by the float64 model."""
    model = make_llama(len(tokenizer), dtype=torch.float64)
    config = AnnotateConfig(keep="all")
    return annotate(model, tokenizer, make_rows(27), config=config, progress=False).dataset


@pytest.fixture
def llama(tokenizer: Any) -> Any:
    return make_llama(len(tokenizer))
