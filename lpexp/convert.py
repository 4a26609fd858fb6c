"""`lpexp convert`: a Hugging Face directory in another precision, by the objects that train and serve.

A tensor is cut into runs of rows that its precision quantises alone, and a few rows are in memory at a time. Where
every byte goes is planned first, so several processes write the same files and their number changes nothing. What is
done is noted beside the files with its checksum; after a kill the same command reads the notes, keeps what is intact
and does the rest. The directory gets its name when all of it is on disk.
Left out: the arithmetic (lpexp/precision), what a directory holds (lpexp/model/hf.py), calibration (calibrate.py).
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

from lpexp.data import Param
from lpexp.errors import ConfigError, NonFiniteWeightError, RunError
from lpexp.model import hf, shards
from lpexp.precision import Parts, Precision, Tally, expected, from_hf, side
from lpexp.precision.targets import TARGETS, Flag, Target, read_as

if TYPE_CHECKING:
    from torch import Tensor

JOB_VALUES = 1 << 25  # of one tensor, for one worker
SLICE_VALUES = 1 << 18  # in memory at a time: they and their temporaries stay in the processor's cache
OTHER = "name its divisor with --divisor"
NOTES, LOCK = "progress.jsonl", "lock"


# -- the command -------------------------------------------------------------------------------------------------------
def add_arguments(parser: argparse.ArgumentParser) -> None:
    words = parser.add_subparsers(dest="target", required=True, metavar="PRECISION")
    for target in TARGETS:
        one = words.add_parser(target.word, help=target.help, allow_abbrev=False)
        one.add_argument("--model-dir", "--input-dir", dest="source", type=Path, metavar="DIR", help="read from here")
        one.add_argument("--save-dir", "--output-dir", dest="out", type=Path, metavar="DIR", help="a new directory")
        one.add_argument("--max-workers", type=int, metavar="N", help="processes; one for each core unless given")
        for flag in target.flags:
            one.add_argument(*flag.names, help=flag.help, default=None, **flag.kind)
        for flag in _foreign(target):
            one.add_argument(*flag.names, help=argparse.SUPPRESS, default=None, **flag.kind)
        one.set_defaults(chosen=target)


def _foreign(target: Target) -> list[Flag]:
    """Flags of the other words: known, so that one in the wrong place is told in words."""
    own = {name for flag in target.flags for name in flag.names}
    found = {flag.names[0]: flag for other in TARGETS for flag in other.flags if not own & set(flag.names)}
    return list(found.values())


def main(args: argparse.Namespace) -> int:
    target: Target = args.chosen
    if misplaced := [flag for flag in _foreign(target) if getattr(args, flag.dest) is not None]:
        flag = misplaced[0]
        owner = next(other.word for other in TARGETS if flag in other.flags)
        raise ConfigError(f"{flag.names[0]} belongs to `lpexp convert {owner}`, not to {target.word}; leave it out")
    for value, names in ((args.source, "--model-dir (or --input-dir)"), (args.out, "--save-dir (or --output-dir)")):
        if value is None:
            raise ConfigError(f"{names} is missing; name a directory")
    if args.max_workers is not None and args.max_workers < 1:
        raise ConfigError(f"--max-workers {args.max_workers}: at least one process is needed")
    wish = target.choose(args)
    workers = args.max_workers or len(os.sched_getaffinity(0))
    if wish.why:
        print(wish.why)
    try:
        if wish.calibration is not None:
            from lpexp.calibrate import calibrate

            report = calibrate(args.source, args.out, wish.calibration)
            print("note: the first weight update of a run replaces calibrated values by rounded ones")
        else:
            report = convert(args.source, args.out, wish.precision, workers, reading=wish.reading, say=print)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {_temp(args.out)}", file=sys.stderr)
        return 130
    print(report.text())
    print(f"{args.out} is complete")
    return 0


class Report(NamedTuple):
    """What was done to the tensors that changed their format, by module class."""

    kinds: dict[str, tuple[int, Tally]]  # class -> tensors, their tally

    def text(self) -> str:
        from lpexp.plan import table

        rows = [["module class", "tensors", "relative error", "SQNR", "saturated codes", "zero blocks"]]
        for kind, (count, tally) in self.kinds.items():
            stats = tally.stats()
            decibels = "exact" if math.isinf(stats["sqnr_db"]) else f"{stats['sqnr_db']:.2f} dB"
            counts = [f"{stats['saturated_frac']:.4%}", f"{tally.zero_blocks:,}"] if tally.codes else ["-", "-"]
            rows.append([kind, f"{count:,}", f"{stats['rel_error']:.3e}", decibels, *counts])
        return table(rows) if len(rows) > 1 else "no tensor changed its format"


# -- from directory to directory ---------------------------------------------------------------------------------------
def convert(
    source: str | Path,
    directory: str | Path,
    precision: Precision,
    workers: int = 1,
    shard_bytes: int = shards.SHARD_BYTES,
    reading: dict[str, Any] | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Report:
    """Write `source` in `precision`. One worker is this process; `reading` adds to what the source's config says."""
    source, directory = Path(source), Path(directory)
    hf.judge_new(directory)
    stored = open_source(source, precision, reading, say)
    params, moe = list(stored.model.params()), stored.moe
    for warning in precision.warnings(params, moe):
        say(f"warning: {warning}")
    made = hf.plan(params, moe, precision, shard_bytes)
    work = Work(stored, precision, params, made, _temp(directory))
    config = hf.served_config(hf.read_config(source), params, moe, precision)
    if stored.precision is not None:
        config[hf.DECODED] = stored.precision.hf(params, moe)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _workplace(work, say) as (notes, done):
        _room(work)
        for index, result in _run(work, workers, done):
            notes.write(json.dumps([index, *_noted(result)]) + "\n")
            notes.flush()
            done[index] = result
        report = work.report(done)
        (work.temp / NOTES).unlink()
        (work.temp / LOCK).unlink()
        hf.publish(work.temp, directory, made, config, hf.beside(source))
    return report


