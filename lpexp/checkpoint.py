"""Checkpoints: what is saved, atomic and verified; which run continues, and that only one process continues it.

Layout: <run>/checkpoints/<step>/ holds what `Trainer.save` wrote, state.json and manifest.json (sha256 of every file);
<run>/checkpoints/experiment.json is the config the run was started with, <run>/finished.json marks its end,
<run>/run.lock names the process that runs in it. A directory is renamed into place when everything in it is on disk,
so a name without `.tmp-` is complete unless something altered it later, and the manifest finds that out.
Only safetensors and JSON are read: loading never unpickles.

Left out: which tensors a trainer needs (its `save` and `restore`), and truncating a log to the step resumed from.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpexp.disk import replace_json, sync, sync_tree, write_json
from lpexp.errors import ConfigError, Mistake, RunError
from lpexp.experiment import MAY_CHANGE, Experiment

if TYPE_CHECKING:
    from torch import Tensor

    from lpexp.precision import Parts

FORMAT = 1
FOLDER, STATE, MANIFEST, EXPERIMENT = "checkpoints", "state.json", "manifest.json", "experiment.json"
FINISHED, LOCK, TEMP = "finished.json", "run.lock", ".tmp-"
NAME = re.compile(r"(\d{6,})(\.replaced)?")
TEMP_OWNER = re.compile(r"\.tmp-.*-(\d+)-([^-]+)")  # what, pid, when that process started
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d[T_ -]\d\d[-:.]?\d\d[-:.]?\d\d.*")  # how the default output_dir ends


# -- saving ------------------------------------------------------------------------------------------------------------


def describe(exp: Experiment, step: int, version: int, **more: Any) -> dict[str, Any]:
    """The content of state.json. `step`: how many steps are done; `version`: of the newest weights."""
    return {"step": step, "version": version, "config_hash": exp.hash(), "experiment": exp.dump()} | more


def save(run_dir: Path, step: int, state: Mapping[str, Any], write: Callable[[Path], Any], keep: int) -> Path:
    """Write checkpoint `step` and return its directory; the `keep` newest stay, older ones go once this one verifies.

    `write` fills the empty directory it is given. Whatever it raises passes through; a disk error becomes a RunError
    that names the path. In both cases, and after a kill at any moment, the checkpoints that were there still are.
    """
    folder = run_dir.absolute() / FOLDER  # workers may stand elsewhere
    final = folder / f"{step:06d}"
    temp = _temp(folder, final.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temp.mkdir()
        try:
            write(temp)
            write_json(temp / STATE, {**state, "format": FORMAT, "step": step})
            _write_manifest(temp, step)
            sync_tree(temp)
            _set_aside(final)
            temp.rename(final)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)  # what cannot be removed now is swept at the next save
            raise
        sync(folder)
        wrong = verify(final)
        if wrong:
            raise RunError(f"{final} does not read back as it was written: {wrong}; nothing older was removed")
    except OSError as error:
        why = f"{error.filename or temp}: {error.strerror or error}"
        raise RunError(f"checkpoint {final} could not be written: {why}; older ones are kept") from error
    _prune(folder, step, keep)
    return final


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file; every tensor keeps its dtype and its bits. Shared or strided storage is copied."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(own, path, dict(metadata or {}))
    except SafetensorError as error:
        raise OSError(0, str(error), str(path)) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU; RunError naming the file when it is torn or something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise RunError(f"{path} is not a complete safetensors file: {error}") from error


def save_parts(path: Path, weights: Mapping[str, Parts], metadata: Mapping[str, str]) -> None:
    """{tensor: its served parts} as one safetensors file, there whole or not at all."""
    made = path.with_suffix(".tmp")
    named = {f"{name}|{suffix}": part for name, parts in weights.items() for suffix, part in parts.items()}
    save_tensors(made, named, metadata)
    made.replace(path)


def load_parts(path: Path) -> tuple[dict[str, Parts], dict[str, str]]:
    """What `save_parts` wrote, and its metadata."""
    found: dict[str, Parts] = {}
    for key, part in load_tensors(path).items():
        name, _, suffix = key.partition("|")
        found.setdefault(name, {})[suffix] = part
    return found, load_metadata(path)


def load_metadata(path: Path) -> dict[str, str]:
    """The metadata that `save_tensors` stored in the file's header."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


# -- reading -----------------------------------------------------------------------------------------------------------


