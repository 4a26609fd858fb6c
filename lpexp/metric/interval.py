"""95 % intervals of shares: Wilson's, for answers that come several to a prompt.

Answers to one prompt are alike, so n of them tell less than n prompts: the interval is computed for the effective
number of answers, p (1 - p) over the variance of the mean between prompts.
Source: Wilson, JASA 22 (1927) 209; effective sample size: Korn and Graubard, Survey Methodology 24 (1998) 193.
"""

from __future__ import annotations

import math

import numpy as np

Z95 = 1.959963984540054


def wilson(share: float, count: float) -> tuple[float, float]:
    """Lower and upper bound of a share of `count` independent answers; `count` > 0 need not be whole."""
    middle = share + Z95**2 / (2 * count)
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    whole = 1 + Z95**2 / count
    return max((middle - half) / whole, 0.0), min((middle + half) / whole, 1.0)


def effective(correct_PG: np.ndarray) -> float:
    """How many independent answers [P, G] zeros and ones are worth: at least P, the prompts, at most P * G."""
    prompts, answers = correct_PG.shape
    means = correct_PG.mean(axis=1)
    share = means.mean()
    if answers == 1 or prompts == 1 or share in (0, 1):
        return float(prompts)  # nothing varies, so nothing says that answers to one prompt are independent
    between = means.var(ddof=1) / prompts
    return (
        float(np.clip(share * (1 - share) / between, prompts, correct_PG.size)) if between else float(correct_PG.size)
    )
