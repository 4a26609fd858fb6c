"""dppo: a token is dropped once its probability has moved far enough the way that its advantage asks for.

Dropped if exp(lp_C) - exp(lp_R) > prob_up and A > 0, or < -prob_down and A < 0: in probability, not in ratio, so rare
tokens are not singled out.
Source: prime-rl's DPPO masking.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from lpexp.config import Spec
from lpexp.correction.gap import Gap

if TYPE_CHECKING:
    from torch import Tensor


class Dppo(Spec):
    name: ClassVar[str] = "dppo"
    prob_up: float = Field(gt=0, le=1)
    prob_down: float = Field(gt=0, le=1)

    def removes(self, gap: Gap) -> Tensor:
        """[n, T]"""
        moved = gap.lp_C.double().exp() - gap.lp_R.double().exp()
        return ((moved > self.prob_up) & (gap.advantages > 0)) | ((moved < -self.prob_down) & (gap.advantages < 0))
