"""Environment variables that change numerics: the config derives them, and a shell that says otherwise is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import ValidationError

from lpexp.errors import Mistake
from lpexp.groups import choices, read_choice
from lpexp.precision import Precision


def contradictions(precision: Precision, shell: Mapping[str, str]) -> Iterator[Mistake]:
    """Variables in the shell that say something else than `precision` derives, with the override to type."""
    derived = precision.environment()
    known = {name for one in (precision, *_named()) for name in one.environment()}
    for name in sorted(known & set(shell)):
        if shell[name] == derived.get(name):
            continue
        says = f"derives {derived[name]}" if name in derived else "leaves it unset"
        ways = [f"unset {name}", *_settings(precision, name, shell[name])]
        yield Mistake(
            name,
            f"{shell[name]!r} in your shell, but precision {precision.name} {says}; "
            f"the config alone decides: {' or type '.join(ways[:2])}",
        )


@cache
def _named() -> tuple[Precision, ...]:
    """Every precision of conf/precision/, as its file says."""
    return tuple(Precision.model_validate(read_choice("precision", name)) for name in choices("precision"))


def _settings(precision: Precision, variable: str, value: str) -> Iterator[str]:
    """Overrides under which the config would derive `variable=value`, the smallest change first."""
    for base, typed in ((precision, ""), *((other, f"precision={other.name}") for other in _named())):
        if base.environment().get(variable) == value:
            yield typed
        for field, info in type(base).model_fields.items():
            for option in _options(value, info.annotation):
                with contextlib.suppress(ValidationError):
                    changed = type(base).model_validate({**base.dump(), field: option})
                    if changed.environment().get(variable) == value:
                        yield f"{typed} precision.{field}={option}".strip()


def _options(value: str, annotation: Any) -> list[Any]:
    """What a field could be set to so that it derives `value`: the value itself, or one of the field's words."""
    words = [word for word in getattr(annotation, "__args__", ()) if isinstance(word, str)]
    return [value, *([int(value)] if value.isdigit() else []), *words]
