"""Typed config: Hydra composes plain YAML, `load` judges it and returns frozen specs.

A `Spec` is a frozen pydantic model that refuses unknown keys. Where a field is declared as a base class, the
YAML's `_target_` names the subclass to build, so every group is an open union without a registry.
A relation between fields is a method under `@rule` that yields `Mistake`s; `load` runs all of them and reports
all mistakes at once. This module knows nothing of reinforcement learning and imports nothing heavy.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from lpexp.errors import ConfigError, Mistake

TARGET = "_target_"
S = TypeVar("S", bound="Spec")
Rule = Callable[[Any], Iterator[Mistake]]


def rule(method: Rule) -> Rule:
    """Mark a method of a Spec as a rule: a generator of the Mistakes it finds, keys relative to that Spec."""
    method.__rule__ = True  # type: ignore[attr-defined]
    return method


class Spec(BaseModel):
    """A frozen, strict piece of config; `_target_` in the data chooses among the subclasses of the declared type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="wrap")
    @classmethod
    def _follow_target(cls, data: Any, inner: Callable[[Any], Any]) -> Any:
        if isinstance(data, Spec):
            if not isinstance(data, cls):
                raise _refused("target", f"needs a kind of {cls.__name__}, got {type(data).__name__}")
            return data
        if not isinstance(data, Mapping):
            raise _refused("group", f"needs a group of keys ({cls.__name__}), got {data!r}")
        target = data.get(TARGET)
        data = {key: value for key, value in data.items() if key != TARGET}
        if target is not None and target != _path(cls):
            return resolve(target, cls).model_validate(data)
        if target is None and cls.__dict__.get("ABSTRACT", False):
            raise _refused("target", f"does not say which {cls.__name__} it is ({TARGET} is missing)")
        spec = inner(data)
        mistakes = list(_broken_rules(spec, partial=False))
        if mistakes:
            raise PydanticCustomError("rules", "broken rules", {"mistakes": [tuple(m) for m in mistakes]})
        return spec

    def dump(self) -> dict[str, Any]:
        """This spec as plain data with every default filled in and `_target_` where the class was chosen."""
        return {TARGET: _path(type(self))} | {_key(type(self), name): _plain(value) for name, value in self}


def load(data: Mapping[str, Any], kind: type[S]) -> S:
    """Judge plain data and return the spec, or raise ConfigError with every mistake (one line each)."""
    try:
        return kind.model_validate(dict(data))
    except ValidationError as error:
        mistakes = [mistake for line in error.errors() for mistake in _mistakes(line, kind, data)]
    # Relations among the parts that are valid by themselves are judged too, so that one reading shows everything.
    parts: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        alone = create_model(kind.__name__, __base__=Spec, **{name: (field.annotation, field)})  # type: ignore[call-overload]
        try:
            parts[name] = getattr(alone.model_validate({name: data[name]} if name in data else {}), name)
        except ValidationError:
            continue
    known = {mistake.key for mistake in mistakes}
    for mistake in _broken_rules(kind.model_construct(_fields_set=set(), **parts), partial=True):
        if mistake.key not in known:
            mistakes.append(mistake)
    raise ConfigError(mistakes)


def resolve(target: Any, kind: type[Spec]) -> type[Spec]:
    """The class behind a `_target_`; a PydanticCustomError (reported as a mistake) when it is no kind of `kind`."""
    module, _, name = str(target).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        why = "cannot be imported; name a class by its full path"
        raise _refused("target", f"{TARGET} {target!r} {why}") from None
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise _refused("target", f"{TARGET} {target!r} is no kind of {kind.__name__}; name one")
    return found


def _refused(kind: str, text: str) -> PydanticCustomError:
    return PydanticCustomError(kind, "{text}", {"text": text})  # type: ignore[arg-type]


def nearest(word: str, words: Any, cutoff: float = 0.6) -> str | None:
    """The word a person probably meant, or None."""
    words = [str(one) for one in words]
    found = difflib.get_close_matches(word, words, n=1, cutoff=cutoff)
    longer = [one for one in words if len(word) > 2 and one.startswith(word)]
    return found[0] if found else longer[0] if len(longer) == 1 else None


def _shown(value: Any) -> str:
    """A value as YAML spells it."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _key(kind: type[Spec], name: str) -> str:
    """How the data spells a field: its alias where the name is taken by a method."""
    return kind.model_fields[name].alias or name


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.dump()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _broken_rules(spec: Any, partial: bool) -> Iterator[Mistake]:
    for name in dir(type(spec)):
        method: Any = getattr(type(spec), name, None)
        if getattr(method, "__rule__", False):
            try:
                yield from method(spec)
            except AttributeError:
                if not partial:  # in a partial spec a rule that needs an invalid part cannot be judged
                    raise


def _mistakes(line: Any, kind: type[Spec], data: Any) -> Iterator[Mistake]:
    """One pydantic error line as Mistakes in the user's words."""
    where = [str(part) for part in line["loc"]]
    key = ".".join(where)
    if line["type"] == "rules":
        for relative, message in line["ctx"]["mistakes"]:
            yield Mistake(".".join([*where, relative]) if relative else key, message)
        return
    given = line["input"]
    if line["type"] == "extra_forbidden":
        owner = _class_at(kind, data, where[:-1])
        keys = sorted(_key(owner, name) for name in owner.model_fields) if owner else []
        near, known = nearest(where[-1], keys), ", ".join(keys)
        hint = f" -- did you mean {near!r}?" if near else f"; known here: {known}"
        yield Mistake(key, f"unknown key, given {_shown(given)}{hint}")
    elif line["type"] == "missing":
        yield Mistake(key, f"is missing and has no default; set {key}=VALUE")
    elif line["type"] in ("target", "group"):
        yield Mistake(key, line["msg"])
    else:
        message = line["msg"].replace("Input should be", "should be").replace("valid tuple", "list")
        yield Mistake(key, f"{message}, got {_shown(given)}")


def _class_at(kind: type[Spec], data: Any, where: list[str]) -> type[Spec] | None:
    """The Spec class that owns the place `where` in the data, following `_target_`."""
    found: Any = kind
    for part in where:
        data = data.get(part) if isinstance(data, Mapping) else None
        if isinstance(data, Mapping) and TARGET in data:
            try:
                found = resolve(data[TARGET], Spec)
            except PydanticCustomError:
                return None
            continue
        field = found.model_fields.get(part) if isinstance(found, type) and issubclass(found, Spec) else None
        options = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        found = next((option for option in options if isinstance(option, type) and issubclass(option, Spec)), None)
    return found if isinstance(found, type) and issubclass(found, Spec) else None
