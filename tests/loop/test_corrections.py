"""Corrections on a mixed pair: what is logged is what the loss used, and the diagnostics do not depend on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lpexp import record
from lpexp.correction import Gap
from lpexp.errors import RunError
from tests.loop.conftest import compose

MIXED = ("precision=bf16", "precision@rollout.precision=int4_qat")
COMBINED = (
    "correction=[tis_sequence,reject_k1,veto,seq_error,opsm,dppo]",
    "correction.seq_error.error_max=1.3",
    "correction.veto.ratio_min=0.4",
    "correction.opsm.delta=1e-3",
    "correction.dppo.prob_up=0.05",
    "correction.dppo.prob_down=0.05",
    "correction.importance.ratio_max=1.5",
    "correction.batch_normalise=true",
    "trainer.lr=1e-2",
)


def stored(directory: Path, step: int):
    return record.load(directory / record.FOLDER / f"{step:06d}.safetensors")


@pytest.mark.parametrize("lag", [0, 1])
def test_every_part_acts_and_what_is_logged_is_what_the_loss_used(inline, lag: int) -> None:
    words = (*MIXED, *COMBINED, f"lag={lag}", "algorithm.updates_per_batch=2", "steps=2")
    run, correction = inline(*words), compose(*words).correction
    for step, row in enumerate(run.rows):
        batch, arrays = stored(run.directory, step)
        gap = Gap.of(batch, arrays)
        weighed = correction.weigh(gap, correction.norm(gap))
        np.testing.assert_allclose(weighed.weights.numpy(), arrays["weights"], rtol=1e-6)
        assert row["correction/norm_factor"] == pytest.approx(correction.norm(gap), rel=1e-6)
        weights = arrays["weights"][batch.mask_NT].astype(np.float64)
        assert row["correction/weight_mean"] == pytest.approx(weights.mean(), rel=1e-6)
        assert row["correction/ess"] == pytest.approx(weights.mean() ** 2 / (weights**2).mean(), rel=1e-5)
        assert row["correction/masked_token_frac"] == pytest.approx((weights == 0).mean())
    for part in ("clip", "veto", "seq_error", "reject", "opsm", "dppo"):
        assert max(run.steps(f"correction/{part}_frac")) > 0, part


def test_the_diagnostics_of_a_batch_do_not_depend_on_the_correction(inline) -> None:
    """The same first batch, whatever is done about it."""
    cards: dict[str, tuple[str, ...]] = {name: (f"correction={name}",) for name in ("none", "icepop", "mis_sequence")}
    cards["observed"] = ("correction=icepop", "correction.observe=true")
    rows = {name: inline(*MIXED, *words, "steps=1", name=name).rows[0] for name, words in cards.items()}
    spaces = ("mismatch/", "staleness/", "offpolicy/", "reward/", "response/", "train/entropy")
    told = {name: {k: v for k, v in row.items() if k.startswith(spaces)} for name, row in rows.items()}
    for table in told.values():  # the table's last column is the weight itself
        for token in table["mismatch/worst_tokens"]:
            token.pop("weight")
    assert told["none"] == told["icepop"] == told["mis_sequence"] == told["observed"]
    assert told["none"]["mismatch/logprob_abs_diff_max"] > 0
    assert rows["icepop"]["train/grad_norm"] != rows["none"]["train/grad_norm"]
    assert rows["mis_sequence"]["train/grad_norm"] != rows["none"]["train/grad_norm"]


def test_an_observed_correction_trains_as_none_and_tells_what_it_would_have_done(inline) -> None:
    icepop = ("correction=icepop", "correction.importance.ratio_min=0.9")
    none = inline(*MIXED, "correction=none", "steps=2", name="none")
    observed = inline(*MIXED, *icepop, "correction.observe=true", "steps=2", name="observed")
    active = inline(*MIXED, *icepop, "steps=2", name="active")
    for key in ("train/grad_norm", "train/param_norm", "update/ratio_mean"):
        assert observed.steps(key) == none.steps(key) != active.steps(key)
    ours = {k: v for k, v in observed.rows[0].items() if k.startswith("correction/")}
    assert ours == {k: v for k, v in active.rows[0].items() if k.startswith("correction/")}
    assert ours["correction/outside_frac"] > 0 == none.rows[0]["correction/masked_token_frac"]


def test_a_correction_that_removes_every_token_stops_the_run_and_says_how_to_look(inline) -> None:
    words = ("correction=mis_geometric", "correction.importance.ratio_min=1", "correction.importance.ratio_max=1")
    with pytest.raises(RunError, match=r"removed every token of the batch.*correction\.observe=true"):
        inline(*MIXED, *words, "steps=1")
