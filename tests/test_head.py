"""``fuse_lm_head`` on tiny random models: what it computes, refuses, leaves alone and undoes."""

import copy
import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_lms import (
    COMMON,
    CONFIGURATIONS,
    NO_LEFT_PADDING,
    TOKENS,
    VOCAB,
    batch,
    build,
    compare_gradients,
    one_rank,
    own_logps,
    transformers,
)
from torch import Tensor, nn

import lolkernels as lk
from lolkernels import objectives

REF = {"ref_logps": -torch.ones(20), "advantages": torch.ones(3)}
models = pytest.mark.parametrize("name", list(CONFIGURATIONS))


@models
def test_scores_equal_the_models_own_logits(name: str) -> None:
    model, inputs = build(name), batch(name)
    with torch.no_grad():
        want = own_logps(model, inputs)
        warm = own_logps(model, inputs, temperature=0.7)
        assert lk.fuse_lm_head(model) is model
        out = model(**inputs)
        assert float((out.logps - want).abs().max()) <= 1e-10
        assert float((model(**inputs, temperature=0.7).logps - warm).abs().max()) <= 1e-10
        assert out.seq.lengths.tolist() == [6, 9, 5]
        assert out.loss is None and out.seq_loss is None
        assert out.logps.shape == out.lse.shape == out.entropy.shape == out.max_logit.shape == (20,)
        assert float((own_logps(model, inputs) - want).abs().max()) == 0.0  # still as before
        # The canary: the neighbouring positions' scores are others.
        shifted = {**inputs, "completion_mask": inputs["completion_mask"].roll(-1, 1)}
        assert float((model(**shifted).logps - want).abs().max()) > 1e-2


@models
def test_losses_and_all_gradients_equal_the_unfused_models(name: str) -> None:
    inputs = batch(name)
    plain, fused = build(name), lk.fuse_lm_head(build(name))
    ref = own_logps(plain, inputs).detach() + 0.1 * torch.randn(20, dtype=torch.float64)
    advantages = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    seq = lk.Sequences.from_mask(inputs["completion_mask"])
    logps = own_logps(plain, inputs)
    want = lk.aggregate(objectives.a_lol(logps, ref, advantages, seq, clip=0.5), seq, "token-mean")
    want.backward()
    out = fused(
        **inputs,
        objective=objectives.a_lol,
        reduction="token-mean",
        ref_logps=ref,
        advantages=advantages,
        clip=0.5,
    )
    out.loss.backward()
    assert abs(out.loss.item() - want.item()) <= 1e-10
    assert out.seq_loss.shape == (3,) and not out.logps.requires_grad
    kept = ~out.logps.isnan()
    assert kept.tolist() == [True] * 6 + [False] * 9 + [True] * 5
    assert float((out.logps - logps.detach())[kept].abs().max()) <= 1e-10
    compare_gradients(plain, fused)


@models
def test_differentiable_scores_carry_any_loss(name: str) -> None:
    inputs = batch(name)
    plain, fused = build(name), lk.fuse_lm_head(build(name))
    own_logps(plain, inputs).square().sum().backward()
    fused(**inputs).logps.square().sum().backward()
    compare_gradients(plain, fused)


@models
def test_generation_is_unchanged(name: str) -> None:
    model = build(name, torch.float32)
    ids = torch.randint(3, VOCAB, (2, 5))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    before = model.generate(ids, **options)
    logits = model(input_ids=ids).logits
    lk.fuse_lm_head(model)
    assert torch.equal(model.generate(ids, **options), before)
    assert torch.equal(model(input_ids=ids).logits, logits)
    labels = model(input_ids=ids, labels=ids).loss
    assert bool(labels.isfinite())


def test_side_inputs_may_be_padded_or_packed() -> None:
    inputs, model = batch(), lk.fuse_lm_head(build("llama"))
    mask = inputs["completion_mask"]
    padded = -torch.rand(3, 12, dtype=torch.float64)
    advantages = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    losses = [
        model(
            **inputs, objective=objectives.a_lol_seq, ref_logps=ref, advantages=advantages
        ).loss.item()
        for ref in (padded, padded[mask])
    ]
    assert losses[0] == losses[1]
    other = padded.roll(1, 1)
    moved = model(**inputs, objective=objectives.a_lol_seq, ref_logps=other, advantages=advantages)
    assert moved.loss.item() != losses[0]


def test_totals_are_the_denominators_of_a_larger_update() -> None:
    inputs, model = batch(), lk.fuse_lm_head(build("llama"))
    whole = model(**inputs, objective=objectives.nll, reduction="token-mean").loss
    parts = [
        model(
            **{k: v[i : i + 1] for k, v in inputs.items()},
            objective=objectives.nll,
            reduction="token-mean",
            totals=(3, 20),
        ).loss
        for i in range(3)
    ]
    assert abs(whole.item() - sum(p.item() for p in parts)) <= 1e-12


