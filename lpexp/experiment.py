"""Experiment: every field of a run, and the rules between its parts. Judging one imports no torch and no ray."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from lpexp.algorithm import Algorithm
from lpexp.cluster import Cluster
from lpexp.config import Spec, rule
from lpexp.correction import Correction
from lpexp.errors import Mistake
from lpexp.model import Model
from lpexp.precision import Precision
from lpexp.rollout import RolloutSpec
from lpexp.task import Task
from lpexp.trainer import TrainerSpec

# Top-level keys that decide no number of a run: left out of its hash, free to differ on resume.
MAY_CHANGE = ("output_dir", "resume", "resume_force", "dry_run", "stop_grace_s", "wandb", "checkpoint", "record", "cluster")


class Reference(Spec):
    """The policy that a KL penalty anchors to; it computes in its own precision, bf16 beside a quantised actor too."""

    precision: Precision


class Eval(Spec):
    """Held-out evaluation, greedy and sampled, before the first step, every `every` steps and after the last."""

    every: int = Field(ge=1)
    prompts: int = Field(ge=1)
    samples: int = Field(ge=1)  # a prompt, for sampled accuracy and pass@k
    temperature: float = Field(gt=0)
    top_p: float = Field(gt=0, le=1)
    top_k: int = Field(ge=0)
    show: int = Field(ge=0)  # prompt, answer and reward samples printed


class CheckpointSpec(Spec):
    every: int = Field(ge=1)  # steps
    keep: int = Field(ge=1)  # newest kept


class Record(Spec):
    """Stored rollouts, one safetensors file a step, for tools that re-score them."""

    keep: int = Field(ge=0)  # newest steps kept; 0: none are written


class Wandb(Spec):
    mode: Literal["offline", "online", "disabled"]
    project: str
    group: str | None
    tags: tuple[str, ...] = Field(strict=False)


class Experiment(Spec):
    """One run, complete."""

    name: str
    steps: int = Field(ge=1)
    seed: int = Field(ge=0, lt=2**32)
    lag: Literal[0, 1]
    output_dir: str
    resume: str  # none | auto | a run directory
    resume_force: bool
    dry_run: bool
    stop_grace_s: float = Field(ge=0)
    cluster: Cluster
    trainer: TrainerSpec
    rollout: RolloutSpec
    precision: Precision
    reference: Reference
    model: Model
    algorithm: Algorithm
    correction: Correction
    task: Task
    eval: Eval
    checkpoint: CheckpointSpec
    record: Record
    wandb: Wandb

    @property
    def wire(self) -> Precision:
        """The precision that rollout serves and every weight update carries."""
        return self.rollout.precision or self.precision

    @property
    def uses_reference(self) -> bool:
        return self.algorithm.kl_coef > 0

    def hash(self) -> str:
        """16 hex digits of everything that decides the numbers; where a run writes and how it resumes is left out."""
        kept = {key: value for key, value in self.dump().items() if key not in MAY_CHANGE}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
