"""RLOO: the baseline of a sample is the mean reward of the other samples of its prompt; an answer is one action.

The ratio is that of the whole answer, exp(sum_t (lp_C - lp_old)), clipped as in PPO for later updates on a batch; at
the first one it is 1, and the gradient is A times that of the answer's log-probability.
Source: "Back to Basics", arXiv 2402.14740, eq. 8; the clipped ratio is TRL's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from lpexp.algorithm import centred
from lpexp.algorithm.clipped import ClippedSurrogate, sequence_sum

if TYPE_CHECKING:
    from torch import Tensor


class Rloo(ClippedSurrogate):
    """REINFORCE with a leave-one-out baseline."""

    reduction: Literal["seq_mean_token_mean"] = "seq_mean_token_mean"

    def advantages(self, rewards_PG: np.ndarray) -> np.ndarray:
        """A = r - mean of the other G - 1 = G / (G - 1) (r - mean of the group)."""
        size = rewards_PG.shape[1]
        return (centred(rewards_PG) * (size / (size - 1))).astype(np.float32)

    def log_ratio(self, u: Tensor, kept: Tensor) -> Tensor:
        return sequence_sum(u, kept)
