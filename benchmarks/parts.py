"""The parts that a call is made of, each alone: products, sweeps, host time; and how they round."""

from __future__ import annotations

import importlib
import math
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
from report import Goal
from shapes import DTYPES, Shape, make_inputs
from torch import Tensor
from truth import Check, relative_error, truth

import lolkernels as lk

Build = list[tuple[Row, Callable[[], Contestant]]]
Case = dict[str, Any]


def timed(
    title: str,
    build: Build,
    floor: str,
    device: Device,
    rounds: int,
    until: float = math.inf,
    **more: Any,
) -> Case:
    rows = measure.measure(build, device, rounds=rounds, until=until)
    return report.case(title, rows, [floor], **more)


def vendor(a: Tensor, b: Tensor, dtype: torch.dtype, *, add: bool = False) -> Contestant:
    """The vendor's product a b of (m, k) and (k, n) in the operands' dtype or in fp32; added to
    what is there. Its first rows are compared with float64."""
    out = torch.zeros(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    if not a.is_cuda and dtype != a.dtype:
        raise UnavailableError("a CPU has no product that takes bf16 and gives fp32")
    wide = {} if dtype == a.dtype else {"out_dtype": dtype}
    call = partial(torch.addmm, out, a, b, out=out, **wide)
    return _product(a, b, call if add else partial(torch.mm, a, b, out=out, **wide), out, add=add)


def quack(a: Tensor, b: Tensor, dtype: torch.dtype) -> Contestant:
    try:
        gemm = importlib.import_module("quack.gemm_interface").gemm
    except Exception as error:  # its compiler may fail to load in many ways
        raise UnavailableError(f"QuACK does not load: {measure.short(error)}") from None
    return _product(a, b, partial(gemm, a, b, out_dtype=dtype, tuned=False), None)


def _product(
    a: Tensor, b: Tensor, call: Callable[[], Any], out: Tensor | None, *, add: bool = False
) -> Contestant:
    def check() -> Check:
        if out is not None:
            out.zero_()
        got = call()
        error, _ = relative_error((got if out is None else out)[:8], a[:8].double() @ b.double())
        return Check([] if error <= 1e-2 else [f"the product is off by {error:.2e}"])

    text = "2 m n k" + (", added to fp32" if add else "")
    return Contestant(call, check, flops=2 * a.numel() * b.shape[1], work=text)


def random(m: int, n: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(m + n)
    return torch.randn(m, n, generator=generator, device=device).bfloat16()


def products(
    rows: int, hidden: int, vocab: int, device: Device, rounds: int, peer: bool = False
) -> Case:
    """The three products of a call, in bf16 and with fp32 out; ``peer``: beside QuACK's."""
    h, w, dz = (
        random(*size, device.device) for size in ((rows, hidden), (vocab, hidden), (rows, vocab))
    )
    half, wide = torch.bfloat16, torch.float32
    makes: dict[str, Callable[[], Contestant]] = {}
    for name, (a, b) in {"logits": (h, w.T), "dweight": (dz.T, h), "dhidden": (dz, w)}.items():
        if peer and name == "dhidden":
            continue
        makes[f"{name}, cuBLAS bf16 out"] = partial(vendor, a, b, half)
        if peer:
            makes[f"{name}, QuACK bf16 out"] = partial(quack, a, b, half)
        else:
            makes[f"{name}, cuBLAS fp32 out"] = partial(vendor, a, b, wide)
    if not peer:
        makes["dweight, cuBLAS added to fp32"] = partial(vendor, dz.T, h, wide, add=True)
    title = f"Matrix products{' beside QuACK' if peer else ''}, N={rows} D={hidden} V={vocab} bf16"
    build: Build = [(Row(label, op="gemm"), make) for label, make in makes.items()]
    return timed(title, build, "logits, cuBLAS bf16 out", device, rounds)


def additions(sizes: tuple[int, ...], hidden: int, vocab: int, device: Device, rounds: int) -> Case:
    """dweight by chunks: what adding to an fp32 matrix costs at each number of rows K."""
    build: Build = []
    for k in sizes:
        dz, h = random(k, vocab, device.device), random(k, hidden, device.device)
        for name, add in (("added to fp32", True), ("fp32 out", False), ("bf16 out", False)):
            dtype = torch.float32 if "fp32" in name else torch.bfloat16
            make = partial(vendor, dz.T, h, dtype, add=add)
            build.append((Row(f"K={k}, {name}", op="gemm"), make))
    title = f"dweight of K rows, D={hidden} V={vocab} bf16"
    return timed(title, build, f"K={sizes[-1]}, bf16 out", device, rounds)


def sweeps(
    vocab: int,
    size: int,
    dtypes: tuple[str, ...],
    backends: list[str],
    device: Device,
    rounds: int,
    until: float = math.inf,
    goals: bool = False,
) -> Case:
    """Row functions over ``size`` bytes of logits, beside a copy of them."""
    build: Build = [(Row("copy", "copy", "copy"), partial(rowwise.copy, size, device.device))]
    aims = []
    for name in dtypes:
        n = max(8, size // (vocab * DTYPES[name].itemsize))
        rows = rowwise.make_rows(n, vocab, DTYPES[name], device.device)
        for b in library.distinct(backends, "exps_"):
            for make in (rowwise.sums, rowwise.exps, rowwise.dlogits, rowwise.logprob):
                op = make.__name__ + ("_" if make in (rowwise.exps, rowwise.dlogits) else "")
                label, share = f"{op} {name}, {b}", 0.85 if op == "logprob" else 0.90
                build.append((Row(label, "lolkernels", op), partial(make, rows, b)))
                text = f"{label} >= {share:.0%} of the copy's bandwidth (V={vocab})"
                aims.append(Goal(text, label, share, "copy", "bandwidth"))
    title = f"Row kernels, V={vocab}, {size / 2**20:g} MiB of logits"
    return timed(title, build, "copy", device, rounds, until, goals=aims if goals else [])


def truncation(sizes: tuple[int, ...], backends: list[str], device: Device) -> Case:
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
            inputs = make_inputs(Shape(rows, k, vocab, rows // 4, name), device=device.device)
            hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
            if name == "fp32" or device.kind == "cpu":
                logits = hidden.float() @ weight.float().T
            else:
                logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
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


def overhead(backend: str, device: Device) -> Case:
    facts = rowwise.overhead(backend, device)
    return report.case(f"What a call costs beside its kernels, {backend}", [], [], facts=facts)


def prediction(rows: int, hidden: int, vocab: int) -> Case:
    """What predict.py counts for a call, to stand beside what is measured."""
    predict, facts = importlib.import_module("predict"), list[dict[str, Any]]()
    for op, frozen in (
        ("a_lol", False),
        ("a_lol", True),
        ("linear_logprob", False),
        ("score", True),
    ):
        both = predict.count(op, rows, hidden, vocab, frozen=frozen)
        gemms = sum(map(sum, (part.products for part in both))) / (2 * rows * vocab * hidden)
        counted = {
            "launches": (sum(part.launches for part in both), ""),
            "bytes a logit": (sum(part.logit_bytes for part in both) / rows / vocab, ""),
            "products of 2 N V D": (gemms, ""),
            "time": (1e3 * sum(part.seconds() for part in both), "ms"),
            "host time": (predict.host_microseconds(op, frozen=frozen), "us"),
        }
        name = f"{op}{', frozen head' if frozen else ''}"
        facts += [{"label": f"{name}: {k}", "value": v, "unit": u} for k, (v, u) in counted.items()]
    title = f"Predicted by counting, N={rows} D={hidden} V={vocab} bf16"
    return report.case(title, [], [], facts=facts)
