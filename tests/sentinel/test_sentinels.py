"""Sentinels on lines made by hand: each raises its alarm for what it watches, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpexp import frontend
from lpexp.precision.bands import EXACT, TWO_STACKS, expected
from lpexp.sentinel import K3, MAX, MEAN, SENTINELS, Alarm, Sentinels, band_of

RUN = Path("runs/mine")
MIXED = ("precision=bf16", "precision@rollout.precision=fp8")
HEALTHY = {MEAN: 0.02, MAX: 0.4, K3: 1e-3, "train/entropy": 1.0, "reward/mean": 0.5, "update/kl_k3": 0.0}
HEALTHY |= {"update/clip_frac_low_neg": 0.0, "update/clip_frac_high_pos": 0.0}


def sentinels(*words: str) -> Sentinels:
    return Sentinels(frontend.experiment("cluster=inline", *words), RUN)


def alarms(run: Sentinels, steps: int, value: Callable[[int], dict[str, float]]) -> list[Alarm]:
    return [alarm for step in range(steps) for alarm in run.look({"step": step, **HEALTHY, **value(step)})]


def test_a_healthy_run_raises_no_alarm() -> None:
    rng = np.random.default_rng(0)

    def value(step: int) -> dict[str, float]:
        noise = float(np.exp(0.4 * rng.standard_normal()))
        return {K3: 1e-3 * noise, "train/entropy": 1.5 * 0.97**step, "reward/mean": 0.2 + 0.005 * step}

    assert alarms(sentinels(*MIXED), 100, value) == []


@pytest.mark.parametrize(
    ("words", "line", "first_cause"),
    [
        ((), {MEAN: 1e-3, K3: 1e-6, MAX: 0.01}, "stale or other weights"),  # nothing is quantised
        (("precision=fp8",), {MEAN: 0.05, K3: 1e-3, MAX: 0.4}, "another rule for scales"),
        (("precision=int4_qat",), {MEAN: 0.05, K3: 1e-3, MAX: 0.4}, "wrong group size"),
        (("precision=fp8",), {MEAN: 3.0, K3: 2.0, MAX: 9.0}, "a scale that was not loaded"),
        (MIXED, {MEAN: 0.5, K3: 0.1, MAX: 4.0}, "another rule for scales"),
        (MIXED, {MEAN: 0.0, K3: 0.0, MAX: 0.0}, "a quantiser never ran"),
    ],
)
def test_a_first_batch_out_of_its_band_is_told_with_causes_in_order(words, line, first_cause) -> None:
    (alarm,) = alarms(sentinels(*words), 1, lambda step: line)
    assert alarm.sentinel == "first_step" and alarm.step == 0 and alarm.key == MEAN
    assert alarm.causes[0].startswith(first_cause)
    assert alarm.next == "lpexp attribute runs/mine --step 0"
    for word in (MEAN, alarm.expected, first_cause, alarm.next):
        assert word in str(alarm)


def test_a_matched_pair_must_stay_at_zero_and_tells_once_until_it_is_right_again() -> None:
    run = sentinels("precision=fp8")
    zero = {MEAN: 0.0, MAX: 0.0, K3: 0.0}
    broken = {3, 4, 5, 8}
    found = alarms(run, 10, lambda step: {**zero, **({MAX: 1e-3} if step in broken else {})})
    assert [(alarm.sentinel, alarm.step) for alarm in found] == [("zero", 3), ("zero", 8)]
    assert found[0].causes[0].startswith("stale weights") and found[0].next.endswith("--step 1")


@pytest.mark.parametrize(("second", "rings"), [(2.9e-3, False), (3.1e-3, True), (25e-3, True)])
def test_the_second_step_is_held_against_the_first(second: float, rings: bool) -> None:
    found = alarms(sentinels(*MIXED), 3, lambda step: {K3: 1e-3 if step == 0 else second})
    assert [(alarm.sentinel, alarm.step) for alarm in found] == ([("second_step", 1)] if rings else [])
    if rings:
        assert found[0].causes[0].startswith("stale weights") and found[0].next.endswith("--step 1")


def test_two_tiny_gaps_have_no_ratio() -> None:
    assert alarms(sentinels(*MIXED), 2, lambda step: {K3: 2e-5 if step == 0 else 2.4e-5}) == []
    run = Sentinels(frontend.experiment("cluster=inline", *MIXED), RUN)
    run.band = None
    assert alarms(run, 2, lambda step: {K3: 1e-9 if step == 0 else 1e-7}) == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("drift", {K3: 2.5e-3}),
        ("entropy", {"train/entropy": 1.6}),
        ("entropy", {"train/entropy": 0.2}),
        ("clipping", {"update/clip_frac_low_neg": 0.15}),
        ("clipping", {"update/clip_frac_high_pos": 0.15}),
    ],
)
def test_a_trend_is_told_when_half_of_a_window_has_it_and_points_at_the_step_before(name, change) -> None:
    found = alarms(sentinels(*MIXED), 70, lambda step: change if step >= 45 else {})
    assert [(alarm.sentinel, alarm.step) for alarm in found] == [(name, 55)]  # the median of steps 36 to 55 has turned
    assert found[0].next == "lpexp attribute runs/mine --step 50" and len(found[0].causes) >= 2


def test_a_falling_entropy_is_right_while_the_reward_rises() -> None:
    def value(step: int) -> dict[str, float]:
        return {"train/entropy": 0.2 if step >= 45 else 1.0, "reward/mean": 0.5 if step < 45 else 0.9}

    assert alarms(sentinels(*MIXED), 70, value) == []


def test_a_first_update_that_is_not_the_old_policy_is_told() -> None:
    (alarm,) = alarms(sentinels(*MIXED), 1, lambda step: {"update/kl_k3": 1e-5})
    assert alarm.sentinel == "same_forward"
    assert alarms(sentinels(*MIXED, "algorithm.updates_per_batch=2"), 1, lambda step: {"update/kl_k3": 1e-5}) == []


def test_every_sentinel_has_a_case_here() -> None:
    text = Path(__file__).read_text()
    assert [name for name in SENTINELS if f'"{name}"' not in text] == []


def test_a_resumed_run_goes_on_where_it_was() -> None:
    def line(step: int) -> dict[str, Any]:
        return {"step": step, **HEALTHY, **({K3: 2.5e-3} if step >= 45 else {})}

    exp = frontend.experiment("cluster=inline", *MIXED)
    for cut in (1, 30, 55, 56, 60):
        resumed = Sentinels(exp, RUN, [line(step) for step in range(cut)])
        found = [alarm.step for step in range(cut, 70) for alarm in resumed.look(line(step))]
        assert found == ([55] if cut <= 55 else [])


# -- bands -------------------------------------------------------------------------------------------------------------


def band(*words: str, exact: bool = True):
    exp = frontend.experiment(*words)
    model = exp.model.sized()
    return expected(exp.precision, exp.wire, list(model.params()), model.moe is not None, exact)


def test_equal_sides_are_exact_and_two_stacks_are_not() -> None:
    for precision in ("fp32", "bf16", "fp8", "int4_qat"):
        assert band(f"precision={precision}") == EXACT
        assert band(f"precision={precision}", exact=False) == TWO_STACKS


@pytest.mark.parametrize(
    "words",
    [
        MIXED,
        ("precision=fp8", "precision@rollout.precision=bf16"),
        ("precision=bf16", "precision@rollout.precision=int4_qat"),
        ("precision=fp8", "precision@rollout.precision=int4_qat"),
        ("precision=int4_qat", "precision.group_size=32", "precision@rollout.precision=int4_qat"),
        ("precision=fp32", "precision@rollout.precision=bf16"),
        ("precision=bf16", "precision@rollout.precision=w8a16"),
        ("precision=bf16", "precision@rollout.precision=fp8_channel"),
        ("precision=bf16", "precision@rollout.precision=fp8_tensor"),
    ],
)
def test_every_mixed_pair_has_a_band_that_leaves_out_zero(words) -> None:
    found, loose = band(*words), band(*words, exact=False)
    assert found is not None and loose is not None
    for (low, high), (_, more) in zip(found, loose, strict=True):
        assert 0 < low < high < more


def test_a_scope_that_differs_in_one_module_may_differ_by_little() -> None:
    words = ("precision=fp8", "precision@rollout.precision=fp8", "rollout.precision.scope=[attn_qkv,mlp_up,mlp_down]")
    found, whole = band(*words), band(*MIXED)
    assert found is not None and whole is not None
    assert 0 < found.abs_mean[0] < whole.abs_mean[0] / 100


def test_only_backends_that_compute_alike_are_held_to_zero(monkeypatch) -> None:
    exp = frontend.experiment("cluster=inline")
    assert band_of(exp) == EXACT
    monkeypatch.setattr(type(exp.rollout), "arithmetic", "another")
    assert band_of(exp) == TWO_STACKS


def test_an_experiment_may_say_its_own_band() -> None:
    run = sentinels(*MIXED, "band={abs_mean: [0.1, 0.3], kl_k3: [0.01, 0.2]}")
    assert [alarm.sentinel for alarm in alarms(run, 1, lambda step: {MEAN: 0.02})] == ["first_step"]
    again = sentinels(*MIXED, "band={abs_mean: [0.1, 0.3], kl_k3: [0.01, 0.2]}")
    assert alarms(again, 1, lambda step: {MEAN: 0.2, K3: 0.05}) == []
