"""Experiment: every field of a run, and the rules between its parts. Judging one imports no torch and no ray."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from lpexp.algorithm import Algorithm
from lpexp.cluster import Cluster
from lpexp.config import Spec, rule
from lpexp.correction import Correction
from lpexp.errors import ConfigError, Mistake
from lpexp.fault import Fault
from lpexp.fetch import FETCHED
from lpexp.model import Model, divisors
from lpexp.model.served import EMBEDDING, agrees, contradiction, copies, precision_of
from lpexp.precision import Precision
from lpexp.rollout import RolloutSpec
from lpexp.task import Task
from lpexp.trainer import TrainerSpec

# Top-level keys that decide no number of a run: left out of its hash, free to differ on resume.
MAY_CHANGE = (
    "output_dir",
    "resume",
    "resume_force",
    "on_alarm",
    "band",
    "dry_run",
    "stop_grace_s",
    "wandb",
    "checkpoint",
    "record",
    "cluster",
)


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
    weights_every: int = Field(ge=0)  # steps; of these and of the first two, both sides' weights are kept; 0: of none


class BandSpec(Spec):
    """Where the first batch's mismatch should lie on this model and task, nat: least and most."""

    abs_mean: tuple[float, float] = Field(strict=False)  # of <|d|>
    kl_k3: tuple[float, float] = Field(strict=False)

    @rule
    def _in_order(self) -> Iterator[Mistake]:
        for key, (low, high) in (("abs_mean", self.abs_mean), ("kl_k3", self.kl_k3)):
            if not 0 <= low <= high:
                yield Mistake(key, f"[{low:g}, {high:g}] is no band; write the lower end first, from 0 on")


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
    on_alarm: Literal["warn", "stop"]
    band: BandSpec | None
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
    fault: Fault
    task: Task
    eval: Eval
    checkpoint: CheckpointSpec
    record: Record
    wandb: Wandb

    @property
    def wire(self) -> Precision:
        """The precision that rollout serves and every weight update carries."""
        return self.rollout.precision or self.precision

    def contract(self, served: Precision | None = None) -> dict[str, str]:
        """What both sides must agree on: {tensor: its quantiser} of the wire, or of `served`; and how tokens are drawn.

        `digest` of it is the hash.
        """
        model = self.model.sized()
        tensors = (served or self.wire).contract(model.params(), model.moe is not None)
        drawn = f"softmax at temperature {self.rollout.temperature:g}; log-probabilities before top-p and top-k"
        return tensors | {"sampling": drawn}

    @property
    def uses_reference(self) -> bool:
        return self.algorithm.kl_coef > 0

    @rule
    def _precisions_fit(self) -> Iterator[Mistake]:
        """Each precision on this model: groups divide, scopes cover something, and the trainer's can train."""
        if not self.precision.trains:
            name = self.precision.name
            way = f"train another and type rollout.precision={name}"
            yield Mistake("precision", f"{name} only serves and exports; {way}")
        model = self.model.sized()
        params = list(model.params())
        judged = [("precision", self.precision), ("rollout.precision", self.rollout.precision)]
        judged += [("reference.precision", self.reference.precision)] if self.uses_reference else []
        for key, precision in judged:
            if precision is not None:
                for mistake in precision.judge(params, model.moe is not None):
                    yield Mistake(f"{key}.{mistake.key}" if mistake.key else key, mistake.message)

    @rule
    def _lengths_fit(self) -> Iterator[Mistake]:
        model, longest = self.model.sized(), self.task.max_prompt + self.task.max_response
        if longest > model.max_position_embeddings:
            room = model.max_position_embeddings - self.task.max_prompt
            way = f"task.max_response={room}" if room > 0 else f"task.max_prompt < {model.max_position_embeddings}"
            yield Mistake(
                "task.max_response",
                f"task.max_prompt {self.task.max_prompt} + {self.task.max_response} is more than "
                f"the {model.max_position_embeddings} positions of {model.name}; use {way}",
            )

    @rule
    def _every_token_can_be_drawn(self) -> Iterator[Mistake]:
        why = "cuts the distribution that is sampled, which looks exactly like a precision gap; training needs"
        if self.rollout.top_p < 1:
            yield Mistake("rollout.top_p", f"{self.rollout.top_p} {why} rollout.top_p=1 (eval.top_p is free)")
        if self.rollout.top_k > 0:
            yield Mistake("rollout.top_k", f"{self.rollout.top_k} {why} rollout.top_k=0 (eval.top_k is free)")

    @rule
    def _updates_share_prompts(self) -> Iterator[Mistake]:
        prompts, updates = self.task.prompts_per_step, self.algorithm.updates_per_batch
        if prompts % updates:
            yield Mistake(
                "algorithm.updates_per_batch",
                f"{updates} optimiser steps cannot share task.prompts_per_step {prompts} equally; "
                f"use one of {divisors(prompts)}",
            )

    @rule
    def _vocabulary_fits(self) -> Iterator[Mistake]:
        from lpexp.model.tokenizer import CharTokenizer

        model = self.model.sized()
        needed = CharTokenizer().vocab_size
        if model.path is None and model.vocab_size < needed:
            message = f"{model.vocab_size} is less than the {needed} symbols of the character tokenizer; use {needed}"
            yield Mistake("model.vocab_size", message)

    @rule
    def _model_path_is_a_model(self) -> Iterator[Mistake]:
        path = self.model.sized().path
        if path is None or path.startswith(FETCHED):  # not fetched yet: a plan needs no weights, a run is refused
            return
        way = "name a Hugging Face model directory, or type model.path=null for a random start"
        if not Path(path).is_dir():
            yield Mistake("model.path", f"{path} is no directory; {way}")
            return
        lacking = [name for name in ("config.json", "tokenizer.json") if not os.access(Path(path) / name, os.R_OK)]
        if not any(Path(path).glob("*.safetensors")):
            lacking.append("*.safetensors")
        if lacking:
            yield Mistake("model.path", f"{path} has no readable {', '.join(lacking)}; {way}")

    @rule
    def _names_are_names(self) -> Iterator[Mistake]:
        if not self.name or "/" in self.name or self.name.startswith("."):
            yield Mistake("name", f"{self.name!r} names a folder of outputs/; use letters, digits, - and _")
        if not self.output_dir.strip():
            yield Mistake("output_dir", f"{self.output_dir!r} is no directory; leave it out, or name one")

    @rule
    def _checkpoint_agrees(self) -> Iterator[Mistake]:
        """A served checkpoint fixes the rollout's precision; serving it as another one would re-quantise in silence."""
        given, model = self.rollout.checkpoint, self.model.sized()
        if given is None:
            return
        key, null = "rollout.checkpoint", "or type rollout.checkpoint=null"
        try:
            found = precision_of(given, model)
            same_start = model.path is None or not Path(model.path).is_dir() or copies(given, model.path, model)
        except ConfigError as error:
            yield Mistake(key, f"{error}; name a directory that serves this model, {null}")
            return
        if model.path is None:
            start = "at random" if self.task.warmup is None else "from its warm-up"
            message = f"the trainer starts {start} (model.path is null), so {given} would sample with other weights"
            way = "type model.path=DIR, the 16-bit directory that it was made from"
            if self.model.scale == "laptop":
                way = "type scale=full: no directory holds the small twin"
            yield Mistake(key, f"{message}; {way}, {null}")
        if not same_start:
            message = f"{given} is no copy of {model.path}: {EMBEDDING} differs, so it would sample with other weights"
            yield Mistake(key, f"{message}; type model.path=DIR, the 16-bit directory that it was made from, {null}")
        params, moe = list(model.params()), model.moe is not None
        if agrees(found, self.wire, params, moe):
            return
        typed = self.rollout.precision is not None
        mount = "rollout.precision" if typed or type(found) is not type(self.wire) else "precision"
        holder = mount if typed else "the trainer"
        message, words = contradiction(found, self.wire, mount, params, moe)
        yield Mistake(key, f"{given} holds {message.format(holder=holder)}; type {words}")

    @rule
    def _backends_agree(self) -> Iterator[Mistake]:
        yield from self.trainer.judge(self)
        yield from self.rollout.judge(self)

    @rule
    def _routing_can_be_replayed(self) -> Iterator[Mistake]:
        if not self.trainer.routing_replay:
            return
        key, way, model = "trainer.routing_replay", "type trainer.routing_replay=false", self.model.sized()
        sides = ((self.trainer.replays, "trainer", "replay"), (self.rollout.returns_experts, "rollout", "return"))
        if model.moe is None:
            yield Mistake(key, f"true, but {model.name} has no experts to route to; {way}")
        for able, side, verb in sides:
            if not able:
                yield Mistake(key, f"true, but this {side} does not {verb} routers' choices; {way} or {side}=embedded")

    @rule
    def _fault_fits(self) -> Iterator[Mistake]:
        yield from self.fault.judge(self)
        if self.fault.name != "none" and self.rollout.checkpoint is not None:
            yield Mistake("fault", f"{self.fault.name} spoils what the trainer ships; type rollout.checkpoint=null")

    @rule
    def _task_fits(self) -> Iterator[Mistake]:
        yield from self.task.judge(self)

    def hash(self) -> str:
        """16 hex digits of everything that decides the numbers; where a run writes and how it resumes is left out."""
        kept = {key: value for key, value in self.dump().items() if key not in MAY_CHANGE}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
