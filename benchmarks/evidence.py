"""What takes longer than the main tests: each section is run at true size and becomes a dated page in docs/results/.

  learning  3 seeds of bf16, fp8 and int4_qat, 100 steps of the default experiment; a control with lr=0
  ladder    train and rollout in different precisions, 3 seeds; the matched runs of `learning` beside them
  zero      4 precisions x 3 tiny models x lag 0 and 1, 50 steps: mismatch exactly 0
  arithmetic  RL on SmolLM2-135M in bf16, fp8 and int4_qat (`lpexp fetch smollm2_135m` first); 20 minutes and 10 GB each
  tests     pytest -m evidence
  trl       benchmarks/vs_trl.py --check
  rollout   benchmarks/rollout.py

The source of one commit is exported to outputs/evidence/COMMIT and run there, so that no page mixes two states of the
tree. Runs go `--jobs` at a time, one thread each, in one process (`cluster=inline`, which gives the same numbers as
`local`); the real model, tests and benchmarks run alone. A finished piece is kept and an unfinished run is resumed:
start again with the same `--commit` to go on. Exit code 1 when a promise of a page does not hold or a piece failed.
Left out: whatever needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `lpexp` is read from this checkout, installed or not
SEEDS = (1, 2, 3)
TRAINED = ("bf16", "fp8", "int4_qat")
MATCHED = ("fp32", *TRAINED)
MODELS = ("qwen3_tiny", "qwen3_moe_tiny", "deepseek_tiny")
STEPS, ZERO_STEPS, LAST = 100, 50, 20  # LAST: steps averaged at the end of a mixed run
RISE, START = 0.15, 0.25  # sampled accuracy: at least so much more, from at most so much
EVAL_ANSWERS = 128 * 4
REAL_STEPS, REAL_PROMPTS, MOST_MINUTES = 24, 512, 60
GREEDY, SAMPLED = "eval/sort_letters/greedy_acc", "eval/sort_letters/sampled_acc"
MEAN, K3, MULT, MAX = (
    f"mismatch/{key}" for key in ("logprob_abs_diff_mean", "kl_k3", "mult_prob_error", "logprob_abs_diff_max")
)
# Arm -> (overrides, bands of mean |d|, k3 and mult). The bands are those of the end of one prototype run with groups of
# 32. Groups of 128, the default, quantise 1.7 dB more coarsely: they are held against the bands too, but not promised.
FP8_BAND = ((0.008, 0.03), (0.0005, 0.005), (1.008, 1.04))
INT4_BAND = ((0.02, 0.07), (0.003, 0.02), (1.02, 1.09))
LADDER = {
    "bf16 / fp8": (("precision=bf16", "precision@rollout.precision=fp8"), FP8_BAND),
    "bf16 / int4 g32": (
        ("precision=bf16", "precision@rollout.precision=int4_qat", "rollout.precision.group_size=32"),
        INT4_BAND,
    ),
    "bf16 / int4 g128": (("precision=bf16", "precision@rollout.precision=int4_qat"), INT4_BAND),
    "int4_qat g32 / bf16": (
        ("precision=int4_qat", "precision.group_size=32", "precision@rollout.precision=bf16"),
        INT4_BAND,
    ),
    "int4_qat g128 / bf16": (("precision=int4_qat", "precision@rollout.precision=bf16"), INT4_BAND),
}
COLORS = dict(zip(TRAINED, ("#1f6feb", "#d9730d", "#1a7f5a"), strict=True))
BANDLESS = "g128"
LADDER_KEYS = {"mean abs(d)": MEAN, "k3": K3, "mult": MULT}


@dataclass(frozen=True)
class Job:
    """One command; a run of launch.py when it has `overrides`. `steps` weighs it in the estimate of the time left."""

    name: str
    overrides: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    steps: int = 1
    alone: bool = False  # it uses the whole machine


@dataclass
class Page:
    """A section's text, and its promises with whether they hold."""

    text: list[str] = field(default_factory=list)
    promises: list[tuple[str, bool]] = field(default_factory=list)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
        self.text.append("\n".join(lines))


