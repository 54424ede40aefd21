"""What goes into which chunk, and what a call takes in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .sequences import Sequences

PANEL = 2048  # columns of a tile: 256 rows of fp32 fill 2 MiB, the L2 of a core or two
SPAN = 256  # columns whose statistics are taken together where a backend has linear_spans
MIN_ROWS = 256  # fewer rows a chunk and the dweight accumulator's traffic shows
DEFAULT_BUDGET = 48 * 2**20
CPU = torch.device("cpu")


class Piece(NamedTuple):
    """Rows start:end, all of one sequence."""

    sequence: int
    start: int
    end: int


def plan_chunks(
    offsets: list[int],
    active: list[bool],
    max_rows: int,
    *,
    group_size: int = 1,
    token_local: bool = False,
) -> list[list[Piece]]:
    """Pack whole groups of active sequences into chunks of at most ``max_rows`` rows.

    A longer group is a chunk of its own (the caller splits its work), unless the objective is
    token-local: then its sequences are cut into pieces.
    """
    chunks: list[list[Piece]] = []
    chunk: list[Piece] = []
    filled = 0

    def close() -> None:
        nonlocal chunk, filled
        if chunk:
            chunks.append(chunk)
        chunk, filled = [], 0

    for g in range(0, len(active), group_size):
        members = range(g, g + group_size)
        if not any(active[s] for s in members):
            continue
        pieces = [Piece(s, offsets[s], offsets[s + 1]) for s in members]
        size = sum(p.end - p.start for p in pieces)
        if token_local and group_size == 1:
            sequence, start, end = pieces[0]
            # Cut where the chunk is full, but not a short sequence that fits the next chunk whole.
            if size <= max_rows and filled + size > max_rows:
                close()
            while start < end:
                take = min(end - start, max_rows - filled)
                chunk.append(Piece(sequence, start, start + take))
                start, filled = start + take, filled + take
                if filled == max_rows:
                    close()
            continue
        if filled + size > max_rows:
            close()
        chunk.extend(pieces)
        filled += size
    close()
    return chunks


def chunk_index(pieces: list[Piece], device: torch.device) -> tuple[slice | Tensor, int]:
    """Where a chunk's rows stand, as a slice when they are adjacent, and how many they are."""
    n = sum(p.end - p.start for p in pieces)
    filled = [p for p in pieces if p.end > p.start]
    if not filled:
        return slice(0, 0), 0
    if filled[-1].end - filled[0].start == n:
        return slice(filled[0].start, filled[-1].end), n
    ranges = [torch.arange(p.start, p.end, device=device) for p in filled]
    return torch.cat(ranges), n


def chunk_sequences(pieces: list[Piece], seq: Sequences) -> Sequences:
    """The pieces as sequences of their own, with the denominators of the whole."""
    lengths = [p.end - p.start for p in pieces]
    return seq.part(consecutive(pieces), chunk_index(pieces, seq.device)[0], lengths)


def consecutive(pieces: list[Piece]) -> slice | list[int]:
    """The sequences that the pieces belong to, as a slice when they follow one another."""
    owners = [p.sequence for p in pieces]
    span = range(owners[0], owners[0] + len(owners)) if owners else range(0)
    return slice(span.start, span.stop) if owners == list(span) else owners


