"""What a trainer rank of any backend does with a batch: its findings a token, the loss, what quantising cost.

Left out: how log-probabilities and gradients are computed; that is the backend's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lpexp.data import Batch, Param

if TYPE_CHECKING:
    from torch import Tensor

    from lpexp.experiment import Experiment
    from lpexp.precision import Parts, Precision


def policy_loss(
    exp: Experiment,
    part: Batch,
    found: Found,
    start: int,
    scored: tuple[Tensor, Tensor],
    lp_ref: Tensor | None,
    ahead: bool,
    num_tokens: int,
    num_samples: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch's part of the loss, from the log-probability and entropy of each of its response tokens.

    `start` is its first row in the batch; `ahead`: what held before the first update is in `found` already.
    """
    import torch

    lp_flat, entropy = scored
    device = lp_flat.device
    mask = torch.from_numpy(part.mask_NT).to(device)
    if not ahead:
        for name in ("lp_T", "lp_P"):
            found.put(name, start, lp_flat.detach())
        found.put("entropy", start, entropy)
    found.put("lp_C", start, lp_flat.detach())
    lp_C = torch.zeros(mask.shape, device=device).masked_scatter(mask, lp_flat)
    lp_old = found.get("lp_P", part, start, device)
    if lp_ref is not None:
        found.put("lp_ref", start, lp_ref)
        lp_ref = found.get("lp_ref", part, start, device)
    lp_R = torch.from_numpy(part.logprobs_rollout_NT).to(device)
    weights = exp.correction.weights(lp_old, lp_R, mask)
    found.put("weights", start, weights[mask])
    advantages = torch.from_numpy(part.advantages_N).to(device)
    return exp.algorithm.loss(
        lp_C, lp_old, lp_ref, advantages, weights, mask, num_tokens, num_samples, exp.task.max_response
    )


class Found:
    """Per-token findings of one step as [N, T] float32 arrays; each rank fills its own rows."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.arrays: dict[str, np.ndarray] = {}

    def put(self, name: str, start: int, tokens: Tensor) -> None:
        """Values of consecutive response tokens, beginning with those of row `start`."""
        array = self.arrays.setdefault(name, np.zeros(self.batch.tokens_NT.shape, np.float32))
        flat = tokens.detach().cpu().numpy()
        ends = self.batch.mask_NT[start:].sum(1).cumsum()
        stop = start + int(np.searchsorted(ends, len(flat))) + 1 if len(flat) else start
        rows = array[start:stop]
        rows[self.batch.mask_NT[start:stop]] = flat

    def get(self, name: str, part: Batch, start: int, device: Any) -> Tensor:
        import torch

        return torch.from_numpy(self.arrays[name][start : start + len(part)]).to(device)

    def mine(self, shares: list[list[tuple[int, int]]]) -> list[tuple[int, int, dict[str, np.ndarray]]]:
        """(start, stop, arrays of these rows) of every micro-batch of this rank."""
        return [
            (start, stop, {name: array[start:stop] for name, array in self.arrays.items()})
            for update in shares
            for start, stop in update
        ]


class QuantStats:
    """quant/<class>/*: how far the served weights are from the trainer's, over all tensors of a module class."""

    def __init__(self, wire: Precision):
        self.wire = wire
        self.classes: dict[str, list[tuple[int, float, dict[str, float]]]] = {}

    def add(self, param: Param, weight: Tensor, parts: Parts) -> None:
        found = (weight.numel(), float(weight.double().square().sum()), self.wire.stats(weight, parts))
        self.classes.setdefault(param.kind, []).append(found)

    def result(self) -> dict[str, dict[str, float]]:
        """Per class; what the precision does not tell of its codes or scales is absent."""
        merged = {}
        for kind, found in self.classes.items():
            sizes, told = [n for n, _, _ in found], [stats for _, _, stats in found]
            lost = sum(square * stats["rel_error"] ** 2 for _, square, stats in found)
            rel_error = (lost / sum(square for _, square, _ in found)) ** 0.5
            merged[kind] = {
                "rel_error": rel_error,
                "sqnr_db": -20 * float(np.log10(rel_error)) if rel_error else float("inf"),
            }
            for key in ("saturated_frac", "zero_block_frac"):
                if key in told[0]:
                    shares = zip(sizes, told, strict=True)
                    merged[kind][key] = sum(n * stats[key] for n, stats in shares) / sum(sizes)
            for key, extreme in (("scale_min", min), ("scale_max", max)):
                if key in told[0]:
                    merged[kind][key] = extreme(stats[key] for stats in told)
        return merged
