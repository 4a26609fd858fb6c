"""What a study says, as sentences and tables: the page and `lpexp compare` print the same.

Numbers of an arm are means over its seeds with the lowest and highest seed in brackets. Only finished runs are judged;
the others appear in curves and are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lpexp.metric.mismatch import PROB_BINS
from lpexp.metric.verdict import Difference, difference, interval_of, judge, more_seeds
from lpexp.precision import Precision
from lpexp.report.study import ABSENT, SIDES, Arm, Run, Study, under

MARGIN = 0.02
LAST = 20  # steps at either end of a run that are averaged
MEAN, K3, MULT, MAX, EXTREME = (
    f"mismatch/{key}"
    for key in ("logprob_abs_diff_mean", "kl_k3", "mult_prob_error", "logprob_abs_diff_max", "ratio_extreme_frac")
)
QUIET = ("start", "workers", "eval")  # events of every run
ALARM = "alarm"


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


class Judged(NamedTuple):
    """One arm beside the reference. `status`: within, worse, undecided, or apart (it cannot be compared)."""

    arm: Arm
    status: str
    claim: str  # what follows the arm's name
    found: Difference | None = None
    more: int | None = None  # seeds that would decide it

    @property
    def numbers(self) -> str:
        if self.found is None:
            return ""
        between = f"95 % interval {signed(self.found.low)} to {signed(self.found.high)}"
        interval = between if math.isfinite(self.found.low) else "no interval"
        return f"difference {signed(self.found.mean)}, {interval}, {count(self.found.seeds, 'seed')}"

    @property
    def sentence(self) -> str:
        return f"{self.arm.name} {self.claim}{f' ({self.numbers})' if self.found else ''}."


@dataclass
class Findings:
    study: Study
    margin: float
    verdicts: list[Judged] = field(default_factory=list)
    answer: str = ""
    marks: list[str] = field(default_factory=list)
    alarms: list[tuple[str, str]] = field(default_factory=list)  # run, what happened
    others: list[tuple[str, str]] = field(default_factory=list)  # events that are no alarms
    tables: dict[str, Table] = field(default_factory=dict)  # title -> table
    statistics: list[str] = field(default_factory=list)


def find(study: Study, margin: float = MARGIN) -> Findings:
    """Judge every arm and fill the tables."""
    found = Findings(study, margin)
    reference = study.reference
    assert reference is not None
    found.verdicts = [_judge(study, arm, margin) for arm in study.arms if arm is not reference]
    found.answer = _answer(study, found.verdicts, margin)
    found.marks = list(_marks(study))
    found.alarms, found.others = _events(study)
    found.tables = {
        "What sets the arms apart": _differences(study),
        "Learning": _learning(study),
        "Mismatch": _mismatch(study),
        "Correction": _correction(study),
        "Rounding and weight updates": _rounding(study),
        "Speed and memory": _speed(study),
    }
    found.tables = {title: table for title, table in found.tables.items() if table.rows}
    found.statistics = _statistics(found)
    return found


# -- the verdict -------------------------------------------------------------------------------------------------------
def _judge(study: Study, arm: Arm, margin: float) -> Judged:
    assert study.reference is not None
    against, apart = study.reference.name, f"is not compared with {study.reference.name}: "
    if foreign := study.foreign(arm):
        ours, theirs = arm.flat, study.reference.flat
        pairs = [f"{key} {show(ours.get(key, ABSENT))} against {show(theirs.get(key, ABSENT))}" for key in foreign]
        return Judged(arm, "apart", f"{apart}they also differ in {_few(pairs)}")
    pairs = [(a.score(), b.score()) for a, b in study.pairs(arm) if a.finished and b.finished]
    scored = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not scored:
        return Judged(arm, "apart", f"{apart}no seed has finished in both")
    if any(a.prompts != b.prompts for a, b in scored):
        return Judged(arm, "apart", f"{apart}they answered different held-out prompts")
    found = difference([a for a, _ in scored], [b for _, b in scored])
    status = judge(found, margin)
    more = more_seeds(found, margin) if status == "undecided" else None
    return Judged(arm, status, _claim(against, status, found, margin, more), found, more)


def _claim(against: str, status: str, found: Difference, margin: float, more: int | None) -> str:
    if status == "within":
        than = f"within {margin:g} of {against}" if found.high < margin else f"at most {margin:g} below {against}"
        return f"is {than} on held-out accuracy, 95 %"
    if status == "worse":
        by = f" by more than {margin:g}" if found.high < -margin else f", whether by more than {margin:g} is open"
        return f"is below {against} on held-out accuracy, 95 %{by}"
    if found.seeds == 1:
        return f"is not decided: one seed says nothing of the next; {more} more are the least"
    if more is not None:
        return f"is not decided, about {count(more, 'more seed')} needed"
    if found.prompts_half > abs(found.mean + margin):
        return "is not decided, and more seeds will not do: every seed answers the same prompts, more of them would"
    return "is not decided, and no sensible number of seeds will do: it lies too near the margin"


def _answer(study: Study, verdicts: Sequence[Judged], margin: float) -> str:
    """The whole in one or two sentences."""
    assert study.reference is not None
    against = study.reference.name
    groups = {
        status: [v for v in verdicts if v.status == status] for status in ("within", "worse", "undecided", "apart")
    }
    said = []
    if not verdicts:
        return f"There is one arm, {against}, so there is nothing to judge it against."
    if names := [v.arm.name for v in groups["within"]]:
        said.append(f"{listed(names)} {are(names)} not worse than {against} by more than {margin:g}")
    if names := [v.arm.name for v in groups["worse"]]:
        said.append(f"{listed(names)} {are(names)} below {against}")
    if names := [v.arm.name for v in groups["undecided"]]:
        known = [v.more for v in groups["undecided"] if v.more is not None and v.found and v.found.seeds > 1]
        left = f" ({count(max(known), 'more seed')} would do)" if len(known) == len(names) else ""
        said.append(f"{listed(names)} {are(names)} not decided{left}")
    if names := [v.arm.name for v in groups["apart"]]:
        said.append(f"{listed(names)} cannot be compared")
    return "; ".join(said) + "."


def _statistics(found: Findings) -> list[str]:
    assert found.study.reference is not None
    against, judged = found.study.reference.name, [v for v in found.verdicts if v.found is not None]
    said = [
        f"Judged is the accuracy of sampled answers to held-out prompts under the final weights, each arm against "
        f"{against}. The margin is {found.margin:g} (--margin).",
        "Runs are paired by seed: the same start weights, prompts, held-out prompts and sampling numbers. The unit is "
        "the seed, since everything random is drawn anew with it: the interval is Student's t over the seeds' paired "
        "differences, and never narrower than the prompts' spread within the seeds allows. Where every seed has the "
        "same held-out prompts, both sources are added in squares (MOVER).",
        "An arm is within the margin when the lower end of the two-sided 95 % interval is above minus the margin (a "
        "test of non-inferiority at 2.5 %), and below the reference when the upper end is under 0. The seeds that are "
        "still needed are the fewest that decide with 80 % chance if mean and spread stay as they are; with three "
        "seeds that is a rough guess.",
    ]
    if len(judged) > 1:
        said.append(
            f"The {len(judged)} verdicts are each at 95 %, not all together: with as many true nulls, one of them is "
            f"wrong in up to {len(judged) * 2.5:g} % of sweeps."
        )
    return said


# -- what stands beside it ---------------------------------------------------------------------------------------------
def _marks(study: Study) -> list[str]:
    """What a reader must know before believing a comparison."""
    assert study.reference is not None
    said = []
    for arm in study.arms:
        if arm is study.reference:
            continue
        if foreign := study.foreign(arm):
            way = " ".join(f"--allow {key}" for key in foreign[:3])
            said.append(
                f"{arm.name} differs from {study.reference.name} in {_few(foreign)}, which neither its precisions nor "
                f"the sweep's axes explain; it gets no verdict ({way} says that this is meant)."
            )
        if other := study.other_source(arm):
            said.append(f"{arm.name} and {study.reference.name} were not made by the same code: {'; '.join(other)}.")
    open_runs = [run for run in study.runs if not run.finished]
    if open_runs:
        names = [f"{run.path} ({run.state})" for run in open_runs]
        said.append(f"Not finished, and in no verdict: {_few(names)}.")
    said += [f"{path} repeats the seed of another run and is left out." for path in study.twice]
    if not study.reference.plain and len(study.arms) > 1:
        said.append(
            f"No arm is without quantisation, so the others are judged against {study.reference.name}, the first; "
            "--reference NAME chooses another."
        )
    return said


def _events(study: Study) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Alarms, and what else happened beside the steps."""
    alarms, others = [], []
    for arm in study.arms:
        for run in arm.runs.values():
            told: dict[str, list[dict[str, Any]]] = {}
            for event in run.events:
                if event["kind"] not in QUIET:
                    told.setdefault(event["kind"], []).append(event)
            for kind, events in told.items():
                where = f"{arm.name}, seed {run.seed}"
                if kind == ALARM:
                    alarms += [(where, _said(event)) for event in events]
                else:
                    times = f" ({len(events)} times)" if len(events) > 1 else ""
                    others.append((where, f"{kind.replace('_', ' ')}{times}: {_said(events[-1])}"))
    return alarms, others


