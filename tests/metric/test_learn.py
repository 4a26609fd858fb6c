"""staleness/*, offpolicy/*, update/* and train/*: by hand, and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lpexp.algorithm import Clipped
from lpexp.errors import RunError
from lpexp.metric.learn import learn_metrics, token_advantages

MASK = np.array([[False, True, True, False], [False, True, True, True]])
ZERO = np.zeros(MASK.shape)
LN2, LN3 = math.log(2), math.log(3)


def at(*values: float) -> np.ndarray:
    """The five masked tokens, row by row."""
    array = np.full(MASK.shape, 99.0)
    array[MASK] = values
    return array


def measured(report, low: float = 0.2, high: float = 0.28):
    """learn_metrics, where tokens are clipped as in PPO."""
    u, credit = report.lp_C - report.lp_P, token_advantages(report)
    under, over = np.exp(u) < 1 - low, np.exp(u) > 1 + high
    return learn_metrics(report, Clipped(under, over, (over & (credit > 0)) | (under & (credit < 0))))  # type: ignore[arg-type]


def k3(x: float) -> float:
    return math.exp(x) - 1 - x


def test_the_three_gaps_stay_apart(report) -> None:
    made = report(
        at(-2, -2, -2, -2, -2),
        at(-1, -2, -2, -2, -2),  # d = 1 at the first token
        MASK,
        lp_P=at(-1, -1.5, -2, -2, -2),  # v = 1/2 at the second
        lp_C=at(-1, -1.5, -2.25, -2, -2),  # u = -1/4 at the third
        versions=[2, 3],
    )
    found = measured(made)
    assert found["staleness/kl_k3"] == pytest.approx(k3(0.5) / 5)
    assert found["staleness/logprob_abs_diff_mean"] == pytest.approx(0.1)
    assert found["update/kl_k3"] == pytest.approx(k3(-0.25) / 5)
    assert found["offpolicy/kl_k3"] == pytest.approx((k3(1) + k3(0.5) + k3(-0.25)) / 5)
    assert found["offpolicy/ratio_mean"] == pytest.approx((math.e + math.exp(0.5) + math.exp(-0.25) + 2) / 5)
    assert found["staleness/version_gap_mean"] == pytest.approx(2 / 5)  # two of five tokens are one version old
    assert found["staleness/version_gap_max"] == 1
    assert found["staleness/hist_0"] == pytest.approx(3 / 5) and found["staleness/hist_1"] == pytest.approx(2 / 5)
    assert found["staleness/mixed_version_frac"] == 0.0


def test_a_sequence_whose_tokens_are_of_two_versions_is_mixed(report) -> None:
    made = report(ZERO, ZERO, MASK)
    object.__setattr__(made.batch, "versions_N", np.array([[9, 3, 2, 9], [9, 3, 3, 3]], np.int32))
    found = measured(made)
    assert found["staleness/mixed_version_frac"] == 0.5
    assert found["staleness/version_gap_mean"] == pytest.approx(1 / 5)


def test_without_lag_the_staleness_gap_is_exactly_zero_or_the_trainer_is_wrong(report) -> None:
    assert measured(report(ZERO, ZERO, MASK))["staleness/kl_k3"] == 0.0
    with pytest.raises(AssertionError, match="newest weights sampled"):
        measured(report(ZERO, ZERO, MASK, lp_P=at(0, 0, 0, 0, 1e-6)))


def test_what_no_token_backs_is_absent(report) -> None:
    found = measured(report(ZERO, ZERO, MASK, advantages=[1, 1]))
    assert not {"train/kl_ref_k3", "train/value_mean"} & set(found)
    assert {key for key in found if key.startswith("update/clip")} == {
        "update/clip_frac",
        "update/clip_frac_high_pos",
        "update/clip_frac_low_pos",
    }


def test_an_algorithm_without_a_lower_bound_has_no_share_below_it(report) -> None:
    made = report(ZERO, ZERO, MASK, advantages=[1, -1])
    over = at(1, 0, 0, 1, 0) == 1
    found = learn_metrics(made, Clipped(None, over, over))  # type: ignore[arg-type]
    assert {key for key in found if key.startswith("update/clip")} == {
        "update/clip_frac",
        "update/clip_frac_high_pos",
        "update/clip_frac_high_neg",
    }
    assert found["update/clip_frac"] == pytest.approx(0.4)
    assert found["update/clip_frac_high_pos"] == 0.5 and found["update/clip_frac_high_neg"] == pytest.approx(1 / 3)


def test_a_token_s_own_advantage_goes_before_its_sample_s(report) -> None:
    own = at(1, -1, -1, -1, -1).astype(np.float32)
    made = report(ZERO, ZERO, MASK, lp_C=at(LN2, LN2, 0, 0, 0), advantages=[1, 1])
    made.more["advantages"] = own
    assert measured(made)["update/clip_frac_high_neg"] == 0.25


def test_the_critic_is_judged_by_what_it_knew_before_it_learned(report) -> None:
    made = report(ZERO, ZERO, MASK)
    made.more["values"], made.more["returns"] = at(0, 0, 1, 1, 1), at(0, 0.5, 1, 1, 1)
    found = measured(made)
    assert found["train/value_mean"] == pytest.approx(0.6) and found["train/return_mean"] == pytest.approx(0.7)
    assert found["train/value_explained_var"] == pytest.approx(
        1 - np.var([0, 0.5, 0, 0, 0]) / np.var([0, 0.5, 1, 1, 1])
    )
    made.more["returns"] = at(1, 1, 1, 1, 1)
    assert "train/value_explained_var" not in measured(made)


def test_clip_fractions_are_shares_of_the_tokens_with_that_sign(report) -> None:
    # A > 0 on two tokens, A < 0 on three; exp(u) = 2, 1.25, 1/2, 2, 1
    made = report(ZERO, ZERO, MASK, lp_C=at(LN2, math.log(1.25), -LN2, LN2, 0), advantages=[0.5, -0.5])
    found = measured(made)
    assert found["update/clip_frac_high_pos"] == 0.5 and found["update/clip_frac_low_pos"] == 0.0
    assert found["update/clip_frac_low_neg"] == found["update/clip_frac_high_neg"] == pytest.approx(1 / 3)
    assert found["update/clip_frac"] == pytest.approx(2 / 5)  # the binding ones: high with A > 0, low with A < 0
    assert found["update/ratio_mean"] == pytest.approx(6.75 / 5, rel=1e-6)
    assert found["update/ratio_max"] == pytest.approx(2, rel=1e-6)


def test_removed_tokens_count_for_no_update_metric(report) -> None:
    weights = np.zeros(MASK.shape)
    weights[0, 1] = 1
    made = report(ZERO, ZERO, MASK, lp_C=at(0, LN3, LN3, LN3, LN3), weights=weights)
    assert measured(made)["update/kl_k3"] == 0.0
    with pytest.raises(RunError, match="removed every token"):
        measured(report(ZERO, ZERO, MASK, weights=ZERO))


def test_train_metrics_are_means_over_valid_tokens_beside_the_trainers_own(report) -> None:
    made = report(
        ZERO, at(-1, -2, -3, -4, -5), MASK, lp_ref=at(-2, -2, -3, -4, -5), entropy=at(1, 2, 3, 4, 5),
        weights=np.where(at(0, 1, 1, 1, 1) == 1, 1.0, 0.0), scalars={"train/loss": 0.25},
    )  # fmt: skip
    found = measured(made)
    assert found["train/entropy"] == 3.0 and found["train/entropy_sampled"] == 3.0  # the removed token is valid
    assert found["train/kl_ref_k3"] == pytest.approx(k3(-1) / 5)
    assert found["train/loss"] == 0.25


def test_a_key_is_computed_in_one_place(report) -> None:
    with pytest.raises(AssertionError, match="train/entropy"):
        measured(report(ZERO, ZERO, MASK, scalars={"train/entropy": 1.0}))


@pytest.mark.parametrize("name", ["lp_T", "lp_P", "lp_C"])
def test_any_log_prob_that_is_not_finite_stops_the_run(report, name: str) -> None:
    made = report(ZERO, ZERO.copy(), MASK, lp_P=ZERO.copy(), lp_C=ZERO.copy())
    getattr(made, name)[1, 2] = np.nan
    with pytest.raises(RunError, match="sample 1, position 2"):
        measured(made)


@pytest.mark.parametrize("value", [0.0, 50.0, float("nan")])
def test_padding_changes_no_bit(random_report, padded, value: float) -> None:
    made = random_report(seed=4)
    before = measured(made)
    with np.errstate(invalid="ignore"):
        assert measured(padded(made, 3, value)) == before
    assert len(before) > 15
