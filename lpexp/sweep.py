"""A sweep: the runs of one question, as many at once as the machine holds, kept on disk, gone on with after a kill.

DIR/sweep.json names the question and every job with its folder, config hash and state; DIR/<n>/ is the run directory
of job n, with console.txt, what it printed. A job is known by its config hash: going on with other axes keeps the runs
that are asked for again, whatever their number was, and adds the rest. Jobs start seed by seed, so that early results
are pairs. One that fails is named and stops no other. Left out: composing and judging (launcher.py), the report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from lpexp import checkpoint, journal
from lpexp.errors import ConfigError, Mistake

FILE, CONSOLE = "sweep.json", "console.txt"
FORMAT = 1
POLL_S, LOOK_S, TELL_S = (
    0.1,
    1.0,
    60.0,
)  # between looks at processes, at their journals, and lines where no bar can move
WAITING, RUNNING, DONE, FAILED, STOPPED = "waiting", "running", "done", "failed", "stopped"


@dataclass
class Job:
    """One run of a sweep. `arm` is what it is called beside its seed; `words` what was typed for it."""

    folder: str
    arm: str
    seed: int
    steps: int
    hash: str
    words: list[str]
    state: str = WAITING
    why: str = ""  # it failed
    seconds: float = 0.0  # of its last attempt

    @property
    def label(self) -> str:
        return label(self.arm, self.seed)


@dataclass
class Sweep:
    """What DIR/sweep.json holds."""

    question: str
    command: str
    axes: list[str]  # keys that its arms may differ in
    jobs: list[Job] = field(default_factory=list)

    def save(self, home: Path) -> None:
        facts = {"format": FORMAT, **dataclasses.asdict(self)}
        journal.write(home / FILE, json.dumps(facts, indent=1) + "\n")


def label(arm: str, seed: int) -> str:
    """What people call a run."""
    return f"{arm}, seed {seed}" if arm else f"seed {seed}"


def load(home: Path) -> Sweep:
    """ConfigError when the file is none that this lpexp reads."""
    try:
        facts = json.loads((home / FILE).read_bytes())
        if facts.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        return Sweep(**{**facts, "jobs": [Job(**job) for job in facts["jobs"]]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{home / FILE} cannot be read ({type(error).__name__}: {error})") from None


def finished(home: Path, job: Job) -> bool:
    """Has this very run ended?"""
    at = home / job.folder
    if not (at / checkpoint.FINISHED).exists():
        return False
    recorded = json.loads((at / checkpoint.FOLDER / checkpoint.EXPERIMENT).read_bytes())
    return recorded["config_hash"] == job.hash


def steps_done(home: Path, job: Job) -> int:
    """Lines of its metrics.jsonl."""
    with contextlib.suppress(FileNotFoundError):
        return (home / job.folder / journal.METRICS).read_bytes().count(b"\n")
    return 0


# -- where it is written ----------------------------------------------------------------------------------------------
def home_of(resume: str, output_dir: Path, hashes: Sequence[str]) -> tuple[Path, str]:
    """The sweep's directory, and a note on how it was found. ConfigError when what is asked for is not there, or is."""
    if resume not in ("none", "auto"):
        if not (Path(resume) / FILE).exists():
            there = ", ".join(sorted(str(path.parent) for path in Path(resume).parent.glob(f"*/{FILE}"))) or "none"
            why = f"{resume} is no sweep (it has no {FILE}); use none, auto or one of: {there}"
            raise ConfigError([Mistake("resume", why)])
        return Path(resume), f"going on with {resume}"
    if resume == "none":
        if (output_dir / FILE).exists() or any(map(checkpoint.holds_run, _numbered(output_dir))):
            way = f"go on with it: resume=auto output_dir={output_dir}, or choose another"
            raise ConfigError([Mistake("output_dir", f"{output_dir} holds a sweep already; {way}")])
        return output_dir, ""
    if (output_dir / FILE).exists():
        return output_dir, f"going on with {output_dir}"
    if checkpoint.TIMESTAMP.fullmatch(output_dir.name):
        for path in sorted(output_dir.parent.glob(f"*/{FILE}"), reverse=True):
            found = load(path.parent)
            same = {job.hash for job in found.jobs} == set(hashes)
            if same and not all(finished(path.parent, job) for job in found.jobs):
                return (
                    path.parent,
                    f"resume=auto: going on with {path.parent}, the newest unfinished sweep of these runs",
                )
    return output_dir, f"resume=auto: no unfinished sweep of these runs beside {output_dir}, starting a new one"