def test_padding_side_and_batch_do_not_change_a_score() -> None:
    """GPT-2 with left padding and no position_ids is 34 nats off; with them it is exact."""
    model = lk.fuse_lm_head(build("gpt2"))
    ids = torch.randint(3, VOCAB, (7,))
    scores = []
    for left, right in ((0, 0), (5, 0), (0, 5), (2, 3)):
        row = torch.cat([torch.zeros(left), ids, torch.zeros(right)]).long()[None]
        attention = torch.cat([torch.zeros(left), torch.ones(7), torch.zeros(right)]).long()[None]
        completion = torch.zeros_like(row, dtype=torch.bool)
        completion[0, left + 3 : left + 7] = True
        out = model(
            input_ids=row,
            attention_mask=attention,
            position_ids=(attention.cumsum(1) - 1).clamp(min=0),
            completion_mask=completion,
        )
        scores.append(out.logps.detach())
    for other in scores[1:]:
        assert float((scores[0] - other).abs().max()) <= 1e-10


@pytest.mark.parametrize("name", ["bias", "low_rank", "accumulate_into"])
def test_what_a_head_brings_itself_is_not_taken_from_the_caller(name: str) -> None:
    """The caller's would be lost without a word."""
    linear = torch.nn.Linear(4, 9)
    linear.weight.main_grad = torch.zeros(9, 4)
    head, hidden, labels = lk.LogprobHead(linear), torch.randn(3, 4), torch.arange(3)
    given = {name: (torch.zeros(3, 2), torch.zeros(9, 2)), "main_grad": True}
    for more in ({}, {"seq": lk.Sequences.from_lengths([3]), "objective": objectives.nll}):
        with pytest.raises(TypeError, match=f"{name} is the head's own"):
            head(hidden, labels, **given, **more)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_backend_and_the_budget_are_passed_on(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lolkernels.backends import TABLE

    model, inputs = build("llama", torch.float32), batch()
    lk.fuse_lm_head(model, backend=backend, memory_budget=VOCAB * 4 * 3)
    calls = dict.fromkeys(TABLE, 0)
    sizes = []
    for name, record in TABLE.items():
        original = record.exps_

        def spy(x: Tensor, *a: Any, name: str = name, f: Any = original, **k: Any) -> Any:
            calls[name] += 1
            sizes.append(x.shape[0])
            return f(x, *a, **k)

        monkeypatch.setitem(TABLE, name, record._replace(exps_=spy))
    model(**inputs)
    assert calls[backend] > 1 and sum(calls.values()) == calls[backend]
    assert max(sizes) == 3


# --- copies, refusals -----------------------------------------------------------------------------


def test_a_copy_of_a_fused_model_stands_alone() -> None:
    model, inputs = lk.fuse_lm_head(build("llama")), batch()
    twin = copy.deepcopy(model)
    want = model(**inputs).logps.detach()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert torch.equal(twin(**inputs).logps.detach(), want)
    assert float((model(**inputs).logps.detach() - want).abs().max()) > 1e-3
    twin(**inputs, objective=objectives.nll).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None for p in twin.parameters())
    assert "forward" not in vars(lk.unfuse_lm_head(twin))
    assert model(**batch()).logps.shape == (20,)


def test_fusing_twice_is_fusing_once() -> None:
    model, inputs = build(NO_LEFT_PADDING), batch(NO_LEFT_PADDING)
    once = lk.fuse_lm_head(model)(**inputs).logps
    assert torch.equal(lk.fuse_lm_head(model)(**inputs).logps, once)
    ids = inputs["input_ids"]
    assert bool(model(input_ids=ids).logits.isfinite().all())


# --- packed rows ----------------------------------------------------------------------------------

PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: CONFIGURATIONS[name] for name in ("llama", "gpt2", "gemma2 softcap", "qwen3")},
    "gemma3 window": ("Gemma3Text", {**COMMON, "sliding_window": 4}),
    "gpt_neox": ("GPTNeoX", {k: v for k, v in COMMON.items() if k != "head_dim"}),
}


def packed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of a padded batch one behind the other, with a padding of two tokens."""
    real = inputs["attention_mask"].bool()
    row = {k: torch.cat([t[real], t.new_zeros(2)])[None] for k, t in inputs.items()}
    del row["attention_mask"]
    row["position_ids"][0, -1] = 1
    return row | {"cu_seqlens": torch.tensor([0, *real.sum(1).cumsum(0)])}


@pytest.mark.parametrize(
    ("name", "attention"),
    [(n, a) for n in PACKED for a in ("eager", "sdpa") if (n, a) != (NO_LEFT_PADDING, "sdpa")],
)
def test_packed_sequences_are_as_they_are_alone(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients; and the content of one never reaches another, to the last bit."""
    monkeypatch.setitem(CONFIGURATIONS, name, PACKED[name])
    model, inputs = build(name), batch(NO_LEFT_PADDING)
    model.set_attn_implementation(attention)
    lk.fuse_lm_head(model)
    side = {
        "ref_logps": -torch.rand(inputs["input_ids"].shape, dtype=torch.float64),
        "advantages": torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64),
    }
    row = packed({**inputs, "ref_logps": side["ref_logps"]})
    found = []
    for given, ref in ((inputs, side["ref_logps"]), (row, row.pop("ref_logps"))):
        model.zero_grad()
        out = model(**given, **side | {"ref_logps": ref}, objective=objectives.a_lol)
        out.loss.backward()
        found.append((out, [p.grad.clone() for p in model.parameters()]))
    (want, grads), (got, mine) = found
    assert got.seq.lengths.tolist() == want.seq.lengths.tolist()
    for a, b in zip([got.loss, got.logps, *mine], [want.loss, want.logps, *grads], strict=True):
        assert float((a - b).detach().abs().max()) <= 1e-6 * max(1.0, float(b.detach().abs().max()))
    other, start = dict(row), int(row["cu_seqlens"][1])
    other["input_ids"] = row["input_ids"].clone()
    other["input_ids"][:, :start] = row["input_ids"][:, :start].flip(1)
    n = int(got.seq.lengths[0])
    logps = model(**other).logps
    assert torch.equal(logps[n:], model(**row).logps[n:]) and not torch.equal(
        logps[:n], got.logps[:n]
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_masks_keep_packed_sequences_apart() -> None:
    """Of flex_attention, in eager torch and forward only: it has no backward on a CPU."""
    model, inputs = build("llama"), batch(NO_LEFT_PADDING)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        want = lk.fuse_lm_head(model)(**inputs).logps
        lk.unfuse_lm_head(model).set_attn_implementation("flex_attention")
        got = lk.fuse_lm_head(model)(**packed(inputs)).logps
    assert got.shape == want.shape and float((got - want).abs().max()) <= 1e-6


RUNNING_ON = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, **TOKENS},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, **TOKENS},  # ALiBi
}


