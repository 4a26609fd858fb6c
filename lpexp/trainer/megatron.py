"""The Megatron-core trainer: its config, its rules and its plan.

Left out in this version: the backend itself; `build` says so and what to type instead. Recipes: docs/models.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from lpexp.errors import ConfigError, Mistake
from lpexp.trainer import Trainer, TrainerSpec

if TYPE_CHECKING:
    from lpexp.cluster import Workers
    from lpexp.experiment import Experiment


class MegatronTrainerSpec(TrainerSpec):
    """Tensor, pipeline, context and expert parallel sizes; the rest of the GPUs is data-parallel."""

    reads_layout: ClassVar[bool] = True
    tp: int = Field(ge=1)
    pp: int = Field(ge=1)
    cp: int = Field(ge=1)
    ep: int = Field(ge=1)
    etp: int = Field(ge=1)
    last_stage_layers: int | None = Field(ge=1)  # None: layers split evenly
    max_tokens_per_gpu: int = Field(ge=1)  # of a micro-batch
    optimizer_offload: bool  # Adam's state in host memory
    lr: float = Field(ge=0)
    betas: tuple[float, float] = Field(strict=False)
    eps: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    clip_grad: float = Field(gt=0)
    lr_warmup_steps: int = Field(ge=0)

    def judge(self, exp: Experiment) -> Iterable[Mistake]:
        model, world = exp.model.sized(), exp.cluster.nodes * exp.cluster.gpus_per_node
        if world == 0:
            yield Mistake(
                "cluster",
                f"{exp.cluster.name} has no GPU and trainer megatron needs some; type cluster=h200, or scale=laptop",
            )
            return
        dense, expert = self.tp * self.pp * self.cp, self.etp * self.ep * self.pp
        if world % dense:
            yield Mistake(
                "trainer.tp",
                f"{world} GPUs / (tp {self.tp} x pp {self.pp} x cp {self.cp}) is {world / dense:.3g}; make their product divide {world}",
            )
        if model.moe and world % expert:
            yield Mistake(
                "trainer.ep",
                f"{world} GPUs / (etp {self.etp} x ep {self.ep} x pp {self.pp}) is {world / expert:.3g}; make their product divide {world}",
            )
        if model.moe is None and self.ep > 1:
            yield Mistake("trainer.ep", f"{self.ep}, but {model.name} has no experts; use 1")
        if model.moe and model.moe.num_experts % self.ep:
            yield Mistake(
                "trainer.ep",
                f"{self.ep} does not divide {model.moe.num_experts} experts; use a power of two up to {model.moe.num_experts & -model.moe.num_experts}",
            )
        if model.num_attention_heads % self.tp:
            yield Mistake(
                "trainer.tp", f"{self.tp} does not divide {model.num_attention_heads} attention heads; use a divisor"
            )
        if self.pp > 1:
            yield from self._stages(model.num_hidden_layers)

    def _stages(self, layers: int) -> Iterable[Mistake]:
        rest = layers if self.last_stage_layers is None else layers - self.last_stage_layers
        stages = self.pp if self.last_stage_layers is None else self.pp - 1
        if rest <= 0 or rest % stages:
            even = f"trainer.last_stage_layers={layers - (self.pp - 1) * -(-layers // self.pp)}"
            yield Mistake(
                "trainer.pp",
                f"{layers} layers in {self.pp} stages{'' if self.last_stage_layers is None else f', {self.last_stage_layers} in the last'}"
                f" do not split evenly; use {even}, or another trainer.pp",
            )

    def build(self, exp: Experiment, workers: Workers) -> Trainer:
        raise ConfigError([Mistake("trainer", f"megatron: {self.missing(exp)}")])

    def environment(self, exp: Experiment) -> dict[str, str]:
        return {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **exp.precision.environment()}

    def plan(self, exp: Experiment) -> list[dict[str, Any]]:
        world = exp.cluster.nodes * exp.cluster.gpus_per_node
        data = world // (self.tp * self.pp * self.cp)
        sizes = f"tp {self.tp} x pp {self.pp} x cp {self.cp} x dp {data}"
        if exp.model.moe:
            sizes += (
                f"; experts ep {self.ep} x etp {self.etp} x pp {self.pp} x dp {world // (self.etp * self.ep * self.pp)}"
            )
        last = "" if self.last_stage_layers is None else f"; last stage {self.last_stage_layers} layers"
        return [
            {
                "role": "trainer rank",
                "count": world,
                "what": f"Megatron-core, {sizes}{last}, trains {exp.precision.name}",
            }
        ]

    def missing(self, exp: Experiment) -> str | None:
        return "the Megatron-core trainer is not built in this version; type trainer=embedded rollout=embedded, or scale=laptop for a twin that runs anywhere"
