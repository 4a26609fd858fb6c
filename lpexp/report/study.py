"""Runs on disk as a study: arms, whose runs differ in nothing but the seed; what sets the arms apart; what is broken.

Read are run directories, sweeps (lpexp/sweep.py) and folders of either. A run that cannot be read is named and left
out. Two arms may differ in their precisions and in the axes of their sweep; what else differs makes them incomparable,
unless it is allowed by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lpexp import checkpoint, journal, sweep
from lpexp.errors import ConfigError
from lpexp.experiment import MAY_CHANGE
from lpexp.metric.verdict import Score
from lpexp.precision import Precision

SIDES = ("precision", "rollout.precision", "rollout.checkpoint", "reference.precision")  # what arms are there for
ABSENT = "-"
Points = tuple[np.ndarray, np.ndarray]  # x, y


@dataclass(frozen=True)
class Run:
    """One run directory. `flat` is its config by dotted key, without seed, name and what decides no number."""

    path: Path
    called: str | None  # its arm's name in a sweep
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    events: list[dict[str, Any]]
    finished: bool

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def steps(self) -> int:
        return self.config["steps"]

    @cached_property
    def flat(self) -> dict[str, Any]:
        kept = {key: value for key, value in self.config.items() if key not in (*MAY_CHANGE, "seed", "name")}
        return dict(checkpoint.flat(kept))

    @property
    def state(self) -> str:
        return "finished" if self.finished else f"{len(self.lines)} of {self.steps} steps"

    def curve(self, key: str) -> Points:
        """x: steps that are done; y: this key, where it was logged."""
        there = [(line["step"] + 1, line[key]) for line in self.lines if key in line]
        return np.array([x for x, _ in there]), np.array([y for _, y in there], dtype=float)

    @cached_property
    def evaluations(self) -> dict[int, dict[str, Any]]:
        """{weight version: its event}; one that was made again after a resume counts once, the later one."""
        return {event["version"]: event for event in self.events if event["kind"] == "eval"}

    def evaluated(self, score: str) -> Points:
        """x: weight versions; y: greedy_acc, sampled_acc, pass_at_k or mean_reward."""
        there = [(at, value_of(event, score)) for at, event in sorted(self.evaluations.items())]
        return np.array([x for x, _ in there]), np.array([y for _, y in there], dtype=float)

    def score(self) -> Score | None:
        """Held-out accuracy of sampled answers of the final weights; None when the run has not got there."""
        event = self.evaluations.get(self.steps)
        if event is None:
            return None
        accuracy = value_of(event, "sampled_acc")
        if "correct" not in event:
            return Score(accuracy)
        return Score(accuracy, np.array(event["correct"]) / event["answers"], event["prompts"])

    def described(self, name: str) -> dict[str, Any]:
        """versions.json or hardware.json."""
        path = self.path / name
        return json.loads(path.read_bytes()) if path.exists() else {}

    def typed(self) -> list[str]:
        """The overrides that it was started with."""
        starts = [event for event in self.events if event["kind"] == "start"]
        return list(starts[0].get("overrides", [])) if starts else []

    @property
    def contract(self) -> str:
        path = self.path / "contract.txt"
        return path.read_text().strip() if path.exists() else ABSENT


@dataclass
class Arm:
    """Runs that differ in the seed alone, by seed."""

    name: str
    runs: dict[int, Run]

    @property
    def any(self) -> Run:
        return next(iter(self.runs.values()))

    @property
    def flat(self) -> dict[str, Any]:
        return self.any.flat

    def side(self, key: str) -> Precision:
        """The precision at `precision`, or at `rollout.precision` (where that is null, the trainer's)."""
        held = self.any.config
        given = held["precision"] if key == "precision" else held["rollout"].get("precision") or held["precision"]
        return Precision.model_validate(given)

    @property
    def matched(self) -> bool:
        return self.side("precision") == self.side("rollout.precision")

    @property
    def plain(self) -> bool:
        """Is nothing quantised on either side?"""
        trainer = self.side("precision")
        return self.matched and trainer.plain.name == trainer.name

    def each(self, key: str) -> list[np.ndarray]:
        """This key's values by step, one array a run that logged it."""
        return [y for run in self.runs.values() if len(y := run.curve(key)[1])]


@dataclass
class Study:
    """Everything that a report is made from."""

    arms: list[Arm] = field(default_factory=list)
    question: str = ""
    command: str = ""  # of a sweep
    home: Path | None = None  # of a sweep
    allowed: list[str] = field(default_factory=list)  # dotted keys that arms may differ in
    broken: list[tuple[str, str]] = field(default_factory=list)  # what cannot be read or failed, and why
    twice: list[Path] = field(default_factory=list)  # runs of a seed and an arm that were there already
    reference: Arm | None = None

    @property
    def runs(self) -> list[Run]:
        return [run for arm in self.arms for run in arm.runs.values()]

    def differing(self) -> dict[str, list[Any]]:
        """{dotted key: its value in each arm}, for the keys in which arms differ."""
        keys = dict.fromkeys(key for arm in self.arms for key in arm.flat)
        rows = {key: [arm.flat.get(key, ABSENT) for arm in self.arms] for key in keys}
        return {key: row for key, row in rows.items() if len({json.dumps(value) for value in row}) > 1}

    def foreign(self, arm: Arm) -> list[str]:
        """Keys in which an arm differs from the reference though neither its precisions nor its sweep explain it."""
        assert self.reference is not None
        ours, theirs = arm.flat, self.reference.flat
        keys = [key for key in {**ours, **theirs} if ours.get(key, ABSENT) != theirs.get(key, ABSENT)]
        return [key for key in keys if not any(under(key, allowed) for allowed in (*SIDES, *self.allowed))]

    def pairs(self, arm: Arm) -> list[tuple[Run, Run]]:
        """Runs of an arm and of the reference with the same seed."""
        assert self.reference is not None
        return [(run, self.reference.runs[seed]) for seed, run in arm.runs.items() if seed in self.reference.runs]

    def other_source(self, arm: Arm) -> list[str]:
        """Packages and commits in which an arm's runs differ from the reference's, one sentence each."""
        assert self.reference is not None
        found = []
        for key in ("git_commit", "lpexp", "torch", "numpy"):
            ours, theirs = (
                {str(run.described("versions.json").get(key)) for run in one.runs.values()}
                for one in (arm, self.reference)
            )
            if ours != theirs:
                found.append(f"{key} {', '.join(sorted(v[:12] for v in ours | theirs))}")
        return found


def value_of(event: dict[str, Any], score: str) -> float:
    """A score of an evaluation's event; its keys end in the score's name."""
    return next(value for key, value in event["metrics"].items() if key.rpartition("/")[2] == score)


def under(key: str, parent: str) -> bool:
    """Is this dotted key the other one, or inside it?"""
    return key == parent or key.startswith(f"{parent}.")


def collect(places: Sequence[Path], reference: str | None = None, allowed: Sequence[str] = ()) -> Study:
    """The study in these directories; ConfigError when one holds no run, or none of the runs has a step."""
    study = Study(allowed=list(allowed))
    runs: list[Run] = []
    for place in places:
        if not place.is_dir():
            raise ConfigError(f"{place} is no directory; name a run, a sweep, or a folder of them")
        before = len(runs) + len(study.broken)
        for path, called, why in _found(place, study):
            label = f"{path} ({called})" if called else str(path)
            if why:
                study.broken.append((label, why))
            try:
                run = _read(path, called)
            except ConfigError as error:
                if not why:
                    study.broken.append((label, str(error)))
                continue
            runs.append(run)
        if len(runs) + len(study.broken) == before:
            raise ConfigError(f"{place} holds no run and no sweep; name a run directory, a sweep, or a folder of them")
    if not runs:
        lines = "\n".join(f"  {label}: {why}" for label, why in study.broken)
        raise ConfigError(f"no run has a step yet, so there is nothing to report\n{lines}")
    arms = _arms(runs, study.twice)
    study.reference = _reference(arms, reference)
    study.arms = [study.reference, *(arm for arm in arms if arm is not study.reference)]
    return study


def _found(place: Path, study: Study) -> Iterator[tuple[Path, str | None, str]]:
    """(run directory, its arm's name in a sweep, why it failed) of everything in a place."""
    if (place / sweep.FILE).exists():
        found = sweep.load(place)
        study.question = study.question or found.question
        if study.home is None:
            study.command, study.home = found.command, place
        study.allowed += [key for key in found.axes if key != "seed" and key not in study.allowed]
        for job in found.jobs:
            why = job.why if job.state == sweep.FAILED else ""
            if why or sweep.steps_done(place, job):
                yield place / job.folder, job.arm or None, why
            else:
                study.broken.append((f"{place / job.folder} ({job.label})", "has no step yet"))
    elif is_run(place):
        yield place, None, ""
    else:
        for child in sorted(place.iterdir()):
            if child.is_dir() and (is_run(child) or (child / sweep.FILE).exists()):
                yield from _found(child, study)


def is_run(path: Path) -> bool:
    return (path / "config.yaml").exists() or (path / journal.METRICS).exists()


def _read(path: Path, called: str | None) -> Run:
    """ConfigError when a file of the run is missing or damaged, or it has no step."""
    import yaml

    try:
        config = yaml.safe_load((path / "config.yaml").read_text())
        lines, events = journal.read(path / journal.METRICS), journal.read(path / journal.EVENTS)
        run = Run(path, called, config, lines, events, False)
        finished = (path / checkpoint.FINISHED).exists() and len(lines) == run.steps and run.score() is not None
        _ = run.seed, run.flat, Arm("", {0: run}).plain, [line["step"] for line in lines]  # what every reader needs
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, StopIteration, ValueError) as error:
        raise ConfigError(f"cannot be read ({type(error).__name__}: {error})") from None
    if not lines:
        raise ConfigError("has no step yet")
    return Run(path, called, config, lines, events, finished)


