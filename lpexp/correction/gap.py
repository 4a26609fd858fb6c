"""What a correction reads of some samples: the log-probabilities of the same tokens under several policies."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


class Gap:
    """All [n, T], whole sequences: lp_T and lp_P of the trainer (the weights that sampled, the newest), lp_R of the rollout.

    `lp_C` (of the gradient's forward pass) and `advantages` are needed by the masks of an update only. What stands
    outside `mask` is read by nobody; a log-probability inside it that is not finite makes a weight that is not.
    """

    MOST: ClassVar[float] = 20.0  # nat: a log-ratio is held within +-20 before exp

    def __init__(
        self,
        lp_T: Tensor,
        lp_P: Tensor,
        lp_R: Tensor,
        mask: Tensor,
        lp_C: Tensor | None = None,
        advantages: Tensor | None = None,
    ):
        self.mask = mask.bool()
        self.lp_T, self.lp_P, self.lp_R = (self._inside(x) for x in (lp_T, lp_P, lp_R))
        self.lp_C = None if lp_C is None else self._inside(lp_C)
        self.advantages = None if advantages is None else self._inside(advantages)

    def _inside(self, x: Tensor) -> Tensor:
        import torch

        return torch.where(self.mask, x.detach().float(), 0.0)

    @cached_property
    def delta(self) -> Tensor:
        """float32 log pi/mu = lp_P - lp_R, 0 outside the mask."""
        return self.lp_P - self.lp_R

    def total(self, x: Tensor) -> Tensor:
        """[n, T], 0 outside the mask -> [n, 1]: the sum of a sequence, made in float64."""
        return x.double().sum(1, keepdim=True)

    def mean(self, x: Tensor) -> Tensor:
        """[n, T], 0 outside the mask -> [n, 1]: the mean over a sequence's valid tokens, made in float64."""
        return self.total(x) / self.mask.sum(1, keepdim=True).clamp(min=1)
