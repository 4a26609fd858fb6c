"""Rejection: tokens or sequences are dropped by an estimate of how far the trainer is from the rollout.

k1: delta, held against two bounds on the ratio exp(k1); k2: delta^2 / 2 and k3: exp(delta) - 1 - delta, never negative,
held against one bound. `at` says what is compared: each token, or the sum, mean or maximum over a sequence, which then
stays or goes as a whole.
Source: verl's rollout rejection sampling; estimators: Schulman, "Approximating KL divergence" (2020).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lpexp.config import Spec, rule
from lpexp.correction.gap import Gap
from lpexp.errors import Mistake

if TYPE_CHECKING:
    from torch import Tensor


class Rejection(Spec):
    """k1 reads `ratio_min` and `ratio_max`, k2 and k3 read `kl_max`; what is not read must be null."""

    estimator: Literal["k1", "k2", "k3"]
    at: Literal["token", "seq_sum", "seq_mean", "seq_max"]
    ratio_min: float | None = Field(gt=0, le=1)
    ratio_max: float | None = Field(ge=1)
    kl_max: float | None = Field(gt=0)  # nat

    @rule
    def _bounds(self) -> Iterator[Mistake]:
        read = ("ratio_min", "ratio_max") if self.estimator == "k1" else ("kl_max",)
        why = {
            "ratio_min": "0.5",
            "ratio_max": "2.0",
            "kl_max": "0.01 for k3 at seq_mean; published values span 0.01 to 2",
        }
        for key, example in why.items():
            value = getattr(self, key)
            if key in read and value is None:
                yield Mistake(key, f"must be set: {self.estimator} is held against it; e.g. {example}")
            if key not in read and value is not None:
                yield Mistake(
                    key, f"{value} is read by nobody: {self.estimator} is held against {' and '.join(read)}; type null"
                )

    @rule
    def _signed(self) -> Iterator[Mistake]:
        if self.estimator == "k1" and self.at == "seq_max":
            yield Mistake(
                "at", "seq_max of k1 would see one sign only; use token, seq_sum or seq_mean, or estimator=k3"
            )

    @property
    def name(self) -> str:
        return f"reject_{self.estimator}"

    def removes(self, gap: Gap) -> Tensor:
        """[n, T] at token level, else [n, 1]."""
        import torch

        delta = gap.delta.double()
        x = {"k1": delta, "k2": delta.square() / 2, "k3": torch.expm1(delta) - delta}[self.estimator]
        if self.at == "seq_max":
            x = x.amax(1, keepdim=True)
        elif self.at != "token":
            x = gap.total(x) if self.at == "seq_sum" else gap.mean(x)
        if self.estimator != "k1":
            assert self.kl_max is not None
            return x > self.kl_max
        assert self.ratio_min is not None and self.ratio_max is not None
        ratio = x.clamp(-gap.MOST, gap.MOST).exp()
        return (ratio < self.ratio_min) | (ratio > self.ratio_max)
