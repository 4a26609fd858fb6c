"""`lpexp explain KEY ... [KEY=VALUE ...]`: what a logged key or a config key means, its unit, band, values and default.

A logged key (with a slash) is told by the metric dictionary; a config key (with dots) by fields.py, its class and
conf/. Who set it is found by composing the config with the overrides, or with those of a run (--run); a key that only
some choice of a group has is shown with that choice. A part of a key lists what is under it.
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

import yaml
from omegaconf import OmegaConf
from pydantic.fields import FieldInfo

from lpexp import metric
from lpexp.config import TARGET, Spec, nearest, resolve
from lpexp.errors import ConfigError
from lpexp.experiment import Experiment
from lpexp.fields import FIELDS
from lpexp.frontend import tidy
from lpexp.groups import CONF, MOUNTS, choices, chosen, compose, groups, read_choice, said_by

MEANS = {
    "T": "mean over the response tokens of the global batch",
    "S": "mean over its sequences",
    "X": "an extreme",
    "Q": "a quantile",
    "N": "a count",
    "F": "a fraction",
    "-": "one number a step",
}
FROM_THE_ROOT = ("scale", "experiment", "layout", "model")  # groups whose files set other groups' keys; the first wins


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="+", metavar="KEY", help="mismatch/kl_k3, precision.group_size; KEY=VALUE sets")
    parser.add_argument("--run", dest="run_dir", type=Path, metavar="DIR", help="as in this run's config")


def main(args: argparse.Namespace) -> int:
    keys = [word for word in args.words if "=" not in word]
    if not keys:
        raise ConfigError("name a key to explain: mismatch/kl_k3, or precision.group_size")
    typed = tidy([word for word in args.words if "=" in word])[1]
    print("\n\n".join(text for key in keys for text in explain(key, typed, args.run_dir)))
    return 0


def explain(key: str, typed: Sequence[str] = (), run: Path | None = None) -> Iterator[str]:
    """What is known of a key, and a line for each key under it. ConfigError for an unknown one, with the nearest."""
    below = [one.key for one in metric.METRICS if one.key.startswith(f"{key.rstrip('/')}/")]
    if found := metric.find(key):
        yield _metric(key, found)
    elif key in every_key():
        yield _field(key, typed, run)
        below = [one for one in FIELDS if one.startswith(f"{key}.") and one in every_key()]
    elif not below:
        near = nearest(key, [*(one.key for one in metric.METRICS), *every_key()])
        raise ConfigError(f"{key}: neither a logged nor a config key{f' -- did you mean {near}?' if near else ''}")
    if below:
        told = {one.key: f"{one.text} ({one.unit})" for one in metric.METRICS} | FIELDS
        yield "\n".join(f"  {one:<46} {told[one]}" for one in below)


def _block(title: str, rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join([title, *(f"  {name:<9} {text}" for name, text in rows)])


# -- logged keys ------------------------------------------------------------------------------------------------------
def _metric(key: str, found: metric.Metric) -> str:
    rows = [
        ("meaning", found.text),
        ("formula", found.formula),
        ("unit", "none" if found.unit in ("1", "-") else found.unit),
        ("over", MEANS[found.aggregation]),
        ("band", metric.band(key) or "none: no value of it is wrong by itself"),
        ("default", "logged whenever there is something to measure; nothing turns it off"),
        ("set by", "this formula alone; no setting changes it"),
    ]
    rows += [("note", "it may differ between two equal runs")] if found.volatile else []
    return _block(key if found.key == key else f"{key}  (an instance of {found.key})", rows)


# -- config keys ------------------------------------------------------------------------------------------------------
def every_key() -> dict[str, FieldInfo]:
    """{dotted key: a field that it names}: of an open union, the fields of every choice in conf/."""
    return dict(_keys(Experiment, ""))


def _keys(kind: type[Spec], at: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in kind.model_fields.items():
        key = f"{at}{field.alias or name}"
        yield key, field
        for part in _specs(field.annotation):
            group = "precision" if key in MOUNTS else key
            union = part.__dict__.get("ABSTRACT", False) and group in groups()
            cards = [read_choice(group, name) for name in choices(group)] if union else []
            for one in dict.fromkeys(resolve(card[TARGET], Spec) for card in cards) if cards else [part]:
                yield from _keys(one, f"{key}.")


def _specs(annotation: Any) -> Iterator[type[Spec]]:
    """The Specs that an annotation names."""
    union = typing.get_origin(annotation) in (typing.Union, UnionType)
    options = typing.get_args(annotation) if union else (annotation,)
    yield from (one for one in options if isinstance(one, type) and issubclass(one, Spec))


def meaning(key: str) -> str | None:
    """The dictionary's line; a mounted precision has those of `precision`."""
    for mount in MOUNTS:
        if key.startswith(f"{mount}."):
            key = key.replace(mount, "precision", 1)
    return FIELDS.get(key)


