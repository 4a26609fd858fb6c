"""Alarms in the journal of a run: an event, a warning, a row of the summary; with on_alarm=stop the end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpexp import journal
from lpexp.errors import RunError
from lpexp.experiment import Experiment
from lpexp.log import Log


@pytest.fixture
def log(experiment: Callable[..., Experiment], tmp_path: Path) -> Callable[..., Log]:
    return lambda *words: Log(experiment("steps=3", *words), tmp_path / "run", 0, [], "0123456789abcdef")


def told(log: Log) -> list[dict[str, Any]]:
    return [event for event in journal.read(log.run_dir / journal.EVENTS) if event["kind"] == "alarm"]


def test_an_alarm_is_an_event_and_a_warning_and_the_run_goes_on(log, made_up, capsys) -> None:
    run = log()
    made_up.feed(run, range(3))
    (alarm,) = told(run)[:1]
    assert alarm["sentinel"] == "first_step" and alarm["step"] == 0 and alarm["causes"] and "attribute" in alarm["next"]
    assert "warning: alarm first_step at step 0" in capsys.readouterr().out
    summary = run.summary()
    assert summary["alarms"][0]["sentinel"] == "first_step"
    assert "alarms" in capsys.readouterr().out
    run.close()


def test_on_alarm_stop_ends_the_run_after_the_line_is_written(log, made_up) -> None:
    run = log("on_alarm=stop")
    with pytest.raises(RunError, match=r"stopped by on_alarm=stop at step 0, sentinel first_step.*on_alarm=warn"):
        made_up.feed(run, range(3))
    assert [line["step"] for line in journal.read(run.run_dir / journal.METRICS)] == [0]
    assert len(told(run)) == 1
    run.close()


def test_a_log_probability_that_is_not_finite_is_told_before_it_ends_the_run(log, made_up) -> None:
    run, report = log(), made_up.learned(0, 0.01)
    lp_T = report.lp_T.copy()
    lp_T[2, 4] = np.nan
    broken = dataclasses.replace(report, lp_T=lp_T)
    run.sync(made_up.published(0))
    with pytest.raises(RunError, match="nonfinite_count = 1"), run.step(0) as note:
        note.learn(broken)
    (alarm,) = told(run)
    assert alarm["sentinel"] == "nonfinite" and alarm["value"] == 1
    assert alarm["causes"][0] == "the trainer computed 1 of them"
    assert json.dumps(alarm)
    run.close()