def open_source(
    source: Path,
    precision: Precision,
    reading: dict[str, Any] | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> hf.Stored:
    """The source's tensors, found and checked; ConfigError where this conversion makes no sense."""
    model = hf.read_model(source)
    params, moe = list(model.params()), model.moe is not None
    held = hf.read_precision(source, model)
    quantises = any(precision.covers(param, moe) for param in params)
    if held is not None and quantises:
        raise ConfigError(
            f"{source} is quantised already ({held.name}); quantising twice loses twice: "
            f"convert the 16-bit directory it was made from, or take it back first with `lpexp convert bf16`"
        )
    if held is None and reading:
        told = ", ".join(f"--{key} {value:g}" for key, value in reading.items())
        raise ConfigError(f"{told}: {source} is not quantised")
    mistakes = list(precision.judge(params, moe))
    if mistakes:
        raise ConfigError(mistakes, f"{source} cannot be quantised like this:")
    stored = hf.Stored(source, model, None if held is None else read_as(held, reading or {}))
    plain = expected(precision.plain, (1, 1))["weight"][1]
    if held is None and not quantises and {entry.dtype for entry in stored.place.values()} == {plain}:
        raise ConfigError(f"{source} is not quantised, all its tensors are {plain} already; copy it")
    if quantises and (note := hf.read_config(source).get(hf.DECODED)):
        origin = from_hf(note, params, moe)
        if not origin.closed and type(origin) is type(precision):
            raise ConfigError(
                f"{source} was decoded from {origin.format()['identity']}, whose scales cannot be found again from its "
                "values; use the quantised directory itself, or convert the weights that it was calibrated from"
            )
        say(f"note: the values of {source} were decoded from {origin.format()['identity']}: quantised before")
    return stored


# -- the work, in pieces -----------------------------------------------------------------------------------------------
class Job(NamedTuple):
    """Rows first..last of one tensor."""

    param: int
    first: int
    last: int


class Done(NamedTuple):
    checksum: int  # CRC-32 of the bytes that were written, in the order of `Work.pieces`
    tally: Tally
    bytes: int  # read


class Work:
    """All that a worker needs to know; plain data, sent to each once."""

    def __init__(self, stored: hf.Stored, target: Precision, params: list[Param], made: shards.Plan, temp: Path):
        self.stored, self.target, self.params, self.made, self.temp = stored, target, params, made, temp
        self.moe = stored.moe
        self.jobs = [job for index in range(len(params)) for job in self._cut(index)]

    def source_of(self, param: Param) -> Precision | None:
        """The precision that holds this tensor; None where it is stored as it is."""
        held = self.stored.precision
        return held if held is not None and held.covers(param, self.moe) else None

    def _step(self, param: Param) -> int | None:
        """Rows that must stay together on either side; None: all."""
        both = [side(param, self.target, self.moe), self.source_of(param)]
        rows = [one.rows for one in both if one is not None]
        return None if None in rows else math.lcm(*(row for row in rows if row is not None))

    def _cut(self, index: int) -> Iterator[Job]:
        param = self.params[index]
        for first, last in self._spans(param, 0, param.shape[0], JOB_VALUES):
            yield Job(index, first, last)

    def _spans(self, param: Param, first: int, last: int, values: int) -> Iterator[tuple[int, int]]:
        step = self._step(param)
        rows = last - first if step is None else max(values // math.prod(param.shape[1:]) // step, 1) * step
        for start in range(first, last, max(rows, 1)):
            yield start, min(start + rows, last)

    def pieces(self, job: Job) -> Iterator[tuple[int, int]]:
        return self._spans(self.params[job.param], job.first, job.last, SLICE_VALUES)

    def run(self, job: Job) -> Done:
        """Read, quantise and write, a few rows at a time."""
        param, checksum, tally, read = self.params[job.param], 0, Tally(), 0
        target, held = side(param, self.target, self.moe), self.source_of(param)
        fixed = target.fixed(param.shape)
        for first, last in self.pieces(job):
            parts = self.stored.parts(param, first, last)
            read += sum(part.nbytes for part in parts.values())
            weight = parts["weight"] if held is None else self._decode(param, held, parts)
            try:
                made = target.quantize(weight, param.name)
            except NonFiniteWeightError as error:
                raise self._placed(error, param, held, first) from None
            for suffix, entry, row, _ in self._places(param, target, first, last):
                part = fixed[suffix] if suffix in fixed else made[suffix]
                checksum = crc32(shards.write(self.temp, entry, part, row), checksum)
            if held is not None or target is not target.plain:
                tally += target.tally(weight, made)
        return Done(checksum, tally, read)

    def intact(self, job: Job, checksum: int) -> bool:
        """Are the bytes of a finished job still those that were noted?"""
        param, found = self.params[job.param], 0
        target = side(param, self.target, self.moe)
        for first, last in self.pieces(job):
            for _, entry, row, end in self._places(param, target, first, last):
                part = shards.read(self.temp, entry, row, end)
                found = crc32(shards.raw(part), found)
        return found == checksum

    def _places(
        self, param: Param, target: Precision, first: int, last: int
    ) -> Iterator[tuple[str, shards.Entry, int, int]]:
        """(suffix, its place, its rows) of what the tensor's rows first..last become, in the order of writing."""
        fixed = target.fixed(param.shape)
        for suffix, (shape, _) in expected(target, param.shape).items():
            entry = self.made.places[hf.part_name(param.name, suffix)]
            if suffix in fixed or (first, last) == (0, param.shape[0]):
                if first == 0:
                    yield suffix, entry, 0, shape[0]
            else:
                step = -(-param.shape[0] // shape[0])
                yield suffix, entry, first // step, -(-last // step)

    def _decode(self, param: Param, held: Precision, parts: Parts) -> Tensor:
        try:
            return held.dequantize(parts)
        except RunError as error:
            suffix = next(suffix for suffix in parts)
            raise RunError(
                f"{self.stored.where(param.name, suffix)}: {error}; if another tool made it, {OTHER}"
            ) from None

    def _placed(
        self, error: NonFiniteWeightError, param: Param, held: Precision | None, first: int
    ) -> NonFiniteWeightError:
        """The error with file and tensor, the row in the whole tensor, and all of its bad values counted."""
        suffix = next(iter(self.stored.layout(param)))
        count = error.count
        for start, stop in self._spans(param, 0, param.shape[0], SLICE_VALUES):
            if start > first:
                parts = self.stored.parts(param, start, stop)
                weight = parts["weight"] if held is None else self._decode(param, held, parts)
                count += int((~weight.isfinite()).sum())
        index = (error.index[0] + first, *error.index[1:])
        return NonFiniteWeightError(self.stored.where(param.name, suffix), index, error.value, count)

    def key(self) -> str:
        """What a half-done directory must have been made from, and for, to be gone on with."""
        files = sorted({entry.file for entry in self.stored.place.values()})
        stats = [(self.stored.directory / file).stat() for file in files]
        source = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)]
        held = self.stored.precision.dump() if self.stored.precision else None
        plan = {name: tuple(entry) for name, entry in self.made.places.items()}
        told = [str(self.stored.directory.resolve()), source, held, self.target.dump(), plan, JOB_VALUES, SLICE_VALUES]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def report(self, done: dict[int, Done]) -> Report:
        kinds: dict[str, list[Any]] = {}
        for index, job in enumerate(self.jobs):
            param = self.params[job.param]
            if self.source_of(param) is None and not self.target.covers(param, self.moe):
                continue
            row = kinds.setdefault(param.kind, [0, Tally()])
            row[0] += job.first == 0
            row[1] += done[index].tally
        return Report({kind: (count, tally) for kind, (count, tally) in kinds.items()})


# -- one process or several --------------------------------------------------------------------------------------------
def _run(work: Work, workers: int, done: dict[int, Done]) -> Iterator[tuple[int, Done]]:
    """Every job that is not done, as it is finished; the bar shows the whole conversion."""
    left = [index for index in range(len(work.jobs)) if index not in done]
    results = _alone(work, left) if min(workers, len(left)) <= 1 else _together(work, left, min(workers, len(left)))
    with _bar(work, done) as advance:
        for index, result in results:
            advance(result.bytes)
            yield index, result


def _alone(work: Work, left: list[int]) -> Iterator[tuple[int, Done]]:
    for index in left:
        with _full_disk(work, work.jobs[index]):
            result = work.run(work.jobs[index])
        yield index, result


def _together(work: Work, left: list[int], workers: int) -> Iterator[tuple[int, Done]]:
    """Processes that each hold one end of a pipe: when this process dies, however, they read its end and end too."""
    pipes: dict[Any, subprocess.Popen[bytes]] = {}
    todo = iter(left)
    try:
        for _ in range(workers):
            ours, theirs = Pipe()
            code = (
                f"import sys; sys.path[:] = {sys.path!r}; from lpexp import convert; convert.serve({theirs.fileno()})"
            )
            pipes[ours] = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()])
            theirs.close()
            ours.send(work)
            ours.send(next(todo))
        running = set(pipes)
        while running:
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                try:
                    index, result = pipe.recv()
                except (EOFError, ConnectionError):
                    ended = pipes[pipe].wait()
                    raise WorkerDied(
                        f"a worker ended with code {ended} (-9: killed, perhaps for want of memory)"
                    ) from None
                if isinstance(result, BaseException):
                    raise result
                following = next(todo, None)
                if following is None:
                    running.discard(pipe)
                else:
                    pipe.send(following)
                yield index, result
    finally:
        for pipe, process in pipes.items():
            pipe.close()
            process.terminate()
            process.wait()


