"""A head whose rows stand on several ranks, against the whole head in one process."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from judges import eager, fuzz, peaky
from objective_forms import FORMS, Form
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import lolkernels as lk
from lolkernels import objectives, walk_cpu
from tests.ranks.harness import close, own, parts, raises, scenario

F64 = torch.float64


def weighted(out: lk.LogprobOutput, statistics: str) -> Tensor:
    """A loss of these statistics with a coefficient of its own for each row."""
    n = out.lse.numel()
    total = torch.zeros((), dtype=out.lse.dtype)
    for i, name in enumerate(statistics.split()):
        total = total + (torch.linspace(-1, 2 + i, n) * getattr(out, name).flatten()).sum()
    return total


def sharded(
    p: Any, sizes: list[int] | None, statistics: str = "logps", **options: Any
) -> dict[str, Tensor]:
    """Results and gradients, of this rank's rows with ``sizes``."""
    if sizes is not None:
        options["tp_group"] = dist.group.WORLD
    leaves = {"hidden": p.hidden, "weight": p.weight, "bias": p.bias}
    leaves = {
        k: (t if sizes is None or k == "hidden" else own(t, sizes)).detach().clone()
        for k, t in leaves.items()
        if t is not None
    }
    for t in leaves.values():
        t.requires_grad_()
    h, w, b = leaves["hidden"], leaves["weight"], leaves.get("bias")
    out = lk.linear_logprob(h, w, p.labels, bias=b, **p.options, **options)
    weighted(out, statistics).backward()
    return {**out._asdict(), **{f"d{k}": t.grad for k, t in leaves.items()}}


@scenario(2, 4)
def shards_equal_the_whole_head() -> None:
    """Uneven shards of every shape, with bias, soft-cap, temperature and scale, in float64."""
    checked = 0
    for seed in range(24):
        p = fuzz(seed, (F64,))
        if p.weight.shape[0] < 2 * dist.get_world_size():
            continue
        sizes = parts(p.weight.shape[0])
        for statistics in ("logps", "logps lse", "logps lse entropy"):
            whole = sharded(p, None, statistics)
            close(sharded(p, sizes, statistics), whole, 1e-11, sizes)
            checked += 1
    assert checked > 40


@scenario(2)
def every_way_through_the_walk() -> None:
    """A frozen head or hidden states, rows that the budget does not hold, an announced entropy."""
    p = peaky(23, 8, 301, dtype=F64, bias=True)
    sizes = parts(301)
    keep = torch.arange(23) % 3 != 1
    labels = p.labels.masked_fill(torch.arange(23) == 3, -100)
    for options in (
        {"memory_budget": 5 * 301 * 8},
        {"entropy_grad": True},
        {"entropy_grad": True, "memory_budget": 5 * 301 * 8},
        {"mask": keep},
    ):
        q = type(p)(p.hidden, p.weight, labels, p.bias)
        whole = sharded(q, None, "logps entropy", **options)
        close(sharded(q, sizes, "logps entropy", **options), whole, 1e-11, sizes)
    for frozen in ("hidden", "weight"):
        h = p.hidden.clone().requires_grad_(frozen != "hidden")
        w = own(p.weight, sizes).clone().requires_grad_(frozen != "weight")
        b = own(p.bias, sizes)
        out = lk.linear_logprob(h, w, p.labels, bias=b, tp_group=dist.group.WORLD)
        weighted(out, "logps").backward()
        name, got = ("dweight", w.grad) if frozen == "hidden" else ("dhidden", h.grad)
        close({name: got}, {name: sharded(p, None)[name]}, 1e-11, sizes)


@scenario(2)
def a_low_rank_part_is_sharded_by_rows_too() -> None:
    """Beside a frozen shard of the weight and a trained one; log-probs, and an objective."""
    p = peaky(23, 8, 301, dtype=F64, bias=True)
    sizes, seq = parts(301), lk.Sequences.from_lengths([11, 12])
    low, up = torch.randn(23, 3, dtype=F64), 0.3 * torch.randn(301, 3, dtype=F64)

    def results(sizes: list[int] | None, trained: bool, objective: bool) -> dict[str, Tensor]:
        mine = (lambda t: t) if sizes is None else (lambda t: own(t, sizes))
        leaves = {"hidden": p.hidden, "low": low, "weight": mine(p.weight), "up": mine(up)}
        leaves = {k: t.detach().clone().requires_grad_() for k, t in leaves.items()}
        h, a, w, b = leaves.values()
        w.requires_grad_(trained)
        options = {"bias": mine(p.bias), "low_rank": (a, b)}
        if sizes is not None:
            options["tp_group"] = dist.group.WORLD
        if objective:
            loss = lk.linear_loss(objectives.nll, h, w, p.labels, seq, **options)
        else:
            loss = weighted(lk.linear_logprob(h, w, p.labels, **options), "logps lse entropy")
        loss.backward()
        made = {f"d{k}": t.grad for k, t in leaves.items() if t.requires_grad}
        return {"loss": loss.detach(), **made}

    for trained in (False, True):
        for objective in (False, True):
            whole = results(None, trained, objective)
            close(results(sizes, trained, objective), whole, 1e-11, sizes)


