"""A log fed by hand: a real experiment, and made-up steps that need no trainer and no engine."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lpexp.data import Batch, Group, LearnReport, Prompt, Sample, SyncReport
from lpexp.experiment import Experiment
from lpexp.log import Log

CONTRACT = "0123456789abcdef"


@pytest.fixture(scope="session")
def experiment(repo: Path) -> Callable[..., Experiment]:
    """experiment("steps=3", ...): the composed config, judged. wandb is off unless asked for."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from lpexp.config import load

    @functools.cache
    def make(*overrides: str) -> Experiment:
        with initialize_config_dir(str(repo / "conf"), version_base=None):
            cfg = compose("config", overrides=["wandb.mode=disabled", "steps=3", "output_dir=out", *overrides])
        return load(OmegaConf.to_container(cfg, resolve=True), Experiment)  # type: ignore[arg-type]

    return make


def groups(seed: int, version: int = 0, samples: int = 4) -> list[Group]:
    """Three prompts, their samples scored at random."""
    rng = np.random.default_rng(seed)
    made = []
    for p in range(3):
        right = rng.integers(0, 2, samples).astype(float)
        answers = tuple(
            Sample(p, g, np.array([3, 4 + g, 1], np.int32), -rng.exponential(1, 3).astype(np.float32), version, "stop")
            for g in range(samples)
        )
        prompt = Prompt(p, (20, 21, 38), f"[{p}]ba>", "ab")
        made.append(Group(prompt, answers, right, {"correct": right}, 0, ("ab",) * samples))
    return made


def learned(seed: int, gap: float) -> LearnReport:
    """A trainer's report on those groups; `gap` in nat is the size of the train/rollout mismatch."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((12, 6), bool)
    mask[:, 3:] = True
    lp_R = (-rng.exponential(1, mask.shape)).astype(np.float32)
    lp = (lp_R + gap * rng.standard_normal(mask.shape)).astype(np.float32)
    batch = Batch(
        step=seed,
        tokens_NT=np.ones(mask.shape, np.int32),
        mask_NT=mask,
        logprobs_rollout_NT=lp_R,
        advantages_N=rng.standard_normal(12).astype(np.float32),
        rewards_N=np.zeros(12),
        lengths_N=np.full(12, 6, np.int32),
        prompt_lengths_N=np.full(12, 3, np.int32),
        versions_N=np.full(12, seed, np.int32),
        prompt_ids_N=np.repeat(np.arange(3), 4),
        sample_index_N=np.tile(np.arange(4, dtype=np.int32), 3),
        group_size=4,
    )
    return LearnReport(
        batch=batch,
        lp_T=lp,
        lp_P=lp,
        lp_C=lp,
        entropy=rng.exponential(1, mask.shape).astype(np.float32),
        weights=mask.astype(np.float32),
        more={},
        version=seed,
        scalars={"train/loss": float(rng.standard_normal()), "train/lr": 2e-4},
        seconds={"recompute": 0.0, "optimizer": 0.0},
        recompute="shared",
    )


def published(version: int) -> SyncReport:
    seconds = {"quantize": 0.1, "transfer": 0.2, "load": 0.3, "sync": 0.7}
    quant = {"mlp_up": {"rel_error": 0.026, "sqnr_db": 31.7}}
    return SyncReport(version, 1000, seconds, "abc", ("abc",), 0.9, quant)


def feed(log: Log, steps: range, gap: float = 0.01) -> None:
    """What the loop does, with made-up answers; the same numbers whenever a step is made again."""
    if log.version is None:
        log.sync(published(steps.start))
    for step in steps:
        with log.step(step) as note:
            if step % 2 == 0:
                note.eval("held_out", groups(step, step, 1), groups(50 + step, step))
            with note.time("rollout"):
                answered = groups(100 + step, step)
            note.rollout(answered, 0.5)
            with note.time("learn"):
                report = learned(step, gap)
            note.learn(report)
            with note.time("sync"):
                note.sync(published(step + 1))
            if step + 1 == log.exp.steps:
                note.eval("held_out", groups(step + 1, step + 1, 1), groups(51 + step, step + 1))


@pytest.fixture(scope="session")
def made_up() -> Any:
    """The made-up answers of this module: .groups .learned .published .feed"""
    return SimpleNamespace(groups=groups, learned=learned, published=published, feed=feed)


@pytest.fixture
def ran(experiment, tmp_path: Path) -> Callable[..., Path]:
    """ran("name", "override", ..., gap=0.01): the directory of a run of 3 made-up steps, and its summary if asked."""

    def run(name: str = "run", *overrides: str, gap: float = 0.01, summary: bool = False) -> Path:
        log = Log(experiment(*overrides), tmp_path / name, 0, list(overrides), CONTRACT)
        feed(log, range(3), gap)
        if summary:
            log.summary()
        log.close()
        return tmp_path / name

    return run


@pytest.fixture
def no_wandb_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No WANDB_* variable of the shell or of the test session decides anything here."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
