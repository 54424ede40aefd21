"""The tokens of a sequence on several ranks, against whole sequences in one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from judges import eager, peaky
from objective_forms import FORMS
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import lolkernels as lk
from lolkernels import objectives
from tests.ranks.harness import close, raises, scenario
from tests.ranks.vocabulary import F64, objective_problem


def split(seq: lk.Sequences, group: Any, **kw: int) -> tuple[lk.Sequences, Tensor]:
    """This rank's sequences and which tokens are its own: uneven shares, some of them empty."""
    place = torch.arange(seq.num_tokens) * 3 // 4 + seq.token_to_sequence
    own = place % dist.get_world_size(group) == dist.get_rank(group)
    lengths = torch.bincount(seq.token_to_sequence[own], minlength=seq.num_sequences)
    return lk.Sequences.from_lengths(lengths, cp_group=group, **kw), own


def average(grad: Tensor, group: Any = None) -> Tensor:
    grad = grad.clone()
    dist.all_reduce(grad, group=group)
    return grad / dist.get_world_size(group)


@scenario(2, 4)
def every_objective_over_split_sequences() -> None:
    """Fused and in two steps; what the group holds alike has the same gradient on each rank."""
    world = dist.get_world_size()
    for i, form in enumerate(FORMS):
        if form.name in ("psi_learning", "g_learning", "q_learning"):
            continue  # they look at the next token
        p, seq, side = objective_problem(form)
        here, own = split(seq, dist.group.WORLD, group_size=form.group_size)
        assert here.lengths.tolist() == seq.lengths.tolist()
        assert here.total_tokens == seq.total_tokens
        kinds = objectives.side_inputs(form.objective)
        local = {k: v[own] if kinds[k] == "token" else v for k, v in side.items()}
        reduction = objectives.REDUCTIONS[i % 4]
        found = []
        for s, which, inputs in ((seq, slice(None), side), (here, own, local)):
            h, w = p.hidden[which].clone().requires_grad_(), p.weight.clone().requires_grad_()
            out = lk.linear_loss(
                form.objective, h, w, p.labels[which], s, reduction=reduction,
                return_outputs=True, **inputs,
            )  # fmt: skip
            out.loss.backward()
            values = {"loss": out.loss, "seq_loss": out.seq_loss, **out.metrics}
            found.append({**values, "dhidden": h.grad, "dweight": w.grad})
        whole, mine = found
        mine |= {"dhidden": mine["dhidden"] / world, "dweight": average(mine["dweight"])}
        close(mine, whole | {"dhidden": whole["dhidden"][own]}, 1e-11)
        h, w = p.hidden[own].requires_grad_(), p.weight.clone().requires_grad_()
        out = lk.linear_logprob(h, w, p.labels[own], entropy_grad=True)
        known = out._asdict() | {"target_logit": out.logps + out.lse}
        stats = {s: known[s] for s in objectives.statistics(form.objective)}
        losses = form.objective(**stats, seq=here, **local)
        lk.aggregate(losses, here, reduction).backward()
        close({"dweight": average(w.grad)}, {"dweight": whole["dweight"]}, 1e-11)


@scenario(4)
def a_split_vocabulary_too() -> None:
    """Two by two: the ranks of a row hold parts of the head, those of a column of the tokens."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    cp, tp = mesh["cp"].get_group(), mesh["tp"].get_group()
    p = peaky(12, 6, 41, dtype=F64)
    seq = lk.Sequences.from_lengths([3, 0, 5, 4])
    here, own = split(seq, cp)
    rows = slice(0, 17) if dist.get_rank(tp) == 0 else slice(17, 41)
    side = {"ref_logps": eager(p).logps.detach() - 0.1, "advantages": torch.ones(4, dtype=F64)}
    h, w = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
    want = lk.linear_loss(objectives.a_lol, h, w, p.labels, seq, **side)
    want.backward()
    x, part = p.hidden[own].requires_grad_(), p.weight[rows].clone().requires_grad_()
    side["ref_logps"] = side["ref_logps"][own]
    got = lk.linear_loss(objectives.a_lol, x, part, p.labels[own], here, tp_group=tp, **side)
    got.backward()
    mine = {"loss": got, "dhidden": x.grad / 2, "dweight": average(part.grad, cp)}
    close(mine, {"loss": want, "dhidden": h.grad[own], "dweight": w.grad[rows]}, 1e-11)


@scenario(2, 4)
def sums_within_sums() -> None:
    """A sequence's own sum as the weight of its tokens: the gradient crosses the ranks twice."""
    seq = lk.Sequences.from_lengths([3, 0, 5, 4])
    here, own = split(seq, dist.group.WORLD)
    x = torch.randn(seq.num_tokens, dtype=F64)
    scale = torch.tensor(0.7, dtype=F64)
    found = []
    for s, values in ((seq, x), (here, x[own])):
        values, a = values.clone().requires_grad_(), scale.clone().requires_grad_()
        loss = s.sum(a * values * s.expand(s.mean(values).tanh())).square().sum() + a
        loss.backward()
        found.append({"loss": loss, "x": values.grad, "scale": a.grad})
    whole, mine = found
    mine["x"] /= dist.get_world_size()
    mine["scale"] = average(mine["scale"])
    close(mine, {**whole, "x": whole["x"][own]})
    # The coefficients of the public helper are d loss / d the rank's own log-probs.
    logps = -x.exp()
    want = lk.loss_and_coef(
        objectives.simpo, logps, lk.Sequences.from_lengths([3, 0, 5, 4], group_size=2)
    )
    mine_seq, _ = split(seq, dist.group.WORLD, group_size=2)
    loss, coef, _ = lk.loss_and_coef(objectives.simpo, logps[own], mine_seq)
    close({"loss": loss, "coef": coef}, {"loss": want[0], "coef": want[1][own]})


@scenario(2)
def masks_of_positions() -> None:
    """Position chunks as ring attention deals them out, and the errors."""
    mask = torch.rand(5, 16) < 0.6
    mask[2] = False
    chunks = mask.chunk(4, 1)
    rank, group = dist.get_rank(), dist.group.WORLD
    here = lk.Sequences.from_mask(torch.cat([chunks[rank], chunks[3 - rank]], 1), cp_group=group)
    whole = lk.Sequences.from_mask(mask)
    assert here.lengths.tolist() == whole.lengths.tolist()
    assert (here.total_tokens, here.total_sequences) == (whole.total_tokens, 5)
    assert here.with_totals(num_tokens=99).total_tokens == 99
    ones = torch.ones(here.num_tokens, requires_grad=True)
    close({"sum": here.sum(ones)}, {"sum": whole.lengths.float()})
    close({"mean": here.mean(ones)}, {"mean": (whole.lengths > 0).float()})
    raises(lambda: here.following(ones), "the next token may stand on another rank")
    raises(lambda: lk.Sequences.from_lengths([1] * (2 + rank), cp_group=group), "[2, 3] sequences")
