"""Shapley shares on games whose answer is known by hand."""

from __future__ import annotations

import math

import pytest

from lpexp.attribute.shares import EXACT, ORDERINGS, shapley

NAMES = "abcdefgh"


def gloves(held: frozenset[str]) -> float:
    """One left glove (a), two right ones (b, c): a pair is worth 1. Known shares: 2/3, 1/6, 1/6."""
    return float("a" in held and bool(held & {"b", "c"}))


def test_the_glove_game_has_its_textbook_shares() -> None:
    shares = {share.player: share for share in shapley("abc", gloves)}
    assert [shares[name].value for name in "abc"] == pytest.approx([2 / 3, 1 / 6, 1 / 6])
    assert (shares["a"].low, shares["a"].high) == (0, 1) and shares["a"].error is None


@pytest.mark.parametrize("count", [1, 2, EXACT, EXACT + 1, 8])
def test_shares_add_up_to_the_whole_whatever_the_interplay(count: int) -> None:
    def worth(held: frozenset[str]) -> float:
        total = sum(1.0 + NAMES.index(name) for name in held)
        return 3 + total**1.7 - math.sin(total)

    players = NAMES[:count]
    shares = shapley(players, worth)
    whole = worth(frozenset(players)) - worth(frozenset())
    assert sum(share.value for share in shares) == pytest.approx(whole, rel=1e-12)


def test_independent_factors_get_what_they_add_and_a_dummy_nothing() -> None:
    worth = {name: float(index) for index, name in enumerate(NAMES)}
    for players in (NAMES[:4], NAMES):
        for share in shapley(players, lambda held: sum(worth[name] for name in held)):
            assert share.value == pytest.approx(worth[share.player])
            assert share.high - share.low == pytest.approx(0)


def test_beyond_six_the_estimate_is_seeded_and_its_error_covers_the_truth() -> None:
    """Two factors that only matter together: each is worth half, which an order alone never says."""

    def worth(held: frozenset[str]) -> float:
        return float({"a", "b"} <= held) + 0.1 * len(held)

    first, again, other = shapley(NAMES, worth, 1), shapley(NAMES, worth, 1), shapley(NAMES, worth, 2)
    assert first == again and ORDERINGS >= 32
    for share in (*first, *other):
        assert share.error is not None
        truth = 0.6 if share.player in "ab" else 0.1
        assert abs(share.value - truth) <= 4 * share.error + 1e-12


def test_no_factor_means_no_share() -> None:
    assert shapley("", lambda held: 1.0) == []
