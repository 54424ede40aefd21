"""An objective inside ``linear_loss``: how a call travels to the op, and its work on a block."""

from __future__ import annotations

import types
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, deferred, objectives
from .backends.contract import RowStats
from .objectives import NO_RATIO, Family, Objective
from .packing import Block
from .sequences import Sequences
from .walk import Coefficients


class Call(NamedTuple):
    """What a call is beside its tensors."""

    objective: Objective
    options: dict[str, Any]
    spec: tuple[tuple[str, str], ...]  # of the side inputs: name, kind (token, sequence, whole)
    backend: str
    operand: torch.dtype
    metrics: list[str]  # filled in by the first evaluation


# An op's schema has no callable: a call travels as a number in this table. Options that change with
# every step (an annealed coefficient) push the oldest out.
_MOST = 4096
_calls: OrderedDict[int, tuple[Any, Call]] = OrderedDict()  # number -> its key, the call
_numbers: dict[Any, int] = {}
_next = iter(range(2**62))


def bind(
    objective: Objective,
    options: tuple[tuple[str, Any], ...],
    spec: tuple[tuple[str, str], ...],
    *rest: Any,
) -> int:
    """The number of a call. A plain function is held weakly."""
    weak = isinstance(objective, types.FunctionType)
    held: Any = weakref.ref(objective) if weak else objective
    key = (held, options, spec, rest)
    try:
        number = _numbers.get(key)
    except TypeError as error:
        raise TypeError(f"objective and its options must be hashable: {error}") from None
    if number is None:
        number = _numbers[key] = next(_next)
        merged = {**objectives.defaults(objective), **dict(options)}
        names = list(objectives.traits(objective).metrics)
        _calls[number] = key, Call(*(held, merged, spec, *rest, names))
        if len(_calls) > _MOST:
            _, (oldest, _) = _calls.popitem(last=False)
            _numbers.pop(oldest, None)
    _calls.move_to_end(number)
    return number


def lookup(number: int) -> Call:
    if number not in _calls:
        raise RuntimeError(
            f"a compiled linear_loss is older than the last {_MOST} different options: compile it "
            "again"
        )
    call = _calls[number][1]
    held: Any = call.objective
    found: Any = held() if isinstance(held, weakref.ref) else held
    return call._replace(objective=found)


def revive(number: int, call: Call) -> None:
    """For a second backward: the call may have been pushed out since the first."""
    _calls.setdefault(number, (None, call))


class _Recording(torch._C._ForceDispatchKeyGuard):
    """Autograd inside an op, whose body runs below it: a coefficient is a gradient."""

    def __init__(self) -> None:
        autograd = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
        super().__init__(
            torch._C._dispatch_tls_local_include_set(),
            torch._C._dispatch_tls_local_exclude_set() - autograd,
        )


LOSS = "seq_loss"  # no metric has the name of an output


