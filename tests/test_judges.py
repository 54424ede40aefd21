"""The judges themselves: what they reject, what they forgive, and that red zones notice."""

import judges
import pytest
import torch
from judges import LAYOUTS, RedZones, eager, fuzz, peaky

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_peaky_problems_have_a_realistic_scale() -> None:
    for std in (1.0, 3.0, 6.0):
        p = peaky(200, 64, 1000, std=std, lift=0.0, bias=True)
        z = p.hidden @ p.weight.T
        assert 0.9 * std <= float(z.std()) <= 1.1 * std
        assert 0.9 <= float(p.bias.std()) <= 1.1
    lifted = eager(peaky(200, 64, 1000, std=2.0, lift=9.0)).logps
    flat = eager(peaky(200, 64, 1000, std=2.0, lift=0.0)).logps
    assert float(lifted.mean()) > float(flat.mean()) + 5
    scaled = eager(peaky(200, 64, 1000, temperature=0.5, logit_scale=0.125)).logps
    assert float((scaled - eager(peaky(200, 64, 1000)).logps).abs().max()) <= 1e-3


def test_fuzz_covers_what_it_names() -> None:
    cases = [fuzz(seed) for seed in range(300)]
    assert {c.hidden.dtype for c in cases} == set(DTYPES)
    assert any(c.hidden.dtype != c.weight.dtype for c in cases)
    assert any(c.bias is None for c in cases) and any(c.bias is not None for c in cases)
    assert {c.softcap for c in cases} == {None, 5.0, 30.0}
    assert len({c.temperature for c in cases}) >= 3 and len({c.logit_scale for c in cases}) >= 3
    sizes = {c.weight.shape[0] for c in cases}
    assert set(judges.VOCABULARIES) <= sizes
    again = fuzz(7)
    assert torch.equal(again.hidden, cases[7].hidden) and torch.equal(again.weight, cases[7].weight)


def test_the_eager_formula_is_torchs() -> None:
    p = peaky(9, 8, 40, bias=True, softcap=4.0, temperature=0.7, logit_scale=1.5)
    z = 4 * torch.tanh(1.5 * (p.hidden @ p.weight.T + p.bias) / 4) / 0.7
    out = eager(p)
    want = torch.distributions.Categorical(logits=z)
    assert torch.allclose(out.logps, want.log_prob(p.labels), atol=1e-6)
    assert torch.allclose(out.entropy, want.entropy(), atol=1e-6)
    assert torch.allclose(out.lse, z.logsumexp(-1)) and torch.allclose(out.max_logit, z.amax(-1))


# --- log-probs ------------------------------------------------------------------------------------


