"""Runs of the real loop, small: in this process, or as `python launch.py` with Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SMALL = (
    "task.prompts_per_step=4",
    "algorithm.samples_per_prompt=8",
    "eval.prompts=8",
    "eval.samples=2",
    "eval.show=0",
    "wandb.mode=disabled",
    "rollout.slots=24",
)


@dataclass
class Ran:
    """A finished run: its exit code, its directory and its metrics.jsonl."""

    code: int
    directory: Path
    output: str = ""

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]

    def steps(self, key: str) -> list[float]:
        """The key's values on the lines of training steps."""
        return [row[key] for row in self.rows if "train/loss" in row]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "events.jsonl").read_text().splitlines()]


def compose(*overrides: str):
    """The typed experiment that these overrides make."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    from lpexp.config import load
    from lpexp.experiment import Experiment

    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = hydra_compose("config", overrides=list(overrides))
    return load(OmegaConf.to_container(cfg, resolve=True), Experiment)  # type: ignore[arg-type]


@pytest.fixture
def inline(tmp_path: Path) -> Callable[..., Ran]:
    """Run the loop in this process on a small batch."""

    def run(*overrides: str, name: str = "run") -> Ran:
        from lpexp.loop import run as loop

        exp = compose("cluster=inline", *SMALL, f"output_dir={tmp_path / name}", *overrides)
        return Ran(loop(exp, overrides), tmp_path / name)

    return run


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., Ran]:
    """Run `python launch.py` on a small batch, with Ray."""

    def run(*overrides: str, name: str = "run", timeout_s: float = 180) -> Ran:
        done = subprocess.run(
            [sys.executable, str(ROOT / "launch.py"), *SMALL, f"output_dir={tmp_path / name}", *overrides],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        return Ran(done.returncode, tmp_path / name, done.stdout + done.stderr)

    return run