def adopt(home: Path, sweep: Sweep) -> None:
    """Give each job its folder: the one that it had, else the next free number; say what became of it before."""
    before = load(home) if (home / FILE).exists() else Sweep("", "", [])
    known = {job.hash: job for job in before.jobs}
    taken = {int(job.folder) for job in before.jobs}
    for job in sweep.jobs:
        if old := known.pop(job.hash, None):
            job.folder, job.why, job.seconds = old.folder, old.why, old.seconds
            job.state = DONE if finished(home, job) else FAILED if old.state == FAILED else WAITING
        else:
            number = next(n for n in range(len(taken) + 1) if n not in taken)
            taken.add(number)
            job.folder = str(number)
    sweep.jobs += known.values()  # runs that nobody asks for any more stay in its report
    sweep.axes = list(dict.fromkeys([*before.axes, *sweep.axes]))


def _numbered(home: Path) -> Iterator[Path]:
    return (path for path in home.glob("*") if path.name.isdigit())


# -- running it --------------------------------------------------------------------------------------------------------
class Runner:
    """Runs jobs, `width` at a time. `command(job)` is what to run, `environment(slot)` its variables."""

    def __init__(
        self,
        home: Path,
        sweep: Sweep,
        width: int,
        command: Callable[[Job], list[str]],
        environment: Callable[[int], dict[str, str]],
    ):
        self.home, self.sweep, self.width = home, sweep, width
        self.command, self.environment = command, environment
        self.live: dict[int, tuple[Job, Any, float]] = {}  # slot -> job, process, when it was started
        self.stopped = 0  # the signal that ended the sweep

    def run(self, jobs: Sequence[Job]) -> int:
        """Run these to their ends; 0, 1 when one failed, 128 + signal when the sweep was stopped."""
        waiting = sorted(jobs, key=lambda job: job.seed)
        watch = Watch(self.home, self.sweep, waiting)
        before = {number: signal.signal(number, self._hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.live or (waiting and not self.stopped):
                free = [slot for slot in range(self.width) if slot not in self.live]
                while waiting and free and not self.stopped:
                    self._start(free.pop(0), waiting.pop(0), watch)
                self._collect(watch)
                watch.look([job for job, _, _ in self.live.values()])
                time.sleep(POLL_S)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            watch.close()
        return 128 + self.stopped if self.stopped else int(any(job.state == FAILED for job in jobs))

    def _start(self, slot: int, job: Job, watch: Watch) -> None:
        (self.home / job.folder).mkdir(parents=True, exist_ok=True)
        job.state, job.why = RUNNING, ""
        self.sweep.save(self.home)
        watch.started(job)
        process = spawn(self.command(job), self.environment(slot), self.home / job.folder / CONSOLE)
        self.live[slot] = job, process, time.monotonic()

    def _collect(self, watch: Watch) -> None:
        for slot, (job, process, since) in list(self.live.items()):
            code = process.poll()
            if code is None:
                continue
            del self.live[slot]
            job.seconds = time.monotonic() - since
            # What is on disk says whether a run has ended, not what its process says.
            job.state = DONE if finished(self.home, job) else STOPPED if self.stopped else FAILED
            if job.state == FAILED:
                job.why = f"{outcome(code)}: {last_line(self.home / job.folder / CONSOLE)}"
            self.sweep.save(self.home)
            watch.ended(job)

    def _hand_on(self, number: int, frame: Any) -> None:
        """A signal is for every running job, which stops at its next safe point; no other is started."""
        self.stopped = number
        for _, process, _ in self.live.values():
            process.send_signal(number)


def spawn(command: list[str], environment: dict[str, str], console: Path) -> Any:
    """A process of its own group, so that a signal reaches it once, through us; its words are added to `console`."""
    with console.open("ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,
        )


def outcome(code: int) -> str:
    if code == 0:
        return "ended without finishing"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def last_line(console: Path) -> str:
    """What a job said last, shortened; of a traceback that is the error."""
    lines = [line.strip() for line in console.read_text(errors="replace").splitlines() if line.strip()]
    return shorten(lines[-1], 200, placeholder=" ...") if lines else "it printed nothing"


class Watch:
    """Overall progress with the time left: a live table on a terminal, else a line when something happens."""

    def __init__(self, home: Path, sweep: Sweep, todo: Sequence[Job]):
        from rich.console import Console

        self.home, self.sweep = home, sweep
        self.total = sum(job.steps for job in sweep.jobs)
        self.todo = list(todo)
        self.before = {job.folder: steps_done(home, job) for job in sweep.jobs}
        self.counts = dict(self.before)
        self.since = self.told = time.monotonic()
        self.looked = 0.0
        self.out = Console(highlight=False, soft_wrap=True)
        self.live: Any = None
        if self.out.is_terminal:
            from rich.live import Live

            self.live = Live(console=self.out, transient=True, refresh_per_second=4)
            self.live.start()

    def started(self, job: Job) -> None:
        again = f", from step {self.before[job.folder]}" if self.before[job.folder] else ""
        self.say(f"{job.label}: starts in {job.folder}{again}")

    def ended(self, job: Job) -> None:
        self.counts[job.folder] = steps_done(self.home, job)
        how = {DONE: "done", FAILED: f"failed, {job.why}", STOPPED: "stopped"}[job.state]
        self.say(
            f"{job.label}: {how}, after {job.seconds:.0f} s; {self.overall()}", "red" if job.state == FAILED else None
        )

    def look(self, running: Sequence[Job]) -> None:
        now = time.monotonic()
        if now - self.looked < LOOK_S:
            return
        self.looked = now
        for job in running:
            self.counts[job.folder] = steps_done(self.home, job)
        if self.live is not None:
            self.live.update(self._table(running))
        elif now - self.told > TELL_S:
            self.say(self.overall())

    def overall(self) -> str:
        """`4 of 9 runs done, 45 %, about 3 min left`."""
        done = sum(job.state == DONE for job in self.sweep.jobs)
        steps = sum(min(self.counts[job.folder], job.steps) for job in self.sweep.jobs)
        said = f"{done} of {len(self.sweep.jobs)} runs done, {steps / self.total:.0%}"
        made = sum(self.counts[job.folder] - self.before[job.folder] for job in self.todo)
        left = sum(max(job.steps - self.counts[job.folder], 0) for job in self.todo if job.state in (WAITING, RUNNING))
        if made > 0 and left:
            said += f", about {duration((time.monotonic() - self.since) * left / made)} left"
        return said

    def say(self, text: str, style: str | None = None) -> None:
        self.told = time.monotonic()
        self.out.print(text, style=style, markup=False)
        sys.stdout.flush()

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()

    def _table(self, running: Sequence[Job]) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 1))
        for job in running:
            done = self.counts[job.folder]
            table.add_row(job.label, ProgressBar(job.steps, done, width=24), f"step {done}/{job.steps}")
        steps = sum(min(self.counts[job.folder], job.steps) for job in self.sweep.jobs)
        table.add_row("sweep", ProgressBar(self.total, steps, width=24), self.overall(), style="bold")
        return table


def duration(seconds: float) -> str:
    """40 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
