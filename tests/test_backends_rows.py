"""The row functions of the CPU backends against float64: accuracy, memory safety, determinism.

Every tensor handed to a kernel is a view into a larger NaN-filled buffer (red zones): a read past a
row turns results into NaN, a write past it shows in the border.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from cases import HALF, MODULES, each_module, needs_cpu
from judges import four, row_stats
from torch import Tensor

from lolkernels.backends import cpu
from lolkernels.backends.contract import Exps
from lolkernels.backends.finish import statistics

EXPS = [b for b in MODULES if hasattr(b.values[0], "exps_")]
BORDER = 64
INF = math.inf


class Zoned(NamedTuple):
    view: Tensor
    whole: Tensor  # the buffer around it

    def intact(self) -> bool:
        """Nothing but the view has been written."""
        border = torch.ones_like(self.whole, dtype=torch.bool)
        offset = self.view.storage_offset()
        border.as_strided(self.view.shape, self.view.stride(), offset).fill_(False)
        poison = self.whole[border]
        untouched = poison.isnan() if poison.is_floating_point() else poison == 2**62
        return bool(untouched.all())


def zoned(values: Tensor, layout: str = "rows") -> Zoned:
    """Copies `values` into a poisoned buffer, with the strides that `layout` names."""
    shape = values.shape
    strides = {
        "rows": (shape[-1], 1),
        "padded": (shape[-1] + 7, 1),
        "columns": (1, shape[0] + 3),
        "steps": (3 * shape[-1] + 2, 3),
    }[layout][-values.dim() :]
    strides = strides if values.dim() == 2 else ({"steps": 3}.get(layout, 1),)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    poison = math.nan if values.is_floating_point() else 2**62
    whole = torch.full((max(extent, 0) + 2 * BORDER,), poison, dtype=values.dtype)
    view = whole.as_strided(shape, strides, BORDER)
    view.copy_(values)
    return Zoned(view, whole)


def logit_map(
    x: Tensor, scale: float, softcap: float, temperature: float, bias: Tensor | None = None
) -> Tensor:
    v = (x.double() if bias is None else x.double() + bias.double()) * scale
    return (softcap * torch.tanh(v / softcap) if softcap else v) / temperature


STATS = ("target_logit", "lse", "expected_logit", "max_logit")


def true_stats(x: Tensor, labels: Tensor, **options: Any) -> list[Tensor]:
    z = logit_map(x, **{"scale": 1.0, "softcap": 0.0, "temperature": 1.0, **options})
    lse = z.logsumexp(1)
    p = (z - lse[:, None]).exp()
    inside = (labels >= 0) & (labels < x.shape[1])
    target = z.gather(1, labels.where(inside, 0)[:, None])[:, 0].where(inside, -INF)
    return [target, lse, torch.where(p == 0, 0.0, p * z).sum(1), z.amax(1)]


def true_gradient(
    x: Tensor, labels: Tensor, lse: Tensor, abc: Any, *, terms: bool = False, **options: Any
) -> Tensor:
    """By autograd through the logit map; with `terms`, the terms' absolute values are added up."""
    options = {"scale": 1.0, "softcap": 0.0, "temperature": 1.0, **options}
    leaf = x.double().requires_grad_()
    z = logit_map(leaf, **options)
    p = (z - lse.double()[:, None]).exp()
    a, b, c = ((t.abs() if terms else t).double()[:, None] for t in abc)
    cz = torch.where(p == 0, 0.0, c * (z.abs() if terms else z))
    at_label = torch.arange(x.shape[1]) == labels[:, None]
    (grad,) = torch.autograd.grad(z, leaf, (p * (b + cz) + a * at_label).detach())
    return grad


