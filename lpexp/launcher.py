"""The launcher behind `-m`: judges every job before the first starts, then runs one process a job, one after another.

A job that fails is named and the others go on; the sweep then ends with exit code 1. A signal is handed to the running
job, which stops at its next safe point, and ends the sweep.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from lpexp import frontend, plan
from lpexp.errors import ConfigError, Mistake

LAUNCH = frontend.CONF.parent / "launch.py"


class OneProcessAJob(Launcher):
    """Hydra's launcher interface; see the module's text."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.loader, self.config = hydra_context.config_loader, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        sweep_dir = Path(str(self.config.hydra.sweep.dir))
        jobs = [list(overrides) for overrides in job_overrides]
        axes = _axes(jobs)
        self._judge_all(jobs, axes, sweep_dir)
        failed: list[str] = []
        for index, overrides in enumerate(jobs):
            label = " ".join(axes[index]) or "as typed"
            print(f"job {index + 1}/{len(jobs)}: {label}", flush=True)
            start, number = time.monotonic(), initial_job_idx + index
            code = _run(self._command(overrides, sweep_dir / str(number), sweep_dir.name, axes[index]))
            print(f"job {index + 1}/{len(jobs)}: {_outcome(code)} after {time.monotonic() - start:.0f} s", flush=True)
            if code >= 128:
                print(f"the sweep was stopped; {len(jobs) - index - 1} jobs were not started", file=sys.stderr)
                raise SystemExit(code)
            if code:
                failed.append(f"  {sweep_dir / str(number)} ({label}): {_outcome(code)}")
        if failed:
            print("\n".join([f"{len(failed)} of {len(jobs)} jobs failed:", *failed]), file=sys.stderr)
            raise SystemExit(1)
        return [JobReturn(overrides=job, status=JobStatus.COMPLETED) for job in jobs]

    def _judge_all(self, jobs: list[list[str]], axes: list[list[str]], sweep_dir: Path) -> None:
        """Refuse the whole sweep when any job is wrong; one line a mistake, with the jobs that share it."""
        wrong: dict[Mistake, list[str]] = {}
        for overrides, axis in zip(jobs, axes, strict=True):
            try:
                exp = frontend.judge(_without_hydra(self.loader.load_sweep_config(self.config, overrides)))
                if not exp.dry_run and (lacking := plan.missing(exp)):
                    raise ConfigError([Mistake("cluster", lacking)])
            except ConfigError as error:
                for mistake in error.mistakes:
                    wrong.setdefault(mistake, []).append(" ".join(axis) or "as typed")
        if wrong:
            _remove_traces(sweep_dir)
            mistakes = [Mistake(m.key, f"{m.message}{_of(names, len(jobs))}") for m, names in wrong.items()]
            raise ConfigError(mistakes, title=f"none of the {len(jobs)} jobs was started; config has mistakes:")

    def _command(self, overrides: list[str], output_dir: Path, sweep: str, axis: list[str]) -> list[str]:
        runtime, flags = self.config.hydra.runtime, []
        for source in runtime.config_sources:
            if source.provider == "command-line":
                flags += ["--config-dir", source.path]
        flags += ["--config-name", str(self.config.hydra.job.config_name)]
        own = {"output_dir": output_dir, "hydra.mode": "RUN"}
        if self.config.wandb.group is None:
            own["wandb.group"] = sweep
        tags = [*self.config.wandb.tags, *axis]
        quoted = ",".join("'" + tag.replace("\\", "\\\\").replace("'", "\\'") + "'" for tag in tags)
        kept = [word for word in overrides if word.partition("=")[0].lstrip("+") not in (*own, "wandb.tags")]
        values = [f"{key}='{value}'" if key == "output_dir" else f"{key}={value}" for key, value in own.items()]
        return [sys.executable, str(LAUNCH), *flags, *kept, *values, f"wandb.tags=[{quoted}]"]


def register() -> None:
    """Make the launcher known to Hydra, which takes plugins of `hydra_plugins` only: it gets a name there."""
    known = Plugins.instance()
    package = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    home = ModuleType(OneProcessAJob.__module__)
    home.OneProcessAJob = OneProcessAJob  # type: ignore[attr-defined]
    package.lpexp = home  # type: ignore[attr-defined]
    sys.modules[home.__name__] = home
    known.register(OneProcessAJob)


OneProcessAJob.__module__ = "hydra_plugins.lpexp"


def _run(command: list[str]) -> int:
    """Run one job to its end; 128 + signal when it, or we, were stopped by one."""
    environment = dict(os.environ)
    if frontend.set_by_us:
        environment.pop(frontend.FULL_ERROR, None)
    job = subprocess.Popen(
        command, env=environment, process_group=0
    )  # its own group: signals reach it once, through us
    stopped = 0

    def hand_on(number: int, frame: Any) -> None:
        nonlocal stopped
        stopped = number
        job.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = job.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + stopped if stopped else code


def _outcome(code: int) -> str:
    return (
        "done"
        if code == 0
        else f"killed by {signal.Signals(-code).name}"
        if code < 0
        else f"failed with exit code {code}"
    )


def _axes(jobs: list[list[str]]) -> list[list[str]]:
    """Each job's overrides that differ between jobs."""
    return [[word for word in filter_overrides(job) if any(word not in other for other in jobs)] for job in jobs]


def _of(names: list[str], total: int) -> str:
    if total == 1:
        return ""
    return (
        " (every job)"
        if len(names) == total
        else f" (job {'; '.join(shlex.quote(n) if ' ' in n else n for n in names)})"
    )


def _without_hydra(cfg: DictConfig) -> DictConfig:
    plain = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    OmegaConf.set_readonly(plain, None)
    return plain


def _remove_traces(sweep_dir: Path) -> None:
    """Hydra has already made the sweep's folder and its multirun.yaml: a refused sweep leaves neither."""
    (sweep_dir / "multirun.yaml").unlink(missing_ok=True)
    for folder in (sweep_dir, *sweep_dir.parents):
        if folder == Path.cwd() or folder == Path() or not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()
