"""The front end: what a person typed becomes a judged Experiment, and every mistake becomes a line in their words.

`@hydra.main` composes; this module wraps it. Hydra is told to re-raise (HYDRA_FULL_ERROR), its exceptions are read
and told again without the advice to use `+`. Left out: training errors, which keep their traceback.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from lpexp import fetch
from lpexp.config import Spec, load, nearest
from lpexp.errors import ConfigError, Mistake, RunError, Stopped
from lpexp.experiment import Experiment
from lpexp.explain import explain, meant
from lpexp.groups import CONF, MOUNTS, choices, compose, default_choice, groups, read_choice
from lpexp.model import Model, Parallel
from lpexp.model.hf import read_model
from lpexp.model.served import precision_of
from lpexp.precision import Precision
from lpexp.shell import contradictions

__all__ = ["CONF", "compose", "experiment", "guard", "judge", "overrides", "read_choice", "run_begins", "told"]

MAY_BE_EMPTY = ("experiment", "layout", *MOUNTS)
TAKES_VALUE = ("-c", "--cfg", "-p", "--package", "-cn", "--config-name", "-cd", "--config-dir", "-cp", "--config-path")
MAY_TAKE_VALUE = ("-i", "--info", "-sc", "--shell-completion")
# What a directory's config.json says of its model; with the rest it has nothing to do.
SIZES = [key for key in Model.model_fields if key not in ("name", "initializer_range", "parallel", "path", "scale")]
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
    except BrokenPipeError:  # whoever read our output has left (| head): so do we, without a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def run_begins() -> None:
    """From here on errors are the run's, not the config's, and keep their traceback."""
    global _running
    _running = True


def overrides() -> list[str]:
    """What this job was given: typed overrides, and for a job of a sweep its axes."""
    return list(HydraConfig.get().overrides.task)


def judge(cfg: DictConfig | Mapping[str, Any]) -> Experiment:
    """The only door from a composed config to an Experiment; ConfigError with every mistake found."""
    mistakes: list[Mistake] = []
    try:
        if isinstance(cfg, DictConfig):
            cfg = read_directory(cfg, mistakes)
        data: Any = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError([explain(error, ())[0]]) from None
    mistakes += _name_precisions(data)
    _ask_the_checkpoint(data)
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
        mistakes += _misnamed(exp)
    if mistakes:
        raise ConfigError(mistakes)
    assert exp is not None
    return exp


def experiment(*typed: str) -> Experiment:
    """Compose and judge in one go, for Python callers."""
    return judge(compose(tidy(typed)[1]))


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
        name = word.partition("=")[0]
        if word.startswith("--") and name not in _flags():
            bare = word[2:] if "=" in word else f"{name[2:]}=VALUE"
            near = nearest(name, _flags(), 0.8)
            mistakes.append(
                Mistake(name, f"there is no such flag; type {near or f'{bare} (keys are typed without dashes)'}")
            )
            continue
        flags.append(word)
        if rest and (word in TAKES_VALUE or (word in MAY_TAKE_VALUE and not _sets_a_key(rest[0]))):
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
    if equals and key.partition(".options")[0] == "task" and key.removeprefix("task.options")[:1] in ("", "."):
        return f"++{word}"  # an open table: its keys are a data set's own
    if word == "experiment=null":
        return "experiment=[]"
    return word


def _empty_group(word: str) -> Iterator[Mistake]:
    """`model=null`, `~model`: a group that a run needs is not emptied."""
    key, equals, value = word.partition("=")
    group = key.removeprefix("~")
    if (
        group in groups()
        and group not in MAY_BE_EMPTY
        and (key.startswith("~") or (equals and value in ("null", "", "[]")))
    ):
        yield Mistake(group, f"{word} leaves a run without {group}; choose one of {', '.join(choices(group))}")


def _sets_a_key(word: str) -> bool:
    return "=" in word and not word.startswith("install") and not word.startswith("query")


def _flags() -> list[str]:
    """Hydra's own flags."""
    return [flag for action in get_args_parser()._actions for flag in action.option_strings]


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
            same_by_default = part == "rollout" and not holder.get("checkpoint")
            holder[key] = None if same_by_default else data.get("precision")
        elif isinstance(given, str):
            if given in choices("precision"):
                holder[key] = read_choice("precision", given)
                continue
            names = choices("precision")
            yield Mistake(mount, f"there is no {given!r}{meant(given, names)} there are {', '.join(names)}, same")
            holder[key] = data.get("precision")


def _ask_the_checkpoint(data: dict[str, Any]) -> None:
    """A served directory names the rollout's precision where nobody typed one, in place.

    Not where it has the trainer's own format: that is the same precision, or its fields differ, which a rule refuses.
    """
    rollout = data.get("rollout")
    if not isinstance(rollout, dict) or rollout.get("precision") is not None:
        return
    if isinstance(rollout.get("checkpoint"), str):
        with contextlib.suppress(ConfigError, ValidationError):  # told by the rules of Experiment
            found = precision_of(rollout["checkpoint"], Model.model_validate(data.get("model")).sized())
            if type(found) is not type(Precision.model_validate(data.get("precision"))):
                rollout["precision"] = found.dump()


