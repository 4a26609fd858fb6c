"""Is one arm's held-out accuracy within a margin of another's? An interval, a verdict, and the seeds that it lacks.

The unit is the seed: start weights, prompts, sampled answers and held-out prompts are all drawn anew with it, so the
paired differences D_s of the seeds are independent draws, and Student's t over them covers everything that varies.
Three seeds may agree by luck. So the prompts, which say how far D_s strays within one seed, set a lower bound to the
width: the interval is the wider of the two. Where every seed answers the same held-out prompts, their choice is a
second source that more seeds never average away, and the two half widths are added in squares (MOVER).
Where no prompt tells the arms apart, the share of prompts that would is bounded by the rule of three.

Claims are those of a two-sided 95 % interval, so each is wrong in at most 2.5 % of experiments; several arms are judged
one by one, without a correction for their number. Left out: pooling variances over arms, sequential looks.
Sources: Piaggio et al., JAMA 308 (2012) 2594 (non-inferiority); Zou and Donner, Stat. Med. 27 (2008) 1693 (MOVER);
Hanley and Lippman-Hand, JAMA 249 (1983) 1743 (rule of three); Owen, Ann. Appl. Stat. 1 (2007) 386 (crossed designs).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

CONFIDENCE = 0.95
POWER = 0.8
MOST_SEEDS = 50  # beyond it no number is told: more seeds are no sensible way out
TAIL = (1 - CONFIDENCE) / 2


class Score(NamedTuple):
    """Held-out accuracy of one run. `prompts` names the set of prompts; None when the run did not record it."""

    accuracy: float
    correct_P: np.ndarray | None = None  # share of right answers, a prompt
    prompts: str | None = None


class Difference(NamedTuple):
    """Arm minus reference. `low` and `high` are infinite where nothing says how far it may stray."""

    mean: float
    low: float
    high: float
    seeds: int
    sd: float  # of the seeds' differences; NaN with one
    prompts_half: float  # half width that the choice of prompts adds, whatever the number of seeds


Status = Literal["within", "worse", "undecided"]


def difference(arm: Sequence[Score], reference: Sequence[Score]) -> Difference:
    """The mean difference with its 95 % interval; the two sequences are of the same seeds in the same order."""
    assert arm and len(arm) == len(reference)
    by_seed = np.array([a.accuracy - b.accuracy for a, b in zip(arm, reference, strict=True)])
    sd, seeds = _sd(by_seed), len(by_seed)
    over_seeds = interval_of(by_seed)[1] if seeds > 1 else math.inf
    over_prompts, crossed = _over_prompts(arm, reference)
    if sd == 0 and over_prompts is None:
        over_seeds = math.inf  # equal numbers and nothing recorded that could tell luck from sameness
    half = math.hypot(over_seeds, over_prompts or 0.0) if crossed else max(over_seeds, over_prompts or 0.0)
    mean = float(by_seed.mean())
    return Difference(mean, mean - half, mean + half, seeds, sd, (over_prompts or 0.0) if crossed else 0.0)


def interval_of(values: np.ndarray) -> tuple[float, float]:
    """Mean and half width of its 95 % interval by Student's t; half is infinite for one value."""
    count = len(values)
    half = student(count - 1) * _sd(values) / math.sqrt(count) if count > 1 else math.inf
    return float(values.mean()), half


def judge(found: Difference, margin: float) -> Status:
    """`within`: not below the reference by more than `margin` > 0. `worse`: below it, by however much."""
    if found.low > -margin:
        return "within"
    return "worse" if found.high < 0 else "undecided"


def more_seeds(found: Difference, margin: float) -> int | None:
    """The fewest seeds to add for an 80 % chance of a decision, if mean and spread stay; None: over 50, or never."""
    from scipy.stats import nct, t

    if not found.sd > 0:  # one seed, or seeds that agree exactly: two more say what the spread is
        return 2
    counts = found.seeds + np.arange(1, MOST_SEEDS + 1)
    decided = np.zeros(MOST_SEEDS, bool)
    for gap in (found.mean + margin, -found.mean):  # how far the true ends may be from -margin, and from 0
        if gap > found.prompts_half:
            room = math.sqrt(gap**2 - found.prompts_half**2)
            bound = t.ppf(1 - TAIL, counts - 1)
            decided |= nct.sf(bound, counts - 1, room * np.sqrt(counts) / found.sd) >= POWER
    return int(decided.argmax()) + 1 if decided.any() else None


def _over_prompts(arm: Sequence[Score], reference: Sequence[Score]) -> tuple[float | None, bool]:
    """Half width from the spread between prompts, None where none was recorded; has every seed the same prompts?"""
    pairs = []
    for a, b in zip(arm, reference, strict=True):
        if a.correct_P is None or b.correct_P is None or a.prompts != b.prompts:
            return None, False
        pairs.append(a.correct_P - b.correct_P)
    crossed = len(pairs) > 1 and len({score.prompts for score in arm}) == 1
    if not any(pair.any() for pair in pairs):  # no prompt tells the two apart
        count = len(pairs[0]) if crossed else sum(map(len, pairs))
        return -math.log(TAIL) / count, crossed
    if crossed:
        return interval_of(np.mean(pairs, axis=0))[1], True
    variance = sum(float(pair.var(ddof=1)) / len(pair) if len(pair) > 1 else math.inf for pair in pairs)
    return student(math.inf) * math.sqrt(variance) / len(pairs), False


@functools.cache
def student(freedom: float) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(1 - TAIL, freedom))


def _sd(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan
