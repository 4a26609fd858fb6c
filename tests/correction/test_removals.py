"""What removes tokens and sequences: veto, rejection, sequence error, masks of an update; each against hand numbers."""

from __future__ import annotations

import math

import pytest
import torch

from lpexp.correction import Correction, Gap
from lpexp.errors import ConfigError

LN2 = math.log(2)


def removed(correction: Correction, gap: Gap) -> list[list[bool]]:
    """Which tokens weigh 0."""
    return (correction.weigh(gap).weights == 0).tolist()


# -- veto --
def test_one_impossible_token_vetoes_its_sequence_only(made, gap) -> None:
    found = made("veto").weigh(gap([[0.0, -9.3, 0.0], [0.0, -9.1, 9.3]]))  # exp(-9.21) = 1e-4
    assert found.weights.tolist() == [[0.0] * 3, [1.0] * 3]
    assert found.removed["veto"].tolist() == [[True] * 3, [False] * 3]


def test_a_veto_from_above_is_asked_for(made, gap) -> None:
    assert removed(made("veto", veto={"ratio_max": 1e4}), gap([[0.0, 9.3]])) == [[True, True]]


# -- rejection --
DELTA = [[0.4, -0.4, 0.0], [0.4, 0.4, 0.0]]
K2, K3_UP, K3_DOWN = 0.08, math.exp(0.4) - 1.4, math.exp(-0.4) - 0.6  # 0.0918, 0.0703


@pytest.mark.parametrize(
    ("estimator", "at", "low", "high", "kl", "expected"),
    [
        ("k1", "token", 0.7, 2.0, None, [[0, 1, 0], [0, 0, 0]]),  # exp(-0.4) = 0.67
        ("k1", "token", 0.5, 1.4, None, [[1, 0, 0], [1, 1, 0]]),  # exp(0.4) = 1.49
        ("k1", "seq_sum", 0.5, 2.0, None, [[0, 0, 0], [1, 1, 1]]),  # exp(0), exp(0.8) = 2.2
        ("k1", "seq_mean", 0.99, 1.31, None, [[0, 0, 0], [0, 0, 0]]),  # exp(0.8 / 3) = 1.306
        ("k1", "seq_mean", 0.99, 1.30, None, [[0, 0, 0], [1, 1, 1]]),
        ("k2", "token", None, None, 0.079, [[1, 1, 0], [1, 1, 0]]),
        ("k2", "seq_sum", None, None, 2 * K2 - 1e-4, [[1, 1, 1], [1, 1, 1]]),
        ("k2", "seq_mean", None, None, 2 * K2 / 3 + 1e-4, [[0, 0, 0], [0, 0, 0]]),
        ("k2", "seq_max", None, None, 0.079, [[1, 1, 1], [1, 1, 1]]),
        ("k3", "token", None, None, 0.08, [[1, 0, 0], [1, 1, 0]]),  # one side weighs more
        ("k3", "seq_sum", None, None, K3_UP + K3_DOWN + 1e-4, [[0, 0, 0], [1, 1, 1]]),
        ("k3", "seq_mean", None, None, (K3_UP + K3_DOWN) / 3 + 1e-4, [[0, 0, 0], [1, 1, 1]]),
        ("k3", "seq_max", None, None, K3_UP + 1e-4, [[0, 0, 0], [0, 0, 0]]),
    ],
)
def test_rejection_compares_the_estimator_at_its_level(gap, estimator, at, low, high, kl, expected) -> None:
    given = {"estimator": estimator, "at": at, "ratio_min": low, "ratio_max": high, "kl_max": kl}
    found = removed(Correction.model_validate({"reject": given}), gap(DELTA))
    assert found == [[bool(token) for token in row] for row in expected]


def test_the_bounds_of_k1_are_on_trainer_over_rollout_not_on_its_inverse(made, gap) -> None:
    unsure = gap([[math.log(0.6), math.log(1.9)]])  # their inverses are 1.67 and 0.53
    assert removed(made("reject_k1", reject={"ratio_min": 0.55}), unsure) == [[False, False]]
    assert removed(made("reject_k1", reject={"ratio_min": 0.7}), unsure) == [[True, False]]


def test_the_default_of_k3_is_a_hundredth_of_a_nat_a_token(made, gap) -> None:
    assert removed(made("reject_k3"), gap([[0.13, 0.13], [0.15, 0.15]])) == [[False] * 2, [True] * 2]  # x^2 / 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratio_min": None}, r"reject\.ratio_min: must be set"),
        ({"kl_max": 0.1}, r"reject\.kl_max: 0\.1 is read by nobody"),
        ({"at": "seq_max"}, r"reject\.at: seq_max of k1"),
        ({"estimator": "k3"}, r"reject\.kl_max: must be set"),
    ],
)
def test_a_bound_that_is_missing_or_that_nobody_reads_is_refused(made, given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        made("reject_k1", reject=given)


# -- sequence error --
def test_sequence_error_looks_at_the_numerics_alone_in_both_directions(made) -> None:
    lp_R = torch.full((2, 2), -1.0)
    lp_T = lp_R + torch.tensor([[0.3, -0.3], [0.1, -0.1]])  # mean exp|d|: 1.35, 1.105
    gap = Gap(lp_T, lp_T + 9.0, lp_R, torch.ones(2, 2, dtype=torch.bool))  # lp_P, which lag moves, is not asked
    assert removed(made("seq_error"), gap) == [[True, True], [False, False]]


# -- masks of an update --
@pytest.mark.parametrize(
    ("moved", "advantage", "gone"),
    [(-0.6, -1.0, True), (-0.6, 1.0, False), (-0.6, 0.0, False), (-0.4, -1.0, False), (0.6, -1.0, False)],
)
def test_opsm_leaves_a_bad_answer_that_the_policy_has_left_and_nothing_else(made, gap, moved, advantage, gone) -> None:
    """moved = lp_C - lp_R of each token, against a delta of 0.5."""
    assert removed(made("opsm"), gap([[0.0, 0.0]], moved=moved, advantages=[advantage])) == [[gone, gone]]


def test_opsm_measures_from_the_rollout_or_from_the_trainer_as_asked(made, gap) -> None:
    mismatch = gap([[-0.6, -0.6]], advantages=[-1.0])  # lp_C = lp_T, both 0.6 under lp_R
    assert removed(made("opsm"), mismatch) == [[True, True]]
    assert removed(made("opsm", opsm={"reference": "trainer"}), mismatch) == [[False, False]]


def test_opsm_without_a_threshold_is_refused_with_the_published_ones(made) -> None:
    with pytest.raises(ConfigError, match=r"opsm\.delta: must be set: published values differ by 5000"):
        made("opsm", opsm={"delta": None})


@pytest.mark.parametrize(
    ("probability", "advantage", "gone"),
    [(0.75, 1.0, True), (0.75, -1.0, False), (0.25, -1.0, True), (0.25, 1.0, False), (0.65, 1.0, False)],
)
def test_dppo_drops_a_token_that_moved_far_from_one_half_as_its_advantage_asks(
    made, gap, probability, advantage, gone
) -> None:
    moved = gap([[math.log(probability) + LN2]], lp_R=-LN2, advantages=[advantage])
    assert removed(made("dppo"), moved) == [[gone]]
