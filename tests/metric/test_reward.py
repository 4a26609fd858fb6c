"""reward/*, response/*, eval/*, sync/* and quant/*: by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from lpexp.data import SyncReport
from lpexp.errors import RunError
from lpexp.metric.reward import eval_answers, eval_metrics, pass_at_k, response_metrics, reward_metrics
from lpexp.metric.sync import sync_metrics


def test_reward_metrics_are_over_samples_and_group_metrics_over_groups(group) -> None:
    found = reward_metrics([group([1, 1]), group([0, 0]), group([1, 0]), group([0.5, 0.5], errors=2)])
    assert found == pytest.approx(
        {
            "reward/mean": 0.5,
            "reward/std": math.sqrt(4 * 0.25 / 8 + 2 * 0.25 / 8),
            "reward/min": 0.0,
            "reward/max": 1.0,
            "reward/group_std_mean": 0.125,
            "reward/zero_std_group_frac": 0.75,
            "reward/all_correct_group_frac": 0.25,
            "reward/all_wrong_group_frac": 0.25,
            "reward/errors": 2,
            "reward/correct": 3 / 8,
        }
    )


def test_aborted_samples_count_for_no_reward_but_are_told(group) -> None:
    groups = [group([1, 0, 0], finish=["stop", "abort", "length"]), group([0], finish=["abort"])]
    assert reward_metrics(groups)["reward/mean"] == 0.5
    found = response_metrics(groups)
    assert found["response/aborted_frac"] == 0.5 and found["response/truncated_frac"] == 0.25
    with pytest.raises(RunError, match="no sample of the step finished"):
        reward_metrics(groups[1:])


def test_a_reward_part_may_not_take_the_name_of_a_key(group) -> None:
    scored = group([1, 0])
    scored.parts["mean"] = np.zeros(2)
    with pytest.raises(RunError, match="'mean'"):
        reward_metrics([scored])


def test_response_lengths_count_tokens_of_all_samples(group) -> None:
    found = response_metrics([group([0, 0, 0], lengths=[0, 1, 2]), group([0, 0], lengths=[3, 9])])
    assert found["response/length_mean"] == 3.0
    assert found["response/length_p50"] == 2.0
    assert found["response/length_p95"] == pytest.approx(3 + 0.8 * 6)
    assert found["response/length_max"] == 9
    assert found["response/empty_frac"] == pytest.approx(0.2)


def test_repetition_is_a_share_of_four_grams_above_three_tenths(group) -> None:
    same, fresh = [5] * 8, list(range(8))  # 5 four-grams: one kind; all kinds
    just = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6]  # 10 four-grams, three seen before: not above 0.3
    short = [5, 5, 5]  # has none
    found = response_metrics([group([0] * 4, tokens=[same, fresh, just, short])])
    assert found["response/repetition_frac"] == 0.25


def test_pass_at_k_is_the_share_of_draws_of_k_that_hold_a_right_answer() -> None:
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws)), (n, c, k)


def test_evaluation_keeps_greedy_and_sampled_apart(group) -> None:
    greedy = [group([1]), group([0]), group([0]), group([0])]
    sampled = [group([1, 0]), group([0, 0]), group([0.6, 0.6], correct=[0, 0]), group([1, 1])]
    assert eval_metrics("held_out", greedy, sampled) == pytest.approx(
        {
            "eval/held_out/greedy_acc": 0.25,
            "eval/held_out/sampled_acc": 3 / 8,
            "eval/held_out/pass_at_k": 0.5,
            "eval/held_out/mean_reward": 4.2 / 8,
        }
    )
    with pytest.raises(RunError, match="no held-out prompt"):
        eval_metrics("held_out", [], sampled)


def test_an_evaluation_tells_of_each_prompt_how_many_answers_were_right(group) -> None:
    greedy, sampled = [group([1]), group([0])], [group([1, 0, 1]), group([0, 0, 0])]
    told = eval_answers(greedy, sampled)
    assert (told["correct"], told["answers"], told["greedy"]) == ([2, 0], 3, [1, 0])
    other = [dataclasses.replace(one, prompt=dataclasses.replace(one.prompt, text="else")) for one in sampled]
    assert eval_answers(greedy, other)["prompts"] != told["prompts"] == eval_answers(greedy, sampled)["prompts"]


def synced(**more: object) -> SyncReport:
    fields = {
        "version": 4,
        "bytes": 1000,
        "seconds": {"quantize": 1.0, "transfer": 2.0, "load": 3.0, "sync": 6.5},
        "checksum_sent": "abc",
        "checksums_held": ("abc", "abc"),
        "quantized_param_frac": 0.75,
        "quant": {"mlp_up": {"rel_error": 0.1, "sqnr_db": 20.0}},
    }
    return SyncReport(**(fields | more))  # type: ignore[arg-type]


def test_a_sync_says_what_was_sent_and_what_it_took() -> None:
    assert sync_metrics(synced(), previous=3) == {
        "sync/version": 4,
        "sync/seconds": 6.5,
        "sync/quantize_seconds": 1.0,
        "sync/transfer_seconds": 2.0,
        "sync/load_seconds": 3.0,
        "sync/bytes": 1000,
        "sync/quantized_param_frac": 0.75,
        "sync/checksum_ok": 1,
        "quant/mlp_up/rel_error": 0.1,
        "quant/mlp_up/sqnr_db": 20.0,
    }


@pytest.mark.parametrize(
    ("more", "previous", "said"),
    [
        ({"checksums_held": ("abc", "abd")}, 3, "checksum_ok = 0: engine 1 holds abd"),
        ({"checksums_held": ()}, 3, "no engine reported"),
        ({}, 4, "4 follows 4"),
        ({}, 2, "4 follows 2"),
    ],
)
def test_a_sync_that_went_wrong_stops_the_run(more: dict[str, object], previous: int, said: str) -> None:
    with pytest.raises(RunError, match=said):
        sync_metrics(synced(**more), previous)


def test_a_lossless_class_has_no_infinite_decibels() -> None:
    found = sync_metrics(synced(quant={"mlp_up": {"rel_error": 0.0, "sqnr_db": math.inf}}))
    assert found["quant/mlp_up/rel_error"] == 0.0 and "quant/mlp_up/sqnr_db" not in found
