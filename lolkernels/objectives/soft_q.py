"""KL-control: the logits are a Q-function, kept near a prior p(a | s)  (Jaques et al., 2017, 2019).

``target_logit`` is Q(s_t, y_t) of the trained network. The value of the next state comes from the
target network theta^- (an older copy): its ``linear_logprob`` over the same rows gives
``target_net_lse`` or ``target_net_max_logit``, taken here at each sequence's next token and as 0
behind its last. ``token_rewards`` is the reward of each token, ``ref_logps`` the prior's log-prob.

Each loss is the sum over tokens of (target - Q)^2 with the target held fixed. Reduce by
"token-mean" for the mean over the data.
"""

from __future__ import annotations

from torch import Tensor

from ..sequences import Sequences
from .registry import PerToken, objective
from .values import positive, share


@objective()
def psi_learning(
    target_logit: PerToken,
    ref_logps: PerToken,
    token_rewards: PerToken,
    target_net_lse: PerToken,
    seq: Sequences,
    *,
    c: float = 1.0,
    gamma: float = 0.99,
) -> Tensor:
    """Psi-learning: (log p + r / c + gamma log sum_a' exp Psi(s', a'; theta^-) - Psi(s, a))^2.

    The policy is softmax(Psi).
    """
    reward = ref_logps + token_rewards / positive("c", c)
    return _squared(target_logit, reward, target_net_lse, gamma, seq)


@objective()
def g_learning(
    target_logit: PerToken,
    token_rewards: PerToken,
    target_net_lse: PerToken,
    seq: Sequences,
    *,
    c: float = 1.0,
    gamma: float = 0.99,
) -> Tensor:
    """G-learning: (r / c + gamma log sum_a' exp(log p(a' | s') + G(s', a'; theta^-)) - G(s, a))^2.

    ``target_net_lse`` is the log-sum-exp of log p + G, so of ``lolkernels.logprob`` on their sum.
    The policy is proportional to p exp G  (Fox et al., 2016).
    """
    return _squared(target_logit, token_rewards / positive("c", c), target_net_lse, gamma, seq)


@objective()
def q_learning(
    target_logit: PerToken,
    ref_logps: PerToken,
    token_rewards: PerToken,
    target_net_max_logit: PerToken,
    seq: Sequences,
    *,
    c: float = 1.0,
    gamma: float = 0.99,
) -> Tensor:
    """Q-learning with a log-prior: (log p + r / c + gamma max_a' Q(s', a'; theta^-) - Q(s, a))^2.

    The policy is the argmax of Q.
    """
    reward = ref_logps + token_rewards / positive("c", c)
    return _squared(target_logit, reward, target_net_max_logit, gamma, seq)


def _squared(q: Tensor, reward: Tensor, value: Tensor, gamma: float, seq: Sequences) -> Tensor:
    target = reward + share("gamma", gamma) * seq.following(value)
    return seq.sum((target.detach() - q) ** 2)
