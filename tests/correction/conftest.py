"""Gaps small enough to compute by hand, and every card of conf/correction/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lpexp.correction import Correction, Gap
from lpexp.groups import choices
from tests.correction.cards import card


@pytest.fixture
def made() -> Callable[..., Correction]:
    """made("icepop", importance={"ratio_min": 0.2}): the card with that changed."""
    return card


@pytest.fixture(params=choices("correction"))
def each(request: pytest.FixtureRequest) -> Correction:
    """The correction of each card in turn."""
    return card(request.param)


@pytest.fixture
def gap() -> Callable[..., Gap]:
    """Samples whose lp_P = lp_T is lp_R + delta, and whose lp_C is that + moved."""

    def make(
        delta: Sequence[Sequence[float]],
        mask: Any = None,
        lp_R: float = -1.0,
        moved: float = 0.0,
        advantages: Any = None,
    ) -> Gap:
        delta_NT = torch.tensor(delta, dtype=torch.float32)
        lp = torch.full_like(delta_NT, lp_R)
        inside = torch.ones_like(delta_NT, dtype=torch.bool) if mask is None else torch.tensor(mask)
        signs = torch.ones(len(delta_NT)) if advantages is None else torch.tensor(advantages)
        signs_NT = signs[:, None].expand(delta_NT.shape)
        return Gap(lp + delta_NT, lp + delta_NT, lp, inside, lp + delta_NT + moved, signs_NT)

    return make
