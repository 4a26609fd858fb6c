"""The agreement on a correction: how the loss weighs a token whose rollout probability differs from the trainer's.

Every bound in the product is on pi/mu = exp(lp_T - lp_R). Diagnostics never depend on a correction.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from lpexp.config import Spec

if TYPE_CHECKING:
    from torch import Tensor


class Correction(Spec):
    """One way to weigh tokens; the weights are constants for the gradient."""

    ABSTRACT: ClassVar[bool] = True
    name: str

    @abstractmethod
    def weights(self, lp_trainer: Tensor, lp_rollout: Tensor, mask: Tensor) -> Tensor:
        """[n, T] weights w' >= 0 (0: the token is removed), float32; anything outside `mask` is 0.

        `lp_trainer` is lp_P: the newest weights before the first optimiser step, equal to lp_T when lag is 0.
        """

    def clipped(self, lp_trainer: Tensor, lp_rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Masks [n, T] of the tokens whose weight was cut from below and from above."""
        import torch

        none = torch.zeros_like(mask)
        return none, none
