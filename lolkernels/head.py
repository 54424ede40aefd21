"""The language-model head as a module: per-token log-probs, or a whole loss, instead of logits.

PEFT's layers are known by their parts, so that nothing of it is imported.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .logprob import linear_logprob
from .loss import linear_loss
from .objectives import Objective
from .sequences import Sequences

ROWS = 2048  # of a weight that are widened at a time


class LogprobHead(nn.Module):
    """A linear head that scores labels without holding logits.

    ``head(hidden)`` gives logits, as ``nn.Linear`` does. ``head(hidden, labels)`` gives
    :func:`lolkernels.linear_logprob`'s output, and
    ``head(hidden, labels, seq, objective=..., **side)`` :func:`lolkernels.linear_loss`'s.

    Args:
        linear: the layer whose ``weight`` (V, D) and ``bias`` are used, with PEFT's adapters on it
            (see :func:`operands`); its parameters are shared.
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
        seq: Sequences | Tensor | None = None,
        *,
        objective: Objective | None = None,
        group_size: int | None = None,
        **options: Any,
    ) -> Any:
        """See the class. ``seq`` may be a (B, T) mask: each row is a sequence, ``group_size`` of
        them (1) form a group, as in :meth:`lolkernels.Sequences.from_mask`."""
        if labels is None:
            if seq is not None or objective is not None or group_size is not None or options:
                raise ValueError("labels is missing: scoring and losses need it")
            return scaled_logits(self.linear(hidden), self.options)
        if isinstance(seq, Tensor):
            seq = Sequences.from_mask(seq, group_size=1 if group_size is None else group_size)
        elif group_size is not None and (seq is None or seq.group_size != group_size):
            raise ValueError(
                f"group_size={group_size} groups the rows of a (B, T) mask given as seq; give it "
                "to the constructor of a Sequences instead"
            )
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
    main_grad: bool = False,
    **options: Any,
) -> Any:
    """The head's result without logits; reads its :func:`operands`."""
    hidden, weight, bias, low_rank = operands(linear, hidden)
    own: dict[str, Any] = {"bias": bias, "low_rank": low_rank}
    if main_grad and torch.is_grad_enabled():
        own["accumulate_into"] = getattr(weight, "main_grad", None)
        if own["accumulate_into"] is None:
            raise ValueError(
                "the head's weight has no main_grad: give it one, such as torch.zeros_like(weight, "
                "dtype=torch.float32), or leave main_grad out"
            )
    for name in own.keys() & options.keys():
        raise TypeError(
            f"{name} is the head's own: leave it out, or call linear_logprob or linear_loss with "
            "the head's weight"
        )
    if objective is None:
        return linear_logprob(hidden, weight, labels, **own, **options)
    if seq is None:
        raise ValueError("seq is missing: an objective needs to know the sequences")
    return linear_loss(
        objective, hidden, weight, labels, seq, return_outputs=True, **own, **options
    )


# --- the layer ------------------------------------------------------------------------------------


