"""Fused losses for reinforcement learning of language models from existing data: A-LoL and kin."""

from . import objectives
from .backends import available_backends, use_backend
from .deferred import check_errors
from .fuse import fuse_lm_head, unfuse_lm_head
from .head import LogprobHead
from .logits import logprob
from .logprob import LogprobOutput, linear_logprob
from .loss import LinearLossOutput, linear_loss
from .objectives import aggregate, loss_and_coef, side_inputs
from .sequences import Sequences

__version__ = "0.1.0"

__all__ = [
    "LinearLossOutput",
    "LogprobHead",
    "LogprobOutput",
    "Sequences",
    "aggregate",
    "available_backends",
    "check_errors",
    "fuse_lm_head",
    "linear_logprob",
    "linear_loss",
    "logprob",
    "loss_and_coef",
    "objectives",
    "side_inputs",
    "unfuse_lm_head",
    "use_backend",
]
