"""What to try next, with the numbers of the runs at hand: each piece names its key and the value to type.

The first two rows are the tuning table of the INT4 guide (quality below bf16: smaller groups or better calibration;
slower than bf16: batches that the engine was not made for); the rest follows from what a run measures.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lpexp.report.findings import K3, LAST, MAX, MEAN, Findings, Judged, count, listed, sci, signed
from lpexp.report.study import Arm, Study

SLOWER = 1.1  # of the reference's time a step
FEWER = 0.9  # effective sample size
GROWS = 2.0  # mismatch, last steps over first
FINEST = 32  # the smallest group that formats offer


class Advice(NamedTuple):
    """`why` holds for all of its cases; a case is what was measured, and what to type."""

    title: str
    why: str
    cases: list[tuple[str, str]]


Piece = tuple[str, str, str, str]  # title, why, what was measured, what to type


def advise(found: Findings) -> list[Advice]:
    """Every piece once, with all arms that it is for."""
    study = found.study
    pieces: list[Piece] = [*_decide(found)]
    for verdict in found.verdicts:
        pieces += _quality(study, verdict, found.margin)
    for arm in study.arms:
        pieces += [*_speed(study, arm), *_mismatch(arm), *_correction(arm)]
    if study.broken:
        pieces.append(_repeat(study))
    said: dict[str, Advice] = {}
    for title, why, measured, typed in pieces:
        said.setdefault(title, Advice(title, why, [])).cases.append((measured, typed))
    return list(said.values())


def _decide(found: Findings) -> Iterator[Piece]:
    """More seeds, as a command that keeps the runs there are."""
    study = found.study
    wanted = {v.arm.name: v.more for v in found.verdicts if v.status == "undecided" and v.more is not None}
    if not wanted:
        return
    most, seeds = max(wanted.values()), sorted({run.seed for run in study.runs})
    more = list(range(seeds[-1] + 1, seeds[-1] + 1 + most))
    each = ", ".join(f"{name} {number}" for name, number in wanted.items())
    why = f"So many would decide with 80 % chance at a margin of {found.margin:g}. Runs that have finished are kept."
    yield "Add seeds", why, f"More seeds: {each}.", _again(study, f"seed={','.join(map(str, (*seeds, *more)))}")


def _again(study: Study, *words: str) -> str:
    """The sweep's command with other words, going on in its directory; nothing where there is no sweep."""
    if not study.command or study.home is None:
        return ""
    keys = ("resume=", "output_dir=", *(f"{word.partition('=')[0]}=" for word in words))
    kept = [word for word in shlex.split(study.command) if not word.startswith(keys)]
    return shlex.join([*kept, *words, "resume=auto", f"output_dir={study.home}"])


def _quality(study: Study, verdict: Judged, margin: float) -> Iterator[Piece]:
    """Accuracy below the reference: a finer group, training that knows the rounding, a better calibration."""
    arm, difference = verdict.arm, verdict.found
    if difference is None or (verdict.status != "worse" and difference.mean > -margin):
        return
    trainer, rollout = arm.side("precision"), arm.side("rollout.precision")
    lost = f"{arm.name} ended {signed(difference.mean)} from {study.reference.name if study.reference else ''}"
    error = [y.mean() for key in _quant(arm) for y in arm.each(key)]
    rounding = f", rounding error {100 * np.mean(error):.1f} %" if error else ""
    served, trained = (getattr(side, "group_size", None) for side in (rollout, trainer))
    if (group := served or trained) and group > FINEST:
        place = "rollout.precision" if served and not arm.matched else "precision"
        why = "Smaller groups round less, for at most half a bit a weight more."
        yield "Smaller groups", why, f"{lost}{rounding}, groups of {group}.", f"{place}.group_size={group // 2}"
    if not arm.matched and trainer.plain.name == trainer.name and rollout.trains:
        why = "The trainer never sees the rounding that the rollout serves. Training in it closes the gap."
        yield "Train in what is served", why, f"{lost}.", f"precision={rollout.name}"
    elif not arm.matched:
        why = "The trainer computes in another precision than it is served in, and nothing gains by that."
        yield "Serve what is trained", why, f"{lost}.", f"precision={trainer.name}"
    if arm.any.config["rollout"].get("checkpoint"):
        why = "A calibration that saw more samples may round better; 256 is the default."
        yield "Recalibrate", why, f"{lost}{rounding}.", "lpexp convert ... --method gptq --num-calibration-samples 512"


