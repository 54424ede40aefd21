"""A loss object that is handed the output projection, as torchtune's recipes do it.

    python python/examples/torchtune_loss.py

torchtune's recipes build the loss from the configuration, call ``set_model_output(model)`` once and
then ``loss(outputs, targets)``, where ``outputs`` are hidden states because the model skips its
output layer. Advantages and reference log-probs travel beside the targets.
"""

from typing import Any

import torch
from torch import Tensor, nn

import lolkernels as lk


class LinearALoLLoss(nn.Module):
    """A-LoL of the completion tokens; targets of ``ignore_index`` (prompt, padding) do not count.

    Args:
        clip: eps of the ratio's bounds. ignore_index: of targets that are left out.
    """

    def __init__(self, clip: float | None = 0.9, ignore_index: int = -100) -> None:
        super().__init__()
        self.clip, self.ignore_index = clip, ignore_index
        self.linear_projection: nn.Linear | None = None

    def set_model_output(self, model: Any) -> None:
        model.skip_output_layer = True
        self.set_lm_head(model.output)

    def set_lm_head(self, lm_head: nn.Linear) -> None:
        """torchtitan's way, which hands over the layer."""
        self.linear_projection = lm_head

    def forward(
        self,
        outputs: Tensor,  # (B, T, D), the hidden states
        targets: Tensor,  # (B, T), shifted: targets[:, t] is predicted by outputs[:, t]
        ref_logps: Tensor,  # (B, T), the reference's, at the places of the targets
        advantages: Tensor,  # (B,)
    ) -> Tensor:
        assert self.linear_projection is not None, "call set_model_output(model) first"
        return lk.linear_loss(
            lk.objectives.a_lol,
            outputs,
            self.linear_projection.weight,
            targets,
            lk.Sequences.from_mask(targets != self.ignore_index),
            ref_logps=ref_logps,
            advantages=advantages,
            clip=self.clip,
        )


class TinyDecoder(nn.Module):
    """Stands for a torchtune decoder: an ``output`` layer, and the flag that skips it."""

    def __init__(self, vocab: int = 50, width: int = 16) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab, width)
        self.layer = nn.GRU(width, width, batch_first=True)
        self.output = nn.Linear(width, vocab, bias=False)
        self.skip_output_layer = False

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.layer(self.tok_embeddings(tokens))[0]
        return hidden if self.skip_output_layer else self.output(hidden)


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
    first = -(advantages.clamp(min=0) * (ref_logps * (targets != -100)).sum(1)).mean()
    torch.testing.assert_close(losses[0], first.item(), rtol=1e-5, atol=1e-5)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
