"""Dr. GRPO: GRPO without its two biases: no division by the group's standard deviation, none by an answer's length.

Source: "Understanding R1-Zero-like training", arXiv 2503.20783, eq. 2 and the listing of its masked mean, where sums
over tokens are divided by the longest possible response.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from lpexp.algorithm import centred
from lpexp.algorithm.clipped import ClippedSurrogate


class DrGrpo(ClippedSurrogate):
    reduction: Literal["constant"] = "constant"

    def advantages(self, rewards_PG: np.ndarray) -> np.ndarray:
        """A = r - mean of the group."""
        return centred(rewards_PG).astype(np.float32)