# -- what is run -------------------------------------------------------------------------------------------------------


def learned(precision: str, seed: int) -> Job:
    return Job(f"learn-{precision}-{seed}", (f"precision={precision}", f"seed={seed}", f"steps={STEPS}"), steps=STEPS)


def control(precision: str) -> Job:
    words = (f"precision={precision}", "seed=1", f"steps={STEPS}", "trainer.lr=0")
    return Job(f"control-{precision}-1", words, steps=STEPS)


def mixed(arm: str, seed: int) -> Job:
    name = f"ladder-{arm.replace(' / ', '-over-').replace(' ', '-')}-{seed}"
    return Job(name, (*LADDER[arm][0], f"seed={seed}", f"steps={STEPS}"), steps=STEPS)


def matched(precision: str, model: str, lag: int) -> Job:
    words = [f"precision={precision}", f"model={model}", f"lag={lag}", f"steps={ZERO_STEPS}"]
    words += [] if model == "qwen3_tiny" else ["task.warmup=null"]  # only the default model learns a warm start
    return Job(f"zero-{precision}-{model}-lag{lag}", tuple(words), steps=ZERO_STEPS)


def real(precision: str) -> Job:
    words = ("experiment=smollm2_arithmetic", f"precision={precision}", "cluster.threads=2")
    words += (f"steps={REAL_STEPS}", f"eval.every={REAL_STEPS}", f"eval.prompts={REAL_PROMPTS}")
    return Job(f"arithmetic-{precision}", words, steps=30 * REAL_STEPS, alone=True)


def jobs(section: str) -> list[Job]:
    """In the order in which they are started; the same job may serve two sections."""
    by_seed = [learned(precision, seed) for seed in SEEDS for precision in TRAINED]
    if section == "learning":
        return [*by_seed, *(control(precision) for precision in TRAINED)]
    if section == "ladder":
        return [*by_seed, *(mixed(arm, seed) for seed in SEEDS for arm in LADDER)]
    if section == "zero":
        return [matched(p, model, lag) for model in MODELS for p in MATCHED for lag in (0, 1)]
    if section == "arithmetic":
        return [real(precision) for precision in TRAINED]
    return [Job(section, command=COMMANDS[section], alone=True)]


COMMANDS = {
    "tests": ("-m", "pytest", "-m", "evidence", "--timeout", "3600", "-p", "no:cacheprovider"),
    "trl": ("benchmarks/vs_trl.py", "--check"),
    "rollout": ("benchmarks/rollout.py",),
}


