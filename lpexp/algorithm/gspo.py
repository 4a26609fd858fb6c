"""GSPO: the ratio of a whole answer, taken to the power of one over its length, is compared and clipped.

r_s = exp(mean_t (lp_C - lp_old)), the same for all tokens of s; a token that the correction removed is in no mean. The
answers' losses are averaged, and an answer's correction weights with them.
Source: arXiv 2507.18071, eq. 5 and 7; its bounds: sec. 5.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lpexp.algorithm.clipped import sequence_mean
from lpexp.algorithm.grpo import Grpo

if TYPE_CHECKING:
    from torch import Tensor


class Gspo(Grpo):
    """Advantages as in GRPO; bounds are narrow, because a mean over an answer moves little."""

    reduction: Literal["seq_mean_token_mean"] = "seq_mean_token_mean"

    def log_ratio(self, u: Tensor, kept: Tensor) -> Tensor:
        return sequence_mean(u, kept)
