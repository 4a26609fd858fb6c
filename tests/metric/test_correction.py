"""correction/*: by hand, and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lpexp.correction import Correction, Weighed
from lpexp.correction.gap import Gap
from lpexp.metric.correction import correction_metrics

MASK = np.array([[False, True, True, False], [False, True, True, True]])


def at(*values: float, outside: float = 9.0) -> np.ndarray:
    """The five masked tokens, row by row."""
    array = np.full(MASK.shape, outside)
    array[MASK] = values
    return array


def marked(*values: int) -> torch.Tensor:
    return torch.from_numpy(at(*values, outside=1).astype(bool))


def k3(x: float) -> float:
    return math.exp(x) - 1 - x


def measured(weighed: Weighed, lp_T: np.ndarray, lp_R: np.ndarray, rewards: tuple[float, ...] = (1.0, 0.3)) -> dict:
    found = correction_metrics(weighed, lp_T, lp_R, MASK, np.array(rewards))
    return {key.removeprefix("correction/"): value for key, value in found.items()}


NONE = torch.zeros(MASK.shape, dtype=torch.bool)


def test_they_describe_the_weights_of_valid_tokens_only() -> None:
    weights = torch.from_numpy(at(0, 0, 1, 2, 0.5))
    removed = {"veto": marked(1, 1, 0, 0, 0), "reject": marked(0, 1, 0, 0, 0)}
    weighed = Weighed(weights, marked(0, 0, 0, 0, 1), marked(0, 0, 0, 1, 0), marked(0, 1, 0, 0, 0), removed, 1.25)
    assert measured(weighed, at(-1, -25, -1, -1, -1), at(-2, -2, -1, -1, -3)) == pytest.approx(
        {
            "weight_mean": 0.7,
            "weight_min": 0.0,
            "weight_max": 2.0,
            "weight_std": math.sqrt(5.25 / 5 - 0.49),
            "ess": 0.49 / 1.05,
            "clip_frac": 0.4,
            "clip_frac_low": 0.2,
            "clip_frac_high": 0.2,
            "masked_token_frac": 0.4,
            "masked_seq_frac": 0.5,
            "masked_correct_frac": 1.0,
            "veto_frac": 0.5,  # of sequences
            "reject_frac": 0.2,  # of tokens
            "norm_factor": 1.25,
            "logratio_clamped_frac": 0.2,
            "kl_k3_kept": k3(2) / 3,
            "kl_k3_removed": (k3(1) + k3(-23)) / 2,
        },
        rel=1e-6,
    )


def test_what_is_off_or_what_no_token_backs_is_absent() -> None:
    plain = Weighed(torch.from_numpy(at(1, 1, 1, 1, 1)), NONE, NONE, NONE, {}, None)
    found = measured(plain, at(0, 0, 0, 0, 0), at(0, 0, 0, 0, 0))
    for key in ("kl_k3_removed", "masked_correct_frac", "norm_factor", "veto_frac", "opsm_frac"):
        assert key not in found
    nothing = plain._replace(weights=torch.from_numpy(at(0, 0, 0, 0, 0)))
    found = measured(nothing, at(0, 0, 0, 0, 0), at(0, 0, 0, 0, 0))
    assert "ess" not in found and "kl_k3_kept" not in found and found["masked_seq_frac"] == 1.0


@pytest.mark.parametrize("value", [0.0, 50.0, float("nan")])
def test_padding_changes_no_bit(random_report, padded, value: float) -> None:
    given = {"importance": {"level": "sequence", "outside": "clip", "ratio_min": 0.5, "ratio_max": 1.5}}
    correction = Correction.model_validate(given | {"veto": {"ratio_min": 0.4}, "batch_normalise": True})

    def found(report) -> dict:
        gap = Gap.of(report.batch, {**vars(report), **report.more})
        weighed = correction.weigh(gap, correction.norm(gap))
        batch = report.batch
        mask, rewards = batch.mask_NT, batch.rewards_N
        return correction_metrics(weighed, report.lp_T, batch.logprobs_rollout_NT, mask, rewards)

    made = random_report(seed=4)
    before = found(made)
    assert found(padded(made, 3, value)) == before
    assert {"correction/veto_frac", "correction/norm_factor", "correction/clip_frac_low"} <= set(before)
    assert 0 < before["correction/veto_frac"] < 1
