"""The default experiment learns in every precision, and not without a learning rate. Over seeds: `make evidence`."""

from __future__ import annotations

import pytest

DEFAULT = (  # what the small runs of the other tests change
    "task.prompts_per_step=16",
    "algorithm.samples_per_prompt=16",
    "rollout.slots=128",
    "eval.prompts=128",
    "eval.samples=4",
    "eval.every=20",
)
STEPS = 40
SAMPLED, GREEDY = "eval/sort_letters/sampled_acc", "eval/sort_letters/greedy_acc"
# Three standard errors of the difference of two accuracies near 0.15, each of 512 answers.
CHANCE = 3 * (2 * 0.15 * 0.85 / 512) ** 0.5


def scores(run, key: str) -> list[float]:
    """By weight version: before the first step, between, after the last."""
    found = {event["version"]: event["metrics"] for event in run.events if event["kind"] == "eval"}
    assert sorted(found) == [0, 20, 40]
    return [found[version][key] for version in sorted(found)]


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4_qat"])
def test_held_out_sampled_accuracy_rises(inline, precision):
    run = inline(*DEFAULT, f"precision={precision}", f"steps={STEPS}")
    sampled = scores(run, SAMPLED)
    assert sampled[0] <= 0.25
    assert sampled[-1] - sampled[0] >= 0.15
    assert set(run.steps("mismatch/logprob_abs_diff_max")) == {0.0}


def test_without_a_learning_rate_nothing_rises(inline):
    run = inline(*DEFAULT, "precision=bf16", f"steps={STEPS}", "trainer.lr=0")
    sampled, rewards = scores(run, SAMPLED), run.steps("reward/correct")
    assert max(sampled) - sampled[0] < CHANCE
    assert len(set(scores(run, GREEDY))) == 1  # the same weights answer the same
    assert sum(rewards[-20:]) / 20 - sum(rewards[:20]) / 20 < CHANCE
    assert min(run.steps("train/grad_norm")) > 0  # the gradient was there
