"""The main loop: prompts -> groups -> batch -> weights -> wire -> prompts."""

from __future__ import annotations

from collections.abc import Sequence

from lpexp import checkpoint, record
from lpexp.errors import Stopped
from lpexp.experiment import Experiment
from lpexp.session import Session


def run(exp: Experiment, overrides: Sequence[str] = ()) -> int:
    """Train `exp.steps` steps, or the rest of them; the exit code. RunError and ConfigError propagate."""
    with Session(exp, overrides) as run:
        try:
            for step in range(run.start, exp.steps):
                train(run, step)
                run.stop.at_safe_point(lambda version=step + 1: run.save(version))
            run.save(exp.steps)
        except Stopped as stopped:
            run.log.warn("stopped", f"{stopped}; go on with: {run.resume_command()}")
            return 128 + stopped.signal
        checkpoint.finish(run.run_dir, run.log.summary())
    return 0


def train(run: Session, step: int) -> None:
    """Line `step` of the log: the weights of version `step` are kept, evaluated and trained one batch further."""
    exp, rollout, trainer = run.exp, run.rollout, run.trainer
    with run.log.step(step) as note:
        if step > run.start and step % exp.checkpoint.every == 0:
            with note.time("checkpoint"):
                run.save(step)
        if step % exp.eval.every == 0:
            with note.time("eval"):
                note.eval(exp.task.name, *run.evaluations(step))
        with note.time("rollout"):
            groups, seconds = run.pipeline.next(step)  # sampled by weights at most exp.lag versions old
        with note.time("reward"):
            groups = exp.task.score(groups, run.tokenizer)
        with note.time("learn"):  # what follows is queued: workers go on without waiting for the driver
            learning = trainer.step(exp.algorithm.batch(groups, step))
            with note.time("sync"):
                update = trainer.publish(rollout, version=step + 1)
            run.pipeline.ask_ahead(step + 1)
            report = learning.result()
        with note.time("sync"):
            note.rollout(groups, seconds)
            note.learn(report)
            note.sync(update.result())
        if step + 1 == exp.steps:
            with note.time("eval"):
                note.eval(exp.task.name, *run.evaluations(exp.steps))
        record.save(run.run_dir, report, exp.record)
