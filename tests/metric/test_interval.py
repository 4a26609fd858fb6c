"""95 % intervals: Wilson's known values, and how much several answers to one prompt are worth."""

from __future__ import annotations

import numpy as np
import pytest

from lpexp.metric.interval import effective, wilson


@pytest.mark.parametrize(("right", "count", "low", "high"), [
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662),
])  # fmt: skip
def test_wilson_has_its_published_values(right, count, low, high):
    """81 of 263: Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3."""
    assert wilson(right / count, count) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_covers_the_truth_in_95_of_100_experiments_though_answers_to_a_prompt_are_alike():
    random = np.random.default_rng(0)
    prompts, answers, covered, naive = 100, 8, 0, 0
    for _ in range(2000):
        ease = random.beta(0.6, 0.9, size=prompts)  # of each prompt; their mean is 0.4
        correct = (random.random((prompts, answers)) < ease[:, None]).astype(float)
        low, high = wilson(correct.mean(), effective(correct))
        covered += low <= 0.4 <= high
        low, high = wilson(correct.mean(), correct.size)
        naive += low <= 0.4 <= high
    assert 0.935 < covered / 2000 < 0.965  # 3 standard errors of 2000 experiments
    assert naive / 2000 < 0.8, "counting every answer would cover far less, so the test can fail"


def test_what_does_not_vary_counts_its_prompts():
    assert effective(np.ones((20, 4))) == effective(np.zeros((20, 4))) == 20
    assert effective(np.array([[1.0], [0.0], [1.0]])) == 3
    assert effective(np.tile([[1.0, 1.0], [0.0, 0.0]], (10, 1))) == 20, "answers that repeat each other"
    assert effective(np.tile([[1.0, 0.0]], (10, 1))) == 20, "at most every answer"
