"""Importance weights: the ratio pi/mu of a token, or of its sequence, held within bounds.

`level`: token exp(delta_t); sequence exp(sum_t delta_t); geometric exp(mean_t delta_t), the same for all its tokens.
`outside` the bounds: truncate cuts from above, clip from both sides, mask removes (IcePop at token level, masked
importance sampling at sequence level).
Source: Yao et al., "Your efficient RL framework secretly brings you off-policy RL training" (2025), TIS; Liu, Li et
al., "When speed kills stability" (2025), sequence and geometric levels, masking; IcePop: Ring team (2025).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lpexp.config import Spec, rule
from lpexp.correction.gap import Gap
from lpexp.errors import Mistake

if TYPE_CHECKING:
    from lpexp.correction import Weighed


class Importance(Spec):
    """The weight of a token; exactly 1 where both log-probabilities are the same."""

    level: Literal["token", "sequence", "geometric"]
    outside: Literal["truncate", "clip", "mask"]
    ratio_min: float | None = Field(gt=0, le=1)  # null with truncate, which has no lower bound
    ratio_max: float = Field(ge=1)

    @rule
    def _bounds(self) -> Iterator[Mistake]:
        if self.outside == "truncate" and self.ratio_min is not None:
            way = "type ratio_min=null, or outside=clip"
            yield Mistake(
                "ratio_min", f"{self.ratio_min} is read by nobody: outside=truncate only cuts from above; {way}"
            )
        if self.outside != "truncate" and self.ratio_min is None:
            way = "type a ratio between 0 and 1, e.g. 0.5, or outside=truncate"
            yield Mistake("ratio_min", f"is null, so outside={self.outside} would have no lower bound; {way}")

    @property
    def name(self) -> str:
        masks = self.outside == "mask"
        return "icepop" if masks and self.level == "token" else f"{'mis' if masks else 'tis'}_{self.level}"

    def weigh(self, gap: Gap) -> Weighed:
        """[n, T] float32, 0 outside the mask."""
        import torch

        from lpexp.correction import Weighed

        log_ratio = {"token": lambda x: x, "sequence": gap.total, "geometric": gap.mean}[self.level](gap.delta)
        log_ratio = log_ratio.float().expand(gap.mask.shape)
        ratio = log_ratio.clamp(-gap.MOST, gap.MOST).exp()
        clamped = (log_ratio.abs() > gap.MOST) & gap.mask
        under, over = ratio < (self.ratio_min or 0.0), ratio > self.ratio_max
        none = torch.zeros_like(gap.mask)
        if self.outside == "mask":
            removed = (under | over) & gap.mask
            return Weighed(torch.where(removed, 0.0, ratio) * gap.mask, none, none, clamped, {"outside": removed}, None)
        weights = ratio.clamp(self.ratio_min, self.ratio_max) * gap.mask
        low = (under | (log_ratio < -gap.MOST)) & gap.mask
        high = (over | (log_ratio > gap.MOST)) & gap.mask
        return Weighed(weights, low, high, clamped, {}, None)
