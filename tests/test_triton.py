"""The Triton row functions: strides, overlapping output, every block size, how they are launched.

Accuracy against float64 stands with the other backends' tests. Without a GPU the kernels run in
Triton's interpreter, which cuts a bfloat16 off where the compiled kernels round.
"""

import importlib.util
import math
from typing import Any

import pytest
import torch
from cases import PRINT_PEAK, run_python
from judges import row_stats
from test_backends_rows import true_stats
from torch import Tensor

import lolkernels as lk
from lolkernels.backends import reference, triton

# A bare `triton` parameter skips a test where the backend is missing (conftest).
pytestmark = pytest.mark.parametrize("backend", ["triton"])
FALLS = torch.arange(600.0) % 2 * 70  # every second anchor
CAP: dict[str, float] = {"scale": 0.5, "softcap": 9.0, "temperature": 0.7}


class Rows:
    """Logits with labels (the last one outside) and the vectors that `dlogits_` takes."""

    def __init__(self, n: int, v: int, dtype: torch.dtype = torch.float32) -> None:
        self.logits = (torch.randn(n, v) * 3).to(dtype)
        self.labels = torch.randint(v, (n,))
        self.labels[-1] = v if n > 1 else self.labels[-1]
        self.lse = torch.logsumexp(self.logits.float(), 1)
        self.abc = tuple(torch.randn(3, n))

    def dlogits_(self, x: Tensor | None = None, module: Any = triton, **options: Any) -> Tensor:
        x = self.logits.clone() if x is None else x
        result: Tensor = module.dlogits_(x, self.labels, self.lse, *self.abc, **options)
        return result

    def exps_(self, x: Tensor | None = None, **options: Any) -> list[Tensor]:
        """The six sums and the exponentials; one row stands out of reach of its anchor."""
        x = self.logits.clone() if x is None else x
        out = options.pop("out", None)
        sums = triton.exps_(x, self.labels, self.lse - FALLS[: len(x)], out=out, **options)
        return [*sums, x if out is None else out]

    def exact(self, **options: Any) -> Tensor:
        """The reference's gradient in float64."""
        wide = (t.double() for t in (self.lse, *self.abc))
        return reference.dlogits_(self.logits.double(), self.labels, *wide, **options)


def made(r: Rows, kernel: str, *args: Any, **options: Any) -> list[Tensor]:
    """What the kernel writes stands last."""
    return [r.dlogits_(*args, **options)] if kernel == "dlogits_" else r.exps_(*args, **options)


