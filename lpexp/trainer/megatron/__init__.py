"""The Megatron-core trainer: its config and its plan. rules.py has its rules, driver.py the trainer itself."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lpexp.errors import Mistake
from lpexp.trainer import Trainer, TrainerSpec
from lpexp.trainer.megatron import rules

if TYPE_CHECKING:
    from lpexp.cluster import Workers
    from lpexp.experiment import Experiment
    from lpexp.model import Model

NVLS_FROM = 90  # compute capability (times ten) whose NVLink switches reduce inside the network


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
    optimizer_offload: bool  # Adam's state in host memory, its transfers overlapped
    dispatcher: Literal["alltoall", "deepep"]  # how tokens travel to their experts
    attention: Literal["auto", "flash", "fused", "unfused"]  # auto: flash, with latent attention the library's choice
    lr: float = Field(ge=0)
    betas: tuple[float, float] = Field(strict=False)
    eps: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    clip_grad: float = Field(gt=0)
    lr_warmup_steps: int = Field(ge=0)

    def judge(self, exp: Experiment) -> Iterable[Mistake]:
        return rules.broken(self, exp)

    @property
    def copy_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.pp * self.cp

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold one copy of all experts."""
        return self.etp * self.ep * self.pp

    def world(self, exp: Experiment) -> int:
        """How many ranks there are: one a GPU; on cores those that were typed, else as few as the sizes allow."""
        if exp.cluster.world:
            return exp.cluster.trainer_gpus
        return self.ranks or math.lcm(self.copy_ranks, self.expert_ranks if exp.model.moe else 1)

    def build(self, exp: Experiment, workers: Workers) -> Trainer:
        from lpexp.trainer.megatron.driver import MegatronTrainer

        return MegatronTrainer(exp, self, workers)

    def attention_backend(self, model: Model) -> str:
        """Megatron-core's word for the attention kernels of this model."""
        return "flash" if self.attention == "auto" and model.mla is None else self.attention

    def environment(self, exp: Experiment) -> dict[str, str]:
        """Each variable has a reader: NCCL, NVSHMEM (below DeepEP), Transformer Engine by way of the precision."""
        found = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", **exp.precision.environment()}
        if exp.cluster.world:
            switched = exp.cluster.interconnect == "nvlink" and (exp.cluster.capability or 0) >= NVLS_FROM
            found["NCCL_NVLS_ENABLE"] = str(int(switched))
        if self.dispatcher == "deepep":
            found["NVSHMEM_DISABLE_NCCL"] = "1"
        return found

    def plan(self, exp: Experiment) -> list[dict[str, Any]]:
        model, world = exp.model.sized(), self.world(exp)
        sizes = f"tp {self.tp} x pp {self.pp} x cp {self.cp} x dp {world // self.copy_ranks}"
        parts = [f"Megatron-core, {sizes}"]
        if model.moe:
            data = world // self.expert_ranks
            parts.append(f"experts ep {self.ep} x etp {self.etp} x pp {self.pp} x dp {data} by {self.dispatcher}")
        if self.last_stage_layers is not None:
            rest = (model.num_hidden_layers - self.last_stage_layers) // (self.pp - 1)
            parts.append(f"last stage {self.last_stage_layers} layers, others {rest}")
        if exp.cluster.world:
            parts.append(f"attention {self.attention_backend(model)}")
            parts.append(f"micro-batches of at most {self.max_tokens_per_gpu} tokens a GPU")
            parts.append(f"Adam on the {'CPU' if self.optimizer_offload else 'GPU'}, lr {self.lr:g}")
            parts.append(f"state {rules.state_gb(self, exp):.1f} GB a GPU")
        parts.append(f"trains {exp.precision.name}")
        gpus = 1 if exp.cluster.world else 0
        return [{"role": "trainer rank", "count": world, "what": "; ".join(parts), "gpus": gpus}]

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