class WorkerDied(RunError):
    """A worker process was killed; what is done stays, so that the same command goes on."""


def serve(descriptor: int) -> None:
    """A worker's life: the work, then a job's number in and what came of it out, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError), Connection(descriptor) as pipe:
        work: Work = pipe.recv()
        while True:
            index = pipe.recv()
            try:
                with _full_disk(work, work.jobs[index]):
                    result = work.run(work.jobs[index])
                pipe.send((index, result))
            except (ConfigError, RunError, OSError) as error:
                pipe.send((index, error))


@contextlib.contextmanager
def _full_disk(work: Work, job: Job) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        name, need = work.params[job.param].name, sum(work.made.sizes.values())
        raise RunError(
            f"{work.temp}: no space left while {name} was written ({error.strerror}); "
            f"{need:,} bytes are needed; free some or choose another --save-dir"
        ) from None


@contextlib.contextmanager
def _bar(work: Work, done: dict[int, Done]) -> Iterator[Callable[[int], None]]:
    """Bytes read, GB/s and time left, on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    names = (name for param in work.params for name in (hf.part_name(param.name, s) for s in work.stored.layout(param)))
    total = sum(work.stored.place[name].nbytes for name in names)
    before = sum(result.bytes for result in done.values())
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("convert", total=total, completed=before)
        yield lambda count: progress.advance(task, count)


