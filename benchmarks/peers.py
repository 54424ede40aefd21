"""The contestants: lolkernels, the bare GEMMs, eager PyTorch, the reference implementation, peers.

Each is built from inputs outside the clock and is then called; all do the same work: A-LoL with
dhidden (and dweight), per-token log-probs with a given upstream gradient, or scoring. A peer is one
function from (hidden, weight, labels) to per-token log-probs with A-LoL on top in plain torch. What
gives only a sum or a mean (QuACK's and Liger's chunked losses, fla) cannot weigh a token by its
sequence, and has no row.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from shapes import CLIP, Inputs
from torch import Tensor
from truth import Check, Result, relative_error

import lolkernels as lk

OPS = ("linear_loss", "linear_logprob", "score")
FLOORS = ("gemms", "gemms fp32 out")
TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]


class UnavailableError(RuntimeError):
    """This contestant cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Call:
    """One forward and backward (one forward for scoring), or either half of it."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Result]
    holds: int = 0  # bytes kept between calls beside the inputs, such as a second model's head

    def __call__(self) -> Result:
        return self.backward(self.forward())


@dataclass
class Contestant:
    """What is measured: a call, its check, and how its work was counted."""

    call: Callable[[], Any]
    check: Callable[[], Check]
    prepare: Callable[[], Any] | None = None  # before each timing, outside it
    flops: int = 0
    bytes: int = 0
    work: str = ""  # the formula of flops or bytes
    returned: Callable[[Any], int] = lambda _: 0  # bytes of the result that are not extra memory
    holds: int = 0
    warm: Callable[[], Any] | None = None  # instead of a first call, where that is dear
    formula: int | None = None  # documented extra bytes
    version: str = ""


def gradients(inputs: Inputs) -> tuple[Tensor | None, Tensor | None]:
    """Takes the gradients off the leaves, so that no call accumulates into the last one's."""
    found = inputs.hidden.grad, inputs.weight.grad
    inputs.hidden.grad = inputs.weight.grad = None
    return found


def gemm_count(op: str, inputs: Inputs) -> int:
    """GEMMs of 2 N V D flops that the op needs."""
    return 1 if op == "score" else 2 + inputs.weight.requires_grad


def build_lolkernels(
    op: str, inputs: Inputs, *, backend: str | None = None, budget: int | None = None
) -> Call:
    settings: dict[str, Any] = {"backend": backend, "memory_budget": budget}

    def linear_loss() -> Any:
        hidden, labels = inputs.scored()
        given = (lk.objectives.a_lol, hidden, inputs.weight, labels, inputs.seq)
        side = {"ref_logps": inputs.ref_logps, "advantages": inputs.advantages, "clip": CLIP}
        return lk.linear_loss(*given, **side, return_outputs=True, **settings)

    def logprob() -> Any:
        hidden, labels = inputs.scored()
        with torch.set_grad_enabled(op != "score"):
            return lk.linear_logprob(hidden, inputs.weight, labels, **settings)

    def backward(out: Any) -> Result:
        if op == "linear_loss":
            out.loss.backward()
        elif op == "linear_logprob":
            out.logps.backward(inputs.upstream)
        return Result(out.logps.detach(), *gradients(inputs))

    return Call(linear_loss if op == "linear_loss" else logprob, backward)


