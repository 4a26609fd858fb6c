"""Stored rollouts: one safetensors file a step, so that later tools can re-score what happened.

`<run>/record/<step:06d>.safetensors` has tokens, masks, lp_R, lp_T, rewards, advantages, versions, ids and the router's
choices; the newest `record.keep` stay. The first two steps and every `record.weights_every`th are kept whole: beside
the batch, `record/weights/<step:06d>/` has what each side computed it with. `trainer` holds the 16-bit weights of the
version that sampled, `newest` those before the step where lag makes them others, `rollout` the parts that an engine
held, with its precision and how it drew. Of the whole ones the first two and the newest `record.keep` stay.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from lpexp.data import Batch, LearnReport
from lpexp.experiment import Record

FOLDER, WEIGHTS = "record", "weights"
TRAINER, NEWEST, ROLLOUT = (f"{side}.safetensors" for side in ("trainer", "newest", "rollout"))
FIRST = 2  # steps from the start that are kept whole: what a sentinel looks at first


def whole(spec: Record, step: int) -> bool:
    """Are both sides' weights kept beside this step's batch?"""
    return spec.keep > 0 and spec.weights_every > 0 and (step < FIRST or step % spec.weights_every == 0)


def beside(run_dir: Path, step: int) -> Path:
    """The directory of both sides' weights of a step."""
    return run_dir / FOLDER / WEIGHTS / f"{step:06d}"


def steps(run_dir: Path) -> tuple[list[int], list[int]]:
    """(steps whose batch is stored, those of them with the weights of both sides), in order."""
    batches = sorted(int(path.stem) for path in (run_dir / FOLDER).glob("[0-9]*.safetensors"))
    return batches, [n for n in batches if all((beside(run_dir, n) / side).exists() for side in (TRAINER, ROLLOUT))]


def save(run_dir: Path, report: LearnReport, spec: Record) -> None:
    """Write this step's file whole or not at all, then drop what is beyond `spec.keep`."""
    if spec.keep == 0:
        return
    from safetensors.numpy import save_file

    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    arrays = {name: value for name, value in vars(report.batch).items() if isinstance(value, np.ndarray)}
    arrays |= {name: getattr(report, name) for name in ("lp_T", "lp_P", "lp_C", "entropy", "weights")}
    if report.lp_ref is not None:
        arrays["lp_ref"] = report.lp_ref
    path = _batch(run_dir, report.batch.step)
    made = path.with_suffix(".tmp")
    facts = {"step": str(report.batch.step), "version": str(report.version), "group_size": str(report.batch.group_size)}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, made, facts)
    made.replace(path)
    _prune(run_dir, spec.keep)


def _prune(run_dir: Path, keep: int) -> None:
    batches, _ = steps(run_dir)
    begun = sorted(int(path.name) for path in (run_dir / FOLDER / WEIGHTS).glob("[0-9]*"))  # one may lie ahead
    kept = {step for step in begun if step < FIRST} | {*begun[-keep:]}
    for step in set(begun) - kept:
        shutil.rmtree(beside(run_dir, step))
    for step in set(batches[:-keep]) - kept:
        _batch(run_dir, step).unlink()


def _batch(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"{step:06d}.safetensors"


def load(path: Path) -> tuple[Batch, dict[str, np.ndarray]]:
    """The batch of a step, and what the trainer found: lp_T, lp_P, lp_C, entropy, weights."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        facts, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    fields = {name: arrays.pop(name) for name in list(arrays) if name in Batch.__dataclass_fields__}
    return Batch(step=int(facts["step"]), group_size=int(facts["group_size"]), **fields), arrays
