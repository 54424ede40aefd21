"""The float64 truth, and the gate: how far a result is from it, and whether it may be timed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from shapes import CLIP, Inputs
from torch import Tensor

SUM_NAT = 1e-3  # the contract: nat a sequence
# Relative errors of a whole gradient. bf16 rounds each logit's gradient once and the result once.
GRADIENT = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}
ROW = 4  # the worst row's error, over the largest row, may be this many times that
LOOSE_NAT, LOOSE_GRADIENT = 5.0, 0.05  # for a peer in half precision, see judge
# On tensor cores, which truncate what they add, a result beyond the bounds above misses them; it is
# wrong beyond these: nat a sequence, and times the error of eager's gradient.
WRONG_NAT, WRONG_GRADIENT = 0.1, 3.0


class Result(NamedTuple):
    """What every contestant returns; None where nothing asks for it."""

    logps: Tensor | None  # (N,)
    dhidden: Tensor | None = None  # (T, D)
    dweight: Tensor | None = None  # (V, D)


class Truth(NamedTuple):
    which: Tensor  # (n,) of the N rows: all, or those of some sequences
    logps: Tensor  # (n,) float64, as all here
    lengths: list[int]  # of those sequences
    dhidden: Tensor | None  # (n, D)
    dweight: Tensor | None  # (V, D); None unless `which` is all


@dataclass
class Check:
    """What a result was off by; faults, if any, keep it from being timed."""

    faults: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)  # bounds, by how much: timed all the same
    sum_nat: float | None = None  # largest error of a sequence's summed log-prob
    gradients: dict[str, float] = field(default_factory=dict)  # relative errors, Frobenius norm


def coefficient(op: str, inputs: Inputs, s: int, here: Tensor, picked: Tensor) -> Tensor:
    """d loss / d l_t of the s-th sequence, S in all.

    linear_loss (A-LoL)  -A w / S, w = clip(exp(sum_t (l_t - r_t)), 1 - eps, 1 + eps)
    otherwise            the upstream gradient
    """
    if op != "linear_loss":
        return inputs.upstream[here].double()
    log_ratio = (picked - inputs.ref_logps[here].double()).sum()
    weight = -inputs.advantages[s].double() / inputs.seq.num_sequences
    return (weight * log_ratio.exp().clamp(1 - CLIP, 1 + CLIP)).expand_as(picked)


def truth(op: str, inputs: Inputs, most_rows: int | None = None) -> Truth:
    """The result of `op` in float64, one sequence at a time, from the formulas alone.

    With z = h W^T, l_t = z[y] - lse and c_t the coefficient d loss / d l_t (see `coefficient`):
    dz_t = c_t ([v = y_t] - softmax(z_t)),  dh = dz W,  dW = dz^T h.

    Of more than `most_rows` rows, only sequences spread evenly over the batch are worked out: their
    log-probs and dhidden, which depend on no other sequence, and no dweight.
    """
    cu = inputs.seq.cu_seqlens.tolist()
    groups, chosen = len(cu) - 1, range(len(cu) - 1)
    if most_rows is not None and cu[-1] > most_rows:
        count = max(1, most_rows * groups // cu[-1])
        chosen = sorted({groups - 1 - i * groups // count for i in range(count)})
    all_of_them = len(chosen) == groups
    weight = inputs.weight.detach().double()
    trains = op != "score"
    dweight = torch.zeros_like(weight) if trains and inputs.weight.requires_grad else None
    dweight = dweight if all_of_them else None
    which, logps, dhidden = [], [], []
    for s in chosen:
        here = torch.arange(cu[s], cu[s + 1], device=weight.device)
        rows = inputs.rows[here]
        hidden, labels = inputs.hidden.detach()[rows].double(), inputs.labels[rows, None]
        log_p = (hidden @ weight.T).log_softmax(-1)
        picked = log_p.gather(-1, labels).squeeze(-1)
        which.append(here)
        logps.append(picked)
        if not trains:
            continue
        coef = coefficient(op, inputs, s, here, picked)
        dz = log_p.exp_().mul_(-coef[:, None])
        dz.scatter_add_(-1, labels, coef[:, None])
        dhidden.append(dz @ weight)
        if dweight is not None:
            dweight.addmm_(dz.T, hidden)
    return Truth(
        torch.cat(which),
        torch.cat(logps),
        [len(part) for part in which],
        torch.cat(dhidden) if trains else None,
        dweight,
    )


def relative_error(got: Tensor, want: Tensor) -> tuple[float, float]:
    """(Frobenius norm of the error over the truth's, worst row's error over the largest row)."""
    pairs = zip(got.split(8192), want.split(8192), strict=True)
    off = torch.cat([(g.double() - w).norm(dim=1) for g, w in pairs])
    size = torch.cat([w.norm(dim=1) for w in want.split(8192)])
    return float(off.norm() / size.norm()), float(off.max() / size.max())


def judge(
    got: Result,
    want: Truth,
    inputs: Inputs,
    *,
    strict: bool = True,
    eager: dict[str, float] | None = None,
) -> Check:
    """Summed log-probs within 1e-3 nat a sequence of float64 on the same (rounded) inputs, and
    gradients within a few roundings of their dtype, plus what the ratio passes on: it is the
    exponential of a summed log-ratio, so an error of the sum is a relative error of the gradient.

    ``eager``, the errors of eager's gradients: what lies beyond those bounds is missed, and wrong
    only at 0.1 nat a sequence or three times eager's error.

    Not strict, for a peer in half precision: a fault only where the result is no log-prob of these
    inputs at all. One that rounds logits to bf16 misses the contract by its design, and its row
    says by how much.
    """
    check = Check()

    def hold(name: str, value: float, bound: float, wrong: float, unit: str, row: float) -> None:
        text = f"{name} off by {value:.2e}{f' (worst row {row:.2e})' if row else ''} {unit}"
        if not (value <= wrong and row <= ROW * wrong):
            check.faults.append(text)
        elif not (value <= bound and row <= ROW * bound):
            check.missed.append(f"{text}, bound {bound:.1e}")

    if got.logps is None or got.logps.shape != inputs.ref_logps.shape:
        return Check(["log-probs are missing or misshapen"])
    off = (got.logps[want.which].double() - want.logps).split(want.lengths)
    sum_nat = check.sum_nat = float(torch.stack([part.sum().abs() for part in off]).max())
    wrong = SUM_NAT if eager is None else WRONG_NAT
    bounds = (SUM_NAT, wrong) if strict else (LOOSE_NAT, LOOSE_NAT)
    hold("summed log-prob", sum_nat, *bounds, "nat", 0.0)
    passed_on = math.expm1(min(sum_nat, LOOSE_NAT))
    for name, exact in (("dhidden", want.dhidden), ("dweight", want.dweight)):
        if exact is None:
            continue
        ours = getattr(got, name)
        if ours is None or ours.shape != getattr(inputs, name[1:]).shape:
            check.faults.append(f"{name} is missing or misshapen")
            continue
        if name == "dhidden":
            if bool(ours[~inputs.mask].any()):
                check.faults.append("dhidden is not zero where there is no loss")
            ours = ours[inputs.rows[want.which]]
        error, row = relative_error(ours, exact)
        check.gradients[name] = error
        bound = (GRADIENT[ours.dtype] if strict else LOOSE_GRADIENT) + passed_on
        wrong = bound
        if eager is not None and strict:
            wrong = max(bound, WRONG_GRADIENT * max(GRADIENT[ours.dtype], eager.get(name, 0.0)))
        hold(name, error, bound, wrong, "of its size", row)
    return check