def _quant(arm: Arm) -> list[str]:
    return sorted({key for run in arm.runs.values() for key in run.lines[-1] if key.endswith("/rel_error")})


def _speed(study: Study, arm: Arm) -> Iterator[Piece]:
    """Slower than the reference: does the engine cover the batches that occur?"""
    if study.reference is None or arm is study.reference:
        return
    medians = {
        key: [float(np.mean([np.median(y) for y in one.each(key)] or [np.nan])) for one in (arm, study.reference)]
        for key in ("time/step", "time/rollout")
    }
    ours, theirs = medians["time/step"]
    if not ours > SLOWER * theirs:
        return
    rollouts = " and ".join(f"{seconds:.2f}" for seconds in medians["time/rollout"])
    took = f"{arm.name} takes {ours:.2f} s a step, {study.reference.name} {theirs:.2f} s (rollout {rollouts} s)"
    if not any(run.described("hardware.json").get("gpus") for run in arm.runs.values()):
        why = "A CPU emulates a low precision value by value, so its time says nothing of a GPU."
        yield "Slower here is not slower there", why, f"{took}.", ""
        return
    config: dict[str, Any] = arm.any.config
    rollout, samples = config["rollout"], config["algorithm"]["samples_per_prompt"] * config["task"]["prompts_per_step"]
    each = -(-samples // (rollout.get("engines", 1) if config["cluster"]["kind"] != "inline" else 1))
    graphs = next((value for key, value in rollout.items() if "graph" in key and isinstance(value, list)), None)
    covered = f"; its graphs cover up to {max(graphs)}" if graphs else ""
    why = "Check that the batch sizes of the engine's CUDA graphs cover the batches that occur."
    yield "Cover the batches that occur", why, f"{took}; an engine gets {each} sequences at once{covered}.", ""


def _mismatch(arm: Arm) -> Iterator[Piece]:
    """A gap that should not be, that grows, or that nothing corrects."""
    means = [y for y in arm.each(MEAN) if len(y)]
    if not any(y.any() for y in means):
        return
    mean, run = sci(float(np.mean([y.mean() for y in means]))), shlex.quote(str(arm.any.path))
    if arm.matched:
        worst = sci(max(y.max() for y in arm.each(MAX)))
        why = "Embedded backends agree exactly when both sides share a precision; others have kernels of their own."
        measured = f"{arm.name}: mean |d| {mean}, worst token {worst} nat."
        yield "Find the gap of a matched pair", why, measured, f"lpexp attribute {run}"
        return
    ends = [(y[:LAST].mean(), y[-LAST:].mean()) for y in means if len(y) >= 2 * LAST]
    first, last = np.mean(ends, axis=0) if ends else (0.0, 0.0)
    if last > GROWS * first:
        why = "A gap that grows has a cause that training feeds: see which factor, and which layer."
        measured = f"{arm.name}: mean |d| {sci(first)} in the first {LAST} steps, {sci(last)} in the last."
        yield "The mismatch grows", why, measured, f"lpexp attribute {run}"
    if arm.any.config["correction"].get("name") == "none":
        gap = sci(float(np.mean([y.mean() for y in arm.each(K3)])))
        why = "Tokens that another policy sampled bias the gradient when each weighs 1."
        yield "Correct for the mismatch", why, f"{arm.name}: KL k3 {gap} nat.", "correction=tis_token"


def _correction(arm: Arm) -> Iterator[Piece]:
    sizes = [y.mean() for y in arm.each("correction/ess")]
    if sizes and np.mean(sizes) < FEWER:
        why = "Where the sides disagree on many tokens, making them agree buys more than another bound."
        measured = f"{arm.name}: {np.mean(sizes):.0%} of a batch counts, effectively."
        yield "The correction discards samples", why, measured, f"lpexp replay {shlex.quote(str(arm.any.path))}"


def _repeat(study: Study) -> Piece:
    names = listed([label for label, _ in study.broken[:3]])
    why = "Finished runs are kept; a run that failed goes on from its last checkpoint."
    return "Repeat what failed", why, f"{count(len(study.broken), 'run')} gave no result: {names}.", _again(study)