def _said(event: dict[str, Any]) -> str:
    """An event's own sentence, or its fields."""
    if text := event.get("message") or event.get("note"):
        step = f"step {event['step']}: " if "step" in event else ""
        return f"{step}{text}"
    return ", ".join(f"{key} {show(value)}" for key, value in event.items() if key not in ("time", "kind"))


# -- tables ------------------------------------------------------------------------------------------------------------
def _differences(study: Study) -> Table:
    """Both sides of each arm, then every other key in which arms differ."""
    keys = [key for key in study.differing() if not any(under(key, side) for side in SIDES)]
    differ = [key for key in ("rollout.checkpoint", "reference.precision.name") if key in study.differing()]
    rows = [
        (
            arm.name,
            described(arm.side("precision")),
            "the same" if arm.matched else described(arm.side("rollout.precision")),
            *(show(arm.flat.get(key, ABSENT)) for key in (*differ, *keys)),
            listed(sorted({run.contract for run in arm.runs.values()})),
            listed([str(seed) for seed in arm.runs]),
        )
        for arm in study.arms
    ]
    same = len(study.arms[0].flat) - len(study.differing())
    note = f"The other {same} keys that decide numbers are equal in all arms."
    return Table(("arm", "trainer", "rollout", *differ, *keys, "contract", "seeds"), rows, note)


