"""Counter-based sampling: the random number of a token is a function of (seed, step, prompt, sample, position).

So a result depends neither on batch composition nor on order, retries, the number of engines or a restart.
Philox4x32-10 from "Parallel random numbers: as easy as 1, 2, 3" (Salmon et al., SC11); known answers in the tests.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lpexp import kernels

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10: counter uint32-valued [N, 4], key two 32-bit words -> uint64-held 32-bit words [N, 4]."""
    c0, c1, c2, c3 = counter.astype(np.uint64).T
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), 1)


def _product(a: np.ndarray, b: np.uint64) -> tuple[np.ndarray, np.ndarray]:
    whole = a * b  # 32 x 32 bits fit into 64
    return whole >> _HALF, whole & _LOW


def uniforms(seed: int, step: int, prompt_ids: np.ndarray, samples: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float64 in (0, 1), one a row; prompt ids below 2**32, all other coordinates below 2**32 too."""
    counter = np.stack(np.broadcast_arrays(np.uint64(step), prompt_ids, samples, positions), 1)
    words = philox(counter, (seed & 0xFFFFFFFF, 0))
    return ((words[:, 0] << np.uint64(21)) + (words[:, 1] >> np.uint64(11))).astype(np.float64) * 2.0**-53 + 2.0**-54


def draw(logits_NV: Tensor, u_N: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Token ids [N]: the first whose cumulative probability (float64, index order) reaches u; temperature 0 is greedy.

    top_k keeps the k most probable tokens, top_p then the smallest set whose probability reaches it; ties go to
    the lower id.
    """
    if temperature == 0:
        return logits_NV.argmax(-1)
    if not (logits_NV.is_cuda or top_k or top_p < 1):
        drawn = torch.empty(len(logits_NV), dtype=torch.int64)
        kernels.draw(logits_NV.contiguous().numpy(), u_N.numpy(), temperature, drawn.numpy())
        return drawn
    probs = torch.softmax(logits_NV.double() / temperature, -1)
    if top_k or top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True, stable=True)
        keep = torch.ones_like(ranked, dtype=torch.bool)
        if top_k:
            keep[:, top_k:] = False
        if top_p < 1:
            kept = ranked * keep.double()
            before = kept.cumsum(-1) - kept
            keep &= before < top_p * kept.sum(-1, keepdim=True)
        probs = probs * torch.zeros_like(keep).scatter(-1, order, keep).double()
    cdf = probs.cumsum(-1)
    return (cdf < u_N[:, None] * cdf[:, -1:]).sum(-1).clamp_max(logits_NV.shape[-1] - 1)
