"""The language-model head as a module: per-token log-probs, or a whole loss, instead of logits.

``fuse_lm_head`` works on the instance of any causal LM with ``get_output_embeddings()`` and a
backbone whose first output is the last hidden state. The head is called *as a module* inside the
model's forward, so that whatever wraps it (FSDP2, ZeRO-3, DDP, PEFT hooks) gathers its weight.
"""

from __future__ import annotations

import functools
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .functional import linear_logprob, linear_loss
from .objectives import Objective, side_inputs
from .sequences import Sequences

# Factors on the logits, by the names model configurations give them.
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping",)
TRAINING_COLUMNS = ("ref_logps", "old_logps", "advantages", "rewards", "labels")


class FusedOutput(NamedTuple):
    """What a fused model returns; per-token tensors are packed, in the order of ``seq``."""

    loss: Tensor | None  # () with an objective
    seq_loss: Tensor | None  # (S,) with an objective, detached
    logps: Tensor  # (N,), differentiable only without an objective; so are the next two
    lse: Tensor  # (N,)
    entropy: Tensor  # (N,)
    max_logit: Tensor  # (N,)
    seq: Sequences


class LogprobHead(nn.Module):
    """A linear head that scores labels without holding logits.

    ``head(hidden)`` gives logits, as ``nn.Linear`` does. ``head(hidden, labels)`` gives
    :func:`lolkernels.linear_logprob`'s output, and
    ``head(hidden, labels, seq, objective=..., **side)`` :func:`lolkernels.linear_loss`'s.

    Args:
        linear: the layer whose ``weight`` (V, D) and ``bias`` are used; its parameters are shared.
        softcap, logit_scale: of the model, see :func:`lolkernels.linear_logprob`.
        backend, memory_budget: as there.
    """

    def __init__(
        self,
        linear: nn.Module,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        backend: str | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__()
        check_linear(linear)
        self.linear = linear
        self.options: dict[str, Any] = {
            "softcap": softcap,
            "logit_scale": logit_scale,
            "backend": backend,
            "memory_budget": memory_budget,
        }

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        seq: Sequences | None = None,
        *,
        objective: Objective | None = None,
        **options: Any,
    ) -> Any:
        if labels is None:
            if seq is not None or objective is not None or options:
                raise ValueError("labels is missing: scoring and losses need it")
            return scaled_logits(self.linear(hidden), self.options)
        return fused_head(
            self.linear, hidden, labels, seq, objective=objective, **self.options, **options
        )


def scaled_logits(logits: Tensor, options: dict[str, Any]) -> Tensor:
    logits = logits * options["logit_scale"]
    cap = options["softcap"]
    return logits if cap is None else cap * torch.tanh(logits / cap)


def fused_head(
    linear: Any,
    hidden: Tensor,  # (..., D)
    labels: Tensor,  # (...)
    seq: Sequences | None = None,
    *,
    objective: Objective | None = None,
    **options: Any,
) -> Any:
    """The head's result without logits; reads ``linear.weight`` and ``linear.bias``."""
    if objective is None:
        return linear_logprob(
            hidden, linear.weight, labels, bias=getattr(linear, "bias", None), **options
        )
    if seq is None:
        raise ValueError("seq is missing: an objective needs to know the sequences")
    return linear_loss(
        objective,
        hidden,
        linear.weight,
        labels,
        seq,
        bias=getattr(linear, "bias", None),
        return_outputs=True,
        **options,
    )


def check_linear(linear: Any) -> None:
    if hasattr(linear, "base_layer") or hasattr(linear, "original_module"):
        raise ValueError(
            "the head carries an adapter (LoRA or modules_to_save), which reading its weight would "
            "leave out: take lm_head out of target_modules and modules_to_save, or merge it"
        )
    if not isinstance(getattr(linear, "weight", None), Tensor):
        raise TypeError(f"the head must be a linear layer with a weight, got {type(linear)}")


# --- any causal LM --------------------------------------------------------------------------------


