"""veto: a sequence is dropped for one token that the trainer finds next to impossible (or, if asked, far too likely).

Source: the train/infer mismatch example of slime and miles, `catastrophic` tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from lpexp.config import Spec
from lpexp.correction.gap import Gap

if TYPE_CHECKING:
    from torch import Tensor


class Veto(Spec):
    """Bounds on the ratio pi/mu of every token of a sequence."""

    name: ClassVar[str] = "veto"
    ratio_min: float = Field(gt=0, lt=1)
    ratio_max: float | None = Field(None, gt=1)  # null: no upper bound

    def removes(self, gap: Gap) -> Tensor:
        """[n, 1]"""
        ratio = gap.delta.double().exp()
        wrong = ratio < self.ratio_min
        if self.ratio_max is not None:
            wrong = wrong | (ratio > self.ratio_max)
        return (wrong & gap.mask).any(1, keepdim=True)
