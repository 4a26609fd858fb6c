"""The Megatron-core trainer as the loop sees it. Loads no torch: each rank does, where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpexp.trainer.group import TrainerGroup

if TYPE_CHECKING:
    from lpexp.cluster import Future, Workers
    from lpexp.experiment import Experiment
    from lpexp.rollout import Rollout
    from lpexp.trainer.megatron import MegatronTrainerSpec


def worker(exp: Experiment, rank: int, ranks: int, meet: str) -> Any:
    """One rank, made where it runs."""
    from lpexp.trainer.megatron.rank import MegatronRank

    return MegatronRank(exp, rank, ranks, meet)


class MegatronTrainer(TrainerGroup):
    """All ranks give their parts of a version to the first, bucket by bucket, and save their own."""

    def __init__(self, exp: Experiment, spec: MegatronTrainerSpec, workers: Workers):
        super().__init__(exp, workers, worker, spec.world(exp), meet=True, seats=workers.seats)
        self.buckets = 0

    def restore(self, directory: Path | None) -> None:
        super().restore(directory)
        self.buckets = self.all("count_buckets")[0]

    def ship(self, rollout: Rollout, version: int) -> tuple[list[Any], Future, list[Future]]:
        first, *rest = self.ranks
        bulks, others = [], []
        for bucket in range(self.buckets):
            bulk, done = self.workers.share(first, "ship", version, bucket)
            bulks.append(bulk)
            others += [done, *(rank.call("ship", version, bucket) for rank in rest)]
        return bulks, first.call("shipped", version), others

    def save(self, directory: Path) -> None:
        self.all("save", str(directory))

    def close(self) -> None:
        if self.exp.cluster.kind == "inline":
            self.all("shutdown")
        super().close()