def _arms(runs: Iterable[Run], twice: list[Path]) -> list[Arm]:
    """Runs of one config but for the seed, in the order in which they were found."""
    held: dict[str, list[Run]] = {}
    for run in runs:
        held.setdefault(json.dumps(run.flat, sort_keys=True), []).append(run)
    arms = []
    for alike in held.values():
        kept: dict[int, Run] = {}
        for run in sorted(alike, key=lambda run: not run.finished):  # of two runs of a seed the finished one
            if run.seed in kept:
                twice.append(run.path)
            else:
                kept[run.seed] = run
        arms.append(Arm(alike[0].called or "", dict(sorted(kept.items()))))
    names = [arm.name for arm in arms]
    for arm, name in zip(arms, _describe(arms), strict=True):
        if not arm.name or names.count(arm.name) > 1:
            arm.name = name
    return arms


def _describe(arms: Sequence[Arm]) -> list[str]:
    """What sets each arm apart, in few words: trainer / rollout, and what else differs between arms of that name."""
    bases = []
    for arm in arms:
        trainer, rollout = arm.side("precision").name, arm.side("rollout.precision").name
        bases.append(trainer if arm.matched else f"{trainer} / {rollout}")
    names = []
    for arm, base in zip(arms, bases, strict=True):
        alike = [other.flat for other, name in zip(arms, bases, strict=True) if name == base]
        keys = dict.fromkeys(key for flat in alike for key in flat if not key.endswith("_target_"))
        varied = [key for key in keys if len({json.dumps(flat.get(key, ABSENT)) for flat in alike}) > 1]
        words = ", ".join(f"{key.rpartition('.')[2]} {arm.flat.get(key, ABSENT)}" for key in varied)
        names.append(f"{base} ({words})" if words else base)
    return names


def _reference(arms: Sequence[Arm], name: str | None) -> Arm:
    """What the others are judged against: the one named, else the first that quantises nothing, else the first."""
    if name is not None:
        found = next((arm for arm in arms if arm.name == name), None)
        if found is None:
            raise ConfigError(f"--reference: there is no arm {name!r}; there are {', '.join(a.name for a in arms)}")
        return found
    return next((arm for arm in arms if arm.plain), arms[0])
