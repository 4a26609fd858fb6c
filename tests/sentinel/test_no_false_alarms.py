"""Healthy runs of full length raise no alarm: ten seeds of each matched pair, and of a mixed one."""

from __future__ import annotations

import pytest

from tests.loop.conftest import compose

PAIRS = {
    "fp32": ("precision=fp32",),
    "bf16": ("precision=bf16",),
    "fp8": ("precision=fp8",),
    "int4_qat": ("precision=int4_qat",),
    "bf16-fp8": ("precision=bf16", "precision@rollout.precision=fp8"),
}
SMALL_EVALUATIONS = ("eval.every=100", "eval.prompts=8", "eval.samples=2", "eval.show=0", "wandb.mode=disabled")


@pytest.mark.evidence
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("pair", PAIRS)
def test_a_healthy_run_of_full_length_raises_no_alarm(tmp_path, pair: str, seed: int) -> None:
    from lpexp import journal
    from lpexp.loop import run

    words = (*PAIRS[pair], f"seed={seed}", "cluster=inline", *SMALL_EVALUATIONS, f"output_dir={tmp_path / 'run'}")
    exp = compose(*words)
    assert exp.steps == 100 and run(exp, words) == 0
    events = journal.read(tmp_path / "run" / journal.EVENTS)
    assert [event for event in events if event["kind"] == "alarm"] == []
