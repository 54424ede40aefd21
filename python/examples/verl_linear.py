"""verl's fused head, by its call: hidden states and head weight in, log-probs and entropy out.

    python python/examples/verl_linear.py

For verl 0.9.1 with its FSDP engine: these two lines in a module that is named by
actor_rollout_ref.model.external_lib, which every worker imports before it builds its model, and
actor_rollout_ref.model.use_fused_kernels=True (its backend is "torch" unless you choose another):

    import verl.utils.experimental.torch_functional as torch_functional
    torch_functional.FusedLinearForPPO = LinearForPPO

verl looks the class up in that module at every forward.
"""

import torch
from torch import Tensor

import lolkernels as lk


class LinearForPPO(torch.nn.Module):
    """Log-probs and entropy of ``input_ids``, which verl has rolled: row t holds token t + 1.

    Args of the call:
        hidden_states: (B, T, D) or (N, D). vocab_weights: (V, D). input_ids: (B, T) or (N,).
        temperature: divides the logits.

    Returns:
        log_probs, entropy: float32, of input_ids' shape, both differentiable.
    """

    def __init__(
        self, chunk_size: int = 512, impl_backend: str = "torch", entropy_grad: bool = False
    ) -> None:
        super().__init__()  # the first two are verl's; memory_budget decides on blocks here
        # Where entropy_coeff is not 0, functools.partial(LinearForPPO, entropy_grad=True) in its
        # place saves a product. The gradient is the same.
        self.entropy_grad = entropy_grad

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        out = lk.linear_logprob(
            hidden_states,
            vocab_weights,
            input_ids,
            temperature=temperature,
            entropy_grad=self.entropy_grad,
        )
        return out.logps, out.entropy


def policy_loss(log_probs: Tensor, entropy: Tensor) -> Tensor:
    """At ratio one, all advantages one: -mean(ratio) with an entropy bonus."""
    return -(log_probs - log_probs.detach()).exp().mean() - 0.01 * entropy.mean()


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 20, 32, requires_grad=True)
    weight = torch.randn(500, 32, requires_grad=True)
    input_ids = torch.randint(500, (2, 20)).roll(-1, -1)

    logp = ((hidden @ weight.T).float() / 0.7).log_softmax(-1)
    label = logp.gather(-1, input_ids[..., None]).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    fused = LinearForPPO(impl_backend="torch", entropy_grad=True)
    log_probs, own = fused(hidden, weight, input_ids, temperature=0.7)
    torch.testing.assert_close(log_probs, label, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(own, entropy, rtol=1e-4, atol=1e-4)
    inputs = (hidden, weight)
    eager = torch.autograd.grad(policy_loss(label, entropy), inputs)
    grads = torch.autograd.grad(policy_loss(log_probs, own), inputs)
    for got, want in zip(grads, eager, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    print("log-probs, entropies and both gradients equal the eager ones")


if __name__ == "__main__":
    main()
