"""The real command in its own process: exit codes, what is imported, how long it takes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

WATCH = """
import runpy, sys
sys.argv = ["launch.py", *sys.argv[1:]]
code = 0
try:
    runpy.run_path({launch!r}, run_name="__main__")
except SystemExit as exit:
    code = exit.code
heavy = sorted(name for name in ("torch", "ray", "transformers", "wandb", "matplotlib") if name in sys.modules)
print("HEAVY", heavy, file=sys.stderr)
sys.exit(code)
"""


def run(repo: Path, cwd: Path, *words: str, **env: str) -> tuple[int, str, str, float]:
    """Exit code, stdout, stderr, seconds; stderr ends with the heavy modules that were loaded."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", WATCH.format(launch=str(repo / "launch.py")), *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repo), **env},
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - start


@pytest.mark.parametrize(
    "words",
    [
        ["stpes=5"],
        ["steps=0", "precision=int4_qat", "precision.group_size=48"],
        ["model=kimi_k2_thinking", "precision=int4_qat"],
        ["rollout.checkpoint=nowhere"],
        ["-m", "steps=0,1"],
    ],
    ids=" ".join,
)
def test_a_refusal_loads_neither_torch_nor_ray(words: list[str], repo: Path, tmp_path: Path) -> None:
    code, _, err, seconds = run(repo, tmp_path, *words)
    assert code == 2, err
    assert "Traceback" not in err
    assert "HEAVY []" in err
    assert seconds < 20  # about one second alone; other tests share the cores


def test_a_missing_resume_directory_is_refused_without_a_traceback(repo: Path, tmp_path: Path) -> None:
    code, _, err, _ = run(repo, tmp_path, "resume=nowhere")
    assert code == 2
    assert "resume: nowhere does not exist" in err
    assert "Traceback" not in err


def test_a_full_size_model_prints_its_plan_and_one_sentence(repo: Path, tmp_path: Path) -> None:
    code, out, err, _ = run(repo, tmp_path, "precision=fp8", "model=qwen3_30b", CUDA_VISIBLE_DEVICES="")
    assert code == 2
    assert "who sits where" in out
    sentence = err.replace("HEAVY []", "").strip()
    assert "\n" not in sentence
    assert "needs 16 H200 GPUs (2 nodes of 8)" in sentence
    assert "scale=laptop" in sentence


def test_an_error_of_the_run_keeps_its_traceback(repo: Path, tmp_path: Path) -> None:
    """A ValueError raised by training is no config mistake."""
    broken = "import sys, types; m = types.ModuleType('lpexp.loop')\n"
    broken += "def run(exp, overrides): raise ValueError('a bug in training')\n"
    broken += "m.run = run; sys.modules['lpexp.loop'] = m\n"
    done = subprocess.run(
        [sys.executable, "-c", broken + WATCH.format(launch=str(repo / "launch.py")), "steps=1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repo)},
        timeout=120,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "a bug in training" in done.stderr
