"""Where a causal LM's own forward is cut: at its head.

A scoring call runs the model's own forward with a stand-in for the head. The stand-in keeps the
hidden states that the head is given, so that whatever stands before the head is included, and
answers with a few numbers, so that no logits are held. What stands behind the head is observed: the
stand-in answers with chosen numbers and the model returns what it makes of them. A factor and a
tanh soft-cap are recognised by their values, under whatever name a configuration has them; anything
else is an error. :func:`compare` puts the whole beside the model's own logits.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .head import ROWS, close, operands

POSITIONS = 8  # of each of the two rows that are tried
# Head outputs to try: far below any soft-cap, far above, and no bf16 numbers in between.
_MAGNITUDES = [2.0**-24] + [1.37 * 2.0**k for k in range(-6, 8)] + [2.0**20]
PROBE = [sign * x for x in _MAGNITUDES for sign in (1.0, -1.0)]
NATS = 1e-3


class LogitMap(NamedTuple):
    """The model's logits are softcap(logit_scale * head output)."""

    softcap: float | None
    logit_scale: float


class StandIn(nn.Module):
    """Stands where the head stood, for the thread that put it there."""

    def __init__(self, linear: nn.Module, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        # Past nn.Module's registration: the model's parameters are the head's own, once.
        self.__dict__.update(linear=linear, answer=answer, thread=threading.get_ident(), seen=[])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["linear"], name)  # such as weight.dtype

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return self.linear(hidden, *args, **kwargs)
        self.seen.append(hidden)
        return self.answer(hidden)


def places(model: nn.Module, linear: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every (parent, name) under which the model holds its head."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if child is linear
    ]


def run(
    model: Any,
    linear: nn.Module,
    where: list[tuple[nn.Module, str]],
    answer: Callable[[Tensor], Tensor],
    inputs: dict[str, Any],
) -> tuple[Tensor, Any]:
    """The model's own forward: what its head was given, and what it returned for ``answer``."""
    stand_in = StandIn(linear, answer)
    for parent, name in where:
        parent._modules[name] = stand_in
    try:
        out = model._unfused_forward(**inputs)
    finally:
        for parent, name in where:
            parent._modules[name] = linear
    if len(stand_in.seen) != 1:
        raise ValueError(
            f"the model called its head {len(stand_in.seen)} times in one forward, not once: "
            "use linear_logprob on your own hidden states"
        )
    return stand_in.seen[0], out


@contextlib.contextmanager
def without_zero_bias(model: Any) -> Iterator[None]:
    """BART and its kin add a buffer of zeros (1, V) behind the head, to a few numbers or to all.

    Raises:
        ValueError: the buffer is not zero.
    """
    name = "final_logits_bias"
    bias = model._buffers.get(name)
    if bias is None:
        yield
        return
    if bool(bias.any()):
        raise ValueError(f"the model's {name} is not zero: use linear_logprob with it as the bias")
    model._buffers[name] = bias[:, :1]
    try:
        yield
    finally:
        model._buffers[name] = bias


def logits(out: Any) -> Tensor:
    made: Tensor = out.logits if hasattr(out, "logits") else out[0]
    return made


def probe(hidden: Tensor) -> Tensor:
    """Head outputs (..., K) to try on the code behind the head."""
    values = torch.tensor(PROBE, dtype=_wide(hidden), device=hidden.device)
    return values.expand(*hidden.shape[:-1], len(PROBE)).clone()


def fit(given: Tensor, made: Tensor) -> LogitMap:
    """The factor and the soft-cap by which a model makes ``made`` of its head's ``given``."""
    error = ValueError(
        "what the model does to its head's output is neither a positive factor nor a tanh soft-cap "
        "(one for all vocabulary entries): use linear_logprob on your own hidden states"
    )
    if made.shape != given.shape:
        raise error
    if made.requires_grad:
        raise ValueError(
            "a trained parameter stands behind the model's head, and would get no gradient: freeze "
            "it, or use linear_logprob on your own hidden states"
        )
    x, y = given.detach().double().flatten(), made.detach().double().flatten()
    small, large = x.abs().argmin(), x.abs().argmax()
    scale = float(y[small] / x[small])
    if not 0 < scale < math.inf:
        raise error
    cap = float(y[large].abs())
    softcap = None if abs(cap / (scale * float(x[large].abs())) - 1) < 1e-4 else cap
    want = scale * x if softcap is None else softcap * torch.tanh(scale * x / softcap)
    if not bool(((y - want).abs() <= 1e-5 * want.abs()).all()):
        raise error
    return LogitMap(softcap, scale)


