"""Token-level truncated importance sampling, and no correction at all."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpexp.config import load
from lpexp.correction.none import NoCorrection
from lpexp.correction.tis_token import TisToken
from lpexp.errors import ConfigError

TIS = load({"name": "tis_token", "ratio_max": 2.0}, TisToken)
NONE = load({"name": "none"}, NoCorrection)
logprobs = st.floats(-30, 0, width=32)


def one(trainer: float, rollout: float) -> tuple[float, bool, bool]:
    """(weight, clipped from below, clipped from above) of one token."""
    given = torch.tensor([[trainer]]), torch.tensor([[rollout]]), torch.tensor([[True]])
    low, high = TIS.clipped(*given)
    return TIS.weights(*given).item(), bool(low.item()), bool(high.item())


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
def test_the_weight_is_the_ratio_of_trainer_to_rollout_cut_from_above(
    trainer: float, rollout: float, expected: tuple[float, bool, bool]
) -> None:
    assert one(trainer, rollout) == pytest.approx(expected, rel=1e-6)


@given(logprobs)
def test_the_weight_is_exactly_one_when_both_log_probabilities_are_the_same(lp: float) -> None:
    assert one(lp, lp) == (1.0, False, False)


@given(logprobs, logprobs)
def test_a_weight_is_marked_clipped_if_and_only_if_it_is_not_the_ratio(trainer: float, rollout: float) -> None:
    weight, low, high = one(trainer, rollout)
    ratio = (torch.tensor(trainer) - torch.tensor(rollout)).exp().item()
    assert (low or high) == (weight != ratio)
    assert 0 < weight <= 2


@pytest.mark.parametrize("correction", [TIS, NONE])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_whatever_stands_outside_the_mask_has_weight_zero_and_is_not_clipped(correction, garbage: float) -> None:
    trainer = torch.tensor([[-1.0, garbage, -3.0]], dtype=torch.float32)
    rollout = torch.tensor([[-1.0, -50.0, garbage]], dtype=torch.float32)
    mask = torch.tensor([[True, False, False]])
    weights = correction.weights(trainer, rollout, mask)
    assert weights.tolist() == [[1.0, 0.0, 0.0]]
    assert weights.dtype == torch.float32
    assert not any(part.any() for part in correction.clipped(trainer, rollout, mask))


def test_a_broken_log_probability_inside_the_mask_is_not_hidden() -> None:
    assert math.isnan(one(math.nan, -1.0)[0])


def test_weights_are_constants_for_the_gradient() -> None:
    trainer = torch.tensor([[-1.0]], requires_grad=True)
    assert not TIS.weights(trainer, torch.tensor([[-2.0]]), torch.tensor([[True]])).requires_grad


def test_no_correction_weighs_every_token_one_whatever_the_mismatch() -> None:
    lp = torch.tensor([[-1.0, -90.0, -3.0]])
    assert NONE.weights(lp, lp.flip(1), torch.tensor([[True, True, False]])).tolist() == [[1.0, 1.0, 0.0]]


def test_a_bound_that_would_cut_equal_probabilities_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ratio_max"):
        load({"name": "tis_token", "ratio_max": 0.9}, TisToken)
