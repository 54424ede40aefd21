"""What the micro-benchmarks share: where their modules are, the shape, and the check."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure
import torch
from measure import Entry
from peers import UnavailableError
from shapes import parse_shape

ROUNDS = 5


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lolkernels")
    group.addoption("--shape", default="256,512,16384,64", help="a name, or T,D,V,seq_len")
    group.addoption("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"])


@pytest.fixture
def run(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Times one contestant of an op, in a group of that title; checked first."""

    def timed(title: str, name: str, op: str, **options: Any) -> None:
        shape = parse_shape(request.config.getoption("shape"))
        shape = replace(shape, dtype=request.config.getoption("dtype"))
        benchmark.group = f"{title}, {shape}"
        try:
            c = measure.contestant(Entry(name, name, op, shape, **options), torch.device("cpu"))
            check = c.check()
        except UnavailableError as error:
            pytest.skip(str(error))
        assert not check.faults, check.faults
        benchmark.extra_info |= {"threads": torch.get_num_threads(), "version": c.version}
        benchmark.extra_info |= {"sum_error_nat": check.sum_nat, **check.gradients}
        benchmark.extra_info |= {"work": c.work, "flops": c.flops, "bytes": c.bytes}
        benchmark.pedantic(c.call, setup=c.prepare, rounds=ROUNDS, warmup_rounds=1)

    return timed
