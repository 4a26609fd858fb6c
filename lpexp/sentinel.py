"""Sentinels: look at every line of a run, and raise an alarm where a number is not what it should be.

An alarm says which number, what was expected, the likely causes in order, and what to run next. It becomes an event;
with `on_alarm=stop` it ends the run. A sentinel that has raised one is silent until the number is right again. What it
knows comes from the lines alone, so a resumed run raises the same alarms.

Left out: canary prompts, and change points further back than two windows. Bands: precision/bands.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lpexp import record
from lpexp.data import LearnReport, Metrics
from lpexp.precision.bands import Band, expected

if TYPE_CHECKING:
    from lpexp.experiment import Experiment

MEAN, MAX, K3 = (f"mismatch/{name}" for name in ("logprob_abs_diff_mean", "logprob_abs_diff_max", "kl_k3"))
ENTROPY, REWARD, UPDATE = "train/entropy", "reward/mean", "update/kl_k3"
CLIPPED = {"update/clip_frac_low_neg": "negative", "update/clip_frac_high_pos": "positive"}  # the binding corners
RATIO_FLOOR = 1e-6  # nat: below it a ratio of two KLs says nothing
RATIO = 3.0  # step 2 over step 1; an export bug elsewhere made 25, a healthy run 1.1
WINDOW = 20  # steps; trends compare the medians of two windows
DRIFT = 2.0
ENTROPY_RISE, ENTROPY_FALL = 1.5, 0.25
CLIP_FLOOR = 0.1  # share of a sign's tokens
SCALE = "a scale that was not loaded"
SAME_FORWARD = 1e-8  # nat: k3 between two forwards of the same weights


class Alarm(NamedTuple):
    sentinel: str
    step: int
    key: str  # the metric
    value: float
    expected: str
    causes: tuple[str, ...]  # the likeliest first
    next: str  # what to type

    def __str__(self) -> str:
        causes = "; ".join(f"{n}. {cause}" for n, cause in enumerate(self.causes, 1))
        told = f"{self.key} is {self.value:.3g}, expected {self.expected}"
        return f"alarm {self.sentinel} at step {self.step}: {told}\n  likely: {causes}\n  next:   {self.next}"


class Finding(NamedTuple):
    """What a sentinel found wrong with a line."""

    key: str
    value: float
    expected: str
    causes: tuple[str, ...]


class Sentinels:
    """One run's; `history` are the lines before the first one to come."""

    def __init__(self, exp: Experiment, run_dir: Path, history: Iterable[Metrics] = ()):
        self.exp, self.run_dir = exp, run_dir
        self.band = band_of(exp)
        self.seen: dict[str, list[float]] = {}
        self.sounding: set[str] = set()
        for line in history:
            self.look(line)

    def look(self, line: Metrics) -> list[Alarm]:
        """The alarms that this line raises."""
        for key in (MEAN, K3, ENTROPY, REWARD, *CLIPPED):
            if key in line:
                self.seen.setdefault(key, []).append(line[key])
        raised, sounding = [], set()
        for name, sentinel in SENTINELS.items():
            found = sentinel(self, line)
            if found is None:
                continue
            sounding.add(name)
            if name not in self.sounding:
                raised.append(Alarm(name, line["step"], *found, self._next(line["step"])))
        self.sounding = sounding
        return raised

    def nonfinite(self, report: LearnReport) -> Alarm | None:
        """Response tokens without a finite log-probability; the run ends of them, so this comes before its line."""
        batch = report.batch
        sides = {"trainer": report.lp_T, "rollout": batch.logprobs_rollout_NT}
        bad = {who: int((batch.mask_NT & ~np.isfinite(lp)).sum()) for who, lp in sides.items()}
        if not any(bad.values()):
            return None
        causes = [f"the {who} computed {count} of them" for who, count in bad.items() if count]
        causes += [
            "a scale that is 0 or infinite",
            "a weight that diverged: look at train/grad_norm of the steps before",
        ]
        key, step = "mismatch/nonfinite_count", batch.step
        return Alarm("nonfinite", step, key, sum(bad.values()), "0", tuple(causes), self._next(step - 1))

    def windows(self, key: str) -> tuple[float, float, float] | None:
        """Medians of the last window, of the one before, and of the first; None while they overlap."""
        values = self.seen.get(key, [])
        if len(values) < 2 * WINDOW:
            return None
        return median(values[-WINDOW:]), median(values[-2 * WINDOW : -WINDOW]), median(values[:WINDOW])

    def _next(self, step: int) -> str:
        kept = [n for n in range(step, -1, -1) if record.whole(self.exp.record, n)]
        if not kept:
            return "run with record.keep=4 record.weights_every=25: `lpexp attribute` needs a step before this one"
        return f"lpexp attribute {self.run_dir} --step {kept[0]}"


