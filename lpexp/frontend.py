"""The front end: what a person typed becomes a judged Experiment, and every mistake becomes a line in their words.

`@hydra.main` composes; this module wraps it. Hydra is told to re-raise (HYDRA_FULL_ERROR), its exceptions are read
and told again without the advice to use `+`. Left out: training errors, which keep their traceback.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from lpexp.config import load, nearest
from lpexp.errors import ConfigError, Mistake, RunError, Stopped
from lpexp.experiment import Experiment
from lpexp.model import Parallel
from lpexp.precision import Precision

CONF = Path(__file__).resolve().parents[1] / "conf"
MOUNTS = ("rollout.precision", "reference.precision")  # where a precision may be named besides `precision`
MAY_BE_EMPTY = ("experiment", "layout", *MOUNTS)
TAKES_VALUE = ("-c", "--cfg", "-p", "--package", "-cn", "--config-name", "-cd", "--config-dir", "-cp", "--config-path")
FLAGS = (*TAKES_VALUE, "-m", "--multirun", "-h", "--help", "--hydra-help", "--version", "-r", "--run", "--resolve", "-i", "--info")
FULL_ERROR = "HYDRA_FULL_ERROR"
HYDRA_SAYS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)

_running = False  # a run has begun: from here on nothing is a config mistake by its type alone
set_by_us = False  # HYDRA_FULL_ERROR was set here, not by the person


# -- the door ---------------------------------------------------------------------------------------------------------
def guard(main: Callable[[], Any], argv: Sequence[str]) -> int:
    """Call a `@hydra.main` function with these arguments; returns the exit code, prints what was refused."""
    global _running, set_by_us
    _running, before = False, sys.argv
    set_by_us = FULL_ERROR not in os.environ
    try:
        os.environ.setdefault(FULL_ERROR, "1")
        from lpexp import launcher

        launcher.register()
        with told():
            flags, typed = tidy(argv)
            sys.argv = [before[0], *flags, *typed]
            try:
                main()
            except HYDRA_SAYS as error:
                if _running or not set_by_us:
                    raise
                raise ConfigError(every_mistake(error, flags, typed)) from None
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    finally:
        sys.argv = before
        if set_by_us:
            os.environ.pop(FULL_ERROR, None)
    return 0


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What we refuse, or fail at, on purpose is printed without a traceback; the exit code says which it was."""
    try:
        yield
    except (ConfigError, RunError, Stopped) as error:
        print(error, file=sys.stderr)
        code = 2 if isinstance(error, ConfigError) else 1 if isinstance(error, RunError) else 128 + error.signal
        raise SystemExit(code) from None


def run_begins() -> None:
    """From here on errors are the run's, not the config's, and keep their traceback."""
    global _running
    _running = True


def overrides() -> list[str]:
    """What this job was given: typed overrides, and for a job of a sweep its axes."""
    return list(HydraConfig.get().overrides.task)


def compose(typed: Sequence[str] = (), config_name: str = "config", config_dir: str | Path | None = None) -> DictConfig:
    """The composed config, as `python launch.py` would see it; raises what Hydra raises."""
    import hydra

    GlobalHydra.instance().clear()
    typed = tidy(typed)[1]
    if config_dir is not None:
        typed = [f"hydra.searchpath=[file://{CONF}]", *typed]
    with hydra.initialize_config_dir(str(Path(config_dir or CONF).resolve()), version_base="1.3"):
        return hydra.compose(config_name, overrides=list(typed))


def judge(cfg: DictConfig | Mapping[str, Any]) -> Experiment:
    """The only door from a composed config to an Experiment; ConfigError with every mistake found."""
    data: Any = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
    mistakes = list(_name_precisions(data))
    exp = None
    try:
        exp = load(data, Experiment)
    except ConfigError as error:
        known = {mistake.key for mistake in mistakes}
        mistakes += [mistake for mistake in error.mistakes if mistake.key not in known]
    with contextlib.suppress(ValidationError):  # an invalid precision is told above
        mistakes += contradictions(Precision.model_validate(data.get("precision")), os.environ)
    if exp is not None:
        mistakes += _no_layout(exp)
    if mistakes:
        raise ConfigError(mistakes)
    assert exp is not None
    return exp


def experiment(*typed: str) -> Experiment:
    """Compose and judge in one go, for Python callers."""
    return judge(compose(typed))