@lru_cache(maxsize=1)
def gradient_logits(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """Gradients of logits (N, V): a product runs faster on zeros or ones than on these."""
    hidden, labels = (t.detach() for t in inputs.scored())
    wide, rows = inputs.weight.detach().float(), torch.arange(len(labels), device=hidden.device)
    dz = torch.empty(len(labels), inputs.shape.vocab, dtype=dtype, device=hidden.device)
    for part in rows.split(1024):
        p = (hidden[part].float() @ wide.T).softmax(-1)
        dz[part] = p.scatter_add_(-1, labels[part, None], -torch.ones_like(p[:, :1])).to(dtype)
    return dz


def build_gemms(op: str, inputs: Inputs, phase: str = "both", *, wide: bool = False) -> Contestant:
    """The floor: the op's GEMMs over all rows at once, into buffers made outside the clock.

    On a GPU in the inputs' dtype, which is what a user's own code would call; ``wide`` writes fp32.
    On a CPU in fp32 for every dtype: the log-prob is defined from fp32 logits, and a CPU has no
    product that takes bf16 and gives fp32. Forward has one of them, backward the rest.
    """
    hidden, weight = inputs.scored()[0].detach(), inputs.weight.detach()
    if not hidden.is_cuda:
        if wide:
            raise UnavailableError("a CPU has no product that takes bf16 and gives fp32")
        hidden, weight = hidden.float(), weight.float()
    out = torch.float32 if wide else hidden.dtype
    mm = partial(torch.mm, out_dtype=out) if out != hidden.dtype else torch.mm
    dz = gradient_logits(inputs, hidden.dtype)
    logits = torch.empty(dz.shape, dtype=out, device=dz.device)
    dhidden, dweight = torch.empty_like(hidden, dtype=out), torch.empty_like(weight, dtype=out)
    forwards = int(phase != "backward")
    trains = op != "score" and phase != "forward"
    dweights = trains and inputs.weight.requires_grad

    def call() -> None:
        for _ in range(forwards):
            mm(hidden, weight.T, out=logits)
        if trains:
            mm(dz, weight, out=dhidden)
        if dweights:
            mm(dz.T, hidden, out=dweight)

    def check() -> Check:
        for t in (logits, dhidden, dweight):
            t.fill_(torch.nan)
        call()
        pairs = {"logits": (logits[:8], hidden[:8].double() @ weight.double().T, forwards)}
        pairs["dhidden"] = dhidden[:8], dz[:8].double() @ weight.double(), trains
        pairs["dweight"] = dweight[:8], dz[:, :8].T.double() @ hidden.double(), dweights
        found = Check()
        for name, (got, want, used) in pairs.items():
            error = relative_error(got, want)[0] if used else 0.0
            if not error <= 1e-2:
                found.faults.append(f"{name} off by {error:.2e}")
        return found

    return Contestant(call, check)


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What a careful hand-written loop does: logits, fp32, cross entropy without reduction."""
    return -F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")


def lol_rl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As in the authors' script: full logits in fp32, log_softmax over all of them, gather."""
    logp = (hidden @ weight.T).float().log_softmax(-1)
    return logp.gather(-1, labels[:, None]).squeeze(-1)


class _Recompute(torch.autograd.Function):
    """verl's way, from its published algorithm: blocks of 512 rows, made again in the backward.

    Logits have the inputs' dtype and are widened afterwards; dweight adds up in the weight's dtype.
    """

    BLOCK = 512

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        step = _Recompute.BLOCK
        pairs = zip(hidden.split(step), labels.split(step), strict=True)
        return torch.cat([lol_rl(h, weight, y) for h, y in pairs])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight, labels = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(labels), _Recompute.BLOCK):
            rows = slice(start, start + _Recompute.BLOCK)
            coef = upstream[rows, None]
            dz = (hidden[rows] @ weight.T).float().softmax(-1).mul_(-coef)
            dz = dz.scatter_add_(-1, labels[rows, None], coef).to(hidden.dtype)
            dhidden[rows] = dz @ weight
            if dweight is not None:
                dweight += dz.T @ hidden[rows]
        return dhidden, dweight, None


def _torch(policy: str | None) -> TokenLogps:
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = None if policy is None else torch.nn.LinearCrossEntropyOptions(acc_policy=policy)  # type: ignore[arg-type]

    def logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -F.linear_cross_entropy(
            hidden, weight, labels, reduction="none", options=options
        ).float()

    return logps


def _negated(module: str, name: str, *between: Any, **options: Any) -> TokenLogps:
    """A loss of (hidden, weight, ..., labels) for each token, as log-probs."""
    loss = getattr(importlib.import_module(module), name)
    loss = getattr(loss, "apply", loss)
    return lambda hidden, weight, labels: -loss(hidden, weight, *between, labels, **options).float()


def _liger(**options: Any) -> TokenLogps:
    module = importlib.import_module("liger_kernel.transformers")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="none", **options)
    return lambda hidden, weight, labels: -loss(weight, hidden, labels).float()


def _trl() -> TokenLogps:
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    columns = 32768  # what its trainers pass
    return lambda hidden, weight, labels: function.apply(
        hidden, weight, None, labels, 1.0, columns, None, 1.0, ()
    )[0]


@dataclass(frozen=True)
class Peer:
    load: Callable[[], TokenLogps]
    package: str = "torch"  # whose version is printed
    gpu_only: bool = False


