"""A loss on hidden states inside torchtitan, whose trainer hands it the head.

    torchrun --nproc-per-node 2 python/examples/torchtitan_loss.py

For torchtitan 0.3.0: ``ALoLTrainer.Config(loss=LinearALoLLoss.Config(), ...)`` without a validator
and with ``training.disable_cuda_graphs``, and ``ref_logps`` and ``advantages`` beside ``input`` in
what the data loader yields. A row of the batch is one sequence: no packing, no context, tensor or
pipeline parallelism.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.loss import IGNORE_INDEX, ChunkedLossWrapper
from torchtitan.config import CompileConfig
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry
from torchtitan.trainer import Trainer

import lolkernels as lk


class LinearALoLLoss(ChunkedLossWrapper):
    """A-LoL over the tokens of the update. The trainer hands the head to a ChunkedLossWrapper only.

    ``pred`` is (B, T, D), the hidden states; ``labels`` and ``ref_logps`` are (B, T), shifted;
    ``advantages`` is (B,).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        clip: float = 0.9

    def __init__(self, config: Config, **options: Any) -> None:
        super().__init__(config, **options)
        self.clip = config.clip

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        *,
        ref_logps: Tensor,
        advantages: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        seq = lk.Sequences.from_mask(labels != IGNORE_INDEX)
        if global_valid_tokens is not None:
            seq = seq.with_totals(num_tokens=float(global_valid_tokens))
        head = lk.LogprobHead(self.lm_head)

        def forward(hidden: Tensor) -> Tensor:
            return head(
                hidden,
                labels,
                seq,
                objective=lk.objectives.a_lol,
                reduction="sum" if global_valid_tokens is None else "token-mean",
                ref_logps=ref_logps,
                advantages=advantages,
                clip=self.clip,
            ).loss

        # A call of the layer itself, since FSDP gathers its weight and reduces the gradient there.
        own = vars(self.lm_head).pop("forward", None)  # torchtitan's, where it parallelizes
        self.lm_head.forward = forward
        try:
            return self.lm_head(pred), {}
        finally:
            del self.lm_head.forward
            if own is not None:
                self.lm_head.forward = own


class ALoLTrainer(Trainer):
    """Passes the side inputs to the loss in place of the model."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

    def __init__(self, config: Config) -> None:
        for kind in ("context", "tensor", "pipeline"):  # these split sequences, or the head
            if getattr(config.parallelism, f"{kind}_parallel_degree") > 1:
                raise ValueError(f"{kind}_parallel_degree > 1 is not supported by this loss")
        super().__init__(config)

    def _forward_backward_body(
        self,
        inputs: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor,
        extra_kwargs: dict[str, Any],
    ) -> Tensor:
        side = {k: extra_kwargs.pop(k) for k in ("ref_logps", "advantages")}
        with self.train_context():
            hidden = self.model_parts[0](inputs, **extra_kwargs)
            loss, _ = self.loss_fn(hidden, labels, global_valid_tokens, **side)
            loss.backward()
        return loss


def main() -> None:
    torch.manual_seed(0)
    config = model_registry("debugmodel").model
    del config.layers[2:]
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()  # runs on a CPU
    model = config.build()
    model.init_weights()
    tokens = torch.randint(config.vocab_size, (4, 17))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
    labels[:, :5] = labels[0, -3:] = IGNORE_INDEX  # prompts and padding
    mask, advantages = labels != IGNORE_INDEX, torch.tensor([1.0, -1.0, 0.5, 2.0])

    # A-LoL: - A+ sg[clip(exp(S - S^r))] S
    logps = model(inputs).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    ref_logps = logps.detach() - 0.01
    ratio = ((logps - ref_logps).detach() * mask).sum(1).exp().clamp(0.1, 1.9)
    want = -(advantages.clamp(min=0) * ratio * (logps * mask).sum(1)).sum() / mask.sum()
    eager = torch.autograd.grad(want, list(model.parameters()))

    # What the trainer's __init__ does, all of which needs a GPU.
    trainer = ALoLTrainer.__new__(ALoLTrainer)
    trainer.model_parts, trainer.train_context = [model], nullcontext
    trainer.loss_fn = LinearALoLLoss.Config().build(compile_config=CompileConfig())
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",))
    options = {"pp_enabled": False, "reshard_after_forward_policy": "always"}
    apply_fsdp_to_decoder(model, mesh, torch.float32, torch.float32, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    trainer.loss_fn.set_lm_head(model.lm_head)
    model._skip_lm_head = True

    # One update, of a batch a sequence.
    loss = torch.zeros(())
    for row in range(rank, len(tokens), ranks):
        one = slice(row, row + 1)
        side = {"ref_logps": ref_logps[one], "advantages": advantages[one]}
        loss += trainer._forward_backward_body(inputs[one], labels[one], mask.sum(), side).detach()
    dist.all_reduce(loss)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
    for parameter, grad in zip(model.parameters(), eager, strict=True):
        assert (parameter.grad.full_tensor() - grad).norm() <= 1e-5 * grad.norm()
    if rank == 0:
        print(f"loss {loss.item():.4f} and all gradients equal the eager ones")
    dist.barrier()
    time.sleep(0.2)  # gloo's threads drop their tensors: while Python ends that would abort
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
