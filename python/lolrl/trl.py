"""TRL: its trainers on lolkernels' log-probs, and a trainer of A-LoL for those who live there.

SFT, DPO, KTO, GRPO and RLOO of TRL 1.15 and 1.16 give their models a fused head, whose one kernel
is `trl.trainer.utils._ChunkedLogProbFunction`. `use_lolkernels` stands in for it:

    from lolrl.trl import use_lolkernels

    use_lolkernels()
    trl.SFTTrainer(...).train()

Nothing else of a trainer, a script or a model changes. `lolkernels.fuse_lm_head` has no effect on a
model in a TRL trainer, whose own forward takes its place: a warning says so, once.

`ALoLTrainer` takes what TRL's trainers take, and a `reward`; it needs no `use_lolkernels`.
"""

from __future__ import annotations

import copy
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import trl
from packaging.version import Version
from torch import Tensor
from trl.trainer import utils

import lolkernels as lk
from lolrl.annotate import RewardFuncs, call_reward_funcs, shared_columns
from lolrl.config import ConfigError, LoLConfig
from lolrl.data import Record, RecordList, read_records
from lolrl.files import canonical_json
from lolrl.prepare import check_reward_funcs
from lolrl.tokens import LoLDataset
from lolrl.trainer import LoLTrainer

__all__ = ["ALoLConfig", "ALoLTrainer", "use_lolkernels"]

FIRST, LAST = Version("1.15"), Version("1.17")  # the seam: from, and before
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
ROWS, COLUMNS = 2048, 4096  # of a tile of logits
# How far logps + lse may be from the label's logit, in units of the last place of the larger.
ULPS = 8


