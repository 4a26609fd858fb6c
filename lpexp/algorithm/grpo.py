"""GRPO: the advantage is the reward minus its group's mean; no critic.

The loss is PPO's clipped ratio with asymmetric bounds, weighted by the correction, plus an optional k3 penalty towards
a reference. Left out: other KL estimators.
Source: DeepSeekMath, arXiv 2402.03300, eq. 3 and sec. 4.1.2; asymmetric clipping and token mean: DAPO, arXiv
2503.14476, eq. 8.
"""

from __future__ import annotations

import numpy as np

from lpexp.algorithm import centred
from lpexp.algorithm.clipped import ClippedSurrogate

STD_EPS = 1e-6


class Grpo(ClippedSurrogate):
    """Group-relative policy optimisation."""

    std_norm: bool = False  # divide by the group's unbiased standard deviation + 1e-6

    def advantages(self, rewards_PG: np.ndarray) -> np.ndarray:
        return group_relative(rewards_PG, self.std_norm)


def group_relative(rewards_PG: np.ndarray, std_norm: bool) -> np.ndarray:
    """A = r - mean of the group [/ (std + 1e-6)]; exactly 0 in a group of equal rewards."""
    found = centred(rewards_PG)
    if std_norm:
        found = found / (rewards_PG.std(axis=1, ddof=1, keepdims=True) + STD_EPS)
    return found.astype(np.float32)
