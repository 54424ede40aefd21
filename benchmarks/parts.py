"""The parts that a call is made of, each alone: products, sweeps, host time; and how they round."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import library
import measure
import report
import rowwise
import torch
from measure import Device, Row
from peers import Contestant, UnavailableError
from shapes import Shape, make_inputs
from torch import Tensor
from truth import Check, relative_error, truth

import lolkernels as lk

Build = list[tuple[Row, Callable[[], Contestant]]]


def product(
    a: Tensor, b: Tensor, out: Tensor | None, call: Callable[[], Any], *, add: bool = False
) -> Contestant:
    """A matrix product a b of (m, k) and (k, n); its first rows are compared with float64."""
    m, k, n = *a.shape, b.shape[1]

    def check() -> Check:
        if out is not None:
            out.zero_()
        got = call() if out is None else (call(), out)[1]
        error, _ = relative_error(got[:8], a[:8].double() @ b.double())
        return Check([] if error <= 1e-2 else [f"the product is off by {error:.2e}"])

    text = "2 m n k" + (", added to fp32" if add else "")
    return Contestant(call, check, flops=2 * m * n * k, work=text)


def vendor(a: Tensor, b: Tensor, dtype: torch.dtype, *, add: bool = False) -> Contestant:
    """cuBLAS's product in the operands' dtype or in fp32; added to what is there."""
    out = torch.zeros(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    if not a.is_cuda and dtype != a.dtype:
        raise UnavailableError("a CPU has no product that takes bf16 and gives fp32")
    if add:
        call = partial(torch.addmm, out, a, b, out=out)
    elif dtype == a.dtype:
        call = partial(torch.mm, a, b, out=out)
    else:
        call = partial(torch.mm, a, b, out_dtype=dtype, out=out)
    if add and dtype != a.dtype:
        call = partial(torch.addmm, out, a, b, out_dtype=dtype, out=out)
    return product(a, b, out, call, add=add)


def quack(a: Tensor, b: Tensor, dtype: torch.dtype) -> Contestant:
    try:
        gemm = importlib.import_module("quack.gemm_interface").gemm
    except Exception as error:  # its compiler may fail to load in many ways
        raise UnavailableError(f"QuACK does not load: {measure.short(error)}") from None
    return product(a, b, None, partial(gemm, a, b, out_dtype=dtype, tuned=False))


def random(m: int, n: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(m + n)
    return torch.randn(m, n, generator=generator, device=device).bfloat16()


def products(
    rows: int, hidden: int, vocab: int, device: Device, *, peer: bool = False
) -> tuple[str, Build, str]:
    """Logits, dhidden and dweight by every way cuBLAS has; or two of them beside QuACK's."""
    h, w = random(rows, hidden, device.device), random(vocab, hidden, device.device)
    dz = random(rows, vocab, device.device)
    half, wide = torch.bfloat16, torch.float32
    operands = {"logits": (h, w.T), "dweight": (dz.T, h)}
    build: Build = []
    for name, (a, b) in (operands if peer else {**operands, "dhidden": (dz, w)}).items():
        build.append((Row(f"{name}, cuBLAS bf16 out", op="gemm"), partial(vendor, a, b, half)))
        if peer:
            build.append((Row(f"{name}, QuACK bf16 out", op="gemm"), partial(quack, a, b, half)))
        else:
            build.append((Row(f"{name}, cuBLAS fp32 out", op="gemm"), partial(vendor, a, b, wide)))
    if not peer:
        adds = partial(vendor, dz.T, h, wide, add=True)
        build.append((Row("dweight, cuBLAS added to fp32", op="gemm"), adds))
    title = f"Matrix products{' beside QuACK' if peer else ''}, N={rows} D={hidden} V={vocab} bf16"
    return title, build, "logits, cuBLAS bf16 out"


