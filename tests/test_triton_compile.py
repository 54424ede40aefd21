"""What Triton's compiler makes of the kernels: no spills, within shared memory, the wanted units.

Nothing runs here and no GPU is needed; the cases stand in triton_cases.py.
"""

import importlib.util

import pytest
import triton_aot

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_cases

CASES = triton_cases.compile_cases()
# Minutes of compiling: the architecture with the most units to get wrong stands for the others.
MARKED = [pytest.param(c, marks=[] if c.arch == 90 else pytest.mark.slow) for c in CASES]
pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[str, triton_aot.Compiled | str]:
    chosen = [
        i.callspec.params["case"]
        for i in request.session.items
        if i.fspath == request.fspath and hasattr(i, "callspec")
    ]
    only = "sm90" if all(case.arch == 90 for case in chosen) else ""
    return triton_aot.run(only)


def test_the_names_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", MARKED, ids=lambda case: case.name)
def test_compiles_to_what_it_should(case, compiled) -> None:
    result = compiled[case.name]
    assert isinstance(result, triton_aot.Compiled), result
    assert result.spill_bytes == 0
    assert result.stack_bytes == 0
    assert result.shared_bytes <= triton_aot.SHARED_LIMIT[case.arch]
    if case.vector_loads:
        assert result.has_opcode("LDG", "128")
    if case.vector_stores:
        assert result.has_opcode("STG", "128")
