"""Losses on pairs (chosen, then rejected), on ranked lists (best first), and on judged answers.

A pair is a group of two sequences, a ranked list a group of K: ``Sequences.from_lengths(...,
group_size=2)``. One loss value per group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..sequences import Sequences
from .registry import PerSequence, PerToken, objective
from .values import number, positive, share


@objective()
def dpo(
    logps: PerToken,
    ref_logps: PerToken,
    seq: Sequences,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
) -> Tensor:
    """DPO: -(1 - e) log sigma(beta h) - e log sigma(-beta h), with e = label_smoothing and
    h = (S_w - S_l) - (S^r_w - S^r_l)  (Rafailov et al., 2023; smoothing: Mitchell, 2023).

    ``reference_free=True`` leaves out the S^r; ``ref_logps`` is not read then.
    """
    e, scale = share("label_smoothing", label_smoothing), positive("beta", beta)
    h = scale * _margin(seq.sum(logps if reference_free else logps - ref_logps), seq)
    return -(1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h)


@objective()
def ipo(logps: PerToken, ref_logps: PerToken, seq: Sequences, *, beta: float = 0.1) -> Tensor:
    """IPO: (h - 1 / (2 beta))^2 with DPO's h, of summed log-probs  (Azar et al., 2023)."""
    return (_margin(seq.sum(logps - ref_logps), seq) - 0.5 / positive("beta", beta)) ** 2


@objective()
def simpo(logps: PerToken, seq: Sequences, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """SimPO: -log sigma(beta (S_w / n_w - S_l / n_l) - gamma)  (Meng et al., 2024)."""
    margin = _margin(seq.mean(logps), seq)
    return -F.logsigmoid(positive("beta", beta) * margin - number("gamma", gamma))


@objective()
def pro(
    logps: PerToken, rewards: PerSequence, seq: Sequences, *, sft_weight: float = 0.05
) -> Tensor:
    """PRO: each answer of a ranked list against those behind it  (Song et al., 2023).

    sum_{k < K-1} [log(sum over {s_k tau_k, s_j tau_kj for j > k} of exp) - s_k tau_k] - sft_weight
    (K - 1)^2 S_0, with s = S / n, tau_kj = R_k - R_j and tau_k = max_j tau_kj. The first answer of
    the list is cloned too.
    """
    k = seq.group_size
    if k < 2:
        raise ValueError("pro ranks lists: build seq with group_size=K, K >= 2 answers, best first")
    s, r = seq.mean(logps).view(-1, k), rewards.view(-1, k)
    cloned = number("sft_weight", sft_weight) * (k - 1) ** 2 * seq.sum(logps).view(-1, k)[:, 0]
    loss = -cloned
    for i in range(k - 1):
        tau = r[:, i : i + 1] - r[:, i + 1 :]
        head = s[:, i] * tau.amax(1)
        loss = loss - head + torch.cat([head[:, None], s[:, i + 1 :] * tau], 1).logsumexp(1)
    return loss


@objective()
def kto(
    logps: PerToken,
    ref_logps: PerToken,
    desirable: PerSequence,
    z0: Tensor,
    seq: Sequences,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: w_d (1 - sigma(beta (h - z0))) where desirable > 0, else w_u (1 - sigma(beta (z0 - h))),
    with h = S - S^r  (Ethayarajh et al., 2024).

    ``z0``, a ``()`` tensor, estimates KL(pi || pi_ref) over the whole batch, at least 0 and without
    a gradient: the mean of S - S^r over completions paired with other prompts.
    """
    h = positive("beta", beta) * (seq.sum(logps - ref_logps) - torch.as_tensor(z0).detach())
    good = number("desirable_weight", desirable_weight) * torch.sigmoid(-h)
    bad = number("undesirable_weight", undesirable_weight) * torch.sigmoid(h)
    return torch.where(desirable > 0, good, bad)


def _margin(score: Tensor, seq: Sequences) -> Tensor:  # (S,) -> (G,)
    if seq.group_size != 2:
        raise ValueError(
            f"the loss couples pairs: build seq with group_size=2, got {seq.group_size}"
        )
    chosen, rejected = score.view(-1, 2).unbind(1)
    return chosen - rejected
