"""One row per objective: how to draw its inputs, and its closed form on plain numbers.

A closed form takes one group as lists of numbers per sequence and returns the group's loss with
d loss / d statistic of each token, written from the formula and not from the code.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lolkernels as lk
from lolkernels import objectives

Numbers = list[list[float]]  # per sequence of the group, per token
Closed = Callable[[dict[str, Any]], tuple[float, dict[str, Numbers]]]


class Form(NamedTuple):
    name: str
    closed: Closed
    options: dict[str, Any] = {}  # noqa: RUF012
    group_size: int = 1
    whole: dict[str, float] = {}  # noqa: RUF012  # side inputs that are one number

    @property
    def objective(self) -> Callable[..., Any]:
        return objectives.REGISTRY[self.name]

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def clip(w: float, low: float, high: float) -> float:
    return min(max(w, 1 - low), 1 + high)


# --- the A-LoL family -----------------------------------------------------------------------------


def family(weight: str | None, ratio: str = "", beta: float = 0.0, eps: float = 1e9) -> Closed:
    """-weight sum_t w_t l_t + beta sum_t (l_t - r_t), coefficient -(weight w_t - beta)."""

    def form(x: dict[str, Any]) -> tuple[float, dict[str, Numbers]]:
        (l,) = x["logps"]  # noqa: E741
        factor = 1.0 if weight is None else x[weight][0]
        factor = max(factor, 0.0) if weight == "advantages" else factor
        (r,) = x.get("ref_logps", [[0.0] * len(l)])
        w = [1.0] * len(l)
        if ratio == "sequence":
            w = [clip(math.exp(sum(l) - sum(r)), eps, eps)] * len(l)
        elif ratio == "token":
            w = [clip(math.exp(a - b), eps, eps) for a, b in zip(l, r, strict=True)]
        elif ratio == "floor":
            w = [max(math.exp(a), 0.2) for a in l]
        loss = -factor * sum(a * b for a, b in zip(w, l, strict=True)) + beta * (sum(l) - sum(r))
        return loss, {"logps": [[-(factor * a - beta) for a in w]]}

    return form


# --- preferences ----------------------------------------------------------------------------------


def margin(x: dict[str, Any], reference: bool = True) -> float:
    chosen, rejected = (
        sum(l) - (sum(r) if reference else 0.0)
        for l, r in zip(x["logps"], x["ref_logps"], strict=True)  # noqa: E741
    )
    return chosen - rejected


def of_a_pair(x: dict[str, Any], chosen: float, rejected: float) -> dict[str, Numbers]:
    return {"logps": [[chosen] * len(x["logps"][0]), [rejected] * len(x["logps"][1])]}


def dpo(beta: float, e: float = 0.0, reference: bool = True) -> Closed:
    def form(x: dict[str, Any]) -> tuple[float, dict[str, Numbers]]:
        h = beta * margin(x, reference)
        c = -beta * ((1 - e) * sigma(-h) - e * sigma(h))
        loss = -(1 - e) * math.log(sigma(h)) - e * math.log(sigma(-h))
        return loss, of_a_pair(x, c, -c)

    return form


def ipo(x: dict[str, Any]) -> tuple[float, dict[str, Numbers]]:
    off = margin(x) - 1 / (2 * 0.2)
    return off**2, of_a_pair(x, 2 * off, -2 * off)


def simpo(x: dict[str, Any]) -> tuple[float, dict[str, Numbers]]:
    n = [max(len(l), 1) for l in x["logps"]]  # noqa: E741
    s = [sum(l) / m for l, m in zip(x["logps"], n, strict=True)]  # noqa: E741
    m = 1.5 * (s[0] - s[1]) - 0.4
    return math.log1p(math.exp(-m)), of_a_pair(x, -1.5 * sigma(-m) / n[0], 1.5 * sigma(-m) / n[1])


def pro(x: dict[str, Any]) -> tuple[float, dict[str, Numbers]]:
    n = [max(len(l), 1) for l in x["logps"]]  # noqa: E741
    s = [sum(l) / m for l, m in zip(x["logps"], n, strict=True)]  # noqa: E741
    r, k, weight = x["rewards"], len(n), 0.05
    g, loss = [0.0] * k, -weight * (k - 1) ** 2 * sum(x["logps"][0])
    for i in range(k - 1):
        tau = {j: r[i] - r[j] for j in range(i + 1, k)}
        top = max(tau.values())
        z = math.exp(s[i] * top) + sum(math.exp(s[j] * t) for j, t in tau.items())
        loss += math.log(z) - s[i] * top
        g[i] += top * (math.exp(s[i] * top) / z - 1)
        for j, t in tau.items():
            g[j] += t * math.exp(s[j] * t) / z
    c = [a / m - (weight * (k - 1) ** 2 if i == 0 else 0) for i, (a, m) in enumerate(zip(g, n))]  # noqa: B905
    return loss, {"logps": [[a] * len(l) for a, l in zip(c, x["logps"], strict=True)]}  # noqa: E741


def kto(x: dict[str, Any]) -> tuple[float, dict[str, Numbers]]:
    (l,), (r,) = x["logps"], x["ref_logps"]  # noqa: E741
    sign, weight = (1, 1.3) if x["desirable"][0] > 0 else (-1, 0.7)
    v = sigma(sign * 0.4 * (sum(l) - sum(r) - x["z0"]))
    return weight * (1 - v), {"logps": [[-weight * sign * 0.4 * v * (1 - v)] * len(l)]}


# --- policy gradients -----------------------------------------------------------------------------


def clipped(rho: float, a: float, low: float, high: float) -> tuple[float, float]:
    """max(-A rho, -A clip(rho)), and what it hands on to d log rho."""
    binds = rho > 1 + high if a > 0 else rho < 1 - low
    return -a * (clip(rho, low, high) if binds else rho), 0.0 if binds else -a * rho


def ppo(x: dict[str, Any]) -> tuple[float, dict[str, Numbers]]:
    loss, c, dv = 0.0, [], []
    names = ("logps", "entropy", "old_logps", "advantages", "values", "old_values", "returns")
    for l, h, o, a, v, ov, g in zip(*(x[k][0] for k in names), strict=True):  # noqa: E741
        policy, slope = clipped(math.exp(l - o), a, 0.2, 0.2)
        near = min(max(v, ov - 0.3), ov + 0.3)
        taken = (v - g) ** 2 >= (near - g) ** 2
        loss += policy + 0.5 * 0.5 * max((v - g) ** 2, (near - g) ** 2) - 0.02 * h
        c.append(slope)
        dv.append(0.5 * (v - g) if taken else 0.0)
    return loss, {"logps": [c], "entropy": [[-0.02] * len(c)], "values": [dv]}


def grpo(high: float, mean: bool) -> Closed:
    def form(x: dict[str, Any]) -> tuple[float, dict[str, Numbers]]:
        (l,), (o,), (r,), a = x["logps"], x["old_logps"], x["ref_logps"], x["advantages"][0]  # noqa: E741
        n, loss, c = max(len(l), 1) if mean else 1, 0.0, []
        for lt, ot, rt in zip(l, o, r, strict=True):
            policy, slope = clipped(math.exp(lt - ot), a, 0.2, high)
            loss += (policy + 0.04 * (math.exp(rt - lt) - (rt - lt) - 1)) / n
            c.append((slope + 0.04 * (1 - math.exp(rt - lt))) / n)
        return loss, {"logps": [c]}

    return form


def gspo(low: float, high: float) -> Closed:
    def form(x: dict[str, Any]) -> tuple[float, dict[str, Numbers]]:
        (l,), (o,) = x["logps"], x["old_logps"]  # noqa: E741
        n = max(len(l), 1)
        loss, slope = clipped(math.exp((sum(l) - sum(o)) / n), x["advantages"][0], low, high)
        return loss, {"logps": [[slope / n] * len(l)]}

    return form


# --- soft Q ---------------------------------------------------------------------------------------


def soft_q(value: str, prior: bool) -> Closed:
    def form(x: dict[str, Any]) -> tuple[float, dict[str, Numbers]]:
        q, (v,), (r,) = x["target_logit"][0], x[value], x["token_rewards"]
        p = x["ref_logps"][0] if prior else [0.0] * len(q)
        after = [*v[1:], 0.0]
        off = [a + b / 2.0 + 0.9 * c - d for a, b, c, d in zip(p, r, after, q)]  # noqa: B905
        return sum(d * d for d in off), {"target_logit": [[-2 * d for d in off]]}

    return form


FORMS = [
    Form("nll", family(None)),
    Form("wbc", family("rewards")),
    Form("r_gold", family("rewards", "floor"), {"floor": 0.2}),
    Form("r_lol", family("rewards", "sequence", eps=0.3), {"clip": 0.3}),
    Form("r_lol", family("rewards", "sequence"), {"clip": None}),
    Form("a_lol", family("advantages", "sequence", eps=0.9)),
    Form("a_lol", family("advantages", "sequence", eps=0.1), {"clip": 0.1}),
    Form("a_lol", family("advantages", "sequence", eps=2.0), {"clip": 2.0}),
    Form("a_lol_seq", family("advantages", "token", eps=0.9)),
    Form("a_lol_seq", family("advantages", "token", eps=0.1), {"clip": 0.1}),
    Form("a_lol_seq", family("advantages", "token"), {"clip": None}),
    Form("a_lol_ref_free", family("advantages")),
    Form("a_lol_kl", family("advantages", beta=0.1)),
    Form("a_lol_kl", family("advantages", beta=0.5), {"beta": 0.5}),
    Form("r_lol_kl", family("rewards", beta=0.2), {"beta": 0.2}),
    Form("dpo", dpo(0.1), group_size=2),
    Form("dpo", dpo(0.7, 0.2), {"beta": 0.7, "label_smoothing": 0.2}, 2),
    Form("dpo", dpo(0.1, reference=False), {"reference_free": True}, 2),
    Form("ipo", ipo, {"beta": 0.2}, 2),
    Form("simpo", simpo, {"beta": 1.5, "gamma": 0.4}, 2),
    Form("pro", pro, group_size=2),
    Form("pro", pro, group_size=3),
    Form(
        "kto",
        kto,
        {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.7},
        whole={"z0": 0.3},
    ),
    Form("ppo", ppo, {"value_clip": 0.3, "value_coef": 0.5, "entropy_coef": 0.02}),
    Form("grpo", grpo(0.2, True)),
    Form("grpo", grpo(0.3, False), {"clip_high": 0.3, "length_normalised": False}),
    Form("gspo", gspo(3e-4, 4e-4)),
    Form("gspo", gspo(0.2, 0.2), {"clip": 0.2, "clip_high": None}),
    Form("psi_learning", soft_q("target_net_lse", True), {"c": 2.0, "gamma": 0.9}),
    Form("g_learning", soft_q("target_net_lse", False), {"c": 2.0, "gamma": 0.9}),
    Form("q_learning", soft_q("target_net_max_logit", True), {"c": 2.0, "gamma": 0.9}),
]


class Drawn(NamedTuple):
    seq: lk.Sequences
    stats: dict[str, Tensor]  # every statistic, (N,) float64
    side: dict[str, Tensor]  # the side inputs of the form's objective


def draw(form: Form, spread: float, lengths: list[int] | None = None, seed: int = 0) -> Drawn:
    """Statistics of random logits, and side inputs with log-ratios of this ``spread``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    lengths = lengths or [3, 0, 5, 1, 4, 2][: 6 if 6 % form.group_size == 0 else 4]
    seq = lk.Sequences.from_lengths(lengths, group_size=form.group_size)
    z = normal(seq.num_tokens, 8)
    log_p = z.log_softmax(1)
    stats = {
        "logps": log_p[:, 0].clone(),
        "lse": z.logsumexp(1),
        "entropy": -(log_p.exp() * log_p).sum(1),
        "target_logit": z[:, 0].clone(),
        "max_logit": z.amax(1),
    }
    side: dict[str, Tensor] = {}
    for name, kind in objectives.side_inputs(form.objective).items():
        if name in form.whole:
            side[name] = torch.tensor(form.whole[name], dtype=torch.float64)
        elif kind == "token" and name.endswith("logps"):
            side[name] = (stats["logps"] + spread * normal(seq.num_tokens)).clamp(max=-1e-3)
        elif kind != "option":
            side[name] = normal(seq.num_tokens if kind == "token" else seq.num_sequences)
    return Drawn(seq, stats, side)


def by_hand(form: Form, drawn: Drawn) -> tuple[list[float], dict[str, list[float]]]:
    """The losses (G,) and the flat gradients that the closed form gives, in plain numbers."""
    seq, k = drawn.seq, form.group_size
    cu = seq.cu_seqlens.tolist()
    kinds = objectives.side_inputs(form.objective)
    losses: list[float] = []
    grads: dict[str, list[float]] = {}
    for g in range(seq.num_groups):
        members = range(g * k, (g + 1) * k)
        x: dict[str, Any] = dict(form.whole)
        for name, value in {**drawn.stats, **drawn.side}.items():
            if kinds.get(name) == "sequence":
                x[name] = [float(value[s]) for s in members]
            elif name not in form.whole:
                x[name] = [value[cu[s] : cu[s + 1]].tolist() for s in members]
        loss, slopes = form.closed(x)
        losses.append(loss)
        for name, numbers in slopes.items():
            grads.setdefault(name, []).extend(a for row in numbers for a in row)
    return losses, grads
