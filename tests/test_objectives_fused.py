"""Every registered objective inside a fused model: the loss and all gradients of its own logits."""

from typing import Any

import pytest
import torch
import transformers
from objective_forms import FORMS, Form, draw
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives

ROWS = {form.name: form for form in FORMS}
WIDTH, VOCAB = 9, 23


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return lk.fuse_lm_head(transformers.LlamaForCausalLM(config).double().eval())


def statistics(logits: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Of the marked tokens, packed, by eager torch."""
    z = logits[:, :-1][mask[:, 1:]]
    target = z.gather(1, ids[:, 1:][mask[:, 1:]][:, None]).squeeze(1)
    lse, p = z.logsumexp(1), z.softmax(1)
    return {
        "logps": target - lse,
        "lse": lse,
        "entropy": lse - (p * z).sum(1),
        "target_logit": target,
        "max_logit": z.amax(1).detach(),
    }


@pytest.mark.parametrize("form", ROWS.values(), ids=list(ROWS))
def test_an_objective_in_a_fused_model(model: Any, form: Form) -> None:
    drawn = draw(form, 0.3)
    lengths = drawn.seq.lengths
    ids = torch.randint(VOCAB, (len(lengths), WIDTH))
    at = torch.arange(WIDTH)
    mask = (at >= 2) & (at < 2 + lengths[:, None])
    inputs = {k: t.requires_grad_() for k, t in drawn.side.items()}
    leaves = [*model.parameters(), *inputs.values()]

    def gradients(loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        made = zip(found, leaves, strict=True)
        return [loss, *(torch.zeros_like(t) if g is None else g for g, t in made)]

    stats = statistics(model(ids).logits, ids, mask)
    named = {k: stats[k] for k in objectives.statistics(form.objective)}
    losses = form.objective(**named, seq=drawn.seq, **inputs, **form.options)
    want = gradients(lk.aggregate(losses, drawn.seq))

    out = model(
        ids,
        completion_mask=mask,
        objective=form.objective,
        group_size=form.group_size,
        **inputs,
        **form.options,
    )
    assert float((out.logps - stats["logps"])[~out.logps.isnan()].abs().max()) <= 1e-12
    for got, exact in zip(gradients(out.loss), want, strict=True):
        assert torch.allclose(got, exact, rtol=1e-9, atol=1e-12)
