"""opsm: off-policy sequence masking. A bad sequence that the policy has moved away from is left alone.

The loss of sequence s is dropped if its advantage is negative and mean_t(lp_old - lp_C) > delta, where lp_old is the
rollout's log-probability, or the trainer's under the weights that sampled.
Source: DeepSeek-V3.2, arXiv 2512.02556, off-policy sequence masking. TRL reads the rollout's, slime the trainer's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from lpexp.config import Spec, rule
from lpexp.correction.gap import Gap
from lpexp.errors import Mistake

if TYPE_CHECKING:
    from torch import Tensor


class Opsm(Spec):
    name: ClassVar[str] = "opsm"
    delta: float | None = Field(gt=0)  # nat
    reference: Literal["rollout", "trainer"]

    @rule
    def _delta(self) -> Iterator[Mistake]:
        if self.delta is None:
            yield Mistake("delta", "must be set: published values differ by 5000 (slime 1e-4, TRL suggests 0.5)")

    def removes(self, gap: Gap) -> Tensor:
        """[n, 1]"""
        assert self.delta is not None
        old = gap.lp_R if self.reference == "rollout" else gap.lp_T
        return (gap.total(gap.advantages) < 0) & (gap.mean(old - gap.lp_C) > self.delta)
