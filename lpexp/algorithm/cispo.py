"""CISPO: the ratio is cut as a weight, not clipped inside the loss, so that every token keeps its gradient.

Maximised is sg(min(r, 1 + clip_high)) A lp_C, where sg stops the gradient. Left out: a lower bound on the ratio, which
the source switches off too.
Source: MiniMax-M1, arXiv 2506.13585, eq. 4 and 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from lpexp.algorithm import Algorithm, Clipped
from lpexp.algorithm.grpo import group_relative

if TYPE_CHECKING:
    from torch import Tensor


class Cispo(Algorithm):
    """Advantages as in GRPO."""

    clip_high: float = Field(4.0, gt=0)
    std_norm: bool = True

    def advantages(self, rewards_PG: np.ndarray) -> np.ndarray:
        return group_relative(rewards_PG, self.std_norm)

    def objective(self, lp_C: Tensor, lp_old: Tensor, advantages: Tensor, kept: Tensor) -> Tensor:
        ratio = (lp_C - lp_old).detach().exp().clamp(max=1 + self.clip_high)
        return ratio * advantages * lp_C

    def clipped(self, u: Tensor, advantages: Tensor, kept: Tensor) -> Clipped:
        high = u.exp() > 1 + self.clip_high
        return Clipped(None, high, high)
