"""What Hydra says about a mistake, told in the words that were typed: the nearest key, and never the advice to use `+`.

Hydra re-raises with HYDRA_FULL_ERROR; the material (key, config so far, options) is in its exceptions.
Tried with hydra-core 1.3; a message that it does not know is passed on by its first line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lpexp.config import nearest
from lpexp.errors import Mistake
from lpexp.experiment import Experiment
from lpexp.groups import CONF, MOUNTS, choices, choices_with, compose, groups

WRONG_KIND = "Config group override must be"
Told = tuple[Mistake, str | None]  # what is wrong, the override that is to blame


def explain(error: Exception, typed: Sequence[str], directory: str | None = None) -> Told:
    """The mistake behind an exception of Hydra's, and the override to blame (None: a file, or nobody)."""
    text = str(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return Mistake(mark.name.strip('"'), f"line {mark.line + 1} is not YAML: {error.problem}"), None
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override), error.override if error.override in typed else None
    if isinstance(error, MissingConfigException):
        return _no_such_file(error, typed, directory)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    for pattern, tell in _TELLERS:
        if found := re.search(pattern, text):
            culprit = _blame(found[1], typed)
            return tell(found[1], culprit or found[1], cause), culprit
    lines = [line.strip() for line in text.splitlines() if line.strip() and not re.search(r"(^|[\s'])\+", line)]
    key = error.full_key if isinstance(error, OmegaConfBaseException) else None
    return Mistake(str(key or ""), lines[0] if lines else type(error).__name__), _blame(
        str(key), typed
    ) if key else None


def meant(word: str, words: Iterable[str]) -> str:
    """` -- did you mean 'x'?`, or nothing."""
    near = nearest(word, words)
    return f" -- did you mean {near!r}?" if near else ";"


def _unknown_key(key: str, word: str, cause: Any) -> Mistake:
    value = word.partition("=")[2]
    if "@" in key:
        return _unknown_group(key.split("@")[0], word, cause)
    if elsewhere := choices_with(key):
        place, names = elsewhere
        with_it = " or ".join(f"{place}={name}" for name in names)
        return Mistake(key, f"given {value}, but the {place} of this run has no such key; it comes with {with_it}")
    known = _known_keys(cause)
    siblings = [one for one in known if one.rpartition(".")[0] == key.rpartition(".")[0]]
    same_leaf = [one for one in known if one.rpartition(".")[2] == key.rpartition(".")[2]]
    near = nearest(key, siblings, 0.75) or (same_leaf[0] if same_leaf else None) or nearest(key, known)
    if near:
        return Mistake(key, f"unknown key -- did you mean {near}={value}?")
    for group in groups():
        if elsewhere := choices_with(f"{group}.{key}"):
            return Mistake(key, f"unknown key -- did you mean {group}={elsewhere[1][0]} {group}.{key}={value}?")
    owner = key.rpartition(".")[0]
    inside = [one for one in known if one.rpartition(".")[0] == owner]
    return Mistake(key, f"unknown key, given {value}; known here: {', '.join(inside)}")


def _unknown_group(group: str, word: str, cause: Any) -> Mistake:
    key = word.partition("=")[0].lstrip("+")
    if group in groups():
        mounts = " or ".join(f"precision@{mount}" for mount in MOUNTS)
        return Mistake(key, f"nothing is mounted there; a precision is chosen by precision, {mounts}")
    if near := nearest(group, groups()):
        return Mistake(key, f"unknown group -- did you mean {word.lstrip('+').replace(group, near, 1)}?")
    return Mistake(key, f"unknown group; groups are {', '.join(groups())}")


def _already(key: str, word: str, cause: Any) -> Mistake:
    return Mistake(key, f"is a key already, given as {word}; type {word.lstrip('+')}")


def _several(key: str, word: str, cause: Any) -> Mistake:
    value = word.partition("=")[2]
    return Mistake(
        key, f"{value} are several values; put -m in front for one job each, or type {key}=[{value}] for a list"
    )


def _not_there(key: str, word: str, cause: Any) -> Mistake:
    known = [*groups(), *_known_keys(cause)]
    return Mistake(key, f"{word} removes a key that is not there{meant(key, known)}".rstrip(";"))