class Operands(NamedTuple):
    """logits = hidden weight^T + low up^T + bias."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    low_rank: tuple[Tensor, Tensor] | None = None  # low (..., r), up (V, r)


def operands(layer: Any, hidden: Tensor) -> Operands:
    """What a linear layer multiplies and adds, with the adapters that PEFT has put on it.

    LoRA's W x + b + s B A drop(x) is a low-rank part, low = s A drop(x) and up = B: two skinny
    products, and W is read only. DoRA scales the rows of [W, B], which multiply [x, low], to the
    lengths that it learns; trained tokens are other rows of W. Each call of these two copies W
    (DoRA: in the adapter's dtype), and to train them costs what it costs to train W: three GEMMs,
    of D + r columns, and a gradient of W's size. Autograd carries it on.

    Raises:
        ValueError: DoRA beside another adapter, or with dropout while training.
    """
    parts = layer._modules
    if "token_adapter" in parts:  # trainable_token_indices
        return operands(parts["token_adapter"], hidden)
    if "modules_to_save" in parts:
        active = [] if layer.disable_adapters else layer.active_adapters
        return operands(
            layer.modules_to_save[active[0]] if active else layer.original_module, hidden
        )
    if "base_layer" not in parts:
        return Operands(hidden, layer.weight, getattr(layer, "bias", None))
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its own forward does
    base = operands(layer.base_layer, hidden)
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return base
    if "lora_A" not in parts:
        # Its own forward leaves the bias out.
        return Operands(hidden, layer.get_merged_weights(layer.active_adapters), None)
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    return _with_lora(layer, active, base) if active else base


def _with_lora(layer: Any, active: list[str], base: Operands) -> Operands:
    x, weight, bias, _ = base
    if not is_materialised(weight):
        raise ValueError(
            "the head's weight is not gathered beneath its adapter (as in ZeRO-3): take lm_head "
            "out of target_modules, or shard with FSDP2"
        )
    inputs, columns = [], []
    for name in active:
        a, b, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        low = a(layer.lora_dropout[name](x.to(a.weight.dtype)))
        inputs.append((scale * low).to(x.dtype))
        columns.append(b.weight.to(weight.dtype))
        if b.bias is not None:
            bias = scale * b.bias if bias is None else bias + scale * b.bias
    low, up = torch.cat(inputs, -1), torch.cat(columns, 1)
    if not any(name in layer.lora_variant for name in active):
        return Operands(x, weight, bias, (low, up))
    if len(active) > 1:
        raise ValueError(
            f"the head carries DoRA beside another adapter ({', '.join(active)}): activate one"
        )
    dropout = layer.lora_dropout[active[0]]
    if layer.training and not isinstance(dropout, nn.Identity):
        raise ValueError("the head carries DoRA with dropout: set lora_dropout=0")
    with torch.no_grad():
        rows = zip(torch.split(base.weight, ROWS), torch.split(b.weight, ROWS), strict=True)
        length = torch.cat([(w + scale * (r @ a.weight)).norm(dim=1) for w, r in rows])
    x, weight = torch.cat([x, low], -1), torch.cat([weight, up], 1)
    return Operands(x, weight * (layer.lora_magnitude_vector[name].weight / length)[:, None], bias)


def check_linear(linear: Any) -> None:
    """Refuse what is not x W^T + b with a floating (V, D) weight, or an adapter on that."""
    linear = _beneath(linear)
    weight = getattr(linear, "weight", None)
    if not isinstance(linear, nn.Module) or not isinstance(weight, Tensor):
        raise TypeError(f"the head must be a linear layer with a weight, got {type(linear)}")
    problem = None
    if not weight.is_floating_point():
        problem = f"its weight is {weight.dtype}: dequantise it"
    elif type(linear).forward is not nn.Linear.forward:
        problem = _unlike_a_linear_layer(linear, weight)
    if problem is not None:
        raise TypeError(
            f"the head must be a linear layer, logits = x W^T + b with W of shape (V, D); this "
            f"{type(linear).__name__} is none: {problem}"
        )


def _beneath(layer: Any) -> Any:
    """The layer that holds the weight, beneath the adapters that :func:`operands` knows."""
    parts = getattr(layer, "_modules", {})
    if "token_adapter" in parts:
        return _beneath(parts["token_adapter"])
    if "modules_to_save" in parts:
        return _beneath(layer.original_module)  # the others are copies of it
    if "base_layer" not in parts:
        return layer
    lora = isinstance(parts.get("lora_A"), nn.ModuleDict)  # AdaLoRA's are parameters
    variants = [type(v).__name__ for v in layer.lora_variant.values()] if lora else []
    known = lora or hasattr(layer, "get_merged_weights")
    if not known or any("Dora" not in name for name in variants):
        raise ValueError(
            f"the head carries an adapter ({', '.join([type(layer).__name__, *variants])}) that "
            "reading its weight would leave out (LoRA, DoRA, modules_to_save and "
            "trainable_token_indices are read): take lm_head out of its targets, or merge it"
        )
    return _beneath(layer.base_layer)


def _unlike_a_linear_layer(linear: nn.Module, weight: Tensor) -> str | None:
    """What tells a layer with a forward of its own from a linear one, on one row; None if equal."""
    # An adapter that starts at zero gives the same at first, and would be left out from then on.
    others = {name for name, _ in linear.named_parameters()} - {"weight", "bias"}
    if others:
        return f"it has further parameters, {', '.join(sorted(others))}"
    if not is_materialised(weight):
        return None
    if weight.dim() != 2:
        return f"its weight has shape {tuple(weight.shape)}"
    x = torch.linspace(-1.0, 1.0, weight.shape[1], device=weight.device).to(weight.dtype)[None]
    with torch.no_grad():
        want = nn.functional.linear(x, weight, getattr(linear, "bias", None))
        try:
            got = linear.forward(x)
        except Exception as error:
            return f"it does not take x of shape (1, {weight.shape[1]}): {error}"
    if not isinstance(got, Tensor) or got.shape != want.shape or not close(got, want):
        return "its forward gives something else"
    return None


def is_materialised(parameter: Tensor) -> bool:
    """False where values are elsewhere: on the meta device, in a DTensor, or in ZeRO-3's shards."""
    return not (
        parameter.is_meta or parameter.numel() == 0 or type(parameter).__name__ == "DTensor"
    )


def close(got: Tensor, want: Tensor) -> bool:
    """Equal up to one rounding of their dtype, relative to the largest value."""
    tolerance = max(torch.finfo(got.dtype).eps, torch.finfo(want.dtype).eps, 1e-5)
    difference = (got.double() - want.double()).abs().max()
    return bool(difference <= tolerance * want.abs().max().double() + 1e-12)
