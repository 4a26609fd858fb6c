"""seq_error: a sequence is dropped when its tokens' probabilities differ too much on average, either way.

Held against the bound is the mean over its tokens of exp|lp_T - lp_R|: the numerics alone, whatever the lag.
Source: NeMo-RL, `seq_logprob_error_threshold`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from lpexp.config import Spec, rule
from lpexp.correction.gap import Gap
from lpexp.errors import Mistake

if TYPE_CHECKING:
    from torch import Tensor


class SeqError(Spec):
    """One bound for all sequences."""

    name: ClassVar[str] = "seq_error"
    error_max: float | None = Field(gt=1)  # 1 is perfect

    @rule
    def _bound(self) -> Iterator[Mistake]:
        if self.error_max is None:
            yield Mistake("error_max", "must be set: it belongs to a precision and a model; e.g. 1.05 beside bf16")

    def removes(self, gap: Gap) -> Tensor:
        """[n, 1]"""
        assert self.error_max is not None
        error = (gap.lp_T - gap.lp_R).double().abs().exp() * gap.mask
        return gap.mean(error) > self.error_max