@pytest.mark.parametrize("family", list(RUNNING_ON))
def test_a_model_that_runs_on_into_the_next_sequence_is_refused(family: str) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **RUNNING_ON[family])
    model = lk.fuse_lm_head(transformers.AutoModelForCausalLM.from_config(config).eval())
    row = packed(batch(NO_LEFT_PADDING))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"does not keep packed sequences apart.*Pad its batch"
        ):
            model(**row)
    model(**{k: v for k, v in batch().items() if k != "position_ids"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.ones(1, 35)}, "attention_mask is given beside cu_seqlens"),
        ({"position_ids": torch.arange(35)[None]}, "position_ids must start at 0 with every"),
        ({"cu_seqlens": torch.tensor([0, 12, 24, 36])}, "end within a mask of shape"),
        ({"cu_seqlens": torch.tensor([0, 12, 24])}, "marks tokens behind .* last sequence, 24"),
        ({"cu_seqlens": torch.tensor([0, 4, 7, 33])}, "marks the first token of a sequence"),
        ({"cu_seqlens": torch.tensor([[0, 33]])}, "cu_seqlens must be one-dimensional"),
        ({"cu_seqlens": torch.tensor([0.0, 33.0])}, "cu_seqlens must hold integers"),
    ],
)
def test_bad_packed_rows(changes: dict[str, Tensor], message: str) -> None:
    row = packed(batch(NO_LEFT_PADDING))
    if "position_ids" not in changes:
        del row["position_ids"]
    with pytest.raises((ValueError, TypeError), match=message):
        lk.fuse_lm_head(build("llama"))(**row | changes)


# --- the head's gradient elsewhere ----------------------------------------------------------------


def test_main_grad_takes_the_heads_gradient() -> None:
    plain, model = (lk.fuse_lm_head(build("llama"), main_grad=on) for on in (False, True))
    plain(**batch()).logps.sum().backward()
    weight = model.get_output_embeddings().weight
    with pytest.raises(ValueError, match="no main_grad: give it one"):
        model(**batch())
    with torch.no_grad():
        model(**batch())
    weight.main_grad = torch.zeros_like(weight)
    model(**batch()).logps.sum().backward()
    want = {name: p.grad for name, p in plain.named_parameters()}
    for name, p in model.named_parameters():
        got: Any = weight.main_grad if p is weight else p.grad
        assert float((got - want[name]).abs().max()) <= 1e-5, name
    assert weight.grad is None and bool(weight.main_grad.any())


def test_only_the_forward_of_this_instance_is_patched() -> None:
    model, other = build("llama"), build("llama")
    keys, taken = list(model.state_dict()), list(inspect.signature(model.forward).parameters)
    lk.fuse_lm_head(model)
    assert list(model.state_dict()) == keys  # and trainers inspect the signature
    assert [p for p in inspect.signature(model.forward).parameters if p != "self"] == taken
    assert "forward" in vars(model) and "forward" not in vars(other)
    assert "forward" not in vars(other.lm_head) and hasattr(other(batch()["input_ids"]), "logits")


