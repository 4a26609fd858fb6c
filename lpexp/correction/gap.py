"""What a correction reads of some samples: the log-probabilities of the same tokens under several policies."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lpexp.data import Batch

if TYPE_CHECKING:
    from torch import Tensor


class Gap:
    """All [n, T], whole sequences: the trainer's lp_T and lp_P (under the weights that sampled, the newest), lp_R.

    lp_C (of the gradient's forward pass) and advantages are for the masks of an update only. What stands outside
    `mask` is read by nobody; a log-probability inside it that is not finite makes a weight that is not.
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
        self._later = {name: self._inside(x) for name, x in (("lp_C", lp_C), ("A", advantages)) if x is not None}

    @classmethod
    def of(cls, batch: Batch, arrays: Mapping[str, np.ndarray]) -> Gap:
        """Of a whole batch and what a trainer found: lp_T, lp_P, lp_C and, where tokens have their own, advantages."""
        import torch

        shared = np.broadcast_to(batch.advantages_N[:, None], batch.mask_NT.shape)
        named = [arrays["lp_T"], arrays["lp_P"], batch.logprobs_rollout_NT, batch.mask_NT, arrays["lp_C"]]
        return cls(*(torch.from_numpy(array.copy()) for array in (*named, arrays.get("advantages", shared))))

    def _inside(self, x: Tensor) -> Tensor:
        import torch

        return torch.where(self.mask, x.detach().float(), 0.0)

    @property
    def lp_C(self) -> Tensor:
        return self._later["lp_C"]

    @property
    def advantages(self) -> Tensor:
        return self._later["A"]

    @cached_property
    def delta(self) -> Tensor:
        """float32 log pi/mu = lp_P - lp_R, 0 outside the mask."""
        return self.lp_P - self.lp_R

    @property
    def moved(self) -> Tensor:
        """float32 u = lp_C - lp_P, 0 outside the mask: what the batch's own updates did."""
        return self.lp_C - self.lp_P

    def total(self, x: Tensor) -> Tensor:
        """[n, T], 0 outside the mask -> [n, 1]: the sum of a sequence, made in float64."""
        return x.double().sum(1, keepdim=True)

    def mean(self, x: Tensor) -> Tensor:
        """[n, T], 0 outside the mask -> [n, 1]: the mean over a sequence's valid tokens, made in float64."""
        return self.total(x) / self.mask.sum(1, keepdim=True).clamp(min=1)
