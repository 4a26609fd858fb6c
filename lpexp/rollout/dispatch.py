"""The dispatcher: a rollout made of engines, as the loop sees it. It splits prompts over them, waits, and heals.

A backend brings the engine: an object with `contract`, `load` and `sample`, in an actor or in this process.
Engine i of n has the prompts i, i + n, i + 2n, ...: all samples of a prompt come from one engine. One that is lost is
replaced; its successor is given the weights that were served and asked for what is still owed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lpexp.data import Group, Prompt, SyncReport
from lpexp.errors import EngineLost, RunError
from lpexp.precision import digest
from lpexp.rollout import Sampling

if TYPE_CHECKING:
    from lpexp.cluster import Future, Handle, Workers
    from lpexp.experiment import Experiment
    from lpexp.precision import Parts

HEAL_ATTEMPTS = 3
Call = tuple[Any, ...]  # a method of an engine and its arguments


class Dispatcher:
    """`count` engines; a backend says how one is made."""

    turns = False
    canary: Sequence[Sequence[int]] = ()
    canary_limit = 0.0  # nat: mean |difference| of log-probabilities over the canary's tokens

    def __init__(self, exp: Experiment, workers: Workers, count: int):
        self.exp, self.workers = exp, workers
        self.shards: Sequence[Any] = ()
        self.version = -1
        self.engines = [self.spawn(i) for i in range(count)]

    def spawn(self, index: int) -> Handle:
        raise NotImplementedError

    def contract(self) -> dict[str, str]:
        contracts = [future.result() for future in [engine.call("contract") for engine in self.engines]]
        for other in contracts[1:]:
            if other != contracts[0]:
                raise RunError(f"engines disagree on their contract: {digest(contracts[0])} and {digest(other)}")
        return contracts[0]

    def take(self, rank: Handle, version: int) -> tuple[Any, Future]:
        return self.workers.share(rank, "served", version)

    def again(self, served: tuple[Sequence[Any], int]) -> tuple[Sequence[Any], int]:
        """The same shards and version for an engine that comes later."""
        return served

    def load(self, shards: Sequence[Any], version: int) -> Loading:
        self.shards, self.version = shards, version
        return Loading(self, loading(shards, version))

    def open(self, directory: str) -> SyncReport:
        """Every engine reads the directory by itself; what they hold is compared with what lies on disk."""
        from lpexp.precision.wire import checksum, quantized_share

        begin, model = time.perf_counter(), self.exp.model.sized()
        parts = stored_parts(directory)
        sent, size = checksum(parts), sum(part.nbytes for one in parts.values() for part in one.values())
        del parts
        held, seconds = self.load([directory], 0).result()
        share = quantized_share(model.params(), self.exp.wire, model.moe is not None)
        spent = seconds | {"sync": time.perf_counter() - begin}
        return SyncReport(0, size, spent, sent, tuple(held), share, {})

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> Pending:
        return Pending(self, prompts, sampling, step)

    def owed(
        self,
        index: int,
        engine: Handle,
        future: Future,
        call: Call,
        served: tuple[Sequence[Any], int] | None = None,
        rest: Callable[[Call, EngineLost], Call] = lambda call, lost: call,
    ) -> Any:
        """What an engine owes. If it was lost, its successor gets the weights `served` at the time and the same call,
        or the `rest` of it."""
        for attempt in range(1, HEAL_ATTEMPTS + 1):
            lost = loss(future)
            if lost is None:
                return future.result()
            self.workers.event("engine_healed", engine=index, attempt=attempt, owed=call[0], reason=str(lost))
            if self.engines[index] is engine:  # else an earlier debt has brought a successor already
                engine.stop()
                self.engines[index] = self.spawn(index)
            engine, call = self.engines[index], rest(call, lost)
            if served:
                engine.call(*loading(*self.again(served)))
            elif call[0] == "load":
                call = loading(*self.again(((call[1], *call[3:]), call[2])))
            future = engine.call(*call)
            if served and served[1] != self.version:  # its next call must find the newest weights again
                engine.call(*loading(*self.again((self.shards, self.version))))
        if lost := loss(future):
            raise RunError(f"rollout engine {index} was lost {HEAL_ATTEMPTS + 1} times in a row: {lost}")
        return future.result()

    def close(self) -> None:
        for engine in self.engines:
            engine.stop()


class Loading:
    """Engines taking new weights; what they are asked next, they do with these."""

    def __init__(self, rollout: Dispatcher, call: Call):
        self.rollout, self.call = rollout, call
        self.futures = [(engine, engine.call(*call)) for engine in rollout.engines]
        self.canaries: list[np.ndarray] = []  # of each engine, once it has loaded

    def result(self) -> tuple[list[str], dict[str, float]]:
        told = [self.rollout.owed(i, engine, future, self.call) for i, (engine, future) in enumerate(self.futures)]
        names = dict.fromkeys(name for _, seconds, _ in told for name in seconds)
        self.canaries = [canary for _, _, canary in told]
        return [held for held, _, _ in told], {name: max(seconds[name] for _, seconds, _ in told) for name in names}

    def gap(self, canary_T: np.ndarray) -> float:
        gaps, limit = [float(np.abs(one - canary_T).mean()) for one in self.canaries], self.rollout.canary_limit
        for engine, gap in enumerate(gaps):
            if not gap <= limit:
                raise RunError(
                    f"canary: engine {engine} and the trainer differ by {gap:.2g} nat a token, the limit is "
                    f"{limit:.2g}: it computes something else than was sent"
                )
        return max(gaps)


class Pending:
    """Groups being generated."""

    def __init__(self, rollout: Dispatcher, prompts: Sequence[Prompt], sampling: Sampling, step: int):
        self.rollout, self.prompts = rollout, prompts
        n = len(rollout.engines)
        self.calls: list[Call] = [("sample", list(prompts[i::n]), sampling, step) for i in range(n)]
        self.served, self.seconds = (rollout.shards, rollout.version), 0.0
        self.engines = list(rollout.engines)
        self.futures = [engine.call(*call) for engine, call in zip(self.engines, self.calls, strict=True)]
        self.kept: dict[int, Group] = {}  # prompt id -> what a lost engine had finished

    def result(self) -> list[Group]:
        found = self.kept
        for index, (engine, future, call) in enumerate(zip(self.engines, self.futures, self.calls, strict=True)):
            groups, seconds = self.rollout.owed(index, engine, future, call, self.served, self._rest)
            found |= {group.prompt.id: group for group in groups}
            self.seconds = max(self.seconds, seconds)
        return [found[prompt.id] for prompt in self.prompts]

    def _rest(self, call: Call, lost: EngineLost) -> Call:
        self.kept |= {group.prompt.id: group for group in lost.finished}
        method, prompts, *how = call
        return method, [prompt for prompt in prompts if prompt.id not in self.kept], *how


def loading(shards: Sequence[Any], version: int) -> Call:
    """The call that makes an engine serve these shards; each is an argument of its own, passed on unseen."""
    return "load", shards[0], version, *shards[1:]


def stored_parts(directory: str) -> dict[str, Parts]:
    """What a served directory holds: {tensor: parts}, as its quantiser left them."""
    from lpexp.model import hf

    return hf.load(directory)[2]


def loss(future: Future) -> EngineLost | None:
    """Why the engine that owed this is lost; None when it has answered, or failed for a reason of its own."""
    error = future.error()
    cause = getattr(error, "cause", error)  # Ray wraps what an actor raised
    if isinstance(cause, EngineLost):
        return cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return EngineLost(lines[0] if lines else "no reason given") if future.died() else None
