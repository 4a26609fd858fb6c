"""The log of a run: one step's notes become a line of metrics.jsonl, a wandb row and a line on the console.

    log = Log(exp, run_dir, start_step, overrides, contract)
    log.sync(report)                                   # the first weights, which belong to no step
    for step in range(start_step, exp.steps):
        with log.step(step) as note:
            with note.time("checkpoint"): ...          # of version `step`: every line before it is on disk by now
            note.eval("held_out", greedy, sampled)     # of version `step`, when due
            with note.time("rollout"): ...
            note.rollout(groups)
            with note.time("learn"): ...
            note.learn(report)
            with note.time("sync"): ...
            note.sync(report)
            note.eval("held_out", greedy, sampled)     # in the last step: of the final weights
    log.summary()
    log.close()

So line s evaluates weight version s and tells how it became version s + 1; only on the last line the evaluation is of
the final version, in place of one made before that step. Each evaluation is an event too, with its version. A step
whose body raises leaves no line. The wall time between two lines belongs to the later one, so nothing goes missing. On
resume from step k the lines of step k and later are cut, so every step appears once.

The run directory gets config.yaml, overrides.yaml, versions.json, hardware.json, contract.txt, metrics.jsonl,
events.jsonl, wandb/, and at the end summary.json and report.png. Left out: checkpoints, stored rollouts, the run lock.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpexp import journal
from lpexp.console import Console, served_first, side
from lpexp.data import Group, LearnReport, Metrics, SyncReport
from lpexp.errors import RunError
from lpexp.metric import find
from lpexp.metric.learn import learn_metrics
from lpexp.metric.mismatch import mismatch_metrics, worst_tokens
from lpexp.metric.reward import eval_metrics, response_metrics, reward_metrics
from lpexp.metric.sync import sync_metrics
from lpexp.sentinel import Alarm, Sentinels

if TYPE_CHECKING:
    from lpexp.experiment import Experiment

PACKAGES = ("lpexp", "torch", "ray", "numpy", "pydantic", "hydra-core", "safetensors", "tokenizers", "wandb")
WANDB_TIMEOUT_S = 20
WANDB_ID = "wandb_id.txt"


class Log:
    """Everything that a run writes down, in the driver. `contract` is the hash of what both sides must agree on."""

    def __init__(self, exp: Experiment, run_dir: Path, start_step: int, overrides: Sequence[str], contract: str):
        run_dir.mkdir(parents=True, exist_ok=True)
        self.exp, self.run_dir, self.overrides, self.contract = exp, run_dir, list(overrides), contract
        self.console = Console(exp.steps, start_step)
        self.version: int | None = None  # what the rollout serves, once a sync was logged
        self.agreed = False  # set once trainer and rollout were found to hold that contract
        self.memory = _Memory()
        self._clock = _Clock()
        self._started = False
        _describe(self)
        there = journal.cut(run_dir / journal.METRICS, start_step)
        self.sentinels = Sentinels(exp, run_dir, journal.read(run_dir / journal.METRICS))
        self.event("start", step=start_step, pid=os.getpid(), overrides=self.overrides, contract=contract)
        if there != list(range(start_step)):
            lacking = sorted(set(range(start_step)) - set(there))
            self.warn("journal", f"{journal.METRICS} lacks the steps {lacking} that ran before step {start_step}")
        if said := exp.fault.told(exp):
            self.event("fault", name=exp.fault.name, hidden=exp.fault.hidden, message=said)
        self._wandb = _Wandb(exp, run_dir, self.warn)
        self.console.header(exp, run_dir, contract, start_step)

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[Note]:
        """One step: what is noted inside becomes its line when the body ends; nothing is written when it raises."""
        if not self._started:  # start-up belongs to no step
            self._clock, self._started = _Clock(), True
        note = Note(self, step)
        try:
            yield note
            line = note.line()
            journal.append(self.run_dir / journal.METRICS, line)
        finally:
            self._clock = _Clock()
        self._wandb.log(line)
        self.console.step(line)
        for alarm in self.sentinels.look(line):
            self.alarm(alarm)

    def time(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Seconds spent inside count as time/<name>, in the line of the step that runs or comes next."""
        return self._clock.time(name)

    def event(self, kind: str, **fields: Any) -> None:
        """Something that happened beside the steps: a line of events.jsonl."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        journal.append(self.run_dir / journal.EVENTS, {"time": now, "kind": kind, **fields})

    def warn(self, kind: str, message: str) -> None:
        """An event that the person who watches should know of."""
        self.event(kind, message=message)
        self.console.warn(message)

    def alarm(self, alarm: Alarm) -> None:
        """What a sentinel found; with on_alarm=stop a RunError too."""
        self.event("alarm", **alarm._asdict())
        self.console.warn(str(alarm))
        if self.exp.on_alarm == "stop":
            way = f"resume=auto output_dir={self.run_dir} on_alarm=warn goes on"
            raise RunError(f"stopped by on_alarm=stop at step {alarm.step}, sentinel {alarm.sentinel}; {way}")

    def sync(self, report: SyncReport) -> Metrics:
        """Judge a weight update and remember its version; returns its metrics. For the one before the first step.

        RunError when an engine holds other bytes than were sent, or the version is not the next one.
        """
        found = sync_metrics(report, self.version)
        self.version = report.version
        return found

    def summary(self) -> dict[str, Any]:
        """Print the summary and the next command, write summary.json and report.png; returns what was written."""
        from lpexp import report

        found = report.summarise(self.run_dir)
        found |= {"trainer": side(self.exp, self.exp.precision), "rollout": side(self.exp, self.exp.wire)}
        if said := served_first(self.exp):
            found["checkpoint"] = said
        if said := self.exp.fault.told(self.exp):
            found["fault"] = said
        found |= {"contract": self.contract, "run_dir": str(self.run_dir)}
        found["next"] = _next_command(self.exp, self.overrides)
        journal.write(self.run_dir / "summary.json", json.dumps(found, indent=1) + "\n")
        picture = report.draw(self.run_dir)
        notes = [f"picture  {picture}"]
        if found["next"]:
            notes.append(f"next     {found['next']}")
        self.console.summary(self.exp.name, report.rows(found), notes)
        return found

    def close(self) -> None:
        """End the wandb file and the progress bar. May be called twice."""
        self._wandb.close()
        self.console.close()


class Note:
    """What is known of one step so far."""

    def __init__(self, log: Log, step: int):
        self.step, self._log = step, log
        self._metrics: Metrics = {}
        self._spent: dict[str, float] = {}  # seconds that a trainer reported from inside a timed part
        self._generated = self._samples = self._longest = self._learned = 0
        self._generating = 0.0

    def time(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Seconds spent inside count as time/<name>; those of a part inside another count for the inner one only."""
        return self._log.time(name)

    def rollout(self, groups: Sequence[Group], seconds: float) -> None:
        """Scored groups, all samples of the step before any filter: reward/* and response/*.

        `seconds` is how long they were generated, which the wait for them may be shorter than.
        """
        self._generating = seconds
        self._add(reward_metrics(groups) | response_metrics(groups))
        lengths = [len(sample.tokens_T) for group in groups for sample in group.samples]
        self._generated, self._samples, self._longest = sum(lengths), len(lengths), max(lengths)

    def eval(self, name: str, greedy: Sequence[Group], sampled: Sequence[Group]) -> None:
        """Scored held-out groups: one greedy answer a prompt, and n sampled ones; replaces an earlier one."""
        found = eval_metrics(name, greedy, sampled)
        version = sampled[0].samples[0].version
        self._metrics = {key: value for key, value in self._metrics.items() if key not in found}
        self._add(found)
        self._log.event("eval", set=name, step=self.step, version=version, metrics=found)
        self._log.console.evaluated(name, version, found, greedy, self._log.exp.eval.show)

    def learn(self, report: LearnReport) -> None:
        """A trainer step: mismatch/*, staleness/*, offpolicy/*, correction/*, update/*, train/*."""
        import torch

        exp, batch = self._log.exp, report.batch
        if alarm := self._log.sentinels.nonfinite(report):
            self._log.alarm(alarm)
        lp_P, lp_R, mask = (torch.from_numpy(a) for a in (report.lp_P, batch.logprobs_rollout_NT, batch.mask_NT))
        low, high = (cut.numpy() for cut in exp.correction.clipped(lp_P, lp_R, mask))
        clip_low, clip_high = getattr(exp.algorithm, "clip_low", None), getattr(exp.algorithm, "clip_high", None)
        bounds = None if clip_low is None or clip_high is None else (clip_low, clip_high)  # not every algorithm clips
        self._add(mismatch_metrics(report.lp_T, batch.logprobs_rollout_NT, batch.mask_NT, report.entropy))
        self._add(learn_metrics(report, bounds, low, high))
        if worst := worst_tokens(report):
            self._add({"mismatch/worst_tokens": worst})
        self._learned = int(batch.mask_NT.sum())
        self._spent |= report.seconds

    def sync(self, report: SyncReport) -> None:
        """A weight update: sync/* and quant/*."""
        self._add(self._log.sync(report))
        if self._log.agreed:
            self._add({"sync/contract_ok": 1})

    def line(self) -> Metrics:
        """The step's line, complete. RunError when a value is not finite, naming its key."""
        times = self._log._clock.stop(self._spent)
        speeds = {
            "throughput/rollout_tokens_per_s": (self._generated, self._generating),
            "throughput/train_tokens_per_s": (self._learned, times.get("time/learn")),
            "throughput/samples_per_s": (self._samples, times["time/step"]),
            "throughput/longest_sample_tokens_per_s": (self._longest, self._generating),
        }
        self._add(times | {key: amount / seconds for key, (amount, seconds) in speeds.items() if amount and seconds})
        self._add({"memory/host_rss_bytes": self._log.memory.resident_bytes()})
        for key, value in self._metrics.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise RunError(f"step {self.step}: {key} is {value}; nothing is logged for this step")
        return {"step": self.step, **self._metrics}

    def _add(self, found: Metrics) -> None:
        twice = sorted(set(found) & set(self._metrics))
        assert not twice, f"step {self.step} notes twice: {twice}"
        unknown = sorted(key for key in found if find(key) is None)
        assert not unknown, f"not in the metric dictionary (lpexp/metric/__init__.py): {unknown}"
        self._metrics |= found