def band_of(exp: Experiment) -> Band | None:
    """Where the first batch's mismatch should lie; None: nobody has measured this pair."""
    if exp.band is not None:
        return Band(exp.band.abs_mean, exp.band.kl_k3)
    model, alike = exp.model.sized(), exp.trainer.arithmetic == exp.rollout.arithmetic != ""
    return expected(exp.precision, exp.wire, list(model.params()), model.moe is not None, alike and not _on_gpu(exp))


def _on_gpu(exp: Experiment) -> bool:
    """Does a side compute on a GPU, where equal arithmetic need not give equal bits?"""
    import torch

    devices = [getattr(part, "device", "auto") for part in (exp.trainer, exp.rollout)]
    return devices != ["cpu", "cpu"] and torch.cuda.is_available()


# -- what is looked at -------------------------------------------------------------------------------------------------


def _first(run: Sentinels, line: Metrics) -> Finding | None:
    """The first batch: both sides have the same weights, whatever the learning rate."""
    if line["step"] or run.band is None or MEAN not in line:
        return None
    for key, (low, high) in ((MEAN, run.band.abs_mean), (K3, run.band.kl_k3)):
        if not low <= line[key] <= high:
            told = "exactly 0" if high == 0 else f"{low:g} to {high:g}"
            return Finding(key, line[key], told, tuple(_too_low(run) if line[key] < low else _too_high(run, line)))
    return None


def _zero(run: Sentinels, line: Metrics) -> Finding | None:
    """A pair that computes alike stays at exactly 0."""
    if run.band is None or run.band.abs_mean[1] > 0 or not line["step"] or line.get(MAX, 0) == 0:
        return None
    return Finding(MAX, line[MAX], "exactly 0", ("stale weights: an update did not reach the engine", *_sides(run)))


def _second(run: Sentinels, line: Metrics) -> Finding | None:
    """The first batch after a weight update against the one before it."""
    seen = run.seen.get(K3, [])
    if line["step"] != 1 or len(seen) != 2:
        return None
    ratio = (seen[1] + RATIO_FLOOR) / (seen[0] + RATIO_FLOOR)
    if ratio <= RATIO:
        return None
    causes = (
        "stale weights: the first update did not reach the engine",
        "an update is exported otherwise than the start",
    )
    return Finding(K3, seen[1], f"at most {RATIO:g} times the first step's {seen[0]:.3g}", (*causes, *_sides(run)))


def _drift(run: Sentinels, line: Metrics) -> Finding | None:
    if (medians := run.windows(K3)) is None:
        return None
    last, before, first = (value + RATIO_FLOOR for value in medians)
    if last <= DRIFT * min(before, first):
        return None
    told = f"at most {DRIFT:g} times the {min(before, first):.3g} of earlier steps (medians of {WINDOW})"
    causes = (
        "the weights have grown beyond what their scales resolve: look at quant/*/sqnr_db",
        "tokens of low probability: look at mismatch/by_prob/*",
        "longer answers: look at mismatch/by_position/* and response/length_mean",
        "stale weights",
    )
    return Finding(K3, medians[0], told, causes)


