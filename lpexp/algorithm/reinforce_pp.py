"""REINFORCE++: no critic; the return of a token is whitened over the whole batch instead of over its group.

`baseline=none`: rewards are -beta k_t and, at the last token, the answer's; a token's return is the discounted sum of
what follows. `baseline=group`: A_t = (r - mean of the group) - beta k_t. Both are whitened, then PPO's loss.
Source: arXiv 2501.03262, eq. 6 to 8 and sec. 3.3 (the baseline); the group's per-token charge is slime's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np

from lpexp.algorithm import centred
from lpexp.algorithm.credit import Scored, TokenCredit, discounted
from lpexp.config import rule
from lpexp.errors import Mistake

if TYPE_CHECKING:
    from torch import Tensor


class ReinforcePP(TokenCredit):
    baseline: Literal["none", "group"]

    @property
    def compares(self) -> bool:
        return self.baseline == "group"

    @rule
    def _discount(self) -> Iterator[Mistake]:
        if self.baseline == "group" and self.gamma != 1:
            yield Mistake(
                "gamma", f"{self.gamma} is read by nobody: baseline=group credits all tokens alike; type gamma=1"
            )

    def advantages(self, rewards_PG: np.ndarray) -> np.ndarray:
        return (centred(rewards_PG) if self.baseline == "group" else rewards_PG).astype(np.float32)

    def credit(self, scores: Tensor, scored: Scored) -> Tensor:
        import torch

        if self.baseline == "group":
            return torch.where(scored.mask, scores[:, None], 0.0) - self.charge(scored)
        return discounted(self.rewards(scores, scored), scored.mask, self.gamma)
