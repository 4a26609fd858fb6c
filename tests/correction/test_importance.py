"""Importance weights: three levels, three ways with what is outside the bounds, each against a hand calculation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpexp.correction import Correction, Gap
from lpexp.errors import ConfigError

LN2 = math.log(2)
logprobs = st.floats(-30, 0, width=32)


def importance(level: str, outside: str, low: float | None, high: float) -> Correction:
    given = {"level": level, "outside": outside, "ratio_min": low, "ratio_max": high}
    return Correction.model_validate({"importance": given})


def one(trainer: float, rollout: float) -> tuple[float, bool, bool]:
    """(weight, raised, cut) of one token under TIS with bound 2."""
    lp = torch.tensor([[trainer]])
    gap = Gap(lp, lp, torch.tensor([[rollout]]), torch.tensor([[True]]))
    found = importance("token", "truncate", None, 2.0).weigh(gap)
    return found.weights.item(), bool(found.low.item()), bool(found.high.item())


# -- token --
@pytest.mark.parametrize(
    ("trainer", "rollout", "expected"),
    [
        (-1.0, -1.0 - math.log(1.5), (1.5, False, False)),
        (-1.0 - math.log(4), -1.0, (0.25, False, False)),
        (-1.0, -1.0 - math.log(3), (2.0, False, True)),
        (-1.0, -90.0, (2.0, False, True)),
        (-90.0, -1.0, (math.exp(-20), True, False)),  # the log-ratio is held at -20, so the weight is never 0
    ],
)
def test_truncation_gives_the_ratio_of_trainer_to_rollout_cut_from_above(
    trainer: float, rollout: float, expected: tuple[float, bool, bool]
) -> None:
    assert one(trainer, rollout) == pytest.approx(expected, rel=1e-6)


@given(logprobs, logprobs)
def test_a_weight_is_marked_cut_if_and_only_if_it_is_not_the_ratio(trainer: float, rollout: float) -> None:
    weight, low, high = one(trainer, rollout)
    ratio = (torch.tensor(trainer) - torch.tensor(rollout)).exp().item()
    assert (low or high) == (weight != ratio)
    assert 0 < weight <= 2


def test_icepop_keeps_the_ratio_inside_its_bounds_and_removes_a_token_outside(made, gap) -> None:
    found = made("icepop").weigh(gap([[math.log(0.4), math.log(0.6), 0.0, math.log(4.9), math.log(5.1)]]))
    assert found.weights.tolist()[0] == pytest.approx([0.0, 0.6, 1.0, 4.9, 0.0], rel=1e-5)
    assert found.removed["outside"].tolist() == [[True, False, False, False, True]]
    assert not found.low.any() and not found.high.any()  # removed is not cut


# -- sequences: the first has delta ln 2 twice, the second ln 2 and -ln 2; a third token is outside the mask --
DELTA, MASK = [[LN2, LN2, 9.0], [LN2, -LN2, 9.0]], [[True, True, False], [True, True, False]]


@pytest.mark.parametrize(
    ("level", "outside", "low", "high", "expected"),
    [
        ("sequence", "truncate", None, 5.0, [4.0, 1.0]),  # exp(2 ln 2), exp(0)
        ("sequence", "truncate", None, 3.0, [3.0, 1.0]),
        ("sequence", "mask", 0.5, 3.0, [0.0, 1.0]),
        ("sequence", "clip", 0.5, 2.0, [2.0, 1.0]),
        ("geometric", "truncate", None, 5.0, [2.0, 1.0]),  # exp(mean)
        ("geometric", "clip", 0.9999, 1.0001, [1.0001, 1.0]),
        ("geometric", "mask", 0.99, 1.01, [0.0, 1.0]),
    ],
)
def test_a_sequence_shares_one_weight(gap, level, outside, low, high, expected) -> None:
    found = importance(level, outside, low, high).weigh(gap(DELTA, MASK)).weights.tolist()
    assert found == [pytest.approx([weight, weight, 0.0]) for weight in expected]


def test_a_weight_under_the_lower_bound_is_raised_to_it(gap) -> None:
    found = importance("token", "clip", 0.5, 2.0).weigh(gap([[-LN2 * 2, 0.0, LN2 * 2]]))
    assert found.weights.tolist() == [[0.5, 1.0, 2.0]]
    assert found.low.tolist() == [[True, False, False]] and found.high.tolist() == [[False, False, True]]


@pytest.mark.parametrize(
    ("level", "delta", "clamped"),
    [
        ("token", [[21.0, 1.0]], [[True, False]]),
        ("sequence", [[11.0, 10.0]], [[True, True]]),
        ("geometric", [[25.0, 16.0]], [[True, True]]),
    ],
)
def test_log_ratios_beyond_20_are_held_and_counted_at_the_weight_s_level(gap, level, delta, clamped) -> None:
    found = importance(level, "truncate", None, 1e9).weigh(gap(delta))
    assert found.clamped.tolist() == clamped
    assert found.weights[0, 0].item() == pytest.approx(math.exp(20), rel=1e-6)
    assert found.high.tolist() == clamped  # what is held is not the ratio


# -- config --
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"outside": "truncate", "ratio_min": 0.5}, "read by nobody"),
        ({"outside": "clip", "ratio_min": None}, "no lower bound"),
        ({"outside": "mask", "ratio_min": None}, "no lower bound"),
        ({"ratio_max": 0.9}, "greater than or equal to 1"),  # would cut equal probabilities
        ({"ratio_min": 1.1, "outside": "mask"}, "less than or equal to 1"),
    ],
)
def test_half_set_bounds_and_those_that_would_cut_equal_probabilities_are_refused(made, given, message) -> None:
    with pytest.raises(ConfigError, match=message):
        made("tis_token", importance=given)


def test_each_level_has_a_name_of_its_own_with_and_without_masking() -> None:
    found = [
        importance(level, outside, low, 2.0).name
        for level in ("token", "sequence", "geometric")
        for outside, low in (("truncate", None), ("mask", 0.5))
    ]
    assert found == ["tis_token", "icepop", "tis_sequence", "mis_sequence", "tis_geometric", "mis_geometric"]
