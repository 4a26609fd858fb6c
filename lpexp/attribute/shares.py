"""Shapley shares: what each factor adds to a whole, averaged over the orders in which factors can be switched.

In any one order the steps from nothing switched to everything switched add up to the whole, so the averages do too.
Up to `EXACT` factors every order counts; beyond, `ORDERINGS` random ones do, each with its reverse, which cancels the
first-order part of the interplay. Sources: Castro et al., Computers & Operations Research 36 (2009) 1726; reversed
orders: Mitchell et al., JMLR 23 (2022) 43.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from itertools import combinations
from typing import Generic, NamedTuple, TypeVar

import numpy as np

EXACT, ORDERINGS = 6, 32

P = TypeVar("P", bound=Hashable)


class Share(NamedTuple, Generic[P]):
    player: P
    value: float  # the average of what switching it added
    low: float  # the least and the most that it added in any order that was looked at
    high: float
    error: float | None  # standard error of `value`; None: every order was looked at


def shapley(players: Sequence[P], worth: Callable[[frozenset[P]], float], seed: int = 0) -> list[Share[P]]:
    """One share a player, in their order; the values add up to worth(all) - worth(none)."""
    return _exact(players, worth) if len(players) <= EXACT else _sampled(players, worth, seed)


def _exact(players: Sequence[P], worth: Callable[[frozenset[P]], float]) -> list[Share[P]]:
    shares, count = [], len(players)
    for player in players:
        others = [other for other in players if other != player]
        total, added = 0.0, []
        for size in range(count):
            weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
            for before in combinations(others, size):
                added.append(worth(frozenset(before) | {player}) - worth(frozenset(before)))
                total += weight * added[-1]
        shares.append(Share(player, total, min(added), max(added), None))
    return shares


def _sampled(players: Sequence[P], worth: Callable[[frozenset[P]], float], seed: int) -> list[Share[P]]:
    rng = np.random.default_rng(seed)
    added = np.zeros((ORDERINGS, len(players)))
    for pair in range(ORDERINGS // 2):
        order = rng.permutation(len(players))
        for row, one in ((2 * pair, order), (2 * pair + 1, order[::-1])):
            switched: frozenset[P] = frozenset()
            for index in one:
                more = switched | {players[index]}
                added[row, index] = worth(more) - worth(switched)
                switched = more
    pairs = added.reshape(ORDERINGS // 2, 2, -1).mean(1)  # an order and its reverse are not independent
    errors = pairs.std(0, ddof=1) / math.sqrt(len(pairs))
    return [
        Share(player, float(added[:, i].mean()), float(added[:, i].min()), float(added[:, i].max()), float(errors[i]))
        for i, player in enumerate(players)
    ]
