"""Which layers and modules make the gap, and what to keep unquantised.

A module is one class of matrices in one layer. Its contribution is the mean of what it makes alone, all others being
plain on both sides, and of what is missing without it: two orders of its Shapley share, for two passes a module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lpexp.attribute.rescore import ROLLOUT, TRAINER, Rescorer, pure
from lpexp.metric.mismatch import k3
from lpexp.precision import LINEARS

HALF = 0.5  # of the gap: what a proposal is to remove


class Module(NamedTuple):
    layer: int
    kind: str
    tensors: tuple[str, ...]
    parameters: int
    contribution: float  # nat of k3
    alone: float
    missed: float  # by how much the gap shrinks when this one is plain


@dataclass
class Proposal:
    """Modules to keep unquantised on both sides."""

    modules: list[Module]
    share: float  # of the quantised parameters
    predicted: float  # share of the gap that their contributions add up to
    measured: float  # share of the gap that is gone when the batch is scored with them plain
    override: str  # what to type


@dataclass
class Ranking:
    gap: float  # k3 of the two sides' own passes, nat
    modules: list[Module]  # largest contribution first
    proposal: Proposal | None


def rank(
    scorer: Rescorer, shown: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, count: items
) -> Ranking:
    """Every module that a side quantises; `shown` passes them on as they are looked at."""
    groups = quantised(scorer)
    every = frozenset(name for names in groups.values() for name in names)

    def gap(plain: frozenset[str]) -> float:
        sides = []
        for who in (TRAINER, ROLLOUT):
            touched = frozenset(name for name in plain if scorer.quantised(scorer.side(name, who)))
            sides.append(scorer.score(pure(who, scorer.names, touched)._replace(order=TRAINER)).astype(np.float64))
        return float(k3(sides[0] - sides[1]).mean())

    whole, without = gap(frozenset()), gap(every)
    found = []
    for (layer, kind), names in shown(groups.items(), len(groups)):
        mine = frozenset(names)
        alone, missed = gap(every - mine) - without, whole - gap(mine)
        size = sum(int(np.prod(scorer.params[name].shape)) for name in names)
        found.append(Module(layer, kind, tuple(names), size, (alone + missed) / 2, alone, missed))
    found.sort(key=lambda module: -module.contribution)
    return Ranking(whole, found, _proposal(scorer, found, whole, gap) if whole > 0 and len(found) > 1 else None)


def quantised(scorer: Rescorer) -> dict[tuple[int, str], list[str]]:
    """{(layer, module class): tensors that a side quantises}, in the order of the model."""
    found: dict[tuple[int, str], list[str]] = {}
    for name, param in scorer.params.items():
        if any(scorer.quantised(scorer.side(name, who)) for who in (TRAINER, ROLLOUT)):
            layer = re.search(r"\.layers\.(\d+)\.", name)
            assert layer is not None, name
            found.setdefault((int(layer[1]), param.kind), []).append(name)
    return found


def _proposal(
    scorer: Rescorer, ranked: list[Module], whole: float, gap: Callable[[frozenset[str]], float]
) -> Proposal | None:
    """The fewest modules whose contributions reach half of the gap; never all of them."""
    kept: list[Module] = []
    for module in ranked[:-1]:
        if module.contribution <= 0 or sum(one.contribution for one in kept) >= HALF * whole:
            break
        kept.append(module)
    if not kept:
        return None
    plain = frozenset(name for module in kept for name in module.tensors)
    total = sum(module.parameters for module in ranked)
    predicted = sum(module.contribution for module in kept) / whole
    share = sum(module.parameters for module in kept) / total
    return Proposal(kept, share, predicted, 1 - gap(plain) / whole, _override(scorer, plain))


def _override(scorer: Rescorer, plain: frozenset[str]) -> str:
    """The scopes that leave these tensors out: module classes where they are whole."""
    typed = []
    for who, key in ((TRAINER, "precision"), (ROLLOUT, "rollout.precision")):
        covered = [param for name, param in scorer.params.items() if scorer.quantised(scorer.side(name, who))]
        if who == ROLLOUT and scorer.exp.rollout.precision is None:
            continue  # it follows the trainer's
        left = [param for param in covered if param.name not in plain]
        if len(left) == len(covered):
            continue
        whole = {param.kind for param in left} - {param.kind for param in covered if param.name in plain}
        words = [kind for kind in LINEARS if kind in whole] + [p.name for p in left if p.kind not in whole]
        typed.append(f"'{key}.scope=[{','.join(words)}]'")
    return " ".join(typed)
