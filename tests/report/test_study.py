"""Runs on disk become arms: what is alike but for the seed, what sets arms apart, and what must not be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lpexp import sweep
from lpexp.errors import ConfigError
from lpexp.report.study import collect
from tests import made_up_runs as made_up

FP8 = ("precision=fp8",)
MIXED = ("precision=bf16", "rollout.precision=fp8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two seeds of bf16, of fp8 on both sides and of fp8 rollout alone."""
    for seed in (1, 2):
        made_up.run(tmp_path / "runs" / f"c{seed}", *MIXED, seed=seed, gap=0.02)
        made_up.run(tmp_path / "runs" / f"b{seed}", *FP8, seed=seed)
        made_up.run(tmp_path / "runs" / f"a{seed}", seed=seed)
    return tmp_path / "runs"


def test_runs_that_differ_in_the_seed_alone_are_one_arm_named_by_its_sides(folder: Path) -> None:
    study = collect([folder])
    assert [arm.name for arm in study.arms] == ["bf16", "fp8", "bf16 / fp8"]
    assert all(list(arm.runs) == [1, 2] for arm in study.arms)
    assert study.reference is study.arms[0] and study.broken == [] and study.twice == []
    assert [arm.matched for arm in study.arms] == [True, True, False]


def test_fields_name_arms_only_where_their_sides_do_not_tell_them_apart(tmp_path: Path) -> None:
    made_up.run(tmp_path / "a", "precision=int4_qat", "precision.group_size=32")
    made_up.run(tmp_path / "b", "precision=int4_qat")
    made_up.run(tmp_path / "c", *FP8)
    names = [arm.name for arm in collect([tmp_path]).arms]
    assert sorted(names) == ["fp8", "int4_qat (group_size 128)", "int4_qat (group_size 32)"]


def test_the_reference_is_the_arm_without_quantisation_or_the_one_that_is_named(folder: Path) -> None:
    assert collect([folder], reference="bf16 / fp8").arms[0].name == "bf16 / fp8"
    with pytest.raises(ConfigError, match="there is no arm 'fp9'; there are fp8, bf16, "):
        collect([folder / "b1", folder / "a1", folder / "c1"], reference="fp9")
    only = collect([folder / "b1", folder / "c1"])
    assert only.reference is not None and only.reference.name == "fp8"


def test_a_setting_that_no_axis_explains_sets_an_arm_aside_until_it_is_allowed(folder: Path, tmp_path: Path) -> None:
    other = made_up.run(tmp_path / "other", *FP8, "trainer.lr=1e-4")
    study = collect([folder / "a1", other])
    arm = study.arms[1]
    assert study.foreign(arm) == ["trainer.lr"]
    assert collect([folder / "a1", other], allowed=["trainer.lr"]).foreign(arm) == []
    assert collect([folder / "a1", folder / "b1"]).foreign(arm) == ["trainer.lr"], "of another study's arm"
    assert collect([folder / "a1", other], allowed=["trainer"]).foreign(arm) == []


def test_the_axes_of_a_sweep_explain_themselves(tmp_path: Path) -> None:
    for number, lag in enumerate((0, 1)):
        made_up.run(tmp_path / str(number), f"lag={lag}")
    jobs = [sweep.Job(str(n), f"lag {n}", 1, made_up.STEPS, str(n), [], sweep.DONE) for n in (0, 1)]
    alone = collect([tmp_path])
    assert alone.foreign(alone.arms[1]) == ["lag"]
    sweep.Sweep("What does lag do?", "python launch.py -m lag=0,1", ["lag", "seed"], jobs).save(tmp_path)
    study = collect([tmp_path])
    assert (study.question, [arm.name for arm in study.arms]) == ("What does lag do?", ["lag 0", "lag 1"])
    assert study.foreign(study.arms[1]) == []


def test_other_code_is_told(folder: Path) -> None:
    path = folder / "b1" / "versions.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"git_commit": "b" * 40}))
    study = collect([folder])
    assert study.other_source(study.arms[1]) == ["git_commit aaaaaaaaaaaa, bbbbbbbbbbbb"]
    assert study.other_source(study.arms[2]) == []


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("metrics.jsonl", "not json\n", "is not JSON"),
        ("metrics.jsonl", "", "has no step yet"),
        ("metrics.jsonl", "{}\n", "KeyError"),
        ("config.yaml", "steps: [1\n", "ParserError"),
        ("config.yaml", "steps: 3\n", "KeyError"),
        ("config.yaml", None, "FileNotFoundError"),
        ("events.jsonl", '{"kind": "eval", "version": 40}\n', "KeyError"),
    ],
)
def test_a_broken_run_is_named_and_stops_no_other(folder: Path, name: str, content: str | None, why: str) -> None:
    path = folder / "b2" / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    study = collect([folder])
    assert [(label, why in text) for label, text in study.broken] == [(str(folder / "b2"), True)], study.broken
    assert [list(arm.runs) for arm in study.arms] == [[1, 2], [1], [1, 2]]


def test_a_failed_job_of_a_sweep_is_named_and_its_steps_are_shown(folder: Path) -> None:
    home = folder.parent / "sweep"
    made_up.run(home / "0", seed=1)
    made_up.run(home / "1", *FP8, seed=1, done=7)
    jobs = [
        sweep.Job("0", "bf16", 1, made_up.STEPS, "", [], sweep.DONE),
        sweep.Job("1", "eight bits", 1, made_up.STEPS, "", [], sweep.FAILED, "exit code 1: no memory"),
        sweep.Job("2", "eight bits", 2, made_up.STEPS, "", [], sweep.WAITING),
    ]
    sweep.Sweep("", "", [], jobs).save(home)
    study = collect([home])
    assert study.broken == [
        (f"{home / '1'} (eight bits)", "exit code 1: no memory"),
        (f"{home / '2'} (eight bits, seed 2)", "has no step yet"),
    ]
    assert [(arm.name, [run.state for run in arm.runs.values()]) for arm in study.arms] == [
        ("bf16", ["finished"]),
        ("eight bits", [f"7 of {made_up.STEPS} steps"]),
    ]


def test_of_two_runs_of_a_seed_the_finished_one_counts_and_the_other_is_named(folder: Path) -> None:
    again = made_up.run(folder / "0_again", seed=1, done=5)
    study = collect([folder])
    assert study.twice == [again]
    assert study.arms[0].runs[1].path == folder / "a1"


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_a_place_without_a_run_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"is no directory|holds no run and no sweep"):
        collect([tmp_path / place])


def test_when_no_run_can_be_read_each_is_named(tmp_path: Path) -> None:
    (made_up.run(tmp_path / "a") / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"nothing to report\n  .*/a: cannot be read \(FileNotFoundError"):
        collect([tmp_path])
