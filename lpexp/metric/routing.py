"""routing/*: how the trainer's routers choose beside the rollout's, under the weights that sampled.

A pair is a response token and a layer with experts: the row that predicts the token, and the set that it is routed to.
Formulas: the dictionary in lpexp/metric/__init__.py. Source: R3, arXiv 2510.11370.
"""

from __future__ import annotations

import numpy as np

from lpexp.data import Metrics


def routing_metrics(routing: np.ndarray, experts: np.ndarray, mask: np.ndarray) -> Metrics:
    """`routing` is LearnReport's [3, N, T], `experts` the batch's [N, T - 1, layers, top_k], `mask` [N, T]."""
    flips, margin, replayed = (array[mask].astype(np.float64) for array in routing)
    layers = experts.shape[2]
    found: Metrics = {
        "routing/disagreement_frac": flips.mean() / layers,
        "routing/token_any_frac": (flips > 0).mean(),
        "routing/layers_per_token": flips.mean(),
        "routing/margin_p05": np.quantile(margin, 0.05),
        "routing/replayed_frac": replayed.mean() / layers,
    }
    if replayed.any():
        found["routing/replay_missing_count"] = int(layers * len(replayed) - replayed.sum())
    return found
