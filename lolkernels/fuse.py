"""``fuse_lm_head``: a causal LM that scores completions, or computes a whole loss, without logits.

It works on the instance of any model whose own forward calls ``get_output_embeddings()`` once, on
(B, T, D) hidden states (see ``seam``). In a scoring call the head is called *as a module* inside
the model's forward, so that whatever wraps it (FSDP2, ZeRO-3, DDP, PEFT hooks) gathers its weight.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import types
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import seam
from .head import check_linear, fused_head, is_materialised
from .logprob import LogprobOutput
from .loss import LinearLossOutput
from .objectives import Objective, side_inputs
from .sequences import Sequences

OPTIONS = ("objective", "reduction", "totals", "temperature", "group_size", "cu_seqlens")
# What transformers' forwards take through **kwargs, for attention kernels and outputs.
TRANSFORMERS_KEYWORDS = {
    "attention_mask", "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "inputs_embeds",
    "max_length_k", "max_length_q", "output_attentions", "output_hidden_states",
    "output_router_logits", "past_key_values", "position_ids", "return_dict", "seq_idx",
    "token_type_ids", "use_cache",
}  # fmt: skip
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
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
    metrics: dict[str, Tensor]  # what the objective reports, by name
    aux_loss: Tensor | None  # () what a mixture of experts adds for its router, by a coefficient


@dataclasses.dataclass
class Fusion:
    """What a fused model remembers."""

    linear: nn.Module
    places: list[tuple[nn.Module, str]]
    forward: Any  # the function that was put in place of the model's
    names: list[str]  # of the parameters of the model's forward, in order
    takes_any: bool  # it has **kwargs
    options: dict[str, Any]
    check: bool
    checked: bool = False
    called: bool = False
    warned: set[str] = dataclasses.field(default_factory=set)
    reached: bool = False  # by any call of the model
    packs: bool = False  # packed sequences were found to be kept apart
    logit_map: seam.LogitMap | None = None


def fuse_lm_head(
    model: Any,
    *,
    backend: str | None = None,
    memory_budget: int | None = None,
    main_grad: bool = False,
    check: bool = True,
) -> Any:
    """Let a causal LM score completions, or compute a whole loss, without materialising logits.

    Patches ``forward`` of this model and of its head, on the instance, and returns the model.
    Afterwards

        out = model(input_ids, attention_mask=..., completion_mask=mask)      # .logps (N,), .seq
        out = model(..., completion_mask=mask, objective=a_lol, ref_logps=r, advantages=a)  # .loss

    The result is a :class:`FusedOutput`. A call without ``completion_mask`` does what it did
    before: generation is unchanged, and ``labels`` alone give the model's own loss, with a warning
    while training. :func:`unfuse_lm_head` undoes it. The keywords of a call:

    * ``completion_mask[b, t]`` marks ``input_ids[b, t]`` as a token to score (t >= 1), predicted by
      position t - 1. With ``inputs_embeds`` (as under PEFT's prompt tuning) the tokens are given as
      ``labels``, and the mask is about the last of them where it is shorter. An encoder-decoder
      model scores its decoder's tokens: ``labels``, from t = 0.
    * Per-token side inputs are ``(N,)``, packed in the mask's order, or ``(B, T)``.
    * ``reduction``, ``temperature``, and ``group_size``: rows that one loss value couples.
    * ``totals=(num_sequences, num_tokens)``: the denominators of a larger update.
    * ``cu_seqlens`` (S + 1,): S sequences are packed into one row (1, T), without attention_mask.
      position_ids that start again keep them apart, which is tried once.
    * A keyword that neither these, the objective nor the model's forward knows is a TypeError.

    PEFT models are patched inside. LoRA, DoRA, modules_to_save and trainable_token_indices on the
    head are included; each call with LoRA copies the head's weight, and its gradient costs what a
    trained head's does.

    The hidden states are those that the model's own forward gives its head. A factor or a tanh
    soft-cap behind the head is found by observation, and both paths are compared on a few tokens.
    With ``output_router_logits`` (a keyword, or in the configuration) every call's loss has the
    model's ``router_aux_loss_coef * aux_loss`` in it, as that of the model's own forward has.

    Args:
        model: a causal LM, such as transformers' ``AutoModelForCausalLM`` gives, or an
            encoder-decoder model.
        backend, memory_budget: see :func:`lolkernels.linear_logprob`.
        main_grad: the backward adds the head's gradient to its weight's ``main_grad``, as Megatron
            names it (``accumulate_into`` there); a tied embedding's own part stays in ``grad``.
        check: compare the log-probs with those of the model's own logits, within 1e-3 nat: at once,
            and in the first scoring call where the weights are sharded or on the meta device by
            then. One forward of 16 tokens, which leaves modes and random states as they were. False
            skips it.

    Raises:
        TypeError: no causal LM.
        ValueError: the head carries another adapter, or the comparison failed; the model is
            unchanged then.
    """
    inner = _inner(model)
    linear: Any = None
    if hasattr(inner, "get_output_embeddings"):
        linear = inner.get_output_embeddings()
    found = isinstance(inner, nn.Module) and isinstance(linear, nn.Module)
    where = seam.places(inner, linear) if found else []
    if not where or not hasattr(inner, "config"):
        raise TypeError(f"model must be a causal LM with a head, got {type(model).__name__}")
    check_linear(linear)
    options = {"backend": backend, "memory_budget": memory_budget, "main_grad": main_grad}
    previous = getattr(inner, "_fusion", None)
    if previous is not None and previous.linear is not linear:
        unfuse_lm_head(model)
        previous = None
    forward = _model_forward(type(inner)) if previous is None else previous.forward
    kinds = {p.name: p.kind for p in inspect.signature(type(inner).forward).parameters.values()}
    names = [name for name, kind in list(kinds.items())[1:] if kind not in VARIADIC]
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds.values()
    inner._fusion = Fusion(linear, where, forward, names, takes_any, options, check)
    if previous is None:
        for module, function in ((inner, forward), (linear, _linear_forward)):
            module._had_forward = "forward" in vars(module)
            module._unfused_forward = module.forward
            module.forward = types.MethodType(function, module)
        inner._fusion_hook = inner.register_forward_hook(_notice_a_bypass)
    if check and all(map(is_materialised, inner.parameters())):
        try:
            _compare(inner)
        except BaseException:
            unfuse_lm_head(model)
            raise
    return model


def unfuse_lm_head(model: Any) -> Any:
    """Undo :func:`fuse_lm_head` on this instance and return the model; others are left alone.

    Raises:
        ValueError: something else was put over the fused forward since.
    """
    inner = _inner(model)
    fusion = getattr(inner, "_fusion", None)
    if fusion is None:
        return model
    for module, forward in ((inner, fusion.forward), (fusion.linear, _linear_forward)):
        if getattr(module.forward, "__func__", None) is not forward:
            raise ValueError(
                f"{type(module).__name__}.forward was wrapped after fuse_lm_head: undo that first"
            )
    for module in (inner, fusion.linear):
        if module._had_forward:
            module.forward = module._unfused_forward
        else:
            del module.forward
        del module._unfused_forward, module._had_forward
    inner._fusion_hook.remove()
    del inner._fusion, inner._fusion_hook
    return model


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _linear_forward(self: Any, hidden: Tensor, *args: Any, job: Any = None, **kwargs: Any) -> Any:
    """The head's own forward, or ``job(head, hidden)`` while the head's weight is gathered.

    A job holds its tensors in a closure: FSDP2 casts those among the arguments.
    """
    if job is None:
        return self._unfused_forward(hidden, *args, **kwargs)
    if args or kwargs:
        raise ValueError(
            f"the head is given {', '.join(kwargs) or 'more arguments'}, which a fused call leaves "
            "out (PEFT's adapter_names mixes adapters in a batch): score each adapter by itself"
        )
    return job(self, hidden)


def _model_forward(cls: Any) -> Any:
    """A forward with the signature of ``cls.forward``, which generation and trainers inspect."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, completion_mask: Tensor | None = None, **kwargs: Any) -> Any:
        self._fusion.reached = True
        if completion_mask is None:
            seen = self.training and not torch.compiler.is_compiling()
            if seen and kwargs.get("labels") is not None:
                _warn_of_labels(self._fusion)
            return self._unfused_forward(*args, **kwargs)
        return _scored(self, completion_mask, *args, **kwargs)

    return forward


def _warn_of_labels(fusion: Fusion) -> None:
    _warn_once(
        fusion,
        "the fused model is given labels without completion_mask: its loss is the model's own, "
        "with all logits in memory. Pass completion_mask for log-probs, and objective= for a "
        "loss; a transformers Trainer needs remove_unused_columns=False for it, and a "
        "compute_loss_func or compute_loss of yours",
    )


def _notice_a_bypass(model: Any, *_: Any) -> None:
    """After a call, while none has come to the fused forward: another is in its place."""
    fusion = getattr(model, "_fusion", None)  # a copy of the model keeps this hook when unfused
    if fusion is not None and not fusion.reached:
        _warn_once(
            fusion,
            "something has replaced the model's forward since fuse_lm_head, which is not used now: "
            "TRL's trainers do (lolrl.trl.use_lolkernels is for them), and use_liger_kernel does; "
            "call fuse_lm_head after what replaces it",
        )


def _warn_once(fusion: Fusion, message: str) -> None:
    if message not in fusion.warned:
        fusion.warned.add(message)
        warnings.warn(message, stacklevel=4)


def _compare(model: Any) -> None:
    fusion = model._fusion

    def score(hidden: Tensor, labels: Tensor, logit_map: seam.LogitMap) -> Tensor:
        job = functools.partial(fused_head, labels=labels, **fusion.options, **logit_map._asdict())
        logps: Tensor = _results(fusion.linear(hidden, job=job)).logps
        return logps

    defaults = _own_keywords(fusion, {})
    fusion.logit_map = seam.compare(model, fusion.linear, fusion.places, score, defaults)
    fusion.checked = True


def _scored(
    self: Any,
    completion_mask: Tensor,
    *args: Any,
    objective: Objective | None = None,
    reduction: str = "seq-mean",
    totals: tuple[float, float] | None = None,
    temperature: float = 1.0,
    group_size: int = 1,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> FusedOutput:
    fusion: Fusion = self._fusion
    linear = self.get_output_embeddings()
    if linear is not fusion.linear:
        check_linear(linear)
        raise ValueError("the model's head was replaced after fuse_lm_head: call it again")
    if len(args) > len(fusion.names):
        raise TypeError(f"{len(args)} positional arguments, forward takes {len(fusion.names)}")
    for name, value in zip(fusion.names, args, strict=False):
        if name in kwargs:
            raise TypeError(f"{name} is given twice, by position and by name")
        kwargs[name] = value
    # clip=None is a value; the None of what else PEFT and trainers pass along is not.
    needed = () if objective is None else tuple(side_inputs(objective))
    given = {k: kwargs.pop(k) for k in needed if k in kwargs}
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    if objective is None:
        kwargs.pop("num_items_in_batch", None)  # transformers' Trainer: its own loss divides by it
    labels, ahead = _labels(self, kwargs)
    options: dict[str, Any] = {**fusion.options, "temperature": temperature}
    if objective is not None:
        options |= given | {"reduction": reduction}
    _refuse_unknown(fusion, kwargs, needed)
    virtual = 0  # positions before the first token, of prompt tuning
    if "inputs_embeds" in kwargs and isinstance(completion_mask, Tensor):
        virtual = max(0, labels.shape[1] - completion_mask.shape[-1])
    tokens = labels[:, virtual:] if virtual else labels
    mask = _checked(completion_mask, tokens, ahead and not virtual)
    if tokens is not kwargs.get("input_ids") and bool(((tokens < 0) & mask).any()):
        raise ValueError("completion_mask marks a token whose label is negative: leave it out")
    mask, labels = (_at_predictors(t, virtual, ahead) for t in (mask, tokens))
    seq = Sequences.from_mask(mask, cu_seqlens=cu_seqlens, group_size=group_size)
    if cu_seqlens is not None:
        if not ahead or "input_ids" not in kwargs:
            raise ValueError("cu_seqlens packs the input_ids of a decoder: leave it out")
        kwargs["position_ids"] = seam.packed_positions(cu_seqlens, completion_mask, kwargs)
    if totals is not None:
        seq = seq.with_totals(num_sequences=totals[0], num_tokens=totals[1])
    for name, value in options.items():
        if not isinstance(value, Tensor):
            continue
        if value.dtype in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"{name} arrives as {value.dtype}, in which a log-prob is a hundredth of a nat off:"
                " give float32 (FSDP2 casts a model's inputs unless its MixedPrecisionPolicy has "
                "cast_forward_inputs=False)"
            )
        if value.shape == tokens.shape and value.dim() == 2:
            options[name] = _at_predictors(value, virtual, ahead)
    if not fusion.called:
        # Under FSDP one process may have had the weights when fusing, others not: what is run here
        # is decided by how they are held at this point, which is the same everywhere.
        if fusion.check and not (fusion.checked and all(map(is_materialised, self.parameters()))):
            _compare(self)
        fusion.called = True
    if cu_seqlens is not None and fusion.check and not fusion.packs:
        seam.check_packing(self, linear, fusion.places, _own_keywords(fusion, {}))
        fusion.packs = True
    hidden, aux_loss = _hidden(self, _own_keywords(fusion, kwargs), labels.shape)
    packed = seq.pack(hidden)
    assert fusion.logit_map is not None
    job = functools.partial(
        fused_head,
        labels=seq.pack(labels),
        seq=seq,
        objective=objective,
        **options,
        **fusion.logit_map._asdict(),
    )
    values = _results(linear(packed, job=job))._asdict()
    loss = values.pop("loss", None)
    if loss is not None and aux_loss is not None:
        loss = loss + _router_coefficient(self) * aux_loss
    return FusedOutput(
        seq=seq,
        loss=loss,
        seq_loss=values.pop("seq_loss", None),
        metrics=values.pop("metrics", {}),
        aux_loss=aux_loss,
        **values,
    )


def _hidden(model: Any, inputs: dict[str, Any], shape: torch.Size) -> tuple[Tensor, Tensor | None]:
    """What the model's own forward gives its head, (B, T, D), and the loss of its router."""
    fusion = model._fusion
    given: Tensor | None = None

    def answer(hidden: Tensor) -> Tensor:
        nonlocal given
        if fusion.logit_map is not None:
            return torch.zeros(*hidden.shape[:-1], 1, device=hidden.device)
        given = seam.probe(hidden)
        return given.clone()

    with seam.without_zero_bias(model):
        hidden, out = seam.run(model, fusion.linear, fusion.places, answer, inputs)
    if hidden.shape[:-1] != shape:
        raise ValueError(
            f"the model gives its head hidden states of shape {tuple(hidden.shape)} for tokens of "
            f"shape {tuple(shape)}: leave out logits_to_keep and what else changes the length"
        )
    if given is not None:
        fusion.logit_map = seam.fit(given, seam.logits(out))
    aux_loss = getattr(out, "aux_loss", None)
    config = model.config
    wanted = inputs.get("output_router_logits", getattr(config, "output_router_logits", False))
    if wanted and aux_loss is None and getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            "output_router_logits adds a loss of the router that this encoder-decoder model does "
            "not give back: set output_router_logits=False"
        )
    return hidden, aux_loss if isinstance(aux_loss, Tensor) else None