# -- before Hydra -----------------------------------------------------------------------------------------------------
def tidy(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(flags, overrides): flags first, as argparse wants them, and names of precisions spelt as Hydra's groups."""
    flags: list[str] = []
    typed: list[str] = []
    mistakes: list[Mistake] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            typed.append(word)
            continue
        name = word.split("=")[0]
        if word.startswith("--") and name not in FLAGS and _is_key(name[2:]):
            mistakes.append(Mistake(name, f"keys are typed without dashes: {word[2:] if '=' in word else name[2:] + '=VALUE'}"))
            continue
        flags.append(word)
        if word in TAKES_VALUE and rest:
            flags.append(rest.pop(0))
        elif word in ("-i", "--info", "-sc", "--shell-completion") and rest and (word in ("-sc", "--shell-completion") or "=" not in rest[0]):
            flags.append(rest.pop(0))
    typed = [_respell(word) for word in typed]
    mistakes += [mistake for word in typed for mistake in _empty_group(word)]
    if mistakes:
        raise ConfigError(mistakes)
    return flags, typed


def _respell(word: str) -> str:
    """`rollout.precision=NAME` and friends as the group override that they mean."""
    key, equals, value = word.partition("=")
    mount = key.removeprefix("precision@")
    if mount in MOUNTS and equals:
        if mount != key and value in ("null", "same"):
            return f"{mount}={value}"
        if mount == key and all(one in choices("precision") for one in value.split(",")):
            return f"precision@{mount}={value}"
    if word == "experiment=null":
        return "experiment=[]"
    return word


def _empty_group(word: str) -> Iterator[Mistake]:
    """`model=null`, `~model`: a group that a run needs is not emptied."""
    key, equals, value = word.partition("=")
    group = key.removeprefix("~")
    if group in groups() and group not in MAY_BE_EMPTY and (key.startswith("~") or (equals and value in ("null", ""))):
        yield Mistake(group, f"{word} leaves a run without {group}; choose one of {', '.join(choices(group))}")


def _is_key(name: str) -> bool:
    return "." in name or name in groups() or name in Experiment.model_fields


# -- conf/ as data ----------------------------------------------------------------------------------------------------
@cache
def groups() -> tuple[str, ...]:
    return tuple(sorted(path.name for path in CONF.iterdir() if path.is_dir()))


@cache
def choices(group: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (CONF / group).glob("*.yaml")))


def read_choice(group: str, name: str) -> dict[str, Any]:
    """conf/GROUP/NAME.yaml as plain data, uncomposed."""
    data: Any = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"), resolve=False)
    return {key: value for key, value in (data or {}).items() if key != "defaults"}


# -- judging ----------------------------------------------------------------------------------------------------------
def _name_precisions(data: dict[str, Any]) -> Iterator[Mistake]:
    """Replace a bare name at rollout.precision or reference.precision by what it names, in place."""
    for mount in MOUNTS:
        part, key = mount.split(".")
        holder = data.get(part)
        if not isinstance(holder, dict):
            continue
        given = holder.get(key)
        if given == "same" or (given is None and part == "reference" and key in holder):
            holder[key] = None if part == "rollout" else data.get("precision")
        elif isinstance(given, str):
            if given in choices("precision"):
                holder[key] = read_choice("precision", given)
                continue
            yield Mistake(mount, f"no precision is called {given!r}{_meant(given, choices('precision'))}; there are {', '.join(choices('precision'))}, same")
            holder[key] = data.get("precision")


def contradictions(precision: Precision, shell: Mapping[str, str]) -> Iterator[Mistake]:
    """Variables in the shell that change numerics and say something else than the config."""
    derived = precision.environment()
    for name in sorted({name for other in _named_precisions() for name in other.environment()} | set(derived)):
        if name not in shell or shell[name] == derived.get(name):
            continue
        says = f"precision {precision.name} derives {derived[name]}" if name in derived else f"precision {precision.name} leaves it unset"
        ways = [f"unset {name}", *_settings_for(precision, name, shell[name])]
        yield Mistake(name, f"{shell[name]!r} in your shell, but {says}; the config alone decides: {' or type '.join(ways[:2])}")


@cache
def _named_precisions() -> tuple[Precision, ...]:
    return tuple(Precision.model_validate(read_choice("precision", name)) for name in choices("precision"))


def _settings_for(precision: Precision, variable: str, value: str) -> Iterator[str]:
    """Overrides under which the config would derive `variable=value`."""
    for base, prefix in ((precision, ""), *((other, f"precision={other.name} ") for other in _named_precisions())):
        if base.environment().get(variable) == value:
            yield prefix.strip()
        for field in type(base).model_fields:
            for option in (value, int(value) if value.isdigit() else value, *_words(type(base).model_fields[field].annotation)):
                with contextlib.suppress(ValidationError):
                    if type(base).model_validate({**base.dump(), field: option}).environment().get(variable) == value:
                        yield f"{prefix}precision.{field}={option}"


def _words(annotation: Any) -> list[str]:
    return [word for word in getattr(annotation, "__args__", ()) if isinstance(word, str)]


