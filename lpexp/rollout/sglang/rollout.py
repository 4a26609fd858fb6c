"""The dispatcher over SGLang engines: it waits until they are ready, and says what they do meanwhile."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lpexp.data import Group, Prompt
from lpexp.rollout import Sampling
from lpexp.rollout.dispatch import Call, Dispatcher, Loading, Pending, loading
from lpexp.rollout.sglang import SglangRolloutSpec
from lpexp.rollout.sglang.broadcast import Meeting
from lpexp.rollout.sglang.engine import SglangEngine, address
from lpexp.rollout.sglang.server import free_port

if TYPE_CHECKING:
    from lpexp.cluster import Future, Handle, Workers
    from lpexp.experiment import Experiment

FOLDER = "engines"  # of the run directory: logs and reports
TOLD_EVERY_S = 10.0
CANARIES, CANARY_TOKENS = 8, 64


class SglangRollout(Dispatcher):
    """Engines start when this is made; whoever asks the first thing of them waits.

    With `cluster.colocate` they rest on the trainer's GPUs while it learns: released once every sample that was asked
    for has been fetched, resumed by the next load (or, where none comes first, by loading the same weights again).
    """

    def __init__(self, exp: Experiment, spec: SglangRolloutSpec, workers: Workers):
        self.spec, self.canary, self.canary_limit = spec, canary(exp), spec.limit(exp)
        self.turns = exp.cluster.colocate and spec.on(exp) == "cuda"
        self.outstanding, self.resting = 0, False
        self.meeting: Meeting | None = None
        self.giver: Handle | None = None  # the trainer's rank that broadcasts
        self.sending: Future | None = None
        super().__init__(exp, workers, spec.count(exp))

    def spawn(self, index: int) -> Handle:
        self.meeting = None  # whoever is new is in no group
        folder, shared = str(self.workers.run_dir.absolute() / FOLDER), str(self.workers.scratch / "weights")
        return self.workers.spawn(
            f"engine-{index}",
            SglangEngine,
            self.exp,
            index,
            folder,
            shared,
            self.canary,
            seats=self.spec.seats(self.exp, self.workers.seats, index),
        )

    # -- weights ---------------------------------------------------------------------------------------------------
    def take(self, rank: Handle, version: int) -> tuple[Any, Future]:
        if self.spec.transport != "broadcast":
            return super().take(rank, version)
        self.giver = rank
        self.meeting = self.meeting or self._meet()
        announced, report = self.workers.share(rank, "announced", version, self.meeting)
        self.sending = rank.call("send", version, self.meeting)
        return announced, report

    def _meet(self) -> Meeting:
        spec, host = self.spec, address(self.exp)
        return Meeting(
            address=host,
            port=free_port(host),
            name=f"weights-{secrets.token_hex(4)}",
            engines=len(self.engines),
            ranks=spec.gpus_per_engine,
            ep=spec.ep,
            limit=spec.bucket_mb << 20,
            device=spec.on(self.exp),
            timeout_s=spec.update_timeout_s,
        )

    def load(self, shards: Sequence[Any], version: int) -> SglangLoading:
        self.shards, self.version, self.resting = shards, version, False
        return SglangLoading(self, loading(shards, version))

    def again(self, served: tuple[Sequence[Any], int]) -> tuple[Sequence[Any], int]:
        """What was broadcast comes to a successor as the trainer's shards do elsewhere."""
        if self.giver is None or served[1] < 0:
            return served
        bulk, _ = self.workers.share(self.giver, "served", served[1])
        return [bulk], served[1]

    # -- samples ---------------------------------------------------------------------------------------------------
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> SglangPending:
        if self.resting:  # an evaluation before the first step has ended: the weights that were released come again
            shards, version = self.again((self.shards, self.version))
            for engine in self.engines:
                engine.call(*loading(shards, version))
            self.resting = False
        self.outstanding += 1
        return SglangPending(self, prompts, sampling, step)

    def fetched(self) -> None:
        """A batch was fetched. When nothing else is asked for, the GPUs are the trainer's."""
        self.outstanding -= 1
        if self.turns and not self.outstanding:
            for future in [engine.call("rest") for engine in self.engines]:
                future.result()
            self.resting = True

    # -- start -----------------------------------------------------------------------------------------------------
    def contract(self) -> dict[str, str]:
        self.wait()
        return super().contract()

    def wait(self) -> None:
        """Until every engine is ready, with a line of progress now and then; RunError says why one will not be."""
        waiting, told = dict(enumerate(self.engines)), time.monotonic()
        while waiting:
            answers = {index: engine.call("ready") for index, engine in waiting.items()}
            doing = {index: answer.result() for index, answer in answers.items()}
            for index, (report, _) in doing.items():
                if report is not None:
                    del waiting[index]
                    self.workers.event("engine_ready", **report)
            if waiting and time.monotonic() - told > TOLD_EVERY_S:
                told = time.monotonic()
                for index in waiting:
                    print(f"engine-{index} is starting: {doing[index][1]}", file=sys.stderr, flush=True)
            if waiting:
                time.sleep(0.5)


class SglangLoading(Loading):
    """Also waits for the rank that sends. Where an engine was lost meanwhile, the group broke: its successor has the
    weights by another way, and so has every engine that failed with it."""

    def __init__(self, rollout: SglangRollout, call: Call):
        self.sending, rollout.sending = rollout.sending, None
        self.engines = list(rollout.engines)
        super().__init__(rollout, call)

    def result(self) -> tuple[list[str], dict[str, float]]:
        found = super().result()
        if self.sending is not None and self.engines == self.rollout.engines:
            self.sending.result()
        return found


class SglangPending(Pending):
    def result(self) -> list[Group]:
        groups = super().result()
        self.rollout.fetched()  # type: ignore[attr-defined]
        return groups


def canary(exp: Experiment) -> Sequence[Sequence[int]]:
    """Token sequences that trainer and engines score after every update: held-out prompts with their answers."""
    from lpexp.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(exp.model.sized())
    prompts = exp.task.held_out(exp.seed, min(CANARIES, exp.eval.prompts), tokenizer)
    longest = min(CANARY_TOKENS, exp.task.max_prompt + exp.task.max_response)
    return [[*prompt.tokens, *tokenizer.encode(prompt.answer)][:longest] for prompt in prompts]
