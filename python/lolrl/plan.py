"""How many tokens of training fit into a given memory, by formula: nothing is run.

    lolrl plan --model-shape llama-3.1-8b --memory 24GiB --lora 16
    lolrl plan --model-shape 2048,24,49152 --memory 16GiB --checkpointing

Peak bytes of one training step on T tokens, N of them scored, with b bytes per element:

    weights + optimiser states + the largest of three moments
        loss       activations + what the loss holds
        backward   activations + b V D (dweight, where the head is trained) + one block's backward:
                   b T (2 I + D), with checkpointing also the block's activations
        update     gradients, + b V D for a tied trained embedding, to whose gradient the head's is
                   added; with eager + 2 b V D, as autograd adds them into a third tensor

    activations    T times what autograd saves in each block and in the final norm; with
                   checkpointing b T D of each block, and the final norm
    loss, eager    12 N V: three fp32 tensors in the backward of log_softmax, of the scored rows
                   alone; then dweight beside the logits' gradient, if that is more; + b N D
    loss, full     the same for all T rows
    loss, fused    the kernels' extra memory + dweight + dhidden (b N D) + hidden (b (T + N) D)

D is the hidden size, I the width of the MLP, V the vocabulary. The formulas assume the blocks as
transformers runs them, not compiled, without dropout; attention that stores no scores (SDPA;
gpt-oss and Gemma 2 need a flash kernel for that); gradients and AdamW's two states in the dtype of
the weights (no fp32 master copy), its update fused; LoRA on every linear layer of the blocks, in
fp32 as peft makes it, with the head frozen. They leave out what the CUDA context, the allocator's
fragments and other libraries take (leave 1 to 2 GiB of a card), a softcap or a bias of the logits,
and sharding over several cards.

benchmarks/train.py measures the same: on a CPU the formula is within 5%; with checkpointing, where
a block's backward is an estimate, within 12%. It has not been measured on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

# The one look below the public names of the kernels: their own memory formula.
from lolkernels import memory
from lolrl.configfile import ConfigError

GIB = 2**30
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
OPTIMIZERS = ("adamw", "8bit", "none")
LOSSES = ("eager", "full logits", "fused")
SIZES = ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab")


@dataclass(frozen=True)
class ModelShape:
    """A causal LM of one of the families that the formulas know."""

    family: str  # llama, qwen2, qwen3, gemma2, gemma3, gpt2 or gpt-oss
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    positions: int = 0  # of a learned embedding
    experts: int = 0
    active: int = 1  # experts a token goes through

    def __post_init__(self) -> None:
        for name in SIZES:
            if getattr(self, name) <= 0:
                raise ConfigError(f"--model-shape: {name} must be > 0, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"--model-shape: heads must be a multiple of kv_heads, got {self.heads} and "
                f"{self.kv_heads}"
            )

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def norms(self) -> int:
        """Of D elements in a block."""
        return 4 if self.family in ("gemma2", "gemma3") else 2

    @property
    def qk_norm(self) -> bool:
        return self.family in ("qwen3", "gemma3")

    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of each linear layer of a block; a mixture's experts are not among them."""
        D, I = self.hidden, self.intermediate  # noqa: E741
        if self.family == "gpt2":
            return [(D, self.q + 2 * self.kv), (self.q, D), (D, I), (I, D)]
        attention = [(D, self.q), (D, self.kv), (D, self.kv), (self.q, D)]
        return attention + ([] if self.experts else [(D, I), (D, I), (I, D)])

    def parameters(self) -> int:
        """Of the whole model, a tied embedding once."""
        D, I, qkv = self.hidden, self.intermediate, self.q + 2 * self.kv  # noqa: E741
        block = sum(inputs * outputs for inputs, outputs in self.linears()) + self.norms * D
        block += 2 * self.head_dim if self.qk_norm else 0
        if self.family == "qwen2":
            block += qkv
        elif self.family == "gpt2":
            block += qkv + D + I + D + 2 * D  # a bias for each linear layer and norm
        elif self.family == "gpt-oss":
            block += qkv + D + self.heads  # biases, attention sinks
            block += self.experts * (3 * D * I + 2 * I + D + D + 1)  # experts, router
        final = 2 * D if self.family == "gpt2" else D
        tables = self.vocab * (1 if self.tied else 2) + self.positions
        return self.layers * block + final + tables * D

    def adapters(self, rank: int) -> int:
        """LoRA parameters on every linear layer of the blocks."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.linears())


def _shape(family: str, sizes: str, tied: bool, **more: int) -> ModelShape:
    known = dict(zip(SIZES, map(int, sizes.split()), strict=True))
    return ModelShape(family, **known, tied=tied, **more)


# Published configurations: hidden, layers, heads, kv heads, head dim, intermediate, vocabulary.
# Of Gemma-3-4B the language model alone.
MODELS = {
    "gpt2": _shape("gpt2", "768 12 12 12 64 3072 50257", True, positions=1024),
    "smollm2-135m": _shape("llama", "576 30 9 3 64 1536 49152", True),
    "smollm2-1.7b": _shape("llama", "2048 24 32 32 64 8192 49152", True),
    "llama-3.2-1b": _shape("llama", "2048 16 32 8 64 8192 128256", True),
    "llama-3.2-3b": _shape("llama", "3072 28 24 8 128 8192 128256", True),
    "llama-3-8b": _shape("llama", "4096 32 32 8 128 14336 128256", False),
    "llama-3.1-8b": _shape("llama", "4096 32 32 8 128 14336 128256", False),
    "qwen2.5-0.5b": _shape("qwen2", "896 24 14 2 64 4864 151936", True),
    "qwen2.5-1.5b": _shape("qwen2", "1536 28 12 2 128 8960 151936", True),
    "qwen2.5-7b": _shape("qwen2", "3584 28 28 4 128 18944 152064", False),
    "qwen3-0.6b": _shape("qwen3", "1024 28 16 8 128 3072 151936", True),
    "qwen3-4b": _shape("qwen3", "2560 36 32 8 128 9728 151936", True),
    "qwen3-8b": _shape("qwen3", "4096 36 32 8 128 12288 151936", False),
    "gemma-2-2b": _shape("gemma2", "2304 26 8 4 256 9216 256000", True),
    "gemma-2-9b": _shape("gemma2", "3584 42 16 8 256 14336 256000", True),
    "gemma-3-1b": _shape("gemma3", "1152 26 4 1 256 6912 262144", True),
    "gemma-3-4b": _shape("gemma3", "2560 34 8 4 256 10240 262208", True),
    "gpt-oss-20b": _shape("gpt-oss", "2880 24 64 8 64 2880 201088", False, experts=32, active=4),
}


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Setup:
    """How the model is trained."""

    dtype: str = _field("bf16", "Of weights, gradients and activations: bf16, fp16 or fp32.")
    lora: int = _field(0, "Rank of the adapters; 0 trains the model's own weights.")
    frozen_head: bool = _field(False, "Head, and embedding if tied, get no gradient.")
    seq_len: int = _field(2048, "Tokens of a sequence.")
    prompt_share: float = _field(0.0, "Share of each sequence's tokens that is not scored.")
    optimizer: str = _field("adamw", "adamw, 8bit (AdamW's states in blocks of 256) or none.")
    checkpointing: bool = _field(False, "Gradient checkpointing of every block.")
    memory_budget: int | str | None = _field(None, "Of linear_loss, as 512MiB; null: its default.")
    device: str = _field("cuda", "cuda or cpu.")
    card: int | str | None = _field(
        None, "Memory of the GPU, which that default follows; null: --memory, or the GPU here."
    )

    def __post_init__(self) -> None:
        for name, known in (
            ("dtype", tuple(ITEMSIZE)),
            ("optimizer", OPTIMIZERS),
            ("device", ("cuda", "cpu")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"--{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}"
                )
        if self.lora < 0:
            raise ConfigError(f"--lora must be a rank >= 1, got {self.lora}")
        if self.lora and self.frozen_head:
            raise ConfigError("--lora freezes the head already: leave --frozen-head out")
        if self.seq_len < 1:
            raise ConfigError(f"--seq-len must be >= 1, got {self.seq_len}")
        if not 0 <= self.prompt_share < 1:
            raise ConfigError(
                f"--prompt-share must be in [0, 1), got {self.prompt_share:g}: some tokens of each "
                "sequence have to be scored"
            )
        for name in ("memory_budget", "card"):
            size = getattr(self, name)
            if size is not None:
                flag = "--" + name.replace("_", "-")
                object.__setattr__(self, name, parse_bytes(size, flag))

    @property
    def head_is_trained(self) -> bool:
        return not (self.lora or self.frozen_head)

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def scored(self) -> int:
        """Rows of a sequence that enter the loss."""
        return self.seq_len - int(self.seq_len * self.prompt_share)


@dataclass(frozen=True)
class Step:
    """Bytes of one training step; the three moments do not include weights and states."""

    weights: int
    states: int  # of the optimiser
    gradients: int
    activations: int
    loss: int  # what the loss holds beside the activations
    at_loss: int
    at_backward: int
    at_update: int

    @property
    def peak(self) -> int:
        return self.weights + self.states + self.working

    @property
    def working(self) -> int:
        """What a step takes beside weights and states."""
        return max(self.at_loss, self.at_backward, self.at_update)


def trained(shape: ModelShape, setup: Setup) -> int:
    """Parameters that get a gradient."""
    if setup.lora:
        return shape.adapters(setup.lora)
    return shape.parameters() - (shape.vocab * shape.hidden if setup.frozen_head else 0)


def block_bytes(shape: ModelShape, setup: Setup) -> int:
    """Bytes that autograd saves per token in one block, without vectors of a few elements.

    With D, I, Q and K the widths of hidden states, MLP, queries and keys, b bytes per element:

    norms       each D (4 + b): its input in fp32 and the normalised rows; Gemma 8 D, both are fp32;
                GPT-2 b D; with LoRA the input alone. Where queries and keys are normalised, the
                same for Q + K
    attention   b (2 Q + 2 K): queries, keys, values and result
    MLP         b 4 I: gate, its activation, up, their product; GPT-2 b 5 I; gpt-oss b (8 I + D) for
                each active expert, 7 I with LoRA
    linears     2 b D: what goes into attention and into the MLP
    LoRA        4 r for each adapter, and unless b = 4 its input in fp32, in place of what linear
                layers keep
    """
    b, D, I = setup.itemsize, shape.hidden, shape.intermediate  # noqa: E741
    normed = shape.norms * D + (shape.q + shape.kv if shape.qk_norm else 0)
    attention = b * 2 * (shape.q + shape.kv)
    copied = bool(setup.lora) and b != 4
    if shape.experts:
        mlp = b * shape.active * (7 * I if setup.lora else 8 * I + D)
    else:
        mlp = b * I * ((5 if shape.family == "gpt2" else 4) - copied)
    linears = shape.linears()
    inputs = 4 * sum(width for width, _ in linears) if copied else 2 * b * D
    return (
        normed * _norm_bytes(shape, setup)
        + attention
        + mlp
        + inputs
        + 4 * setup.lora * len(linears)
    )


def _norm_bytes(shape: ModelShape, setup: Setup) -> int:
    """What a norm saves per element."""
    if shape.family == "gpt2":
        return setup.itemsize
    if setup.lora:
        return 4
    return 8 if shape.family.startswith("gemma") else 4 + setup.itemsize


def loss_bytes(shape: ModelShape, setup: Setup, sequences: int, loss: str) -> int:
    """What the loss holds at its worst moment, the gradients it makes included."""
    b, D, V = setup.itemsize, shape.hidden, shape.vocab
    tokens, rows = sequences * setup.seq_len, sequences * setup.scored
    dweight = b * V * D if setup.head_is_trained else 0
    if loss == "fused":
        return fused_extra_bytes(shape, setup, sequences) + dweight + b * (2 * rows + tokens) * D
    if loss == "full logits":
        rows = tokens
    dlogits = rows * V * (4 if b == 4 else 4 + b)
    return max(12 * rows * V, dlogits + dweight) + b * rows * D


def fused_extra_bytes(shape: ModelShape, setup: Setup, sequences: int) -> int:
    """What `linear_loss` takes beyond hidden states and gradients, by the kernels' own formula."""
    device, budget, b = torch.device(setup.device), setup.memory_budget, setup.itemsize
    size = b if device.type == "cuda" else 4
    held = memory.kept_rows(shape.vocab, shape.hidden, size, budget, device, card=setup.card)
    return memory.extra_bytes(
        "linear_loss",
        num_rows=sequences * setup.scored,
        hidden_size=shape.hidden,
        vocab=shape.vocab,
        longest_block=max(setup.scored, held // setup.scored * setup.scored),
        hidden_bytes=b,
        weight_bytes=b,
        frozen_weight=not setup.head_is_trained,
        memory_budget=budget,
        device=device,
        card=setup.card,
    )


def step_bytes(shape: ModelShape, setup: Setup, sequences: int, loss: str = "fused") -> Step:
    """The bytes of a step on this many sequences, by the formulas of this module.

    Args:
        loss: fused (lolkernels), eager (logits of the scored rows) or full logits (of all rows).
    """
    if loss not in LOSSES:
        raise ConfigError(f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")
    b, D, tokens = setup.itemsize, shape.hidden, sequences * setup.seq_len
    count = trained(shape, setup)
    dweight = b * shape.vocab * D if setup.head_is_trained else 0
    gradients = count * (4 if setup.lora else b)
    states = {"adamw": 2 * gradients, "8bit": 2 * count + -(-count // 32), "none": 0}
    block = block_bytes(shape, setup)
    # Frozen weights: the first norm's input needs no gradient, and the final norm has one.
    final = 0 if setup.lora else D * _norm_bytes(shape, setup)
    kept = b * D if setup.checkpointing else block
    activations = tokens * (shape.layers * kept + final)
    held = loss_bytes(shape, setup, sequences, loss)
    backward = tokens * (4 if setup.lora else b) * (2 * shape.intermediate + D)
    return Step(
        weights=b * shape.parameters() + 4 * (count if setup.lora else 0),
        states=states[setup.optimizer],
        gradients=gradients,
        activations=activations,
        loss=held,
        at_loss=activations + held,
        at_backward=activations
        + dweight
        + backward
        + (tokens * block if setup.checkpointing else 0),
        at_update=gradients + (dweight * (1 if loss == "fused" else 2) if shape.tied else 0),
    )


def largest(fits: Callable[[int], bool], guess: int = 1, resolution: float = 0.0) -> int:
    """The largest n >= 0 with ``fits(n)``, which holds up to some n and from there on does not.

    Starts at ``guess`` and asks fewer times the better that is. Stops when the first n that does
    not fit is within ``resolution`` (a share of n) of the one that does.
    """
    good, bad, n, stride = 0, 0, max(1, guess), max(1, guess // 8)
    while not bad or bad - good > max(1, int(resolution * good)):
        if fits(n):
            good = n
        else:
            bad = n
        if good and bad:
            n = (good + bad) // 2
        else:
            n, stride = max(1, n + (stride if good else -stride)), 2 * stride
    return good


@dataclass(frozen=True)
class Plan:
    """What fits into ``memory`` bytes: whole sequences, and the bytes of a step with them."""

    shape: ModelShape
    setup: Setup
    memory: int
    eager: int  # sequences
    fused: int

    @property
    def eager_tokens(self) -> int:
        return self.eager * self.setup.seq_len

    @property
    def fused_tokens(self) -> int:
        return self.fused * self.setup.seq_len


def plan(shape: ModelShape, setup: Setup, memory: int) -> Plan:
    """The largest batches, of eager and of the fused loss, whose step fits into ``memory`` bytes.

    Raises:
        ConfigError: the model has no positions for such sequences.
    """
    if 0 < shape.positions < setup.seq_len:
        raise ConfigError(
            f"--seq-len must be <= {shape.positions}, the model's positions; got {setup.seq_len}"
        )
    setup = replace(setup, card=setup.card or memory)

    def most(loss: str) -> int:
        return largest(lambda n: step_bytes(shape, setup, n, loss).peak <= memory)

    return Plan(shape, setup, memory, most("eager"), most("fused"))


def report(found: Plan, name: str) -> str:
    """The plan as text."""
    shape, setup = found.shape, found.setup
    head = f", LoRA of rank {setup.lora}" if setup.lora else ""
    head += ", frozen head" if setup.frozen_head else ""
    lines = [
        f"{name}: {shape.parameters():,} parameters, {trained(shape, setup):,} trained{head}",
        f"{setup.dtype}, optimizer {setup.optimizer}, sequences of {setup.seq_len} tokens, "
        f"{setup.scored} of them scored, "
        f"{'with' if setup.checkpointing else 'without'} gradient checkpointing",
        f"memory {_gib(found.memory)} GiB ({setup.device})",
        "",
    ]
    if not found.fused:
        return "\n".join([*lines, f"nothing fits: {_advice(found)}"])
    counts = found.eager, found.fused, found.fused
    losses = "eager", "fused", "eager"
    steps = [step_bytes(shape, setup, n, loss) for n, loss in zip(counts, losses, strict=True)]
    rows: list[tuple[str, list[str]]] = [
        ("", ["eager", "lolkernels", "eager there"]),
        ("sequences", [f"{n:,}" for n in counts]),
        ("tokens", [f"{n * setup.seq_len:,}" for n in counts]),
    ]
    for attribute, title in (
        ("weights", "weights, GiB"),
        ("states", "optimiser states"),
        ("gradients", "gradients"),
        ("activations", "activations"),
        ("loss", "the loss"),
        ("at_loss", "moment of the loss"),
        ("at_backward", "moment of a block's backward"),
        ("at_update", "moment of the update"),
        ("peak", "peak"),
    ):
        rows.append((title, [_gib(getattr(step, attribute)) for step in steps]))
    lines += [f"{title:<28}" + "".join(f"{cell:>14}" for cell in cells) for title, cells in rows]
    logits = 12 * found.fused * setup.scored * shape.vocab
    lines += [
        "",
        f"at {found.fused_tokens:,} tokens eager's three fp32 tensors of scored rows x vocabulary "
        f"are {_gib(logits)} GiB; lolkernels' extra memory is "
        f"{_gib(fused_extra_bytes(shape, setup, found.fused))} GiB",
        "peak = weights + states + the largest moment; lolrl plan --help states the formulas and "
        "what they leave out",
    ]
    return "\n".join(lines)


def _advice(found: Plan) -> str:
    """Why not one sequence fits, and what to try."""
    setup, step = found.setup, step_bytes(found.shape, found.setup, 1)
    always = step.weights + step.states + step.at_update
    if always > found.memory:
        why = f"weights, gradients and optimiser states take {_gib(always)} GiB"
        ways = ["--dtype bf16"] if setup.dtype == "fp32" else []
        ways += [] if setup.lora else ["--lora 16"]
        ways += ["--optimizer 8bit"] if setup.optimizer == "adamw" and not setup.lora else []
    else:
        why = f"one sequence of {setup.seq_len} tokens takes {_gib(step.peak)} GiB"
        ways = [] if setup.checkpointing else ["--checkpointing"]
        ways += ["a shorter --seq-len"]
    return f"{why}; try {', '.join([*ways, 'more --memory'])}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def parse_bytes(given: int | str, flag: str = "--memory") -> int:
    """24GiB, 512MiB, 80GB or a number of bytes, more than none.

    Raises:
        ConfigError: none of these.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(given))
    if found is None or found[2].upper() not in UNITS:
        raise ConfigError(f"{flag} must be like 24GiB, 512MiB or 80GB; got {given!r}")
    size = int(float(found[1]) * UNITS[found[2].upper()])
    if size < 1:
        raise ConfigError(f"{flag} must be >= 1 byte, got {given!r}")
    return size


def parse_shape(text: str) -> ModelShape:
    """A name of MODELS, or D,L,V[,I[,heads[,kv_heads]]][,tied] for blocks like Llama's.

    I is 4 D unless given, heads are 64 wide, and the head has a weight of its own unless tied.

    Raises:
        ConfigError: neither of the two, or sizes that make no model.
    """
    if text.lower() in MODELS:
        return MODELS[text.lower()]
    parts = text.split(",")
    tied = parts[-1].strip() == "tied"
    try:
        sizes = [int(part) for part in parts[: len(parts) - tied]]
    except ValueError:
        sizes = []
    if not 3 <= len(sizes) <= 6:
        raise ConfigError(
            f"--model-shape must be one of {', '.join(MODELS)}, or hidden,layers,vocab"
            f"[,intermediate[,heads[,kv_heads]]][,tied]; got {text!r}"
        )
    hidden, layers, vocab = sizes[:3]
    intermediate = sizes[3] if len(sizes) > 3 else 4 * hidden
    heads = sizes[4] if len(sizes) > 4 else max(1, hidden // 64)
    kv_heads = sizes[5] if len(sizes) > 5 else heads
    if heads < 1 or hidden % heads:
        raise ConfigError(f"--model-shape: heads must divide hidden={hidden}, got {heads}")
    return ModelShape(
        "llama", hidden, layers, heads, kv_heads, hidden // heads, intermediate, vocab, tied
    )


@dataclass(frozen=True)
class PlanOptions(Setup):
    """Flags of `lolrl plan`."""

    model_shape: str | None = _field(
        None,
        f"{', '.join(MODELS)}; or hidden,layers,vocab[,intermediate[,heads[,kv_heads]]][,tied].",
    )
    memory: int | str | None = _field(None, "What the step may take, like 24GiB, 512MiB or 80GB.")

    def report(self) -> str:
        name = str(self.model_shape)
        return report(plan(parse_shape(name), self, parse_bytes(str(self.memory))), name)