def test_a_tied_weight_stays_tied_and_gets_both_gradients() -> None:
    model = lk.fuse_lm_head(build("llama tied"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model(**batch(), objective=objectives.nll).loss.backward()
    unused = torch.ones(VOCAB, dtype=torch.bool)
    unused[batch()["input_ids"].unique()] = False
    assert bool((model.lm_head.weight.grad[unused].abs().sum(1) > 0).all())  # the head's share


def test_hooks_of_the_head_run() -> None:
    """What wraps the head (FSDP, ZeRO-3) gathers its weight in a hook of the module's call."""
    model, seen = lk.fuse_lm_head(build("llama")), []
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append("pre"))
    model.lm_head.register_forward_hook(lambda *_: seen.append("post"))
    model(**batch())
    assert seen == ["pre", "post"]


def test_what_is_no_causal_lm_is_refused() -> None:
    for thing in (nn.Linear(3, 4), object(), build("llama").model):
        with pytest.raises(TypeError, match="causal LM"):
            lk.fuse_lm_head(thing)


def attributes(model: nn.Module) -> dict[str, Any]:
    return {
        f"{name}.{key}": value
        for name, m in model.named_modules()
        for key, value in vars(m).items()
    }


# --- a model whose logits are something else ------------------------------------------------------


class Changed(nn.Module):
    """A causal LM around another, with a step of its own before and behind the head."""

    def __init__(self, base: Any, before: Any = None, behind: Any = None) -> None:
        super().__init__()
        self.base, self.config = base, base.config
        self.before, self.behind = before, behind

    def get_output_embeddings(self) -> Any:
        return self.base.lm_head

    def get_input_embeddings(self) -> Any:
        return self.base.get_input_embeddings()

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None
    ) -> Any:
        hidden = self.base.model(input_ids, attention_mask, position_ids, use_cache=False)[0]
        logits = self.base.lm_head(hidden if self.before is None else self.before(hidden))
        return (logits if self.behind is None else self.behind(logits),)


def masked_column(z: Tensor) -> Tensor:
    z = z.clone()
    z[..., 7] = -1e9
    return z


EXACT: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a dense step before": {"before": nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))},
    "a factor before": {"before": lambda h: 3.0 * h},
    "a factor behind": {"behind": lambda z: z * 0.37},
    "a divisor behind": {"behind": lambda z: z / 1.7},
    "a soft-cap": {"behind": lambda z: 5.0 * torch.tanh(z / 5.0)},
    "a scaled soft-cap": {"behind": lambda z: 5.0 * torch.tanh(0.3 * z.float() / 5.0)},
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "a bias behind": ("neither", {"behind": lambda z: z + 0.1 * torch.arange(VOCAB)}),
    "a masked column": ("neither", {"behind": masked_column}),
    "a clamp": ("neither", {"behind": lambda z: z.clamp(-5, 5)}),
    "another soft-cap": ("neither", {"behind": lambda z: 5 * torch.atan(z / 5)}),
    "a negative factor": ("neither", {"behind": lambda z: -z}),
    "log-probs": ("neither", {"behind": lambda z: z.log_softmax(-1)}),
    "fewer columns": ("shape", {"behind": lambda z: z[..., :50]}),
    "fewer positions": ("shape", {"before": lambda h: h[:, 1:]}),
    "a look ahead": ("not causal", {"before": lambda h: h + h.mean(1, keepdim=True)}),
    "a failure": ("does not run on a few tokens .division", {"before": lambda h: 1 / 0}),
}


def changed(**parts: Any) -> Any:
    torch.manual_seed(0)
    parts = {k: v.double() if isinstance(v, nn.Module) else v for k, v in parts.items()}
    return Changed(build("llama"), **parts).eval()


@pytest.mark.parametrize("name", list(EXACT))
@pytest.mark.parametrize("check", [True, False])
def test_what_stands_beside_the_head_is_included(name: str, check: bool) -> None:
    model, inputs = changed(**EXACT[name]), batch()
    with torch.no_grad():
        logits = model(inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"])[0]
        want = logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])
        want = want.squeeze(-1)[inputs["completion_mask"][:, 1:]]
        out = lk.fuse_lm_head(model, check=check)(**inputs)
    assert float((out.logps - want).abs().max()) <= (1e-4 if "scaled" in name else 1e-10)


@pytest.mark.parametrize("name", list(REFUSED))
def test_other_models_are_refused_and_left_as_they_were(name: str) -> None:
    words, parts = REFUSED[name]
    model = changed(**parts)
    before = attributes(model)
    with pytest.raises(ValueError, match=words):
        lk.fuse_lm_head(model)
    assert attributes(model).keys() == before.keys()
    assert all(attributes(model)[k] is v for k, v in before.items())
    if words == "neither":  # not a matter of checking: no fused formula gives these logits
        with pytest.raises((ValueError, RuntimeError), match=r"neither|must match the size"):
            lk.fuse_lm_head(model, check=False)(**batch())