def described(precision: Precision) -> str:
    """Its word and fields."""
    fields = {key: value for key, value in precision.dump().items() if key not in ("_target_", "name")}
    said = ", ".join(f"{key} {show(value)}" for key, value in fields.items())
    return f"{precision.name}, {said}" if said else precision.name


def _learning(study: Study) -> Table:
    rows = []
    for arm in study.arms:
        cells = [arm.name]
        for name in ("sampled_acc", "greedy_acc"):
            ends = [run.evaluated(name)[1][[0, -1]] for run in arm.runs.values() if len(run.evaluated(name)[1])]
            cells += [spread([e[0] for e in ends], 3), spread([e[1] for e in ends], 3)]
        for key in ("reward/mean", "train/entropy"):
            cells.append(spread([y[-LAST:].mean() for y in arm.each(key)], 3))
        cells.append(_paired(study, arm, "reward/mean"))
        rows.append(cells)
    head = ("arm", "sampled, start", "sampled, end", "greedy, start", "greedy, end")
    head = (*head, f"reward, last {LAST}", f"entropy, last {LAST} (nat)", "reward against the reference")
    note = f"Held-out accuracy; training reward and entropy are means of the last {LAST} steps."
    return Table(head, rows, note)


def _paired(study: Study, arm: Arm, key: str) -> str:
    """The mean paired difference of the last steps, with its interval over seeds."""
    if arm is study.reference or study.foreign(arm):
        return ABSENT
    pairs = [(a.curve(key)[1][-LAST:], b.curve(key)[1][-LAST:]) for a, b in study.pairs(arm)]
    values = np.array([a.mean() - b.mean() for a, b in pairs if len(a) and len(a) == len(b)])
    if len(values) < 2:
        return signed(values.mean()) if len(values) else ABSENT
    mean, half = interval_of(values)
    return f"{signed(mean)} ({signed(mean - half)} to {signed(mean + half)})"


