"""correction/*: what a correction did about the gap. Formulas: the dictionary in lpexp/metric/__init__.py.

numpy over the valid tokens of the whole batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lpexp.data import Metrics
from lpexp.metric.mismatch import k3, plain

FULL_REWARD = 1.0  # "correct", where only the reward is known
WHOLE = ("veto", "seq_error", "opsm")  # parts that remove whole sequences, or none of it: counted in sequences


def correction_metrics(
    weighed: Any, lp_T: np.ndarray, lp_R: np.ndarray, mask: np.ndarray, rewards_N: np.ndarray
) -> Metrics:
    """All keys of correction/*; those of a part that is off, or that no token backs, are absent.

    `weighed` is a lpexp.correction.Weighed of the whole batch.
    """
    mask = mask.astype(bool)
    weights_NT = np.asarray(weighed.weights, np.float64)
    weights, kept = weights_NT[mask], mask & (weights_NT > 0)
    rows = mask.any(axis=1)
    removed_rows = rows & ~kept.any(axis=1)
    low, high, clamped = (np.asarray(marked)[mask] for marked in (weighed.low, weighed.high, weighed.clamped))
    found: Metrics = {
        "weight_mean": weights.mean(),
        "weight_min": weights.min(),
        "weight_max": weights.max(),
        "weight_std": weights.std(),
        "clip_frac": (low | high).mean(),
        "clip_frac_low": low.mean(),
        "clip_frac_high": high.mean(),
        "masked_token_frac": (weights == 0).mean(),
        "masked_seq_frac": removed_rows.sum() / rows.sum(),
        "logratio_clamped_frac": clamped.mean(),
    }
    for part, removed in weighed.removed.items():
        tokens = np.asarray(removed) & mask
        found[f"{part}_frac"] = tokens.any(axis=1).sum() / rows.sum() if part in WHOLE else tokens[mask].mean()
    if weighed.norm is not None:
        found["norm_factor"] = weighed.norm
    if weights.any():
        found["ess"] = weights.mean() ** 2 / (weights**2).mean()
    if removed_rows.any():
        found["masked_correct_frac"] = (rewards_N[removed_rows] >= FULL_REWARD).mean()
    for name, some in (("kept", kept), ("removed", mask & ~kept)):
        if some.any():
            found[f"kl_k3_{name}"] = k3(lp_T[some].astype(np.float64) - lp_R[some].astype(np.float64)).mean()
    return {f"correction/{key}": plain(value) for key, value in found.items()}
