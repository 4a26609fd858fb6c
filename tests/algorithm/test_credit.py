"""Credit for single tokens: REINFORCE++ and PPO against hand calculations, and whitening over the whole batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lpexp.algorithm.credit import Scored, discounted, moments, whiten
from lpexp.algorithm.ppo import Ppo
from lpexp.algorithm.reinforce_pp import ReinforcePP
from lpexp.config import load
from lpexp.errors import ConfigError

MASK = torch.tensor([[False, True, True, True], [False, True, False, False]])
NAN = float("nan")


def made(kind: type[Any], **given: Any) -> Any:
    base = {"samples_per_prompt": 2}
    return load(base | ({"critic_lr": 1e-3} if kind is Ppo else {"baseline": "none"}) | given, kind)


def inside(*values: float) -> torch.Tensor:
    """[2, 4] with garbage outside the mask."""
    array = torch.full((2, 4), NAN)
    array[MASK] = torch.tensor(values, dtype=torch.float32)
    return array


def scored(values: torch.Tensor | None = None) -> Scored:
    """lp_P - lp_ref is 1, 2, 3 in the first answer, 4 in the second."""
    return Scored(MASK, inside(-1, -1, -1, -1), inside(-2, -3, -4, -5), values)


SCORES = torch.tensor([1.0, 0.5])


# -- REINFORCE++ --
def test_without_a_charge_or_a_discount_every_token_has_the_answer_s_reward() -> None:
    assert made(ReinforcePP).credit(SCORES, scored()).tolist() == [[0, 1, 1, 1], [0, 0.5, 0, 0]]


def test_a_token_s_return_is_the_discounted_sum_of_what_follows() -> None:
    # beta 0.1: rewards -0.1, -0.2, 1 - 0.3 and 0.5 - 0.4; gamma 1/2 from the end
    found = made(ReinforcePP, kl_reward_coef=0.1, gamma=0.5).credit(SCORES, scored())
    assert found.tolist() == [
        pytest.approx([0, -0.1 + 0.5 * (-0.2 + 0.5 * 0.7), -0.2 + 0.5 * 0.7, 0.7]),
        pytest.approx([0, 0.1, 0, 0]),
    ]


def test_with_the_group_s_baseline_a_token_is_charged_for_itself_only() -> None:
    algorithm = made(ReinforcePP, baseline="group", kl_reward_coef=0.1)
    advantages = algorithm.advantages(np.array([[1.0, 0.5]]))
    assert advantages.tolist() == [[0.25, -0.25]]
    found = algorithm.credit(torch.from_numpy(advantages[0]), scored())
    assert found.tolist() == [pytest.approx([0, 0.15, 0.05, -0.05]), pytest.approx([0, -0.65, 0, 0])]


def test_a_discount_that_nobody_reads_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gamma: 0\.9 is read by nobody"):
        made(ReinforcePP, baseline="group", gamma=0.9)


@pytest.mark.parametrize("baseline", ["none", "group"])
def test_a_reference_is_kept_for_a_charge_in_the_reward_or_in_the_loss(baseline: str) -> None:
    assert not made(ReinforcePP, baseline=baseline).uses_reference
    assert made(ReinforcePP, baseline=baseline, kl_reward_coef=0.1).uses_reference
    assert made(ReinforcePP, baseline=baseline, kl_coef=0.1).uses_reference


# -- PPO --
VALUES = inside(0.2, 0.4, 0.6, 0.1)


def test_with_lambda_one_an_advantage_is_the_return_less_the_value() -> None:
    found = made(Ppo).credit(SCORES, scored(VALUES))
    assert found.tolist() == [pytest.approx([0, 0.8, 0.6, 0.4]), pytest.approx([0, 0.4, 0, 0])]


def test_with_lambda_zero_an_advantage_looks_one_step_ahead() -> None:
    # gamma V' - V: 0.9 x 0.4 - 0.2, 0.9 x 0.6 - 0.4, then 1 - 0.6: nothing comes after the end
    found = made(Ppo, gae_lambda=0.0, gamma=0.9).credit(SCORES, scored(VALUES))
    assert found.tolist() == [pytest.approx([0, 0.16, 0.14, 0.4]), pytest.approx([0, 0.4, 0, 0])]


def test_gae_weighs_later_errors_by_gamma_lambda() -> None:
    found = made(Ppo, gae_lambda=0.5, gamma=0.9).credit(SCORES, scored(VALUES))
    last, middle = 0.4, 0.14 + 0.45 * 0.4
    assert found[0].tolist() == pytest.approx([0, 0.16 + 0.45 * middle, middle, last])


def test_a_value_may_not_gain_by_running_away_from_what_it_was() -> None:
    values, before, returns = (torch.tensor(x) for x in ([0.5, 1.0, 0.0], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0]))
    # at rest 0.5^2; right on the return, but held at 0.7: 0.3^2; the wrong way, its own error is larger: 1
    assert made(Ppo).value_loss(values, before, returns).tolist() == pytest.approx([0.125, 0.045, 0.5])


# -- whitening --
def test_whitening_is_over_the_whole_batch_however_it_is_split() -> None:
    random = torch.Generator().manual_seed(1)
    x, mask = torch.randn(6, 5, generator=random) * 3 + 2, torch.rand(6, 5, generator=random) < 0.7
    whole = moments(x, mask)
    torch.testing.assert_close(moments(x[:2], mask[:2]) + moments(x[2:], mask[2:]), whole)
    white = whiten(x, mask, whole)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].square().mean().item() == pytest.approx(1, rel=1e-5)
    assert (white[~mask] == 0).all()
    torch.testing.assert_close(torch.cat((whiten(x[:2], mask[:2], whole), whiten(x[2:], mask[2:], whole))), white)


def test_equal_credit_whitens_to_nothing_not_to_noise() -> None:
    x, mask = torch.full((2, 3), 0.3), torch.ones(2, 3, dtype=torch.bool)
    assert whiten(x, mask, moments(x, mask)).abs().max() < 1e-3


def test_a_sum_stops_at_the_end_of_its_answer() -> None:
    assert discounted(inside(1, 2, 3, 4), MASK, 1.0).tolist() == [[0, 6, 5, 3], [0, 4, 0, 0]]
