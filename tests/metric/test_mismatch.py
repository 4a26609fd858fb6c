"""mismatch/*: each formula against a value computed by hand, and what must not change any of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpexp.errors import RunError
from lpexp.metric import mismatch
from lpexp.metric.mismatch import mismatch_metrics, worst_tokens

# Two sequences: two tokens, then one. p_R = 1/2, 1/4, 1/10; p_T = 1/4, 1/4, 3/10.
MASK = np.array([[False, True, True], [False, True, False]])
P_R = np.array([[1.0, 0.5, 0.25], [1.0, 0.1, 1.0]])
P_T = np.array([[1.0, 0.25, 0.25], [1.0, 0.3, 1.0]])
ENTROPY = np.array([[9.0, 0.1, 0.2], [9.0, 0.9, 9.0]])
D1, D3 = math.log(1 / 2), math.log(3)  # d of the first and third token; the second is 0


def by_hand() -> dict[str, float]:
    """Every scalar of the dictionary, written out for the three tokens."""
    k3 = [1 / 2 - 1 - D1, 0.0, 3 - 1 - D3]
    n1, n3 = math.log((0.25 + 0.5) / 2), math.log((0.3 + 0.1) / 2)

    def g(x: float) -> float:
        return math.exp(x) - 1 - x

    js = [
        (g(math.log(0.25) - n1) + g(math.log(0.5) - n1)) / 2,
        0.0,
        (g(math.log(0.3) - n3) + g(math.log(0.1) - n3)) / 2,
    ]
    ln = math.log
    return {
        "logprob_abs_diff_mean": (ln(2) + ln(3)) / 3,
        "logprob_abs_diff_p50": ln(2),
        "logprob_abs_diff_p95": ln(2) + 0.9 * (ln(3) - ln(2)),
        "logprob_abs_diff_p99": ln(2) + 0.98 * (ln(3) - ln(2)),
        "logprob_abs_diff_max": ln(3),
        "quantiles_exact": 1,
        "kl_k1": (ln(2) - ln(3)) / 3,
        "kl_k2": (ln(2) ** 2 + ln(3) ** 2) / 6,
        "kl_k3": sum(k3) / 3,
        "kl_k3_reverse": ((2 - 1 - ln(2)) + (1 / 3 - 1 + ln(3))) / 3,
        "mult_prob_error": (2 + 1 + 3) / 3,
        "mult_prob_error_seq_max": 3.0,
        "ratio_extreme_frac": 1 / 3,  # 3 is above 2; 1/2 is not below 1/2
        "ratio_mean": (0.5 + 1 + 3) / 3,
        "prob_abs_diff_mean": (0.25 + 0.2) / 3,
        "prob_abs_diff_max": 0.25,
        "prob_pearson": float(np.corrcoef([0.25, 0.25, 0.3], [0.5, 0.25, 0.1])[0, 1]),
        "chi2_token": (0.25 + 1 + 9) / 3 - 1,
        "chi2_seq": (0.25 + 9) / 2 - 1,
        "chi2_seq_clamped_frac": 0.0,
        "log_ppl_abs_diff": (ln(2) / 2 + ln(3)) / 2,
        "ppl_ratio": (math.sqrt(2) + 1 / 3) / 2,
        "trainer_log_ppl": ((ln(4) + ln(4)) / 2 - ln(0.3)) / 2,
        "rollout_log_ppl": ((ln(2) + ln(4)) / 2 + ln(10)) / 2,
        "js_divergence": sum(js) / 3,
        "kl_per_entropy": sum(k3) / 3 / 0.4,
        "seq_logratio_abs_mean": (ln(2) + ln(3)) / 2,
        "nonfinite_count": 0,
        "valid_tokens": 3,
        "by_prob/0.5_0.9/kl_k3": k3[0],
        "by_prob/0.5_0.9/logprob_abs_diff_mean": ln(2),
        "by_prob/0.5_0.9/token_frac": 1 / 3,
        "by_prob/0.5_0.9/kl_share": k3[0] / sum(k3),
        "by_prob/1e-1_0.5/kl_k3": k3[2] / 2,  # 1/4 and 1/10
        "by_prob/1e-1_0.5/logprob_abs_diff_mean": ln(3) / 2,
        "by_prob/1e-1_0.5/token_frac": 2 / 3,
        "by_prob/1e-1_0.5/kl_share": k3[2] / sum(k3),
        "by_position/0_1/kl_k3": (k3[0] + k3[2]) / 2,  # the first token of each sequence
        "by_position/0_1/logprob_abs_diff_mean": (ln(2) + ln(3)) / 2,
        "by_position/0_1/token_frac": 2 / 3,
        "by_position/0_1/kl_share": 1.0,
        "by_position/1_4/kl_k3": 0.0,
        "by_position/1_4/logprob_abs_diff_mean": 0.0,
        "by_position/1_4/token_frac": 1 / 3,
        "by_position/1_4/kl_share": 0.0,
        # quartile edges of (0.1, 0.2, 0.9) are 0.15, 0.2, 0.55: q3 is empty and therefore absent
        "by_entropy/q1/kl_k3": k3[0],
        "by_entropy/q1/logprob_abs_diff_mean": ln(2),
        "by_entropy/q1/token_frac": 1 / 3,
        "by_entropy/q1/kl_share": k3[0] / sum(k3),
        "by_entropy/q2/kl_k3": 0.0,
        "by_entropy/q2/logprob_abs_diff_mean": 0.0,
        "by_entropy/q2/token_frac": 1 / 3,
        "by_entropy/q2/kl_share": 0.0,
        "by_entropy/q4/kl_k3": k3[2],
        "by_entropy/q4/logprob_abs_diff_mean": ln(3),
        "by_entropy/q4/token_frac": 1 / 3,
        "by_entropy/q4/kl_share": k3[2] / sum(k3),
    }


def test_every_scalar_is_its_formula() -> None:
    # float64 inputs, nudged so that p = 1/10 and the ratio 1/2 are on the side that the comment says
    lp_R = np.log(P_R)
    lp_R[1, 1] = np.nextafter(np.log(0.1), 0)
    lp_T = np.log(P_T)
    lp_T[0, 1] = np.nextafter(lp_R[0, 1] - np.log(2), 0)
    found = mismatch_metrics(lp_T, lp_R, MASK, ENTROPY)
    expected = {f"mismatch/{key}": value for key, value in by_hand().items()}
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-12, abs=1e-15), key


def test_equal_log_probs_give_exact_zeros_and_ones() -> None:
    lp = np.log(np.random.default_rng(0).uniform(0.01, 1, (5, 7))).astype(np.float32)
    found = mismatch_metrics(lp, lp, np.ones((5, 7), bool), np.ones((5, 7)))
    ones = ("mult_prob_error", "mult_prob_error_seq_max", "ratio_mean", "ppl_ratio", "quantiles_exact")
    neither = ("ppl", "token_frac", "prob_pearson", "valid_tokens")
    for key, value in found.items():
        name = key.removeprefix("mismatch/")
        if name in ones:
            assert value == 1.0, key
        elif not any(part in name for part in neither) or name == "log_ppl_abs_diff":
            assert value == 0.0 and math.copysign(1, value) == 1, key
    assert not any("kl_share" in key for key in found)  # there is no gap to share out


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), columns=st.integers(1, 5), value=st.sampled_from([0.0, -7.5, 1e30, np.nan, np.inf]))
def test_padding_changes_no_bit(seed: int, columns: int, value: float) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((4, 6)) < 0.6
    mask[0, 0] = True
    lp_R, lp_T, entropy = -rng.exponential(1, (3, 4, 6))
    before = mismatch_metrics(lp_T, lp_R, mask, -entropy)
    wide = [np.concatenate([a, np.full((4, columns), value)], axis=1) for a in (lp_T, lp_R, -entropy)]
    wide_mask = np.concatenate([mask, np.zeros((4, columns), bool)], axis=1)
    assert mismatch_metrics(wide[0], wide[1], wide_mask, wide[2]) == before
    rows = [np.concatenate([a, np.full((2, 6), value)]) for a in (lp_T, lp_R, -entropy)]  # and empty samples
    assert mismatch_metrics(rows[0], rows[1], np.concatenate([mask, np.zeros((2, 6), bool)]), rows[2]) == before


def test_the_order_of_samples_changes_nothing_and_a_mean_is_not_a_mean_of_means() -> None:
    rng = np.random.default_rng(1)
    mask = np.arange(9) < np.array([1, 9, 2, 5])[:, None]
    lp_R, lp_T = -rng.exponential(1, (2, 4, 9))
    entropy = rng.exponential(1, (4, 9))
    whole = mismatch_metrics(lp_T, lp_R, mask, entropy)
    order = [2, 0, 3, 1]
    shuffled = mismatch_metrics(lp_T[order], lp_R[order], mask[order], entropy[order])
    assert shuffled == pytest.approx(whole, rel=1e-12)
    parts = [mismatch_metrics(lp_T[i], lp_R[i], mask[i], entropy[i]) for i in (slice(0, 2), slice(2, 4))]
    key, tokens = "mismatch/kl_k3", "mismatch/valid_tokens"
    together = sum(part[key] * part[tokens] for part in parts) / sum(part[tokens] for part in parts)
    assert together == pytest.approx(whole[key], rel=1e-12)
    assert (parts[0][key] + parts[1][key]) / 2 != pytest.approx(whole[key], rel=1e-3)


@pytest.mark.parametrize("side", ["trainer", "rollout"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_token_without_a_finite_log_prob_stops_the_run_and_is_counted(side: str, value: float) -> None:
    lp_T, lp_R = np.log(P_T), np.log(P_R)
    (lp_T if side == "trainer" else lp_R)[1, 1] = value
    with pytest.raises(RunError, match=r"nonfinite_count = 1 of 3 tokens .* sample 1, position 1"):
        mismatch_metrics(lp_T, lp_R, MASK, ENTROPY)


def test_a_batch_without_a_response_token_is_no_perfect_agreement() -> None:
    with pytest.raises(RunError, match="valid_tokens = 0"):
        mismatch_metrics(np.log(P_T), np.log(P_R), np.zeros_like(MASK), ENTROPY)


def test_nothing_is_clamped_but_the_sequence_chi2_which_says_so() -> None:
    lp_R, lp_T = np.full((1, 2), -30.0), np.full((1, 2), -5.0)
    found = mismatch_metrics(lp_T, lp_R, np.ones((1, 2), bool), np.ones((1, 2)))
    assert found["mismatch/kl_k3"] == pytest.approx(math.exp(25) - 26)
    assert found["mismatch/chi2_token"] == pytest.approx(math.exp(50))
    assert found["mismatch/chi2_seq"] == pytest.approx(math.exp(40))
    assert found["mismatch/chi2_seq_clamped_frac"] == 1.0


def test_the_worst_sequence_is_judged_by_its_mean_not_its_worst_token() -> None:
    d = np.log([[9.0, 1.0, 1.0], [4.0, 4.0, 1.0]])  # means of exp|d|: 11/3 and, without the padding, 4
    mask = np.array([[True, True, True], [True, True, False]])
    found = mismatch_metrics(d - 5, np.full((2, 3), -5.0), mask, np.ones((2, 3)))
    assert found["mismatch/mult_prob_error_seq_max"] == pytest.approx(4)


def test_constant_probabilities_have_no_correlation() -> None:
    lp_R = np.full((1, 3), -1.0)
    found = mismatch_metrics(lp_R + np.array([0.1, 0.2, 0.3]), lp_R, np.ones((1, 3), bool), np.ones((1, 3)))
    assert "mismatch/prob_pearson" not in found


def test_bins_are_half_open_and_their_shares_sum_to_one() -> None:
    width = 20_000
    lp_R = np.full((1, width), np.log(0.95))
    lp_R[0, :7] = np.nextafter(np.log([1e-4, 1e-3, 1e-2, 1e-1, 0.5, 0.9, 0.2]), 0)
    rng = np.random.default_rng(0)
    found = mismatch_metrics(lp_R - rng.random((1, width)), lp_R, np.ones((1, width), bool), rng.random((1, width)))
    for where, names in (
        ("prob", mismatch.PROB_BINS),
        ("position", mismatch.POSITION_BINS),
        ("entropy", mismatch.ENTROPY_BINS),
    ):
        for what in ("token_frac", "kl_share"):
            assert sum(found[f"mismatch/by_{where}/{name}/{what}"] for name in names) == pytest.approx(1)
    tokens = [round(width * found[f"mismatch/by_prob/{name}/token_frac"]) for name in mismatch.PROB_BINS]
    assert tokens == [1, 1, 1, 2, 1, width - 6]
    tokens = [round(width * found[f"mismatch/by_position/{name}/token_frac"]) for name in mismatch.POSITION_BINS]
    assert tokens == [1, 3, 12, 48, 192, 768, 3072, 12288, width - 16384]


def test_quantiles_of_very_many_tokens_are_within_a_bin_of_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    d = rng.exponential(0.01, (4, 5000))
    d[0, :500] = 0
    lp_R, mask = np.full(d.shape, -1.0), np.ones(d.shape, bool)
    exact = mismatch_metrics(lp_R + d, lp_R, mask, mask)
    monkeypatch.setattr(mismatch, "EXACT_TOKENS", 10_000)
    binned = mismatch_metrics(lp_R + d, lp_R, mask, mask)
    assert (exact["mismatch/quantiles_exact"], binned["mismatch/quantiles_exact"]) == (1, 0)
    for q in ("p50", "p95", "p99"):
        key = f"mismatch/logprob_abs_diff_{q}"
        assert exact[key] <= binned[key] <= exact[key] * 1.03
    assert binned["mismatch/logprob_abs_diff_max"] == exact["mismatch/logprob_abs_diff_max"]
    zeros = mismatch_metrics(lp_R, lp_R, mask, mask)
    assert zeros["mismatch/logprob_abs_diff_p99"] == 0.0


def test_the_worst_tokens_come_worst_first_and_agreeing_ones_are_left_out(report) -> None:
    made = report(np.log(P_R), np.log(P_T), MASK, entropy=ENTROPY)
    table = worst_tokens(made)
    assert [(row["prompt_id"], row["position"]) for row in table] == [(1, 0), (0, 0)]
    assert table[0]["token"] == 4 and table[0]["entropy"] == pytest.approx(0.9) and table[0]["weight"] == 1.0
    assert table[0]["lp_T"] - table[0]["lp_R"] == pytest.approx(math.log(3), rel=1e-6)
    assert worst_tokens(report(np.log(P_R), np.log(P_R), MASK)) == []