class use_lolkernels:  # noqa: N801
    """TRL's trainers compute log-probs with `lolkernels.linear_logprob`, until `undo`.

    It acts at once, for every model that TRL has given or will give its fused head; as a context
    manager it ends with the block. Losses, gradients and metrics are TRL's, computed from fp32
    logits: in bf16 they differ by what TRL rounds. On a CPU only the labelled positions are
    scored, where TRL scores all. A label outside the vocabulary raises. `mean_logits` under a
    soft-cap, `log_sum_sq_probs` (DPO's `use_weighting`) and the `is_top1` of a label that is the
    likeliest at p <= 1/2 cost a further product without gradient.

    Args:
        backend, memory_budget: see `lolkernels.linear_logprob`.
        entropy_grad: the loss uses the gradient of the entropy (GRPO's `entropy_coef`): logits are
            held for it. Without it that gradient is as right, and costs one product more.

    Raises:
        ImportError: the installed TRL has no such seam, or one that is not known.
        ValueError: of `linear_logprob`, in the first step: among others for a `logit_scale` or a
            temperature that is not above zero.
    """

    def __init__(
        self,
        *,
        backend: str | None = None,
        memory_budget: int | None = None,
        entropy_grad: bool = False,
    ) -> None:
        installed = Version(Version(trl.__version__).base_version)
        if not FIRST <= installed < LAST:
            raise ImportError(
                f"trl {trl.__version__} is installed, and lolkernels can take the place of the "
                f"kernel of trl >= {FIRST}, < {LAST}: pip install 'trl>={FIRST},<{LAST}'"
            )
        self.options = {
            "backend": backend,
            "memory_budget": memory_budget,
            "entropy_grad": entropy_grad,
        }
        self._found = {"_ChunkedLogProbFunction": utils._ChunkedLogProbFunction}
        utils._ChunkedLogProbFunction = self
        if hasattr(utils, "_use_triton"):  # what decides whether masked rows are left out
            self._found["_use_triton"] = utils._use_triton
            utils._use_triton = _leaves_rows_out

    def undo(self) -> None:
        """Put back what was there before."""
        for name, value in self._found.items():
            setattr(utils, name, value)

    def __enter__(self) -> use_lolkernels:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def apply(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """TRL's call: logps, and of OUTPUTS those asked for, each (N,), else None.

        `chunk_size` is TRL's tile; ours follows `memory_budget`.
        """
        unknown = set(outputs) - {"log_probs", *OUTPUTS}
        if unknown:
            raise ValueError(f"outputs={sorted(unknown)} are not known; they are {OUTPUTS}")
        head = {"bias": bias, "softcap": final_logit_softcapping, "logit_scale": logit_scale}

        def score(temperature: float) -> lk.LogprobOutput:
            return lk.linear_logprob(
                hidden, weight, targets, temperature=temperature, **head, **self.options
            )

        out = score(temperature)
        logps, lse = out.logps.detach(), out.lse.detach()
        squares = means = top = None
        if "log_sum_sq_probs" in outputs:
            # sum p^2 = sum exp(2 z) / (sum exp z)^2, and 2 z are the logits at half temperature
            with torch.no_grad():
                squares = score(temperature / 2).lse - 2 * lse
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            if "mean_logits" in outputs:
                means = _mean_logits(hidden, weight, **head) / temperature
            if "is_top1" in outputs:
                near = ULPS * torch.finfo(lse.dtype).eps * (lse.abs() + out.max_logit.abs())
                top = logps + lse >= out.max_logit - near
                # Above 1/2 it has no rival; elsewhere the first of equals wins, as in argmax.
                rows = (top & (logps <= -0.5)).nonzero().squeeze(1)
                top[rows] = ~_tied(hidden[rows], weight, targets[rows], **head)
        return out.logps, out.entropy if "entropy" in outputs else None, squares, means, top


def _leaves_rows_out(device: torch.device) -> bool:
    return True


def _mean_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Tensor:
    """The mean of softcap(logit_scale (hidden W^T + bias)) over the vocabulary, (N,) fp32."""
    if softcap is None:
        mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
        return logit_scale * (mean if bias is None else mean + bias.float().mean())
    total = torch.zeros(len(hidden), device=hidden.device)
    for rows, _, z in _tiles(hidden, weight, bias, softcap, logit_scale):
        total[rows] += z.sum(1)
    return total / len(weight)


def _tied(hidden: Tensor, weight: Tensor, targets: Tensor, **head: Any) -> Tensor:
    """Whether a token before the label has exactly its logit, (N,) bool."""
    own = torch.zeros(len(hidden), device=hidden.device)
    before = torch.full_like(own, -torch.inf)
    for rows, columns, z in _tiles(hidden, weight, **head):
        place = targets[rows, None] - columns.start
        held = (place >= 0) & (place < z.shape[1])
        picked = z.gather(1, place.clamp(0, z.shape[1] - 1))
        own[rows] = torch.where(held, picked, own[rows, None]).squeeze(1)
        later = torch.arange(z.shape[1], device=z.device) >= place
        before[rows] = torch.maximum(before[rows], z.masked_fill(later, -torch.inf).amax(1))
    return before == own


def _tiles(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Logits in fp32, tile by tile, and where each stands."""
    for n in range(0, len(hidden), ROWS):
        h = hidden[n : n + ROWS].float()
        for v in range(0, len(weight), COLUMNS):
            columns = slice(v, v + COLUMNS)
            b = None if bias is None else bias[columns].float()
            z = logit_scale * F.linear(h, weight[columns].float(), b)
            yield (
                slice(n, n + ROWS),
                columns,
                z if softcap is None else softcap * (z / softcap).tanh(),
            )


_FIELDS = LoLConfig.__dataclass_fields__


@dataclass
class ALoLConfig(LoLConfig):
    """Arguments of `ALoLTrainer`: those of `LoLConfig`, which `trl.TrlParser` can read, and these.

    The objective is a name of lolkernels' registry with `objective_args`; `advantage_filter`,
    `sampling` and `step0_gate` are `LoLConfig`'s.

    Raises:
        ConfigError: (a `ValueError`) for a value out of range, naming the field.
    """

    # The order of these types is the one that TRL's parser needs.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "Trackers of the log lines, beside metrics.jsonl."}
    )
    # With None among its types argparse takes the text; a number it would want of "auto" too.
    beta: float | str | None = field(default="auto", metadata=_FIELDS["beta"].metadata)
    floor: float | str | None = field(default="auto", metadata=_FIELDS["floor"].metadata)
    objective_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Further options of the objective, by parameter name; JSON as text."},
    )
    baseline: str = field(
        default="auto",
        metadata={
            "help": "V(x) in the advantage reward - V(x). value: the column of that name; group: "
            "the mean reward of the rows with the same prompt; auto: the columns advantage or "
            "value where rows have them, else group."
        },
    )
    precompute_ref_log_probs: bool = field(
        default=True,
        metadata={
            "help": "Must stay True: the data is fixed, so the reference scores it once, by the op "
            "that training uses, and is not in memory afterwards."
        },
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of from_pretrained for models given by name; JSON as text."},
    )

    def __post_init__(self) -> None:
        if self.baseline not in ("auto", "value", "group"):
            raise ConfigError(f"baseline={self.baseline!r} is not one of auto, value, group")
        if not self.precompute_ref_log_probs:
            raise ConfigError(
                "precompute_ref_log_probs=False: scores of fixed data do not change, and are always"
                " computed once (an objective without ref_logps computes none); leave it True"
            )
        for name in ("objective_args", "model_init_kwargs"):
            if isinstance(getattr(self, name), str):
                try:
                    setattr(self, name, json.loads(getattr(self, name)))
                except ValueError as error:
                    raise ConfigError(f"{name} is not JSON ({error}); give a mapping") from None
        super().__post_init__()


class ALoLTrainer(LoLTrainer):
    """A-LoL, or another objective of lolkernels, on fixed data with rewards.

    Arguments, dataset columns and reward functions are as in TRL's trainers. A row has `prompt` and
    `completion`, both text or both messages, and a `reward`; or `chosen`, `rejected` and their
    rewards. Rows without a reward get it from `reward_funcs`, which see text or messages as the
    data holds them, and every further column.

    Args:
        model, ref_model: models, or their names or folders.
        processing_class: the tokenizer; None: the one beside the model.
        reward_funcs: `f(prompts, completions, **columns) -> list[float]`, one or several, weighted
            by `args.reward_func_weights`; also for the responses generated in evaluation.
        args, data_collator, train_dataset, eval_dataset, compute_metrics, callbacks, optimizers,
        peft_config, objective: as in `LoLTrainer`.

    Raises:
        ValueError: naming the argument or the row; among others if `baseline` is "group" and no
            prompt has two rows with different rewards.
    """

    reward_messages = True

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: ALoLConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        reward_funcs: RewardFuncs | None = None,
        objective: Any = None,
    ) -> None:
        args = ALoLConfig(output_dir="alol_output") if args is None else args
        if not isinstance(args, ALoLConfig):
            raise TypeError(f"args is a {type(args).__name__}; give an ALoLConfig")
        check_reward_funcs(reward_funcs, args)
        if processing_class is None:
            processing_class = _tokenizer_of(model)
        if train_dataset is not None and not isinstance(train_dataset, LoLDataset):
            records = read_records(
                train_dataset,
                reward_columns=args.reward_columns,
                reward_weights=args.reward_weights,
                on_bad=args.on_bad,
            )
            train_dataset = RecordList(map(copy.copy, records), source=records.source)
            train_dataset.skipped = records.skipped
            _fill_in_rewards(train_dataset, reward_funcs, args)
            _fill_in_values(train_dataset, args)
        super().__init__(
            _loaded(model, args),
            _loaded(ref_model, args),
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            compute_metrics,
            callbacks,
            optimizers,
            peft_config,
            reward_funcs,
            objective,
        )


def _loaded(model: Any, args: ALoLConfig) -> Any:
    if not isinstance(model, (str, os.PathLike)):
        return model
    from transformers import AutoModelForCausalLM

    given = args.model_init_kwargs or {}
    return AutoModelForCausalLM.from_pretrained(model, **given)  # type: ignore[arg-type]


def _tokenizer_of(model: Any) -> Any:
    from transformers import AutoTokenizer

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = inner if isinstance(inner, (str, os.PathLike)) else inner.config._name_or_path
    if not name:
        raise ValueError("processing_class is missing, and the model has no name; give a tokenizer")
    return AutoTokenizer.from_pretrained(name)


def _fill_in_rewards(
    records: list[Record], reward_funcs: RewardFuncs | None, args: ALoLConfig
) -> None:
    rows = [record for record in records if record.reward is None]
    if not rows or reward_funcs is None:
        return
    rewards = call_reward_funcs(
        reward_funcs,
        [row.prompt for row in rows],
        [row.completion for row in rows],
        weights=args.reward_func_weights,
        columns=shared_columns(rows),
    )
    for row, reward in zip(rows, rewards, strict=True):
        row.reward = reward


def _fill_in_values(records: list[Record], args: ALoLConfig) -> None:
    """V(x) of each record by `args.baseline`."""
    known = any(r.value is not None or r.advantage is not None for r in records)
    if args.baseline == "value" or (args.baseline == "auto" and known):
        return
    if any(record.reward is None for record in records):
        return  # an objective that needs an advantage will say so
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[canonical_json(record.prompt)].append(record)
    for rows in groups.values():
        mean = fmean(row.reward for row in rows if row.reward is not None)
        for row in rows:
            row.value, row.advantage = mean, None