def fuse_lm_head(
    model: Any, *, backend: str | None = None, memory_budget: int | None = None
) -> Any:
    """Let a causal LM score completions, or compute a whole loss, without materialising logits.

    Patches ``forward`` of this model and of its head, on the instance, and returns the model.
    Afterwards

        out = model(input_ids, attention_mask=..., completion_mask=mask)      # .logps (N,), .seq
        out = model(..., completion_mask=mask, objective=a_lol, ref_logps=r, advantages=a)  # .loss

    ``completion_mask[b, t]`` marks ``input_ids[b, t]`` as a token to score (t >= 1), predicted by
    position t - 1. Per-token side inputs are ``(N,)`` packed in that order, or ``(B, T)``. Further
    keywords: ``reduction``, ``temperature``, and ``totals=(num_sequences, num_tokens)`` for the
    denominators of a larger update. A call without ``completion_mask`` does what it did before:
    generation is unchanged. The result is a :class:`FusedOutput`.

    A logit soft-cap or scale is read from the model's configuration. PEFT models are patched
    inside.

    Raises:
        TypeError: no causal LM.
        ValueError: the head carries an adapter.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    linear = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if linear is None or not hasattr(inner, "base_model") or inner.base_model is inner:
        raise TypeError(
            f"model must be a causal LM with a backbone and a head, got {type(model).__name__}"
        )
    check_linear(linear)
    inner._fused_options = {
        **_logit_options(inner),
        "backend": backend,
        "memory_budget": memory_budget,
    }
    if not hasattr(inner, "_unfused_forward"):
        inner._unfused_forward = inner.forward
        inner.forward = types.MethodType(_model_forward(type(inner)), inner)  # type: ignore[arg-type]
    if not hasattr(linear, "_unfused_forward"):
        linear._unfused_forward = linear.forward
        linear.forward = types.MethodType(_linear_forward, linear)
    return model


def _logit_options(model: Any) -> dict[str, Any]:
    config = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config

    def read(names: tuple[str, ...]) -> list[float]:
        found = [getattr(config, name, None) for name in names]
        return [float(value) for value in found if value is not None]

    scale = 1.0
    for factor in read(MULTIPLIERS):
        scale *= factor
    for divisor in read(DIVISORS):
        scale /= divisor
    return {"softcap": next(iter(read(SOFTCAPS)), None), "logit_scale": scale}


def _linear_forward(
    self: Any, hidden: Tensor, labels: Tensor | None = None, *args: Any, **kw: Any
) -> Any:
    if labels is None:
        return self._unfused_forward(hidden, *args, **kw)
    return fused_head(self, hidden, labels, *args, **kw)


@functools.lru_cache(maxsize=64)
def _model_forward(cls: type) -> Any:
    """A forward with the signature of ``cls.forward``, which generation and trainers inspect."""

    @functools.wraps(cls.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, completion_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if completion_mask is None:
            return self._unfused_forward(*args, **kwargs)
        return _scored(self, completion_mask, *args, **kwargs)

    return forward


def _scored(
    self: Any,
    completion_mask: Tensor,
    input_ids: Tensor | None = None,
    *,
    objective: Objective | None = None,
    reduction: str = "seq-mean",
    totals: tuple[float, float] | None = None,
    temperature: float = 1.0,
    **kwargs: Any,
) -> FusedOutput:
    linear = self.get_output_embeddings()
    if not hasattr(linear, "_unfused_forward"):
        check_linear(linear)
        raise ValueError("the model's head was replaced after fuse_lm_head: call it again")
    if input_ids is None:
        raise ValueError("input_ids is missing: the labels are read from it")
    if getattr(self.config, "output_router_logits", False):
        raise ValueError(
            "output_router_logits adds a load-balancing loss that the fused head does not compute: "
            "set model.config.output_router_logits = False"
        )
    options: dict[str, Any] = {**self._fused_options, "temperature": temperature}
    if objective is not None:
        options.update({k: kwargs.pop(k) for k in side_inputs(objective) if k in kwargs})
        options["reduction"] = reduction
    kwargs = {k: v for k, v in kwargs.items() if v is not None}  # PEFT passes labels=None and more
    for name in TRAINING_COLUMNS:
        if name in kwargs:
            raise TypeError(
                f"{name} is not an input of this objective (labels come from input_ids): "
                "leave it out"
            )
    mask = _predicting(completion_mask, input_ids)
    seq = Sequences.from_mask(mask)
    if totals is not None:
        seq = seq.with_totals(num_sequences=totals[0], num_tokens=totals[1])
    for name, value in options.items():
        if isinstance(value, Tensor) and value.shape == input_ids.shape and value.dim() == 2:
            # A per-token input stands at its token; its logits stand one position earlier.
            options[name] = value.roll(-1, 1)
    kwargs.setdefault("use_cache", False)
    hidden = self.base_model(input_ids=input_ids, **kwargs)[0]
    packed, labels = seq.pack(hidden), seq.pack(input_ids.roll(-1, 1))
    if objective is None:
        scored = linear(packed, labels, **options)
        return FusedOutput(loss=None, seq_loss=None, seq=seq, **scored._asdict())
    scored = linear(packed, labels, seq, objective=objective, **options)
    return FusedOutput(seq=seq, **scored._asdict())


def _predicting(completion_mask: Any, input_ids: Tensor) -> Tensor:
    """completion_mask moved to the positions whose hidden states predict those tokens."""
    if not isinstance(completion_mask, Tensor) or completion_mask.shape != input_ids.shape:
        got = getattr(completion_mask, "shape", type(completion_mask).__name__)
        raise ValueError(
            f"completion_mask must be a bool tensor of input_ids' shape "
            f"{tuple(input_ids.shape)}, got {got}"
        )
    mask = completion_mask.bool()
    if bool(mask[:, 0].any()):
        raise ValueError(
            "completion_mask marks position 0, which nothing predicts: start the sequence with a "
            "prompt or BOS token"
        )
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
