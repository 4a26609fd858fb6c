"""Routing replay: the trainer uses the experts that the rollout chose; a matched pair stays exactly zero."""

from __future__ import annotations

from statistics import mean

import numpy as np
import pytest

from lpexp import record
from lpexp.errors import ConfigError, RunError

MAX, K3 = "mismatch/logprob_abs_diff_max", "mismatch/kl_k3"
DIFFER = "routing/disagreement_frac"
MOE = ("task.warmup=null", "rollout.slots=24")
MIXED = ("model=qwen3_moe_tiny", "precision=bf16", "precision@rollout.precision=fp8", "steps=4", "trainer.lr=1e-3")
REPLAY = "trainer.routing_replay=true"


@pytest.mark.parametrize("model", ["qwen3_moe_tiny", "deepseek_tiny"])
@pytest.mark.parametrize("lag", [0, 1])
def test_with_replay_a_matched_pair_is_still_exactly_zero(inline, model, lag):
    words = ("precision=fp8", f"model={model}", f"lag={lag}", "steps=4", "algorithm.updates_per_batch=2", *MOE)
    run = inline(*words, REPLAY)
    assert run.steps(MAX) == [0.0] * 4
    assert run.steps(DIFFER) == [0.0] * 4
    assert run.steps("routing/replayed_frac") == [1.0] * 4
    assert run.steps("routing/replay_missing_count") == [0] * 4


def test_replay_closes_the_part_of_a_mixed_gap_that_flipped_experts_made(inline):
    """The same weights and, in the first step, the same samples: only the trainer's routing is another."""
    free, bound = inline(*MIXED, *MOE), inline(*MIXED, *MOE, REPLAY, name="replay")
    assert min(free.steps(DIFFER)) > 0 and min(bound.steps(DIFFER)) > 0
    assert free.steps("routing/replayed_frac") == [0.0] * 4
    assert "routing/replay_missing_count" not in free.rows[0]
    assert bound.steps(K3)[0] < free.steps(K3)[0]
    assert mean(bound.steps(K3)) < mean(free.steps(K3))
    assert min(free.steps("routing/margin_p05")) > 0


def test_the_disagreement_is_that_of_the_recorded_sets(inline, monkeypatch):
    """A rollout that says it chose other experts than it used: every pair differs, and replay follows what it said."""
    from lpexp.rollout import embedded

    honest = embedded.Generation._sample

    def shifted(self, one):
        made = honest(self, one)
        object.__setattr__(made, "experts", ((made.experts + 1) % 8).astype(np.int16))
        return made

    words = ("model=qwen3_moe_tiny", "precision=bf16", "steps=1", *MOE)
    assert inline(*words).steps(DIFFER) == [0.0]
    monkeypatch.setattr(embedded.Generation, "_sample", shifted)
    told = inline(*words, name="told")
    assert 0.5 < told.steps(DIFFER)[0] <= 1 and told.steps(MAX) == [0.0]
    followed = inline(*words, REPLAY, name="followed")
    assert followed.steps(MAX)[0] > 0.01
    worst = followed.rows[0]["mismatch/worst_tokens"][0]
    assert worst["router_flips"] in (1, 2)


def test_a_choice_that_is_missing_is_counted_and_the_rows_own_is_used(inline, monkeypatch):
    from lpexp.rollout import embedded

    honest = embedded.Generation._sample

    def forgetful(self, one):
        made = honest(self, one)
        if len(one.tokens) > 1:  # of a longer answer the last row is its own, not the prompt's that all answers share
            experts = made.experts.copy()
            experts[-1] = -1
            object.__setattr__(made, "experts", experts)
        return made

    monkeypatch.setattr(embedded.Generation, "_sample", forgetful)
    run = inline("model=qwen3_moe_tiny", "precision=bf16", "steps=1", *MOE, REPLAY)
    batch, _ = record.load(run.directory / "record" / "000000.safetensors")
    longer, layers = int((batch.mask_NT.sum(1) > 1).sum()), 2
    assert longer > 0 and run.steps("routing/replay_missing_count") == [longer * layers]
    assert run.steps(MAX) == [0.0]  # what it chose itself is what the rollout had chosen


def test_replay_without_recorded_experts_ends_the_run(inline, monkeypatch):
    from lpexp.rollout import embedded

    honest = embedded.Generation._sample

    def silent(self, one):
        one.routes = []
        return honest(self, one)

    monkeypatch.setattr(embedded.Generation, "_sample", silent)
    words = ("model=qwen3_moe_tiny", "precision=bf16", "steps=1", *MOE)
    assert DIFFER not in inline(*words).rows[0]
    with pytest.raises(RunError, match=r"trainer.routing_replay is on, but the rollout returned no experts"):
        inline(*words, REPLAY, name="replay")


def test_a_dense_model_refuses_replay():
    from lpexp import frontend

    with pytest.raises(ConfigError, match=r"trainer.routing_replay: true, but qwen3_tiny has no experts"):
        frontend.experiment(REPLAY)


def test_the_record_holds_the_choices_of_every_sampled_row(inline):
    run = inline("model=qwen3_moe_tiny", "precision=bf16", "steps=1", *MOE)
    batch, _ = record.load(run.directory / "record" / "000000.safetensors")
    assert batch.experts is not None
    rows, columns = np.nonzero(batch.mask_NT)
    assert (batch.experts[rows, columns - 1] >= 0).all()
