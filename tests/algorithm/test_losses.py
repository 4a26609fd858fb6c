"""Advantages and losses of the algorithms beside GRPO, each against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from lpexp import frontend
from lpexp.algorithm import Algorithm
from lpexp.algorithm.cispo import Cispo
from lpexp.algorithm.dr_grpo import DrGrpo
from lpexp.algorithm.gspo import Gspo
from lpexp.algorithm.rloo import Rloo
from lpexp.config import load
from lpexp.errors import ConfigError
from lpexp.groups import choices
from tests.algorithm.losses import loss_of

REWARDS = np.array([[1.0, 0.0, 0.0, 0.0], [0.2, 0.4, 0.6, 0.8]])


def made(kind: type[Any], **given: Any) -> Any:
    return load({"samples_per_prompt": 4, **given}, kind)


# -- Dr. GRPO --
def test_dr_grpo_divides_neither_by_the_deviation_nor_by_the_length() -> None:
    assert made(DrGrpo).advantages(REWARDS) == pytest.approx(
        np.array([[0.75, -0.25, -0.25, -0.25], [-0.3, -0.1, 0.1, 0.3]])
    )
    # two tokens of A = 2 and one of A = -1, two samples, at most 10 tokens: -(2 + 2 - 1) / 20
    mask = [[True, True], [True, False]]
    value, _, grad = loss_of(made(DrGrpo), [[1.0, 1.0], [1.0, 1.0]], [2.0, -1.0], mask=mask, max_response=10)
    assert value == pytest.approx(-3 / 20)
    assert grad.tolist() == [[-0.1, -0.1], [0.05, 0.0]]


def test_a_long_wrong_answer_costs_more_in_dr_grpo_where_grpo_by_sequences_lets_it_hide() -> None:
    from lpexp.algorithm.grpo import Grpo

    short, long = [[True, False, False, False]], [[True, True, True, True]]
    by_sequence = [
        loss_of(made(Grpo, reduction="seq_mean_token_mean"), [[1.0] * 4], [-1.0], mask=m)[0] for m in (short, long)
    ]
    constant = [loss_of(made(DrGrpo), [[1.0] * 4], [-1.0], mask=m)[0] for m in (short, long)]
    assert by_sequence == [1.0, 1.0] and constant == [0.25, 1.0]


# -- GSPO --
def test_gspo_compares_the_geometric_mean_of_an_answer_s_ratios() -> None:
    # ratios 4 and 1: r_s = sqrt(4) = 2, unclipped (bound 4): -2 A, mean over two tokens; each token gets r_s A / 2
    algorithm = made(Gspo, clip_low=0.9, clip_high=3.0)
    value, _, grad = loss_of(algorithm, [[4.0, 1.0]], [1.0])
    assert value == pytest.approx(-2.0)
    assert grad.tolist() == [[pytest.approx(-1.0), pytest.approx(-1.0)]]  # alike, whatever its own ratio


def test_gspo_clips_a_whole_answer_or_none_of_it() -> None:
    algorithm = made(Gspo, clip_low=3e-4, clip_high=4e-4)
    inside = math.exp(2 * 3.9e-4)  # of two tokens, one moved: the mean is half
    value, _, grad = loss_of(algorithm, [[inside, 1.0]], [1.0])
    assert value == pytest.approx(-math.exp(3.9e-4)) and (grad != 0).all()
    value, _, grad = loss_of(algorithm, [[math.exp(2 * 4.1e-4), 1.0]], [1.0])
    assert value == pytest.approx(-(1 + 4e-4)) and (grad == 0).all()


def test_gspo_s_mean_leaves_out_what_the_correction_removed_and_padding() -> None:
    algorithm = made(Gspo, clip_low=0.9, clip_high=9.0)
    mask = [[True, True, True, False]]
    value, _, grad = loss_of(algorithm, [[4.0, 1.0, 900.0, 7.0]], [1.0], weights=[[1.0, 1.0, 0.0, 1.0]], mask=mask)
    assert value == pytest.approx(-2.0 * 2 / 3)  # the removed token counts in the mean over the answer's tokens
    assert grad[0, 2:].tolist() == [0.0, 0.0]


def test_gspo_weighs_an_answer_by_the_mean_of_its_tokens_weights() -> None:
    value, _, grad = loss_of(made(Gspo), [[1.0, 1.0]], [1.0], weights=[[2.0, 1.0]])
    assert value == pytest.approx(-1.5)
    assert grad.tolist() == [[pytest.approx(-0.75)] * 2]


# -- CISPO --
@pytest.mark.parametrize(
    ("ratio", "advantage", "held"),
    [(1.0, 2.0, 1.0), (4.0, 1.0, 4.0), (6.0, 1.0, 5.0), (6.0, -1.0, 5.0), (0.1, -1.0, 0.1)],
)
def test_cispo_cuts_the_weight_and_keeps_every_token_s_gradient(ratio: float, advantage: float, held: float) -> None:
    value, _, grad = loss_of(made(Cispo, clip_high=4.0), [[ratio]], [advantage])
    assert value == pytest.approx(-held * advantage * math.log(ratio))
    assert grad.item() == pytest.approx(-held * advantage)


# -- RLOO --
def test_rloo_s_baseline_is_the_mean_of_the_others() -> None:
    assert made(Rloo).advantages(REWARDS) == pytest.approx(
        np.array([[1.0, -1 / 3, -1 / 3, -1 / 3], [0.2 - 0.6, 0.4 - 1.6 / 3, 0.6 - 1.4 / 3, 0.8 - 0.4]])
    )
    assert (made(Rloo).advantages(np.full((1, 4), 1 / 3)) == 0).all()


def test_rloo_s_gradient_is_that_of_the_answer_s_log_probability() -> None:
    value, _, grad = loss_of(made(Rloo), [[1.0, 1.0, 1.0]], [2.0])
    assert value == pytest.approx(-2.0)
    assert grad.tolist() == [[-2.0] * 3]  # not divided by the length


def test_rloo_clips_the_product_of_an_answer_s_ratios() -> None:
    value, _, grad = loss_of(made(Rloo, clip_low=0.2, clip_high=0.2), [[1.1, 1.05]], [1.0])
    assert value == pytest.approx(-1.155) and grad[0, 0].item() == pytest.approx(-1.155)
    value, _, grad = loss_of(made(Rloo, clip_low=0.2, clip_high=0.2), [[1.1, 1.1]], [1.0])
    assert value == pytest.approx(-1.2) and (grad == 0).all()


# -- all of them --
@pytest.fixture(params=choices("algorithm"))
def each(request: pytest.FixtureRequest) -> Algorithm:
    return frontend.experiment(f"algorithm={request.param}").algorithm


def test_at_the_first_update_the_gradient_is_the_weighted_advantage_of_each_kept_token(each: Algorithm) -> None:
    """Ratio 1: all losses are REINFORCE, up to how tokens are averaged."""
    lp = torch.full((2, 3), -0.5, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, 1.0], [-2.0, -2.0, -2.0]], dtype=torch.float64)
    ones, mask = torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.bool)
    loss, _ = each.loss(lp, lp.detach(), None, advantages, ones, mask, 6, 2, 3)
    loss.backward()
    assert lp.grad is not None
    scale = lp.grad / -advantages
    assert scale[0, 0] > 0
    torch.testing.assert_close(scale, scale[0, 0].expand(2, 3))


def test_a_removed_token_contributes_nothing_even_when_its_ratio_overflows(each: Algorithm) -> None:
    value, _, grad = loss_of(each, [[math.inf, 1.1]], [-1.0], weights=[[0.0, 1.0]], ref=[[math.nan, 0.0]])
    assert math.isfinite(value) and grad[0, 0] == 0 and grad[0, 1] > 0


def test_any_split_of_the_samples_sums_to_the_same_loss_and_gradient(each: Algorithm) -> None:
    random = torch.Generator().manual_seed(3)
    lp_C, lp_old = (torch.randn(8, 5, generator=random, dtype=torch.float64) * 0.01 - 1 for _ in range(2))
    advantages = torch.randn(8, 5, generator=random, dtype=torch.float64)
    weights, mask = torch.rand(8, 5, generator=random, dtype=torch.float64), torch.rand(8, 5, generator=random) < 0.6
    mask[:, 0] = True

    def run(edges: list[int]) -> tuple[float, torch.Tensor]:
        leaf, total = lp_C.clone().requires_grad_(), 0.0
        for rows in (slice(a, b) for a, b in itertools.pairwise(edges)):
            given = (leaf[rows], lp_old[rows], None, advantages[rows], weights[rows], mask[rows])
            loss, _ = each.loss(*given, int(mask.sum()), 8, 5)
            loss.backward()
            total += loss.item()
        assert leaf.grad is not None
        return total, leaf.grad

    whole, parts = run([0, 8]), run([0, 2, 3, 8])
    assert parts[0] == pytest.approx(whole[0], abs=1e-12)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-12, atol=1e-14)


def test_clipped_marks_the_tokens_whose_loss_a_bound_changed(each: Algorithm) -> None:
    """Against the definition: the loss with the bound and without it differ, or in CISPO its gradient does."""
    u = torch.tensor([[0.5, 0.0], [-0.5, 0.0], [1.8, 1.8], [0.0, 0.0]], dtype=torch.float64)
    kept = torch.ones(4, 2, dtype=torch.bool)
    for sign in (1.0, -1.0):
        advantages = torch.full((4, 2), sign, dtype=torch.float64)
        lp_C = u.clone().requires_grad_()
        each.objective(lp_C, torch.zeros_like(u), advantages, kept).sum().backward()
        found = each.clipped(u, advantages, kept)
        assert lp_C.grad is not None
        if isinstance(each, Cispo):
            assert found.low is None
            assert torch.equal(found.binding, lp_C.grad.abs() < u.exp())
        else:
            assert torch.equal(found.binding, lp_C.grad == 0)
            assert found.low is not None and found.low.any() and found.high.any()
    assert found.binding.any() or isinstance(each, Cispo)


@pytest.mark.parametrize(("name", "way"), [("grpo", 2), ("dr_grpo", 2), ("gspo", 2), ("cispo", 2), ("rloo", 2)])
def test_one_sample_a_prompt_is_refused_where_samples_are_compared(name: str, way: int) -> None:
    with pytest.raises(ConfigError, match=f"samples_per_prompt: 1 makes every advantage 0 .*; use {way} or more"):
        frontend.experiment(f"algorithm={name}", "algorithm.samples_per_prompt=1")
    for free in ("ppo", "reinforce_pp"):
        frontend.experiment(f"algorithm={free}", "algorithm.samples_per_prompt=1")


@pytest.mark.parametrize(("name", "wrong"), [("dr_grpo", "token_mean"), ("gspo", "token_mean"), ("rloo", "constant")])
def test_a_reduction_that_would_make_it_another_algorithm_is_refused(name: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.reduction"):
        frontend.experiment(f"algorithm={name}", f"algorithm.reduction={wrong}")