@scenario(2, 4)
def confident_labels_keep_their_digits() -> None:
    """In float32, down to 1 - p = 1e-9, where target_logit - lse has none left: row by row."""
    n, d, v = 12, 64, 400
    p = peaky(n, d, v)
    at = p.weight[p.labels]
    lift = torch.linspace(8, 45, n)[:, None] * at / at.square().sum(1, keepdim=True)
    p = type(p)(lift, p.weight, p.labels)
    truth, sizes = sharded(p.double(), None), parts(v)
    truth["logps"] = truth["logps"].detach()
    assert float(truth["logps"].max()) > -1e-8 and float(truth["logps"].min()) < -0.01
    got = sharded(p, sizes, backend="cpu")
    for name in ("logps", "dhidden"):
        for row, want in zip(got[name], truth[name], strict=True):
            close({name: row}, {name: want}, 2e-5)


@scenario(2)
def sharding_costs_no_product() -> None:
    """Three for a trained head, although the combined log-prob asks for a gradient of lse too."""
    p = peaky(9, 8, 31)
    with mock.patch.object(walk_cpu, "matmul", wraps=walk_cpu.matmul) as products:
        sharded(p, parts(31))
    assert products.call_count == 3


@scenario(2)
def a_dtensor_brings_its_group() -> None:
    p = peaky(9, 8, 31, dtype=F64, bias=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    w, b = (distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (p.weight, p.bias))
    out = lk.linear_logprob(p.hidden, w, p.labels, bias=b)
    weighted(out, "logps lse").backward()
    want = sharded(p, None, "logps lse")
    assert w.grad.placements == (Shard(0),)
    got = {**out._asdict(), "dweight": w.grad.full_tensor(), "dbias": b.grad.full_tensor()}
    close(got, {k: want[k] for k in got})
    for placement in (Replicate(), Shard(1)):
        other = distribute_tensor(p.weight, mesh, [placement])
        raises(lambda w=other: lk.linear_logprob(p.hidden, w, p.labels), "takes Shard(0)")
    group = dist.new_group(list(range(dist.get_world_size())))
    raises(
        lambda: lk.linear_logprob(p.hidden, w.detach(), p.labels, tp_group=group), "leave it out"
    )


@scenario(2, 4)
def logits_in_shards() -> None:
    p = peaky(14, 6, 57, dtype=F64)
    sizes = parts(57)
    logits = p.hidden @ p.weight.T
    whole, part = logits.clone().requires_grad_(), logits.split(sizes, 1)[dist.get_rank()]
    part = part.clone().requires_grad_()
    options: dict[str, Any] = {"softcap": 20.0, "temperature": 0.7}
    want = lk.logprob(whole, p.labels, **options)
    options["tp_group"] = dist.group.WORLD
    got = lk.logprob(part * 1, p.labels, **options)
    for out in (want, got):
        weighted(out, "logps lse entropy").backward()
    expected = {**want._asdict(), "d": whole.grad.split(sizes, 1)[dist.get_rank()]}
    close({**got._asdict(), "d": part.grad}, expected)
    raises(lambda: lk.logprob(part, p.labels, inplace=True, **options), "whole vocabulary")


def objective_problem(form: Form) -> tuple[Any, lk.Sequences, dict[str, Tensor]]:
    """Rows, and side inputs some of which ask for a gradient, others for no work."""
    lengths = [3, 0, 5, 1, 4, 2]
    p = peaky(sum(lengths), 6, 41, dtype=F64)
    seq = lk.Sequences.from_lengths(lengths, group_size=form.group_size)
    logps = eager(p).logps.detach()
    side: dict[str, Any] = {}
    for name, kind in objectives.side_inputs(form.objective).items():
        n = {"token": seq.num_tokens, "sequence": seq.num_sequences}.get(kind)
        if name in form.whole:
            side[name] = torch.tensor(form.whole[name], dtype=F64)
        elif name.endswith("logps"):
            side[name] = (logps + 0.3 * torch.randn(n, dtype=F64)).clamp(max=-1e-3)
        elif kind != "option":
            side[name] = torch.randn(n, dtype=F64)
    return p, seq, side | form.options


@scenario(2)
def every_objective_over_a_sharded_head() -> None:
    sizes = parts(41)
    for form in FORMS:
        p, seq, side = objective_problem(form)
        found = []
        for w, group in ((p.weight, None), (own(p.weight, sizes), dist.group.WORLD)):
            h, w = p.hidden.clone().requires_grad_(), w.clone().requires_grad_()
            given = dict(side)
            for name in ("values", "rewards"):
                if name in side:
                    given[name] = side[name].clone().requires_grad_()
            out = lk.linear_loss(
                form.objective, h, w, p.labels, seq, tp_group=group, return_outputs=True, **given
            )
            out.loss.backward()
            values = {**out._asdict(), **out.metrics, "dhidden": h.grad, "dweight": w.grad}
            values |= {f"d{k}": t.grad for k, t in given.items() if k in ("values", "rewards")}
            del values["metrics"]
            found.append({k: t for k, t in values.items() if t is not None})
        close(found[1], found[0], 1e-10, sizes)


@scenario(2)
def what_ranks_disagree_on_is_an_error() -> None:
    p = peaky(5, 4, 20, dtype=F64)
    rank, w = dist.get_rank(), own(p.weight, parts(20))
    tp = {"tp_group": dist.group.WORLD}
    raises(lambda: lk.linear_logprob(p.hidden, w, (p.labels + rank) % 20, **tp), "labels differed")
    raises(
        lambda: lk.linear_logprob(p.hidden, w, p.labels.index_fill(0, p.labels[:1] * 0, 20), **tp),
        "outside [0, 20)",
    )
    seq = lk.Sequences.from_lengths([2, 3])
    bad = p.labels.clone()
    bad[0] = -100
    raises(lambda: lk.linear_loss(objectives.nll, p.hidden, w, bad, seq, **tp), "outside [0, 20)")
