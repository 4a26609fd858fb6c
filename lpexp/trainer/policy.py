"""What a trainer does with the log-probabilities of a batch, whatever computes them: credit, weights, loss.

`foresee` and `settle` are for what needs the whole batch before its first update: credit for single tokens, and
weights that are divided by their mean. `policy_loss` is each micro-batch's part of the loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lpexp.algorithm.credit import Scored, TokenCredit, moments, whiten
from lpexp.correction import Gap
from lpexp.data import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from lpexp.experiment import Experiment
    from lpexp.trainer.embedded import Found


def needs_whole_batch(exp: Experiment) -> bool:
    """Has every token of a batch to be scored before its first update?"""
    return isinstance(exp.algorithm, TokenCredit) or exp.correction.batch_normalise


def foresee(exp: Experiment, part: Batch, found: Found, start: int, device: Any) -> Tensor:
    """Credit the tokens of a micro-batch that was scored; float64 [4]: what `settle` needs the sums of.

    Tokens, advantages before whitening, their squares, and correction weights before normalisation.
    """
    import torch

    mask = torch.from_numpy(part.mask_NT).to(device)
    if isinstance(exp.algorithm, TokenCredit):
        lp_P, lp_ref, values = (found.get(name, part, start, device) for name in ("lp_P", "lp_ref", "values"))
        assert lp_P is not None
        scores = torch.from_numpy(part.advantages_N).to(device)
        advantages = exp.algorithm.credit(scores, Scored(mask, lp_P, lp_ref, values))
        found.put("advantages", start, advantages[mask])
        if values is not None:
            found.put("returns", start, (advantages + values)[mask])
    else:
        advantages = _per_sample(part, mask)
    weights = exp.correction.before(_gap(part, found, start, mask)).weights
    return torch.cat((moments(advantages, mask), weights.double().sum()[None]))


def settle(exp: Experiment, found: Found, whole: Tensor) -> None:
    """With the sums over the whole batch: whiten the advantages, and keep what the weights are divided by."""
    import torch

    if isinstance(exp.algorithm, TokenCredit):
        raw, mask = torch.from_numpy(found.arrays["advantages"]), torch.from_numpy(found.batch.mask_NT)
        found.arrays["advantages"] = whiten(raw, mask, whole[:3].cpu()).numpy()
    if exp.correction.batch_normalise:
        found.norm = exp.correction.divisor(whole[3], whole[0])


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
            found.put(name, start, lp_flat)
        found.put("entropy", start, entropy)
    found.put("lp_C", start, lp_flat)
    if lp_ref is not None:
        found.put("lp_ref", start, lp_ref)
    advantages = found.get("advantages", part, start, device)
    if advantages is None:
        advantages = _per_sample(part, mask)
    lp_C = torch.zeros(mask.shape, device=device).masked_scatter(mask, lp_flat)
    gap = _gap(part, found, start, mask, lp_C, advantages)
    weights = exp.correction.used(gap, found.norm)
    found.put("weights", start, weights[mask])
    reference = found.get("lp_ref", part, start, device)
    return exp.algorithm.loss(
        lp_C, gap.lp_P, reference, advantages, weights, mask, num_tokens, num_samples, exp.task.max_response
    )


def _per_sample(part: Batch, mask: Tensor) -> Tensor:
    import torch

    return torch.from_numpy(part.advantages_N).to(mask.device)[:, None].expand(mask.shape)


def _gap(part: Batch, found: Found, start: int, mask: Tensor, *later: Tensor) -> Gap:
    import torch

    lp_T, lp_P = (found.get(name, part, start, mask.device) for name in ("lp_T", "lp_P"))
    assert lp_T is not None and lp_P is not None
    return Gap(lp_T, lp_P, torch.from_numpy(part.logprobs_rollout_NT).to(mask.device), mask, *later)