def test_other_log_probs_are_refused_with_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason: the judge is the model's own logits."""
    from lolkernels import fuse

    def off(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        return out._replace(logps=out.logps + 0.0125)

    original = fuse.fused_head
    model = build("llama")
    monkeypatch.setattr(fuse, "fused_head", off)
    with pytest.raises(ValueError, match=r"differ from it by up to 0\.0125 nats.*check=False"):
        lk.fuse_lm_head(model)
    assert "forward" not in vars(model) and not hasattr(model, "_fusion")
    assert lk.fuse_lm_head(model, check=False)(**batch()).logps.shape == (20,)


def test_weights_of_nan_give_nan_scores() -> None:
    model = build("gemma2 softcap")
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    assert lk.fuse_lm_head(model)(**batch("gemma2 softcap")).logps.isnan().all()


def test_a_trained_factor_is_refused_and_a_frozen_one_is_not() -> None:
    factor = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
    model = changed(behind=lambda z: factor * z)
    with pytest.raises(ValueError, match=r"trained parameter.*freeze"):
        lk.fuse_lm_head(model)
    factor.requires_grad_(False)
    assert lk.fuse_lm_head(model)(**batch()).logps.isfinite().all()


def test_a_head_called_twice_or_never_is_refused() -> None:
    class Twice(Changed):
        def forward(self, input_ids: Tensor, *args: Any) -> Any:
            return (super().forward(input_ids)[0] + super().forward(input_ids)[0],)

    class Never(Changed):
        def forward(self, input_ids: Tensor, *args: Any) -> Any:
            return (self.base.model(input_ids)[0] @ self.base.lm_head.weight.T,)

    for cls, words in ((Twice, "2 times"), (Never, "0 times")):
        with pytest.raises(ValueError, match=words):
            lk.fuse_lm_head(cls(build("llama")))


def double(module: Any, args: Any, output: Any) -> Any:
    return 2 * output if isinstance(output, Tensor) else output


def parametrised(head: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(head)


def subclassed(head: Any) -> None:
    class Normed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, nn.functional.normalize(self.weight))

    head.__class__ = Normed


HEADS: dict[str, tuple[Callable[[Any], Any], str | None]] = {
    "a hook that changes logits": (
        lambda h: h.register_forward_hook(double),
        r"differs from x W.* by up to",
    ),
    "a hook that looks on": (lambda h: h.register_forward_hook(lambda *_: None), None),
    "a hook on the input": (lambda h: h.register_forward_pre_hook(lambda m, x: (2 * x[0],)), None),
    "a parametrised weight": (parametrised, None),
    "a forward of its own": (subclassed, "linear layer"),
}


@pytest.mark.parametrize("name", list(HEADS))
def test_a_head_that_is_more_than_its_weight(name: str) -> None:
    change, words = HEADS[name]
    model, inputs = build("llama"), batch()
    change(model.lm_head)
    if words is not None:
        with pytest.raises((ValueError, TypeError), match=words):
            lk.fuse_lm_head(model)
        return
    with torch.no_grad():
        want = own_logps(model, inputs)
    out = lk.fuse_lm_head(model)(**inputs)
    assert float((out.logps.detach() - want).abs().max()) <= 1e-10
    out.logps.sum().backward()
    assert any(float(p.grad.abs().max()) > 0 for p in model.lm_head.parameters())


def test_a_hook_put_on_a_fused_head_cannot_change_its_results() -> None:
    model = lk.fuse_lm_head(build("llama"))
    model.lm_head.register_forward_hook(lambda m, x, y: tuple(2 * t for t in y))
    with pytest.raises(ValueError, match="hook"):
        model(**batch())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2 softcap", "granite scaling", "phi bias"])
def test_narrow_weights_are_compared_in_float32(name: str, dtype: torch.dtype) -> None:
    model = lk.fuse_lm_head(build(name, dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model._fusion.checked
    model.lm_head.weight.data.mul_(1.5)  # other weights, the same map
    assert model(**batch(name)).logps.isfinite().all()


def test_a_fused_model_can_be_compiled() -> None:
    model, inputs = lk.fuse_lm_head(build("llama", torch.float32)), batch()
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    want = plain(**inputs).logps
    assert torch.allclose(compiled(**inputs).logps, want, atol=1e-6)
    losses = [m(**inputs, objective=objectives.a_lol, **REF).loss for m in (plain, compiled)]
    assert abs(losses[0].item() - losses[1].item()) <= 1e-5 * losses[0].abs().item()
    for loss in losses:
        loss.backward()
    compare_gradients(plain, model, tol=1e-5)
    assert compiled(input_ids=inputs["input_ids"]).logits.shape == (3, 12, VOCAB)


# --- what fusing leaves alone ---------------------------------------------------------------------


def test_modes_and_random_states_are_untouched() -> None:
    model = build("gpt2", torch.float32).train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    lk.fuse_lm_head(model)
    assert torch.equal(torch.rand(3), want)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_a_fused_model_is_saved_and_loaded_as_before(name: str, tmp_path: Path) -> None:
    model, want = build(name, torch.float32), build(name, torch.float32).state_dict()
    lk.fuse_lm_head(model)(**batch())
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    other = build(name, torch.float32)
    other.lm_head.weight.data.zero_()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for state in (model.state_dict(), loaded.state_dict(), other.state_dict()):
        assert list(state) == list(want)
        assert all(torch.equal(state[key], value) for key, value in want.items())
    assert torch.equal(lk.fuse_lm_head(loaded)(**batch()).logps, model(**batch()).logps)


@pytest.mark.parametrize("outer", ["nothing", "forward of the instance"])
def test_unfusing_leaves_nothing_behind(outer: str) -> None:
    model, inputs = build("llama"), batch()
    want = own_logps(model, inputs)
    if outer != "nothing":
        model.forward, model.lm_head.forward = model.forward, model.lm_head.forward
    before = attributes(model)
    assert lk.unfuse_lm_head(model) is model  # nothing to undo
    lk.fuse_lm_head(lk.fuse_lm_head(model))
    model(**inputs)
    assert lk.unfuse_lm_head(model) is model
    after = attributes(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert after[key] is value or after[key] == value, key
    assert torch.equal(own_logps(model, inputs), want)
    assert lk.fuse_lm_head(model)(**inputs).logps.shape == (20,)


def test_a_forward_wrapped_since_is_not_torn_out() -> None:
    model = lk.fuse_lm_head(build("llama"))
    fused = model.forward
    model.forward = lambda *a, **k: fused(*a, **k)
    with pytest.raises(ValueError, match="wrapped after"):
        lk.unfuse_lm_head(model)
    assert lk.fuse_lm_head(model)(**batch()).logps.shape == (20,)


def test_another_thread_gets_logits_meanwhile() -> None:
    model, inputs = lk.fuse_lm_head(build("llama")), batch()
    ids = inputs["input_ids"]
    want, got = model(input_ids=ids).logits, []

    def generate(*_: Any) -> None:
        thread = threading.Thread(target=lambda: got.append(model(input_ids=ids).logits))
        thread.start()
        thread.join()

    hook = model.model.register_forward_hook(lambda *_: hook.remove() or generate())
    assert model(**inputs).logps.shape == (20,)
    assert torch.equal(got[0], want)


def test_an_error_in_the_backbone_leaves_the_head_in_its_place() -> None:
    model, inputs = lk.fuse_lm_head(build("llama")), batch()
    head = model.lm_head
    with pytest.raises(Exception, match=r"index|range"):
        model(**{**inputs, "input_ids": inputs["input_ids"] + VOCAB})
    assert model.lm_head is head
    assert model(**inputs).logps.shape == (20,)


# --- weights that are elsewhere -------------------------------------------------------------------


def test_meta_weights_are_checked_in_the_first_call() -> None:
    real = build("llama", torch.float32)
    for hooked in (False, True):
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(real.config).eval()
        lk.fuse_lm_head(model)
        assert not model._fusion.checked
        model.load_state_dict(real.state_dict(), assign=True)
        model.model.rotary_emb = real.model.rotary_emb
        if hooked:
            model.lm_head.register_forward_hook(double)
            with pytest.raises(ValueError, match=r"differs from x W.* by up to"):
                model(**batch())
            continue
        out = model(**batch())
        assert model._fusion.checked
        assert float((out.logps - own_logps(real, batch())).detach().abs().max()) <= 1e-5


@pytest.fixture
def alone() -> Any:
    with one_rank() as mesh:
        yield mesh


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("fused_first", [False, True])
def test_sharded_weights_are_checked_in_the_first_call(
    alone: Any, own_head: bool, fused_first: bool
) -> None:
    from torch.distributed.fsdp import fully_shard

    inputs = batch()
    plain, model = lk.fuse_lm_head(build("llama", torch.float32)), build("llama", torch.float32)
    if fused_first:
        lk.fuse_lm_head(model)
    for part in (*model.model.layers, *([model.lm_head] if own_head else []), model):
        fully_shard(part, mesh=alone)
    if not fused_first:
        assert not lk.fuse_lm_head(model)._fusion.checked
    calls: list[int] = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    for step in range(2):
        out = model(**inputs, objective=objectives.a_lol, **REF)
        # Whatever this process knew when fusing: ranks must gather weights equally often.
        assert len(calls) == 2 + step
        out.loss.backward()
        plain(**inputs, objective=objectives.a_lol, **REF).loss.backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad.full_tensor())


def test_side_inputs_cast_by_sharding_are_refused(alone: Any) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for cast in (True, False):
        model = build("llama", torch.float32)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=cast)
        fully_shard(model, mesh=alone, mp_policy=policy)
        lk.fuse_lm_head(model)
        call = lambda m=model: m(**batch(), objective=objectives.a_lol, **REF)  # noqa: E731
        if cast:
            with pytest.raises(TypeError, match=r"ref_logps.*bfloat16.*cast_forward_inputs"):
                call()
        else:
            assert call().loss.isfinite()


# --- arguments ------------------------------------------------------------------------------------


def pairs(logps: Tensor, seq: Any) -> Tensor:  # one value per pair of rows
    total = seq.sum(logps).view(-1, 2)
    return -torch.nn.functional.logsigmoid(total[:, 0] - total[:, 1])


MASK = batch()["completion_mask"]
NLL, A_LOL = {"objective": objectives.nll}, {"objective": objectives.a_lol, **REF}
TYPE, VALUE = TypeError, ValueError
BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no mask for the first token": (VALUE, "position 0", {"completion_mask": MASK | True}),
    "mask of another shape": (VALUE, "completion_mask", {"completion_mask": MASK[:, 1:]}),
    "no tensor": (VALUE, "completion_mask", {"completion_mask": [[True]]}),
    "a float mask": (TYPE, r"completion_mask.bool\(\)", {"completion_mask": MASK.float()}),
    "a soft mask": (TYPE, r"completion_mask.bool\(\)", {"completion_mask": 0.3 * MASK.double()}),
    "labels as mask": (VALUE, "only 0 and 1", {"completion_mask": torch.where(MASK, 17, -100)}),
    "labels too": (TYPE, "labels", {"labels": torch.zeros(3, 12, dtype=torch.int64)}),
    "a column without an objective": (TYPE, "advantages", {"advantages": torch.ones(3)}),
    "another objective's column": (TYPE, "rewards", {**NLL, "rewards": torch.ones(3)}),
    "a missing column": (TYPE, "rewards", {"objective": objectives.wbc}),
    "an unknown reduction": (VALUE, "reduction", {**NLL, "reduction": "mean"}),
    "an objective that is none": (TYPE, "objective", {"objective": "a_lol"}),
    "fewer logits than tokens": (VALUE, "logits_to_keep", {"logits_to_keep": 2}),
    "rows that are no pairs": (VALUE, "group_size=2 does not divide", {**NLL, "group_size": 2}),
    # Misspelt names are refused with the nearest.
    "an option": (TYPE, "clp .*did you mean clip", {**A_LOL, "clp": 0.2}),
    "the reduction": (TYPE, "reductoin .*did you mean reduction", {**A_LOL, "reductoin": "sum"}),
    "the temperature": (TYPE, "temprature .*did you mean temperature", {"temprature": 2}),
    "the mask": (TYPE, "atention_mask .*did you mean attention_mask", {"atention_mask": MASK}),
    "another objective's option": (TYPE, "clip .*takes none", {**NLL, "clip": 0.2}),
    "an option without an objective": (TYPE, "clip ", {"clip": 0.2}),
    "something else": (TYPE, "qqqq .*leave it out", {"qqqq": 1}),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", list(BAD))
def test_bad_calls_name_the_argument(name: str, family: str) -> None:
    error, words, changed = BAD[name]
    model = lk.fuse_lm_head(build(family))
    with pytest.raises(error, match=words):
        model(**{**batch(), **changed})


def test_the_tokens_of_inputs_embeds_are_given_as_labels() -> None:
    model, inputs = lk.fuse_lm_head(build("llama")), batch()
    want = model(**inputs).logps
    ids = inputs.pop("input_ids")
    embeds = {"inputs_embeds": model.model.embed_tokens(ids), **inputs}
    with pytest.raises(ValueError, match=r"input_ids is missing.*labels=input_ids"):
        model(**embeds)
    with pytest.raises(ValueError, match="label is negative"):
        model(**embeds, labels=torch.full_like(ids, -100))
    assert torch.equal(model(**embeds, labels=ids).logps, want)


def test_keywords_that_wrappers_add_are_taken() -> None:
    model, inputs = lk.fuse_lm_head(build("llama")), batch()
    want = model(**inputs).logps
    extra = dict.fromkeys(("labels", "inputs_embeds", "task_ids", "logits_to_keep"))
    got = model(**inputs, **extra, output_attentions=False, return_dict=True, use_cache=False)
    assert torch.equal(got.logps, want)
    numbers = model(**{**inputs, "completion_mask": inputs["completion_mask"].long()})
    assert torch.equal(numbers.logps, want)


def test_positional_arguments_are_the_models_own() -> None:
    for family in ("llama", "gpt2"):
        model, inputs = lk.fuse_lm_head(build(family)), batch()
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        scored = {"completion_mask": inputs["completion_mask"]}
        want = model(input_ids=ids, attention_mask=mask, **scored).logps
        given = (ids, mask) if family == "llama" else (ids, None, mask)
        assert torch.equal(model(*given, **scored).logps, want)
        with pytest.raises(TypeError, match="99 positional arguments"):
            model(ids, *[None] * 98, **scored)
        with pytest.raises(TypeError, match="input_ids is given twice"):
            model(ids, input_ids=ids, **scored)


def test_the_group_size_reaches_the_sequences() -> None:
    inputs = {k: torch.cat([v, v[:1]]) for k, v in batch().items()}
    model = lk.fuse_lm_head(build("llama"))
    out = model(**inputs, objective=pairs, group_size=2)
    logps = model(**inputs, group_size=2)
    assert out.seq.group_size == logps.seq.group_size == 2
    want = pairs(logps.logps, logps.seq)
    assert out.seq_loss.shape == (2,) and torch.allclose(out.seq_loss, want.detach())
    assert out.metrics == {}


# --- encoder and decoder --------------------------------------------------------------------------

SIZES = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48}
BART = {
    "d_model": 32,
    "max_position_embeddings": 64,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "T5": {**SIZES, "decoder_start_token_id": 0},
    "T5 untied": {**SIZES, "decoder_start_token_id": 0, "tie_word_embeddings": False},
    "Bart": {**BART, "decoder_start_token_id": 2},
    "Marian": {**BART, "decoder_start_token_id": 0, "decoder_vocab_size": VOCAB},
}


def seq2seq(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name.split()[0]}Config")(**TOKENS, **SEQ2SEQ[name])
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5.0)
    return model.double().eval()


