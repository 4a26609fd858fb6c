"""The errors that lpexp raises on purpose. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple


class Mistake(NamedTuple):
    """One thing a person wrote that cannot be right: the key, and a sentence with value, rule and way out."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class ConfigError(Exception):
    """What a person wrote (config, file, hardware wish) is refused; exit code 2, no traceback.

    Carries every mistake found, so that a person mends them all at once.
    """

    def __init__(self, mistakes: Iterable[Mistake] | str, title: str = "config has mistakes:"):
        if isinstance(mistakes, str):
            mistakes = [Mistake("", mistakes)]
        self.mistakes = list(dict.fromkeys(Mistake(*mistake) for mistake in mistakes))
        self.title = title
        super().__init__(str(self))

    def __reduce__(self) -> tuple:
        return type(self), ([tuple(mistake) for mistake in self.mistakes], self.title)

    def __str__(self) -> str:
        if len(self.mistakes) == 1 and not self.mistakes[0].key:
            return self.mistakes[0].message
        return "\n".join([self.title, *(f"  {m}" for m in self.mistakes)])


class RunError(Exception):
    """A run failed for a reason that we can name (a dead trainer rank, a failed check); exit code 1."""


class EngineLost(RunError):
    """A rollout engine died, hangs or answers garbage. `finished`: the groups that it had completed by then."""

    def __init__(self, reason: str, finished: Iterable[Any] = ()):
        super().__init__(reason)
        self.reason, self.finished = reason, list(finished)

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, self.finished)


class NonFiniteWeightError(RunError):
    """A weight holds NaN or infinity: nothing may be quantised, shipped or saved from it."""

    def __init__(self, name: str, index: tuple[int, ...], value: float, count: int):
        super().__init__(f"{name}: {count} non-finite value(s), the first is {value} at {list(index)}")
        self.name, self.index, self.value, self.count = name, index, value, count

    def __reduce__(self) -> tuple:
        return type(self), (self.name, self.index, self.value, self.count)


class Stopped(BaseException):
    """A signal asked the run to stop; `signal` is its number, the exit code is 128 + signal."""

    def __init__(self, signal: int, message: str = ""):
        super().__init__(message or f"stopped by signal {signal}")
        self.signal = signal