class Bench:
    """One commit's source, and what was run of it."""

    def __init__(self, commit: str):
        words = ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{commit}^{{commit}}"]
        self.commit = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        self.home = ROOT / "outputs" / "evidence" / self.commit[:12]
        self.source = self.home / "source"
        self.processes: set[subprocess.Popen[Any]] = set()  # that run now
        if not self.source.exists():
            words = ["git", "-C", str(ROOT), "archive", "--format=tar", self.commit]
            packed = subprocess.run(words, capture_output=True, check=True).stdout
            half = self.home / "source.part"
            with tarfile.open(fileobj=BytesIO(packed)) as tar:
                tar.extractall(half, filter="data")
            half.rename(self.source)
        models = self.home / "cache" / "lpexp" / "models"
        if not models.is_symlink():
            from lpexp.disk import cache_dir

            # What `lpexp fetch` brought, whichever commit did.
            models.parent.mkdir(parents=True, exist_ok=True)
            models.symlink_to(cache_dir("models"))

    def at(self, job: Job) -> Path:
        return self.home / job.name

    def facts(self, job: Job) -> dict[str, Any] | None:
        """How the job ended; None when it has not."""
        path = self.at(job) / "evidence.json"
        return json.loads(path.read_text()) if path.exists() else None

    def done(self, job: Job) -> bool:
        facts = self.facts(job)
        return facts is not None and facts["exit"] == 0

    def lines(self, job: Job) -> list[dict[str, Any]]:
        """The finished run's metrics.jsonl."""
        return [json.loads(line) for line in (self.at(job) / "metrics.jsonl").read_text().splitlines()]

    def evaluations(self, job: Job) -> dict[int, dict[str, float]]:
        """{weight version: metrics}"""
        events = [json.loads(line) for line in (self.at(job) / "events.jsonl").read_text().splitlines()]
        return {event["version"]: event["metrics"] for event in events if event["kind"] == "eval"}

    def words(self, job: Job) -> list[str]:
        """The command after `python`."""
        if job.command:
            return list(job.command)
        beside = ["cluster=inline", "wandb.mode=disabled", f"output_dir={self.at(job)}", "resume=auto"]
        return ["launch.py", *job.overrides, *beside]

    def run(self, job: Job) -> int:
        """Run the job to its end; its exit code. What it says goes to output.txt, how it went to evidence.json."""
        at = self.at(job)
        at.mkdir(parents=True, exist_ok=True)
        environment = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(self.source),
            "XDG_CACHE_HOME": str(self.home / "cache"),  # warm starts are made by this commit
        }
        begin, load = time.perf_counter(), os.getloadavg()[0]
        with (at / "output.txt").open("w") as output:
            words = [sys.executable, *self.words(job)]
            both = {"stdout": output, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(words, cwd=self.source, env=os.environ | environment, **both)
            self.processes.add(process)
            _, status, used = os.wait4(process.pid, 0)
            self.processes.remove(process)
        code = process.returncode = os.waitstatus_to_exitcode(status)
        facts = {
            "command": shlex.join(["python", *self.words(job)]),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_s": time.perf_counter() - begin,
            "cpu_s": used.ru_utime + used.ru_stime,
            "load": [load, os.getloadavg()[0]],
            "exit": code,
        }
        made = at / "evidence.json.part"
        made.write_text(json.dumps(facts, indent=1) + "\n")
        made.rename(at / "evidence.json")
        return code

    def run_all(self, wanted: Sequence[Job], later: Sequence[Job], at_once: int) -> list[Job]:
        """Run what is not finished, sharers of the machine first; the jobs that failed. `later` counts as time left."""
        left = [job for job in wanted if not self.done(job)]
        beyond = sum(job.steps for job in {*later} - {*wanted} if not self.done(job))
        total, begin, failed = sum(job.steps for job in left), time.monotonic(), []
        say(
            f"{len(wanted) - len(left)} of {len(wanted)} pieces are finished; {len(left)} are left, {at_once} at a time"
        )

        def ended(job: Job, code: int) -> None:
            left.remove(job)
            if code:
                failed.append(job)
            rest, spent = sum(job.steps for job in left), time.monotonic() - begin
            minutes = f"{spent / (total - rest) * (rest + beyond) / 60:.0f}"
            how = "done" if code == 0 else f"FAILED with {code}, see {self.at(job) / 'output.txt'}"
            say(f"{job.name}: {how}; {len(left)} pieces of this section left, about {minutes} minutes for all runs")

        with ThreadPoolExecutor(at_once) as pool:
            try:
                running: dict[Future[int], Job] = {pool.submit(self.run, job): job for job in left if not job.alone}
                while running:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        ended(running.pop(future), future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self.processes:
                    process.terminate()  # a run stops after the step in hand and can be gone on with
                raise
        for job in [job for job in left if job.alone]:
            ended(job, self.run(job))
        return failed


# -- what is written ---------------------------------------------------------------------------------------------------


def learning(bench: Bench, stem: Path) -> Page:
    page, rows = Page(), []
    for precision in TRAINED:
        ends = [ends_of(bench.evaluations(learned(precision, seed))) for seed in SEEDS]
        rises = [last[SAMPLED] - first[SAMPLED] for first, last in ends]
        page.promises.append(
            (f"{precision}: each seed starts at no more than {START}", max(f[SAMPLED] for f, _ in ends) <= START)
        )
        page.promises.append((f"{precision}: each seed rises by at least {RISE}", min(rises) >= RISE))
        runs = [bench.lines(learned(precision, seed)) for seed in SEEDS]
        cells = [precision]
        for key in (SAMPLED, GREEDY):
            cells += [spread([first[key] for first, _ in ends]), spread([last[key] for _, last in ends])]
        cells.insert(3, spread(rises))
        cells.append(spread([mean(line["train/entropy"] for line in lines[-LAST:]) for lines in runs]))
        facts = [bench.facts(learned(precision, seed)) or {} for seed in SEEDS]
        rows.append([*cells, spread([fact["cpu_s"] for fact in facts], 0)])
    page.text.append(
        f"Held-out accuracy of the default experiment (128 prompts; sampled: 4 answers each), before the first and "
        f"after step {STEPS}: mean over {len(SEEDS)} seeds (lowest to highest). Entropy is the mean of the last "
        f"{LAST} steps."
    )
    head = ("precision", "sampled, start", "sampled, end", "rise", "greedy, start", "greedy, end", "entropy", "CPU s")
    page.table(head, rows)
    page.text.append(
        "RL mostly sharpens here: greedy answers are good after the warm-up, sampled ones climb towards them while "
        "entropy falls."
    )
    page.text.append(f"![learning curves]({stem.name}.png)\n\nThin lines: seeds. Thick: their mean. Grey: lr=0.")
    rows = []
    for precision in TRAINED:
        scores = bench.evaluations(control(precision))
        sampled = [scores[version][SAMPLED] for version in sorted(scores)]
        noise = 3 * (2 * sampled[0] * (1 - sampled[0]) / EVAL_ANSWERS) ** 0.5
        off = max(value - sampled[0] for value in sampled[1:])
        held = len({score[GREEDY] for score in scores.values()}) == 1
        page.promises.append((f"{precision}, lr=0: sampled accuracy rises by less than {noise:.3f}", off < noise))
        page.promises.append((f"{precision}, lr=0: greedy accuracy is the same at every evaluation", held))
        rows.append((precision, " ".join(f"{value:.3f}" for value in sampled), f"{off:+.3f}", f"{noise:.3f}"))
    page.text.append(
        f"The same run with lr=0 (seed 1). Three standard errors of the difference of two accuracies of "
        f"{EVAL_ANSWERS} answers are what chance may do."
    )
    page.table(("precision", "sampled accuracy at versions 0, 25, ...", "highest rise", "chance"), rows)
    draw_learning(bench, stem.with_suffix(".png"))
    return page


def ladder(bench: Bench, stem: Path) -> Page:
    page, rows = Page(), []
    page.text.append(
        f"d = lp_T - lp_R, nat. Means over all {STEPS} steps, and over the first and the last {LAST}, 16 prompts x 16 "
        f"samples a step: mean over {len(SEEDS)} seeds (lowest to highest). The bands are those of one prototype run, "
        "one seed at one step, with INT4 groups of 32; a run passes through its entropies from high to low, and d with "
        "them. So each seed is promised for its whole run, the windows for the mean over seeds; which window of a "
        "single seed leaves its band is said. Groups of 128, the default of int4_qat, quantise 1.7 dB more coarsely "
        "and are promised nothing."
    )
    for precision in TRAINED:
        values = [[line[MAX] for line in bench.lines(learned(precision, seed))] for seed in SEEDS]
        zero = all(value == 0.0 for each in values for value in each)
        count = sum(map(len, values))
        page.promises.append((f"{precision} / {precision}: max abs(d) is exactly 0.0 at all {count} steps", zero))
    for arm, (_, bands) in LADDER.items():
        runs = [bench.lines(mixed(arm, seed)) for seed in SEEDS]
        cells, left, windows, whole = [arm], [], True, True
        for (name, key), (low, high) in zip(LADDER_KEYS.items(), bands, strict=True):
            first = [mean(line[key] for line in lines[:LAST]) for lines in runs]
            last = [mean(line[key] for line in lines[-LAST:]) for lines in runs]
            every = [mean(line[key] for line in lines) for lines in runs]
            cells += [spread(every, 4), spread(first, 4), spread(last, 4), f"{low:g} to {high:g}"]
            whole &= low <= min(every) <= max(every) <= high
            windows &= low <= mean(first) <= high and low <= mean(last) <= high
            left += [
                f"{name}, {when} {LAST}, seed {seed}: {value:.4f}"
                for when, values in (("first", first), ("last", last))
                for seed, value in zip(SEEDS, values, strict=True)
                if not low <= value <= high
            ]
        cells.append("; ".join(left) or "none")
        cells.append(f"{max(line[MAX] for lines in runs for line in lines):.2f}")
        ends = [ends_of(bench.evaluations(mixed(arm, seed))) for seed in SEEDS]
        cells.append(spread([last[SAMPLED] for _, last in ends]))
        rows.append(cells)
        if BANDLESS not in arm:
            said = f"{arm}: mean abs(d), k3 and mult are in their bands"
            page.promises.append((f"{said} over the whole run, each seed", whole))
            page.promises.append((f"{said} in the first and in the last {LAST} steps, mean over seeds", windows))
    head = ["train / rollout"]
    head += [f"{name}, {when}" for name in LADDER_KEYS for when in ("all", f"first {LAST}", f"last {LAST}", "band")]
    page.table([*head, "windows of single seeds out of band", "max abs(d)", "sampled accuracy, end"], rows)
    sides = []
    for arm in LADDER:
        summary = json.loads((bench.at(mixed(arm, SEEDS[0])) / "summary.json").read_text())
        sides.append((arm, summary["trainer"], summary["rollout"]))
    page.text.append("What the summaries say of either side:")
    page.table(("arm", "trainer", "rollout"), sides)
    return page


def zero(bench: Bench, stem: Path) -> Page:
    page, rows = Page(), []
    page.text.append(
        f"Same precision on both sides: highest abs(lp_T - lp_R) of any token in {ZERO_STEPS} steps of 16 prompts x "
        "16 samples. lp_R is what the engine emitted token by token from its served weights and its cache."
    )
    for model in MODELS:
        for precision in MATCHED:
            cells = [model, precision]
            for lag in (0, 1):
                job = matched(precision, model, lag)
                lines = bench.lines(job)
                worst, tokens = max(line[MAX] for line in lines), sum(line["mismatch/valid_tokens"] for line in lines)
                held = len(lines) == ZERO_STEPS and all(line[MAX] == 0.0 for line in lines)
                page.promises.append((f"{model} {precision} lag {lag}: exactly 0.0 at every step", held))
                cells += [repr(worst), f"{tokens:,}"]
            rows.append(cells)
    page.table(("model", "precision", "lag 0", "tokens", "lag 1", "tokens"), rows)
    return page


def arithmetic(bench: Bench, stem: Path) -> Page:
    page, rows = Page(), []
    for precision in TRAINED:
        job = real(precision)
        evaluations, facts = bench.evaluations(job), bench.facts(job) or {}
        first, last = evaluations[0], evaluations[REAL_STEPS]
        cells, minutes = [precision], facts["wall_s"] / 60
        for how, key in (("greedy", "greedy_acc"), ("sampled", "sampled_acc")):
            before, after = (scores[f"eval/reasoning_gym/{key}"] for scores in (first, last))
            # As if the two evaluations had been of different prompts, and a prompt's samples one answer: both widen it.
            half = 1.96 * ((before * (1 - before) + after * (1 - after)) / REAL_PROMPTS) ** 0.5
            low, high = after - before - half, after - before + half
            cells += [f"{before:.3f}", f"{after:.3f}", f"{low:+.3f} to {high:+.3f}"]
            page.promises.append((f"{precision}: {how} accuracy rises, its 95 % interval is above 0", low > 0))
        worst = max(line[MAX] for line in bench.lines(job))
        page.promises.append((f"{precision}: at most {MOST_MINUTES} minutes", minutes <= MOST_MINUTES))
        rows.append([*cells, repr(worst), f"{minutes:.0f}"])
    page.text.append(
        "SmolLM2-135M-Instruct (a dequantised Q4_1 file) answers sums, differences and products of one digit; accuracy "
        f"on {REAL_PROMPTS} held-out prompts, before the first and after step {REAL_STEPS}, one seed. The interval is "
        "of the rise, as if both evaluations had asked different prompts."
    )
    ends = ("start", "end", "95 % of the rise")
    head = [f"{how}, {when}" for how in ("greedy", "sampled") for when in ends]
    page.table(["precision", *head, "max abs(lp_T - lp_R)", "minutes"], rows)
    page.text.append(f"![training reward and entropy]({stem.name}.png)")
    keys = {"reward/mean": "training reward", "train/entropy": "entropy (nat)"}
    lines = {precision: bench.lines(real(precision)) for precision in TRAINED}
    figure, axes = figure_of(1, 2, (9.5, 3.6))
    for axis, (key, title) in zip(axes.flat, keys.items(), strict=True):
        for precision, color in COLORS.items():
            axis.plot([line[key] for line in lines[precision]], color=color, linewidth=2, label=precision)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("optimiser steps")
    axes.flat[0].legend(frameon=False, fontsize=9)
    figure.savefig(stem.with_suffix(".png"))
    return page


def said(section: str) -> Callable[[Bench, Path], Page]:
    """The page of a command: what it printed."""

    def write(bench: Bench, stem: Path) -> Page:
        (job,) = jobs(section)
        facts = bench.facts(job)
        assert facts is not None
        printed = (bench.at(job) / "output.txt").read_text().strip()
        promise = f"`{facts['command']}` ends with exit code 0"
        return Page([f"```\n{printed}\n```"], [(promise, facts["exit"] == 0)])

    return write


PAGES: dict[str, Callable[[Bench, Path], Page]] = {
    "learning": learning,
    "ladder": ladder,
    "zero": zero,
    "arithmetic": arithmetic,
}
PAGES |= {section: said(section) for section in COMMANDS}


def write(bench: Bench, section: str, folder: Path, at_once: int) -> bool:
    """Write the section's page; does every promise hold?"""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{datetime.now(UTC):%Y-%m-%d}-{section}"
    page = PAGES[section](bench, stem)
    kept = all(held for _, held in page.promises)
    verdict = f"{sum(held for _, held in page.promises)} of {len(page.promises)} promises hold."
    lines = [f"# {section}", *provenance(bench, jobs(section), at_once), "## Result", verdict, *page.text]
    lines += [
        "## Promises",
        "\n".join(f"- {'holds' if held else '**DOES NOT HOLD**'}: {p}" for p, held in page.promises),
    ]
    lines += ["## Commands", *commands(bench, jobs(section))]
    stem.with_suffix(".md").write_text("\n\n".join(lines) + "\n")
    say(f"{stem.with_suffix('.md')}: {verdict}")
    return kept


def provenance(bench: Bench, pieces: Sequence[Job], at_once: int) -> Iterator[str]:
    """When, of which commit, with what, where, and how busy the machine was."""
    from lpexp.log import hardware, versions

    facts = [fact for job in pieces if (fact := bench.facts(job))]
    machine, found = hardware(), versions()
    packages = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "ray", "numpy") if found.get(name))
    days = sorted({fact["ended"][:10] for fact in facts})
    loads = [load for fact in facts for load in fact["load"]]
    both = "alone" if pieces[0].alone else f"{at_once} at a time"
    yield "\n".join(
        [
            f"- date: {' to '.join(dict.fromkeys((days[0], days[-1])))}",
            f"- commit: {bench.commit}",
            f"- versions: {packages}",
            f"- hardware: {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB",
            f"- command: `python benchmarks/evidence.py --commit {bench.commit[:12]} --only SECTION`, pieces {both}, "
            "OMP_NUM_THREADS=1",
            f"- load: the machine's one-minute load average was {min(loads):.1f} to {max(loads):.1f} (mean "
            f"{mean(loads):.1f}) at the starts and ends of the pieces; {sum(f['cpu_s'] for f in facts):.0f} s of CPU "
            f"time in {sum(f['wall_s'] for f in facts):.0f} s of the pieces' wall time",
        ]
    ).replace("SECTION", pieces_section(pieces))


