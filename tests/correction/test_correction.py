"""All corrections together: how parts combine, and what holds for every card of conf/correction/."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpexp import frontend
from lpexp.config import load
from lpexp.correction import Correction, Gap
from lpexp.errors import ConfigError
from lpexp.groups import choices
from tests.correction.cards import card

LN2 = math.log(2)


# -- every card --
@pytest.mark.parametrize("name", choices("correction"))
@given(lp=st.lists(st.floats(-30, 0, width=32), min_size=6, max_size=6))
def test_a_token_weighs_exactly_one_when_all_log_probabilities_are_the_same(name: str, lp: list[float]) -> None:
    same, mask = torch.tensor(lp).reshape(2, 3), torch.tensor([[True, True, False], [True, True, True]])
    correction = card(name)
    if correction.importance is not None and correction.importance.level != "geometric":
        correction = load({**correction.dump(), "batch_normalise": True}, Correction)
    gap = Gap(same, same, same, mask, same, torch.tensor([[1.0], [-1.0]]).expand(2, 3))
    found = correction.weigh(gap, correction.norm(gap))
    assert found.weights.tolist() == mask.float().tolist()
    assert not any(marked.any() for marked in (found.low, found.high, found.clamped, *found.removed.values()))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_whatever_stands_outside_the_mask_has_weight_zero_and_changes_no_other(
    each: Correction, garbage: float
) -> None:
    mask = torch.tensor([[True, False, False], [True, True, False]])

    def found(fill: float) -> Any:
        arrays = [torch.full((2, 3), fill) for _ in range(5)]
        for shift, array in enumerate(arrays):
            array[mask] = torch.tensor([-1.0, -2.0, -3.0]) - 0.1 * shift
        lp_T, lp_P, lp_R, lp_C, advantages = arrays
        return each.weigh(Gap(lp_T, lp_P, lp_R, mask, lp_C, advantages))

    clean, dirty = found(0.0), found(garbage)
    assert torch.equal(clean.weights, dirty.weights) and dirty.weights.dtype == torch.float32
    for marked in (dirty.weights, dirty.low, dirty.high, dirty.clamped, *dirty.removed.values()):
        assert not marked[~mask].any()


def test_a_broken_log_probability_is_no_reason_to_remove_its_token(each: Correction, gap) -> None:
    """Or training would go on as if nothing were wrong; a weight that is not finite stops it."""
    weight = each.weigh(gap([[math.nan, 0.0]], advantages=[-1.0])).weights[0, 0]
    assert weight == 1 if each.importance is None else weight.isnan()


def test_weights_are_constants_for_the_gradient(each: Correction) -> None:
    lp = torch.tensor([[-1.0]], requires_grad=True)
    gap = Gap(lp, lp, lp - 0.5, torch.tensor([[True]]), lp, torch.ones(1, 1))
    assert not each.weigh(gap).weights.requires_grad


def test_a_sample_is_weighed_alike_whoever_is_weighed_with_it(each: Correction, gap) -> None:
    delta, signs = torch.linspace(-0.6, 0.7, 20).reshape(4, 5).tolist(), [1.0, -1.0, 1.0, -1.0]
    delta[0][0] = -10.0
    whole = each.weigh(gap(delta, moved=-0.9, advantages=signs)).weights
    alone = [each.weigh(gap([row], moved=-0.9, advantages=[s])).weights for row, s in zip(delta, signs, strict=True)]
    assert torch.equal(whole, torch.cat(alone))
    assert each.name == "none" or (whole != 1).any()


def test_each_card_is_named_as_its_file(each: Correction, request: pytest.FixtureRequest) -> None:
    assert each.name == request.node.callspec.params["each"]


# -- how they combine --
def combined(*words: str) -> Correction:
    return frontend.experiment(*words).correction


def test_cards_combine_by_naming_them(gap) -> None:
    correction = combined("correction=[tis_token,veto,reject_k3]")
    assert correction.name == "tis_token+veto+reject_k3"
    found = correction.weigh(gap([[0.0, -10.0], [0.5, 0.5], [0.1, 0.0]]))
    assert found.weights.tolist() == [[0.0, 0.0], [0.0, 0.0], pytest.approx([math.exp(0.1), 1.0])]
    assert found.removed["veto"].any(1).tolist() == [True, False, False]
    assert found.removed["reject"].any(1).tolist() == [True, True, False]  # every part sees all valid tokens


def test_a_card_that_was_not_named_is_off() -> None:
    assert [combined(f"correction={name}").name for name in ("none", "icepop", "veto")] == ["none", "icepop", "veto"]


def test_weights_are_divided_by_their_mean_over_valid_tokens_removed_ones_included(gap) -> None:
    correction = combined("correction=[tis_token,reject_k1]", "correction.batch_normalise=true")
    seen = gap([[0.0, math.log(1.5), math.log(1.9), math.log(2.5)]])  # 1, 1.5, 1.9 and 0
    assert correction.norm(seen) == pytest.approx(4.4 / 4)
    found = correction.weigh(seen, correction.norm(seen))
    assert found.weights.tolist()[0] == pytest.approx([1 / 1.1, 1.5 / 1.1, 1.9 / 1.1, 0.0])
    assert found.norm == correction.norm(seen)


def test_masks_of_an_update_come_after_normalisation(gap) -> None:
    """They need the gradient's own forward pass, which has not been made when the mean is taken."""
    words = ("correction.batch_normalise=true", "correction.opsm.delta=0.1")
    correction = combined("correction=[tis_token,opsm]", *words)
    seen = gap([[LN2, LN2], [0.0, 0.0]], moved=-0.9, advantages=[1.0, -1.0])
    assert correction.norm(seen) == pytest.approx(1.5)
    assert correction.weigh(seen, 1.5).weights.tolist() == [pytest.approx([2 / 1.5] * 2), [0.0, 0.0]]


def test_an_observed_correction_weighs_every_token_one_and_tells_what_it_would_do(gap) -> None:
    correction = combined("correction=icepop", "correction.observe=true")
    seen = gap([[math.log(0.1), LN2]])
    assert correction.used(seen).tolist() == [[1.0, 1.0]]
    assert correction.weigh(seen).weights.tolist() == [[0.0, pytest.approx(2.0)]]
    assert correction.name == "observed icepop"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("correction=tis_geometric", "correction.batch_normalise=true"), "true with importance.level geometric"),
        (("correction=veto", "correction.batch_normalise=true"), "batch_normalise: true, but importance is null"),
        (("correction=none", "correction.observe=true"), "observe: true, but there is nothing to observe"),
        (("correction=seq_error",), r"seq_error\.error_max: must be set"),
    ],
)
def test_what_does_nothing_or_contradicts_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        combined(*words)


def test_judging_a_correction_loads_no_torch() -> None:
    code = "from lpexp.correction import Correction; import sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
