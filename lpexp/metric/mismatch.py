"""mismatch/*: how far the trainer's log-probabilities are from the rollout's, under the same weights.

numpy in float64 over the valid tokens of the whole batch, so neither padding nor the split over ranks and micro-batches
can change a value. Formulas: the dictionary in lpexp/metric/__init__.py. A log-prob that is not finite is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lpexp.data import LearnReport, Metrics
from lpexp.errors import RunError

PROB_EDGES = (1e-3, 1e-2, 1e-1, 0.5, 0.9)
PROB_BINS = ("lt_1e-3", "1e-3_1e-2", "1e-2_1e-1", "1e-1_0.5", "0.5_0.9", "ge_0.9")
POSITION_EDGES = (1, 4, 16, 64, 256, 1024, 4096, 16384)
POSITION_BINS = ("0_1", "1_4", "4_16", "16_64", "64_256", "256_1k", "1k_4k", "4k_16k", "ge_16k")
ENTROPY_BINS = ("q1", "q2", "q3", "q4")
EXACT_TOKENS = 1 << 20  # quantiles are exact up to this many
HISTOGRAM = np.geomspace(1e-9, 1e2, 1025)  # nat; 1024 bins, 2.5 % wide
WORST = 20


def k3(x: np.ndarray) -> np.ndarray:
    """exp(x) - 1 - x, exact near 0: the unbiased, never negative KL estimator on a log-ratio, nat."""
    return np.expm1(x) - x


def mismatch_metrics(lp_T: np.ndarray, lp_R: np.ndarray, mask: np.ndarray, entropy: np.ndarray) -> Metrics:
    """All scalars of mismatch/* from arrays [N, T]; `mask` marks response tokens, `entropy` is in nat.

    Raises RunError when a response token has no finite log-prob on either side, or when there is no response token.
    """
    mask = mask.astype(bool)
    check_finite(lp_T, lp_R, mask)
    rows, _ = np.nonzero(mask)
    trainer, rollout = lp_T[mask].astype(np.float64), lp_R[mask].astype(np.float64)
    d = trainer - rollout
    size, kl = np.abs(d), k3(d)
    p_T, p_R = np.exp(trainer), np.exp(rollout)
    lengths = mask.sum(axis=1)
    sequences = lengths > 0

    def total(x: np.ndarray) -> np.ndarray:
        """Sum over the tokens of each sequence that has any."""
        return np.bincount(rows, weights=x, minlength=len(mask))[sequences]

    lengths = lengths[sequences]
    seq_d = total(d)
    quantiles, exact = _quantiles(size, (0.5, 0.95, 0.99))
    # n = ln((p_T + p_R) / 2), written so that equal log-probs give exactly 0
    to_mixture = np.log1p(np.expm1(d) / 2)  # n - lp_R
    found: Metrics = {
        "logprob_abs_diff_mean": size.mean(),
        "logprob_abs_diff_p50": quantiles[0],
        "logprob_abs_diff_p95": quantiles[1],
        "logprob_abs_diff_p99": quantiles[2],
        "logprob_abs_diff_max": size.max(),
        "quantiles_exact": int(exact),
        "kl_k1": 0.0 - d.mean(),  # never -0.0
        "kl_k2": (d * d / 2).mean(),
        "kl_k3": kl.mean(),
        "kl_k3_reverse": k3(-d).mean(),
        "mult_prob_error": np.exp(size).mean(),
        "mult_prob_error_seq_max": (total(np.exp(size)) / lengths).max(),
        "ratio_extreme_frac": (size > np.log(2)).mean(),
        "ratio_mean": np.exp(d).mean(),
        "prob_abs_diff_mean": np.abs(p_T - p_R).mean(),
        "prob_abs_diff_max": np.abs(p_T - p_R).max(),
        "chi2_token": np.expm1(2 * d).mean(),
        "chi2_seq": np.expm1(2 * np.clip(seq_d, -20, 20)).mean(),
        "chi2_seq_clamped_frac": (np.abs(seq_d) > 20).mean(),
        "log_ppl_abs_diff": np.abs(seq_d / lengths).mean(),
        "ppl_ratio": np.exp(-seq_d / lengths).mean(),
        "trainer_log_ppl": (-total(trainer) / lengths).mean(),
        "rollout_log_ppl": (-total(rollout) / lengths).mean(),
        "js_divergence": (k3(d - to_mixture) / 2 + k3(-to_mixture) / 2).mean(),
        "seq_logratio_abs_mean": np.abs(seq_d).mean(),
        "nonfinite_count": 0,
        "valid_tokens": len(d),
    }
    if p_T.var() >= 1e-12 and p_R.var() >= 1e-12:
        found["prob_pearson"] = np.corrcoef(p_T, p_R)[0, 1]
    spread = entropy[mask].astype(np.float64)
    if spread.mean() > 0:
        found["kl_per_entropy"] = kl.mean() / spread.mean()
    position = (np.cumsum(mask, axis=1) - 1)[mask]
    quartiles = np.quantile(spread, (0.25, 0.5, 0.75))
    found |= _by("prob", PROB_BINS, np.searchsorted(PROB_EDGES, p_R, side="right"), size, kl)
    found |= _by("position", POSITION_BINS, np.searchsorted(POSITION_EDGES, position, side="right"), size, kl)
    found |= _by("entropy", ENTROPY_BINS, np.searchsorted(quartiles, spread, side="left"), size, kl)
    return {f"mismatch/{key}": plain(value) for key, value in found.items()}


def check_finite(lp_T: np.ndarray, lp_R: np.ndarray, mask: np.ndarray) -> None:
    """Raise RunError, with count and first place, unless there are masked tokens and all are finite on both sides."""
    if not mask.any():
        raise RunError("mismatch: the batch has no response token (mismatch/valid_tokens = 0)")
    broken = mask & ~(np.isfinite(lp_T) & np.isfinite(lp_R))
    if broken.any():
        row, column = (int(i) for i in np.argwhere(broken)[0])
        raise RunError(
            f"mismatch/nonfinite_count = {int(broken.sum())} of {int(mask.sum())} tokens have no finite log-prob; the "
            f"first is sample {row}, position {column}: trainer {lp_T[row, column]}, rollout {lp_R[row, column]}"
        )


def worst_tokens(report: LearnReport) -> list[dict[str, Any]]:
    """The table mismatch/worst_tokens: up to 20 tokens by |lp_T - lp_R|, worst first; those that agree are left out."""
    batch, routed = report.batch, report.routing
    return [
        {
            "prompt_id": int(batch.prompt_ids_N[row]),
            "sample": int(batch.sample_index_N[row]),
            "position": column - int(batch.prompt_lengths_N[row]),  # in the response
            "token": int(batch.tokens_NT[row, column]),
            "lp_R": float(batch.logprobs_rollout_NT[row, column]),
            "lp_T": float(report.lp_T[row, column]),
            "entropy": float(report.entropy[row, column]),
            "weight": float(report.weights[row, column]),
        }
        | ({} if routed is None else {"router_flips": int(routed[0, row, column])})
        for row, column in worst_places(report.lp_T, batch.logprobs_rollout_NT, batch.mask_NT)
    ]


def worst_places(lp_T: np.ndarray, lp_R: np.ndarray, mask: np.ndarray) -> list[tuple[int, int]]:
    """(row, column) of up to 20 tokens by |lp_T - lp_R|, worst first; those that agree are left out."""
    size = np.where(mask, np.abs(lp_T.astype(np.float64) - lp_R), 0.0)
    order = np.argsort(-size, axis=None, kind="stable")[:WORST]
    places = [(int(row), int(column)) for row, column in zip(*np.unravel_index(order, size.shape), strict=True)]
    return [place for place in places if size[place] > 0]


def plain(value: Any) -> Any:
    """A numpy scalar as the Python number of the same value."""
    return value.item() if isinstance(value, np.generic) else value


def _by(
    where: str, names: tuple[str, ...], bins: np.ndarray, size: np.ndarray, kl: np.ndarray
) -> Iterator[tuple[str, Any]]:
    """(key, value) of each bin that holds a token; the share of the gap only where there is a gap."""
    everything = kl.sum()
    for index, name in enumerate(names):
        inside = bins == index
        if not inside.any():
            continue
        yield f"by_{where}/{name}/kl_k3", kl[inside].mean()
        yield f"by_{where}/{name}/logprob_abs_diff_mean", size[inside].mean()
        yield f"by_{where}/{name}/token_frac", inside.mean()
        if everything > 0:
            yield f"by_{where}/{name}/kl_share", kl[inside].sum() / everything


def _quantiles(values: np.ndarray, at: tuple[float, ...]) -> tuple[list[float], bool]:
    """Quantiles of non-negative values, linear between neighbours, and whether they are exact.

    Above 2^20 values they are the upper edges of a histogram's bins, so at most 2.5 % too large within 1e-9..1e2.
    """
    if len(values) <= EXACT_TOKENS:
        return [float(q) for q in np.quantile(values, at)], True
    edges = np.concatenate([[0.0], HISTOGRAM, [max(values.max(), HISTOGRAM[-1])]])
    counts = np.bincount(
        np.searchsorted(edges, values, side="left"), minlength=len(edges)
    )  # bin i: (edge[i-1], edge[i]]
    below = np.cumsum(counts)
    return [float(edges[np.searchsorted(below, q * len(values), side="left")]) for q in at], False