def equal(got: Any, want: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- strides --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_strides_of_the_input_change_no_bit(dtype: torch.dtype, backend) -> None:
    r = Rows(3, 77, dtype)
    wide = torch.full((8, 400), math.nan, dtype=dtype)
    views = {
        "transposed": wide.view(400, 8)[5:82, 2:5].T,
        "padded": wide[2:5, 9:86],
        "every third column": wide[1:4, 3 : 3 + 3 * 77 : 3],
        "every second row": wide[1:7:2, 100:177],
    }
    sums = triton.sums(r.logits, r.labels)
    grad, exps = r.dlogits_(), r.exps_()
    for name, view in views.items():
        wide.fill_(math.nan)
        view.copy_(r.logits)
        assert equal(triton.sums(view, r.labels), sums), name
        for out in (torch.empty(77, 3, dtype=dtype).T, None):  # the last one overwrites
            assert torch.equal(r.dlogits_(view, out=out), grad), name
            view.copy_(r.logits)
            assert equal(r.exps_(view, out=out), exps), name
        inside = torch.zeros_like(wide, dtype=torch.bool)
        inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        assert bool(wide[~inside].isnan().all()) and not bool(wide[inside].isnan().any())


def test_one_row_of_memory_may_be_many_rows(backend: str) -> None:
    r = Rows(5, 40)
    same = r.logits[:1].expand(5, 40)
    assert equal(triton.sums(same, r.labels), triton.sums(same.clone(), r.labels))
    out = torch.empty(5, 40)
    assert torch.equal(r.dlogits_(same, out=out), r.dlogits_(same.clone()))


# Rows, then columns, by a stride that is an int32 and by one that is not: offsets overflow int32.
# The buffer is never touched in between, and untouched pages are never backed.
FAR_APART = """
import torch
from lolkernels.backends import triton
v = 20
buffer = torch.empty(2**32 + 99, dtype=torch.float16)
layouts = []
for m, stride in ((4, 2**30 + 11), (3, 2**31 + 11)):
    layouts += [((m, v), (stride, 1)), ((v, m), (1, stride))]
for shape, strides in layouts:
    far = torch.as_strided(buffer, shape, strides)
    near = torch.randn(shape).half()
    far.copy_(near)
    n = shape[0]
    labels = torch.arange(n) % shape[1]
    got, want = triton.sums(far, labels), triton.sums(near, labels)
    assert all(torch.equal(a, b) for a, b in zip(got, want)), shape
    vectors = [near.float().logsumexp(1), *torch.randn(3, n)]
    want = triton.dlogits_(near.clone(), labels, *vectors)
    assert torch.equal(triton.dlogits_(far, labels, *vectors, out=torch.empty_like(near)), want)
    assert torch.equal(triton.dlogits_(near, labels, *vectors, out=far), want), shape
    far.copy_(near)
    assert torch.equal(triton.dlogits_(far, labels, *vectors), want), shape
    want = [*triton.exps_(x := near.clone(), labels), x]
    far.copy_(near)
    got = [*triton.exps_(far, labels), far]
    assert all(torch.equal(a, b) for a, b in zip(got, want)), shape
"""


@pytest.mark.skipif(not triton.INTERPRETED, reason="on a GPU that memory would be there")
def test_rows_and_columns_more_than_2_to_the_31_elements_apart(backend: str) -> None:
    peak = run_python(FAR_APART + PRINT_PEAK, TRITON_INTERPRET="1")
    assert int(peak) < 2**30  # the memory was never filled


# --- half-precision numbers over float32 logits -------------------------------------------------


@pytest.mark.parametrize("kernel", ["dlogits_", "exps_"])
@pytest.mark.parametrize("options", [{}, CAP], ids=["plain", "cap"])
@pytest.mark.parametrize("v", [1, 15, 16, 17, 2047, 2048, 2049, 4095, 4096, 4097, 8193])
def test_narrow_numbers_over_their_own_logits(v, options, kernel, backend) -> None:
    """One program a row, from its start; apart, several programs share a row. Bit for bit alike."""
    n, stride, border = 3, -(-v // 16) * 16, 64
    r = Rows(n, v)
    dtype = torch.float16
    if kernel == "exps_":  # in bfloat16, whose range holds e^50; row 0 leaves its reach at the end
        dtype, r.logits[0, -1] = torch.bfloat16, 100.0
    *sums, want = made(r, kernel, out=torch.empty(n, v, dtype=dtype), **options)
    buffer = torch.full((n * stride + 2 * border,), math.nan)
    rows = buffer[border:-border].view(n, stride)
    x = rows[:, :v]
    x.copy_(r.logits)
    before = rows.clone()
    out = x.view(dtype)[:, :v] if v == stride else rows.view(dtype)[:, :v]
    *again, got = made(r, kernel, x, out=out, **options)
    assert got is out and torch.equal(got, want) and equal(again, sums)
    assert float(got.abs().max()) > 0 or v == 1
    assert bool(buffer[:border].isnan().all()) and bool(buffer[-border:].isnan().all())
    # What lies behind the v narrow numbers of a row has not been written.
    tail = [t.view(torch.int16)[:, v:] for t in (rows, before)]
    assert torch.equal(*tail)


def test_bfloat16_gradients_are_within_a_unit_in_the_last_place(backend: str) -> None:
    r = Rows(4, 500)
    wide = r.dlogits_()
    got = r.dlogits_(out=torch.empty(4, 500, dtype=torch.bfloat16)).float()
    assert bool(((got - wide).abs() <= torch.finfo(torch.bfloat16).eps * wide.abs()).all())


# --- block sizes ----------------------------------------------------------------------------------

VOCABULARIES = [*range(1, 40), *(2**k + d for k in range(5, 19) for d in (-1, 0, 1))]
DLOGITS = sorted({(c, *triton.dlogits_block(v, c)) for v in VOCABULARIES for c in (False, True)})


@pytest.mark.parametrize("config", DLOGITS, ids=str)
def test_each_block_alone(config, monkeypatch, backend) -> None:
    cap, block, warps = config
    assert block <= 4096 and 1 <= warps <= 8
    monkeypatch.setattr(triton, "dlogits_block", lambda vocab, cap: (block, warps))
    options = CAP if cap else {}
    for v in (1, block, 2 * block + 3):
        r = Rows(2, v)
        want = r.exact(**options)
        top = float(want.abs().max())
        for out in (None, torch.empty(2, v, dtype=torch.float16)):
            off = float((r.dlogits_(out=out, **options).double() - want).abs().max())
            assert off <= (1e-5 if out is None else 6e-4) * top
        wide = torch.empty(2, v, dtype=torch.float64)
        anchor = r.lse - FALLS[:2]
        exact = reference.exps_(r.logits.double(), r.labels, anchor, out=wide, **options)
        for got, want in zip(r.exps_(**options), (*exact, wide), strict=True):
            torch.testing.assert_close(got.double(), want.double(), rtol=2e-5, atol=1e-5)
        for x in (r.logits, r.logits.half()):
            stats = row_stats(triton, x, r.labels, **options)
            for got, want in zip(stats, true_stats(x, r.labels, **options), strict=True):
                torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, CAP], ids=["plain", "cap"])
