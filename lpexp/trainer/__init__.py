"""The agreement on a trainer: restore, step, publish, save. The loop knows nothing else of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lpexp.config import Spec
from lpexp.data import Batch, LearnReport, SyncReport
from lpexp.errors import Mistake

if TYPE_CHECKING:
    from lpexp.cluster import Workers
    from lpexp.experiment import Experiment
    from lpexp.rollout import Rollout


class Learning(Protocol):
    """A batch being learned from."""

    def result(self) -> LearnReport: ...


class Publishing(Protocol):
    """A weight update under way: the rollout may be asked for samples of it already."""

    def result(self) -> SyncReport:
        """Wait until every engine holds the weights; RunError where one holds others."""
        ...


class Waited(Protocol):
    def result(self) -> Any:
        """Wait until it is done."""
        ...


class Trainer(Protocol):
    """Holds the weights. Version v is the weights after v optimiser batches; version 0 is where the run starts."""

    def contract(self) -> dict[str, str]:
        """{tensor: quantiser} of what it loaded and would publish."""
        ...

    def restore(self, directory: Path | None) -> None:
        """Take weights, optimiser state and version from a checkpoint; None: from the experiment's start."""
        ...

    def step(self, batch: Batch) -> Learning:
        """Learn from a batch; what is asked of the trainer next, it does with the new weights."""
        ...

    def publish(self, rollout: Rollout, version: int) -> Publishing:
        """Quantise the weights of `version` (the newest, or with lag the one before) and give them to the rollout."""
        ...

    def record(self, path: Path, version: int) -> Waited:
        """Start writing the 16-bit weights of a version that is at hand (`checkpoint.save_parts`)."""
        ...

    def save(self, directory: Path) -> None:
        """Write weights and optimiser state as safetensors and JSON into an existing directory."""
        ...

    def close(self) -> None: ...


class TrainerSpec(Spec):
    """Config of a trainer; `build` imports its backend."""

    ABSTRACT: ClassVar[bool] = True
    reads_layout: ClassVar[bool] = False  # its sizes are the model's `parallel`, which conf/layout/ fills in
    arithmetic: ClassVar[str] = ""  # equal on both sides: equal precisions give equal bits on a CPU
    replays: ClassVar[bool] = False  # it can route tokens as the rollout did
    routing_replay: bool = False  # use the experts that the rollout chose, with the trainer's own shares (R3)

    def judge(self, exp: Experiment) -> Iterable[Mistake]:
        """Mistakes between this part and the rest of the experiment; keys from the root."""
        return ()

    def build(self, exp: Experiment, workers: Workers) -> Trainer:
        raise NotImplementedError

    def environment(self, exp: Experiment) -> dict[str, str]:
        """The environment that each trainer worker gets."""
        return {}

    def plan(self, exp: Experiment) -> list[dict[str, Any]]:
        """Rows of the plan: one a worker or a kind of worker (role, count, where, what it does)."""
        return []

    def missing(self, exp: Experiment) -> str | None:
        """One sentence on what this machine lacks for this trainer, or None when it can run here."""
        return None