def read_directory(cfg: DictConfig, mistakes: list[Mistake]) -> DictConfig:
    """The config with `model` as the directory at model.path says; what contradicts it is added to the mistakes.

    The default card yields to the directory. A card that was chosen, and a size that was typed, must agree with it.
    """
    given: Any = OmegaConf.to_container(cfg.get("model") or OmegaConf.create(), resolve=True)
    path, name = given.get("path"), given.get("name")
    if not isinstance(path, str):
        return cfg
    try:
        if given.get("scale") == "laptop" and not Path(path).is_dir():
            return cfg  # a twin starts at random
        directory = fetch.find(path)
        if directory is None or not (directory / "config.json").is_file():
            return cfg  # told by the plan, and by Experiment
        found = read_model(directory)
    except ConfigError as error:
        mistakes += [Mistake("model.path", mistake.message) for mistake in error.mistakes]
        return cfg
    said = {key: _plain(getattr(found, key)) for key in SIZES}
    changed = {key: value for key, value in said.items() if key in given and _plain(given[key]) != value}
    update: dict[str, Any] = {"path": str(directory)}
    at = directory / "config.json"
    if changed and name == default_choice("model"):
        card: Any = OmegaConf.merge(OmegaConf.load(CONF / "config.yaml").model, read_choice("model", name)["model"])
        for key, value in changed.items():
            if _plain(given[key]) != _plain(card.get(key)):
                mistakes.append(Mistake(f"model.{key}", f"{given[key]}, but {at} says {value}; leave it out"))
        update |= said | {"name": path.rstrip("/").rpartition("/")[2], "initializer_range": found.initializer_range}
    elif changed:
        first, *more = (f"{key} {value} instead of {_plain(given[key])}" for key, value in changed.items())
        also = f" and {len(more)} more" if more else ""
        way = f"leave model={name} out to take the sizes from the directory"
        mistakes.append(Mistake("model.path", f"{path} is no {name}: {at} says {first}{also}; {way}"))
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    for key, value in update.items():
        OmegaConf.update(cfg, f"model.{key}", value, merge=False)
    return cfg


def _plain(value: Any) -> Any:
    """A value of the config, or of a Spec, for comparing: nested groups without their class and their nulls."""
    if isinstance(value, Spec):
        value = dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items() if one is not None}
    return value


def _misnamed(exp: Experiment) -> Iterator[Mistake]:
    """A card's name on another card's arithmetic would print numbers under the wrong word."""
    held = {"precision": exp.precision, "rollout.precision": exp.rollout.precision}
    for key, precision in (held | {"reference.precision": exp.reference.precision}).items():
        if precision is None or precision.name not in choices("precision"):
            continue
        target = read_choice("precision", precision.name)["_target_"]
        if precision.dump()["_target_"] != target:
            kind = type(precision).__name__
            message = f"{precision.name!r} is the name of another precision than {kind}, which would compute"
            yield Mistake(f"{key}.name", f"{message}; choose the card: {key}={precision.name}")


def _no_layout(exp: Experiment) -> Iterator[Mistake]:
    """A production trainer on GPUs needs nodes and parallel sizes; say which recipe is nearest."""
    if not exp.trainer.reads_layout or not exp.cluster.gpus_per_node:
        return
    if exp.model.parallel != Parallel.model_validate({}):
        return
    wanted = f"{exp.model.name}_{exp.precision.name}"
    if wanted in choices("layout"):
        return
    same_model = [name for name in choices("layout") if name.startswith(f"{exp.model.name}_")]
    near = same_model[0] if same_model else nearest(wanted, choices("layout"), cutoff=0.0)
    pairs = [(model, precision) for model in choices("model") for precision in choices("precision")]
    pair = next(f"model={model} precision={precision}" for model, precision in pairs if f"{model}_{precision}" == near)
    yield Mistake(
        "model.parallel",
        f"model={exp.model.name} precision={exp.precision.name} has no layout (conf/layout/{wanted}.yaml); "
        f"the nearest that has one is {pair}; or say nodes and sizes yourself, e.g. model.parallel.tp=2, "
        "or type scale=laptop",
    )


# -- what Hydra says, in the user's words -----------------------------------------------------------------------------
def every_mistake(error: Exception, flags: Sequence[str], typed: Sequence[str]) -> list[Mistake]:
    """The mistake that stopped Hydra, then, without the override that caused it, all others that can be found."""
    name, directory = _option(flags, "-cn", "--config-name") or "config", _option(flags, "-cd", "--config-dir")
    sweep = "-m" in flags or "--multirun" in flags
    left = list(typed)
    mistakes: list[Mistake] = []
    while True:
        mistake, culprit = explain(error, left, directory)
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