def additions(
    sizes: tuple[int, ...], hidden: int, vocab: int, device: Device
) -> tuple[str, Build, str]:
    """dweight by chunks: what adding to an fp32 matrix costs at each number of rows K."""
    build: Build = []
    for k in sizes:
        dz, h = random(k, vocab, device.device), random(k, hidden, device.device)
        for name, dtype, add in (
            ("added to fp32", torch.float32, True),
            ("fp32 out", torch.float32, False),
            ("bf16 out", torch.bfloat16, False),
        ):
            make = partial(vendor, dz.T, h, dtype, add=add)
            build.append((Row(f"K={k}, {name}", op="gemm"), make))
    return f"dweight of K rows, D={hidden} V={vocab} bf16", build, f"K={sizes[-1]}, bf16 out"


def sweeps(rows: int, vocab: int, backends: list[str], device: Device) -> tuple[str, Build, str]:
    """Row functions over fp32 logits, as they come out of a product, beside a copy."""
    made = rowwise.make_rows(rows, vocab, torch.float32, device.device)
    build: Build = [
        (Row("copy", "copy", "copy"), partial(rowwise.copy, made.logits.nbytes, device.device)),
        (Row("one read, sweep.py", op="exps_"), partial(rowwise.exps, made, None)),
    ]
    for b in library.distinct(backends, "row_stats"):
        narrow = partial(rowwise.dlogits, made, b, narrow=True)
        build += [
            (Row(f"exps_, {b}", "lolkernels", "exps_"), partial(rowwise.exps, made, b)),
            (
                Row(f"row_stats, {b}", "lolkernels", "row_stats"),
                partial(rowwise.row_stats, made, b),
            ),
            (Row(f"dlogits_ to bf16, {b}", "lolkernels", "dlogits_"), narrow),
        ]
    return f"Sweeps of fp32 logits, N={rows} V={vocab}", build, "copy"


def timed(found: tuple[str, Build, str], device: Device, rounds: int) -> dict[str, Any]:
    title, build, floor = found
    rows = measure.measure(build, device, rounds=rounds)
    return report.case(title, rows, [floor])


def truncation(sizes: tuple[int, ...], backends: list[str], device: Device) -> dict[str, Any]:
    """How a product of K terms is off, and a log-prob with it, in nat: the mean (what truncation
    leaves), the spread, the worst, and a sum over 1024 tokens."""
    facts: list[dict[str, Any]] = []

    def add(label: str, off: Tensor) -> None:
        mean, spread, worst = float(off.mean()), float(off.std()), float(off.abs().max())
        value = {"mean": mean, "spread": spread, "worst": worst, "1024 tokens": 1024 * abs(mean)}
        facts.extend(
            {"label": f"{label}: {k}", "value": v, "unit": "nat"} for k, v in value.items()
        )

    rows, vocab = (256, 2048) if device.kind == "cuda" else (8, 64)
    for k in sizes:
        for name in ("bf16", "fp16", "fp32"):
            shape = Shape(rows, k, vocab, rows // 4, name)
            inputs = make_inputs(shape, device=device.device)
            hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
            logits = torch.empty(rows, vocab, device=device.device)
            if name == "fp32" or device.kind == "cpu":
                torch.mm(hidden.float(), weight.float().T, out=logits)
            else:
                torch.mm(hidden, weight.T, out_dtype=torch.float32, out=logits)
            want = hidden.double() @ weight.double().T
            add(f"K={k} {name}, logits toward zero", (want - logits.double()) * want.sign())
            exact = truth("score", inputs).logps
            for b in backends:
                try:
                    with torch.no_grad():
                        got = lk.linear_logprob(hidden, weight, inputs.labels, backend=b).logps
                except ValueError:  # it does not take this dtype
                    continue
                add(f"K={k} {name}, log-prob, {b}", got.double() - exact)
    return report.case("What sums of K terms are off by, against float64", [], [], facts=facts)


def overhead(backend: str, device: Device) -> dict[str, Any]:
    facts = rowwise.overhead(backend, device)
    return report.case(f"What a call costs beside its kernels, {backend}", [], [], facts=facts)
