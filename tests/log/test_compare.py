"""`lpexp compare`: equal runs are equal, and no difference is too small or too far away to be found."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lpexp import checkpoint
from lpexp.compare import add_arguments, compare, main
from lpexp.log import Log


def store(run_dir: Path, step: int, weight: float) -> Path:
    """A complete checkpoint of one weight and one moment."""

    def write(directory: Path) -> None:
        for name, value in (("master", weight), ("optimizer", 1.0)):
            (directory / f"{name}.safetensors").write_bytes(np.float32(value).tobytes())
        (directory / "trainer.json").write_text("{}")

    return checkpoint.save(run_dir, step, {"step": step}, write, keep=2)


@pytest.fixture(scope="module")
def originals(experiment, made_up, tmp_path_factory) -> tuple[Path, Path]:
    """Two runs that made the same numbers at different times, each with a checkpoint of its last step."""
    made = []
    for name in ("a", "b"):
        log = Log(experiment(), tmp_path_factory.mktemp(name), 0, [], "cafe")
        made_up.feed(log, range(3))
        log.close()
        store(log.run_dir, 3, 0.1)
        made.append(log.run_dir)
    return made[0], made[1]


@pytest.fixture
def pair(originals, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of them, to be changed."""
    return shutil.copytree(originals[0], tmp_path / "a"), shutil.copytree(originals[1], tmp_path / "b")


def change(run_dir: Path, step: int, key: str, value: object) -> None:
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    line = lines[step]
    if value is None:
        del line[key]
    else:
        line[key] = value(line[key]) if callable(value) else value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_runs_that_differ_only_in_time_are_equal(pair, capsys) -> None:
    a, b = pair
    times = [json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["time/step"] for run in pair]
    assert times[0] != times[1]
    assert compare(a, b, exact=True) == 0
    said = capsys.readouterr().out
    counted = int(said.split()[1])
    assert said.startswith("equal: ") and counted > 300 and "3 steps, and 2 checkpoint files" in said


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("mismatch/kl_k3", lambda x: float(np.nextafter(x, 1)), "step 1, mismatch/kl_k3: A "),
        ("train/loss", lambda x: float(np.nextafter(x, 9)), "step 1, train/loss: A "),
        ("staleness/kl_k3", -0.0, "step 1, staleness/kl_k3: A 0.0, B -0.0"),
        ("sync/version", 2.0, "step 1, sync/version: A 2, B 2.0"),
        ("reward/mean", None, "B absent"),
        ("reward/new", 1.0, "step 1, reward/new: A absent, B 1.0"),
        ("not/in_the_dictionary", 1.0, "A absent, B 1.0"),
    ],
)
def test_one_flipped_bit_is_found_and_named(pair, capsys, key, value, said) -> None:
    a, b = pair
    change(b, 1, key, value)
    change(b, 2, "train/lr", 9.9)  # a later one is not what is told
    assert compare(a, b, exact=True) == 1
    assert said in capsys.readouterr().out


def test_times_speeds_and_memory_may_differ(pair) -> None:
    a, b = pair
    for key in ("time/step", "sync/seconds", "throughput/samples_per_s", "memory/host_rss_bytes"):
        change(b, 1, key, 123.0)
    change(b, 1, "time/reward", 1.0)
    assert compare(a, b, exact=True) == 0


def test_a_missing_step_is_a_difference(pair, capsys) -> None:
    a, b = pair
    path = b / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert compare(a, b, exact=True) == 1
    assert "step 2 is only in A" in capsys.readouterr().out


def test_weights_that_differ_are_found_when_all_metrics_agree(pair, capsys) -> None:
    a, b = pair
    store(b, 3, float(np.nextafter(np.float32(0.1), np.float32(1))))
    assert compare(a, b, exact=True) == 1
    assert "checkpoint 000003, master.safetensors: A " in capsys.readouterr().out


def test_a_checkpoint_that_was_altered_counts_for_nothing(pair, capsys) -> None:
    a, b = pair
    (b / "checkpoints" / "000003" / "master.safetensors").write_bytes(b"else")
    assert compare(a, b, exact=True) == 1
    told = capsys.readouterr()
    assert "only A has a complete checkpoint" in told.out and "master.safetensors" in told.err


def test_only_the_newest_checkpoints_of_the_same_step_compare(pair, capsys) -> None:
    a, b = pair
    store(b, 4, 0.1)
    assert compare(a, b, exact=True) == 1
    assert "step 000003 in A, 000004 in B" in capsys.readouterr().out
    for run_dir in pair:
        shutil.rmtree(run_dir / "checkpoints")
    assert compare(a, b, exact=True) == 0
    assert "neither run has a checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is no run directory"),
        ("", "no number to compare"),
        ('{"step": 0, "time/step": 1.0}\n', "no number to compare"),
        ('{"step": 0}\n{"step": 0}\n', "a step appears once"),
        ('{"stop": 0}\n', "without a step"),
        ("{\n", "is not JSON"),
    ],
)
@pytest.mark.parametrize("exact", [True, False])
def test_what_is_no_run_or_has_nothing_to_compare_is_refused(tmp_path: Path, capsys, content, said, exact) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert compare(tmp_path, tmp_path, exact) == 2
    assert said in capsys.readouterr().err


def test_without_exact_the_main_numbers_stand_side_by_side(pair, capsys) -> None:
    a, b = pair
    change(b, 1, "reward/mean", 9.0)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert main(parser.parse_args([str(a), str(b)])) == 0
    assert "means over the 3 steps" in (said := capsys.readouterr().out) and "reward/mean" in said
    assert main(parser.parse_args(["--exact", str(a), str(b)])) == 1
