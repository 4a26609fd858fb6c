"""Whole runs of `python launch.py trainer=megatron`: they learn, resume, and say who died."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lpexp import export
from lpexp.model import hf
from tests.loop.conftest import Ran
from tests.loop.test_faults import Live, same
from tests.loop.test_learning import DEFAULT, SAMPLED, STEPS, scores

pytestmark = pytest.mark.timeout(900)
RUN = ("trainer=megatron", "trainer.tp=2", "rollout.engines=1", "steps=6", "checkpoint.every=2", "eval.every=6")


WAIT_S = 400  # a megatron-core process takes a while to start


def finish(live: Live) -> None:
    assert live.end(WAIT_S) == 0, live.said


def test_held_out_accuracy_on_the_default_task_rises_without_mismatch(tmp_path: Path) -> None:
    """What tests/loop/test_learning.py asks of the embedded trainer."""
    live = Live(tmp_path / "run", "trainer=megatron", "cluster=inline", *DEFAULT, f"steps={STEPS}")
    finish(live)
    run = Ran(0, live.directory)
    sampled = scores(run, SAMPLED)
    assert sampled[0] <= 0.25 and sampled[-1] - sampled[0] >= 0.15
    assert set(run.steps("mismatch/logprob_abs_diff_max")) == {0.0}  # on one rank


def test_a_killed_rank_is_named_nothing_is_left_and_the_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole = Live(tmp_path / "whole", *RUN, "task.warmup=null")
    finish(whole)
    live = Live(tmp_path / "run", *RUN, "task.warmup=null")
    live.until(4, WAIT_S)
    os.kill(live.pid("trainer-1"), signal.SIGKILL)
    assert live.end(WAIT_S) == 1
    live.assert_nothing_is_left()
    assert "trainer-1 died during" in live.said and "resume=auto" in live.said and "Traceback" not in live.said
    finish(Live(live.directory, *RUN, "task.warmup=null", "resume=auto"))
    assert same(tmp_path / "whole", live.directory)


def test_a_checkpoint_is_exported_as_the_embedded_trainers_is_and_resumed_under_another_layout(tmp_path: Path) -> None:
    words = ("model=deepseek_tiny", "task.warmup=null", "rollout.engines=1", "eval.every=9", "precision=int4_qat")
    small = ("trainer=megatron", "trainer.ep=2", "trainer.tp=2", *words, "precision.group_size=32")
    finish(Live(tmp_path / "run", *small, "steps=1"))
    found = export.saved(tmp_path / "run")
    export.export(found, found.precision, tmp_path / "out")
    _, precision, parts = hf.load(tmp_path / "out")
    assert precision == found.precision and len(parts) == len(list(found.model.params()))
    other = Live(
        tmp_path / "run", *small[:1], "trainer.pp=2", *small[3:], "steps=2", "resume=auto", "resume_force=true"
    )
    finish(other)
    assert "trainer.tp: 2 -> 1" in other.said
    assert len(Ran(0, other.directory).steps("train/loss")) == 2
