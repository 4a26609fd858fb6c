"""staleness/*, offpolicy/*, update/* and train/* of one trainer step.

The three gaps stay apart: d = lp_T - lp_R is mismatch/*, v = lp_P - lp_T is staleness/*, u = lp_C - lp_P is update/*.
Formulas: the dictionary in lpexp/metric/__init__.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lpexp.data import LearnReport, Metrics
from lpexp.errors import RunError
from lpexp.metric.mismatch import check_finite, k3, plain


def learn_metrics(report: LearnReport, clipped: Any) -> Metrics:
    """staleness/*, offpolicy/*, update/* and train/* of a LearnReport; its own `scalars` are among them.

    `clipped` is a lpexp.algorithm.Clipped of the whole batch. Raises RunError when a response token has no finite
    log-prob, or when the loss keeps none.
    """
    batch = report.batch
    mask = batch.mask_NT.astype(bool)
    for name in ("lp_T", "lp_P", "lp_C"):
        check_finite(getattr(report, name), batch.logprobs_rollout_NT, mask)
    found: Metrics = _staleness(report, mask) | _update(report, mask & (report.weights > 0), clipped)
    x = _gap(report.lp_C, batch.logprobs_rollout_NT, mask)
    found |= {"offpolicy/kl_k3": k3(x).mean(), "offpolicy/ratio_mean": np.exp(x).mean()}
    found |= {
        "train/entropy": report.entropy[mask].astype(np.float64).mean(),
        "train/entropy_sampled": -report.lp_C[mask].astype(np.float64).mean(),
    }
    if "lp_ref" in report.more:
        found["train/kl_ref_k3"] = k3(_gap(report.more["lp_ref"], report.lp_C, mask)).mean()
    if "values" in report.more:
        found |= _critic(report, mask)
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


def _update(report: LearnReport, kept: np.ndarray, clipped: Any) -> Metrics:
    if not kept.any():
        raise RunError(
            "correction: it removed every token of the batch (correction/masked_token_frac = 1); widen its bounds, or "
            "look at what it would do with correction.observe=true"
        )
    u = _gap(report.lp_C, report.lp_P, kept)
    ratio = np.exp(u)
    found: Metrics = {
        "update/kl_k3": k3(u).mean(),
        "update/ratio_mean": ratio.mean(),
        "update/ratio_max": ratio.max(),
        "update/clip_frac": np.asarray(clipped.binding)[kept].mean(),
    }
    advantages = token_advantages(report)[kept]
    for sign, side in (("pos", advantages > 0), ("neg", advantages < 0)):
        for bound, met in (("high", clipped.high), ("low", clipped.low)):
            if side.any() and met is not None:
                found[f"update/clip_frac_{bound}_{sign}"] = np.asarray(met)[kept][side].mean()
    return found


def token_advantages(report: LearnReport) -> np.ndarray:
    """[N, T]: those that the trainer gave each token, else the sample's."""
    shared = np.broadcast_to(report.batch.advantages_N[:, None], report.batch.mask_NT.shape)
    return report.more.get("advantages", shared)


def _critic(report: LearnReport, mask: np.ndarray) -> Metrics:
    """How well the critic knew the returns before it learned from them; variances below 1e-12 explain nothing."""
    values, returns = (report.more[name][mask].astype(np.float64) for name in ("values", "returns"))
    found: Metrics = {"train/value_mean": values.mean(), "train/return_mean": returns.mean()}
    if returns.var() >= 1e-12:
        found["train/value_explained_var"] = 1 - (returns - values).var() / returns.var()
    return found