def verify(directory: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file and the difference; None when every byte is as written."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        files, sizes, digest = manifest["files"], manifest["bytes"], manifest["digest"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    if digest != (found := _digest(manifest)):
        return f"{MANIFEST} was altered: it says that its digest is {str(digest)[:16]}, it is {found[:16]}"
    if manifest["format"] != FORMAT:
        return f"{MANIFEST} has format {manifest['format']}, this lpexp reads {FORMAT}"
    for name, expected in files.items():
        path = directory / name
        try:
            size, found = path.stat().st_size, None
            if size == sizes[name]:
                found = _sha256(path)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error})"
        if found is None:
            return f"{name} has {size} bytes, the manifest says {sizes[name]}"
        if found != expected:
            return f"{name} has sha256 {found[:16]}, the manifest says {expected[:16]}"
    named = NAME.fullmatch(directory.name)
    if named and int(named[1]) != manifest["step"]:
        return f"{MANIFEST} is of step {manifest['step']}"
    return None


def newest(run_dir: Path, on_skip: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies, and its state; `on_skip` is told of each one passed over and why."""
    for directory in _stored(run_dir.absolute() / FOLDER):
        wrong = verify(directory)
        if wrong is None:
            return directory, json.loads((directory / STATE).read_bytes())
        on_skip(f"checkpoint {directory} is skipped, the one before it is used: {wrong}")
    return None


# -- which run continues -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resume:
    """Where a run writes and what it continues from. `notes` are to be shown: what was skipped, chosen or forced."""

    run_dir: Path
    checkpoint: Path | None = None  # None: from step 0
    state: dict[str, Any] = field(default_factory=dict)  # of the checkpoint; {} from step 0
    notes: tuple[str, ...] = ()
    continues: bool = False  # the directory holds this run already, with or without a checkpoint
    finished: bool = False  # the run has ended; nothing is left to do

    @property
    def step(self) -> int:
        """The first step to run."""
        return self.state.get("step", 0)


def resolve(exp: Experiment, run_dir: Path | None = None) -> Resume:
    """Judge `resume` and `output_dir` against what is on disk; writes nothing, raises ConfigError.

    `run_dir` is the output_dir that the user chose; None leaves it to `exp.output_dir`, which counts as the default
    when its last part is a time stamp. With resume=auto and the default, its siblings are the candidates.
    """
    chosen = run_dir is not None or not TIMESTAMP.fullmatch(Path(exp.output_dir).name)
    here = Path(exp.output_dir) if run_dir is None else Path(run_dir)
    if exp.resume == "none":
        _refuse_a_held_run(here)
        return Resume(here)
    if exp.resume != "auto":
        return _continue(exp, _named(exp, here, chosen), must=True)
    if holds_run(here):
        return _continue(exp, here)
    if chosen:
        return Resume(here, notes=(f"resume=auto: {here} holds no run yet, starting at step 0",))
    found = _unfinished(exp, here.parent)
    if found is None:
        why = f"no unfinished run with config hash {exp.hash()} in {here.parent}"
        return Resume(here, notes=(f"resume=auto: {why}, starting at step 0 in {here}",))
    why = f"the newest unfinished run with config hash {exp.hash()}"
    return _continue(exp, found, notes=(f"resume=auto: continuing {found}, {why}",))


def holds_run(directory: Path) -> bool:
    """Has a run been started in this directory?"""
    marks = (directory / FOLDER / EXPERIMENT, directory / "metrics.jsonl")
    return any(mark.exists() for mark in marks) or bool(_stored(directory / FOLDER))


def finish(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Mark the run as ended."""
    replace_json(run_dir / FINISHED, summary)


class Claim:
    """The right of this process to run in a directory: run.lock holds its pid and when it started.

    The lock of a dead process is taken over. Taking it records the experiment and withdraws finished.json when steps
    are left to run. Use as a context manager, before anything else is written there; ConfigError names the pid that
    has it.
    """

    def __init__(self, resume: Resume, exp: Experiment):
        self.path = resume.run_dir / LOCK
        try:
            (resume.run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
            with _guarded(self.path) as file:
                _refuse_a_live_owner(file.read(), resume.run_dir)
                if not resume.continues:
                    _refuse_a_held_run(resume.run_dir)  # started by another process since `resolve` looked
                owner = {"pid": os.getpid(), "born": _born(os.getpid()), "host": socket.gethostname()}
                file.seek(0)
                file.truncate()
                file.write(json.dumps(owner))
                file.flush()
                os.fsync(file.fileno())
                _record(resume, exp)
        except OSError as error:
            raise _refusal("output_dir", f"{resume.run_dir} cannot be written ({error}); choose another") from error

    def release(self) -> None:
        """Let another process run here. The file stays, empty: removing it would race with one that opens it."""
        with _guarded(self.path) as file:
            file.truncate(0)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


# -- how it is judged --------------------------------------------------------------------------------------------------


def _named(exp: Experiment, here: Path, chosen: bool) -> Path:
    """The run directory that resume=DIR names."""
    directory = Path(exp.resume)
    if chosen and here.resolve() != directory.resolve():
        why = "are two directories; a run continues where it is: leave one of them out"
        raise _refusal("resume", f"{directory} and output_dir {here} {why}")
    if directory.parent.name == FOLDER and NAME.fullmatch(directory.name):
        raise _refusal("resume", f"{directory} is one checkpoint of a run; use resume={directory.parent.parent}")
    if not directory.is_dir():
        runs = ", ".join(sorted(str(d) for d in _children(directory.parent) if holds_run(d))) or "none"
        why = f"does not exist; use none, auto or a run directory (in {directory.parent}: {runs})"
        raise _refusal("resume", f"{exp.resume} {why}")
    return directory


def _continue(exp: Experiment, run_dir: Path, notes: tuple[str, ...] = (), must: bool = False) -> Resume:
    """Resume this run. `must`: without a complete checkpoint it is refused, even when none was ever written."""
    if (run_dir / LOCK).exists():
        _refuse_a_live_owner((run_dir / LOCK).read_text(), run_dir)
    path = run_dir / FOLDER / EXPERIMENT
    forced = _judge_change(exp, run_dir, _read_json(path)["experiment"]) if path.exists() else ()
    skipped: list[str] = []
    found = newest(run_dir, skipped.append)
    if found is None and (must or skipped):
        there = ", ".join(sorted(entry.name for entry in run_dir.iterdir())) or "nothing"
        way_out = "to start anew choose another output_dir"
        if not skipped:
            way_out += f", or from step 0 in this one with `resume=auto output_dir={run_dir}`"
        lines = [
            f"{run_dir} has no complete checkpoint; not starting over silently: {way_out}. There: {there}",
            *skipped,
        ]
        raise _refusal("resume", "\n    ".join(lines))
    if found is None:
        notes += (f"{run_dir} holds no checkpoint yet, starting at step 0",)
        return Resume(run_dir, notes=(*notes, *forced), continues=True, finished=(run_dir / FINISHED).exists())
    checkpoint, state = found
    if not path.exists():
        forced = _judge_change(exp, run_dir, state["experiment"])
    finished = (run_dir / FINISHED).exists() and not forced
    return Resume(run_dir, checkpoint, state, (*notes, *skipped, *forced), continues=True, finished=finished)


def _judge_change(exp: Experiment, run_dir: Path, recorded: Mapping[str, Any]) -> tuple[str, ...]:
    """Refuse a config that would compute other numbers than the run's; with resume_force, notes of what differs."""
    old, new = (dict(_flat(dump)) for dump in (recorded, json.loads(json.dumps(exp.dump()))))
    keys = [key for key in sorted({*old, *new}) if key.split(".")[0] not in MAY_CHANGE]
    pairs = [(key, old.get(key, "absent"), new.get(key, "absent")) for key in keys]
    lines = [Mistake(key, f"{before} -> {after}") for key, before, after in pairs if before != after]
    if lines and not exp.resume_force:
        way_out = "set these keys back, choose another output_dir, or go on all the same with resume_force=true"
        raise ConfigError(lines, f"{run_dir} was started with another config (old -> new); {way_out}:")
    return tuple(f"resume_force: {run_dir} goes on with {line}" for line in lines)


def _flat(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Nested groups as (dotted key, value)."""
    if not isinstance(value, dict):
        yield at, value
        return
    for key, item in value.items():
        yield from _flat(item, f"{at}.{key}" if at else key)


def _record(resume: Resume, exp: Experiment) -> None:
    """Write what this run is, for those who will resume it."""
    path = resume.run_dir / FOLDER / EXPERIMENT
    started = _read_json(path)["started"] if path.exists() else datetime.datetime.now(datetime.UTC).isoformat()
    record = {"format": FORMAT, "started": started, "config_hash": exp.hash(), "experiment": exp.dump()}
    replace_json(path, record)
    if not resume.finished:
        (resume.run_dir / FINISHED).unlink(missing_ok=True)


def _unfinished(exp: Experiment, parent: Path) -> Path | None:
    """The newest run under `parent` with this config's hash that has not ended."""
    started = []
    for directory in _children(parent):
        path = directory / FOLDER / EXPERIMENT
        if path.exists() and not (directory / FINISHED).exists():
            record = _read_json(path)
            if record["config_hash"] == exp.hash():
                started.append((record["started"], directory))
    return max(started)[1] if started else None


def _refuse_a_held_run(directory: Path) -> None:
    if holds_run(directory):
        stored = [d.name for d in _stored(directory / FOLDER)[:1]]
        upto = f" (checkpoint {stored[0]})" if stored else ""
        ways_on = f"continue it with `resume=auto output_dir={directory}`, or start a new one with another output_dir"
        raise _refusal("output_dir", f"{directory} already holds a run{upto}; {ways_on}")


def _refuse_a_live_owner(text: str, run_dir: Path) -> None:
    try:
        owner = json.loads(text)
        pid, born, host = int(owner["pid"]), owner["born"], owner["host"]
    except (ValueError, KeyError, TypeError):
        return  # free, or its owner was killed while it wrote its name
    if host != socket.gethostname():
        way_out = f"if that machine no longer runs it, remove {run_dir / LOCK}"
    elif _born(pid) == born:
        way_out = "wait for it, stop it, or choose another output_dir"
    else:
        return
    raise _refusal("output_dir", f"process {pid} on {host} is running in {run_dir}; {way_out}")


def _refusal(key: str, message: str) -> ConfigError:
    return ConfigError([Mistake(key, message)])


# -- disk --------------------------------------------------------------------------------------------------------------


def _stored(folder: Path) -> list[Path]:
    """Checkpoint directories, newest first; of one step, the one that was replaced comes last."""
    named = [(int(match[1]), match[2] is None, d) for d in _children(folder) if (match := NAME.fullmatch(d.name))]
    return [directory for _, _, directory in sorted(named, reverse=True)]


def _children(folder: Path) -> list[Path]:
    return [d for d in folder.iterdir() if d.is_dir()] if folder.is_dir() else []


def _temp(folder: Path, name: str) -> Path:
    """A name of this process for a directory that is being made or removed."""
    return folder / f"{TEMP}{name}-{os.getpid()}-{_born(os.getpid())}"


def _sweep(folder: Path) -> None:
    """Remove what saves that never ended left behind, unless their process lives (this one's own are failed ones)."""
    for directory in _children(folder):
        owner = TEMP_OWNER.fullmatch(directory.name)
        if owner and (int(owner[1]) == os.getpid() or _born(int(owner[1])) != owner[2]):
            shutil.rmtree(directory)


def _set_aside(final: Path) -> None:
    """Free the name of a checkpoint that is written again; what was complete stays readable until the new one is."""
    old = final.with_name(final.name + ".replaced")
    if final.exists() and old.exists():  # a process was killed before it removed one of them
        _remove(final if verify(final) else old)
    if final.exists():
        final.rename(old)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Keep the `keep` newest up to `step`; later ones did not verify when this run resumed, and stay as evidence."""
    upto = [d for d in _stored(folder) if int(d.name.split(".")[0]) <= step]
    kept = [d for d in upto if not d.name.endswith(".replaced")][:keep]
    for directory in upto:
        if directory not in kept:
            _remove(directory)


def _remove(directory: Path) -> None:
    """Renamed first, so that a kill leaves no half checkpoint under a name that counts."""
    shutil.rmtree(directory.rename(_temp(directory.parent, f"{directory.name}.removed")))


def _write_manifest(directory: Path, step: int) -> None:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    names = [path.relative_to(directory).as_posix() for path in paths]
    manifest = {
        "format": FORMAT,
        "step": step,
        "files": {name: _sha256(path) for name, path in zip(names, paths, strict=True)},
        "bytes": {name: path.stat().st_size for name, path in zip(names, paths, strict=True)},
    }
    write_json(directory / MANIFEST, manifest | {"digest": _digest(manifest)})


def _digest(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); it was altered after lpexp wrote it") from None


class _guarded:
    """run.lock opened and held against other processes for the moment in which it is read and written."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> Any:
        self.file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        return self.file

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _born(pid: int) -> str | None:
    """When the process with this pid started, as text that no later holder of the pid shares; None when it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
        return _born_without_proc(pid)
    return None if fields[0] in "ZX" else f"{boot[:8]}.{fields[19]}"


def _born_without_proc(pid: int) -> str | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None
