"""The examples inside the trainers that they are for, each skipped where it is not installed.

Run on a CPU, under torch 2.13.0, with verl 0.9.1 (transformers 5.9.0 and 5.23.0) and torchtune
0.6.1 (torchao 0.10.0). None of them is a requirement. The example for torchtitan runs inside
torchtitan by itself: see test_examples.
"""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import ROOT
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.syspath_prepend(str(ROOT / "python" / "examples"))


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], bound: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name, w in want.items():
        assert w.norm() > 0 and (got[name] - w).norm() <= bound * w.norm(), name


def take_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}


def a_lol(logits: Tensor, targets: Tensor, ref_logps: Tensor, advantages: Tensor) -> Tensor:
    """The sum over sequences of -A+ sg[clip(exp(S - S^r))] S, with clip=0.9."""
    mask = targets != -100
    logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    ratio = ((logps - ref_logps).detach() * mask).sum(1).exp().clamp(0.1, 1.9)
    return -(advantages.clamp(min=0) * ratio * (logps * mask).sum(1)).sum()


def test_verls_class_and_ours_take_packed_rows() -> None:
    verls = pytest.importorskip("verl.utils.experimental.torch_functional").FusedLinearForPPO
    from verl_linear import LinearForPPO

    hidden, weight, ids = torch.randn(7, 32), torch.randn(300, 32), torch.randint(300, (7,))
    for rows, labels in ((hidden, ids), (hidden[None], ids[None]), (hidden, ids.int())):
        expected = verls()(rows, weight, labels, temperature=0.7)
        got = LinearForPPO()(rows, weight, labels, temperature=0.7)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("remove_padding", [False, True])
