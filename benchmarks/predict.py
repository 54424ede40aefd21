"""What a call on a GPU launches, moves and multiplies, counted on a machine without one.

    PYTHONPATH=. python benchmarks/predict.py [rows]

The walk over whole rows runs with kernels and products that do nothing. An op of torch counts as
one launch; some, such as a sort, are several.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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


@dataclass
class Count:
    launched: Counter[str] = field(default_factory=Counter)  # of ours and of torch's
    products: list[int] = field(default_factory=list)  # their flops
    logit_bytes: int = 0  # of sweeps, and of products that write more than 2 bytes a logit
    other_bytes: int = 0

    @property
    def launches(self) -> int:
        return self.launched.total() + len(self.products)

    def seconds(self) -> float:
        moved = (self.logit_bytes + self.other_bytes) / BANDWIDTH
        return sum(self.products) / FLOPS + moved + LAUNCH * self.launches


class Counting(TorchDispatchMode):
    """Counts torch's ops, inside the bodies of ours too."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lolkernels":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        out, schema = func(*args, **(kwargs or {})), func._schema
        view = not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)
        made = size(*tree_leaves(out))
        if made and not view and not any(name in str(func) for name in HOST):
            self.count.launched[str(func)] += 1
            self.count.other_bytes += size(*tree_leaves((args, kwargs))) + made
        return out


def size(*values: Any) -> int:
    return sum(t.numel() * t.element_size() for t in values if isinstance(t, Tensor))


def noted(kernel: Callable[..., Any], count: Count) -> Callable[..., Any]:
    return lambda *args, **k: (count.launched.update([kernel.__name__]), kernel(*args, **k))[1]


@contextlib.contextmanager
def nothing_runs(count: Count) -> Iterator[None]:
    """Within the block the backend "counted" stands for a GPU's: its kernels only count."""

    def exps_(x: Tensor, *_: Any, out: Tensor, **__: Any) -> Exps:
        count.logit_bytes += size(x, out)
        return Exps(*(x.new_empty(x.shape[0]) for _ in Exps._fields))

    def sums(x: Tensor, *_: Any, **__: Any) -> Exps:
        count.logit_bytes += size(x)
        return Exps(*(x.new_empty(x.shape[0]) for _ in Exps._fields))

    def dlogits_(x: Tensor, *_: Any, out: Tensor, **__: Any) -> Tensor:
        count.logit_bytes += size(x, out)
        return out

    def sequence_coef(logps: Tensor, ref: Any, cu: Any, weight: Tensor, **_: Any) -> list[Tensor]:
        return [torch.empty(t.shape) for t in (weight, logps, weight, weight)]

    def finish(sums: Any, labels: Any, vocab: int, out: Any, flags: Any, unit: Any, _: Any) -> None:
        count.other_bytes += 3 * size(unit)  # in and out, and the labels' rows of the weight

    def add_labels(table: Tensor, labels: Tensor, rows: Tensor, *_: Any) -> None:
        count.other_bytes += 3 * size(rows)

    def matmul(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
        count.products.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        if out.stride(0) == memory.padded(b.shape[1]):  # logits
            count.logit_bytes += out.numel() * (out.element_size() - 2)
        elif accumulate:
            count.other_bytes += 2 * size(out)

    def kept_rows(
        v: int, d: int, item: int, budget: Any, _: Any = None, longest: Any = None
    ) -> int:
        return held(v, d, item, budget, torch.device("cuda"), longest, CARD)

    held, kernels = memory.kept_rows, (exps_, sums, dlogits_, sequence_coef, finish, add_labels)
    record = TABLE["reference"]._replace(name="counted", panels=False)
    record = record._replace(**{k.__name__: noted(k, count) for k in kernels})
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.dict(TABLE, counted=record))
        patches.enter_context(mock.patch.dict(deferred._flags))
        for module, values in (
            (deferred, {"immediate": lambda device: False, "check_values": lambda *_: None}),
            (walk_gpu, {"matmul": matmul}),
            (memory, {"kept_rows": kept_rows}),
        ):
            patches.enter_context(mock.patch.multiple(module, **values))
        deferred.flags(torch.device("cpu"))  # made once
        yield


def make(op: str, n: int, d: int, v: int, *, frozen: bool = False, **options: Any) -> Any:
    """A forward in bfloat16, and its backward: of linear_logprob, score, or an objective's name."""
    h, w = (torch.empty(k, d, dtype=torch.bfloat16) for k in (n, v))
    leaves = [t.requires_grad_() for t in (h, w)[: 0 if op == "score" else 2 - frozen]]
    y, vector, s = torch.empty(n, dtype=torch.int64), torch.empty(n), max(1, n // 512)
    seq = lk.Sequences.from_lengths([n // s] * (s - 1) + [n - n // s * (s - 1)])
    side = {"ref_logps": vector, "advantages": torch.empty(s)} if op == "a_lol" else {}
    options = {"backend": "counted", **options}

    def forward() -> Tensor:
        if op in ("linear_logprob", "score"):
            return lk.linear_logprob(h, w, y, **options).logps
        objective = lk.objectives.REGISTRY[op]
        return lk.linear_loss(objective, h, w, y, seq, **side, **options)

    def backward(out: Tensor) -> Any:
        return leaves and torch.autograd.grad(out, leaves, vector if out.dim() else vector[0])

    return forward, backward


def count(*call: Any, **options: Any) -> tuple[Count, Count]:
    """Of the forward and of the backward of :func:`make`."""
    there, back, (forward, backward) = Count(), Count(), make(*call, **options)
    with nothing_runs(there), Counting(there):
        out = forward()
    with nothing_runs(back), Counting(back):
        backward(out)
    return there, back


def host_microseconds(op: str, *, frozen: bool, calls: int = 200) -> float:
    """The median of calls on few rows: what Python and torch take where kernels do nothing."""
    times, (forward, backward) = [], make(op, 16, 16, 64, frozen=frozen)
    with nothing_runs(Count()):
        for _ in range(calls):
            start = time.perf_counter()
            backward(forward())
            times.append(time.perf_counter() - start)
    return 1e6 * sorted(times)[calls // 2]


def main(n: int) -> None:
    print(
        "op, D | launches: forward (products), backward | bytes a logit | GEMMs | ratio | host us"
    )
    cases = [*itertools.product(("a_lol", "linear_logprob"), (False, True)), ("score", True)]
    for op, frozen in cases:
        host = host_microseconds(op, frozen=frozen)
        for d, goal in GOALS.items():
            v = 151_936 if d == 896 else 128_256
            there, back = count(op, n, d, v, frozen=frozen)
            flops, moved = sum(there.products + back.products), there.logit_bytes + back.logit_bytes
            ratio = (there.seconds() + back.seconds()) * FLOPS / flops
            launches = f"{there.launches} ({len(there.products)}), {back.launches}"
            parts = (launches, f"{moved / n / v:.1f}", f"{flops / (2 * n * v * d):.2f}")
            said = f"{ratio:.3f}" if frozen else f"{ratio:.3f} (goal {goal})"
            print(f"{op}{' frozen' * frozen}, {d}", *parts, said, f"{host:.0f}", sep=" | ")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4096)
