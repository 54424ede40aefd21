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
from .objectives import NO_RATIO, Objective
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
        self.seq_loss = torch.zeros(seq.num_groups, dtype=torch.float64, device=seq.device)
        self.metrics: dict[str, Tensor] = {}

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
        here = self.part(block)
        weight, dtype = self.weights[group].to(stats.lse.dtype), stats.lse.dtype
        record = backends.TABLE[self.call.backend]
        family = self.traits.family
        # A side input's gradient comes from the objective's own body, and so does everything on the
        # reference backend, which the kernels are tested against.
        if family is not None and self.call.backend != "reference" and not self.side_grads:
            side = self.side(block)
            fam = family(seq=here, **side)
            ref = side.get("ref_logps") if fam.uses_ref else None
            if ref is None and fam.ratio != NO_RATIO and fam.uses_ref:
                raise ValueError("a ratio to the reference needs ref_logps")
            loss, coef, log_ratio, clipped = record.sequence_coef(
                stats.logps,
                ref,
                here.offsets,
                fam.weight.to(dtype),
                ratio=fam.ratio,
                log_low=fam.log_low,
                log_high=fam.log_high,
                beta=fam.beta,
            )
            grads = {"logps": coef * here.expand(weight)}
            share = here.offsets.diff() / here.lengths.clamp(min=1)  # of a sequence that is cut
            metrics = {"log_ratio": log_ratio, "clipped": clipped * share}
        else:
            with _Recording(), torch.inference_mode(False):
                values = {name: t.clone() for name, t in self.read(stats).items()}
                found = objectives.evaluate(
                    self.call.objective, values, here, weight, self.side(block)
                )
            loss, grads, metrics = found.seq_loss, found.grads, found.metrics
            if family is not None:
                side = self.side(block)
                fam, ref = family(seq=here, **side), side.get("ref_logps")
                metrics = objectives.family_metrics(fam, stats.logps, ref, here)
            for name, g in found.side_grads.items():
                kind = self.inputs[name][0]
                where = {
                    "token": slice(block.start, block.stop),
                    "sequence": slice(block.first, block.last),
                }
                self.side_grads[name][where.get(kind, ...)] += g
        self.seq_loss[group] += loss
        for name, value in metrics.items():
            if name not in self.metrics:
                self.metrics[name] = torch.zeros_like(self.seq_loss)
            self.metrics[name][group] += value
        grads = {k: g.to(dtype) for k, g in grads.items()}
        return Coefficients.of(stats.lse, stats.entropy, grads)

    @property
    def whole(self) -> Block:
        return Block(0, self.seq.num_tokens, 0, self.seq.num_sequences)

    def reported(self) -> dict[str, Tensor]:
        """What goes with the loss, each (G,)."""
        if self.traits.family is None or not self.metrics:
            return self.metrics
        fam = self.traits.family(seq=self.seq, **self.side(self.whole))
        ratio, clipped = self.metrics["log_ratio"], self.metrics["clipped"]
        return objectives.family_report(self.traits, fam, ratio, clipped)

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
