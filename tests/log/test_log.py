"""The journal of a run: one line a step whatever happens, and everything else that its directory holds."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lpexp import journal
from lpexp.errors import ConfigError, RunError
from lpexp.log import Log
from lpexp.metric import find


@pytest.fixture
def log(experiment, tmp_path: Path) -> Log:
    return Log(experiment("steps=6"), tmp_path / "run", 0, ["steps=6"], "0123456789abcdef")


def lines(log: Log) -> list[dict]:
    return journal.read(log.run_dir / "metrics.jsonl")


def events(log: Log, kind: str) -> list[dict]:
    return [event for event in journal.read(log.run_dir / "events.jsonl") if event["kind"] == kind]


def test_every_logged_key_is_in_the_dictionary_and_each_step_is_one_line(ran) -> None:
    written = journal.read(ran() / "metrics.jsonl")
    assert [line["step"] for line in written] == [0, 1, 2]
    assert [key for line in written for key in line if key != "step" and find(key) is None] == []
    spaces = {key.split("/")[0] for key in written[0]}
    assert spaces >= {"mismatch", "staleness", "offpolicy", "correction", "update", "train", "reward", "response"}
    assert spaces >= {"eval", "sync", "quant", "time", "throughput", "memory"}


def test_a_run_directory_says_what_ran(ran, experiment) -> None:
    run_dir = ran("run", "seed=7", "wandb.tags=[a,b]")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config == json.loads(json.dumps(experiment("seed=7", "wandb.tags=[a,b]").dump()))
    assert yaml.safe_load((run_dir / "overrides.yaml").read_text()) == ["seed=7", "wandb.tags=[a,b]"]
    assert (run_dir / "contract.txt").read_text() == "0123456789abcdef\n"
    versions = json.loads((run_dir / "versions.json").read_text())
    assert versions["torch"].startswith("2.") and versions["python"].startswith("3.") and "ray" in versions
    hardware = json.loads((run_dir / "hardware.json").read_text())
    assert hardware["cpu_bf16_units"] in (None, "AMX")
    assert hardware["cores"] >= 1 and hardware["memory_bytes"] > 1e9
    assert journal.read(run_dir / "events.jsonl")[0]["kind"] == "start"


def test_a_step_that_raises_leaves_no_line(log: Log, made_up) -> None:
    made_up.feed(log, range(1))
    with pytest.raises(ZeroDivisionError), log.step(1) as note:
        note.rollout(made_up.groups(1), 0.5)
        raise ZeroDivisionError
    assert [line["step"] for line in lines(log)] == [0]


def test_a_metric_that_is_not_finite_stops_the_run_and_names_its_key(log: Log, made_up) -> None:
    report = made_up.learned(0, 0.01)
    report.scalars["train/loss"] = math.nan
    with pytest.raises(RunError, match="step 0: train/loss is nan"), log.step(0) as note:
        note.learn(report)
    assert lines(log) == []


def test_a_key_that_the_dictionary_lacks_or_that_is_noted_twice_is_refused(log: Log, made_up) -> None:
    report = made_up.learned(0, 0.01)
    report.scalars["train/speed_of_light"] = 3e8
    with pytest.raises(AssertionError, match="train/speed_of_light"), log.step(0) as note:
        note.learn(report)
    with pytest.raises(AssertionError, match="twice"), log.step(0) as note:
        note.rollout(made_up.groups(0), 0.5)
        note.rollout(made_up.groups(0), 0.5)
    with pytest.raises(AssertionError, match="time/lunch"), log.step(0) as note, note.time("lunch"):
        pass


def test_times_of_the_parts_sum_to_the_step_and_inner_parts_count_once(log: Log, made_up) -> None:
    with log.step(0) as note:
        with note.time("learn"):
            time.sleep(0.05)
            with note.time("reward"):
                time.sleep(0.03)
        report = made_up.learned(0, 0.0)
        report.seconds.update(recompute=0.02, optimizer=0.01)
        note.learn(report)
        time.sleep(0.02)
    line = lines(log)[0]
    parts = ("reward", "recompute", "learn", "unaccounted")
    assert sum(line[f"time/{part}"] for part in parts) == pytest.approx(line["time/step"], abs=1e-12)
    assert {key for key in line if key.startswith("time/")} == {f"time/{p}" for p in (*parts, "optimizer", "step")}
    assert line["time/recompute"] == 0.02 and line["time/optimizer"] == 0.01  # the optimizer's lie inside learn
    assert 0.03 <= line["time/learn"] < 0.05 <= line["time/learn"] + line["time/recompute"]
    assert 0.03 <= line["time/reward"] < 0.05 and line["time/unaccounted"] >= 0.02


def test_the_contract_is_ok_only_after_both_sides_were_compared(log: Log, made_up) -> None:
    made_up.feed(log, range(1))
    log.agreed = True
    made_up.feed(log, range(1, 2))
    first, second = lines(log)
    assert "sync/contract_ok" not in first and second["sync/contract_ok"] == 1


def test_what_happens_between_two_steps_belongs_to_the_later_one(log: Log) -> None:
    with log.step(0):
        pass
    with log.time("checkpoint"):
        time.sleep(0.03)
    with log.step(1):
        pass
    first, second = lines(log)
    assert "time/checkpoint" not in first and second["time/checkpoint"] >= 0.03
    assert second["time/step"] >= second["time/checkpoint"] and first["time/step"] < 0.03


def test_speeds_are_tokens_without_padding_by_the_time_of_their_part(log: Log, made_up) -> None:
    made_up.feed(log, range(1))
    line = lines(log)[0]
    assert line["throughput/rollout_tokens_per_s"] == pytest.approx(36 / 0.5)  # 12 samples of 3 in half a second
    assert line["throughput/train_tokens_per_s"] == pytest.approx(36 / line["time/learn"])
    assert line["throughput/samples_per_s"] == pytest.approx(12 / line["time/step"])
    assert line["throughput/longest_sample_tokens_per_s"] == pytest.approx(3 / 0.5)
    assert 1e7 < line["memory/host_rss_bytes"] < 1e12


def test_the_last_line_holds_the_final_evaluation_and_each_evaluation_is_an_event(ran) -> None:
    run_dir = ran()
    evaluated = [event for event in journal.read(run_dir / "events.jsonl") if event["kind"] == "eval"]
    assert [(event["step"], event["version"]) for event in evaluated] == [(0, 0), (2, 2), (2, 3)]
    last = journal.read(run_dir / "metrics.jsonl")[-1]
    assert {key: value for key, value in last.items() if key.startswith("eval/")} == evaluated[-1]["metrics"]


def test_a_resumed_run_has_each_step_once_and_the_same_numbers(log: Log, made_up, experiment) -> None:
    made_up.feed(log, range(6))
    whole = (log.run_dir / "metrics.jsonl").read_text()
    with (log.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # killed in the middle of a write
    again = Log(experiment("steps=6"), log.run_dir, 3, [], "0123456789abcdef")
    assert [line["step"] for line in lines(again)] == [0, 1, 2]
    assert (log.run_dir / "metrics.jsonl").read_text() == "".join(whole.splitlines(keepends=True)[:3])
    made_up.feed(again, range(3, 6))
    assert [line["step"] for line in lines(again)] == list(range(6))
    before = [json.loads(line) for line in whole.splitlines()]
    for key in ("mismatch/kl_k3", "reward/mean", "train/loss"):
        assert [line[key] for line in lines(again)] == [line[key] for line in before]
    assert not events(again, "journal")


def test_a_journal_with_a_hole_is_told(log: Log, made_up, experiment, capsys) -> None:
    made_up.feed(log, range(2))
    again = Log(experiment("steps=6"), log.run_dir, 4, [], "0123456789abcdef")
    assert "lacks the steps [2, 3]" in events(again, "journal")[0]["message"]
    assert "lacks the steps [2, 3]" in capsys.readouterr().out


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_comes_back_from_the_journal_with_its_bits(tmp_path_factory, value: float) -> None:
    path = tmp_path_factory.getbasetemp() / "bits.jsonl"
    path.unlink(missing_ok=True)
    journal.append(path, {"step": 0, "x": value})
    assert np.float64(journal.read(path)[0]["x"]).tobytes() == np.float64(value).tobytes()


def test_an_altered_line_is_named_and_a_torn_last_one_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1')
    assert journal.read(path) == [{"step": 0}]
    journal.append(path, {"step": 1})
    assert journal.read(path) == [{"step": 0}, {"step": 1}]
    path.write_text('{"step": 0}\nspilled coffee\n')
    with pytest.raises(ConfigError, match="line 2 is not JSON"):
        journal.read(path)


def test_the_header_says_which_side_is_quantised_how(experiment, tmp_path: Path, capsys) -> None:
    Log(experiment("precision=bf16", "precision@rollout.precision=fp8"), tmp_path / "a", 0, [], "cafe")
    said = capsys.readouterr().out
    assert "trainer    bf16, nothing quantised" in said
    assert "rollout    fp8, quantises 14 of 25 tensors" in said
    assert "qwen3_tiny" in said and "cafe" in said and "trainer rank x2" in said and str(tmp_path / "a") in said
    Log(experiment("precision=fp8"), tmp_path / "b", 0, [], "cafe")
    said = capsys.readouterr().out
    assert said.count("fp8, quantises 14 of 25 tensors") == 2 and ", as the trainer" in said


def test_the_console_has_a_line_a_step_and_three_answers_an_evaluation(ran, capsys) -> None:
    run_dir = ran("run", "precision=fp8", gap=0.0, summary=True)
    said = capsys.readouterr().out.splitlines()
    steps = [line for line in said if line.startswith("step ")]
    assert len(steps) == 3 and all("mismatch exactly 0" in line and "reward" in line for line in steps)
    assert sum(line.startswith("    prompt '[") for line in said) == 3 * 3  # three evaluations
    assert any(line.startswith("eval held_out, weights 3: greedy") for line in said)
    assert "next     python launch.py precision=fp8 precision@rollout.precision=bf16" in said
    assert f"picture  {run_dir}/report.png" in said


def test_the_summary_tells_start_and_end(ran, capsys) -> None:
    run_dir = ran(gap=0.5, summary=True)
    found = json.loads((run_dir / "summary.json").read_text())
    written = journal.read(run_dir / "metrics.jsonl")
    assert found["steps"] == 3 and found["eval/held_out"]["versions"] == [0, 3]
    first = written[0]["eval/held_out/sampled_acc"]
    assert found["eval/held_out"]["sampled_acc"] == [first, written[-1]["eval/held_out/sampled_acc"]]
    worst = max(line["mismatch/logprob_abs_diff_max"] for line in written)
    assert found["mismatch/logprob_abs_diff_max"] == worst > 0
    assert f"max {worst:.1e}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["seed=3", "output_dir=x", "resume=auto"], "seed=3 precision=bf16 precision@rollout.precision=fp8"),
        (["precision=int4_qat"], "precision=int4_qat precision@rollout.precision=bf16"),
        (["precision@rollout.precision=fp8", "precision=bf16"], "precision=fp8"),
    ],
)
def test_the_next_command_asks_the_next_question_and_composes(experiment, overrides, expected) -> None:
    from lpexp.log import _next_command

    command = _next_command(experiment(*(o for o in overrides if not o.startswith("resume"))), overrides)
    assert command == f"python launch.py {expected}"
    assert command is not None
    experiment(*command.split()[2:])
