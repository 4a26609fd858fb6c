"""tis_token: truncated importance sampling, a token at a time: w' = min(exp(lp_trainer - lp_rollout), ratio_max).

The log-ratio is clamped to +-20 before the exponential. Left out: sequence levels, rejection, normalisation.
Source: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025), eq. TIS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from lpexp.correction import Correction

if TYPE_CHECKING:
    from torch import Tensor

LOG_RATIO_MAX = 20.0


class TisToken(Correction):
    """The ratio pi/mu of each token, cut from above; exactly 1 where both log-probabilities are the same."""

    ratio_max: float = Field(2.0, ge=1)

    def weights(self, lp_trainer: Tensor, lp_rollout: Tensor, mask: Tensor) -> Tensor:
        """[n, T] float32; 0 outside the mask."""
        ratio = _log_ratio(lp_trainer, lp_rollout, mask).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp()
        return ratio.clamp(max=self.ratio_max) * mask

    def clipped(self, lp_trainer: Tensor, lp_rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens whose weight is not the ratio: log-ratio under -20; ratio over `ratio_max`."""
        log_ratio = _log_ratio(lp_trainer, lp_rollout, mask)
        return log_ratio < -LOG_RATIO_MAX, log_ratio.clamp(max=LOG_RATIO_MAX).exp() > self.ratio_max


def _log_ratio(lp_trainer: Tensor, lp_rollout: Tensor, mask: Tensor) -> Tensor:
    """[n, T] float32, 0 outside the mask whatever stands there."""
    import torch

    return torch.where(mask, lp_trainer.detach().float() - lp_rollout.detach().float(), 0.0)