def _mismatch(study: Study) -> Table:
    rows = []
    for arm in study.arms:
        means, worst = arm.each(MEAN), arm.each(MAX)
        if not means:
            continue
        if not any(values.any() for values in worst):
            rows.append((arm.name, *["exactly 0"] * 4, "1", "0", ABSENT))
            continue
        rows.append(
            (
                arm.name,
                spread([y[:LAST].mean() for y in means], None),
                spread([y[-LAST:].mean() for y in means], None),
                spread([y.mean() for y in arm.each(K3)], None),
                sci(max(y.max() for y in worst)),
                spread([y.mean() for y in arm.each(MULT)], 4),
                spread([y.mean() for y in arm.each(EXTREME)], None),
                _where(arm),
            )
        )
    head = ("arm", f"mean |d|, first {LAST}", f"mean |d|, last {LAST}", "KL k3", "max |d|", "mult error")
    head = (*head, "off by a factor 2", "half of the KL comes from")
    note = "d = log-probability of the trainer minus that of the rollout, same weights, nat."
    return Table(head, rows, note)


# Of the sampled token's probability under the rollout, by its upper end.
BINS = dict(zip(PROB_BINS, ("p < 0.001", "p < 0.01", "p < 0.1", "p < 0.5", "p < 0.9", "p ≥ 0.9"), strict=True))


def by_probability(arm: Arm, key: str) -> dict[str, float]:
    """{bin: the mean of kl_share or token_frac over steps and seeds}; a step without such tokens counts 0."""
    found = {}
    for name in BINS:
        each = [(run.curve(f"mismatch/by_prob/{name}/{key}")[1].sum(), len(run.lines)) for run in arm.runs.values()]
        found[name] = float(np.mean([total / steps for total, steps in each]))
    return found


def _where(arm: Arm) -> str:
    """The rarest tokens that make up half of k3."""
    shares, tokens = by_probability(arm, "kl_share"), by_probability(arm, "token_frac")
    share = part = 0.0
    for name, text in BINS.items():
        share, part = share + shares[name], part + tokens[name]
        if share >= 0.5:
            return f"{text}, {part:.0%} of tokens" if name != PROB_BINS[-1] else "all tokens"
    return ABSENT


def _correction(study: Study) -> Table:
    keys = (
        "correction/ess",
        "correction/clip_frac",
        "correction/masked_token_frac",
        "update/clip_frac_low_neg",
        "update/clip_frac_high_pos",
    )
    rows = []
    for arm in study.arms:
        name = arm.any.config["correction"].get("name", ABSENT)
        cells = [spread([y.mean() for y in arm.each(key)], None) for key in keys]
        rows.append((arm.name, str(name), *cells))
    head = ("arm", "correction", "effective sample size", "weights clipped", "tokens masked")
    return Table((*head, "clip, A < 0", "clip, A > 0"), rows, "Shares of tokens, means over all steps.")


