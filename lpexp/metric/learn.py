"""staleness/*, offpolicy/*, routing/*, update/*, correction/* and train/* of one trainer step.

The three gaps stay apart: d = lp_T - lp_R is mismatch/*, v = lp_P - lp_T is staleness/*, u = lp_C - lp_P is update/*.
Formulas: the dictionary in lpexp/metric/__init__.py. Left out: the keys of corrections that do not exist here.
"""

from __future__ import annotations

import numpy as np

from lpexp.data import LearnReport, Metrics
from lpexp.errors import RunError
from lpexp.metric.mismatch import check_finite, k3, plain
from lpexp.metric.routing import routing_metrics

FULL_REWARD = 1.0  # "correct", where only the reward is known
CLAMP = 20.0  # nat: corrections clamp log-ratios to this before exp


def learn_metrics(
    report: LearnReport, clip: tuple[float, float] | None, clipped_low: np.ndarray, clipped_high: np.ndarray
) -> Metrics:
    """All keys but mismatch/* that a LearnReport gives; its own `scalars` are among them.

    `clip` is the algorithm's (eps_low, eps_high), None when it does not clip; the masks [N, T] say whose weight a bound
    of the correction raised and cut. Raises RunError when a response token has no finite log-prob, or none is kept.
    """
    batch = report.batch
    mask = batch.mask_NT.astype(bool)
    for name in ("lp_T", "lp_P", "lp_C"):
        check_finite(getattr(report, name), batch.logprobs_rollout_NT, mask)
    found: Metrics = _staleness(report, mask) | _correction(report, mask, clipped_low, clipped_high)
    kept = mask & (report.weights > 0)
    found |= _update(report, kept, clip)
    x = _gap(report.lp_C, batch.logprobs_rollout_NT, mask)
    found |= {"offpolicy/kl_k3": k3(x).mean(), "offpolicy/ratio_mean": np.exp(x).mean()}
    found |= {
        "train/entropy": report.entropy[mask].astype(np.float64).mean(),
        "train/entropy_sampled": -report.lp_C[mask].astype(np.float64).mean(),
    }
    if report.routing is not None and batch.experts is not None:
        found |= routing_metrics(report.routing, batch.experts, mask)
    if report.lp_ref is not None:
        found["train/kl_ref_k3"] = k3(_gap(report.lp_ref, report.lp_C, mask)).mean()
    twice = sorted(set(found) & set(report.scalars))
    assert not twice, f"the trainer reports {twice}, which are computed from its arrays"
    return {key: plain(value) for key, value in (found | report.scalars).items()}


def _gap(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return a[mask].astype(np.float64) - b[mask].astype(np.float64)


def _staleness(report: LearnReport, mask: np.ndarray) -> Metrics:
    batch = report.batch
    versions = batch.versions_N[:, None] if batch.versions_N.ndim == 1 else batch.versions_N  # one a sample, or a token
    gaps_NT: np.ndarray = np.broadcast_to(report.version - versions.astype(np.int64), mask.shape)
    gaps = gaps_NT[mask]
    rows = mask.any(axis=1)
    lowest = np.where(mask, gaps_NT, np.iinfo(np.int64).max).min(axis=1)
    highest = np.where(mask, gaps_NT, np.iinfo(np.int64).min).max(axis=1)
    v = _gap(report.lp_P, report.lp_T, mask)
    assert gaps.any() or not v.any(), "lp_P differs from lp_T although the newest weights sampled the batch"
    found: Metrics = {
        "staleness/version_gap_mean": gaps.mean(),
        "staleness/version_gap_max": gaps.max(),
        "staleness/mixed_version_frac": (rows & (lowest != highest)).sum() / rows.sum(),
        "staleness/kl_k3": k3(v).mean(),
        "staleness/logprob_abs_diff_mean": np.abs(v).mean(),
    }
    values, counts = np.unique(gaps, return_counts=True)
    return found | {f"staleness/hist_{gap}": count / len(gaps) for gap, count in zip(values, counts, strict=True)}


def _correction(report: LearnReport, mask: np.ndarray, low: np.ndarray, high: np.ndarray) -> Metrics:
    batch = report.batch
    weights = report.weights[mask].astype(np.float64)
    kept = mask & (report.weights > 0)
    rows = mask.any(axis=1)
    removed_rows = rows & ~kept.any(axis=1)
    low, high = low[mask].astype(bool), high[mask].astype(bool)
    found: Metrics = {
        "correction/weight_mean": weights.mean(),
        "correction/weight_min": weights.min(),
        "correction/weight_max": weights.max(),
        "correction/weight_std": weights.std(),
        "correction/clip_frac": (low | high).mean(),
        "correction/clip_frac_low": low.mean(),
        "correction/clip_frac_high": high.mean(),
        "correction/masked_token_frac": (weights == 0).mean(),
        "correction/masked_seq_frac": removed_rows.sum() / rows.sum(),
        "correction/logratio_clamped_frac": (np.abs(_gap(report.lp_P, batch.logprobs_rollout_NT, mask)) > CLAMP).mean(),
    }
    if weights.any():
        found["correction/ess"] = weights.mean() ** 2 / (weights**2).mean()
    if removed_rows.any():
        found["correction/masked_correct_frac"] = (batch.rewards_N[removed_rows] >= FULL_REWARD).mean()
    for name, some in (("kept", kept), ("removed", mask & ~kept)):
        if some.any():
            found[f"correction/kl_k3_{name}"] = k3(_gap(report.lp_T, batch.logprobs_rollout_NT, some)).mean()
    return found


def _update(report: LearnReport, kept: np.ndarray, clip: tuple[float, float] | None) -> Metrics:
    if not kept.any():
        raise RunError("correction: it removed every token of the batch (correction/masked_token_frac = 1)")
    u = _gap(report.lp_C, report.lp_P, kept)
    ratio = np.exp(u)
    found: Metrics = {
        "update/kl_k3": k3(u).mean(),
        "update/ratio_mean": ratio.mean(),
        "update/ratio_max": ratio.max(),
    }
    if clip is None:
        return found
    high, low = ratio > 1 + clip[1], ratio < 1 - clip[0]
    advantage = np.broadcast_to(report.batch.advantages_N[:, None], kept.shape)[kept]
    up, down = advantage > 0, advantage < 0
    found["update/clip_frac"] = ((high & up) | (low & down)).mean()
    for sign, side in (("pos", up), ("neg", down)):
        if side.any():
            found[f"update/clip_frac_high_{sign}"] = high[side].mean()
            found[f"update/clip_frac_low_{sign}"] = low[side].mean()
    return found
