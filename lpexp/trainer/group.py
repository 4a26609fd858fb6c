"""A trainer made of ranks, as the loop sees it: every call goes to all of them, their findings are put together.

A backend brings the rank (its class, what it is made with) and says which ranks ship and save.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lpexp.data import Batch, LearnReport, SyncReport
from lpexp.errors import RunError

if TYPE_CHECKING:
    from lpexp.cluster import Future, Handle, Workers
    from lpexp.experiment import Experiment
    from lpexp.rollout import Rollout
    from lpexp.seats import Seat


class TrainerGroup:
    """`count` ranks, made with (exp, rank, count, meet): `meet` is a file that they find each other by.

    Rank r gets GPU `seats[r]`; without seats a rank chooses among those of its node.
    """

    def __init__(
        self,
        exp: Experiment,
        workers: Workers,
        kind: Callable[..., Any],
        count: int,
        meet: bool,
        seats: Sequence[Seat] = (),
    ):
        self.exp, self.workers = exp, workers
        at = str(workers.scratch / "trainer-rendezvous") if meet else None
        env = exp.trainer.environment(exp)
        self.ranks: list[Handle] = [
            workers.spawn(f"trainer-{r}", kind, exp, r, count, at, env=env, seats=seats[r : r + 1])
            for r in range(count)
        ]
        self.version = 0

    def all(self, method: str, *args: Any) -> list[Any]:
        return self.answers(method, [rank.call(method, *args) for rank in self.ranks])

    def answers(self, method: str, futures: Sequence[Future]) -> list[Any]:
        """What all ranks answer; RunError that says how to go on when one has died."""
        for rank, future in zip(self.ranks, futures, strict=True):
            if future.died():
                raise RunError(
                    f"{rank.name} died during {method}: {future.error()}; "
                    f"continue with: resume=auto output_dir={self.workers.run_dir}"
                )
        return [future.result() for future in futures]

    def contract(self) -> dict[str, str]:
        return self.all("contract")[0]

    def restore(self, directory: Path | None) -> None:
        if directory is not None:
            self.version = self.all("restore", str(directory))[0]
            return
        start = self.ranks[0].call("warm_up").result()
        self.version = self.all("begin", start)[0]

    def step(self, batch: Batch) -> Learning:
        learning = Learning(self, batch)
        self.version += 1
        return learning

    def ship(self, rollout: Rollout, version: int) -> tuple[list[Any], Future, list[Future]]:
        """Start giving a version away: its bulks, the report to come, and what else has to end."""
        raise NotImplementedError

    def canary(self, version: int, sequences: Sequence[Sequence[int]]) -> list[Future]:
        """Ask for the log-probabilities of these tokens under a version; one of the answers holds them, others None."""
        return [self.ranks[0].call("canary", version, sequences)]

    def publish(self, rollout: Rollout, version: int) -> Publishing:
        return Publishing(self, rollout, version)

    def save(self, directory: Path) -> None:
        raise NotImplementedError

    def close(self) -> None:
        for rank in self.ranks:
            rank.stop()


class Learning:
    """One batch, each rank at its share."""

    def __init__(self, trainer: TrainerGroup, batch: Batch):
        self.trainer, self.batch, self.version = trainer, batch, trainer.version
        self.begin = time.perf_counter()
        self.futures = [rank.call("step", batch) for rank in trainer.ranks]
        if trainer.exp.cluster.kind == "inline":
            trainer.answers("step", self.futures)  # it has been made: what broke it is told before more is asked

    def result(self) -> LearnReport:
        batch, trainer = self.batch, self.trainer
        answers = trainer.answers("step", self.futures)
        arrays: dict[str, np.ndarray] = {}
        for answer in answers:
            for start, stop, found in answer["found"]:
                for name, rows in found.items():
                    arrays.setdefault(name, np.zeros(batch.tokens_NT.shape, np.float32))[start:stop] = rows
        first, names = answers[0], sorted({name for answer in answers for name in answer["sums"]})
        sums = {name: sum(answer["sums"].get(name, 0.0) for answer in answers) for name in names}
        updates = trainer.exp.algorithm.updates_per_batch
        scalars = {f"train/{name}": value / updates for name, value in sums.items()}
        scalars |= {f"train/{name}": first[name] for name in ("grad_norm", "grad_clip_frac", "lr", "param_norm")}
        seconds = {name: max(a["seconds"][name] for a in answers) for name in ("recompute", "optimizer")}
        return LearnReport(
            batch=batch,
            lp_T=arrays["lp_T"],
            lp_P=arrays["lp_P"],
            lp_C=arrays["lp_C"],
            entropy=arrays["entropy"],
            weights=arrays["weights"],
            lp_ref=arrays.get("lp_ref"),
            version=self.version,
            scalars=scalars,
            seconds=seconds | {"learn": time.perf_counter() - self.begin - seconds["recompute"]},
            recompute=first["recompute"],
        )


class Publishing:
    """One version's way to the engines."""

    def __init__(self, trainer: TrainerGroup, rollout: Rollout, version: int):
        begin = time.perf_counter()
        self.version = version
        bulks, self.sent, self.others = trainer.ship(rollout, version)
        self.canary = trainer.canary(version, rollout.canary) if rollout.canary else []
        if rollout.turns:
            trainer.all("offload")  # before the engines take the memory
        self.loading = rollout.load(bulks, version)
        self.asking = time.perf_counter() - begin  # in one process that is all of it

    def result(self) -> SyncReport:
        begin = time.perf_counter()
        held, seconds = self.loading.result()
        report, others = self.sent.result(), [other.result() for other in self.others]
        whole = self.asking + time.perf_counter() - begin
        wrong = [index for index, checksum in enumerate(held) if checksum != report.checksum_sent]
        if wrong:
            raise RunError(
                f"weights of version {self.version}: engine {wrong[0]} holds {held[wrong[0]]}, "
                f"not {report.checksum_sent}"
            )
        spent = report.seconds | seconds
        spent.setdefault("transfer", max(whole - sum(spent.values()), 0.0))
        spent["sync"] = whole
        quant = next((other for other in others if other), report.quant)
        scored = [one for future in self.canary if (one := future.result()) is not None]
        gap = self.loading.gap(scored[0]) if self.canary else None
        return dataclasses.replace(report, seconds=spent, checksums_held=tuple(held), quant=quant, canary=gap)
