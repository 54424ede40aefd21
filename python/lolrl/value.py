"""The value head: V(x), the reward the frozen reference expects to earn on a prompt.

A-LoL's advantage is A = R - V(x) (Baheti et al., ICLR 2024, section 3). The head reads the
reference's last-layer states of the prompt, which are computed once: the model itself never trains.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lolrl.cache import tensors_digest
from lolrl.config import ValueConfig, from_mapping
from lolrl.data import Text
from lolrl.files import canonical_json, write_atomic
from lolrl.tokens import encode_prompt

FORMAT = "lolrl.value_head.1"


class ValueHead(nn.Module):
    """V = low + (high - low) * sigmoid(w . attention(q, states, states) + b).

    One learned query attends over the prompt's states with `num_heads` heads; padding is masked.
    Dropout acts on the states in training mode only.

    Args:
        hidden_size: D, width of the states.
        config: shape of the head; `min_value` (low) and `max_value` (high) must be set.

    Raises:
        ValueError: if `num_heads` does not divide `hidden_size`, or the range is not set.
    """

    def __init__(self, hidden_size: int, config: ValueConfig) -> None:
        super().__init__()
        if hidden_size % config.num_heads:
            raise ValueError(
                f"num_heads={config.num_heads} does not divide the hidden size {hidden_size}; "
                "choose a divisor"
            )
        if config.min_value is None or config.max_value is None:
            raise ValueError(
                "min_value and max_value must be set; fit_value_head takes the rewards'"
            )
        self.hidden_size, self.config = hidden_size, config
        self.dropout = nn.Dropout(config.dropout)
        self.query = nn.Parameter(torch.randn(1, 1, hidden_size) / math.sqrt(hidden_size))
        self.attention = nn.MultiheadAttention(hidden_size, config.num_heads, batch_first=True)
        self.linear = nn.Linear(hidden_size, 1)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:  # (B, T, D), (B, T) bool -> (B,)
        """Values in the reward's unit; `mask` is True at the prompt's tokens, one at least."""
        states = self.dropout(hidden)
        query = self.query.expand(len(hidden), -1, -1)
        pooled, _ = self.attention(
            query, states, states, key_padding_mask=~mask, need_weights=False
        )
        low, high = self.config.min_value, self.config.max_value
        assert low is not None and high is not None
        return low + (high - low) * torch.sigmoid(self.linear(pooled).flatten())

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `value_head.safetensors`, weights and configuration in one file, atomically."""
        about = {
            "format": FORMAT,
            "hidden_size": str(self.hidden_size),
            "config": canonical_json(dataclasses.asdict(self.config)),
        }
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        about["sha256"] = tensors_digest(state)
        return write_atomic(
            Path(folder) / "value_head.safetensors", safetensors.torch.save(state, about)
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ValueHead:
        """The head written by `save`, in eval mode.

        Raises:
            ValueError: if the file is missing, torn, or not a value head.
        """
        path = Path(folder) / "value_head.safetensors"
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about.get("format") != FORMAT:
                raise ValueError("it is not a value head")
            if tensors_digest(state) != about["sha256"]:
                raise ValueError("its weights do not match their SHA-256")
            config = from_mapping(ValueConfig, json.loads(about["config"]), source=str(path))
            head = cls(int(about["hidden_size"]), config)
            head.load_state_dict(state)
        except (OSError, KeyError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"{path}: cannot be loaded ({error}); fit the value head again"
            ) from error
        return head.eval()


@dataclass
class ValueReport:
    """How well a value head predicts rewards of prompts that did not train it.

    mse, mse_mean: mean squared error on the held-out prompts of the head, and of the mean reward of
    the training prompts. r2 = 1 - mse / mse_mean. The held-out prompts also chose the epoch, so r2
    is slightly favourable. curve: (epoch, training mse, held-out mse), epoch 0 untrained.
    """

    mse: float
    mse_mean: float
    r2: float
    epoch: int
    num_train: int
    num_held_out: int
    curve: list[tuple[int, float, float]]


@contextmanager
def evaluation_mode(model: nn.Module) -> Any:
    """The model in eval mode without gradients; every module's own mode comes back after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def backbone(model: Any) -> Any:
    """The part of a causal LM below its head, PEFT wrappers included in its layers."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = getattr(inner, "base_model", inner)
    if body is inner:
        raise ValueError(f"model: {type(inner).__name__} has no backbone separate from its head")
    return body


def prompt_states(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    *,
    max_prompt_length: int | None = 512,
    batch_size: int = 32,
) -> list[Tensor]:
    """Last-layer states of each prompt, (T_i, D) float32 on the CPU, computed without gradient."""
    body = backbone(model)
    device = next(model.parameters()).device
    ids = [
        torch.tensor(encode_prompt(tokenizer, p, max_prompt_length=max_prompt_length))
        for p in prompts
    ]
    for index, row in enumerate(ids):
        if not len(row):
            raise ValueError(f"prompts[{index}] has no token; give a prompt that is not empty")
    # Longest first: batches of like length, and memory runs out at once or not at all.
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    states: list[Tensor] = [torch.empty(0)] * len(ids)
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = pad_sequence([ids[i] for i in rows], batch_first=True).to(device)
            lengths = torch.tensor([len(ids[i]) for i in rows], device=device)
            places = torch.arange(batch.shape[1], device=device)
            hidden = body(
                input_ids=batch,
                attention_mask=(places < lengths[:, None]).long(),
                position_ids=places.expand(len(rows), -1),
                use_cache=False,
            ).last_hidden_state
            for row, i in enumerate(rows):
                states[i] = hidden[row, : len(ids[i])].float().cpu()
    return states


def _batch(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(s) for s in states])
    hidden = pad_sequence(list(states), batch_first=True)
    return hidden, torch.arange(hidden.shape[1]) < lengths[:, None]