class Step:
    """The objective on blocks of rows: their statistics -> coefficients; it sums up the rest."""

    def __init__(
        self,
        call: Call,
        side: Sequence[Tensor],
        need_side: Sequence[bool],
        seq: Sequences,
        weights: Tensor,  # (G,)
    ) -> None:
        self.call, self.seq, self.weights = call, seq, weights
        self.traits = objectives.traits(call.objective)
        self.inputs = {
            name: (kind, value.to(seq.device, non_blocking=True), need)
            for (name, kind), value, need in zip(call.spec, side, need_side, strict=True)
        }
        self.side_grads = {
            name: torch.zeros_like(value) for name, (_, value, need) in self.inputs.items() if need
        }
        self.made: dict[str, Tensor] = {}  # the losses and metrics, each (G,)
        self.family: Family | None = None
        if self.traits.family is not None:
            self.family = self.traits.family(seq=seq, **self.side(self.whole))

    @property
    def fused(self) -> bool:
        """Whether ``sequence_coef`` does the work of the objective's own body.

        A side input's gradient comes from that body, and so does everything on the reference
        backend, which the kernels are tested against.
        """
        return self.family is not None and self.call.backend != "reference" and not self.side_grads

    def side(self, block: Block) -> dict[str, Any]:
        pick: dict[str, Any] = {
            "token": slice(block.start, block.stop),
            "sequence": slice(block.first, block.last),
            "whole": ...,
        }
        found: dict[str, Any] = dict(self.call.options)
        for name, (kind, value, need) in self.inputs.items():
            found[name] = value[pick[kind]].detach().requires_grad_(need)
        return found

    def __call__(self, stats: RowStats, block: Block) -> Coefficients:
        """d (reduced loss) / d statistics of the block's rows."""
        size = self.seq.group_size
        group = slice(block.first // size, block.last // size)
        here, family = self.part(block), self.family
        weight, dtype = self.weights[group].to(stats.lse.dtype), stats.lse.dtype
        if family is not None and self.fused:
            ref = self.side(block).get("ref_logps") if family.uses_ref else None
            if ref is None and family.ratio != NO_RATIO and family.uses_ref:
                raise ValueError("a ratio to the reference needs ref_logps")
            lazy = not deferred.immediate(weight.device)
            loss, coef, log_ratio, clipped = backends.TABLE[self.call.backend].sequence_coef(
                stats.logps,
                ref,
                here.offsets,
                family.weight[group].to(dtype),
                ratio=family.ratio,
                log_low=family.log_low,
                log_high=family.log_high,
                beta=family.beta,
                scale=weight,
                flags=deferred.flags(weight.device) if lazy else None,
            )
            grads = {"logps": coef}
            if block != self.whole:  # of a sequence that is cut
                clipped = clipped * (here.offsets.diff() / here.lengths.clamp(min=1))
            metrics = {"log_ratio": log_ratio, "clipped": clipped}
        else:
            with _Recording(), torch.inference_mode(False):
                values = {name: t.clone() for name, t in self.read(stats).items()}
                found = objectives.evaluate(
                    self.call.objective, values, here, weight, self.side(block)
                )
            loss, grads, metrics = found.seq_loss, found.grads, found.metrics
            if family is not None:
                ref = self.side(block).get("ref_logps")
                metrics = objectives.family_metrics(family, stats.logps, ref, here)
            for name, g in found.side_grads.items():
                kind = self.inputs[name][0]
                where = {
                    "token": slice(block.start, block.stop),
                    "sequence": slice(block.first, block.last),
                }
                self.side_grads[name][where.get(kind, ...)] += g
        for name, value in ((LOSS, loss), *metrics.items()):
            if block == self.whole:
                self.made[name] = value
                continue
            if name not in self.made:
                groups = self.seq.num_groups
                self.made[name] = value.new_zeros(groups, dtype=torch.float64)
            self.made[name][group] += value
        grads = {k: g.to(dtype) for k, g in grads.items()}
        return Coefficients.of(stats.lse, stats.entropy, grads)

    @property
    def whole(self) -> Block:
        return Block(0, self.seq.num_tokens, 0, self.seq.num_sequences)

    @property
    def seq_loss(self) -> Tensor:  # (G,)
        return self.made[LOSS]

    def reported(self) -> dict[str, Tensor]:
        """What goes with the loss, each (G,)."""
        metrics = {name: value for name, value in self.made.items() if name != LOSS}
        if self.family is None or not metrics:
            return metrics
        ratio, clipped = metrics["log_ratio"], metrics["clipped"]
        return objectives.family_report(self.traits, self.family, ratio, clipped)

    def part(self, block: Block) -> Sequences:
        if block == self.whole:
            return self.seq
        rows, which = slice(block.start, block.stop), slice(block.first, block.last)
        offsets = self.seq.cu_seqlens[block.first : block.last + 1].clamp(block.start, block.stop)
        return self.seq.part(which, rows, offsets.diff().tolist())

    def read(self, stats: RowStats) -> dict[str, Tensor]:
        """The statistics that the objective names."""
        names = objectives.statistics(self.call.objective)
        return {name: getattr(stats, name) for name in names}

    def check_blocking(self, stats: RowStats) -> None:
        """An objective that looks across groups has another value where it sees them all."""
        with _Recording(), torch.inference_mode(False):
            side = self.side(self.whole)
            found = objectives.evaluate(
                self.call.objective, self.read(stats), self.seq, self.weights, side
            )
        size = found.seq_loss.double().abs().amax() + 1e-3
        wrong = (found.seq_loss.double() - self.seq_loss).abs() > 1e-4 * size
        if not deferred.immediate(wrong.device):
            deferred.note(deferred.BLOCKING, wrong)
        elif bool(wrong.any()):
            g = int(wrong.nonzero()[0, 0])
            together, apart = float(found.seq_loss[g]), float(self.seq_loss[g])
            raise ValueError(
                f"group {g} has loss {together:.6g} among all groups and {apart:.6g} in its block: "
                + deferred.MEANING[deferred.BLOCKING]
            )
