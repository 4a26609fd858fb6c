"""The loss of samples that are small enough to compute by hand."""

from __future__ import annotations

from typing import Any

import torch

from lpexp.algorithm import Algorithm


def loss_of(
    algorithm: Algorithm,
    ratio: Any,
    advantages: Any,
    weights: Any = None,
    mask: Any = None,
    ref: Any = None,
    max_response: int | None = None,
) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """(loss, its parts, gradient by lp_C) of [n, T] ratios pi/pi_old, with the denominators of exactly these samples.

    lp_C is the logarithm of the ratio, so the gradient by it is the ratio times that by the ratio. Advantages are one a
    sample, or one a token.
    """
    lp_C = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
    mask = torch.ones_like(lp_C, dtype=torch.bool) if mask is None else torch.tensor(mask)
    credit = torch.tensor(advantages, dtype=torch.float64)
    loss, parts = algorithm.loss(
        lp_C,
        torch.zeros_like(lp_C),
        None if ref is None else torch.tensor(ref, dtype=torch.float64),
        credit[:, None].expand(lp_C.shape) if credit.dim() == 1 else credit,
        torch.ones_like(lp_C) if weights is None else torch.tensor(weights, dtype=torch.float64),
        mask,
        num_tokens=int(mask.sum()),
        num_samples=len(mask),
        max_response=mask.shape[1] if max_response is None else max_response,
    )
    loss.backward()
    assert lp_C.grad is not None
    return loss.item(), parts, lp_C.grad
