"""GRPO: advantages and loss against hand calculations, and the sums that must not depend on how samples are split."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lpexp.algorithm.grpo import Grpo
from lpexp.config import load
from lpexp.data import Group, Prompt, Sample
from lpexp.errors import ConfigError
from tests.algorithm.losses import loss_of

NAN = float("nan")
REDUCTIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant")


def grpo(**given: Any) -> Grpo:
    return load({"samples_per_prompt": 4, "kl_coef": 0.0, **given}, Grpo)


# -- advantages --
def test_advantages_match_a_hand_calculation() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 0.0], [0.2, 0.4, 0.6, 0.8]])
    assert grpo().advantages(rewards) == pytest.approx(np.array([[0.75, -0.25, -0.25, -0.25], [-0.3, -0.1, 0.1, 0.3]]))
    # unbiased: variance of 1,0,0,0 is (0.5625 + 3 x 0.0625) / 3 = 0.25
    assert grpo(std_norm=True).advantages(rewards)[0] == pytest.approx(np.array([1.5, -0.5, -0.5, -0.5]), rel=1e-5)
    assert grpo(std_norm=True).advantages(np.array([[0.0, 2e-6]]))[0, 1] == pytest.approx(
        1e-6 / (math.sqrt(2e-12) + 1e-6)
    )


@pytest.mark.parametrize("std_norm", [False, True])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, 0.7])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_zero(std_norm: bool, reward: float) -> None:
    assert (grpo(std_norm=std_norm).advantages(np.full((2, 7), reward)) == 0).all()


@given(arrays(np.float64, (3, 4), elements=st.floats(-2, 2)), st.booleans())
def test_a_group_never_sees_the_rewards_of_another(rewards: np.ndarray, std_norm: bool) -> None:
    algorithm = grpo(std_norm=std_norm)
    alone = np.concatenate([algorithm.advantages(row[None]) for row in rewards])
    assert (algorithm.advantages(rewards) == alone).all()


@given(arrays(np.float64, (2, 5), elements=st.floats(-2, 2)))
def test_advantages_of_a_group_sum_to_zero(rewards: np.ndarray) -> None:
    assert grpo().advantages(rewards).sum(axis=1) == pytest.approx(np.zeros(2), abs=1e-5)


# -- loss --
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 1.0, -1.28, 0.0),  # clipped above at 1.28: nothing more to gain
        (1.25, 1.0, -1.25, -1.25),  # inside the wider upper bound, where 0.2 would have cut
        (0.5, 1.0, -0.5, -0.5),  # the non-binding corner
        (0.5, -1.0, 0.8, 0.0),  # clipped below at 0.8
        (1.5, -1.0, 1.5, 1.5),  # the non-binding corner
        (3.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_loss_of_one_token_matches_a_hand_calculation(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    value, sums, grad = loss_of(grpo(), [[ratio]], [advantage])
    assert value == pytest.approx(loss)
    assert grad.item() == pytest.approx(gradient)
    assert sums["pg_loss"].item() == value
    assert "kl_penalty" not in sums


def test_the_correction_scales_a_token_and_gets_no_gradient() -> None:
    value, _, grad = loss_of(grpo(), [[1.0, 1.0]], [1.0], weights=[[2.0, 0.5]])
    assert value == pytest.approx(-1.25)
    assert grad.tolist() == [[pytest.approx(-1.0), pytest.approx(-0.25)]]


def test_the_penalty_is_k3_towards_the_reference() -> None:
    # d = lp_C - lp_ref = ln 2: exp(-d) - 1 + d = ln 2 - 1/2, its slope 1 - exp(-d) = 1/2
    value, sums, grad = loss_of(grpo(kl_coef=0.1), [[1.0]], [0.0], ref=[[-math.log(2)]])
    assert value == pytest.approx(0.1 * (math.log(2) - 0.5))
    assert sums["kl_penalty"].item() == pytest.approx(value)
    assert grad.item() == pytest.approx(0.1 * 0.5)


def test_pg_loss_and_penalty_sum_to_the_loss() -> None:
    value, sums, _ = loss_of(grpo(kl_coef=0.3), [[1.1, 0.7]], [0.5], ref=[[-0.3, 0.2]])
    assert sums["pg_loss"].item() + sums["kl_penalty"].item() == pytest.approx(value)


def test_token_mean_weighs_tokens_alike_and_sequence_mean_weighs_sequences_alike() -> None:
    ratio, mask = [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], [[True, True, True], [False, False, True]]
    assert loss_of(grpo(), ratio, [1.0, -3.0], mask=mask)[0] == pytest.approx((-3 * 1.0 + 3.0) / 4)
    by_sequence = loss_of(grpo(reduction="seq_mean_token_mean"), ratio, [1.0, -3.0], mask=mask)[0]
    assert by_sequence == pytest.approx((-1.0 + 3.0) / 2)


def test_sums_of_tokens_are_divided_by_the_samples_or_also_by_the_longest_response() -> None:
    ratio, mask = [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], [[True, True, True], [False, False, True]]
    summed = loss_of(grpo(reduction="seq_mean_token_sum"), ratio, [1.0, -3.0], mask=mask)[0]
    assert summed == pytest.approx((-3 * 1.0 + 3.0) / 2)
    constant = loss_of(grpo(reduction="constant"), ratio, [2.0, -3.0], mask=mask, max_response=5)[0]
    assert constant == pytest.approx((-3 * 2.0 + 3.0) / (2 * 5))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), cuts=st.sets(st.integers(1, 7)))
def test_any_split_of_the_samples_sums_to_the_same_loss_and_gradient(reduction: str, seed: int, cuts: set[int]) -> None:
    algorithm = grpo(reduction=reduction, kl_coef=0.05)
    random = torch.Generator().manual_seed(seed)
    lp_C, lp_old, lp_ref = (torch.randn(8, 5, generator=random, dtype=torch.float64) * 0.3 - 1 for _ in range(3))
    advantages = torch.randn(8, generator=random, dtype=torch.float64)[:, None].expand(8, 5)
    weights = torch.rand(8, 5, generator=random, dtype=torch.float64)
    mask = torch.rand(8, 5, generator=random) < 0.6
    mask[:, 0] = True

    def run(edges: list[int]) -> tuple[list[float], torch.Tensor]:
        leaf = lp_C.clone().requires_grad_()
        totals = [0.0, 0.0, 0.0]
        for a, b in itertools.pairwise(edges):
            rows = slice(a, b)
            part, sums = algorithm.loss(
                leaf[rows], lp_old[rows], lp_ref[rows], advantages[rows], weights[rows], mask[rows],
                num_tokens=int(mask.sum()), num_samples=8, max_response=5,
            )  # fmt: skip
            part.backward()
            totals = [t + p.item() for t, p in zip(totals, (part, sums["pg_loss"], sums["kl_penalty"]), strict=True)]
        assert leaf.grad is not None
        return totals, leaf.grad

    whole, whole_grad = run([0, 8])
    parts, parts_grad = run([0, *sorted(cuts), 8])
    assert parts == pytest.approx(whole, abs=1e-12)
    torch.testing.assert_close(parts_grad, whole_grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("garbage", [NAN, math.inf, -math.inf, 1e30])
def test_whatever_stands_outside_the_mask_changes_neither_loss_nor_gradient(reduction: str, garbage: float) -> None:
    algorithm = grpo(reduction=reduction, kl_coef=0.1)
    mask = torch.tensor([[False, True, True, False], [False, True, False, False]])

    def run(fill: float) -> tuple[torch.Tensor, torch.Tensor]:
        values = [torch.full((2, 4), fill) for _ in range(4)]
        for k, value in enumerate(values):
            value[mask] = torch.tensor([0.9, 0.5, 0.7]) * (k + 1) / 4
        lp_C = values[0].requires_grad_()
        advantages = torch.tensor([1.0, -1.0])[:, None].expand(2, 4)
        loss, _ = algorithm.loss(lp_C, values[1], values[2], advantages, values[3], mask, 3, 2, 3)
        loss.backward()
        assert lp_C.grad is not None
        return loss.detach(), lp_C.grad

    (clean, clean_grad), (dirty, dirty_grad) = run(0.0), run(garbage)
    assert torch.equal(clean, dirty)
    assert torch.equal(clean_grad, dirty_grad)
    assert (dirty_grad[~mask] == 0).all()
    assert (dirty_grad[mask] != 0).all()


def test_a_token_that_the_correction_removed_contributes_nothing_even_when_its_ratio_overflows() -> None:
    value, _, grad = loss_of(grpo(kl_coef=0.1), [[math.inf, 1.0]], [-1.0], weights=[[0.0, 1.0]], ref=[[NAN, 0.0]])
    assert value == pytest.approx(0.5)  # the removed token still counts in the denominator
    assert grad.tolist() == [[0.0, 0.5]]


# -- config --
def test_one_sample_a_prompt_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"samples_per_prompt: 1 makes every advantage 0 .*; use 2 or more"):
        grpo(samples_per_prompt=1)
    assert grpo(samples_per_prompt=2).samples_per_prompt == 2


@pytest.mark.parametrize(
    "wrong", [{"clip_low": 1.0}, {"clip_low": -0.1}, {"clip_high": 0.0}, {"reduction": "mean"}, {"kl_coef": -1.0}]
)
def test_a_setting_outside_its_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        grpo(**wrong)


# -- the rectangle --
def test_a_batch_lays_groups_out_in_order_with_each_row_s_own_advantage() -> None:
    def sample(prompt: int, index: int, length: int) -> Sample:
        ones = np.full(length, -0.5, np.float32)
        return Sample(prompt, index, np.arange(1, length + 1, dtype=np.int32), ones, version=3, finish="stop")

    groups = [
        Group(Prompt(7, (9, 9), "hg", "x"), (sample(7, 0, 1), sample(7, 1, 3)), np.array([1.0, 0.0])),
        Group(Prompt(8, (9, 9, 9), "hgh", "y"), (sample(8, 0, 2), sample(8, 1, 2)), np.array([0.5, 0.5])),
    ]
    batch = grpo(samples_per_prompt=2).batch(groups, step=5)
    assert batch.tokens_NT.tolist() == [[9, 9, 1, 0, 0], [9, 9, 1, 2, 3], [9, 9, 9, 1, 2], [9, 9, 9, 1, 2]]
    assert batch.mask_NT.sum(axis=1).tolist() == [1, 3, 2, 2]
    assert batch.advantages_N.tolist() == [0.5, -0.5, 0.0, 0.0]
    assert batch.prompt_ids_N.tolist() == [7, 7, 8, 8]
    assert (batch.logprobs_rollout_NT[~batch.mask_NT] == 0).all()
    assert (batch.logprobs_rollout_NT[batch.mask_NT] == -0.5).all()