_cce = partial(_negated, "cut_cross_entropy", "linear_cross_entropy", reduction="none")
_quack = ("quack.linear_cross_entropy", "linear_cross_entropy_func", None)
_scaled = ("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction")
_LIGER, _CCE = "liger-kernel", "cut-cross-entropy"
PEERS = {
    "eager": Peer(lambda: eager),
    "torch.compile": Peer(lambda: torch.compile(eager, dynamic=False)),
    "lol-rl": Peer(lambda: lol_rl),
    "torch lce": Peer(partial(_torch, "auto")),
    "torch lce accurate": Peer(partial(_torch, "accurate")),
    "torch lce balanced": Peer(partial(_torch, "balanced")),
    "torch lce compact": Peer(partial(_torch, "compact")),
    "torch lce no options": Peer(partial(_torch, None)),
    "verl recompute": Peer(lambda: _Recompute.apply),
    "trl": Peer(_trl, "trl"),
    "liger": Peer(_liger, _LIGER, gpu_only=True),
    "liger fp32 dweight": Peer(partial(_liger, accum_dtype=torch.float32), _LIGER, gpu_only=True),
    "liger scaled": Peer(partial(_negated, *_scaled), _LIGER),
    "cce": Peer(_cce, _CCE, gpu_only=True),
    "cce no filter": Peer(partial(_cce, filter_eps=None), _CCE, gpu_only=True),
    "cce kahan": Peer(partial(_cce, impl="cce_kahan_full_c"), _CCE, gpu_only=True),
    "cce torch_compile": Peer(partial(_cce, impl="torch_compile"), _CCE),
    "quack": Peer(partial(_negated, *_quack, reduction="none"), "quack-kernels", gpu_only=True),
}


def version(package: str) -> str:
    """Its version; empty for torch, which the record's head names.

    Raises:
        UnavailableError: it is not installed.
    """
    if package == "torch":
        return ""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise UnavailableError(f"{package} is not installed (make peers)") from None


def interpreted() -> bool:
    """Triton's interpreter stands in for a GPU: right for a check, meaningless for a time."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def only_interpreted(name: str, device: str) -> bool:
    return device == "cpu" and interpreted() and name in PEERS and PEERS[name].gpu_only


def token_logps(name: str, on_gpu: bool = False) -> TokenLogps:
    """Raises UnavailableError where the peer cannot run."""
    peer = PEERS[name]
    version(peer.package)
    if peer.gpu_only and not on_gpu and not interpreted():
        raise UnavailableError("its kernels need a GPU")
    try:
        return peer.load()
    except ImportError as error:
        raise UnavailableError(f"needs more than is installed: {error}") from error


def build_peer(name: str, op: str, inputs: Inputs) -> Call:
    logps = token_logps(name, inputs.hidden.is_cuda)
    head = inputs.weight.detach().clone() if name == "lol-rl" else None  # its deepcopy of the model

    def forward() -> tuple[Tensor, Tensor | None]:
        with torch.set_grad_enabled(op != "score"):
            if head is None:
                hidden, labels = inputs.scored()
                found = logps(hidden, inputs.weight, labels)
            else:  # all rows, prompts too
                found = logps(inputs.hidden, inputs.weight, inputs.labels)[inputs.rows]
        if op != "linear_loss":
            return found, None
        ref = inputs.ref_logps
        if head is not None:  # the script runs the reference model's head in each step
            with torch.no_grad():
                ref = logps(inputs.ref_hidden, head, inputs.labels)[inputs.rows]
        loss = lk.objectives.a_lol(found, ref, inputs.advantages, inputs.seq, clip=CLIP)
        return found, lk.aggregate(loss, inputs.seq)

    def backward(state: tuple[Tensor, Tensor | None]) -> Result:
        found, loss = state
        if loss is not None:
            loss.backward()
        elif op == "linear_logprob":
            found.backward(inputs.upstream)
        return Result(found.detach(), *gradients(inputs))

    return Call(forward, backward, 0 if head is None else head.nbytes)


def build(contestant: str, op: str, inputs: Inputs, **settings: Any) -> Call:
    """Builds "lolkernels" (with its ``backend`` and memory ``budget``) or a peer.

    Raises:
        UnavailableError: it cannot run here, and why.
        ValueError: no such contestant.
    """
    if contestant == "lolkernels":
        return build_lolkernels(op, inputs, **settings)
    if contestant not in PEERS:
        names = ", ".join(["lolkernels", *FLOORS, *PEERS])
        raise ValueError(f"contestant must be one of {names}; got {contestant!r}")
    return build_peer(contestant, op, inputs)
