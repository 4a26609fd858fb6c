"""What stands behind `-m` and sweep files: Hydra's sweeper and launcher interfaces, made for experiments.

`Arms` gives each named arm of a sweep file, some overrides, every point of the axes. `SweepLauncher` judges every job
before the first starts, refuses all when one is wrong, and gives them to sweep.py; the report follows their end. A dry
run prints each job's plan instead.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf

from lpexp import checkpoint, frontend, plan, sweep
from lpexp.errors import ConfigError, Mistake
from lpexp.experiment import Experiment
from lpexp.groups import MOUNTS

LAUNCH = frontend.CONF.parent / "launch.py"
DECIDED = ("output_dir", "resume", "hydra.mode", "wandb.tags")  # words that the sweep says for its jobs


class Arms(Sweeper):
    """Hydra's sweeper interface: the product of the axes, with `arms`: {name: "overrides of this arm"}."""

    def __init__(self, params: dict[str, str] | None = None, arms: dict[str, str] | None = None):
        self.params, self.arms = dict(params or {}), dict(arms or {})

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.config, self.loader = config, hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Each arm with each point of the axes, as one batch; what was typed wins over the file's axes."""
        words = [*(f"{key}={values}" for key, values in self.params.items()), *arguments]
        axes: dict[str, list[str]] = {}
        for override in OverridesParser.create(config_loader=self.loader).parse_overrides(words):
            key = override.get_key_element()
            if override.is_sweep_override() and not override.is_discrete_sweep():
                raise ConfigError([Mistake(key, f"{override.input_line} has no values to list; use key=1,2,3")])
            values = override.sweep_string_iterator() if override.is_sweep_override() else None
            axes[key] = [f"{key}={one}" for one in values or [override.get_value_element_as_str()]]
        arms = [words_of(arm) for arm in self.arms.values()] or [[]]
        jobs = [[*arm, *point] for arm in arms for point in itertools.product(*axes.values())]
        assert self.launcher is not None
        return [self.launcher.launch(jobs, initial_job_idx=0)]


