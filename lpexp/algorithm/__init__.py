"""The agreement on an algorithm: rewards -> batch with advantages, log-probabilities -> loss.

An algorithm says how a sample is credited and what is maximised for a token; the loss, its masks, its reductions and
the penalty towards a reference are the same for all and stand here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from lpexp.config import Spec, rule
from lpexp.data import Batch, Group
from lpexp.errors import Mistake

if TYPE_CHECKING:
    from torch import Tensor

Reduction = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"]


class Clipped(NamedTuple):
    """What the bounds of an algorithm did to the tokens of some samples; bool [n, T], meant where a token is kept."""

    low: Tensor | None  # the ratio is under the lower bound; None: there is none
    high: Tensor
    binding: Tensor  # the loss is another one for it


class Algorithm(Spec):
    """Policy optimisation on groups of G samples a prompt, one or more optimiser steps a batch."""

    ABSTRACT: ClassVar[bool] = True
    samples_per_prompt: int = Field(ge=1)  # G
    updates_per_batch: int = Field(
        default=1, ge=1
    )  # optimiser steps on one batch, each on an equal share of its groups
    kl_coef: float = Field(
        default=0.0, ge=0
    )  # weight of the KL-to-reference penalty in the loss; 0: no reference is kept
    reduction: Reduction = "token_mean"

    @rule
    def _group_of_two(self) -> Iterator[Mistake]:
        if self.compares and self.samples_per_prompt < 2:
            yield Mistake(
                "samples_per_prompt",
                f"{self.samples_per_prompt} makes every advantage 0 (a group's mean is its only reward); use 2 or more",
            )

    @property
    def compares(self) -> bool:
        """Is its baseline the group, so that one sample a prompt would teach nothing?"""
        return True

    @property
    def uses_reference(self) -> bool:
        return self.kl_coef > 0

    @abstractmethod
    def advantages(self, rewards_PG: np.ndarray) -> np.ndarray:
        """float64 rewards [P, G] -> float32 advantages [P, G]."""

    @abstractmethod
    def objective(self, lp_C: Tensor, lp_old: Tensor, advantages: Tensor, kept: Tensor) -> Tensor:
        """[n, T]: what is maximised for each kept token; all four are 0 where a token is not."""

    @abstractmethod
    def clipped(self, u: Tensor, advantages: Tensor, kept: Tensor) -> Clipped:
        """Where the bounds were met, from u = lp_C - lp_old [n, T]."""

    def loss(
        self,
        lp_C: Tensor,
        lp_old: Tensor,
        lp_ref: Tensor | None,
        advantages: Tensor,
        weights: Tensor,
        mask: Tensor,
        num_tokens: int,
        num_samples: int,
        max_response: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """These samples' part of -w' objective + kl_coef k3, and its named parts.

        All [n, T]; lp_C carries the gradient. `num_tokens` and `num_samples` count the whole optimiser batch over all
        ranks, so that summing the parts gives the loss however samples are split. Positions outside `mask` and tokens
        that the correction removed (weight 0) are cut out before any arithmetic, so that neither garbage nor NaN there
        reaches the sum or the gradient. The parts, divided like the loss: "pg_loss", and "kl_penalty" if there is one.
        """
        import torch

        kept = mask & (weights != 0)
        zero = torch.zeros((), dtype=lp_C.dtype, device=lp_C.device)
        lp_C, lp_old = torch.where(kept, lp_C, zero), torch.where(kept, lp_old, zero)
        advantages = torch.where(kept, advantages.detach(), zero)
        pg = -torch.where(kept, weights.detach(), zero) * self.objective(lp_C, lp_old, advantages, kept)
        counts = (mask, num_tokens, num_samples, max_response)
        loss = self._reduce(pg, *counts)
        parts = {"pg_loss": loss.detach()}
        if self.kl_coef > 0:
            assert lp_ref is not None, "kl_coef > 0 needs the reference's log-probabilities"
            d_ref = lp_C - torch.where(kept, lp_ref, zero)
            penalty = self._reduce(self.kl_coef * (torch.exp(-d_ref) - 1 + d_ref), *counts)
            parts["kl_penalty"] = penalty.detach()
            loss = loss + penalty
        return loss, parts

    def _reduce(self, tokens: Tensor, mask: Tensor, num_tokens: int, num_samples: int, max_response: int) -> Tensor:
        """[n, T], 0 outside the mask -> its part of the whole; removed tokens still count in the denominator."""
        if self.reduction == "token_mean":
            return tokens.sum() / num_tokens
        if self.reduction == "seq_mean_token_mean":
            return (tokens.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / num_samples
        return tokens.sum() / (num_samples * (max_response if self.reduction == "constant" else 1))

    def batch(self, groups: Sequence[Group], step: int) -> Batch:
        """Scored groups -> one right-padded Batch, group-major."""
        samples = [(group.prompt, sample) for group in groups for sample in group.samples]
        width = max(len(prompt.tokens) + len(sample.tokens_T) for prompt, sample in samples)
        shape = (len(samples), width)
        tokens, mask, logprobs = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, np.float32)
        recorded = samples[0][1].experts
        experts = None if recorded is None else np.full((shape[0], width - 1, *recorded.shape[1:]), -1, np.int16)
        for row, (prompt, sample) in enumerate(samples):
            start, stop = len(prompt.tokens), len(prompt.tokens) + len(sample.tokens_T)
            tokens[row, :start], tokens[row, start:stop] = prompt.tokens, sample.tokens_T
            mask[row, start:stop], logprobs[row, start:stop] = True, sample.logprobs_T
            if experts is not None and sample.experts is not None:
                experts[row, : stop - 1] = sample.experts
        rewards_PG = np.stack([group.rewards_G for group in groups])  # type: ignore[type-var]
        return Batch(
            step=step,
            tokens_NT=tokens,
            mask_NT=mask,
            logprobs_rollout_NT=logprobs,
            advantages_N=self.advantages(rewards_PG).astype(np.float32).reshape(-1),
            rewards_N=rewards_PG.reshape(-1),
            lengths_N=np.array([len(p.tokens) + len(s.tokens_T) for p, s in samples], np.int32),
            prompt_lengths_N=np.array([len(p.tokens) for p, _ in samples], np.int32),
            versions_N=np.array([s.version for _, s in samples], np.int32),
            prompt_ids_N=np.array([p.id for p, _ in samples], np.int64),
            sample_index_N=np.array([s.index for _, s in samples], np.int32),
            group_size=rewards_PG.shape[1],
            experts=experts,
        )


def centred(rewards_PG: np.ndarray) -> np.ndarray:
    """float64 reward minus the mean of its group; exactly 0 in a group of equal rewards, whose mean may round off."""
    equal = (rewards_PG == rewards_PG[:, :1]).all(axis=1, keepdims=True)
    return np.where(equal, 0.0, rewards_PG - rewards_PG.mean(axis=1, keepdims=True))
