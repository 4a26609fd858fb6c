"""Stopping on purpose: Ctrl-C and SIGTERM ask for the next safe point.

The first signal sets `requested`; the loop stops after the step in hand. When that takes longer than the grace, the
step is dropped (it replays bitwise on resume). A second Ctrl-C leaves at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from lpexp.errors import Stopped

ASKING = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Signal handlers for the time of a run; use as a context manager in the main thread."""

    def __init__(self, grace_s: float):
        self.grace_s = grace_s
        self.requested: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in (*ASKING, signal.SIGALRM):
            self._before[number] = signal.getsignal(number)
        self.install()
        return self

    def install(self) -> None:
        """Take the signals; again after Ray has started, which takes SIGTERM for itself."""
        for number in ASKING:
            signal.signal(number, self._ask)
        signal.signal(signal.SIGALRM, self._drop)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def at_safe_point(self, save: Callable[[], object]) -> None:
        """Between two steps: when a stop was asked for, save and raise Stopped."""
        if self.requested is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            save()
            raise Stopped(self.requested, f"stopped by {_name(self.requested)} after the step in hand")

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.requested is not None:
            print(f"second {_name(number)}: leaving at once", file=sys.stderr, flush=True)
            os._exit(128 + number)
        self.requested = number
        print(
            f"{_name(number)}: stopping after this step (at most {self.grace_s:g} s); once more leaves at once",
            file=sys.stderr,
            flush=True,
        )
        signal.setitimer(signal.ITIMER_REAL, max(self.grace_s, 1e-3))

    def _drop(self, number: int, _: FrameType | None) -> None:
        assert self.requested is not None
        raise Stopped(
            self.requested, f"stopped by {_name(self.requested)}; the step in hand took longer than "
            f"stop_grace_s={self.grace_s:g} and was dropped"
        )  # fmt: skip


def _name(number: int) -> str:
    return signal.Signals(number).name
