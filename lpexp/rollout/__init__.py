"""The agreement on a rollout: load weights, sample groups. The loop knows nothing else of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import Field

from lpexp.config import Spec
from lpexp.data import Group, Prompt, SyncReport
from lpexp.errors import Mistake
from lpexp.precision import Precision

if TYPE_CHECKING:
    from lpexp.cluster import Workers
    from lpexp.experiment import Experiment


class Sampling(Spec):
    """How tokens are drawn. Log-probabilities are of the softmax at `temperature`, before top-p and top-k cut it."""

    temperature: float = Field(default=1.0, ge=0)  # 0: greedy, log-probs at temperature 1
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)  # 0: off
    samples: int = Field(default=1, ge=1)  # G


class Pending(Protocol):
    """A batch of groups being generated; the dispatcher heals dead engines while one waits on it."""

    seconds: float  # the longest that an engine generated, known once there is a result

    def result(self) -> list[Group]: ...


class Loading(Protocol):
    """Weights on their way into the engines."""

    def result(self) -> tuple[list[str], dict[str, float]]:
        """Wait: each engine's checksum of what it holds, and seconds spent."""
        ...


class Recording(Protocol):
    def result(self) -> Any:
        """Wait until it is on disk."""
        ...


class Rollout(Protocol):
    def contract(self) -> dict[str, str]:
        """{tensor: quantiser} of what the engines expect to be given."""
        ...

    def load(self, shards: Any, version: int) -> Loading:
        """Serve these weights from now on; what is sampled after this call is sampled by them."""
        ...

    def open(self, directory: str) -> SyncReport:
        """Serve the parts that a directory holds, as they are stored, as version 0."""
        ...

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> Pending:
        """Start generating `sampling.samples` answers to each prompt; random numbers are keyed by `step`."""
        ...

    def record(self, path: Path, sampling: Sampling) -> Recording:
        """Start writing what an engine holds (`checkpoint.save_parts`), its version, precision and how it draws."""
        ...

    def close(self) -> None: ...


class RolloutSpec(Spec):
    """Config of a rollout; `build` imports its backend. `precision: None` serves what the trainer trains."""

    ABSTRACT: ClassVar[bool] = True
    arithmetic: ClassVar[str] = ""  # equal on both sides: equal precisions give equal bits on a CPU
    returns_experts: ClassVar[bool] = False  # samples carry their routers' choices
    precision: Precision | None = None
    checkpoint: str | None = None  # a served directory: it fixes the rollout's precision and is version 0
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)

    def judge(self, exp: Experiment) -> Iterable[Mistake]:
        """Mistakes between this part and the rest of the experiment; keys from the root."""
        return ()

    def build(self, exp: Experiment, workers: Workers) -> Rollout:
        raise NotImplementedError

    def environment(self, exp: Experiment) -> dict[str, str]:
        return {}

    def plan(self, exp: Experiment) -> list[dict[str, Any]]:
        return []

    def missing(self, exp: Experiment) -> str | None:
        return None