def _no_layout(exp: Experiment) -> Iterator[Mistake]:
    """A production trainer needs nodes and parallel sizes; say which recipe is nearest."""
    if not exp.trainer.reads_layout or exp.model.parallel != Parallel():
        return
    wanted = f"{exp.model.name}_{exp.precision.name}"
    if wanted in choices("layout"):
        return
    same_model = [name for name in choices("layout") if name.startswith(f"{exp.model.name}_")]
    near = same_model[0] if same_model else nearest(wanted, choices("layout"), cutoff=0.0)
    pair = next((f"model={m} precision={p}" for m in choices("model") for p in choices("precision") if f"{m}_{p}" == near), None)
    yield Mistake(
        "model.parallel",
        f"model={exp.model.name} precision={exp.precision.name} has no layout (conf/layout/{wanted}.yaml); "
        f"the nearest that has one is {pair}; or say nodes and sizes yourself, e.g. model.parallel.tp=2, or type scale=laptop",
    )


# -- what Hydra says, in the user's words -----------------------------------------------------------------------------
def every_mistake(error: Exception, flags: Sequence[str], typed: Sequence[str]) -> list[Mistake]:
    """The mistake that stopped Hydra, then, without the override that caused it, all others that can be found."""
    name, directory = _option(flags, "-cn", "--config-name") or "config", _option(flags, "-cd", "--config-dir")
    sweep = "-m" in flags or "--multirun" in flags
    left = list(typed)
    mistakes: list[Mistake] = []
    while True:
        mistake, culprit = explain(error, left, name, directory)
        mistakes.append(mistake)
        if culprit is None:
            return mistakes
        left.remove(culprit)
        if sweep:
            left = [word for word in left if not _sweeps(word)]
        try:
            judge(compose(left, name, directory))
            return mistakes
        except ConfigError as refused:
            return mistakes + refused.mistakes
        except HYDRA_SAYS as next_error:
            error = next_error


def explain(error: Exception, typed: Sequence[str], name: str = "config", directory: str | None = None) -> tuple[Mistake, str | None]:
    """(what is wrong, the override that is to blame or None)."""
    text = str(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return Mistake(mark.name.strip('"'), f"line {mark.line + 1}: not YAML: {error.problem}"), None
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override), error.override if error.override in typed else None
    if isinstance(error, MissingConfigException):
        return _no_such_file(error, typed, name, directory)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    for pattern, tell in _TELLERS:
        if found := re.search(pattern, text):
            culprit = _blame(found[1], typed)
            return tell(found[1], culprit or "", cause), culprit
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return Mistake(str(error.full_key), text.splitlines()[0]), _blame(str(error.full_key), typed)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not re.search(r"(^|\s)\+", line)]
    return Mistake("", lines[0] if lines else type(error).__name__), None


def _unknown_key(key: str, word: str, cause: Any) -> Mistake:
    value = word.partition("=")[2]
    if "@" in key:
        return _unknown_group(key.split("@")[0], word, cause)
    if elsewhere := _choices_with(key):
        group, names = elsewhere
        return Mistake(key, f"this run's {group} has no such key ({word}); it comes with {' or '.join(f'{group}={n}' for n in names)}")
    known = _known_keys(cause)
    siblings = [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]]
    same_leaf = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = nearest(key, siblings) or (same_leaf[0] if same_leaf else None) or nearest(key, known)
    if near:
        return Mistake(key, f"unknown key -- did you mean {near}={value}?")
    owner = key.rpartition(".")[0]
    inside = [k for k in known if k.startswith(f"{owner}.")] if owner else [k for k in known if "." not in k]
    listed = ", ".join(inside) if inside else "--help lists the keys that people change first, --cfg job all of them"
    return Mistake(key, f"unknown key ({word}); known here: {listed}")


def _unknown_group(group: str, word: str, cause: Any) -> Mistake:
    near = nearest(group, groups())
    if group in groups():
        mounts = " or ".join(f"precision@{mount}" for mount in MOUNTS)
        return Mistake(word.partition("=")[0] or group, f"{word}: nothing is mounted there; a precision is chosen by precision, {mounts}")
    return Mistake(group, f"unknown group ({word}){_meant(group, groups())}; groups are {', '.join(groups())}" if not near else f"unknown group ({word}) -- did you mean {word.replace(group, near, 1)}?")


def _already(key: str, word: str, cause: Any) -> Mistake:
    return Mistake(key, f"is a key already; type {word.lstrip('+')}")


def _several(key: str, word: str, cause: Any) -> Mistake:
    value = word.partition("=")[2]
    return Mistake(key, f"{value} are several values: put -m in front to run one job each, or type {key}=[{value}] for a list")


def _not_there(key: str, word: str, cause: Any) -> Mistake:
    known = [*groups(), *_known_keys(cause)]
    return Mistake(key, f"{word} removes a key that is not there{_meant(key, known)}")