def pieces_section(pieces: Sequence[Job]) -> str:
    return next(section for section in PAGES if jobs(section) == list(pieces))


def commands(bench: Bench, pieces: Sequence[Job]) -> Iterator[str]:
    """Every command once; where it wrote is left out."""
    if pieces[0].command:
        yield f"`python {shlex.join(pieces[0].command)}`"
        return
    yield "Each with `cluster=inline wandb.mode=disabled`:"
    yield "```\n" + "\n".join(shlex.join(["python", "launch.py", *job.overrides]) for job in pieces) + "\n```"


def draw_learning(bench: Bench, path: Path) -> None:
    """Sampled and greedy accuracy, training reward and entropy over the steps, of every precision and the control."""
    import numpy as np

    figure, axes = figure_of(2, 2, (9.5, 7))
    titles = {SAMPLED: "held-out accuracy, sampled", GREEDY: "held-out accuracy, greedy"}
    titles |= {"reward/mean": "training reward, mean of 5 steps", "train/entropy": "entropy (nat), mean of 5 steps"}
    for axis, (key, title) in zip(axes.flat, titles.items(), strict=True):
        for precision, color in COLORS.items():
            curves = [curve(bench, learned(precision, seed), key) for seed in SEEDS]
            for x, y in curves:
                axis.plot(x, y, color=color, linewidth=0.8, alpha=0.35)
            axis.plot(curves[0][0], np.mean([y for _, y in curves], axis=0), color=color, linewidth=2, label=precision)
        for precision in TRAINED:
            label = "lr=0, seed 1" if precision == TRAINED[0] else None
            axis.plot(*curve(bench, control(precision), key), color="#6b7280", linewidth=1, linestyle="--", label=label)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_ylim(0, None if key == "train/entropy" else 1)
    axes[0, 0].legend(frameon=False, fontsize=9)
    for axis in axes[1]:
        axis.set_xlabel("optimiser steps")
    figure.savefig(path)