def close(got: Tensor, want: Tensor, atol: float) -> bool:
    """Equal within atol, with equal infinities and NaNs."""
    return torch.allclose(got.double(), want.double(), rtol=0, atol=atol, equal_nan=True)


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Equal with the signs of zeros; both 1-D."""
    integers = {4: torch.int32, 2: torch.int16}[x.element_size()]
    return torch.equal(x.contiguous().view(integers), y.contiguous().view(integers))


WIDTHS = (1, 2, 3, 15, 16, 17, 127, 129, 1023, 1025, 2047, 2048, 2049, 4097, 32003)
OPTIONS: tuple[dict[str, float], ...] = (
    {},
    {"scale": 0.5, "temperature": 0.7},
    {"softcap": 30.0},
    {"scale": 2.0, "softcap": 15.0, "temperature": 1.3},
)


def draw(choices: Any) -> Any:
    return choices[int(torch.randint(len(choices), ()))]


def with_bias(options: dict[str, Any], backend: Any, v: int, seed: int) -> dict[str, Any]:
    """Every other case has a head's bias, but on a CPU, where it stands in the panels already."""
    if backend is cpu or seed % 2 == 0:
        return options
    generator = torch.Generator().manual_seed(seed)
    return {**options, "bias": torch.randn(v, generator=generator)}


