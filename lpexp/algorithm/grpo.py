"""GRPO: the advantage is the reward minus its group's mean; no critic.

The loss is PPO's clipped ratio with asymmetric bounds, weighted by the correction, plus an optional k3 penalty towards
a reference. Left out: dual clip, other KL estimators, other reductions.
Source: DeepSeekMath, arXiv 2402.03300, eq. 3; asymmetric clipping and token mean: DAPO, arXiv 2503.14476;
without `std_norm`: Dr. GRPO, arXiv 2503.20783.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from lpexp.algorithm import Algorithm
from lpexp.config import rule
from lpexp.errors import Mistake

if TYPE_CHECKING:
    from torch import Tensor

STD_EPS = 1e-6


class Grpo(Algorithm):
    """Group-relative policy optimisation."""

    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.28, gt=0)
    std_norm: bool = False  # divide by the group's unbiased standard deviation + 1e-6
    reduction: Literal["token_mean", "seq_mean_token_mean"] = "token_mean"

    @rule
    def _group_of_two(self) -> Iterator[Mistake]:
        if self.samples_per_prompt < 2:
            yield Mistake(
                "samples_per_prompt",
                f"{self.samples_per_prompt} makes every advantage 0 (a group's mean is its only reward); use 2 or more",
            )

    def advantages(self, rewards_PG: np.ndarray) -> np.ndarray:
        """A = r - mean of the group [/ (std + 1e-6)]; exactly 0 in a group of equal rewards."""
        centred = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
        if self.std_norm:
            centred = centred / (rewards_PG.std(axis=1, ddof=1, keepdims=True) + STD_EPS)
        equal = (rewards_PG == rewards_PG[:, :1]).all(axis=1, keepdims=True)  # a mean of equal numbers may round off
        return np.where(equal, 0.0, centred).astype(np.float32)

    def loss(
        self,
        lp_C: Tensor,
        lp_old: Tensor,
        lp_ref: Tensor | None,
        advantages: Tensor,
        weights: Tensor,
        mask: Tensor,
        num_tokens: int,
        num_samples: int,
        max_response: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """These samples' part of -w min(r A, clip(r, 1 - low, 1 + high) A) + kl_coef k3, r = exp(lp_C - lp_old).

        Positions outside `mask` and tokens that the correction removed (weight 0) are cut out before any arithmetic,
        so that neither garbage nor NaN there reaches the sum or the gradient.
        """
        import torch

        kept = mask & (weights != 0)
        zero = torch.zeros((), dtype=lp_C.dtype, device=lp_C.device)
        lp_C = torch.where(kept, lp_C, zero)
        ratio = torch.exp(lp_C - torch.where(kept, lp_old, zero))
        advantage = torch.where(kept, advantages.detach()[:, None], zero)
        clipped = torch.clamp(ratio, 1 - self.clip_low, 1 + self.clip_high)
        pg = -torch.where(kept, weights.detach(), zero) * torch.minimum(ratio * advantage, clipped * advantage)
        loss = self._reduce(pg, mask, num_tokens, num_samples)
        sums = {"pg_loss": loss.detach()}
        if self.kl_coef > 0:
            assert lp_ref is not None, "kl_coef > 0 needs the reference's log-probabilities"
            d_ref = lp_C - torch.where(kept, lp_ref, zero)
            penalty = self._reduce(self.kl_coef * (torch.exp(-d_ref) - 1 + d_ref), mask, num_tokens, num_samples)
            sums["kl_penalty"] = penalty.detach()
            loss = loss + penalty
        return loss, sums

    def _reduce(self, tokens: Tensor, mask: Tensor, num_tokens: int, num_samples: int) -> Tensor:
        """[n, T], 0 outside the mask -> its part of the global mean; removed tokens still count in the denominator."""
        if self.reduction == "token_mean":
            return tokens.sum() / num_tokens
        return (tokens.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / num_samples
