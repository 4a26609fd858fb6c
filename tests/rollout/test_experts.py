"""Experts as an engine returns them become those of a Sample, or are refused by what does not fit."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from lpexp import frontend
from lpexp.errors import RunError
from lpexp.rollout.experts import returned_experts

DENSE_FIRST = frontend.experiment("model=deepseek_tiny").model.sized()  # its first layer has no experts
TOKENS = 5


def raw(layers: int, highest: int = 7) -> np.ndarray:
    assert DENSE_FIRST.moe is not None
    rng = np.random.default_rng(0)
    return rng.integers(0, highest + 1, (TOKENS - 1, layers, DENSE_FIRST.moe.top_k)).astype("<i4")


def encoded(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def test_of_all_layers_those_with_experts_are_kept() -> None:
    sent = raw(DENSE_FIRST.num_hidden_layers)
    routed = [layer for layer in range(DENSE_FIRST.num_hidden_layers) if DENSE_FIRST.is_moe_layer(layer)]
    assert len(routed) < DENSE_FIRST.num_hidden_layers
    found = returned_experts(encoded(sent), TOKENS, DENSE_FIRST)
    assert found.dtype == np.int16 and np.array_equal(found, sent[:, routed])
    assert np.array_equal(returned_experts(sent[:, routed], TOKENS, DENSE_FIRST), found)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("not base64!", "not base64 of int32"),
        (encoded(raw(1)[:-1]), "came for 5 tokens; 4 x"),
        (encoded(raw(1) + 100), "routed experts run from"),
    ],
)
def test_what_does_not_fit_is_told(answer: str, why: str) -> None:
    with pytest.raises(RunError, match=why):
        returned_experts(answer, TOKENS, DENSE_FIRST)
