"""How many rows are held at a time, and what a call takes in memory.

``memory_budget`` bounds the bytes of logits, or of their exponentials, that are held at a time.
"""

from __future__ import annotations

import torch

PANEL = 2048  # columns of a tile on a CPU
TILE_ROWS = 1024  # rows of a tile on a CPU: a panel of 8 MiB
MIN_ROWS = 256  # fewer kept rows and the traffic of dweight shows
MIN_KEPT = 48 * 2**20  # bytes
CHUNK_ROWS = 1024  # about what a product on a GPU wants
CPU = torch.device("cpu")


def tile_rows(width: int, itemsize: int, memory_budget: int | None) -> int:
    """Rows of a tile of ``width`` columns on a CPU."""
    if memory_budget is None:
        return TILE_ROWS
    return max(1, min(TILE_ROWS, memory_budget // (width * itemsize)))


def kept_rows(
    vocab: int,
    hidden_size: int,
    itemsize: int,  # of what is kept: the accumulation dtype on a CPU, the operands' on a GPU
    memory_budget: int | None,
    device: torch.device = CPU,
    longest: int | None = None,
    card: int | None = None,
) -> int:
    """Rows whose exponentials are held until dweight is made of them: at least one.

    None: on a CPU those of D rows, no more than dweight itself, and at least 48 MiB or 256 rows. On
    a GPU a sixteenth of its memory (``card``, where it is not here): of what the card has, not of
    what is free, so that a run does not depend on its neighbours. Where the ``longest`` group has
    more rows, up to twice as many.
    """
    row = vocab * itemsize
    if memory_budget is not None:
        held = memory_budget
        if device.type == "cuda":  # a chunk of fp32 logits beside them takes its part
            held -= 4 * padded(vocab) * chunk_limit(vocab, memory_budget)
        return max(1, held // row)
    if device.type == "cuda":
        if card is None:
            card = torch.cuda.get_device_properties(device).total_memory
        rows = max(MIN_ROWS, card // 16 // row)
    else:
        rows = max(MIN_ROWS, MIN_KEPT // row, hidden_size)
    return rows if longest is None else max(rows, min(2 * rows, longest))


def chunk_limit(vocab: int, memory_budget: int | None) -> int:
    """Rows of fp32 logits of a GPU's chunk, at most: half of a budget that was given."""
    if memory_budget is None:
        return CHUNK_ROWS * 5 // 4
    return max(1, min(CHUNK_ROWS * 5 // 4, memory_budget // 2 // (4 * padded(vocab))))


def chunk_rows(
    rows: int,
    vocab: int,
    memory_budget: int | None,
    device: torch.device = CPU,
    processors: int | None = None,
) -> int:
    """Rows of a GPU's chunk: equal chunks of about 1024, whose products end just under whole waves.

    A wave is one tile of 128 x 256 per multiprocessor; ``processors`` is the number of those of a
    GPU that is not here.
    """
    limit = chunk_limit(vocab, memory_budget)
    if rows <= limit:
        return max(1, rows)
    if processors is None:
        here = device.type == "cuda" and torch.cuda.is_available()
        processors = torch.cuda.get_device_properties(device).multi_processor_count if here else 132
    fewest = -(-rows // limit)
    best = (float("inf"), 0)
    for count in range(fewest, 2 * fewest + 1):
        size = -(-rows // count)
        size = min(limit, -(-size // 128) * 128) if limit >= 128 else min(size, limit)
        full, left = divmod(rows, size)
        waves = full * _waves(size, vocab, processors) + (
            _waves(left, vocab, processors) if left else 0
        )
        best = min(best, (waves, -size))
    return -best[1]


def _waves(rows: int, vocab: int, processors: int) -> int:
    tiles = -(-rows // 128) * -(-vocab // 256)
    return -(-tiles // processors)


def padded(width: int) -> int:
    """Elements from one row of a GPU's logits to the next: loads of 16 bytes need aligned rows."""
    return -(-width // 16) * 16


GATHERED = 1024  # rows of the weight that are gathered at a time on a CPU


def extra_bytes(
    op: str,  # "linear_loss", "linear_logprob" or "score"
    *,
    num_rows: int,  # N
    hidden_size: int,  # D
    vocab: int,  # V
    longest_block: int | None = None,  # rows of linear_loss's largest block; None: as many as fit
    hidden_bytes: int = 4,
    weight_bytes: int = 4,
    frozen_weight: bool = False,
    memory_budget: int | None = None,
    device: torch.device | str = CPU,
    card: int | None = None,  # bytes of a GPU that is not here
    gemm: bool = False,  # the backend has a GEMM of its own
    buffer_bytes: int | None = None,  # an element of ``accumulate_into``; None: there is none
    rank: int = 0,  # columns of a low-rank part beside a frozen weight
) -> int:
    """Peak bytes of forward and backward beyond the inputs and the returned gradients (fp32 sums).

    With K = :func:`kept_rows`, R = min(N, K) rows kept (those of the largest block, where there are
    several), V' = V (on a GPU rounded up to a multiple of 16), G the bytes of the gradients that
    exist at that moment, and 60 N for row vectors, it is the largest of these moments, less G:

    On a CPU, with P = 2048 columns per panel and tiles of T rows (:func:`tile_rows`; of the rows
    that are not kept), h = 4 bytes per element of hidden's rows that are converted, w = 4 P D where
    the weight is:

    forward          4 R V' + 4 T P + 4 N D (d logp / d hidden) + 4 D min(N, 1024) + h T D + w
                     (frozen head, scoring: R = 0; scoring: without the two D terms)
    backward         4 R V' + 4 N D + G + 4 R D + h N D + w, and 4 T P + w where rows were not kept
    blocks           4 R V' + 4 N D + 4 V D + 4 R D + h R D; at their end 4 N D + 4 V D + G

    On a GPU, operands of e bytes, chunks of C rows (:func:`chunk_rows`):

    forward          e R V' + 4 C V' (2 C V' with a GEMM of the backend's own, nothing where rows
                     are kept in fp32 or by that GEMM) + 4 N D
    backward         e R V' + 4 N D + G + (4 + e) R D; where rows were not kept also 4 C V' and, for
                     half operands, fp32 sums of 4 V D in place of dweight
    blocks           e R V' + 4 N D + 4 V D + the larger of the forward's chunk and (4 + e) R D; at
                     their end as on a CPU

    With ``accumulate_into`` G holds no dweight, and there are no blocks: rows that are not kept are
    gone through again. Of fp32 it also takes the sums' place.

    With a low-rank part of r columns D is D + r, but r where it is dweight's or that of the rows
    whose product dweight is; the joined rows of hidden take h N (D + r) throughout, on a CPU w is
    there for every dtype, and on a GPU the joined weight, e V (D + r), in the forward and where
    rows were not kept.
    """
    if op not in ("linear_loss", "linear_logprob", "score"):
        raise ValueError(f"op must be linear_loss, linear_logprob or score, got {op!r}")
    device = torch.device(device)
    gpu = device.type == "cuda"
    n, d, v, columns = num_rows, hidden_size, vocab, padded(vocab) if gpu else vocab
    e = hidden_bytes if gpu else 4
    most = kept_rows(v, d, e, memory_budget, device, card=card)
    trained = op != "score" and (rank > 0 or not frozen_weight)
    into = trained and buffer_bytes is not None
    blocks = trained and op == "linear_loss" and n > most and not into
    largest = n
    if blocks:
        most = kept_rows(v, d, e, memory_budget, device, longest_block, card)
        largest = most if longest_block is None else longest_block
    kept = min(largest, most) if trained else 0
    of_head, d = rank or d, d + rank
    unit = 4 * n * d if op != "score" else 0
    gathered = 4 * d * min(n, GATHERED) if op != "score" and not gpu else 0
    dhidden = hidden_bytes * n * d if op != "score" else 0
    dweight = weight_bytes * v * of_head if trained and not into else 0
    held, sums, left = e * kept * columns, 4 * v * of_head, n - kept
    joined = hidden_bytes * n * d if rank else 0
    if gpu:
        size = chunk_rows(n, v, memory_budget, device)
        chunk = (2 if gemm else 4) * min(size, n) * columns
        in_place = trained and (gemm or e == 4)
        sweep = 0 if in_place and not left else chunk
        rows = (4 + e % 4) * kept * of_head
        table = e * v * d if rank else 0
        forward = held + sweep + unit + gathered + table
        backward = held + unit + dhidden + dweight + rows
        if left:
            rounded = sums if e != 4 and not (into and buffer_bytes == 4) else 0
            again = max(rows + 4 * min(size, n) * columns, dweight) + rounded + table
            backward = held + unit + dhidden + again + (dweight if not rounded else 0)
        block = held + unit + sums + max(0 if in_place else chunk, rows) + table
    else:
        width = min(PANEL, v)
        tile = min(tile_rows(width, 4, memory_budget), left)
        wide = 4 * width * d if weight_bytes != 4 or rank else 0
        rows32 = 4 * d if hidden_bytes != 4 else 0
        first = min(tile_rows(width, 4, memory_budget), n)
        forward = held + 4 * tile * width + unit + gathered + rows32 * first + wide
        again = 4 * tile * width + wide if left else 0
        backward = held + unit + dhidden + dweight + 4 * kept * of_head + rows32 * n
        backward += wide + again
        block = held + unit + sums + 4 * kept * of_head + rows32 * kept + wide
    vectors = 60 * n + joined
    if not trained:
        rounded = 2 * unit + dhidden if hidden_bytes != 4 else 2 * unit
        return max(forward, rounded) - dhidden + vectors
    if blocks:
        rounding = dhidden * (hidden_bytes != 4) + dweight * (weight_bytes != 4)
        return max(block, unit + sums + rounding) - dhidden - dweight + vectors
    return max(forward, backward) - dhidden - dweight + vectors