class SweepLauncher(Launcher):
    """Hydra's launcher interface; see the module's text."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.loader, self.config = hydra_context.config_loader, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        jobs = [list(overrides) for overrides in job_overrides]
        exps = self._judge_all(jobs)
        code = 0
        if exps[0].dry_run:
            for number, (exp, name) in enumerate(zip(exps, self._arm_names(jobs), strict=True), 1):
                print(f"job {number}/{len(jobs)}: {sweep.label(name, exp.seed)}\n{plan.text(exp)}\n")
        else:
            given, hashes = Path(str(self.config.hydra.sweep.dir)), [exp.hash() for exp in exps]
            code = self._run(jobs, exps, hashes, *sweep.home_of(exps[0].resume, given, hashes))
        if code:
            raise SystemExit(code)
        return [JobReturn(overrides=job, status=JobStatus.COMPLETED) for job in jobs]

    def _judge_all(self, jobs: list[list[str]]) -> list[Experiment]:
        """Every job's experiment; the whole sweep is refused when one is wrong: one line a mistake, with its jobs."""
        wrong: dict[Mistake, list[str]] = {}
        axes, exps = _axes(jobs), []
        for overrides, axis in zip(jobs, axes, strict=True):
            try:
                exp = frontend.judge(_without_hydra(self.loader.load_sweep_config(self.config, overrides)))
                if not exp.dry_run and (lacking := plan.missing(exp)):
                    raise ConfigError([Mistake("cluster", lacking)])
                exps.append(exp)
            except ConfigError as error:
                for mistake in error.mistakes:
                    wrong.setdefault(mistake, []).append(" ".join(axis) or "as typed")
        if wrong:
            mistakes = [Mistake(m.key, f"{m.message}{_of(names, len(jobs))}") for m, names in wrong.items()]
            raise ConfigError(mistakes, title=f"none of the {len(jobs)} jobs was started; config has mistakes:")
        return exps

    def _run(self, jobs: list[list[str]], exps: list[Experiment], hashes: list[str], home: Path, note: str) -> int:
        from lpexp.guardian import Guardian

        names = self._arm_names(jobs)
        made = [
            sweep.Job("", name, exp.seed, exp.steps, digest, words)
            for name, exp, digest, words in zip(names, exps, hashes, jobs, strict=True)
        ]
        for job, digest in zip(made, hashes, strict=True):
            if hashes.count(digest) > 1:
                raise ConfigError([Mistake("-m", f"{job.label} would run twice: two of these jobs are the same run")])
        whole = sweep.Sweep(self._question(jobs), shlex.join(["python", "launch.py", *sys.argv[1:]]), _keys(jobs), made)
        home.mkdir(parents=True, exist_ok=True)
        sweep.adopt(home, whole)
        whole.save(home)
        width, why = plan.at_once(exps)
        todo = [job for job in made if job.state != sweep.DONE]
        for line in filter(None, (whole.question, note, _before(home, made), _where(home, made, todo, width, why))):
            print(line, flush=True)
        with contextlib.ExitStack() as stack:
            stack.callback(Guardian().release)  # ends every run when this process is killed
            shared: dict[str, str] = {}
            if todo and (cluster := next((exp.cluster for exp in exps if exp.cluster.kind == "ray"), None)):
                from lpexp.cluster import shared as share

                shared = stack.enter_context(share(cluster))
            each = max(exp.cluster.gpus_per_node for exp in exps)
            runner = sweep.Runner(
                home,
                whole,
                width,
                lambda job: self._command(job, home),
                lambda slot: environment() | shared | _cards(slot, each if width > 1 else 0),
            )
            code = runner.run(todo)
        return _close(home, made, code)

    def _flags(self) -> list[str]:
        flags = ["--config-name", str(self.config.hydra.job.config_name)]
        for source in self.config.hydra.runtime.config_sources:
            if source.provider == "command-line":
                flags += ["--config-dir", source.path]
        return flags

    def _command(self, job: sweep.Job, home: Path) -> list[str]:
        own = [f"output_dir='{home / job.folder}'", "hydra.mode=RUN"]
        own += ["resume=auto"] if checkpoint.holds_run(home / job.folder) else []
        if self.config.wandb.group is None:
            group = f"{home.parent.name}/{home.name}" if checkpoint.TIMESTAMP.fullmatch(home.name) else home.name
            own.append(f"wandb.group='{group}'")
        tags = [*self.config.wandb.tags, *([job.arm] if job.arm else []), f"seed={job.seed}"]
        quoted = ",".join("'" + tag.replace("\\", "\\\\").replace("'", "\\'") + "'" for tag in tags)
        kept = [word for word in job.words if word.partition("=")[0].lstrip("+") not in DECIDED]
        return [sys.executable, str(LAUNCH), *self._flags(), *kept, *own, f"wandb.tags=[{quoted}]"]

    def _arm_names(self, jobs: list[list[str]]) -> list[str]:
        """What each job is called: its arm's name in the sweep file, and its axes other than the seed."""
        given = OmegaConf.to_container(self.config.hydra.sweeper.get("arms") or OmegaConf.create(), resolve=True)
        arms: dict[str, list[str]] = {str(name): words_of(str(arm)) for name, arm in given.items()}  # type: ignore[union-attr]
        names = []
        for job, axis in zip(jobs, _axes(jobs), strict=True):
            mine = [name for name, words in arms.items() if job[: len(words)] == words]
            name = max(mine, key=lambda name: len(arms[name]), default=None)
            rest = [word for word in axis if name is None or word not in arms[name]]
            said = ", ".join(spoken(word) for word in rest if not word.startswith("seed="))
            names.append(f"{name} ({said})" if name and said else name or said)
        return names

    def _question(self, jobs: list[list[str]]) -> str:
        """The first line of the sweep file; of typed axes, what they are."""
        name = str(self.config.hydra.job.config_name)
        for source in self.config.hydra.runtime.config_sources:
            path = Path(source.path) / f"{name}.yaml"
            if source.provider == "command-line" and path.is_file():
                line = path.read_text().partition("\n")[0]
                if line.startswith("#"):
                    return line.lstrip("# ").strip()
        varied = [key for key in _keys(jobs) if key != "seed"]
        if len(varied) == 1:
            return f"What does {varied[0]} change?"
        return f"What do {' and '.join(varied) or 'the seeds'} change?"