@pytest.mark.parametrize("name", list(SEQ2SEQ))
def test_a_decoder_scores_its_labels(name: str) -> None:
    plain, fused = seq2seq(name), lk.fuse_lm_head(seq2seq(name))
    inputs = {k: v for k, v in batch().items() if k in ("input_ids", "attention_mask")}
    labels = torch.randint(3, VOCAB, (3, 9))
    mask = torch.arange(9) < torch.tensor([[9], [4], [6]])
    labels[~mask] = -100
    own = plain(**inputs, labels=labels)
    own.loss.backward()
    options = {"objective": objectives.nll, "reduction": "token-mean"}
    out = fused(**inputs, labels=labels, completion_mask=mask, **options)
    out.loss.backward()
    want = own.logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)[mask]
    assert float((out.logps - want).detach().abs().max()) <= 1e-10
    assert abs(out.loss.item() - own.loss.item()) <= 1e-10
    compare_gradients(plain, fused)
    side = torch.rand(3, 9, dtype=torch.float64)  # padded or packed, at its token
    scores = [
        fused(**inputs, labels=labels, completion_mask=mask, ref_logps=-ref,
              objective=objectives.a_lol_kl, advantages=torch.ones(3), beta=0.1).loss.item()
        for ref in (side, side[mask])
    ]  # fmt: skip
    assert scores[0] == scores[1]
    assert torch.equal(fused.generate(**inputs), plain.generate(**inputs))
    with pytest.raises(ValueError, match=r"labels is missing.*decoder"):
        fused(**inputs, completion_mask=mask)


