"""The SGLang rollout: its config, its rules and its plan.

Left out in this version: the backend itself; `build` says so and what to type instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lpexp.errors import ConfigError, Mistake
from lpexp.model import divisors
from lpexp.rollout import Rollout, RolloutSpec
from lpexp.rollout.fit import engine_fits

if TYPE_CHECKING:
    from lpexp.cluster import Workers
    from lpexp.experiment import Experiment


class SglangRolloutSpec(RolloutSpec):
    """Servers of `gpus_per_engine` GPUs each, on the GPUs that also train; `ep` of them share the experts out."""

    gpus_per_engine: int = Field(ge=1)
    ep: int = Field(ge=1)
    mem_fraction: float = Field(gt=0, lt=1)  # of GPU memory, for weights and cache

    def judge(self, exp: Experiment) -> Iterable[Mistake]:
        world, model = exp.cluster.engine_gpus, exp.model.sized()
        if world == 0:
            yield Mistake(
                "rollout",
                f"sglang needs GPUs and cluster {exp.cluster.name} has none; type rollout=embedded, or scale=laptop",
            )
            return
        if world % self.gpus_per_engine:
            yield Mistake(
                "rollout.gpus_per_engine", f"{self.gpus_per_engine} does not divide {world} GPUs; use a divisor"
            )
        if self.gpus_per_engine % self.ep:
            yield Mistake(
                "rollout.ep", f"{self.ep} does not divide rollout.gpus_per_engine {self.gpus_per_engine}; use a divisor"
            )
        if model.moe is None and self.ep > 1:
            yield Mistake("rollout.ep", f"{self.ep}, but {model.name} has no experts; use 1")
        elif model.moe and model.moe.num_experts % self.ep:
            experts = model.moe.num_experts
            yield Mistake("rollout.ep", f"{self.ep} does not divide {experts} experts; use one of {divisors(experts)}")
        yield from engine_fits(exp, self.gpus_per_engine, self.ep, self.mem_fraction)

    def build(self, exp: Experiment, workers: Workers) -> Rollout:
        raise ConfigError([Mistake("rollout", f"sglang: {self.missing(exp)}")])

    def plan(self, exp: Experiment) -> list[dict[str, Any]]:
        where = "colocated" if exp.cluster.colocate else "on GPUs of their own"
        what = (
            f"SGLang server, {self.gpus_per_engine} GPUs (experts over {self.ep}), {where}, "
            f"memory fraction {self.mem_fraction:g}; serves {exp.wire.name}"
        )
        count = exp.cluster.engine_gpus // self.gpus_per_engine
        return [{"role": "rollout engine", "count": count, "what": what, "gpus": self.gpus_per_engine}]

    def missing(self, exp: Experiment) -> str | None:
        return (
            "the SGLang rollout is not built in this version; type trainer=embedded rollout=embedded, "
            "or scale=laptop for a twin that runs anywhere"
        )
