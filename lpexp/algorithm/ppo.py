"""PPO: a critic values each state; advantages are generalised advantage estimates, whitened over the batch.

The critic is a value head on the policy's last hidden states, through which no gradient flows back, so that it does not
touch the policy; it has an optimiser of its own. Left out: a critic with layers of its own.
Source: arXiv 1707.06347, eq. 7 and 9; GAE: arXiv 1506.02438, eq. 16; the clipped value loss and whitening are those of
PPO's first implementation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from lpexp.algorithm.credit import Scored, TokenCredit, discounted

if TYPE_CHECKING:
    from torch import Tensor


class Ppo(TokenCredit):
    gae_lambda: float = Field(1.0, ge=0, le=1)
    critic_lr: float = Field(gt=0)
    value_clip: float = Field(0.2, gt=0)  # how far an update on a batch may move a value, in units of the reward

    @property
    def compares(self) -> bool:
        return False

    def advantages(self, rewards_PG: np.ndarray) -> np.ndarray:
        """The rewards themselves; what a token is credited with is known once the critic has seen the batch."""
        return rewards_PG.astype(np.float32)

    def credit(self, scores: Tensor, scored: Scored) -> Tensor:
        """delta_t = r_t + gamma V_{t+1} - V_t, 0 after the end; A_t = sum_l (gamma lambda)^l delta_{t+l}."""
        import torch

        assert scored.values is not None
        mask = scored.mask
        values = torch.where(mask, scored.values, 0.0)
        after = torch.cat((values[:, 1:], torch.zeros_like(values[:, :1])), 1)
        delta = torch.where(mask, self.rewards(scores, scored) + self.gamma * after - values, 0.0)
        return discounted(delta, mask, self.gamma * self.gae_lambda)

    def value_loss(self, values: Tensor, before: Tensor, returns: Tensor) -> Tensor:
        """Half the squared error of each token's value, or of the value held near that before the update, if larger."""
        import torch

        held = before + (values - before).clamp(-self.value_clip, self.value_clip)
        return torch.maximum((values - returns).square(), (held - returns).square()) / 2
