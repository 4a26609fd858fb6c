"""The Megatron-core trainer: its config, its rules and its plan.

Left out in this version: the backend itself; `build` says so and what to type instead. Recipes: docs/models.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from lpexp.errors import ConfigError, Mistake
from lpexp.model import divisors
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
        whole = f"make their product divide {world}"
        if world % (self.tp * self.pp * self.cp):
            over = f"trainer.tp {self.tp} x trainer.pp {self.pp} x trainer.cp {self.cp}"
            yield Mistake("trainer", f"{over} does not divide {world} GPUs; {whole}")
        if model.num_attention_heads % self.tp:
            heads = model.num_attention_heads
            yield Mistake("trainer.tp", f"{self.tp} does not divide {heads} heads; use one of {divisors(heads)}")
        if model.moe is None and self.ep > 1:
            yield Mistake("trainer.ep", f"{self.ep}, but {model.name} has no experts; use 1")
        if model.moe and world % (self.etp * self.ep * self.pp):
            over = f"trainer.etp {self.etp} x trainer.ep {self.ep} x trainer.pp {self.pp}"
            yield Mistake("trainer", f"{over} does not divide {world} GPUs; {whole}")
        if model.moe and model.moe.num_experts % self.ep:
            experts = model.moe.num_experts
            yield Mistake("trainer.ep", f"{self.ep} does not divide {experts} experts; use one of {divisors(experts)}")
        if self.pp > 1:
            yield from self._stages(model.num_hidden_layers)

    def _stages(self, layers: int) -> Iterable[Mistake]:
        """Pipeline stages of equal depth, except that the last may be told apart."""
        rest = layers if self.last_stage_layers is None else layers - self.last_stage_layers
        stages = self.pp if self.last_stage_layers is None else self.pp - 1
        if rest > 0 and rest % stages == 0:
            return
        last = "" if self.last_stage_layers is None else f", {self.last_stage_layers} of them in the last,"
        remainder = layers - (self.pp - 1) * -(-layers // self.pp)
        way = f"trainer.last_stage_layers={remainder} or " if remainder > 0 else ""
        message = f"{layers} layers{last} do not split evenly over {self.pp} stages"
        yield Mistake("trainer.pp", f"{message}; use {way}a trainer.pp that divides {layers}")

    def build(self, exp: Experiment, workers: Workers) -> Trainer:
        raise ConfigError([Mistake("trainer", f"megatron: {self.missing(exp)}")])

    def environment(self, exp: Experiment) -> dict[str, str]:
        return {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **exp.precision.environment()}

    def plan(self, exp: Experiment) -> list[dict[str, Any]]:
        world = exp.cluster.nodes * exp.cluster.gpus_per_node
        what = (
            f"Megatron-core, tp {self.tp} x pp {self.pp} x cp {self.cp} x dp {world // (self.tp * self.pp * self.cp)}"
        )
        if exp.model.moe:
            data = world // (self.etp * self.ep * self.pp)
            what += f"; experts ep {self.ep} x etp {self.etp} x pp {self.pp} x dp {data}"
        if self.last_stage_layers is not None:
            what += f"; last stage {self.last_stage_layers} layers"
        return [{"role": "trainer rank", "count": world, "what": f"{what}; trains {exp.precision.name}"}]

    def missing(self, exp: Experiment) -> str | None:
        return (
            "the Megatron-core trainer is not built in this version; type trainer=embedded rollout=embedded, "
            "or scale=laptop for a twin that runs anywhere"
        )
