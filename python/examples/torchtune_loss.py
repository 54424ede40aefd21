"""A loss on hidden states for torchtune's recipes, which is handed the output projection.

    python python/examples/torchtune_loss.py

For torchtune 0.6.1, whose recipes give a loss the logits and the labels alone: mix ``ALoLStep``
into a single-device recipe (full or LoRA), name this loss in the configuration, and let the
``collate_fn`` put ``ref_logps`` (B, T) and ``advantages`` (B,) beside the labels:

    class Recipe(ALoLStep, FullFinetuneRecipeSingleDevice): ...
"""

from typing import Any

import torch
from torch import Tensor, nn

import lolkernels as lk


class LinearALoLLoss(nn.Module):
    """A-LoL of the completion tokens; targets of ``ignore_index`` (prompt, padding) do not count.

    Args:
        clip: eps of the ratio's bounds. ignore_index: of targets that are left out.
        reduction: the recipe multiplies the loss by the number of tokens of its batch and divides
            the gradients by that of the update, which undoes the mean over tokens and no other.
    """

    def __init__(
        self, clip: float | None = 0.9, ignore_index: int = -100, reduction: str = "token-mean"
    ) -> None:
        super().__init__()
        self.clip, self.ignore_index, self.reduction = clip, ignore_index, reduction
        self.head: lk.LogprobHead | None = None

    def set_model_output(self, model: Any) -> None:
        """From here on the model returns its final hidden states."""
        model.unembed = lambda hidden: model.norm(hidden)
        output = model.output
        if not isinstance(output, nn.Module):  # TiedLinear: the embedding's weight
            weight = output.tied_module.weight
            output = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
            output.weight = weight
        self.head = lk.LogprobHead(output)

    def forward(
        self,
        outputs: Tensor,  # (B, T, D), the hidden states
        targets: Tensor,  # (B, T), shifted: targets[:, t] is predicted by outputs[:, t]
        ref_logps: Tensor,  # (B, T), the reference's, at the places of the targets
        advantages: Tensor,  # (B,)
    ) -> Tensor:
        assert self.head is not None, "call set_model_output(model) first"
        return self.head(
            outputs,
            targets,
            targets != self.ignore_index,
            objective=lk.objectives.a_lol,
            reduction=self.reduction,
            ref_logps=ref_logps,
            advantages=advantages,
            clip=self.clip,
        ).loss


class ALoLStep:
    """Two methods of a recipe: the model is handed over once, the side inputs at every step."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self._loss_fn.set_model_output(self._model)

    def _loss_step(self, batch: dict[str, Tensor]) -> Tensor:
        labels, ref_logps = batch.pop("labels"), batch.pop("ref_logps")  # at their own tokens
        advantages = batch.pop("advantages")
        with self.activations_handling_ctx:
            hidden = self._model(**batch)
        return self._loss_fn(hidden[:, :-1], labels[:, 1:], ref_logps[:, 1:], advantages)


class TinyDecoder(nn.Module):
    """Stands for a torchtune decoder: ``unembed`` applies ``norm`` and ``output``."""

    def __init__(self, vocab: int = 50, width: int = 16) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab, width)
        self.layer = nn.GRU(width, width, batch_first=True)
        self.norm = nn.RMSNorm(width)
        self.output = nn.Linear(width, vocab, bias=False)

    def unembed(self, hidden: Tensor) -> Tensor:
        return self.output(self.norm(hidden)).float()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.layer(self.tok_embeddings(tokens))[0])


def main() -> None:
    torch.manual_seed(0)
    model, tokens = TinyDecoder(), torch.randint(50, (8, 11))
    targets = tokens[:, 1:].clone()
    targets[:, :3] = -100  # the prompt
    advantages = torch.linspace(-1, 1, 8)
    with torch.no_grad():
        logps = model(tokens[:, :-1]).log_softmax(-1)
        ref_logps = logps.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    loss_fn = LinearALoLLoss()
    loss_fn.set_model_output(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = loss_fn(model(tokens[:, :-1]), targets, ref_logps, advantages)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # The policy starts as the reference: every ratio is one.
    kept = targets != -100
    first = -(advantages.clamp(min=0) * (ref_logps * kept).sum(1)).sum() / kept.sum()
    torch.testing.assert_close(losses[0], first.item(), rtol=1e-5, atol=1e-5)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