@pytest.mark.parametrize("check", [True, False])
def test_a_bias_behind_the_head_of_a_decoder_is_refused(check: bool) -> None:
    model, labels = seq2seq("Marian"), torch.ones(3, 9, dtype=torch.int64)
    model.final_logits_bias.normal_()
    with pytest.raises(ValueError, match=r"neither a positive|final_logits_bias is not zero"):
        fused = lk.fuse_lm_head(model, check=check)
        fused(batch()["input_ids"], labels=labels, completion_mask=labels)
    assert float(model.final_logits_bias.abs().sum()) > 0


# --- LogprobHead ----------------------------------------------------------------------------------


def test_logprob_head_shares_the_layer() -> None:
    linear = nn.Linear(8, 30)
    head = lk.LogprobHead(linear, softcap=5.0, logit_scale=0.5)
    h, labels = torch.randn(6, 8), torch.randint(30, (6,))
    z = 5 * torch.tanh(0.5 * linear(h) / 5)
    assert torch.allclose(head(h), z)
    want = torch.log_softmax(z.double(), -1).gather(-1, labels[:, None]).squeeze(-1)
    assert float((head(h, labels).logps - want).detach().abs().max()) <= 1e-5
    seq = lk.Sequences.from_lengths([2, 4])
    out = head(h, labels, seq, objective=objectives.nll)
    assert abs(out.loss.item() + want.sum().item() / 2) <= 1e-5
    out.loss.backward()
    assert float(linear.weight.grad.abs().max()) > 0 and float(linear.bias.grad.abs().max()) > 0
    assert list(dict(head.named_parameters())) == ["linear.weight", "linear.bias"]


