"""What a call on a GPU launches, moves and multiplies, counted on a machine without one.

    PYTHONPATH=. python benchmarks/predict.py [rows]

Kernels and products do nothing. An op of torch is one launch; some, such as a sort, are several.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import timeit
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lolkernels as lk
from lolkernels import deferred, memory, walk_gpu
from lolkernels.backends import TABLE
from lolkernels.backends.contract import Exps

CARD, FLOPS, BANDWIDTH = 141 * 10**9, 683e12, 4.3e12  # an H200: bytes, of products, of a sweep
LAUNCH = 2.5e-6  # seconds from one small kernel to the next
GOALS = {4096: 1.08, 2048: 1.15, 896: 1.30}  # over the products alone, by hidden size: trained head
HOST = ("empty", "detach", "item", "_local_scalar", "lift_fresh", "_unsafe_view")  # no kernel


class Count(TorchDispatchMode):
    """Counts torch's ops within it, inside the bodies of ours too."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()  # kernels of ours and of torch's
        self.products: list[int] = []  # their flops
        self.logit_bytes = 0  # of sweeps, and of products that write more than 2 bytes a logit
        self.other_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lolkernels":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        out, schema = func(*args, **(kwargs or {})), func._schema
        may_view = not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)
        view = may_view and memory_of(out) <= memory_of((args, kwargs))  # a conversion may be none
        made = size(*tree_leaves(out))
        if made and not view and not any(name in str(func) for name in HOST):
            self.launched[str(func)] += 1
            self.other_bytes += size(*tree_leaves((args, kwargs))) + made
        return out

    @property
    def launches(self) -> int:
        return self.launched.total() + len(self.products)

    @property
    def seconds_beyond(self) -> float:  # the products
        return (self.logit_bytes + self.other_bytes) / BANDWIDTH + LAUNCH * self.launches


def memory_of(values: Any) -> set[int]:
    tensors = (t for t in tree_leaves(values) if isinstance(t, Tensor))
    return {t.untyped_storage().data_ptr() for t in tensors}


def size(*values: Any) -> int:
    return sum(t.numel() * t.element_size() for t in values if isinstance(t, Tensor))


@contextlib.contextmanager
def nothing_runs(count: Count) -> Iterator[None]:
    """Within the block the backend "counted" stands for a GPU's: its kernels only count."""

    def kernel(name: str, *args: Any, out: Tensor | None = None, **_: Any) -> Any:
        count.launched[name] += 1
        if name in ("exps_", "sums", "dlogits_"):
            count.logit_bytes += size(args[0], out)
            return out if name == "dlogits_" else Exps(*torch.empty(6, len(args[0])))
        if name == "sequence_coef":
            return [torch.empty(len(args[i])) for i in (3, 0, 3, 3)]
        # E W in and out with the labels' rows of the weight, or hidden with its rows of dweight.
        count.other_bytes += 3 * size(args[5] if name == "finish" else args[2])
        return None

    def matmul(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
        count.products.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        if out.stride(0) == memory.padded(b.shape[1]):  # logits
            count.logit_bytes += out.numel() * (out.element_size() - 2)
        elif accumulate:
            count.other_bytes += 2 * size(out)

    def kept_rows(v: int, d: int, e: int, budget: Any, _: Any, most: Any = None) -> int:
        return held(v, d, e, budget, torch.device("cuda"), most, CARD)

    names = ("exps_", "sums", "dlogits_", "sequence_coef", "finish", "add_labels")
    kernels = {name: partial(kernel, name) for name in names}
    held, record = memory.kept_rows, TABLE["reference"]._replace(panels=False, **kernels)
    values = {"immediate": lambda device: False, "check_values": lambda *_: None}
    with (
        mock.patch.dict(TABLE, counted=record._replace(name="counted")),
        mock.patch.dict(deferred._flags),
        mock.patch.multiple(deferred, **values),
        mock.patch.multiple(memory, kept_rows=kept_rows),
        mock.patch.multiple(walk_gpu, matmul=matmul),
    ):
        deferred.flags(torch.device("cpu"))  # made once
        yield


def make(op: str, n: int, d: int, v: int, frozen: bool, bias: bool = False) -> tuple[Any, Any]:
    """A forward in bfloat16, and its backward: of linear_logprob, score, or an objective's name."""
    h, w = (torch.empty(k, d, dtype=torch.bfloat16) for k in (n, v))
    leaves = [t.requires_grad_() for t in (h, w)[: 0 if op == "score" else 2 - frozen]]
    y, vector, s = torch.empty(n, dtype=torch.int64), torch.empty(n), max(1, n // 512)
    seq = lk.Sequences.from_lengths([n // s] * (s - 1) + [n - n // s * (s - 1)])
    side = {"ref_logps": vector, "advantages": torch.empty(s)} if op == "a_lol" else {}

    known, options = lk.objectives.REGISTRY.get(op), {"backend": "counted"}
    options |= {"bias": torch.empty(v, dtype=torch.bfloat16)} if bias else {}
    loss = known and partial(lk.linear_loss, known, h, w, y, seq, **options, **side)
    up = {1: vector, 0: vector[0]}
    return (
        loss or (lambda: lk.linear_logprob(h, w, y, **options).logps),
        lambda out: leaves and torch.autograd.grad(out, leaves, up[out.dim()]),
    )


def count(op: str, n: int, d: int, v: int, frozen: bool, bias: bool = False) -> tuple[Count, Count]:
    """Of the forward and of the backward of :func:`make`."""
    there, back, (forward, backward) = Count(), Count(), make(op, n, d, v, frozen, bias)
    with nothing_runs(there), there:
        out = forward()
    with nothing_runs(back), back:
        backward(out)
    return there, back


def host_microseconds(op: str, frozen: bool) -> float:
    """The median of calls on few rows: what Python and torch take where kernels do nothing."""
    forward, backward = make(op, 16, 16, 64, frozen)
    with nothing_runs(Count()):
        return 1e6 * sorted(timeit.repeat(lambda: backward(forward()), number=1, repeat=200))[100]


def main(n: int) -> None:
    print(
        "op, D | launches: forward (products), backward | bytes a logit | GEMMs | ratio | host us"
    )
    cases = [*itertools.product(("a_lol", "linear_logprob"), (False, True)), ("score", True)]
    for (op, frozen), (d, goal) in itertools.product(cases, GOALS.items()):
        v = 151_936 if d == 896 else 128_256
        a, b = count(op, n, d, v, frozen)
        flops, moved = sum(a.products + b.products), (a.logit_bytes + b.logit_bytes) / (n * v)
        ratio = 1 + (a.seconds_beyond + b.seconds_beyond) * FLOPS / flops
        print(
            f"{op}{' frozen' * frozen}, {d} | {a.launches} ({len(a.products)}), {b.launches} | "
            f"{moved:.1f} | {flops / (2 * n * v * d):.2f} | {ratio:.3f}"
            f"{f' (goal {goal})' * (not frozen)} | {host_microseconds(op, frozen):.0f}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4096)