def _group_word(kind: str, word: str, cause: Any) -> Mistake:
    key, _, value = word.partition("=")
    group = key.partition("@")[0]
    if group not in groups():
        return Mistake(word, "no key stands before '='; write key=value")
    return Mistake(key, f"{value} is no name of a choice; choose one of {', '.join(choices(group))}")


_TELLERS: tuple[tuple[str, Callable[[str, str, Any], Mistake]], ...] = (
    (r"Could not override '([^']*)'", _unknown_key),
    (r"An item is already at '([^']*)'", _already),
    (r"Ambiguous value for argument '([^'=]*)=", _several),
    (r"but config group '([^']*)' does not exist", _unknown_group),
    (r"Could not delete from config\. '([^']*)'", _not_there),
    (r"Could not delete\. No match for '([^']*)'", _not_there),
    (r"(Config group override must be)", _group_word),
)


def _unreadable(word: str) -> Mistake:
    key, equals, _ = word.partition("=")
    if not equals:
        near = nearest(key, [*groups(), *Experiment.model_fields])
        return Mistake(key, f"has no value; type {near or key}=VALUE")
    return Mistake(key or word, f"{word} cannot be read; quote a value with special characters: '{key}=\"...\"', close every bracket")


def _no_such_file(error: MissingConfigException, typed: Sequence[str], name: str, directory: str | None) -> tuple[Mistake, str | None]:
    missing = error.missing_cfg_file or ""
    group, _, choice = missing.rpartition("/")
    if not group:
        folders = [Path(directory)] if directory else []
        there = sorted(path.stem for folder in [*folders, CONF] for path in folder.glob("*.yaml"))
        hint = "" if directory else "; sweeps need --config-dir sweeps in front"
        return Mistake("--config-name", f"there is no {missing}.yaml{_meant(missing, there)}; there are {', '.join(there)}{hint}"), None
    options = error.options or choices(group)
    culprit = next((w for w in typed if re.fullmatch(rf"\+*{re.escape(group)}(@[^=]*)?=.*", w) and choice in w.partition("=")[2].split(",")), None)
    key = culprit.partition("=")[0].lstrip("+") if culprit else group
    return Mistake(key, f"there is no {choice!r}{_meant(choice, options)}; there are {', '.join(options)}"), culprit


def _choices_with(key: str) -> tuple[str, list[str]] | None:
    """(group, the choices of it that have this key), for a key of a group that another choice would bring."""
    for place in (*MOUNTS, *groups()):
        if not key.startswith(f"{place}."):
            continue
        group = "precision" if place in MOUNTS else place
        path = key[len(place) + 1 :]
        names = [name for name in choices(group) if _holds(read_choice(group, name), path)]
        if names:
            return (place if place in MOUNTS else group), names
    return None


def _holds(data: Any, path: str) -> bool:
    for part in path.split("."):
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True


def _known_keys(cause: Any) -> list[str]:
    """Every dotted key of the composed config (the one that Hydra was overriding, else the default one)."""
    node = getattr(cause, "parent_node", None)
    root = node._get_root() if node is not None else compose()
    data: Any = OmegaConf.to_container(root, resolve=False)
    return [key for key in _flatten(data) if not key.startswith("hydra")]


def _flatten(data: Any, at: str = "") -> Iterator[str]:
    for key, value in data.items():
        if key != "_target_":
            yield f"{at}{key}"
            if isinstance(value, dict):
                yield from _flatten(value, f"{at}{key}.")


def _blame(key: str, typed: Sequence[str]) -> str | None:
    """The override that sets this key; the last one wins, as in Hydra."""
    if key == "Config group override must be":
        return next((w for w in typed if w.startswith("=") or (w.partition("=")[0].partition("@")[0] in groups() and not _is_name(w.partition("=")[2]))), None)
    exact = [word for word in typed if word.partition("=")[0].lstrip("+~") == key]
    under = [word for word in typed if word.partition("=")[0].lstrip("+~").partition("@")[0] == key]
    return (exact or under or [None])[-1]


def _is_name(value: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z_][\w/]*", value)) and value not in ("null", "true", "false")


def _meant(word: str, words: Iterable[str]) -> str:
    near = nearest(word, words)
    return f" -- did you mean {near!r}?" if near else ""


def _sweeps(word: str) -> bool:
    try:
        return OverridesParser.create().parse_override(word).is_sweep_override()
    except OverrideParseException:
        return False


def _option(flags: Sequence[str], *names: str) -> str | None:
    for at, flag in enumerate(flags):
        if flag in names and at + 1 < len(flags):
            return flags[at + 1]
        for name in names:
            if flag.startswith(f"{name}="):
                return flag.partition("=")[2]
    return None

