"""The agreement on an algorithm: rewards -> batch with advantages, log-probabilities -> loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from lpexp.config import Spec
from lpexp.data import Batch, Group

if TYPE_CHECKING:
    from torch import Tensor


class Algorithm(Spec):
    """Group-based policy optimisation: G samples a prompt, one or more optimiser steps a batch."""

    ABSTRACT: ClassVar[bool] = True
    samples_per_prompt: int = Field(ge=1)  # G
    updates_per_batch: int = Field(
        default=1, ge=1
    )  # optimiser steps on one batch, each on an equal share of its groups
    kl_coef: float = Field(
        default=0.0, ge=0
    )  # weight of the KL-to-reference penalty in the loss; 0: no reference is kept

    @abstractmethod
    def advantages(self, rewards_PG: np.ndarray) -> np.ndarray:
        """float64 rewards [P, G] -> float32 advantages [P, G]."""

    @abstractmethod
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
        """The part of the global loss that these samples contribute, and its named sums.

        All [n, T] (advantages [n]); lp_C carries the gradient. `num_tokens` and `num_samples` count the whole
        optimiser batch over all ranks, so that summing the parts gives the loss however samples are split.
        The dict holds sums over tokens: "pg_loss" and, with a reference, "kl_penalty" (already divided like the loss).
        """

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