def figure_of(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """An empty figure and its axes, in the house's style."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharex=True)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def curve(bench: Bench, job: Job, key: str) -> tuple[list[float], list[float]]:
    """Evaluations by version, or means of five steps at their middle."""
    if key.startswith("eval/"):
        scores = bench.evaluations(job)
        return sorted(scores), [scores[version][key] for version in sorted(scores)]
    values = [line[key] for line in bench.lines(job)]
    fives = [values[at : at + 5] for at in range(0, len(values), 5)]
    return [5 * at + 2.5 for at in range(len(fives))], [mean(five) for five in fives]


def ends_of(evaluations: dict[int, dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    return evaluations[0], evaluations[STEPS]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """mean (lowest to highest)"""
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def say(text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PAGES, default=list(PAGES), help="sections; all without it")
    parser.add_argument("--commit", default="HEAD", help="what to measure; a commit begun earlier is gone on with")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where the pages go")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    bench = Bench(args.commit)
    say(f"measuring {bench.commit[:12]} in {bench.home}")
    kept = []
    for at, section in enumerate(args.only):
        say(section)
        later = [job for other in args.only[at + 1 :] for job in jobs(other)]
        failed = bench.run_all(jobs(section), later, args.jobs)
        broken = [job.name for job in failed if not job.command]
        if broken:
            say(f"{section}: no page, {', '.join(broken)} failed")
        kept.append(not broken and write(bench, section, args.out, args.jobs))
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
