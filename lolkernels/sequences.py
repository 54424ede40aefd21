"""Which sequence each token row belongs to: sums, means, expansion, and the denominators of a loss.

There is no padding here. Rows are packed: the tokens of sequence 0, then those of sequence 1, and
so on.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import distributed


class Sequences:
    """A partition of ``N`` packed token rows into ``S`` consecutive sequences.

    Build one with :meth:`from_mask`, :meth:`from_lengths` or :meth:`from_cu_seqlens`.

    Attributes:
        num_sequences: ``S``. A sequence may be empty.
        num_tokens: ``N``.
        cu_seqlens: ``(S + 1,)`` int64 on the CPU; rows cu_seqlens[s]:cu_seqlens[s+1] are those of
            sequence s.
        lengths: ``(S,)`` int64 on ``device``, the tokens of each whole sequence. They are the
            differences of ``cu_seqlens`` but in a :meth:`part` that holds pieces of sequences.
        token_to_sequence: ``(N,)`` int64 on ``device``.
        rows: ``(N,)`` int64, where each token stands in the flattened mask; None without a mask.
        group_size: how many consecutive sequences one loss value couples: 1, 2 for a pair, K for a
            ranked list.
        total_sequences, total_tokens: the denominators of a mean. They equal S and N unless
            :meth:`with_totals` puts the counts of a whole update there.
        totals: ``(2,)`` float64 on the CPU, these two.

    Context parallelism: with ``cp_group``, a process group whose ranks each hold some tokens of
    every sequence (in any split; a rank may hold none of one), rows, masks and ``num_tokens`` are
    the rank's own, ``lengths``, the denominators and all sums are those of the whole sequences, and
    a loss is the same on every rank. The backward differentiates the sum of the ranks' losses:
    *average* the gradients over the group, as DDP and FSDP do over all their ranks.
    """

    def __init__(
        self,
        cu_seqlens: Tensor,  # (S + 1,) int64, CPU
        *,
        device: torch.device | str | None = None,
        rows: Tensor | None = None,  # (N,)
        mask_shape: tuple[int, ...] | None = None,
        group_size: int = 1,
        total_sequences: float | None = None,
        total_tokens: float | None = None,
        cp_group: Any = None,
    ) -> None:
        cu = cu_seqlens.detach().to("cpu", torch.int64)
        offsets: list[int] = cu.tolist()
        if not offsets or offsets[0] != 0 or any(b < a for a, b in itertools.pairwise(offsets)):
            raise ValueError(
                "cu_seqlens must start at 0 and never decrease, such as [0, 3, 7]; got "
                f"{offsets[:8]}{'...' if len(offsets) > 8 else ''}"
            )
        num_sequences = len(offsets) - 1
        if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
            raise ValueError(f"group_size must be an int >= 1, got {group_size!r}")
        if num_sequences % group_size:
            raise ValueError(
                f"group_size={group_size} does not divide the number of sequences, {num_sequences}"
            )
        device = torch.device(cu_seqlens.device if device is None else device)
        self.cu_seqlens = cu
        self.num_sequences = num_sequences
        self.num_tokens = offsets[-1]
        self.group_size = group_size
        self.lengths = (cu[1:] - cu[:-1]).to(device)
        self.token_to_sequence = torch.repeat_interleave(
            torch.arange(num_sequences, device=device), self.lengths, output_size=self.num_tokens
        )
        self.rows = rows
        self.mask_shape = mask_shape
        self._held, self.cp_group = self.lengths, cp_group
        tokens = self.num_tokens
        if cp_group is not None:
            self.lengths = distributed.total_lengths(self._held, cp_group)
            tokens = int(self.lengths.sum())
        self._set_totals(
            num_sequences if total_sequences is None else total_sequences,
            tokens if total_tokens is None else total_tokens,
        )

    def _set_totals(self, sequences: float, tokens: float) -> None:
        empty = self.num_tokens == 0
        self.total_sequences = _total("total_sequences", sequences, empty=empty)
        self.total_tokens = _total("total_tokens", tokens, empty=empty)
        # The two as data: an op that took them as numbers would be compiled anew for each count.
        self.totals = torch.tensor([self.total_sequences, self.total_tokens], dtype=torch.float64)

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Tensor | Sequence[int], *, group_size: int = 1, cp_group: Any = None
    ) -> Sequences:
        """Sequences from ``(S + 1,)`` cumulative offsets ``[0, n_0, n_0 + n_1, ...]``."""
        cu = _integers("cu_seqlens", cu_seqlens)
        return cls(cu, group_size=group_size, cp_group=cp_group)

    @classmethod
    def from_lengths(
        cls, lengths: Tensor | Sequence[int], *, group_size: int = 1, cp_group: Any = None
    ) -> Sequences:
        """Sequences from their ``(S,)`` token counts."""
        n = _integers("lengths", lengths)
        if bool((n < 0).any()):
            raise ValueError(f"lengths must be >= 0, got {int(n.min())}")
        cu = torch.zeros(n.numel() + 1, dtype=torch.int64, device=n.device)
        torch.cumsum(n, 0, out=cu[1:])
        return cls(cu, group_size=group_size, cp_group=cp_group)

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        group_size: int = 1,
        cp_group: Any = None,
    ) -> Sequences:
        """One sequence per row of ``mask``. This waits for a mask that is on a GPU.

        Args:
            mask: ``(B, T)`` bool (or 0/1 integers), True at the tokens that count. Packed rows are
                then ``hidden[mask]``; ``linear_loss`` also takes the unpacked ``(B, T, D)``.
            cu_seqlens: ``(S + 1,)`` offsets, in tokens, of the S sequences that a mask ``(1, T)``
                holds one behind the other. They count tokens whether marked or not; what stands
                behind the last is padding.
            group_size, cp_group: see the class; with a group ``mask`` is of the rank's positions.

        Raises:
            TypeError: a mask of floats; ValueError: another shape, integers besides 0 and 1,
                offsets that are none of this mask, or ranks of ``cp_group`` with another number of
                sequences.
        """
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a (B, T) bool tensor, got {type(mask).__name__}")
        if mask.dim() != 2:
            raise ValueError(f"mask must have shape (B, T), got {tuple(mask.shape)}")
        if mask.dtype != torch.bool:
            if mask.is_floating_point() or mask.is_complex():
                raise TypeError(f"mask must be bool, got {mask.dtype}; pass mask.bool()")
            if bool(((mask != 0) & (mask != 1)).any()):
                raise ValueError("mask must hold only 0 and 1; pass (mask != 0)")
            mask = mask.bool()
        cu = torch.zeros(mask.shape[0] + 1, dtype=torch.int64, device=mask.device)
        if cu_seqlens is None:
            torch.cumsum(mask.sum(1), 0, out=cu[1:])
        else:
            offsets = _integers("cu_seqlens", cu_seqlens).to(mask.device)
            width, ends = mask.shape[1], offsets.tolist()
            if mask.shape[0] != 1 or ends[:1] != [0] or ends != sorted(ends) or ends[-1] > width:
                raise ValueError(
                    "cu_seqlens must start at 0, never decrease and end within a mask of shape "
                    f"(1, T); got {ends[:8]}{'...' if len(ends) > 8 else ''} for "
                    f"{tuple(mask.shape)}"
                )
            if bool(mask[0, ends[-1] :].any()):
                raise ValueError(f"mask marks tokens behind cu_seqlens' last sequence, {ends[-1]}")
            cu = torch.nn.functional.pad(mask[0].cumsum(0), (1, 0))[offsets]
        rows = mask.flatten().nonzero().squeeze(1)
        shape = tuple(mask.shape)
        return cls(cu, rows=rows, mask_shape=shape, group_size=group_size, cp_group=cp_group)

    def with_totals(
        self, *, num_sequences: float | None = None, num_tokens: float | None = None
    ) -> Sequences:
        """The same sequences with the denominators of a larger update.

        ``aggregate(loss, seq, "seq-mean")`` divides by ``num_sequences`` and ``"token-mean"`` by
        ``num_tokens``. Under gradient accumulation or data parallelism pass the counts of the whole
        update, so that the sum over its parts is the mean over the update.

        Raises:
            ValueError: a count that is negative or not finite, or 0 where there are tokens. Where
                there are none, 0 counts as one: the mean of an empty batch is 0, not 0/0.
        """
        seq = copy.copy(self)
        seq._set_totals(
            self.total_sequences if num_sequences is None else num_sequences,
            self.total_tokens if num_tokens is None else num_tokens,
        )
        return seq

    def to(self, device: torch.device | str) -> Sequences:
        """The same sequences with their index tensors on ``device``."""
        seq = copy.copy(self)
        seq.lengths, seq._held = self.lengths.to(device), self._held.to(device)
        seq.token_to_sequence = self.token_to_sequence.to(device)
        seq.rows = None if self.rows is None else self.rows.to(device)
        return seq

    @classmethod
    def _of(
        cls,
        cu_seqlens: Tensor,  # (S + 1,) CPU
        lengths: Tensor,  # (S,)
        token_to_sequence: Tensor,  # (N,)
        group_size: int,
        totals: Tensor,  # (2,) CPU
    ) -> Sequences:
        """From parts that agree, without a copy to the device (which would wait for it)."""
        seq = cls.__new__(cls)
        seq.cu_seqlens, seq.lengths, seq.token_to_sequence = cu_seqlens, lengths, token_to_sequence
        seq._held = lengths
        seq.num_sequences, seq.num_tokens = lengths.shape[0], token_to_sequence.shape[0]
        seq.group_size, seq.totals = group_size, totals
        seq.total_sequences, seq.total_tokens = totals.tolist()
        seq.rows = seq.mask_shape = seq.cp_group = None
        return seq

    def part(self, which: slice | list[int], rows: slice | Tensor, lengths: list[int]) -> Sequences:
        """Sequences made of ``rows``: pieces, ``lengths`` long, of the sequences ``which``.

        A piece keeps the length of its whole sequence, so that means over pieces add up to the mean
        over the sequence, and the denominators stay those of the whole.
        """
        cu = torch.tensor([0, *itertools.accumulate(lengths)])
        if isinstance(which, slice) and isinstance(rows, slice):
            whole = held = self.lengths[which]
            owner = self.token_to_sequence[rows] - which.start
            if lengths != self.cu_seqlens.diff()[which].tolist():  # the ends are cut
                held = torch.zeros_like(whole).index_add_(0, owner, torch.ones_like(owner))
        else:
            held = from_host(lengths, self.device)
            index = which if isinstance(which, slice) else from_host(which, self.device)
            whole = self.lengths[index]
            owner = torch.repeat_interleave(
                torch.arange(len(lengths), device=self.device), held, output_size=sum(lengths)
            )
        seq = Sequences._of(cu, whole, owner, self.group_size, self.totals)
        seq._held, seq.cp_group = held, self.cp_group
        return seq

    def for_autograd(self) -> Sequences:
        """These sequences, or a copy where they were built in inference mode: autograd can save
        a copy that is made outside of it.
        """
        if not self.token_to_sequence.is_inference() and not self.lengths.is_inference():
            return self
        seq = copy.copy(self)
        seq.lengths, seq._held = self.lengths.clone(), self._held.clone()
        seq.token_to_sequence = self.token_to_sequence.clone()
        return seq

    @property
    def offsets(self) -> Tensor:
        """``cu_seqlens`` on ``device``."""
        return torch.nn.functional.pad(self._held.cumsum(0), (1, 0))

    @property
    def device(self) -> torch.device:
        return self.lengths.device

    @property
    def num_groups(self) -> int:
        return self.num_sequences // self.group_size

    def sum(self, x: Tensor) -> Tensor:  # (N,) -> (S,)
        """Per-sequence sum, accumulated in float64 and returned in x's dtype (at least float32).

        A sum of 4,096 log-probs reaches 1e4 nats, where float32 steps are 1e-3: hence float64.
        """
        self._check(x, self.num_tokens, "num_tokens")
        out = torch.zeros(self.num_sequences, dtype=torch.float64, device=x.device)
        out = out.index_add(0, self.token_to_sequence, x.double())
        if self.cp_group is not None:
            out = distributed.total(out, self.cp_group)
        return out.to(torch.float64 if x.dtype == torch.float64 else torch.float32)

    def mean(self, x: Tensor) -> Tensor:  # (N,) -> (S,)
        """Per-sequence sum over the length of the whole sequence; 0 for an empty sequence."""
        return self.sum(x) / self.lengths.clamp(min=1)

    def following(self, x: Tensor) -> Tensor:  # (N,) -> (N,)
        """Each token's value of the next token of its sequence; 0 at the last one.

        Raises:
            ValueError: with ``cp_group``, where the next token may stand on another rank.
        """
        if self.cp_group is not None:
            raise ValueError(
                "the next token may stand on another rank of cp_group: make what it says before "
                "the sequences are split, and give it to an objective of your own"
            )
        self._check(x, self.num_tokens, "num_tokens")
        last = torch.ones_like(self.token_to_sequence, dtype=torch.bool)
        last[:-1] = self.token_to_sequence[1:] != self.token_to_sequence[:-1]
        return torch.where(last, 0.0, x.roll(-1))

    def expand(self, y: Tensor) -> Tensor:  # (S,) -> (N,)
        """Each token's value of its sequence."""
        self._check(y, self.num_sequences, "num_sequences")
        return y.index_select(0, self.token_to_sequence)

    def pack(self, x: Tensor) -> Tensor:
        """``x[mask]`` for ``x`` of shape ``(B, T, ...)``, by index (no host synchronisation)."""
        if self.rows is None or self.mask_shape is None:
            raise ValueError("pack needs Sequences.from_mask; these were built without a mask")
        if tuple(x.shape[:2]) != self.mask_shape:
            raise ValueError(
                f"x must start with the mask's {self.mask_shape}, got {tuple(x.shape)}"
            )
        return x.flatten(0, 1).index_select(0, self.rows)

    def _check(self, x: Any, n: int, what: str) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a tensor of shape ({n},), got {type(x).__name__}")
        if x.dim() != 1 or x.shape[0] != n:
            raise ValueError(f"expected shape ({n},) ({what}), got {tuple(x.shape)}")

    def __repr__(self) -> str:
        return (
            f"Sequences(num_sequences={self.num_sequences}, num_tokens={self.num_tokens}, "
            f"group_size={self.group_size}, total_sequences={self.total_sequences:g}, "
            f"total_tokens={self.total_tokens:g})"
        )


def from_host(values: list[int], device: torch.device) -> Tensor:
    """An int64 tensor on ``device``. The copy to a GPU is from pinned memory: nothing waits."""
    t = torch.tensor(values, dtype=torch.int64)
    return t if device.type == "cpu" else t.pin_memory().to(device, non_blocking=True)


def _total(name: str, value: float, *, empty: bool) -> float:
    value = float(value)
    if value == 0.0 and empty:  # an empty batch has a mean of 0, not 0/0
        return 1.0
    if not 0.0 < value < float("inf"):
        raise ValueError(
            f"{name} must be a finite count > 0, got {value:g}: pass the count of the whole update"
        )
    return value


def _integers(name: str, value: Tensor | Sequence[int]) -> Tensor:
    if isinstance(value, Tensor):
        t = value
    else:
        items = list(value)
        t = torch.tensor(items) if items else torch.empty(0, dtype=torch.int64)
    if t.dtype == torch.bool or t.is_floating_point() or t.is_complex():
        raise TypeError(f"{name} must hold integers, got {t.dtype}")
    if t.dim() != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {tuple(t.shape)}")
    return t.to(torch.int64)
