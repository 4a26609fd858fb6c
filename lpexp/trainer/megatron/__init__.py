"""The Megatron-core trainer: its config, its rules and its plan.

Left out in this version: the backend itself; `build` says so and what to type instead. Recipes: docs/models.md.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from lpexp.errors import Mistake
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
    ranks: int | None = Field(ge=1)  # without GPUs: how many processes; None: as few as the sizes allow
    max_tokens_per_gpu: int = Field(ge=1)  # of a micro-batch
    bucket_mb: int = Field(ge=1)  # of 16-bit weights that are gathered and quantised at a time
    optimizer_offload: bool  # Adam's state in host memory
    lr: float = Field(ge=0)
    betas: tuple[float, float] = Field(strict=False)
    eps: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    clip_grad: float = Field(gt=0)
    lr_warmup_steps: int = Field(ge=0)

    def judge(self, exp: Experiment) -> Iterable[Mistake]:
        model, world = exp.model.sized(), self.world(exp)
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

    def world(self, exp: Experiment) -> int:
        """How many ranks there are: one a GPU; on cores those that were typed, else as few as the sizes allow."""
        if exp.cluster.gpus_per_node:
            return exp.cluster.nodes * exp.cluster.gpus_per_node
        return self.ranks or math.lcm(self.tp * self.pp * self.cp, self.etp * self.ep * self.pp if exp.model.moe else 1)

    def build(self, exp: Experiment, workers: Workers) -> Trainer:
        from lpexp.trainer.megatron.driver import MegatronTrainer

        return MegatronTrainer(exp, self, workers)

    def environment(self, exp: Experiment) -> dict[str, str]:
        return {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **exp.precision.environment()}

    def plan(self, exp: Experiment) -> list[dict[str, Any]]:
        world = self.world(exp)
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
        if lacking := [name for name in ("megatron.core", "einops") if not _found(name)]:
            return f"trainer=megatron needs {' and '.join(lacking)}; pip install 'lpexp[megatron]'"
        world = self.world(exp)
        if exp.cluster.kind == "inline" and world > 1:
            return f"cluster=inline is one process and the trainer's sizes make {world} ranks; type cluster=local"
        return None


def _found(module: str) -> bool:
    """Is it installed? Nothing of it is loaded."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