# -- the place of work -------------------------------------------------------------------------------------------------
def _temp(directory: Path) -> Path:
    """Where a directory is made; the same name in every attempt, so that the next one finds it."""
    return directory.with_name(f".tmp-{directory.name}")


@contextlib.contextmanager
def _workplace(work: Work, say: Callable[[str], object]) -> Iterator[tuple[IO[str], dict[int, Done]]]:
    """(open notes, what an earlier attempt finished). A kill or Ctrl-C leaves it; an error takes it away."""
    work.temp.mkdir(exist_ok=True)
    with (work.temp / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{work.temp} is in use: another process converts into this directory") from None
        try:
            done = _resume(work, say)
            with (work.temp / NOTES).open("a") as notes:
                yield notes, done
        except (KeyboardInterrupt, WorkerDied):
            raise
        except BaseException:
            shutil.rmtree(work.temp, ignore_errors=True)
            raise


def _resume(work: Work, say: Callable[[str], object]) -> dict[int, Done]:
    """Finished jobs whose bytes are intact. Without any, or when source or wish changed, files are made anew."""
    lines = (work.temp / NOTES).read_text().splitlines() if (work.temp / NOTES).exists() else []
    key = json.dumps(work.key())
    done: dict[int, Done] = {}
    if lines and lines[0] == key:
        for line in lines[1:]:
            with contextlib.suppress(ValueError):  # the line that a kill tore
                index, checksum, tally, read = json.loads(line)
                if work.intact(work.jobs[index], checksum):
                    done[index] = Done(checksum, Tally(*tally), read)
        say(f"going on: {len(done)} of {len(work.jobs)} pieces in {work.temp} are done and intact")
    else:
        if lines:
            say(f"{work.temp} was made from another source or with other flags: starting again")
        for path in work.temp.iterdir():
            if path.name != LOCK:
                path.unlink()
        shards.create(work.temp, work.made)
    kept = [json.dumps([index, *_noted(result)]) for index, result in done.items()]
    (work.temp / NOTES).write_text("".join(f"{line}\n" for line in [key, *kept]))
    return done


def _noted(result: Done) -> list[Any]:
    return [result.checksum, result.tally.row(), result.bytes]


def _room(work: Work) -> None:
    """ConfigError where the files cannot fit on the disk."""
    held = sum(path.stat().st_blocks * 512 for path in work.temp.iterdir())
    need, free = sum(work.made.sizes.values()) - held, shutil.disk_usage(work.temp).free
    if need > free:
        raise ConfigError(f"{work.temp.parent} has {free:,} bytes free, {need:,} are needed; choose another --save-dir")