def exact_logits(linear: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """x W^T + b twice: in the weight's dtype, and in float64 from the same operands."""
    hidden, weight, bias, low_rank = operands(linear, hidden)
    weight, bias = _whole(weight), _whole(bias)
    wide = _wide(hidden, at_most=True)
    plain = nn.functional.linear(hidden.to(weight.dtype), weight, bias)
    logits = _product(hidden.to(wide), weight)
    if low_rank is not None:
        low, up = low_rank
        plain = plain + nn.functional.linear(low.to(up.dtype), up)
        logits = logits + _product(low.to(wide), up)
    return plain, logits if bias is None else logits + bias.to(wide)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in the dtype of x; the weight is widened a few rows at a time."""
    blocks = torch.split(weight, ROWS)
    return torch.cat([nn.functional.linear(x, block.to(x.dtype)) for block in blocks], -1)


def _whole(t: Any) -> Any:
    """What stays a DTensor inside the head's forward, as under tensor parallelism, of all ranks."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def compare(
    model: Any,
    linear: Any,
    where: list[tuple[nn.Module, str]],
    score: Callable[[Tensor, Tensor, LogitMap], Tensor],
    defaults: dict[str, Any],
) -> LogitMap:
    """Score a few tokens on both paths; the map behind the head if they agree, ValueError if not.

    Both paths share one run of the backbone, in eval mode: for two rows of token ids that differ in
    the last one only. The head's stand-in answers the first row with logits made in float64 from
    the hidden states, which the model's own code turns into its logits, and the second with
    :func:`probe`'s numbers. Random states and train/eval modes are as before afterwards.

    Args:
        score: (hidden (n, D), labels (n,), map) -> the fused log-probs (n,).
        defaults: keywords of a scoring call.
    """
    with _undisturbed(model):
        ids = _token_ids(model, linear)
        given = torch.empty(0)
        off = 0.0  # the head's own output from x W^T + b

        def answer(hidden: Tensor) -> Tensor:
            nonlocal given, off
            own = linear(hidden)
            found: list[tuple[Tensor, Tensor]] = []
            linear(hidden, job=lambda head, h: _stash(found, exact_logits(head, h)))
            plain, logits = found[0]
            same = isinstance(own, Tensor) and own.shape == plain.shape
            if not same or not close(own, plain):
                off = float((own.double() - plain.double()).abs().max()) if same else math.inf
            values = torch.tensor(PROBE, dtype=logits.dtype, device=logits.device)
            which = torch.arange(logits[0].numel(), device=logits.device) % len(PROBE)
            given = torch.stack([logits[0], values[which].view_as(logits[0])]).to(_wide(hidden))
            # What stands behind the head runs with gradients, so that a trained factor shows.
            torch.set_grad_enabled(True)
            return given.clone()

        try:
            with torch.no_grad():
                inputs = {"input_ids": ids, **defaults}
                if getattr(model.config, "is_encoder_decoder", False):
                    inputs |= {"input_ids": ids[:1].expand(2, -1), "decoder_input_ids": ids}
                hidden, out = run(model, linear, where, answer, inputs)
                made = logits(out)
        except Exception as error:
            raise _refused(f"the model does not run on a few tokens ({error})") from error
        if hidden.shape[:-1] != ids.shape:
            raise _refused(
                f"the head is given hidden states of shape {tuple(hidden.shape)} for "
                f"token ids of shape {tuple(ids.shape)}"
            )
        # Weights of nan give nan on both paths: for the caller to see, and nothing to compare.
        finite = bool(hidden.isfinite().all()) and bool(given.isfinite().all())
        if finite and off > 0:
            raise _refused(
                f"the head's output differs from x W^T + b by up to {off:.3g}: a hook or a forward "
                "of its own changes it"
            )
        seen = (hidden[0, :-1] - hidden[1, :-1]).double().abs().amax(-1)
        allowed = max(1e-4, torch.finfo(hidden.dtype).eps) * hidden.double().abs().max()
        if bool(seen.median() > allowed):
            raise _refused(
                "the model is not causal: what it predicts of a token depends on later ones (a "
                "BERT-type model needs is_decoder=True in its configuration)"
            )
        if made.shape != given.shape:
            raise _refused(
                f"the head gives logits of shape {tuple(given.shape)} and the model returns "
                f"{tuple(made.shape)}"
            )
        try:
            logit_map = fit(given[1], made[1])
        except ValueError as error:
            raise _refused(str(error)) from error
        labels = ids[0, 1:]
        with torch.no_grad():
            own = made[0, :-1].double()
            want = own.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
            got = score(hidden[0, :-1], labels, logit_map).double()
        difference = float((got - want).abs().max())
        if finite and not difference <= NATS + 1e-5 * float(own.abs().max()):
            raise _refused(f"the fused log-probs differ from it by up to {difference:.3g} nats")
    return logit_map