def test_logprob_head_names_what_is_missing() -> None:
    head = lk.LogprobHead(nn.Linear(8, 30))
    h, labels = torch.randn(6, 8), torch.randint(30, (6,))
    with pytest.raises(ValueError, match="labels"):
        head(h, objective=objectives.nll)
    with pytest.raises(ValueError, match="labels"):
        head(h, temperature=2.0)
    with pytest.raises(ValueError, match="seq"):
        head(h, labels, objective=objectives.nll)
    with pytest.raises(TypeError, match="linear layer"):
        lk.LogprobHead(nn.ReLU())


class Transposed(nn.Module):
    """x W + b, as in GPT-2's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Quantised(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 30)
        self.weight = nn.Parameter(torch.zeros(30, 8, dtype=torch.int8), requires_grad=False)


class Adapted(nn.Linear):
    """As torchtune's LoRALinear: an adapter of the layer's own, which starts at zero."""

    def __init__(self) -> None:
        super().__init__(8, 30)
        self.lora_a, self.lora_b = nn.Linear(8, 2, bias=False), nn.Linear(2, 30, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_b(self.lora_a(x))


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(8),
        nn.Embedding(30, 8),
        nn.Bilinear(8, 8, 3),
        nn.Conv1d(8, 30, 1),
        Transposed(),
        Quantised(),
        Adapted(),
        Adapted().to("meta"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_only_linear_layers_make_a_head(layer: Any) -> None:
    with pytest.raises(TypeError, match="linear layer"):
        lk.LogprobHead(layer)


def test_a_layer_that_computes_what_a_linear_one_does_makes_a_head() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(30, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    layer = Own()
    h, labels = torch.randn(6, 8), torch.randint(30, (6,))
    want = layer(h).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    assert torch.allclose(lk.LogprobHead(layer)(h, labels).logps, want, atol=1e-5)


def test_a_head_takes_a_mask_with_a_group_size() -> None:
    head = lk.LogprobHead(nn.Linear(8, 30))
    h, labels = torch.randn(4, 5, 8), torch.randint(30, (4, 5))
    mask = torch.arange(5) < torch.tensor([[2], [5], [1], [3]])
    got = head(h, labels, mask, objective=pairs, group_size=2)
    seq = lk.Sequences.from_mask(mask, group_size=2)
    assert torch.equal(got.seq_loss, head(h, labels, seq, objective=pairs).seq_loss)
    assert got.seq_loss.shape == (2,)
    with pytest.raises(ValueError, match="group_size=2"):
        head(h, labels, lk.Sequences.from_mask(mask), objective=pairs, group_size=2)
    with pytest.raises(ValueError, match="labels"):
        head(h, group_size=2)
