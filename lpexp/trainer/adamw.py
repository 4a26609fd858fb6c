"""AdamW on one flat float32 vector, in place: torch's own single-tensor rule.

Source: arXiv 1711.05101, algorithm 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Moments(NamedTuple):
    """Running means of the gradient and of its square, each as long as the vector."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


def adamw(
    flat: Tensor,
    gradient: Tensor,
    moments: Moments,
    updates: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> None:
    """Update number `updates` (0 is the first) of `flat`, and of its moments."""
    import torch
    from torch.optim import _functional

    steps = torch.tensor(float(updates))  # the rule counts it up by one
    _functional.adamw(
        [flat], [gradient], [moments.exp_avg], [moments.exp_avg_sq], [], [steps],
        fused=True, foreach=False, amsgrad=False, beta1=betas[0], beta2=betas[1], lr=lr, weight_decay=weight_decay,
        eps=eps, maximize=False,
    )  # fmt: skip