def _rounding(study: Study) -> Table:
    rows = []
    for arm in study.arms:
        keys = {k for run in arm.runs.values() for k in run.lines[-1] if k.startswith("quant/")}
        errors = [y.mean() for k in sorted(keys) if k.endswith("/rel_error") for y in arm.each(k)]
        noise = [y.mean() for k in sorted(keys) if k.endswith("/sqnr_db") for y in arm.each(k)]
        rows.append(
            (
                arm.name,
                arm.side("rollout.precision").name,
                spread([100 * e for e in errors], 2) if errors else ABSENT,
                spread(noise, 1) if noise else ABSENT,
                spread([y.mean() for y in arm.each("sync/quantized_param_frac")], 2),
                size(float(np.mean([y.mean() for y in arm.each("sync/bytes")] or [math.nan]))),
                spread([1000 * np.median(y) for y in arm.each("sync/seconds")], 0),
            )
        )
    head = ("arm", "served as", "rounding error, %", "SQNR, dB", "share quantised", "bytes an update", "ms an update")
    note = "Rounding error |W - dq(W)| / |W| over the quantised tensors; in brackets the lowest and highest class."
    return Table(head, rows, note)


def _speed(study: Study) -> Table:
    rows = []
    for arm in study.arms:
        rows.append(
            (
                arm.name,
                spread([np.median(y) for y in arm.each("time/step")], 2),
                _ratio(study, arm, "time/step"),
                *(spread([np.median(y) for y in arm.each(f"time/{part}")], 2) for part in ("rollout", "learn", "sync")),
                spread([np.median(y) for y in arm.each("throughput/rollout_tokens_per_s")], 0),
                spread([np.median(y) for y in arm.each("throughput/train_tokens_per_s")], 0),
                size(max((y.max() for y in arm.each("memory/host_rss_bytes")), default=math.nan)),
                listed(sorted({_machine(run) for run in arm.runs.values()})),
            )
        )
    head = ("arm", "s a step", "against the reference", "s rollout", "s learn", "s update")
    head = (*head, "rollout tokens/s", "training tokens/s", "memory, highest", "machine")
    return Table(head, rows, _speed_note(study))


def _speed_note(study: Study) -> str:
    said = "Medians over steps."
    if not any(run.described("hardware.json").get("gpus") for run in study.runs):
        said += (
            " On a CPU low precisions are emulated, value by value: their speed and memory here say nothing of a GPU."
        )
    if len({_machine(run) for run in study.runs}) > 1:
        said += " The runs were made on different machines, so their speeds do not compare."
    return said


def _machine(run: Run) -> str:
    found = run.described("hardware.json")
    return listed(found["gpus"]) if found.get("gpus") else f"{found.get('cpu', '?')}, {found.get('cores', '?')} cores"


def _ratio(study: Study, arm: Arm, key: str) -> str:
    assert study.reference is not None
    ours, theirs = ([np.median(y) for y in one.each(key)] for one in (arm, study.reference))
    if arm is study.reference or not ours or not theirs:
        return ABSENT
    return f"{np.mean(ours) / np.mean(theirs):.2f} x"


# -- words -------------------------------------------------------------------------------------------------------------
def spread(values: Sequence[Any], digits: int | None) -> str:
    """`0.684 (0.637 to 0.762)`: mean, lowest and highest; digits after the point, None: two that count."""
    numbers = [float(v) for v in values]
    if not numbers:
        return ABSENT
    write: Callable[[float], str] = sci if digits is None else lambda v: f"{v:.{digits}f}"
    mean, low, high = (write(v) for v in (float(np.mean(numbers)), min(numbers), max(numbers)))
    return mean if low == high else f"{mean} ({low} to {high})"


def sci(value: float) -> str:
    """Two digits that count, without an exponent where that is short."""
    if value == 0:
        return "0"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def size(value: float) -> str:
    if not math.isfinite(value):
        return ABSENT
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:.0f} B"


def show(value: Any) -> str:
    """A config value as YAML would spell it, in short."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, list):
        return f"[{', '.join(show(one) for one in value)}]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    names = [str(name) for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ABSENT


def are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _few(names: Sequence[str], most: int = 4) -> str:
    return listed(names) if len(names) <= most else f"{', '.join(names[:most])} and {len(names) - most} more"
