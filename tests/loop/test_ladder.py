"""Different precisions on the two sides: the mismatch is where it was measured before, and everybody is told.

Bands are two-sided: a mixed pair far below its band would mean that the quantiser never ran. The INT4 bands are those
of groups of 32; the default groups of 128 are coarser, so a first batch of theirs is held to wider ones.
Matched pairs are exactly 0: test_zero_baseline.py and test_learning.py. Whole runs over seeds: `make evidence`.
"""

from __future__ import annotations

import json
from statistics import mean

import pytest

KEYS = ("mismatch/logprob_abs_diff_mean", "mismatch/kl_k3", "mismatch/mult_prob_error")
FULL = ("task.prompts_per_step=16", "algorithm.samples_per_prompt=16", "rollout.slots=128")
FP8_ROLLOUT = ("precision=bf16", "precision@rollout.precision=fp8")
INT4_ROLLOUT = ("precision=bf16", "precision@rollout.precision=int4_qat")
INT4_TRAINER = ("precision=int4_qat", "precision@rollout.precision=bf16")
# mean |d|, k3, mean exp|d|
FP8_LADDER = ((0.008, 0.03), (0.0005, 0.005), (1.008, 1.04))
INT4_LADDER = ((0.02, 0.07), (0.003, 0.02), (1.02, 1.09))
FP8_FIRST = ((0.005, 0.05), (0.0001, 0.005))
INT4_FIRST = ((0.02, 0.1), (0.002, 0.03))


def gaps(run, steps: int) -> list[float]:
    assert run.code == 0
    return [mean(values) for values in (run.steps(key) for key in KEYS) if len(values) == steps]


def inside(values: list[float], bands) -> bool:
    return all(low <= value <= high for value, (low, high) in zip(values, bands, strict=True))


@pytest.mark.parametrize(
    ("words", "bands"),
    [
        (FP8_ROLLOUT, FP8_LADDER),
        ((*INT4_ROLLOUT, "rollout.precision.group_size=32"), INT4_LADDER),
        ((*INT4_TRAINER, "precision.group_size=32"), INT4_LADDER),
    ],
    ids=["bf16-fp8", "bf16-int4", "int4_qat-bf16"],
)
def test_a_mixed_pair_falls_in_its_band_of_the_ladder(inline, words, bands):
    run = inline(*FULL, *words, "steps=8")
    found = gaps(run, 8)
    assert inside(found, bands), found


@pytest.mark.parametrize(
    ("words", "bands", "trainer", "rollout"),
    [
        (FP8_ROLLOUT, FP8_FIRST, "bf16, nothing quantised", "fp8, quantises 14 of 25 tensors"),
        (INT4_ROLLOUT, INT4_FIRST, "bf16, nothing quantised", "int4_qat, quantises 14 of 25 tensors"),
        (INT4_TRAINER, INT4_FIRST, "int4_qat, quantises 14 of 25 tensors", "bf16, nothing quantised"),
    ],
    ids=["bf16-fp8", "bf16-int4", "int4_qat-bf16"],
)
def test_the_default_models_first_batch_is_in_band_and_both_sides_are_named(
    inline, capsys, words, bands, trainer, rollout
):
    run = inline(*FULL, *words, "steps=1")
    found = gaps(run, 1)
    assert inside(found[:2], bands), found
    header, _, end = capsys.readouterr().out.partition("step 1/1")
    for text in (header, end):
        lines = [line.split(maxsplit=1) for line in text.splitlines()]
        for word, side in (("trainer", trainer), ("rollout", rollout)):
            said = next(line[1] for line in lines if line[:1] == [word])
            assert said.startswith(side)
    summary = json.loads((run.directory / "summary.json").read_text())
    assert summary["trainer"].startswith(trainer) and summary["rollout"].startswith(rollout)


def test_a_quantiser_that_never_ran_is_outside_every_band(inline):
    found = gaps(inline("precision=bf16", "steps=1"), 1)
    assert found == [0.0, 0.0, 1.0]
    assert not inside(found, FP8_LADDER) and not inside(found, INT4_LADDER)
    assert not inside(found[:2], FP8_FIRST) and not inside(found[:2], INT4_FIRST)