def _field(key: str, typed: Sequence[str], run: Path | None) -> str:
    recorded = None
    if run is not None:
        if not (run / "config.yaml").exists():
            raise ConfigError(f"--run: {run} is no run directory: it has no config.yaml")
        recorded = yaml.safe_load((run / "config.yaml").read_text())
        typed = [*yaml.safe_load((run / "overrides.yaml").read_text()), *typed]
    defaults = _defaults(key)
    words, by = list(typed), ""
    if recorded is None and _dig(_composed(words), key) is None and (holders := _holders(key)):
        words, by = [*words, *tidy(holders[:1])[1]], " here, since it has the key"
    value = _dig(recorded or _composed(words), key)
    rows = [
        ("meaning", meaning(key) or "not in the dictionary (lpexp/fields.py)"),
        ("values", _values(every_key()[key])),
        ("with", ", ".join(_holders(key))),
        (
            "default",
            ", ".join(f"{shown}{f' ({where})' if len(defaults) > 1 else ''}" for where, shown in defaults.items()),
        ),
        ("now", _show(value)),
        ("set by", _who(key, words, value) + by),
    ]
    return _block(key, [row for row in rows if row[1]])


def _composed(words: Sequence[str]) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(compose(words), resolve=True)
    return found


def _dig(data: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _mounted(key: str) -> tuple[str, str, str]:
    """(group, where it is mounted, the key as that group's files say it)."""
    for mount in MOUNTS:
        if key.startswith(f"{mount}."):
            return "precision", f"precision@{mount}", key.replace(mount, "precision", 1)
    group = key.partition(".")[0]
    return group, group, key


def _holders(key: str) -> list[str]:
    """The choices of its group that have this key, as one types them; none where all have it."""
    group, mount, own = _mounted(key)
    names = [name for name in choices(group) if own in said_by(group, name)] if group in groups() else []
    return [f"{mount.partition('@')[2] or group}={name}" for name in names] if names != list(choices(group)) else []


def _defaults(key: str) -> dict[str, str]:
    """{where it is said: value}: config.yaml, or every choice of its group."""
    group, _, own = _mounted(key)
    said = {f"{group}={name}": said_by(group, name) for name in choices(group)} if group in groups() else {}
    found = {where: _show(keys[own]) for where, keys in said.items() if own in keys}
    base: Any = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"), resolve=False)
    if (value := _dig(base, key)) is not None or not found:
        found = {"conf/config.yaml": _show(value)} | found
    alike: dict[str, list[str]] = {}
    for where, value in found.items():
        alike.setdefault(value, []).append(where)
    return {", ".join(places): value for value, places in alike.items()}


def _who(key: str, words: Sequence[str], value: Any) -> str:
    """Who said it last: a value that was typed, else the file that the choices led to."""
    typed = {word.partition("=")[0].lstrip("+~"): word for word in words}
    for name, word in typed.items():
        if name not in groups() and (key == name or key.startswith(f"{name}.")):
            return f"typed: {word}"
    group, mount, own = _mounted(key)
    made = chosen(words)
    for place, at in (*((one, one) for one in FROM_THE_ROOT), (group, mount)):
        name = made.get(at)
        said = said_by(place, str(name)) if place in groups() and name in choices(place) else {}
        if (key if place in FROM_THE_ROOT else own) in said:
            by = f", chosen by {typed[at]}" if at in typed else ""
            return f"conf/{place}/{name}.yaml{by}"
    return "conf/config.yaml" if value == _dig(_composed(()), key) else "the file that the run was started from"


def _values(field: FieldInfo) -> str:
    """What a field may hold, as far as its type says."""
    options = [field.annotation, *typing.get_args(field.annotation)]
    words = [str(word) for one in options if typing.get_origin(one) is typing.Literal for word in typing.get_args(one)]
    if words:
        return " | ".join(dict.fromkeys(words))
    if bool in options:
        return "true | false"
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [
        f"{said} {getattr(bound, sign):g}"
        for bound in field.metadata
        for sign, said in signs.items()
        if hasattr(bound, sign)
    ]
    kind = next((text for one, text in ((int, "a whole number"), (float, "a number")) if one in options), "")
    return ", ".join([part for part in (kind, *bounds) if part])


def _show(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_show(one)}" for key, one in value.items() if key != TARGET) + "}"
    return f"[{', '.join(map(_show, value))}]" if isinstance(value, list) else str(value)