def _entropy(run: Sentinels, line: Metrics) -> Finding | None:
    """Sharpening lowers entropy and raises reward; one without the other is no learning."""
    entropy, reward = run.windows(ENTROPY), run.windows(REWARD)
    if entropy is None or reward is None or reward[0] > reward[1]:
        return None
    if entropy[0] > ENTROPY_RISE * entropy[1]:
        told = f"at most {ENTROPY_RISE:g} times {entropy[1]:.3g} while the reward does not rise (medians of {WINDOW})"
        causes = (
            "trainer.lr is too high",
            "the mismatch outgrew the correction: look at correction/ess",
            "stale weights",
        )
        return Finding(ENTROPY, entropy[0], told, causes)
    if entropy[0] < ENTROPY_FALL * entropy[1]:
        told = f"at least {ENTROPY_FALL:g} times {entropy[1]:.3g} while the reward does not rise (medians of {WINDOW})"
        causes = (
            "the policy collapsed onto few answers: lower trainer.lr, or add a KL penalty (algorithm.kl_coef)",
            "clipped tokens of one sign: look at update/clip_frac_low_neg and update/clip_frac_high_pos",
        )
        return Finding(ENTROPY, entropy[0], told, causes)
    return None


def _clipped(run: Sentinels, line: Metrics) -> Finding | None:
    """Tokens of one sign of advantage that lose their gradient."""
    for key, sign in CLIPPED.items():
        medians = run.windows(key)
        if medians is not None and medians[0] > max(CLIP_FLOOR, DRIFT * medians[1]):
            told = f"at most {DRIFT:g} times {medians[1]:.3g}, or {CLIP_FLOOR:g} (medians of {WINDOW})"
            causes = (
                f"tokens of {sign} advantage lose their gradient: lower trainer.lr or algorithm.updates_per_batch",
                "the quantised forward moves probabilities further than an update: look at mismatch/ratio_extreme_frac",
            )
            return Finding(key, medians[0], told, causes)
    return None


def _same_forward(run: Sentinels, line: Metrics) -> Finding | None:
    """With one update a batch, the gradient's forward is that of the weights before it."""
    if run.exp.algorithm.updates_per_batch > 1 or line.get(UPDATE, 0) <= SAME_FORWARD:
        return None
    causes = ("the trainer's two forwards differ: dropout, or a kernel that is not deterministic", "expert routing")
    return Finding(UPDATE, line[UPDATE], f"at most {SAME_FORWARD:g} with algorithm.updates_per_batch=1", causes)


SENTINELS: dict[str, Callable[[Sentinels, Any], Finding | None]] = {
    "first_step": _first,
    "zero": _zero,
    "second_step": _second,
    "drift": _drift,
    "entropy": _entropy,
    "clipping": _clipped,
    "same_forward": _same_forward,
}


# -- causes ------------------------------------------------------------------------------------------------------------


def _too_high(run: Sentinels, line: Metrics) -> Iterator[str]:
    huge = _quantises(run.exp) and line[MEAN] > 1  # nat: rounding does not do that
    yield from (SCALE,) if huge else ()
    yield from (cause for cause in _sides(run) if not (huge and cause == SCALE))
    if run.band is not None and run.band.abs_mean[1] > 0:
        yield "a model that this precision hurts more than the measured ones: then say its band (config key `band`)"


def _sides(run: Sentinels) -> Iterator[str]:
    """What can differ between two sides, the commonest mistake first."""
    if _quantises(run.exp):
        if "group_size" in {**run.exp.precision.format(), **run.exp.wire.format()}:
            yield "wrong group size on one side"
        yield "another rule for scales on one side"
        yield "a module that only one side quantises"
        yield SCALE
    yield "stale or other weights on one side"
    yield "another sampling convention: temperature, or log-probabilities after a cut"


def _quantises(exp: Experiment) -> bool:
    """Does either side quantise a tensor?"""
    model = exp.model.sized()
    sides, moe = (exp.precision, exp.wire), model.moe is not None
    return any(precision.covers(param, moe) for precision in sides for param in model.params())


def _too_low(run: Sentinels) -> Iterator[str]:
    yield f"a quantiser never ran: {run.exp.wire.name} is not what the engine serves, or nothing is covered"
    yield "the policy is so sure that rounding changes nothing: look at train/entropy"