def test_verls_engine_with_our_class(remove_padding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its inputs and outputs of a model, its fused forward, its PPO loss with an entropy bonus."""
    module = pytest.importorskip("verl.utils.experimental.torch_functional")
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from verl.models.transformers.monkey_patch import patch_forward_with_backends
    from verl.utils import tensordict_utils
    from verl.utils.torch_functional import entropy_from_logits
    from verl.workers.config import ActorConfig
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.utils.losses import ppo_loss
    from verl.workers.utils.padding import left_right_2_no_padding
    from verl_linear import LinearForPPO

    class Model(Qwen2ForCausalLM):  # verl replaces the forward of the class
        pass

    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": 300, "intermediate_size": 64, "num_hidden_layers": 2}
    engine = FSDPEngineWithLMHead.__new__(FSDPEngineWithLMHead)  # __init__ wants a GPU
    engine.module = Model(Qwen2Config(**shape))
    engine.use_ulysses_sp = engine.pad_to_length = False
    chunks = {"entropy_checkpointing": False, "entropy_from_logits_with_chunking": False}
    engine.engine_config = SimpleNamespace(**chunks)
    engine.compute_entropy_from_logits = entropy_from_logits
    size = {"rollout_n": 1, "ppo_micro_batch_size_per_gpu": 4}
    config = ActorConfig(strategy="fsdp", entropy_coeff=0.01, **size)
    ids, at = torch.randint(300, (4, 12)), torch.arange(12)
    first, end = torch.tensor([[2, 0, 1, 0], [12, 9, 11, 7]])[..., None]
    attended = (at >= first) & (at < end)
    side = {"old_log_probs": torch.randn(4, 8) * 0.1 - 5.7, "advantages": torch.randn(4, 8)}
    side |= {"attention_mask": attended.long(), "response_mask": attended[:, 4:].long()}
    side |= {"position_ids": (attended.long().cumsum(1) - 1).clamp(min=0)}
    side |= {"prompts": ids[:, :4], "responses": ids[:, 4:]}
    options = {"temperature": 0.7, "calculate_entropy": True, "use_remove_padding": remove_padding}
    options |= {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}

    def step(fused: bool) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        extra = {**options, "use_fused_kernels": fused}
        tensors = tensordict_utils.get_tensordict({"input_ids": ids, **side}, non_tensor_dict=extra)
        batch = left_right_2_no_padding(tensors)
        inputs, arguments = engine.prepare_model_inputs(micro_batch=batch)
        raw = engine.module(**inputs, use_cache=False)
        out = engine.prepare_model_outputs(raw, arguments, batch, None)
        loss, _ = ppo_loss(config, out, batch)
        loss.backward()
        values = {name: value.values() for name, value in out.items()}
        return values, loss.detach(), take_gradients(engine.module)

    _, eager_loss, eager_grads = step(fused=False)
    patch_forward_with_backends(engine.module, True, "torch")
    verls, _, verls_grads = step(fused=True)
    monkeypatch.setattr(module, "FusedLinearForPPO", LinearForPPO)
    ours, loss, grads = step(fused=True)
    torch.testing.assert_close(ours, verls, rtol=0, atol=1e-5)  # masked places and dtypes too
    torch.testing.assert_close(loss, eager_loss, rtol=1e-5, atol=1e-5)
    assert_equal(grads, eager_grads)
    assert_equal(grads, verls_grads)


RECIPE = """
model: {vocab_size: 100, num_layers: 2, num_heads: 4, num_kv_heads: 2, embed_dim: 32}
loss: {_component_: torchtune_loss.LinearALoLLoss}
tokenizer: {_component_: MODULE.tokenizer}
dataset: {_component_: MODULE.dataset}
collate_fn: MODULE.collate
checkpointer:
  _component_: torchtune.training.FullModelTorchTuneCheckpointer
  checkpoint_dir: FOLDER/in
  checkpoint_files: [model.pt]
  output_dir: FOLDER/out
  model_type: LLAMA3
output_dir: FOLDER/out
metric_logger: {_component_: torchtune.training.metric_logging.StdoutLogger}
optimizer: {_component_: torch.optim.SGD, lr: 0.3}
batch_size: 2
gradient_accumulation_steps: 2
epochs: 1
seed: 1
device: cpu
dtype: fp32
max_steps_per_epoch: null
shuffle: false
compile: false
optimizer_in_bwd: false
resume_from_checkpoint: false
"""


def tokenizer() -> Any:
    return SimpleNamespace(pad_id=0)


def dataset(_: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, the reference's log-probs and an advantage."""
    g = torch.Generator().manual_seed(1)
    tokens = [torch.randint(1, 100, (n,), generator=g) for n in (9, 14, 12, 7, 10, 8, 13, 11)]
    scores = [torch.randn(len(t) + 1, generator=g) for t in tokens]
    return [(t, s[1:] / 5 - 4.6, s[0]) for t, s in zip(tokens, scores, strict=True)]


def collate(rows: list[Any], padding_idx: int, ignore_idx: int) -> dict[str, Tensor]:
    tokens, ref_logps, advantages = zip(*rows, strict=True)
    labels = pad_sequence(tokens, True, ignore_idx)
    labels[:, :3] = ignore_idx  # the prompt
    side = {"ref_logps": pad_sequence(ref_logps, True), "advantages": torch.stack(advantages)}
    return {"tokens": pad_sequence(tokens, True, padding_idx), "labels": labels, **side}


@pytest.mark.parametrize("tied", [False, True])
def test_torchtunes_recipe_with_our_loss(tied: bool, tmp_path: Path) -> None:
    """Its full_finetune_single_device, whole: two updates of two batches each, a checkpoint."""
    torchtune = pytest.importorskip("torchtune")
    from omegaconf import OmegaConf
    from torchtune.config import instantiate
    from torchtune_loss import ALoLStep

    path = Path(torchtune.__file__).parents[1] / "recipes" / "full_finetune_single_device.py"
    spec: Any = importlib.util.spec_from_file_location("full_finetune_single_device", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)

    class Recipe(ALoLStep, recipe.FullFinetuneRecipeSingleDevice):
        pass

    text = RECIPE.replace("MODULE", __name__).replace("FOLDER", str(tmp_path))
    config = OmegaConf.create(text)
    llama = {"_component_": "torchtune.models.llama3.llama3", "max_seq_len": 64}
    qwen = {"_component_": "torchtune.models.qwen2.qwen2", "tie_word_embeddings": True}
    config.model |= llama | qwen | {"intermediate_dim": 64} if tied else llama
    eager = instantiate(config.model)
    start = {name: value.clone() for name, value in eager.state_dict().items()}
    (tmp_path / "in").mkdir()
    torch.save(start, tmp_path / "in" / "model.pt")
    trained = Recipe(config)
    trained.setup(config)
    trained.train()

    optimizer, rows = torch.optim.SGD(eager.parameters(), lr=0.3), dataset(None)
    for update in (rows[:4], rows[4:]):
        batch = collate(update, 0, -100)
        targets, logits = batch["labels"][:, 1:], eager(batch["tokens"])[:, :-1]
        loss = a_lol(logits, targets, batch["ref_logps"][:, 1:], batch["advantages"])
        (loss / (targets != -100).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    want = {name: value - start[name] for name, value in eager.state_dict().items()}
    (saved,) = (tmp_path / "out" / "epoch_0").glob("model*")
    weights = torch.load(saved, weights_only=True)
    assert_equal({name: value - start[name] for name, value in weights.items()}, want, 1e-4)
