"""Shared settings of the test suite: hypothesis profiles and a fixed seed per test."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Derandomized everywhere: a red test stays red for the next person who runs it.
settings.register_profile(
    "default",
    derandomize=True,
    max_examples=200,
    deadline=None,  # wall-clock deadlines are noise on shared cores
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("exhaustive", settings.get_profile("default"), max_examples=5000)
settings.load_profile("default")

# No hub look-up can hide behind a library default.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Every test starts from the same global random state, whatever ran before it."""
    torch.manual_seed(0)