def test_few_rows_and_many_rows_give_the_same_bits(monkeypatch, options, backend) -> None:
    """Few rows are shared out among programs by their columns, more than 512 are not."""
    monkeypatch.setattr(triton, "dlogits_block", lambda vocab, cap: (16, 1))
    r = Rows(513, 70)
    whole = r.dlogits_(**options)
    stats = triton.sums(r.logits, r.labels, **options)
    for rows in (slice(0, 1), slice(1, 4), slice(300, 340), slice(512, 513)):
        part = Rows(1, 70)
        part.logits, part.labels, part.lse = r.logits[rows], r.labels[rows], r.lse[rows]
        part.abc = tuple(t[rows] for t in r.abc)
        assert torch.equal(part.dlogits_(**options), whole[rows])
        alone = triton.sums(part.logits, part.labels, **options)
        assert equal(alone, (t[rows] for t in stats))


# --- determinism ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "options"), [(torch.float32, {}), (torch.float16, CAP)])
def test_20_runs_are_bit_equal(dtype: torch.dtype, options: Any, backend: str) -> None:
    r = Rows(2, 5000, dtype)
    cu = torch.tensor([0, 1, 2])

    def run() -> list[Tensor]:
        stats = triton.sums(r.logits, r.labels, **options)
        weight, limits = torch.ones(2), {"ratio": 1, "log_low": -0.5, "log_high": 0.5}
        sequences = triton.sequence_coef(-r.lse, r.abc[0], cu, weight, beta=0.1, **limits)
        return [*stats, r.dlogits_(**options), *r.exps_(**options), *sequences]

    first = run()
    assert all(equal(run(), first) for _ in range(20))


def test_no_rows_and_no_sequences_launch_nothing(monkeypatch, backend) -> None:
    monkeypatch.setattr(triton, "_kernels", None)  # calling it would raise
    none = torch.zeros(0)
    labels = torch.zeros(0, dtype=torch.int64)
    assert all(t.shape == (0,) for t in triton.sums(torch.zeros(0, 9), labels))
    x = torch.zeros(0, 9)
    assert triton.dlogits_(x, labels, none, none, none, none) is x
    assert all(t.shape == (0,) for t in triton.exps_(x, labels))
    limits = {"ratio": 1, "log_low": -0.5, "log_high": 0.5}
    cu = torch.zeros(1, dtype=torch.int64)
    assert all(t.numel() == 0 for t in triton.sequence_coef(none, none, cu, none, **limits))


# --- where it can run -----------------------------------------------------------------------------


def test_without_triton_the_reason_says_what_to_install(monkeypatch, backend) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = triton.why_unavailable.__wrapped__()
    assert reason is not None
    assert "Triton is not installed" in reason and "pip install 'lolkernels[gpu]'" in reason


def test_float64_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=r"does not take torch\.float64"):
        lk.logprob(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2).long(), backend=backend)


NO_GPU = """
import sys
import torch
import lolkernels as lk
from lolkernels.backends import triton
reason = lk.available_backends()["triton"]
assert "no GPU" in reason and "TRITON_INTERPRET=1" in reason, reason
calls = [
    lambda: lk.logprob(torch.zeros(2, 3), torch.zeros(2).long(), backend="triton"),
    lambda: triton.sums(torch.zeros(2, 3), torch.zeros(2).long()),
    lambda: lk.use_backend("triton").__enter__(),
]
for call in calls:
    try:
        call()
    except ValueError as error:
        assert "is not available: torch sees no GPU" in str(error), error
    else:
        raise AssertionError("ran")
assert "triton" not in sys.modules
assert lk.logprob(torch.zeros(2, 3), torch.zeros(2).long()).lse.shape == (2,)
"""


def test_without_a_gpu_it_is_refused_and_triton_is_never_imported(backend: str) -> None:
    run_python(NO_GPU, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
