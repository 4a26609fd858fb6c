"""The metric dictionary: complete, unambiguous, and told apart by what may change between equal runs."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lpexp.algorithm import Clipped
from lpexp.correction import EARLY, LATE, Weighed
from lpexp.metric import METRICS, find, is_volatile
from lpexp.metric.correction import correction_metrics
from lpexp.metric.learn import learn_metrics
from lpexp.metric.mismatch import mismatch_metrics
from lpexp.metric.reward import eval_metrics, response_metrics, reward_metrics

PARTS = (*EARLY, *LATE, "outside")


def test_every_key_that_is_computed_is_in_the_dictionary(random_report, group) -> None:
    made = random_report()
    batch = made.batch
    made.more.update(values=made.lp_T, returns=made.lp_P + made.entropy)
    none = np.zeros_like(batch.mask_NT)
    weighed = Weighed(made.weights, none, none, none, dict.fromkeys(PARTS, none), 1.0)  # type: ignore[arg-type]
    keys = [
        *mismatch_metrics(made.lp_T, batch.logprobs_rollout_NT, batch.mask_NT, made.entropy),
        *correction_metrics(weighed, made.lp_T, batch.logprobs_rollout_NT, batch.mask_NT, batch.rewards_N),
        *learn_metrics(made, Clipped(none, none, none)),  # type: ignore[arg-type]
        *reward_metrics([group([1, 0])]),
        *response_metrics([group([1, 0])]),
        *eval_metrics("held_out", [group([1])], [group([1, 0])]),
    ]
    assert [key for key in keys if find(key) is None] == []


def test_each_entry_is_complete_and_appears_once() -> None:
    assert len({metric.key for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.formula and metric.unit and metric.text.endswith((".", ";")), metric.key
        assert metric.aggregation in ("T", "S", "X", "Q", "N", "F", "-"), metric.key
        assert "\n" not in metric.text and re.fullmatch(r"[a-z0-9_/<>]+", metric.key), metric.key


def test_a_pattern_takes_one_part_and_a_written_key_goes_first() -> None:
    assert find("reward/mean").text.startswith("Over all")  # type: ignore[union-attr]
    assert find("reward/format").key == "reward/<component>"  # type: ignore[union-attr]
    assert find("staleness/hist_12").key == "staleness/hist_<k>"  # type: ignore[union-attr]
    assert find("eval/held_out/greedy_acc") is not None
    for unknown in ("eval/a/b/greedy_acc", "reward/a/b", "mismatch/kl", "mismatch/by_prob//kl_k3", "timex/step", ""):
        assert find(unknown) is None, unknown


@pytest.mark.parametrize("key", ["time/step", "sync/seconds", "memory/host_rss_bytes", "throughput/samples_per_s"])
def test_what_a_clock_or_a_machine_decides_is_volatile(key: str) -> None:
    assert is_volatile(key)


def test_only_times_speeds_and_memory_are_volatile() -> None:
    volatile = {metric.key for metric in METRICS if metric.volatile}
    assert {key.split("/")[0] for key in volatile} == {"time", "throughput", "memory", "sync"}
    assert {key for key in volatile if key.startswith("sync/")} == {
        "sync/seconds",
        "sync/quantize_seconds",
        "sync/transfer_seconds",
        "sync/load_seconds",
    }
    assert not is_volatile("train/loss") and not is_volatile("no/such/key")