def test_log_probs_are_judged_by_token_by_sequence_and_by_sign() -> None:
    truth = -torch.rand(400, dtype=torch.float64) * 5 - 0.01
    good = truth.float()
    assert judges.logprob_faults(good, truth, [100, 300]) == []
    assert judges.accept_logprobs(good, truth, [100, 300]) == 3
    for wrong, word in (
        (good + 3e-5, "per token"),
        (good + 1e-5, "per sequence"),  # small, but all on one side
        (-good, "> 0"),
        (good.masked_fill(torch.arange(400) == 5, torch.nan), "finite"),
        (good[:-1], "shape"),
    ):
        faults = judges.logprob_faults(wrong, truth, [100, 300][: 2 if len(wrong) == 400 else 1])
        assert any(word in f for f in faults), word
    assert judges.logprob_faults(good[:0], truth[:0]) == []
    assert judges.logprob_faults(truth + 1e-11, truth)  # float64 is held to 1e-12


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_with_a_known_fault_are_rejected(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(64, 32, generator=generator, dtype=torch.float64) * 1e-3
    good = truth.to(dtype)
    assert judges.accept_gradient(good, good, truth) == 3
    step = judges.GRADIENT_TOL[dtype] * float(truth.abs().max())
    one_wrong = good.clone()
    one_wrong[5, 3] += 3 * step
    block = good.clone()
    block[8:16] = block[8:16].roll(1, 0)
    wrongs = {
        "one element": one_wrong,
        "one row block": block,
        "sign": -good,
        "nan": good.masked_fill(torch.eye(64, 32, dtype=torch.bool), torch.nan),
        "one percent": 1.01 * good,
        "shape": good[:-1],
    }
    for name, wrong in wrongs.items():
        assert judges.gradient_faults(wrong, good, truth), name


def test_a_gradient_that_cancels_is_known_to_a_share_of_its_size() -> None:
    truth = torch.full((4, 4), 1e-7, dtype=torch.float64)
    off = torch.full((4, 4), 3e-6)
    assert judges.gradient_faults(off, truth.float(), truth)
    assert judges.gradient_faults(off, truth.float(), truth, size=1.0) == []
    assert judges.gradient_faults(10 * off, truth.float(), truth, size=1.0)
    zero = torch.zeros(4, 4, dtype=torch.float64)
    assert judges.gradient_faults(torch.zeros(4, 4), zero.float(), zero) == []
    assert judges.gradient_faults(torch.full((4, 4), 1e-3), zero.float(), zero, size=1.0)


def test_entries_that_cancel_hide_no_wrong_length() -> None:
    truth = torch.ones(400, 4, dtype=torch.float64)
    sizes = torch.ones(400, 4, dtype=torch.float64)
    sizes[7, 2] = 4e3  # this one's terms cancel
    good, eager = truth.float(), 1.1 * truth
    off = good.clone()
    off[7, 2] += 1e-2
    assert judges.accept_gradient(off, eager, truth, sizes) == 1  # equal rows cannot be rolled
    for wrong in (1.02 * good, 1.0001 * good):
        faults = judges.gradient_faults(wrong, eager, truth, sizes)
        assert any("length along the truth" in f for f in faults)
    assert judges.gradient_faults(1.02 * good, eager, truth, 4e3) == []


def test_gradient_sizes_bound_the_gradients() -> None:
    p = peaky(12, 8, 50, bias=True, temperature=0.7).double()
    upstream = {name: torch.randn(12).double() for name in ("logps", "lse", "entropy")}
    leaves = [t.requires_grad_() for t in (p.hidden, p.weight, p.bias)]
    out = eager(p)._asdict()
    total = sum((out[name] * g).sum() for name, g in upstream.items())
    sizes = judges.gradient_sizes(p, upstream)
    for grad, size in zip(torch.autograd.grad(total, leaves), sizes.values(), strict=True):
        assert 0 < float(grad.abs().max()) <= float(size.max())
        assert bool((grad.abs() <= size).all())


# --- canaries -------------------------------------------------------------------------------------


def test_accept_refuses_a_judge_that_sees_nothing() -> None:
    result = torch.randn(5, 3)
    with pytest.raises(AssertionError, match="accepts a wrong result: zeros"):
        judges.accept(lambda x: [], result)
    with pytest.raises(AssertionError, match=r"accepts a wrong result: 1\.02 x"):
        judges.accept(lambda x: [] if float(x.abs().sum()) > 0 else ["zero"], result)
    with pytest.raises(AssertionError, match="rolled rows"):
        judges.accept(lambda x: [] if abs(float((x - result).sum())) < 1e-3 else ["sum"], result)
    with pytest.raises(AssertionError, match="broken"):
        judges.accept(lambda x: ["broken"], result)


def test_canaries_that_change_nothing_are_left_out() -> None:
    ones = torch.ones(1, 3)
    exact = lambda x: [] if torch.equal(x, ones) else ["differs"]  # noqa: E731
    assert judges.accept(exact, ones) == 2  # one row cannot be rolled
    assert judges.accept(exact, ones, blind=0.5) == 1
    assert judges.accept(lambda x: [], torch.zeros(0, 3)) == 0


# --- red zones ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [*DTYPES, torch.float64, torch.int64, torch.int32, torch.bool], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (6,), (0, 4), (2, 3, 4)])
def test_placed_tensors_are_equal_and_surrounded(shape, layout, dtype) -> None:
    zones = RedZones()
    value = torch.randint(0, 2, shape).to(dtype)
    view = zones.place("x", value, layout)
    assert torch.equal(view, value) and view.shape == value.shape
    storage = torch.empty(0, dtype=dtype).set_(view.untyped_storage())
    assert view.storage_offset() >= RedZones.BORDER
    border = torch.cat([storage[: RedZones.BORDER], storage[-RedZones.BORDER :]])
    if dtype.is_floating_point:
        assert bool(border.isnan().all())
    elif dtype != torch.bool:
        assert bool((border == torch.iinfo(dtype).max).all())
    zones.check()


def test_layouts_differ_in_their_strides() -> None:
    strides = {
        layout: RedZones().place("x", torch.zeros(4, 6), layout).stride() for layout in LAYOUTS
    }
    assert strides == {"plain": (6, 1), "offset": (13, 1), "sliced": (12, 2), "transposed": (1, 4)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stray_write_is_found(layout: str) -> None:
    for where in ("before", "behind", "inside"):
        zones = RedZones()
        view = zones.place("x", torch.zeros(4, 6), layout)
        out = zones.output("y", (4, 6), torch.float32, layout)
        out.fill_(3.0)
        zones.check()
        flat = torch.empty(0).set_(view.untyped_storage())
        flat[{"before": 63, "behind": len(flat) - 64, "inside": view.storage_offset()}[where]] = 1.0
        with pytest.raises(AssertionError, match="x: written outside"):
            zones.check()


def test_a_write_beside_an_output_is_found() -> None:
    zones = RedZones()
    out = zones.output("y", (4, 6), torch.float32, "offset")
    assert bool(out.isnan().all())
    out.fill_(0.0)
    zones.check()
    torch.as_strided(out, (4, 7), out.stride(), out.storage_offset())[2, 6] = 0.0
    with pytest.raises(AssertionError, match="y: written outside"):
        zones.check()


def test_a_read_too_far_meets_nan() -> None:
    x = RedZones().place("x", torch.ones(4, 6))
    too_far = torch.as_strided(x, (4, 7), x.stride(), x.storage_offset())
    assert bool(x.sum(1).isfinite().all()) and bool(too_far[3].sum().isnan())


def test_an_unknown_layout_is_an_error() -> None:
    with pytest.raises(ValueError, match="layout must be one of"):
        RedZones().place("x", torch.ones(2), "diagonal")
