"""`-m`: every job is judged before the first starts, one process a job, and a failure stops no other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lpexp import launcher


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would be run; each ends well unless its seed is 2."""
    ran: list[list[str]] = []

    def run(command: list[str]) -> int:
        ran.append(command)
        return 3 if "seed=2" in command else 0

    monkeypatch.setattr(launcher, "_run", run)
    return ran


def test_one_wrong_job_keeps_all_from_starting(type_line: Any, jobs: list[list[str]]) -> None:
    said = type_line("-m", "precision=int4_qat", "precision.group_size=48,80")
    assert said.code == 2
    assert jobs == []
    assert "none of the 2 jobs was started" in said.err
    assert "(job precision.group_size=48)" in said.err and "(job precision.group_size=80)" in said.err


def test_a_job_that_cannot_run_here_keeps_all_from_starting(type_line: Any, jobs: list[list[str]]) -> None:
    said = type_line("-m", "model=qwen3_tiny,qwen3_4b", CUDA_VISIBLE_DEVICES="")
    assert (said.code, jobs) == (2, [])
    assert "needs 8 H200 GPUs" in said.err and "(job model=qwen3_4b)" in said.err


def test_a_failure_is_named_and_the_others_go_on(type_line: Any, jobs: list[list[str]]) -> None:
    said = type_line("-m", "seed=1,2,3", "output_dir=runs/sweep")
    assert len(jobs) == 3
    assert said.code == 1
    assert "1 of 3 jobs failed:\n  runs/sweep/1 (seed=2): failed with exit code 3" in said.err
    assert "job 3/3: done" in said.out


def test_each_job_gets_its_own_folder_and_the_sweep_s_group_and_tags(type_line: Any, jobs: list[list[str]]) -> None:
    assert type_line("-m", "precision=bf16,fp8", "output_dir=runs/sweep", "steps=7").code == 0
    for number, precision in enumerate(("bf16", "fp8")):
        words = jobs[number]
        assert words[:2] == [sys.executable, str(launcher.LAUNCH)]
        assert {f"precision={precision}", "steps=7", f"output_dir='runs/sweep/{number}'", "wandb.group=sweep"} <= set(
            words
        )
        assert f"wandb.tags=['precision={precision}']" in words
        assert "output_dir=runs/sweep" not in words


def test_what_the_user_says_about_wandb_is_kept(type_line: Any, jobs: list[list[str]]) -> None:
    assert type_line("-m", "seed=4,5", "wandb.group=mine", "wandb.tags=[a]").code == 0
    assert "wandb.group=mine" in jobs[0]
    assert "wandb.tags=['a','seed=4']" in jobs[0]


def test_a_sweep_file_runs_its_own_axes(type_line: Any, jobs: list[list[str]], repo: Path) -> None:
    said = type_line("--config-dir", str(repo / "sweeps"), "--config-name", "group_size", "seed=7", "output_dir=x")
    assert said.code == 0
    assert [next(w for w in words if w.startswith("precision.group_size")) for words in jobs] == [
        f"precision.group_size={size}" for size in (32, 64, 128)
    ]
    assert all({"--config-name", "group_size", "seed=7", "hydra.mode=RUN"} <= set(words) for words in jobs)


def test_a_killed_job_is_told_by_its_signal() -> None:
    assert launcher._outcome(-9) == "killed by SIGKILL"


def test_jobs_are_processes_and_a_signal_ends_the_sweep() -> None:
    assert launcher._run([sys.executable, "-c", "raise SystemExit(5)"]) == 5
    stop_me = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(30)"
    assert launcher._run([sys.executable, "-c", stop_me]) == 128 + 15


def test_a_real_sweep_prints_each_job_s_plan(repo: Path, tmp_path: Path) -> None:
    words = ["seed=1", "-m", "precision=bf16,int4_qat", "dry_run=true", "output_dir=with space"]
    done = subprocess.run(
        [sys.executable, str(repo / "launch.py"), *words], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("who sits where") == 2
    assert "job 2/2: precision=int4_qat" in done.stdout
    assert json.dumps(done.stderr) == '""'
