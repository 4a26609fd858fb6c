"""The verdict's statistics on made-up sweeps whose truth is known: coverage, error rates, and the seeds it asks for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lpexp.metric.verdict import Difference, Score, difference, interval_of, judge, more_seeds

EXPERIMENTS = 1000
ERROR = 3 * math.sqrt(0.95 * 0.05 / EXPERIMENTS)  # 3 standard errors of a coverage


class Sweep:
    """Accuracies of two arms. Of each answer the chance is logistic in its prompt, its seed, and for the arm a shift
    that itself varies with the seed (training went another way) and with the prompt."""

    def __init__(self, shift: float, by_seed: float, by_prompt: float, prompts: int = 128, answers: int = 4):
        self.shift, self.by_seed, self.by_prompt = shift, by_seed, by_prompt
        self.prompts, self.answers = prompts, answers
        random = np.random.default_rng(99)
        ease, seed = 1.5 * random.standard_normal(200_000), 0.3 * random.standard_normal(200_000)
        moved = shift + by_seed * random.standard_normal(200_000) + by_prompt * random.standard_normal(200_000)
        self.truth = float((_chance(1 + ease + seed + moved) - _chance(1 + ease + seed)).mean())

    def draw(self, random: np.random.Generator, seeds: int, crossed: bool) -> Difference:
        shape = (seeds, self.prompts)
        drawn = (1 if crossed else seeds, self.prompts)
        ease = np.broadcast_to(1.5 * random.standard_normal(drawn), shape)
        moved = self.shift + self.by_seed * random.standard_normal((seeds, 1))
        moved = moved + self.by_prompt * np.broadcast_to(random.standard_normal(drawn), shape)
        logit = 1 + ease + 0.3 * random.standard_normal((seeds, 1))
        arms = []
        for chance in (_chance(logit + moved), _chance(logit)):
            shares = random.binomial(self.answers, chance) / self.answers
            arms.append([Score(row.mean(), row, "same" if crossed else str(i)) for i, row in enumerate(shares)])
        return difference(*arms)


def _chance(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))


def covered(sweep: Sweep, seeds: int, crossed: bool, experiments: int = EXPERIMENTS) -> float:
    random = np.random.default_rng(seeds)
    found = [sweep.draw(random, seeds, crossed) for _ in range(experiments)]
    return float(np.mean([one.low <= sweep.truth <= one.high for one in found]))


@pytest.mark.parametrize("seeds", [2, 3, 10])
@pytest.mark.parametrize(("by_seed", "by_prompt"), [(0.15, 0.0), (0.0, 0.5)])
def test_the_interval_covers_the_truth_in_at_least_95_of_100_sweeps(seeds, by_seed, by_prompt):
    assert covered(Sweep(-0.1, by_seed, by_prompt), seeds, crossed=False) > 0.95 - ERROR


@pytest.mark.parametrize("seeds", [3, 10])
def test_it_does_so_when_every_seed_answers_the_same_prompts(seeds):
    assert covered(Sweep(-0.1, 0.1, 1.0), seeds, crossed=True) > 0.95 - ERROR


def test_it_is_no_wider_than_it_must_be():
    """Ten seeds whose spread lies between seeds: coverage is 95 %, not 99 %."""
    assert covered(Sweep(-0.1, 0.25, 0.0), 10, crossed=False) < 0.95 + ERROR + 0.01


def test_the_wrong_units_would_cover_far_less_so_these_tests_can_fail():
    """Answers as the unit forget the seeds; seeds as the only unit forget that all of them met the same prompts."""
    random, sweep = np.random.default_rng(1), Sweep(-0.1, 0.3, 0.0)
    answers = sweep.prompts * sweep.answers * 3
    half = 1.96 * math.sqrt(2 * 0.2 / answers)
    found = [sweep.draw(random, 3, crossed=False) for _ in range(500)]
    assert np.mean([abs(one.mean - sweep.truth) < half for one in found]) < 0.9
    sweep, seeds = Sweep(-0.1, 0.02, 1.5, answers=64), 10
    found = [sweep.draw(random, seeds, crossed=True) for _ in range(500)]
    only_seeds = [math.sqrt((one.high - one.mean) ** 2 - one.prompts_half**2) for one in found]
    inside = [abs(one.mean - sweep.truth) < half for one, half in zip(found, only_seeds, strict=True)]
    assert np.mean(inside) < 0.85


@pytest.mark.parametrize("seeds", [3, 6])
def test_an_arm_that_lies_just_at_the_margin_is_called_within_it_in_at_most_25_of_1000_sweeps(seeds):
    sweep, random = Sweep(-0.15, 0.1, 0.2), np.random.default_rng(5)
    margin = -sweep.truth
    assert margin > 0.01
    said = [judge(sweep.draw(random, seeds, crossed=False), margin) for _ in range(EXPERIMENTS)]
    assert said.count("within") / EXPERIMENTS < 0.025 + 3 * math.sqrt(0.025 * 0.975 / EXPERIMENTS)


@pytest.mark.parametrize("seeds", [3, 6])
def test_an_arm_that_is_no_worse_is_called_worse_in_at_most_25_of_1000_sweeps(seeds):
    sweep, random = Sweep(0.0, 0.0, 0.0), np.random.default_rng(6)
    said = [judge(sweep.draw(random, seeds, crossed=False), 0.001) for _ in range(EXPERIMENTS)]
    assert said.count("worse") / EXPERIMENTS < 0.025 + 3 * math.sqrt(0.025 * 0.975 / EXPERIMENTS)


@pytest.mark.parametrize(("mean", "never"), [(0.0, "worse"), (-0.012, None), (-0.03, "within")])
def test_the_seeds_that_it_asks_for_decide_in_80_of_100_sweeps(mean, never):
    """Between -margin and 0 both claims are true: such an arm is worse, and within the margin."""
    sd, margin = 0.02, 0.02
    first = Difference(mean, mean - 0.05, mean + 0.05, 3, sd, 0.0)
    more = more_seeds(first, margin)
    assert more is not None and more > 0
    random, said = np.random.default_rng(7), []
    for _ in range(EXPERIMENTS):
        middle, half = interval_of(random.normal(mean, sd, 3 + more))
        said.append(judge(Difference(middle, middle - half, middle + half, 3 + more, sd, 0.0), margin))
    assert said.count("undecided") / EXPERIMENTS < 0.2 + ERROR
    assert said.count(never) / EXPERIMENTS < 0.025 + ERROR
    assert more_seeds(first._replace(seeds=3 + more - 1), margin) == 1, "one seed fewer would not do"


def test_the_half_width_is_the_published_one():
    """Student (1908), sleep data, extra hours of drug 2 over drug 1: mean 1.58, t = 4.06 with 9 degrees of freedom."""
    extra = np.array([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    mean, half = interval_of(extra)
    assert mean == pytest.approx(1.58)
    assert (mean - half, mean + half) == pytest.approx((0.7001, 2.4599), abs=1e-4)


def score(*shares: float, prompts: str = "a") -> Score:
    return Score(float(np.mean(shares)), np.array(shares), prompts)


def test_one_seed_decides_nothing():
    found = difference([score(0.5, 1.0)], [score(0.5, 0.5)])
    assert (found.low, found.high, found.seeds) == (-math.inf, math.inf, 1)
    assert (judge(found, 0.5), more_seeds(found, 0.5)) == ("undecided", 2)


def test_three_seeds_that_agree_by_luck_are_no_narrower_than_their_prompts_allow():
    random = np.random.default_rng(0)
    arms = [[], []]
    for seed in range(3):
        for arm in arms:
            shares = random.permutation([0.0, 1.0] * 32)  # every run's accuracy is 0.5, at other prompts
            arm.append(score(*shares, prompts=str(seed)))
    found = difference(arms[0], arms[1])
    assert found.mean == found.sd == 0
    assert found.high > 0.05


def test_arms_that_no_prompt_tells_apart_differ_by_less_than_the_rule_of_three():
    arms = [score(0.5, 1.0, *[1.0] * 98, prompts=str(seed)) for seed in range(3)]
    found = difference(arms, arms)
    assert found.high == -found.low == pytest.approx(3.689 / 300, rel=1e-3)
    assert judge(found, 0.02) == "within"
    assert judge(found, 0.01) == "undecided"


def test_equal_numbers_without_a_record_of_the_prompts_decide_nothing():
    found = difference([Score(0.5), Score(0.6)], [Score(0.5), Score(0.6)])
    assert found.low == -math.inf
    assert difference([Score(0.5), Score(0.7)], [Score(0.5), Score(0.6)]).low > -math.inf


def test_no_number_of_seeds_is_named_where_only_more_prompts_would_decide():
    found = Difference(-0.01, -0.05, 0.03, 3, 0.002, prompts_half=0.03)
    assert judge(found, 0.02) == "undecided" and more_seeds(found, 0.02) is None
    assert more_seeds(found._replace(prompts_half=0.0), 0.02) == 1
