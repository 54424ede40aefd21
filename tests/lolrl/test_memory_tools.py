"""What saves memory around the fused loss leaves the gradients as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lolkernels as lk
from lolrl.collate import LoLCollator, PackingCollator
from tests.lolrl.toys import make_dataset, make_llama


def step(
    tokenizer: Any, collate: Any, prepare: Callable[[Any], Any], around: Any, **fusing: Any
) -> tuple[Any, dict[str, Tensor]]:
    """One backward of A-LoL on a toy Llama in training mode: the model and its gradients."""
    model = make_llama(len(tokenizer)).train()
    prepare(model)
    lk.fuse_lm_head(model, **fusing)
    weight = model.get_output_embeddings().weight
    weight.main_grad = torch.zeros_like(weight)
    batch = collate([make_dataset(tokenizer, 5)[i] for i in range(5)])
    rewards = batch.pop("rewards")
    ref = torch.full(batch["input_ids"].shape, -2.0)
    side = {"ref_logps": ref, "advantages": rewards - rewards.min() + 0.1}
    with around:
        loss = model(**batch, **side, objective=lk.objectives.a_lol).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    grads["main_grad"] = weight.main_grad
    return model, grads


def checkpointed(use_reentrant: bool) -> Callable[[Any], None]:
    def prepare(model: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()

    return prepare


class Offload(torch.autograd.graph.save_on_cpu):
    """Counts what it moves: a graph that saves nothing would pass too."""

    moved = 0

    def __init__(self) -> None:
        super().__init__()
        pack = self.pack_hook

        def counted(t: Tensor) -> Any:
            Offload.moved += 1
            return pack(t)

        self.pack_hook = counted


def as_it_is(model: Any) -> None:
    pass


TOOLS: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
    "checkpointing": (checkpointed(False), contextlib.nullcontext),
    "reentrant checkpointing": (checkpointed(True), contextlib.nullcontext),
    "offloaded activations": (as_it_is, Offload),
}


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("collate", [LoLCollator(2), PackingCollator()], ids=["padded", "packed"])
@pytest.mark.parametrize("tool", list(TOOLS))
def test_the_gradients_are_those_without(
    tokenizer: Any, tool: str, collate: Any, main_grad: bool
) -> None:
    prepare, around = TOOLS[tool]
    _, want = step(tokenizer, collate, as_it_is, contextlib.nullcontext(), main_grad=main_grad)
    moved = Offload.moved
    model, got = step(tokenizer, collate, prepare, around(), main_grad=main_grad)
    assert model.is_gradient_checkpointing == ("checkpointing" in tool)
    assert (Offload.moved > moved) == (tool == "offloaded activations")
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name
        assert bool(gradient.any()) == (main_grad or name != "main_grad"), name


def test_states_of_eight_bits_follow_those_of_thirty_two(tokenizer: Any) -> None:
    """bitsandbytes' AdamW8bit, on a CPU too: the fused loss falls as under torch's AdamW."""
    optim = pytest.importorskip("bitsandbytes").optim
    batch = PackingCollator()([make_dataset(tokenizer, 5)[i] for i in range(5)])
    del batch["rewards"]
    curves, states = [], []
    for cls, more in ((torch.optim.AdamW, {}), (optim.AdamW8bit, {"min_8bit_size": 512})):
        model = lk.fuse_lm_head(make_llama(len(tokenizer)))
        optimiser = cls(model.parameters(), lr=3e-3, **more)
        curve = []
        for _ in range(8):
            loss = model(**batch, objective=lk.objectives.nll).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            curve.append(float(loss.detach()))
        curves.append(torch.tensor(curve))
        states.append(optimiser.state[model.get_output_embeddings().weight])
    exact, rounded = curves
    assert states[1]["state1"].dtype == torch.uint8 != states[0]["exp_avg"].dtype
    fallen = exact[0] - exact[-1]
    assert fallen > 0.2 * exact[0] and rounded[0] == exact[0]
    assert 0 < float((rounded - exact).abs().max()) < 0.1 * fallen