def drawn_logits(n: int, v: int, shifts: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Rows of any spread, with columns of -inf or without, and their labels."""
    std = float(torch.empty(()).uniform_(1, 6))
    raw = torch.randn(n, v) * std + draw(shifts)
    raw = raw.masked_fill(torch.rand(n, v) < draw((0.0, 0.0, 0.5)), -INF)
    labels = torch.randint(v, (n,))
    raw[torch.arange(n), labels] = torch.randn(n) * std
    return raw, labels


def fuzz_case(backend: ModuleType, seed: int) -> None:
    torch.manual_seed(seed)
    n, v, dtype, options = 1 + seed % 5, draw(WIDTHS), draw(HALF), draw(OPTIONS)
    options = with_bias(options, backend, v, seed)
    layout = draw(("rows", "padded", "columns", "steps"))
    raw, labels = drawn_logits(n, v, (0.0, 0.0, -20.0, 20.0))
    x, y = zoned(raw.to(dtype), layout), zoned(labels, layout)
    before = x.view.clone()

    # Eager torch adds up V terms in float32: only its log-probs have to be as good.
    slack = 1 if backend is cpu else 10
    made = statistics(backend.sums(x.view, y.view, **options))
    stats, truth = four(made), true_stats(before, labels, **options)
    for got, want in zip(stats, truth, strict=True):
        assert got.dtype == torch.float32 and got.shape == (n,)
        assert close(got, want, slack * 2e-5)
    assert (made.logps <= 0).all()
    assert (made.logps.double() - (truth[0] - truth[1])).abs().max() <= 2e-5
    assert torch.equal(x.view, before)

    a, b, c = torch.randn(3, n)
    abc = draw(((a, -a, 0 * c), (a, b, c)))
    vectors = [zoned(t, layout) for t in (stats[1], *abc)]
    out_dtype = draw((dtype, torch.float32))
    same = draw((True, False)) and out_dtype == dtype
    fresh = torch.zeros(n, v, dtype=out_dtype)
    out = x if same else zoned(fresh, draw(("rows", "padded", "columns")))
    arguments = [t.view for t in vectors]
    got = backend.dlogits_(x.view, y.view, *arguments, **options, out=None if same else out.view)
    assert got is out.view
    want = true_gradient(before, labels, stats[1], abc, **options)
    bound = slack * 1e-5 * true_gradient(before, labels, stats[1], abc, terms=True, **options)
    if backend is not cpu and options.get("softcap"):
        bound += 1e-2 * bound.max()  # it takes 1 - tanh^2 from the difference
    if out_dtype != torch.float32:
        bound += torch.finfo(out_dtype).eps * want.abs() + torch.finfo(out_dtype).smallest_normal
    assert ((got.double() - want).abs() <= bound + 1e-37).all()
    for zone in (x, y, out, *vectors):
        assert zone.intact()


@each_module
@pytest.mark.parametrize("block", range(4))
def test_row_functions_match_float64(backend: ModuleType, block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        fuzz_case(backend, seed)


def check_exps(
    backend: ModuleType, sums: Exps, e: Tensor, x: Tensor, labels: Tensor, **options: Any
) -> None:
    """The statistics that the sums make, and share E, which is softmax(z) dz/dx off the label."""
    assert all(t.dtype == torch.float32 and t.shape == labels.shape for t in sums)
    got, truth = statistics(sums), true_stats(x, labels, **options)
    slack = 1 if backend is cpu else 10
    for name, ours, want in zip(STATS, four(got), truth, strict=True):
        assert close(ours, want, slack * 2e-5), name
    one, zero = torch.ones(len(x)), torch.zeros(len(x))
    at_label = true_gradient(x, labels, truth[1], (one, zero, zero), **options)
    assert close(got.slope, at_label.sum(1), 1e-5)
    off = torch.arange(x.shape[1]) != labels[:, None]
    z = logit_map(x, **{"scale": 1.0, "softcap": 0.0, "temperature": 1.0, **options})
    rest = torch.where(off, z - truth[1][:, None], -INF).exp().sum(1)
    assert ((got.rest - rest).abs() <= slack * 1e-5 * rest + 1e-30).all()
    likely = rest < 0.5  # elsewhere a log-prob is target_logit - lse
    assert ((got.logps - torch.log1p(-rest)).abs() <= slack * 2e-5 * rest + 1e-30)[likely].all()

    want = true_gradient(x, labels, truth[1], (zero, one, zero), **options) * off
    made = got.share.double()[:, None] * e.double()
    bound = slack * 1e-5 * want.abs() + 1e-30
    if e.dtype != torch.float32:  # a row that was scaled down has been rounded twice
        bound += 2 * torch.finfo(e.dtype).eps * want.abs()
    if e.dtype == torch.float16:
        bound += 2**-23
    if options.get("softcap"):
        bound += slack * 1e-6 * want.abs().amax(1, keepdim=True)
    assert ((made - want).abs() <= bound).all()
    assert bool((e[~off] == 0).all())


def fuzz_exps(backend: ModuleType, seed: int) -> None:
    torch.manual_seed(seed)
    n, v, dtype, out_dtype = 1 + seed % 5, draw(WIDTHS), draw(HALF), draw(HALF)
    options, layout = draw(OPTIONS), draw(("rows", "padded", "columns", "steps"))
    options = with_bias(options, backend, v, seed)
    raw, labels = drawn_logits(n, v, (0.0,))
    labels = labels.where(torch.rand(n) < 0.8, draw((-1, v)))
    labels = labels.where(raw.isfinite().any(1), 0)
    if not options.get("softcap"):  # one row in two stands out of its label's reach, early or late
        far = draw((0, -1)) if v > 1 else 0
        raw[::2, far] += 40.0 + 200.0 * torch.rand(len(raw[::2]))
    x, y = zoned(raw.to(dtype), layout), zoned(labels, layout)
    before = x.view.clone()
    truth = true_stats(before, labels, **options)
    anchor = None
    if draw((True, False)):  # near the maximum, out of reach, or no number
        anchor = truth[3].float() + draw(
            (torch.rand(n) * 10, -torch.rand(n) * 160, torch.tensor([draw((NAN, INF, -INF))] * n))
        )
    a = None if anchor is None else zoned(anchor, layout)
    same = out_dtype == dtype and draw((True, False))
    out = (
        x
        if same
        else zoned(torch.zeros(n, v, dtype=out_dtype), draw(("rows", "padded", "columns")))
    )
    sums = backend.exps_(
        x.view, y.view, None if a is None else a.view, **options, out=None if same else out.view
    )
    check_exps(backend, sums, out.view, before, labels, **options)
    assert same or torch.equal(x.view, before)
    assert all(zone.intact() for zone in (x, y, out, *(() if a is None else (a,))))


@pytest.mark.parametrize("backend", EXPS)
@pytest.mark.parametrize("block", range(4))
def test_exps_match_float64(backend: ModuleType, block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        fuzz_exps(backend, seed)


@pytest.mark.slow
@each_module
@pytest.mark.parametrize("block", range(2, 22))
def test_row_functions_match_float64_exhaustively(backend: ModuleType, block: int) -> None:
    for seed in range(100 * block, 100 * block + 100):
        fuzz_case(backend, seed)
        fuzz_exps(backend, seed)


@needs_cpu
def test_on_a_cpu_the_bias_is_the_callers() -> None:
    x, labels, one = torch.randn(2, 5), torch.zeros(2, dtype=torch.int64), torch.ones(2)
    calls = (cpu.exps_, cpu.sums, lambda *args, **b: cpu.dlogits_(*args, one, one, one, one, **b))
    for call in calls:
        with pytest.raises(RuntimeError, match="bias is for a GPU"):
            call(x, labels, bias=torch.zeros(5))


@needs_cpu
def test_a_wrong_result_is_noticed() -> None:
    def broken(change: Callable[[Tensor], Tensor]) -> ModuleType:
        module = ModuleType("broken")
        module.sums = lambda *args, **kw: Exps(*map(change, cpu.sums(*args, **kw)))
        module.dlogits_ = cpu.dlogits_
        return module

    for change in (torch.zeros_like, lambda t: 1.02 * t, lambda t: t.roll(1)):
        with pytest.raises(AssertionError):
            fuzz_case(broken(change), seed=4)

    def rewriting(change: Callable[[Tensor], Tensor]) -> ModuleType:
        module = ModuleType("rewriting")
        module.sums = cpu.sums
        module.dlogits_ = lambda *args, **kw: (g := cpu.dlogits_(*args, **kw)).copy_(change(g))
        return module

    for change in (torch.zeros_like, lambda t: 1.02 * t, lambda t: t.roll(1, 0)):
        with pytest.raises(AssertionError):
            fuzz_case(rewriting(change), seed=4)


@pytest.mark.parametrize("backend", MODULES[:3])
@pytest.mark.parametrize("v", [50257, 262144])
def test_the_error_does_not_grow_with_the_vocabulary(v: int, backend: ModuleType) -> None:
    for shift in (0.0, 100.0):
        x = torch.randn(4, v) * 3 + shift
        labels = torch.randint(v, (4,))
        sums = backend.sums(x, labels)
        if backend is cpu:  # whose walk makes its statistics in float64
            sums = Exps(*(t.double() for t in sums))
        stats = [t.float().double() for t in four(statistics(sums))]
        truth = true_stats(x, labels)
        ulp = 2.0**-18 if shift else 2.0**-20  # half a unit of a float32 of this size
        ulp *= 1 if backend is cpu else 2
        assert (stats[1] - truth[1]).abs().max() <= ulp
        assert (stats[2] - truth[2]).abs().max() <= 2 * ulp


def exponential(z: Tensor) -> Tensor:
    """exp as the cpu kernel computes it: the gradient for a = c = 0, b = 1, lse = 0."""
    zero, one = torch.zeros(1), torch.ones(1)
    out = torch.empty(1, z.numel())
    return cpu.dlogits_(z[None], torch.tensor([-1]), zero, zero, one, zero, out=out)[0]


@needs_cpu
def test_exp_is_within_one_and_a_half_units_in_the_last_place() -> None:
    z = torch.cat([torch.linspace(-87.3, 88, 2_000_003), -torch.logspace(-8, 0, 100_001)])
    want = z.double().exp()
    unit = torch.ldexp(torch.ones_like(want), torch.frexp(want).exponent - 24)
    assert ((exponential(z).double() - want).abs() / unit).max() <= 1.5
    special = torch.tensor([-INF, -1e30, -88.0, 0.0, -0.0, 89.0, 1e30, math.nan])
    expected = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, INF, INF, math.nan])
    assert torch.equal(exponential(special).nan_to_num(7.0), expected.nan_to_num(7.0))


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_and_written_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x, labels = every[:, None], torch.zeros(2**16, dtype=torch.int64)
    target, number = cpu.sums(x, labels).target_logit, ~every.isnan()
    assert torch.equal(target.isnan(), every.isnan())
    assert same_bits(target[number], every.float()[number])

    # b = value, z = lse = 0: the gradient is the value, rounded to the type of out.
    around = torch.cat([every.float(), torch.randn(2**16) * 3, 10.0 ** torch.linspace(-8, 6, 999)])
    values = torch.cat(
        [around, -around, around.nextafter(torch.tensor(INF)), 1.0009765625 * around]
    )
    zero, n = torch.zeros(len(values)), len(values)
    out = torch.empty(n, 1, dtype=dtype)
    nowhere = torch.full((n,), -1)
    cpu.dlogits_(torch.zeros(n, 1), nowhere, zero, zero, values, -zero, out=out)
    got, want, number = out[:, 0], values.to(dtype), ~values.isnan()
    assert torch.equal(got.isnan(), want.isnan())
    assert same_bits(got[number], want[number])


@pytest.mark.parametrize("backend", EXPS)
@pytest.mark.parametrize("rest", [1e-2, 4e-6, 3e-7, 3e-8])
def test_the_rest_beside_a_confident_label_keeps_its_digits(backend, rest) -> None:
    """And so does the log-prob, which lse - z_y has lost below 6e-8."""
    x = torch.randn(3, 5001) * 2
    labels = torch.tensor([7, 0, 5000])
    x[range(3), labels] = -INF
    x[range(3), labels] = x.logsumexp(1) - math.log(rest)
    z = x.double()
    want = (z - z.logsumexp(1)[:, None]).exp()
    want[range(3), labels] = 0.0
    for dtype in HALF:
        got = statistics(backend.exps_(x, labels, out=torch.empty(x.shape, dtype=dtype)))
        assert ((got.rest / want.sum(1) - 1).abs() <= 1e-5).all()
        assert ((got.logps / torch.log1p(-want.sum(1)) - 1).abs() <= 1e-5).all()


@each_module
def test_labels_at_every_boundary_and_outside(backend: ModuleType) -> None:
    v = 4200
    inside = [0, 1, 15, 16, 2047, 2048, 2049, 4095, 4096, v - 1]
    outside = [v, v + 3, -1, -7, -100, 2**31, 2**31 + 5, -(2**63), 2**63 - 1]
    labels = torch.tensor(inside + outside)
    n = len(labels)
    x = zoned(torch.randn(n, v), "padded")
    stats = row_stats(backend, x.view, labels)
    assert torch.equal(stats[0][: len(inside)], x.view[range(len(inside)), inside])
    assert (stats[0][len(inside) :] == -INF).all()
    one = torch.ones(n)
    for out in (None, zoned(torch.zeros(n, v, dtype=torch.bfloat16), "columns")):
        view = zoned(x.view) if out is None else x
        target = None if out is None else out.view
        grad = backend.dlogits_(view.view, labels, stats[1], one, 0 * one, 0 * one, out=target)
        want = torch.zeros(n, v, dtype=torch.float64)
        p = (stats[0] - stats[1]).double().exp()[: len(inside)]
        # With b = 0 only the label's own column holds anything: a * (1 - p) + a * p = a.
        want[range(len(inside)), inside] = 1.0
        assert p.max() < 1 and close(grad, want, 1e-6)
        assert view.intact() and (out is None or out.intact())
        if not hasattr(backend, "exps_"):
            continue
        e = zoned(x.view.clone()) if out is None else out
        sums = backend.exps_(x.view if out is not None else e.view, labels, out=e.view)
        check_exps(backend, sums, e.view, x.view, labels)
        assert (sums.slope == want.new_tensor([1.0] * len(inside) + [0.0] * len(outside))).all()
        assert e.intact()


NAN = math.nan
MASKED = [-INF] * 5000
EITHER = object()  # +inf or NaN: Triton's maximum skips NaN
# name, row of logits, (lse, expected_logit, max_logit)
SPECIAL: list[tuple[str, list[float], tuple[Any, Any, Any]]] = [
    ("one class", [3.5], (3.5, 3.5, 3.5)),
    ("all masked", MASKED, (-INF, NAN, -INF)),
    ("one class, masked", [-INF], (-INF, NAN, -INF)),
    ("first tiles masked", [*MASKED, 1.0, 1.0], (1 + math.log(2), 1.0, 1.0)),
    ("last tiles masked", [1.0, 1.0, *MASKED], (1 + math.log(2), 1.0, 1.0)),
    ("only the middle", [*MASKED, -700.0, *MASKED], (-700.0, -700.0, -700.0)),
    ("rising tiles", [-1e4, *MASKED, 0.0, *MASKED, 1e4], (1e4, 1e4, 1e4)),
    ("falling tiles", [1e4, *MASKED, 0.0, *MASKED, -1e4], (1e4, 1e4, 1e4)),
    ("all negative", [-1e30, -1e30], (-1e30, -1e30, -1e30)),
    ("huge", [3e38, -3e38], (3e38, 3e38, 3e38)),
    ("zeros", [0.0, -0.0, 0.0, 0.0], (math.log(4), 0.0, 0.0)),
    ("a NaN", [1.0, NAN, 2.0], (NAN, NAN, NAN)),
    ("a NaN among masked", [*MASKED, NAN, *MASKED], (NAN, NAN, NAN)),
    ("a NaN in the first tile", [NAN, *MASKED, 3.0], (NAN, NAN, NAN)),
    ("a NaN in the last tile", [3.0, *MASKED, NAN], (NAN, NAN, NAN)),
    ("+inf", [1.0, INF, 2.0], (NAN, NAN, INF)),
    ("+inf among masked", [*MASKED, INF, *MASKED], (NAN, NAN, INF)),
    ("two +inf", [INF, 1.0, INF], (NAN, NAN, INF)),
    ("+inf and a NaN", [INF, *MASKED, NAN, 1.0], (NAN, NAN, EITHER)),
]


def judge_special(name: str, row: list[float], want: Any, stats: Any, alone: list[Tensor]) -> None:
    """Three rows of statistics: the special one, between two that must not feel it."""
    first = torch.tensor(row[0])
    assert torch.equal(stats[0][1].nan_to_num(7.0), first.nan_to_num(7.0))
    for got, expected in zip(stats[1:], want, strict=True):
        if expected is EITHER:
            assert float(got[1]) == INF or bool(got[1].isnan())
            continue
        torch.testing.assert_close(
            float(got[1]), expected, rtol=1e-6, atol=1e-6, equal_nan=True, msg=name
        )
    for got, expected in zip(stats, alone, strict=True):
        assert close(got[::2], expected, 2e-5)


@each_module
@pytest.mark.parametrize(("name", "row", "want"), SPECIAL, ids=[s[0] for s in SPECIAL])
@pytest.mark.parametrize("layout", ["rows", "steps"])
def test_special_rows(name, row, want, layout, backend) -> None:
    ordinary = torch.randn(len(row))
    x = zoned(torch.stack([ordinary, torch.tensor(row), ordinary]), layout)
    labels = torch.tensor([0, 0, len(row) - 1])
    alone = true_stats(x.view[::2], labels[::2])
    judge_special(name, row, want, row_stats(backend, x.view, labels), alone)
    if not hasattr(backend, "exps_"):
        return
    low = x.view.nan_to_num(-3e38, -3e38, -3e38).amax(1) - 60.0
    for anchor, dtype in ((None, torch.float32), (low, torch.float32), (low, torch.float16)):
        made = zoned(x.view.clone(), layout)
        out = made.view if dtype == torch.float32 else torch.empty(x.view.shape, dtype=dtype)
        sums = backend.exps_(made.view, labels, anchor, out=out)
        got = statistics(sums)
        stats = four(got)
        judge_special(name, row, want, stats, alone)
        rows = [0, 1, 2] if abs(want[0]) < 1e5 else [0, 2]
        parts = Exps(*(t[rows] for t in sums))
        check_exps(backend, parts, out[rows], x.view[rows], labels[rows])
        assert made.intact()