def chunk_rows(
    vocab: int, itemsize: int, memory_budget: int | None, device: torch.device = CPU
) -> int:
    """Rows of full-width logits that the budget holds (at least one)."""
    if memory_budget is None:
        memory_budget = default_budget(vocab, itemsize, device)
    return max(1, memory_budget // (vocab * itemsize))


def default_budget(
    vocab: int, itemsize: int = 4, device: torch.device = CPU, card: int | None = None
) -> int:
    """On a CPU 48 MiB; on a GPU a 64th of its memory, 256 MiB to 2 GiB; at least 256 rows.

    It is a 64th of what the card has, not of what is free: a run does not depend on its neighbours.
    ``card`` stands for the bytes of a GPU that is not here.
    """
    budget = DEFAULT_BUDGET
    if device.type == "cuda":
        if card is None:
            card = torch.cuda.get_device_properties(device).total_memory
        budget = min(max(card // 64, 2**28), 2**31)
    return max(budget, MIN_ROWS * vocab * itemsize)


def padded(width: int) -> int:
    """Elements from one row of a GPU's logits to the next: loads of 16 bytes need aligned rows."""
    return -(-width // 16) * 16


def extra_bytes(
    op: str,  # "linear_loss", "linear_logprob" or "score"
    *,
    longest_chunk: int,  # rows R of the largest chunk (linear_loss)
    num_rows: int,  # N
    hidden_size: int,  # D
    vocab: int,  # V
    hidden_bytes: int = 4,
    weight_bytes: int = 4,
    frozen_weight: bool = False,
    memory_budget: int | None = None,
    device: torch.device | str = CPU,
    spans: bool = False,  # the backend has linear_spans and takes this dtype
) -> int:
    """Peak bytes of a call beyond its inputs and the gradients it returns (fp32 arithmetic).

    On a CPU, with P = 2048 columns a panel, C = ceil(V / P) panels, G the bytes of the gradients:

    linear_loss:     the larger of two moments, less G
        a chunk      4 R V (logits) + 4 R D (dhidden) + 32 R C (statistics by panel) + A
                     + 4 R D if hidden is not fp32, + 4 P D if weight is not fp32
        the backward A + the gradients that are rounded from it
                     A = 4 N D + 4 V D are the fp32 gradients, without 4 V D for a frozen weight
    score:           4 T P (a tile of T = min(N, budget / 4P) rows) + 32 T C
                     + 4 T D if hidden is not fp32, + 4 P D if weight is not fp32
    linear_logprob:  4 T P + 28 N (seven row vectors: four results, E[z], b and c)
                     + 16 T C (the forward's statistics by panel: freed, but in blocks so small that
                     the C library keeps them)
                     + 4 P D if weight is not fp32, twice if it is trainable,
                     + 8 N D less the gradient if hidden is not fp32

    On a GPU, hidden and weight of one dtype, b bytes an element, V rounded up to a multiple of 16:

    linear_loss:     as above with a chunk of 4 R V + 4 R D + A
    score:           4 T V (a tile of T = min(N, budget / 4V) rows) + b N D (hidden without its
                     masked rows)
    linear_logprob:  4 T V + b N D + if they are not fp32: 4 N D + 4 V D (without 4 V D for a
                     frozen weight)
    each             + 48 N (row vectors)

    With a GEMM of the backend's own (``spans``), S = ceil(V / 256) spans of columns:

    linear_loss:     2 R V + 12 R S (their statistics) in place of 4 R V
    score:           12 N S in place of 4 T V
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _extra_bytes_on_gpu(
            op,
            longest_chunk=longest_chunk,
            num_rows=num_rows,
            hidden_size=hidden_size,
            vocab=vocab,
            itemsize=hidden_bytes,
            frozen_weight=frozen_weight,
            tile=min(num_rows, chunk_rows(vocab, 4, memory_budget, device)),
            spans=spans,
        )
    panel = min(PANEL, vocab)
    panels = -(-vocab // panel)
    converted = 4 * panel * hidden_size if weight_bytes != 4 else 0
    rows32, table32 = 4 * num_rows * hidden_size, 4 * vocab * hidden_size
    dhidden = hidden_bytes * num_rows * hidden_size
    dweight = 0 if frozen_weight else weight_bytes * vocab * hidden_size
    if op == "linear_loss":
        held = rows32 + (0 if frozen_weight else table32)
        copies = 1 if hidden_bytes == 4 else 2
        chunk = longest_chunk * (4 * vocab + copies * 4 * hidden_size + 32 * panels) + converted
        rounded = (dhidden if hidden_bytes != 4 else 0) + (dweight if weight_bytes != 4 else 0)
        return held + max(chunk, rounded) - dhidden - dweight
    tile = min(num_rows, chunk_rows(panel, 4, memory_budget))
    if op == "score":
        in_fp32 = 0 if hidden_bytes == 4 else 4 * tile * hidden_size
        return tile * (4 * panel + 32 * panels) + in_fp32 + converted
    if op == "linear_logprob":
        in_fp32 = 0 if hidden_bytes == 4 else 2 * rows32 - dhidden
        vectors = 16 * tile * panels + 28 * num_rows
        return 4 * tile * panel + vectors + in_fp32 + converted * (1 if frozen_weight else 2)
    raise ValueError(f"op must be linear_loss, linear_logprob or score, got {op!r}")


def _extra_bytes_on_gpu(
    op: str,
    *,
    longest_chunk: int,
    num_rows: int,
    hidden_size: int,
    vocab: int,
    itemsize: int,
    frozen_weight: bool,
    tile: int,
    spans: bool = False,
) -> int:
    rows, table = num_rows * hidden_size, 0 if frozen_weight else vocab * hidden_size
    rounded = itemsize * (rows + table) if itemsize != 4 else 0
    vectors = 48 * num_rows
    parts = 12 * -(-vocab // SPAN)
    if op == "linear_loss":
        logits = 2 * padded(vocab) + parts if spans else 4 * padded(vocab)
        chunk = longest_chunk * (logits + 4 * hidden_size)
        return 4 * (rows + table) + max(chunk, rounded) - itemsize * (rows + table) + vectors
    held = 4 * tile * padded(vocab) + itemsize * rows + vectors
    if op == "score":
        return num_rows * parts + itemsize * rows + vectors if spans else held
    if op == "linear_logprob":
        return held + (4 * (rows + table) if itemsize != 4 else 0)
    raise ValueError(f"op must be linear_loss, linear_logprob or score, got {op!r}")
