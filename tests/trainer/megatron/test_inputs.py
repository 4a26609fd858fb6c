"""A micro-batch as the layers read it, and the head over pieces of the vocabulary and of the tokens."""

from __future__ import annotations

import numpy as np
import pytest

from lpexp.trainer.megatron.inputs import micro_batches, packed, padded
from tests.trainer.megatron import cases
from tests.trainer.megatron.processes import Processes


@pytest.fixture(scope="module")
def part():
    return cases.batch(cases.experiment("precision=bf16"), 5)


def test_a_padded_row_is_a_multiple_and_predicts_from_the_token_before(part) -> None:
    given = padded(part, 4)
    batch, length = given.tokens_BT.shape
    assert length % 4 == 0 and length - 4 < part.lengths_N.max() <= length
    read = given.tokens_BT.T.reshape(-1)[given.row_R]  # states come as [T * B]
    n, t = np.nonzero(part.mask_NT)
    assert batch == len(part) and np.array_equal(read, part.tokens_NT[n, t - 1])


def test_packed_sequences_hold_every_token_once_and_predict_from_the_token_before(part) -> None:
    given = packed(part, 2)
    assert given.ends is not None and np.all(given.ends % 2 == 0)
    for n, length in enumerate(part.lengths_N):
        row = given.tokens_BT[0, given.ends[n] : given.ends[n + 1]]
        assert np.array_equal(row[:length], part.tokens_NT[n, :length]) and not row[length:].any()
    n, t = np.nonzero(part.mask_NT)
    assert np.array_equal(given.tokens_BT[0, given.row_R], part.tokens_NT[n, t - 1])
    assert given.tokens_BT.size < padded(part, 2).tokens_BT.size


def test_context_parallel_ranks_share_every_sequence_out_front_and_end(part) -> None:
    ranks, whole = 2, packed(part, 1)
    shares = [packed(part, 1, (rank, ranks)) for rank in range(ranks)]
    held = np.stack([share.held_R for share in shares])  # type: ignore[type-var]
    assert np.all(held.sum(0) == 1)
    n, t = np.nonzero(part.mask_NT)
    for share, own in zip(shares, held, strict=True):
        assert np.array_equal(share.tokens_BT[0, share.row_R[own]], part.tokens_NT[n, t - 1][own])
        assert share.tokens_BT.shape[1] * ranks == share.ends[-1] >= whole.ends[-1]  # type: ignore[index]
        assert own.any() and not own.all()


def test_micro_batches_are_as_few_as_fit_and_as_many_in_every_share() -> None:
    cost = np.array([5, 5, 5, 5, 9, 1, 1, 1])
    assert micro_batches(cost, 1, 32) == [[0, 8]]
    assert micro_batches(cost, 2, 12) == [[0, 2, 4], [4, 6, 8]]
    assert micro_batches(cost, 2, 3) == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]  # rows that fit nowhere stand alone


@pytest.mark.parametrize("layout", ["", "trainer.tp=2"])
def test_no_rank_holds_more_logits_than_its_limit_and_nothing_changes(pair: Processes, layout: str) -> None:
    words = ("precision=fp32", *layout.split())
    ranks, limit = (2, 2048) if layout else (1, 4096)
    whole = pair.run(cases.scored_in_pieces, words, 1 << 26, ranks=ranks)
    pieces = pair.run(cases.scored_in_pieces, words, limit, ranks=ranks)
    tokens = int(cases.batch(cases.experiment(*words)).mask_NT.sum())
    vocabulary = cases.experiment(*words).model.sized().vocab_size
    for (_, most), (_, fewer) in zip(whole, pieces, strict=True):
        assert most == tokens * vocabulary // ranks
        assert fewer * 4 <= limit
    one, other = (cases.whole([step for step, _ in found]) for found in (whole, pieces))
    assert np.array_equal(one["lp_C"], other["lp_C"]) and np.array_equal(one["entropy"], other["entropy"])
    assert abs(one["grad_norm"] / other["grad_norm"] - 1) < 1e-6
