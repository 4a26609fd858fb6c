"""One run's surroundings: directory, log, workers, signals. Opened before the loop, closed on every way out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lpexp import checkpoint, journal, record, warmup
from lpexp.cluster import Workers
from lpexp.data import Group, SyncReport
from lpexp.errors import RunError
from lpexp.experiment import Experiment
from lpexp.log import Log
from lpexp.model.tokenizer import load_tokenizer
from lpexp.precision import digest
from lpexp.rollout import Pending, Sampling
from lpexp.stop import Stop


class Session:
    """Everything the loop works with; a context manager."""

    def __init__(self, exp: Experiment, overrides: Sequence[str]):
        self.exp, self.overrides = exp, list(overrides)

    def __enter__(self) -> Session:
        exp = self.exp
        resume = checkpoint.resolve(exp)
        self.start, self.run_dir = resume.step, resume.run_dir
        for note in resume.notes:
            print(note, file=sys.stderr, flush=True)
        with ExitStack() as stack:  # what was opened is closed, also when the next thing fails to open
            self.stop = stack.enter_context(Stop(exp.stop_grace_s))
            stack.enter_context(checkpoint.Claim(resume, exp))
            model = exp.model.sized()
            planned = exp.contract()
            self.log = Log(exp, self.run_dir, self.start, self.overrides, digest(planned))
            stack.callback(self.log.close)
            for note in resume.notes:
                self.log.event("resume", note=note)
            self.tokenizer = load_tokenizer(model)
            workers = Workers(exp.cluster, self.log.event, self.run_dir)
            self.stop.install()
            stack.callback(workers.close)
            stack.callback(self.log.close)  # before the workers' guardian ends every process below this one
            self.trainer = exp.trainer.build(exp, workers)
            stack.callback(self.trainer.close)
            self.rollout = exp.rollout.build(exp, workers)
            stack.callback(self.rollout.close)
            if resume.checkpoint is None and exp.task.warmup and not model.path and not warmup.cached(exp).exists():
                goal = f"sampled accuracy {exp.task.warmup.target:g}"
                self.log.console.say(
                    f"warming up from scratch to {goal}, kept in {warmup.cache_dir()} for the next run"
                )
            self.trainer.restore(resume.checkpoint)
            agree(planned, self.trainer.contract(), "trainer")
            agree(planned, self.rollout.contract(), "rollout")
            self.log.agreed = True
            self.log.event("workers", pids=workers.pids())
            self.pipeline = Pipeline(self)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def publish(self, version: int) -> SyncReport:
        """Serve a version: of a served checkpoint, version 0 is the directory itself, every later one the trainer's."""
        directory = self.exp.rollout.checkpoint
        if directory is None or version:
            return self.trainer.publish(self.rollout, version).result()
        report = self.rollout.open(directory)
        events = journal.read(self.run_dir / journal.EVENTS)
        before = [event["checksum"] for event in events if event["kind"] == "checkpoint_served"]
        if self.start and before and before[-1] != report.checksum_sent:
            raise RunError(
                f"rollout.checkpoint: {directory} has changed since this run began (its parts hash to "
                f"{report.checksum_sent}, then {before[-1]}); put back what was there, or start a new run"
            )
        self.log.event("checkpoint_served", directory=directory, version=version, checksum=report.checksum_sent)
        return report

    def save(self, version: int) -> Path:
        """A checkpoint of the weights after `version` batches."""
        state = checkpoint.describe(self.exp, version, version)
        return checkpoint.save(self.run_dir, version, state, self.trainer.save, self.exp.checkpoint.keep)

    def resume_command(self) -> str:
        """What to type to go on from the newest checkpoint."""
        dropped = ("resume=", "output_dir=")
        kept = [override for override in self.overrides if not override.startswith(dropped)]
        return shlex.join(["python", "launch.py", *kept, "resume=auto", f"output_dir={self.run_dir}"])

    def evaluations(self, version: int) -> list:
        """Greedy and sampled answers to the held-out prompts, scored."""
        exp = self.exp
        prompts = exp.task.held_out(exp.seed, exp.eval.prompts, self.tokenizer)
        drawn = Sampling(
            temperature=exp.eval.temperature, top_p=exp.eval.top_p, top_k=exp.eval.top_k, samples=exp.eval.samples
        )
        pending = [self.rollout.sample(prompts, s, version) for s in (Sampling(temperature=0.0), drawn)]
        return [exp.task.score(groups.result(), self.tokenizer) for groups in pending]


class Pipeline:
    """The batches in order. The next one is asked for as early as lag allows: before this one is learned from, or
    once the new weights are served, so that it is generated while the step is written down."""

    def __init__(self, session: Session):
        self.session = session
        self.pending: dict[int, Pending] = {}
        self.recording: dict[int, list[Any]] = {}  # both sides' weights being written down
        exp, start = session.exp, session.start
        self.sampling = Sampling(
            temperature=exp.rollout.temperature,
            top_p=exp.rollout.top_p,
            top_k=exp.rollout.top_k,
            samples=exp.algorithm.samples_per_prompt,
        )
        if exp.lag and start:  # the batch in hand was sampled by the weights one version back
            session.log.sync(session.publish(start - 1))
            self.ask(start)
        session.log.sync(session.publish(start))

    def ask(self, step: int) -> None:
        """Start generating the batch of a step, unless that has been done."""
        exp = self.session.exp
        if step in self.pending or step >= exp.steps:
            return
        prompts = exp.task.train(exp.seed, step, self.session.tokenizer)
        self.pending[step] = self.session.rollout.sample(prompts, self.sampling, step)
        if record.whole(exp.record, step):
            at = record.beside(self.session.run_dir, step)
            at.mkdir(parents=True, exist_ok=True)
            sampled = max(step - exp.lag, 0)  # the version that the engines serve now, and the trainer has at hand
            self.recording[step] = [
                self.session.trainer.record(at / record.TRAINER, sampled),
                self.session.rollout.record(at / record.ROLLOUT, self.sampling),
            ]

    def ask_ahead(self, step: int) -> None:
        """As `ask`, where generating goes on beside the driver; in one process it would only move the time."""
        if self.session.exp.cluster.kind != "inline":
            self.ask(step)

    def next(self, step: int) -> tuple[list[Group], float]:
        """The groups of this step, and the seconds that generating them took."""
        self.ask(step)
        pending = self.pending.pop(step)
        groups = pending.result()
        for written in self.recording.pop(step, ()):
            written.result()
        if self.session.exp.lag:
            if record.whole(self.session.exp.record, step):
                at = record.beside(self.session.run_dir, step) / record.NEWEST
                self.session.trainer.record(at, step).result()
            self.ask(step + 1)
        return groups, pending.seconds


def agree(planned: dict[str, str], loaded: dict[str, str], who: str) -> None:
    """RunError when what a side loaded is not what was planned; names the first tensor that differs."""
    for name in sorted({*planned, *loaded}):
        if planned.get(name) != loaded.get(name):
            raise RunError(
                f"{who} disagrees on {name}: it loaded {loaded.get(name, 'nothing')}, "
                f"the config says {planned.get(name, 'nothing')}"
            )
