"""Shared settings of the test suite: hypothesis profiles, seed and threads, missing backends."""

import os
from typing import Any

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which is chosen at import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import cuda_host_backend

import lolkernels as lk
from lolkernels.backends import TABLE

# Taken by name only: it follows the reference, which always fits.
TABLE["cuda_host"] = cuda_host_backend.BACKEND

try:
    from hypothesis import HealthCheck, settings
    from hypothesis.internal.conjecture import providers
except ModuleNotFoundError:  # a machine that only runs the GPU's tests
    pass
else:
    # Hypothesis draws from the constants of whatever local modules are loaded. Which these are
    # depends on the clone's path, on the tests picked and on the worker: see test_generated.py.
    providers._get_local_constants = providers.Constants
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

# Small tensors: a second thread only costs, and far more where the cores are shared. Tests of the
# number of threads set their own. Child processes read the variable.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What a test starts is no worker of pytest-xdist: pytest-benchmark would refuse to measure in one.
for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
    del os.environ[name]

# These caches do not look into a custom op: they would run what an older version of it recorded.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

# No hub look-up can hide behind a library default.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Every test starts from the same random state and one thread, whatever ran before it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def compiled() -> cuda_host_backend.Host:
    """The CUDA kernels on the CPU: see cuda_host_backend."""
    return cuda_host_backend.Host()


@pytest.fixture(params=["first thread first", "last thread first"])
def host(compiled: cuda_host_backend.Host, request: pytest.FixtureRequest) -> Any:
    """With either order of the threads of a block."""
    compiled.order(int(request.param.startswith("last")))
    yield compiled
    compiled.order(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a backend that this machine lacks, with the library's own reason.

    That is every test with a parameter that is the backend's name, and every test marked
    `compiled`. Where a compiler exists the compiled backend may not be missing: see test_install.
    """
    missing = {name: why for name, why in lk.available_backends().items() if why is not None}
    for item in items:
        callspec = getattr(item, "callspec", None)
        wanted = {v for v in callspec.params.values() if isinstance(v, str)} if callspec else set()
        if item.get_closest_marker("compiled"):
            wanted.add("cpu")
        for name in wanted & set(missing):
            item.add_marker(pytest.mark.skip(reason=f"backend {name}: {missing[name]}"))