def _router_coefficient(model: Any) -> float:
    """By which the model's own forward adds its ``aux_loss``, under transformers' names for it."""
    for owner in (model, model.config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if hasattr(owner, name):
                return float(getattr(owner, name))
    raise ValueError(
        "the model has an aux_loss and no router_aux_loss_coef: set output_router_logits=False, or "
        "set model.router_aux_loss_coef"
    )


def _results(value: Any) -> Any:
    if not isinstance(value, (LogprobOutput, LinearLossOutput)):
        raise ValueError(
            f"a hook of the head returned {type(value).__name__} instead of the fused results: "
            "remove it, or use linear_logprob on your own hidden states"
        )
    return value


# --- arguments ------------------------------------------------------------------------------------


def _own_keywords(fusion: Fusion, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of the model's own forward; no key-value cache is filled."""
    if "use_cache" in fusion.names or fusion.takes_any:
        return {"use_cache": False, **kwargs}
    return kwargs


def _refuse_unknown(fusion: Fusion, kwargs: dict[str, Any], needed: tuple[str, ...]) -> None:
    known = {*fusion.names, *(TRANSFORMERS_KEYWORDS if fusion.takes_any else ())}
    for name in kwargs:
        if name in TRAINING_COLUMNS:
            raise TypeError(
                f"{name} is not an input of this objective (labels come from input_ids): "
                "leave it out"
            )
        if name not in known:
            offered = [*needed, *OPTIONS, "completion_mask", *sorted(known)]
            near = difflib.get_close_matches(name, offered, n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            takes = ", ".join(needed) if needed else "none"
            raise TypeError(
                f"{name} is not an argument of the model's forward nor an input of the objective, "
                f"which takes {takes}: {hint}"
            )


def _labels(model: Any, kwargs: dict[str, Any]) -> tuple[Tensor, bool]:
    """The tokens (B, T) of a call, and whether each is predicted one position ahead of its own."""
    decoder = getattr(model.config, "is_encoder_decoder", False)
    if not decoder and "input_ids" in kwargs:
        return kwargs["input_ids"], True
    labels = kwargs.pop("labels", None)
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise ValueError(
            "labels is missing: (B, T), the decoder's tokens, which completion_mask is about"
            if decoder
            else "input_ids is missing, the labels are read from it: with inputs_embeds in its "
            "place, as under PEFT's prompt tuning, pass labels=input_ids too"
        )
    if decoder and not {"decoder_input_ids", "decoder_inputs_embeds"} & kwargs.keys():
        shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shifted is None:
            raise ValueError("decoder_input_ids is missing: this model cannot make it of labels")
        kwargs["decoder_input_ids"] = shifted(labels=labels)
    return labels, not decoder


def _at_predictors(value: Tensor, virtual: int, ahead: bool) -> Tensor:
    """What stands at its token (B, T), put where the logits of that token stand."""
    value = nn.functional.pad(value, (virtual, 0))
    return value.roll(-1, 1) if ahead else value


def _checked(completion_mask: Any, tokens: Tensor, from_second: bool) -> Tensor:
    """completion_mask as bool, of the tokens' shape."""
    if not isinstance(completion_mask, Tensor) or completion_mask.shape != tokens.shape:
        got = getattr(completion_mask, "shape", type(completion_mask).__name__)
        raise ValueError(
            f"completion_mask must be a bool tensor of the tokens' shape {tuple(tokens.shape)}, "
            f"got {got}"
        )
    mask = completion_mask
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"completion_mask must be bool, got {mask.dtype}: pass completion_mask.bool()"
        )
    if mask.dtype != torch.bool:
        if bool(((mask != 0) & (mask != 1)).any()):
            raise ValueError("completion_mask must hold only 0 and 1: it is no column of labels")
        mask = mask.bool()
    if from_second and bool(mask[:, 0].any()):
        raise ValueError(
            "completion_mask marks position 0, which nothing predicts: start the sequence with a "
            "prompt or BOS token"
        )
    return mask
