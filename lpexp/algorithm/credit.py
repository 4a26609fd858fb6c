"""Credit for single tokens: what an answer was worth, told back to each of its tokens and whitened over the batch.

It needs every token of the batch scored before the first update: by the policy, by a reference where the reward is
charged for leaving it, by a critic where there is one. The trainer does that and calls `credit`, then `whiten`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import Field

from lpexp.algorithm.clipped import ClippedSurrogate

if TYPE_CHECKING:
    from torch import Tensor

VAR_EPS = 1e-8


class Scored(NamedTuple):
    """Some samples before the first update; float32 [n, T], read inside `mask` only."""

    mask: Tensor
    lp_P: Tensor
    lp_ref: Tensor | None
    values: Tensor | None  # the critic's value of the state before each token


class TokenCredit(ClippedSurrogate):
    """An algorithm whose advantages differ from token to token."""

    ABSTRACT: ClassVar[bool] = True
    kl_reward_coef: float = Field(
        0.0, ge=0
    )  # beta: each token's reward is charged beta (lp_P - lp_ref); 0: no reference
    gamma: float = Field(1.0, gt=0, le=1)  # discount of a token

    @property
    def uses_reference(self) -> bool:
        return self.kl_coef > 0 or self.kl_reward_coef > 0

    @abstractmethod
    def credit(self, scores: Tensor, scored: Scored) -> Tensor:
        """[n] what `advantages` gave each sample -> [n, T] advantages before whitening, 0 outside the mask."""

    def charge(self, scored: Scored) -> Tensor:
        """[n, T] beta (lp_P - lp_ref), 0 outside the mask: what leaving the reference costs."""
        import torch

        if self.kl_reward_coef == 0:
            return torch.zeros_like(scored.lp_P)
        assert scored.lp_ref is not None
        return torch.where(scored.mask, self.kl_reward_coef * (scored.lp_P - scored.lp_ref), 0.0)

    def rewards(self, scores: Tensor, scored: Scored) -> Tensor:
        """[n, T]: a token's charge, and the score at the last valid token."""
        import torch

        last = scored.mask & (scored.mask.flip(1).cumsum(1).flip(1) == 1)
        return torch.where(last, scores[:, None].to(scored.lp_P.dtype), 0.0) - self.charge(scored)


def discounted(x: Tensor, mask: Tensor, discount: float) -> Tensor:
    """[n, T] -> sum over the later tokens of the sequence, itself included, each times discount to its distance."""
    import torch

    found, after = torch.zeros_like(x), torch.zeros_like(x[:, 0])
    for t in reversed(range(x.shape[1])):
        after = torch.where(mask[:, t], x[:, t] + discount * after, after)
        found[:, t] = torch.where(mask[:, t], after, 0.0)
    return found


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """float64 [3]: count, sum and sum of squares over the mask; those of parts add up to those of the whole."""
    import torch

    inside = x[mask].double()
    return torch.stack([mask.sum().double(), inside.sum(), inside.square().sum()])


def whiten(x: Tensor, mask: Tensor, whole: Tensor) -> Tensor:
    """Less the mean, over the population's standard deviation, of the whole batch's `moments`; 0 outside the mask."""
    import torch

    mean = whole[1] / whole[0]
    var = (whole[2] / whole[0] - mean.square()).clamp(min=VAR_EPS)
    return torch.where(mask, ((x - mean) * var.rsqrt()).to(x.dtype), 0.0)
