"""none: every response token weighs 1, whatever the mismatch. What a run shows without any correction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lpexp.correction import Correction

if TYPE_CHECKING:
    from torch import Tensor


class NoCorrection(Correction):
    """Weight 1 inside the mask, 0 outside."""

    def weights(self, lp_trainer: Tensor, lp_rollout: Tensor, mask: Tensor) -> Tensor:
        return mask.float()
