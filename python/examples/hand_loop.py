"""A-LoL in a training loop of your own: through the model, and on bare hidden states.

python python/examples/hand_loop.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lolkernels as lk

PROMPT, LENGTH, VOCAB = 3, 12, 64


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


def make_batch(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Rows as they come from a dataset; the reference is the model before training."""
    input_ids = torch.randint(VOCAB, (16, LENGTH))
    mask = torch.zeros(16, LENGTH, dtype=torch.bool)
    mask[:, PROMPT:] = True  # the tokens to score
    rewards = (input_ids[:, PROMPT:] % 2 == 0).float().mean(1)  # likes even tokens
    with torch.no_grad():
        ref_logps = model(input_ids, completion_mask=mask).logps
    return {
        "input_ids": input_ids,
        "completion_mask": mask,
        "ref_logps": ref_logps,  # (N,), packed in the mask's order
        "advantages": rewards - rewards.mean(),
    }


def eager_loss(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same loss as it is usually written, with the logits of every token in memory."""
    logps = model(batch["input_ids"]).logits[:, PROMPT - 1 : -1].float().log_softmax(-1)
    total = logps.gather(-1, batch["input_ids"][:, PROMPT:, None]).sum((1, 2))
    ratio = (total - batch["ref_logps"].view(16, -1).sum(1)).detach().exp().clamp(0.1, 1.9)
    return -(batch["advantages"].clamp(min=0) * ratio * total).mean()


def main() -> None:
    model = lk.fuse_lm_head(make_model())
    batch = make_batch(model)

    # One line of a loop, against the eager loss, and then without a model wrapper.
    loss = model(**batch, objective=lk.objectives.a_lol, clip=0.9).loss
    torch.testing.assert_close(loss, eager_loss(model, batch))
    predicts = batch["completion_mask"][:, 1:]  # position t - 1 predicts token t
    bare = lk.linear_loss(
        lk.objectives.a_lol,
        model.model(batch["input_ids"]).last_hidden_state[:, :-1],
        model.lm_head.weight,
        batch["input_ids"][:, 1:],
        lk.Sequences.from_mask(predicts),
        ref_logps=batch["ref_logps"],
        advantages=batch["advantages"],
        clip=0.9,
    )
    torch.testing.assert_close(bare, loss)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(20):
        out = model(**batch, objective=lk.objectives.a_lol, clip=0.9)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ratio = out.metrics["log_ratio"][batch["advantages"] > 0].mean()
        if step % 5 == 0 or step == 19:
            print(f"step {step}: loss {out.loss:.3f}, log-ratio of good rows {ratio:.3f}")
    assert ratio > 1.0  # the completions with a positive advantage became likelier


if __name__ == "__main__":
    main()