def register() -> None:
    """Make sweeper and launcher known to Hydra, which takes plugins of `hydra_plugins` only: they get names there."""
    known = Plugins.instance()
    package = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    home = ModuleType(SweepLauncher.__module__)
    home.SweepLauncher, home.Arms = SweepLauncher, Arms  # type: ignore[attr-defined]
    package.lpexp = home  # type: ignore[attr-defined]
    sys.modules[home.__name__] = home
    known.register(SweepLauncher)
    known.register(Arms)


SweepLauncher.__module__ = Arms.__module__ = "hydra_plugins.lpexp"


def words_of(arm: str) -> list[str]:
    """An arm's overrides, with names of precisions spelt as Hydra's groups."""
    return frontend.tidy(shlex.split(arm))[1]


def spoken(word: str) -> str:
    """`precision=x` -> `x`, `precision.group_size=32` -> `group_size 32`, a mounted one -> `rollout x`."""
    key, _, value = word.lstrip("+~").partition("=")
    mount = key.partition("@")[2]
    if mount in MOUNTS:
        return f"{mount.partition('.')[0]} {value}"
    return value if key in frontend.groups() else f"{key.rpartition('.')[2]} {value}"


def environment() -> dict[str, str]:
    """Ours, without what the front end set for itself."""
    return {key: value for key, value in os.environ.items() if key != frontend.FULL_ERROR or not frontend.set_by_us}


def _cards(slot: int, each: int) -> dict[str, str]:
    """The GPUs of a slot, when several runs share a machine."""
    if not each:
        return {}
    typed = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = typed.split(",") if typed else [str(number) for number in range(len(plan.gpus_here()))]
    return {"CUDA_VISIBLE_DEVICES": ",".join(cards[slot * each : (slot + 1) * each])}


def _close(home: Path, jobs: Sequence[sweep.Job], code: int) -> int:
    """Say what became of the sweep, and write its report."""
    failed = [f"  {home / job.folder} ({job.label}): {job.why}" for job in jobs if job.state == sweep.FAILED]
    if failed:
        print("\n".join([f"{len(failed)} of {len(jobs)} runs failed:", *failed]), file=sys.stderr)
    if code:
        words = [word for word in sys.argv[1:] if not word.startswith(("resume=", "output_dir="))]
        again = shlex.join(["python", "launch.py", *words, "resume=auto", f"output_dir={home}"])
        print(f"go on with the runs that are not done: {again}", file=sys.stderr)
    if code <= 1:
        from lpexp import report

        try:
            report.write([home])
        except ConfigError as error:
            print(f"no report: {error}", file=sys.stderr)
    return code


def _before(home: Path, jobs: Sequence[sweep.Job]) -> str:
    """What an earlier start left."""
    done = sum(job.state == sweep.DONE for job in jobs)
    again = [job for job in jobs if job.state != sweep.DONE and sweep.steps_done(home, job)]
    lines = [f"  {done} of {len(jobs)} runs are done and kept"] if done else []
    for job in jobs:
        if job.state == sweep.FAILED:
            lines.append(f"  {job.label} failed before and is repeated ({home / job.folder}: {job.why})")
        elif job in again:
            lines.append(f"  {job.label} goes on after step {sweep.steps_done(home, job)} or its last checkpoint")
    return "\n".join(lines)


def _where(home: Path, jobs: Sequence[sweep.Job], todo: Sequence[sweep.Job], width: int, why: str) -> str:
    at_once = f"{width} at a time" if width > 1 else "one at a time"
    return f"  {len(todo)} of {len(jobs)} runs to make in {home}, {at_once} ({why})"


def _axes(jobs: list[list[str]]) -> list[list[str]]:
    """Each job's overrides that differ between jobs."""
    return [[word for word in filter_overrides(job) if any(word not in other for other in jobs)] for job in jobs]


def _keys(jobs: list[list[str]]) -> list[str]:
    """The dotted keys that differ between jobs."""
    keys = [word.lstrip("+~").partition("=")[0] for axis in _axes(jobs) for word in axis]
    return list(dict.fromkeys(key.partition("@")[2] or key for key in keys))


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
