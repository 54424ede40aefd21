"""linear_row_stats without logits in memory, against float64 and the reference.

Without a GPU the kernels run in Triton's interpreter, as each kind of device would launch them.
Operands are views into NaN-filled buffers, and so are the results and the partials: what is read
but was never written shows.
"""

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from test_backends_rows import BORDER, OPTIONS, SPECIAL, Zoned, same_bits, true_stats, zoned

from lolkernels.backends import reference
from lolkernels.backends import triton_onchip as onchip

if onchip.why_unavailable() is not None:
    pytest.skip(str(onchip.why_unavailable()), allow_module_level=True)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter multiplies bfloat16 wrongly. bfloat16's code there is that of float16.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
# What config is told: the GPU's own capability, or one without and one with descriptors.
MACHINES = [None] if GPU else [(0, 0), (9, 0)]
INF = math.inf


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = new_empty(self, *args, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.fixture(params=MACHINES, ids=str)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param is not None:
        monkeypatch.setattr(onchip, "capability", lambda device: request.param)
    return request.param


def place(values: Tensor, layout: str = "rows") -> Zoned:
    """In a NaN-filled buffer on the device; "aligned": rows that a tensor descriptor accepts."""
    if layout == "aligned":
        n, D = values.shape
        per_16_bytes = 16 // values.element_size()
        wide = torch.full((n, -(-D // per_16_bytes) * per_16_bytes), math.nan, dtype=values.dtype)
        wide[:, :D] = values
        zone = zoned(wide)
        zone = Zoned(zone.view[:, :D], zone.whole)
    else:
        zone = zoned(values, layout)
    whole = zone.whole.to(DEVICE)
    return Zoned(whole.as_strided(zone.view.shape, zone.view.stride(), BORDER), whole)


def problem(n: int, D: int, V: int, dtype: torch.dtype, bias: bool) -> tuple[Any, ...]:
    """Peaky logits; labels at every boundary of the tiles, beside them and outside."""
    h = torch.randn(n, D).to(dtype)
    w = (torch.randn(V, D) * 6 / math.sqrt(D)).to(dtype)
    b = (torch.randn(V) * 2).to(dtype) if bias else None
    edges = torch.tensor([0, V - 1, -1, V, 63, 64, 127, 128, 255, 256, -100, 2**31, 2**62])
    labels = torch.where(torch.rand(n) < 0.5, torch.randint(V, (n,)), edges[torch.arange(n) % 13])
    return h, w, b, labels


def truth(h: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, options: Any) -> Any:
    """The statistics in float64, and how far float32 sums of this size may be from them."""
    x = h.double() @ w.double().T
    size = h.double().abs() @ w.double().abs().T
    if b is not None:
        x, size = x + b.double(), size + b.double().abs()
    factor = options.get("scale", 1.0) / options.get("temperature", 1.0)
    return true_stats(x, labels, **options), 1e-6 + 2.0**-21 * factor * float(size.max())


def check(h: Zoned, w: Zoned, b: Zoned | None, labels: Tensor, options: Any) -> None:
    tensors = (h.view, w.view, None if b is None else b.view)
    plain = {"scale": 1.0, "softcap": 0.0, "temperature": 1.0}
    got = onchip.linear_row_stats(*tensors, labels.to(DEVICE), **(plain | options))
    cpu = (None if t is None else t.cpu() for t in tensors)
    want, atol = truth(*cpu, labels, options)
    for name, mine, right in zip(("target", "lse", "expected", "max"), got, want, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == labels.shape
        torch.testing.assert_close(
            mine.cpu().double(), right, rtol=0, atol=atol, equal_nan=True, msg=name
        )
    largest = got[3] == got[0]
    assert torch.equal(largest.cpu(), want[3] == want[0]), "the maximum is the label's own bits"
    whole = [h, w] + ([] if b is None else [b])
    for zone in whole:
        outside = zone.whole.clone()
        outside.as_strided(zone.view.shape, zone.view.stride(), BORDER).fill_(math.nan)
        assert outside.isnan().all(), "an operand's surroundings were written"


@pytest.mark.parametrize("tiles", [1, onchip.MAX_TILES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 2, 3, 127, 129, 1023, 1025])
def test_matches_float64(
    V: int, dtype: torch.dtype, tiles: int, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every width with every n and D; bias, options and layout go round."""
    monkeypatch.setattr(onchip, "PROGRAMS", 1 if tiles > 1 else 10**9)
    for i, (n, D) in enumerate([(1, 17), (5, 1), (5, 100), (70, 8), (70, 64)]):
        turn = i + V + tiles + dtype.itemsize
        layout = ("aligned", "rows", "padded", "steps", "columns")[turn % 5]
        h, w, b, labels = problem(n, D, V, dtype, bias=turn % 2 == 0)
        bias = None if b is None else place(b, "steps" if turn % 3 else "rows")
        options = OPTIONS[turn % len(OPTIONS)]
        check(place(h, layout), place(w, "aligned"), bias, labels, options)
        check(place(h, "aligned"), place(w, layout), bias, labels, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option_with_every_layout(dtype: torch.dtype, machine: Any) -> None:
    h, w, b, labels = problem(70, 24, 300, dtype, bias=True)
    for layout in ("aligned", "rows", "padded", "steps", "columns"):
        for options in OPTIONS:
            check(place(h, layout), place(w, layout), place(b), labels, options)


def test_descriptors_are_used_where_they_can_be(machine: Any) -> None:
    """What the other tests take for granted: "aligned" operands go through descriptors."""
    h = place(torch.randn(5, 17).half(), "aligned").view
    assert onchip._describable(h)
    for other in (h[:, 1:], h.T, place(torch.randn(5, 17).half()).view, h[:1].expand(5, 17)):
        assert not onchip._describable(other)
    major = onchip.capability(h.device)[0]
    assert onchip.config(5, 17, 9, h.dtype, (major, 0)).tma == (major in (9, 10))
    assert not onchip.config(5, 17, 9, h.dtype, (major, 0), aligned=False).tma


def test_many_row_blocks() -> None:
    """More than one group of row blocks, the last one not full."""
    h, w, b, labels = problem(64 * 17 + 3, 3, 200, torch.float32, bias=True)
    check(place(h), place(w), place(b), labels, {})


def test_no_rows() -> None:
    h, w, _, labels = problem(0, 8, 5, torch.float32, bias=False)
    got = onchip.linear_row_stats(h.to(DEVICE), w.to(DEVICE), None, labels.to(DEVICE))
    assert [t.shape for t in got] == [(0,)] * 4


@pytest.mark.parametrize(("name", "row"), [s[:2] for s in SPECIAL], ids=[s[0] for s in SPECIAL])
@pytest.mark.parametrize("tiles", [1, onchip.MAX_TILES])
def test_special_rows(
    name: str, row: list[float], tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row is the bias of a head of zeros: masks that fill whole tiles, nan and inf."""
    monkeypatch.setattr(onchip, "PROGRAMS", 1 if tiles > 1 else 10**9)
    bias = torch.tensor(row)
    h, w = torch.randn(3, 2), torch.zeros(len(row), 2)
    labels = torch.tensor([0, len(row) - 1, len(row)])
    for options in (OPTIONS[0], OPTIONS[3]):
        got = onchip.linear_row_stats(
            h.to(DEVICE), w.to(DEVICE), bias.to(DEVICE), labels.to(DEVICE), **options
        )
        right = list(reference.row_stats(bias.double().expand(3, -1), labels, **options))
        if name == "+inf and a NaN" and not options:
            right[3] = torch.full_like(right[3], INF)  # where the reference has nan
        for mine, its in zip(got, right, strict=True):
            torch.testing.assert_close(
                mine.cpu().double(), its, rtol=2e-6, atol=2e-6, equal_nan=True
            )


def test_a_spoilt_row_spoils_no_other() -> None:
    h, w, b, labels = problem(6, 16, 200, torch.float32, bias=True)
    clean = onchip.linear_row_stats(*(t.to(DEVICE) for t in (h, w, b, labels)))
    h[1, 3], h[4, 0] = math.nan, INF
    got = onchip.linear_row_stats(*(t.to(DEVICE) for t in (h, w, b, labels)))
    for mine, its in zip(got[1:], clean[1:], strict=True):
        assert mine[1].isnan()
        assert same_bits(mine[[0, 2, 3, 5]], its[[0, 2, 3, 5]])
    assert got[1][4].isnan()


def test_bits_repeat() -> None:
    h, w, b, labels = (t.to(DEVICE) for t in problem(70, 33, 1025, torch.float16, bias=True))
    first, second = (onchip.linear_row_stats(h, w, b, labels) for _ in range(2))
    assert all(same_bits(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("stride", [(2**30 + 8, 1), (1, 2**30 + 8)], ids=["rows", "columns"])
def test_offsets_past_2_to_31(stride: tuple[int, int], machine: Any) -> None:
    """A weight whose elements lie far apart: of its 6 GiB only a few pages are ever touched."""
    h, w, _, labels = problem(3, 4, 4, torch.float16, bias=False)
    big = torch.empty(3 * (2**30 + 8) + 64, dtype=torch.float16, device=DEVICE)
    far = big.as_strided((4, 4), stride)
    far.copy_(w)
    for pair in ((h.to(DEVICE), far), (far, h.to(DEVICE))):
        y = labels[:1].expand(len(pair[0])).to(DEVICE)
        got = onchip.linear_row_stats(*pair, None, y)
        want, atol = truth(pair[0].cpu(), pair[1].cpu(), None, y.cpu(), {})
        for mine, right in zip(got, want, strict=True):
            torch.testing.assert_close(mine.cpu().double(), right, rtol=0, atol=atol)
