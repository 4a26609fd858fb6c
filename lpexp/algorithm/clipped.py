"""The clipped surrogate: min(r A, clip(r, 1 - low, 1 + high) A), where r is the ratio that an algorithm compares.

Source: PPO, arXiv 1707.06347, eq. 7; two bounds: DAPO, arXiv 2503.14476, eq. 8. Left out: dual clip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from lpexp.algorithm import Algorithm, Clipped

if TYPE_CHECKING:
    from torch import Tensor


class ClippedSurrogate(Algorithm):
    """`ratio`: of each token, unless the algorithm compares whole sequences."""

    ABSTRACT: ClassVar[bool] = True
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.28, gt=0)

    def log_ratio(self, u: Tensor, kept: Tensor) -> Tensor:
        """u = lp_C - lp_old [n, T], 0 where a token is not kept -> the log of the ratio that is clipped, [n, T]."""
        return u

    def objective(self, lp_C: Tensor, lp_old: Tensor, advantages: Tensor, kept: Tensor) -> Tensor:
        import torch

        ratio = torch.exp(self.log_ratio(lp_C - lp_old, kept))
        held = torch.clamp(ratio, 1 - self.clip_low, 1 + self.clip_high)
        return torch.minimum(ratio * advantages, held * advantages)

    def clipped(self, u: Tensor, advantages: Tensor, kept: Tensor) -> Clipped:
        import torch

        ratio = self.log_ratio(torch.where(kept, u, 0.0), kept).exp()
        low, high = ratio < 1 - self.clip_low, ratio > 1 + self.clip_high
        return Clipped(low, high, (high & (advantages > 0)) | (low & (advantages < 0)))


def sequence_sum(u: Tensor, kept: Tensor) -> Tensor:
    """[n, T], 0 where a token is not kept -> the sum of its sequence at each token."""
    return u.sum(1, keepdim=True).expand(u.shape)


def sequence_mean(u: Tensor, kept: Tensor) -> Tensor:
    """[n, T], 0 where a token is not kept -> the mean over the kept tokens of its sequence at each token."""
    return sequence_sum(u, kept) / kept.sum(1, keepdim=True).clamp(min=1)
