"""Calls the compiled ops with random tensors, fitting and not: binding_fuzz.py LIBRARY CASES SEED.

Run under AddressSanitizer by test_sanitizers.py. Every call must return or raise RuntimeError; a
storage holds exactly the elements its view reaches, so one too many is a report.
"""

import sys
from collections import Counter

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.float64, torch.int64, torch.int32, torch.bool)


def chance(p: float) -> bool:
    return bool(torch.rand(()) < p)


def draw(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def view(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of random strides; floating ones may overlap."""
    lowest = 0 if dtype.is_floating_point else 1
    strides = tuple(draw(lowest, 4) if chance(0.5) else draw(1, 64) for _ in shape)
    if chance(0.5):
        strides = torch.empty(shape, device="meta").stride()
    empty = 0 in shape
    extent = 0 if empty else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    storage = (torch.randn(extent) * 4).to(dtype)
    return storage.as_strided(shape, strides)


def floats(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = FLOATS[:1]) -> Tensor:
    if chance(0.02):
        shape = (*shape, 1) if chance(0.5) else tuple(n + 1 for n in shape)
    return view(shape, OTHERS[draw(0, 3)] if chance(0.02) else dtypes[draw(0, len(dtypes) - 1)])


def labels(n: int, v: int) -> Tensor:
    y = view((n,), torch.int64 if chance(0.98) else torch.int32)
    choice = (0, v - 1, v, -1, -(2**31), 2**31 - 1, draw(0, max(v, 1)))
    return y.copy_(torch.tensor([choice[draw(0, 6)] for _ in range(n)], dtype=torch.int64))


def options() -> tuple[float, float, float]:
    scale, softcap, temperature = (0.5, 1.0)[draw(0, 1)], (0.0, 30.0)[draw(0, 1)], 0.7
    if chance(0.02):
        temperature = (0.0, -1.0, float("nan"))[draw(0, 2)]
    if chance(0.02):
        softcap = (-1.0, float("nan"), float("inf"))[draw(0, 2)]
    return scale, softcap, temperature


def call_exps(n: int, v: int) -> None:
    x = floats((n, v), FLOATS)
    out = None if chance(0.5) else x if chance(0.5) else floats((n, v), FLOATS)
    anchor = None if chance(0.5) else floats((n,))
    torch.ops.lolkernels.exps(x, labels(n, v), anchor, *options(), out=out)


def call_dlogits(n: int, v: int) -> None:
    x = floats((n, v), FLOATS)
    out = x if chance(0.4) else floats((n, v), FLOATS)
    if chance(0.1) and x.dtype == torch.float32:
        out = x.view(torch.int16).view(torch.bfloat16) if x.is_contiguous() else x.transpose(0, -1)
    vectors = [floats((n,)) for _ in range(4)]
    torch.ops.lolkernels.dlogits(x, labels(n, v), *vectors, *options(), out=out)


def call_sequence_coef(n: int, s: int) -> None:
    cuts = torch.randint(n + 1, (s + 1,)).sort().values
    cuts[0], cuts[-1] = 0, n
    if chance(0.1):
        cuts[draw(0, s)] += draw(-(2**40), 2**40)
    torch.ops.lolkernels.sequence_coef(
        floats((n,)),
        None if chance(0.3) else floats((n,)),
        view((s + 1,), torch.int64).copy_(cuts),
        floats((s,)),
        draw(-1, 3) if chance(0.1) else draw(0, 2),
        -0.5,
        0.5 if chance(0.9) else -1.0,
        0.1,
    )


def main(library: str, cases: int, seed: int) -> None:
    torch.ops.load_library(library)
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    outcomes: Counter[str] = Counter()
    for _ in range(cases):
        call = (call_exps, call_dlogits, call_sequence_coef)[draw(0, 2)]
        n, v = draw(0, 5), draw(0, 6) if chance(0.2) else draw(1, 70)
        if call is call_exps and chance(0.1):
            v = draw(2040, 2060)
        try:
            call(n, v)
            outcomes["computed"] += 1
        except RuntimeError as error:
            if " must " not in str(error):
                raise
            outcomes["refused"] += 1
    print(dict(outcomes))
    assert min(outcomes["computed"], outcomes["refused"]) > cases // 20


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