def _apply(head: ValueHead, states: Sequence[Tensor], batch_size: int) -> Tensor:
    """Values in eval mode, (n,) float64."""
    device = head.query.device
    parts = []
    with evaluation_mode(head):
        for start in range(0, len(states), batch_size):
            hidden, mask = _batch(states[start : start + batch_size])
            parts.append(head(hidden.to(device), mask.to(device)).double().cpu())
    return torch.cat(parts)


def fit_value_head(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    rewards: Sequence[float] | Tensor,
    *,
    config: ValueConfig | None = None,
    max_prompt_length: int | None = 512,
) -> tuple[ValueHead, ValueReport]:
    """Fit V to the rewards of the reference's own responses to validation prompts, by MSE.

    A seeded share `held_out` of the prompts trains nothing and chooses the epoch; the untrained
    head, which predicts the training mean, is a candidate. The result is in eval mode, on the CPU.

    Args:
        model: the frozen reference.  prompts: n of them.  rewards: (n,), in the reward's unit.

    Raises:
        ValueError: fewer than 4 prompts, rewards that are not finite, all equal or out of range.
    """
    config = config or ValueConfig()
    target = torch.as_tensor(rewards, dtype=torch.float64).flatten()
    count = len(target)
    if len(prompts) != count:
        raise ValueError(
            f"rewards has {count} entries for {len(prompts)} prompts; give one for each"
        )
    if count < 4:
        raise ValueError(f"prompts has {count} entries; give at least 4 to fit and to hold out")
    if not bool(torch.isfinite(target).all()):
        raise ValueError(f"rewards[{int((~torch.isfinite(target)).nonzero()[0])}] is not finite")
    low = float(target.min()) if config.min_value is None else config.min_value
    high = float(target.max()) if config.max_value is None else config.max_value
    if not low < high:
        raise ValueError(f"rewards are all {low}; a value head has nothing to fit")
    if float(target.min()) < low or float(target.max()) > high:
        raise ValueError(f"rewards leave [min_value, max_value] = [{low}, {high}]; widen the range")
    config = dataclasses.replace(config, min_value=low, max_value=high)
    states = prompt_states(
        model, tokenizer, prompts, max_prompt_length=max_prompt_length, batch_size=config.batch_size
    )
    # The fit has its own random stream; the caller's goes on as if nothing had happened.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return _fit(states, target, config)


def _fit(
    states: list[Tensor], target: Tensor, config: ValueConfig
) -> tuple[ValueHead, ValueReport]:
    assert config.min_value is not None and config.max_value is not None
    order = torch.randperm(len(target)).tolist()
    held = max(1, round(config.held_out * len(order)))
    held_out, train = order[:held], order[held:]
    mean = float(target[train].mean())
    head = ValueHead(states[0].shape[1], config)
    share = (mean - config.min_value) / (config.max_value - config.min_value)
    with torch.no_grad():
        head.linear.weight.zero_()
        head.linear.bias.fill_(math.log(max(share, 1e-4) / max(1 - share, 1e-4)))
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )

    def mse(rows: list[int]) -> float:
        values = _apply(head, [states[i] for i in rows], config.batch_size)
        return float((values - target[rows]).square().mean())

    curve = [(0, mse(train), mse(held_out))]
    best = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    for epoch in range(1, config.epochs + 1):
        head.train()
        shuffled = [train[i] for i in torch.randperm(len(train)).tolist()]
        for start in range(0, len(shuffled), config.batch_size):
            rows = shuffled[start : start + config.batch_size]
            hidden, mask = _batch([states[i] for i in rows])
            loss = (head(hidden, mask) - target[rows].float()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        held_mse = mse(held_out)
        if held_mse < min(point[2] for point in curve):
            best = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        curve.append((epoch, mse(train), held_mse))
    head.load_state_dict(best)
    head.requires_grad_(False).eval()
    epoch = min(curve, key=lambda point: point[2])[0]
    error = mse(held_out)
    baseline = float((target[held_out] - mean).square().mean())
    r2 = 1 - error / baseline if baseline > 0 else 0.0
    return head, ValueReport(error, baseline, r2, epoch, len(train), held, curve)


def predict_values(
    head: ValueHead,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    *,
    max_prompt_length: int | None = 512,
    batch_size: int = 32,
) -> Tensor:
    """V of each prompt, (n,) float64 on the CPU, in eval mode and without gradient.

    Equal prompts are computed once. `model` is the reference the head was fitted on.
    """
    keys = [canonical_json(prompt) for prompt in prompts]
    unique = dict(zip(keys, prompts, strict=True))
    place = {key: i for i, key in enumerate(unique)}
    parts = []
    distinct = list(unique.values())
    block = 64 * batch_size  # bounds the states held at a time
    for start in range(0, len(distinct), block):
        states = prompt_states(
            model,
            tokenizer,
            distinct[start : start + block],
            max_prompt_length=max_prompt_length,
            batch_size=batch_size,
        )
        parts.append(_apply(head, states, batch_size))
    return torch.cat(parts)[[place[key] for key in keys]]