class _Memory:
    """Resident bytes of this process and everything below it, at most a second old: quick steps share one look at
    every process of the machine."""

    AGE_S = 1.0

    def __init__(self) -> None:
        self._bytes, self._seen = 0, -math.inf

    def resident_bytes(self) -> int:
        import psutil

        if time.monotonic() - self._seen > self.AGE_S:
            me = psutil.Process()
            self._bytes, self._seen = 0, time.monotonic()
            for process in (me, *me.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it ended while we counted
                    self._bytes += process.memory_info().rss
        return self._bytes


class _Clock:
    """Wall time since it was made, and the parts of it that have a name."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._parts: dict[str, float] = {}
        self._inner: list[float] = []  # of each open part, the seconds that parts inside it claim

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        assert find(f"time/{name}") is not None, f"time/{name} is not in the metric dictionary"
        begin = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            self._parts[name] = self._parts.get(name, 0.0) + spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent

    def stop(self, reported: dict[str, float]) -> Metrics:
        """time/*: the parts and `unaccounted` sum to `step`. A trainer reports what only it can split.

        Its recompute is taken out of learn; its optimizer stays inside learn and is in no sum.
        """
        whole = time.perf_counter() - self._since
        parts = dict(self._parts)
        if "recompute" in reported and "learn" in parts:
            parts["recompute"] = min(reported["recompute"], parts["learn"])
            parts["learn"] -= parts["recompute"]
        found = {f"time/{name}": seconds for name, seconds in parts.items()}
        if "optimizer" in reported:
            found["time/optimizer"] = reported["optimizer"]
        return found | {"time/unaccounted": whole - sum(parts.values()), "time/step": whole}


class _Wandb:
    """The wandb side: whatever fails there costs a warning and an event, never the run."""

    def __init__(self, exp: Experiment, run_dir: Path, warn: Callable[[str, str], None]):
        self._warn, self._run = warn, None
        if exp.wandb.mode == "disabled":
            return
        self._run = self._attempt("init", self._init, exp, run_dir, exp.wandb.mode)
        if self._run is None and exp.wandb.mode == "online":
            self._attempt("teardown", _end_wandb_service)  # it holds on to the id of the run that could not begin
            self._run = self._attempt("init", self._init, exp, run_dir, "offline")
            if self._run is not None:
                warn("wandb", f"wandb writes offline; later: wandb sync {run_dir}/wandb/offline-run-*")

    def _init(self, exp: Experiment, run_dir: Path, mode: Any) -> Any:
        import wandb

        stored = run_dir / WANDB_ID
        if not stored.exists():
            journal.write(stored, secrets.token_hex(4) + "\n")
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            x_disable_stats=True,
            init_timeout=WANDB_TIMEOUT_S,
        )
        return wandb.init(
            project=exp.wandb.project,
            group=exp.wandb.group,
            tags=exp.wandb.tags,
            name=exp.name,
            id=stored.read_text().strip(),
            mode=mode,
            resume="allow" if mode == "online" else None,  # offline, a second file of this id is joined at upload
            config=exp.dump(),
            dir=str(run_dir),
            settings=settings,
        )

    def log(self, line: Metrics) -> None:
        if self._run is not None:
            self._attempt("log", self._run.log, line, line["step"], True)

    def close(self) -> None:
        if self._run is not None:
            self._attempt("finish", self._run.finish)
            self._attempt("teardown", _end_wandb_service)  # only then the whole file is on disk
            self._run = None

    def _attempt(self, what: str, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:
            self._run = None
            lines = str(error).strip().splitlines() or [""]
            self._warn(
                "wandb", f"wandb {what} failed ({type(error).__name__}: {lines[0]}); metrics.jsonl has everything"
            )
            return None


def _end_wandb_service() -> None:
    """Wait until wandb's own process has written everything and ended."""
    import wandb

    wandb.teardown()


def _describe(log: Log) -> None:
    """Write what the run is made of. A resumed run replaces it by what runs now; events.jsonl says when that began."""
    import yaml

    write, at = journal.write, log.run_dir
    write(at / "config.yaml", yaml.safe_dump(log.exp.dump(), sort_keys=False))
    write(at / "overrides.yaml", yaml.safe_dump(log.overrides))
    write(at / "versions.json", json.dumps(versions(), indent=1) + "\n")
    write(at / "hardware.json", json.dumps(hardware(), indent=1) + "\n")
    write(at / "contract.txt", log.contract + "\n")


def versions() -> dict[str, Any]:
    """Python, the packages that make the numbers, and the source's git commit; null for what is not installed."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    root = Path(__file__).parents[1]
    if (root / ".git").exists():
        found["git_commit"] = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
        changed = _output(["git", "-C", str(root), "status", "--porcelain"])
        found["git_dirty"] = None if changed is None else bool(changed)
    return found


def hardware() -> dict[str, Any]:
    """Processor, usable cores, memory in bytes, accelerators, what multiplies bf16 on the processor (null: float32),
    and the thread variables that change speed."""
    import psutil

    from lpexp.precision.native import bf16_units

    cpuinfo = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    gpus = _output(query) if shutil.which("nvidia-smi") else None
    return {
        "host": platform.node(),
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_bf16_units": bf16_units(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus.splitlines() if gpus else [],
        "environment": {
            name: os.environ[name] for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES") if name in os.environ
        },
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _output(command: list[str]) -> str | None:
    """What a command prints, None when it cannot say."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _kept(overrides: Sequence[str], *dropped: str) -> list[str]:
    """The overrides that a next run shares: without where it writes, and without the groups `dropped`."""
    dropped = (*dropped, "output_dir", "resume", "resume_force", "hydra")
    keys = [override.lstrip("+~").partition("=")[0].partition("@")[0] for override in overrides]
    return [
        override
        for override, key in zip(overrides, keys, strict=True)
        if not any(key == name or key.startswith(f"{name}.") for name in dropped)
    ]


def _next_command(exp: Experiment, overrides: Sequence[str]) -> str | None:
    """The experiment that this one raises: serve another precision, or train in the one that was served."""
    words = sorted(path.stem for path in (Path(__file__).parents[1] / "conf" / "precision").glob("*.yaml"))
    trainer, plain = exp.precision.name, exp.precision.plain.name
    kept = _kept(overrides, "precision", "rollout.precision", "rollout.checkpoint")
    if exp.wire != exp.precision:  # a mismatch was measured: now without it
        chosen = [f"precision={exp.wire.name}"] if exp.wire.trains and exp.wire.name in words else []
    else:
        others = [plain] if plain != trainer else [word for word in words if word not in (trainer, "bf16", "fp32")]
        chosen = [f"precision={trainer}", f"precision@rollout.precision={others[0]}"] if others else []
    if not chosen:
        return None
    return shlex.join(["python", "launch.py", *kept, *chosen])