def _wrong_kind(_: str, word: str, cause: Any) -> Mistake:
    key, _, value = word.partition("=")
    group = key.partition("@")[0]
    if group not in groups():
        return Mistake(word, "no key stands before '='; write key=value")
    return Mistake(key, f"{value} is no name of a choice; choose one of {', '.join(choices(group))}")


def _no_such_folder(path: str, word: str, cause: Any) -> Mistake:
    return Mistake(
        "--config-dir", f"{path} is no directory; the sweeps that come with lpexp are in {CONF.parent / 'sweeps'}"
    )


def _no_such_value(key: str, word: str, cause: Any) -> Mistake:
    return Mistake(key, "its ${...} names a key that the config does not have; --cfg job prints the keys there are")


_TELLERS: tuple[tuple[str, Callable[[str, str, Any], Mistake]], ...] = (
    (r"Could not override '([^']*)'", _unknown_key),
    (r"An item is already at '([^']*)'", _already),
    (r"Ambiguous value for argument '([^'=]*)=", _several),
    (r"but config group '([^']*)' does not exist", _unknown_group),
    (r"Could not delete from config\. '([^']*)'", _not_there),
    (r"Could not delete\. No match for '([^']*)'", _not_there),
    (rf"({WRONG_KIND})", _wrong_kind),
    (r"Multiple values for (.*?)\. To override", _already),
    (r"Additional config directory '([^']*)' not found", _no_such_folder),
    (r"(?s)Interpolation key .* not found.*full_key: (\S+)", _no_such_value),
)


def _unreadable(word: str) -> Mistake:
    key, equals, _ = word.partition("=")
    if not equals:
        near = nearest(key, [*groups(), *Experiment.model_fields])
        return Mistake(key, f"has no value; type {near or key}=VALUE")
    return Mistake(
        key or word, f"{word} cannot be read; close every bracket and quote, or quote the value: '{key}=\"...\"'"
    )


def _no_such_file(error: MissingConfigException, typed: Sequence[str], directory: str | None) -> Told:
    missing = error.missing_cfg_file or ""
    group, _, choice = missing.rpartition("/")
    if not group:
        folders = [Path(directory)] if directory else []
        there = sorted({path.stem for folder in [*folders, CONF] for path in folder.glob("*.yaml")})
        hint = "" if directory else "; sweeps need --config-dir sweeps in front"
        message = f"there is no {missing!r}{meant(missing, there)} there are {', '.join(there)}{hint}"
        return Mistake("--config-name", message), None
    options = list(error.options or choices(group))
    asks = re.compile(rf"\+*{re.escape(group)}(@[^=]*)?=.*")
    culprit = next((w for w in typed if asks.fullmatch(w) and choice in w.partition("=")[2].split(",")), None)
    key = culprit.partition("=")[0].lstrip("+") if culprit else group
    return Mistake(key, f"there is no {choice!r}{meant(choice, options)} there are {', '.join(options)}"), culprit


def _known_keys(cause: Any) -> list[str]:
    """Every dotted key of the composed config (the one that Hydra was overriding, else the default one)."""
    node = getattr(cause, "parent_node", None)
    root = node._get_root() if node is not None else compose()
    data: Any = OmegaConf.to_container(root, resolve=False)
    return [key for key in _flatten(data) if key.partition(".")[0] != "hydra"]


def _flatten(data: Any, at: str = "") -> Iterator[str]:
    for key, value in data.items():
        if key != "_target_":
            yield f"{at}{key}"
            if isinstance(value, dict):
                yield from _flatten(value, f"{at}{key}.")


def _blame(key: str, typed: Sequence[str]) -> str | None:
    """The override that sets this key; the last one wins, as in Hydra."""
    if key == WRONG_KIND:
        return next((word for word in typed if word.startswith("=") or _chooses_no_name(word)), None)
    exact = [word for word in typed if word.partition("=")[0].lstrip("+~") == key]
    under = [word for word in typed if word.partition("=")[0].lstrip("+~").partition("@")[0] == key]
    return (exact or under or [None])[-1]


def _chooses_no_name(word: str) -> bool:
    key, _, value = word.partition("=")
    is_name = re.fullmatch(r"[A-Za-z_][\w/]*", value) and value not in ("null", "true", "false")
    return key.partition("@")[0] in groups() and not is_name