def packed_positions(
    cu_seqlens: Tensor,  # (S + 1,)
    completion_mask: Tensor,  # (1, T)
    given: dict[str, Any],
) -> Tensor:
    """position_ids (1, T) that start again with every sequence, by which an attention knows them.

    Raises:
        ValueError: the model's other inputs (``given``) say something else.
    """
    if given.get("attention_mask") is not None:
        raise ValueError(
            "attention_mask is given beside cu_seqlens: leave it out, the sequences of a packed "
            "row are told apart by their position_ids"
        )
    width = completion_mask.shape[1]
    places = torch.arange(width, device=completion_mask.device)
    starts = cu_seqlens.to(places)
    starts = starts[starts < width]
    positions = (places - starts[torch.searchsorted(starts, places, right=True) - 1])[None]
    own = given.get("position_ids")
    if own is not None and not torch.equal(own.to(positions), positions):
        raise ValueError(
            "position_ids must start at 0 with every sequence of cu_seqlens and count on: leave "
            "them out, and they are made so"
        )
    if bool(completion_mask[0, starts].any()):
        raise ValueError(
            "completion_mask marks the first token of a sequence, which nothing of it predicts: "
            "start each with a prompt or BOS token"
        )
    return positions


def check_packing(
    model: Any, linear: Any, where: list[tuple[nn.Module, str]], defaults: dict[str, Any]
) -> None:
    """Whether two sequences in one row are as they are alone: ValueError if not.

    The second's hidden states must not change with the first's tokens, whose shapes are the same:
    where nothing is attended to nothing is even rounded otherwise, in any dtype (measured: 0 in 104
    of 111 families of transformers that keep them apart, 2e-7 in mixtures of experts; from 5e-4 in
    the others). From those that it has alone they may differ by roundings.
    """

    def states(*parts: Tensor) -> Tensor:
        row = torch.cat(parts)[None]
        positions = torch.cat([torch.arange(len(p), device=p.device) for p in parts])[None]
        inputs = {"input_ids": row, "position_ids": positions, **defaults}
        hidden, _ = run(model, linear, where, lambda h: h.new_zeros(*h.shape[:-1], 1), inputs)
        return hidden[0, -len(parts[-1]) :]

    with _undisturbed(model), torch.no_grad():
        first = _token_ids(model, linear)[0]
        second = first.flip(0)[: POSITIONS // 2]
        try:
            alone = states(second)
            found = [states(first, second), states(first.roll(1), second)]
        except Exception as error:
            raise _refused_packing(f"it does not run on a packed row ({error})") from error
    if not bool(alone.isfinite().all()):
        return
    size = float(alone.abs().max())
    moved, leaked = (float((h.double() - found[0].double()).abs().max()) for h in (alone, found[1]))
    if leaked > 1e-5 * size:
        raise _refused_packing("what it makes of a sequence depends on the one packed before it")
    if moved > max(1e-4, torch.finfo(alone.dtype).eps) * size:
        raise _refused_packing("what it makes of a sequence is not what it makes of it alone")


def _refused_packing(reason: str) -> ValueError:
    return ValueError(
        f"cu_seqlens: this model does not keep packed sequences apart: {reason}. Pad its batches "
        "(recurrent layers, and attention that reads no position_ids, run on into the next "
        "sequence), or try another attn_implementation, such as sdpa"
    )


def _refused(reason: str) -> ValueError:
    return ValueError(
        f"fuse_lm_head compared a few tokens with the model's own logits and refuses: {reason}. "
        "Use linear_logprob on your own hidden states; check=False skips the comparison"
    )


def _stash(found: list[Any], value: Any) -> Tensor:
    """Keep a value past the head's hooks, which see an empty tensor."""
    found.append(value)
    return torch.empty(0)


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no autocast, and afterwards the same modes and random states as before."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta", "mps")}
    kinds = {device.type for device in devices}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        for kind in kinds:
            mine = [device for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(mine, device_type=kind))
        for kind in {"cpu", *kinds}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        model.eval()
        for module in model.modules():
            # bitsandbytes lays 4-bit weights out for inference in eval mode, for good: what they
            # give then has no gradient.
            weight = module._parameters.get("weight")
            module.training = weight is not None and not weight.is_floating_point()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _wide(hidden: Tensor, *, at_most: bool = False) -> torch.dtype:
    """float64 where the model computes in it (``at_most``: where the device can), else float32."""
    if hidden.dtype == torch.float64 or (at_most and hidden.device.type != "mps"):
        return torch.float64
    return torch.float32


def _token_ids(model: Any, linear: Any) -> Tensor:
    """(2, POSITIONS) ids of ordinary tokens; the rows differ in the last."""
    known = getattr(linear, "out_features", linear.weight.shape[0])
    size = min(known, getattr(model.get_input_embeddings(), "num_embeddings", known))
    special = set(_integers(model.config.to_dict()))
    step = max(1, size // 64)
    ids = [i for i in range(step, size, step) if i not in special][: POSITIONS + 1]
    if len(ids) <= POSITIONS:
        raise ValueError(f"its vocabulary has {size} entries, {POSITIONS + 1} are needed")
    rows = [ids[:POSITIONS], [*ids[: POSITIONS - 1], ids[-1]]]
    return torch.tensor(rows, device=_device(model))


def _integers(config: dict[str, Any]) -> Iterator[int]:
    """The token ids that a configuration names: padding, images, end of text."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _integers(value)
        elif "token" in str(key):
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, int):
                    yield item
