"""A micro-batch as the layers read it: rows padded to one length, or sequences packed one behind the other.

Packed sequences are padded to a multiple of what splits them. With context parallelism each rank holds two pieces of
every sequence, one counted from its front and one from its end, so that causal attention is shared out evenly.
Left out: what a packed batch is to the library (engine.py).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from lpexp.data import Batch
from lpexp.trainer.megatron.names import Span


class Inputs(NamedTuple):
    """R response tokens of a micro-batch; hidden states come as [T, B, H], T and B as in `tokens_BT`."""

    tokens_BT: np.ndarray  # int64
    row_R: np.ndarray  # int64, of the flattened [T * B] states: the one that predicts the token
    held_R: np.ndarray | None  # bool: whether that one is this rank's; None: all are
    ends: np.ndarray | None  # int32 [sequences + 1], of the packed sequences: where each begins and ends


def padded(part: Batch, multiple: int) -> Inputs:
    """[B, T] rows, T a multiple: the tensor-parallel size, over which a sequence is shared out."""
    width = _up(int(part.lengths_N.max()), multiple)
    tokens = np.zeros((len(part), width), np.int64)
    given = part.tokens_NT[:, :width]
    tokens[:, : given.shape[1]] = given
    n, t = np.nonzero(part.mask_NT)
    return Inputs(tokens, (t - 1) * len(part) + n, None, None)


def packed(part: Batch, tp: int, context: Span = (0, 1)) -> Inputs:
    """One row [1, S] of all sequences, or this context-parallel rank's pieces of them."""
    rank, ranks = context
    multiple = tp * (2 * ranks if ranks > 1 else 1)
    sizes = np.array([_up(int(length), multiple) for length in part.lengths_N])
    ends = np.concatenate(([0], np.cumsum(sizes)))
    tokens = np.zeros(int(ends[-1]), np.int64)
    for n, length in enumerate(part.lengths_N):
        tokens[ends[n] : ends[n] + length] = part.tokens_NT[n, :length]
    n, t = np.nonzero(part.mask_NT)
    row = ends[n] + t - 1
    if ranks == 1:
        return Inputs(tokens[None], row, None, ends.astype(np.int32))
    pieces = []
    for first, size in zip(ends, sizes, strict=False):
        each = size // (2 * ranks)
        pieces += [first + at * each + np.arange(each) for at in (rank, 2 * ranks - 1 - rank)]
    mine = np.concatenate(pieces)
    place = np.full(len(tokens), -1)
    place[mine] = np.arange(len(mine))
    return Inputs(tokens[mine][None], np.maximum(place[row], 0), place[row] >= 0, ends.astype(np.int32))


def micro_batches(cost_N: np.ndarray, shares: int, room: int) -> list[list[int]]:
    """Edges of the micro-batches of every share of N rows, as many in each: the fewest whose costs fit in `room`.

    A row that alone costs more is a micro-batch of its own.
    """
    each = len(cost_N) // shares
    for count in range(1, each + 1):
        inner = np.linspace(0, each, count + 1).astype(int)
        edges = [(inner + share * each).tolist() for share in range(shares)]
        if all(cost_N[a:b].sum() <= room for own in edges for a, b in itertools.pairwise(own)):
            return edges
    return [list(range(share * each, (share + 1) * each + 1)) for share in range(shares)]


def _up(size: int, multiple: int) -> int:
    return size + -size % multiple
