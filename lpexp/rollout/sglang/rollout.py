"""The dispatcher over SGLang engines: it waits until they are ready, and says what they do meanwhile."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from lpexp.rollout.dispatch import Dispatcher
from lpexp.rollout.sglang import SglangRolloutSpec
from lpexp.rollout.sglang.engine import SglangEngine

if TYPE_CHECKING:
    from lpexp.cluster import Handle, Workers
    from lpexp.experiment import Experiment

FOLDER = "engines"  # of the run directory: logs and reports
TOLD_EVERY_S = 10.0
CANARIES, CANARY_TOKENS = 8, 64


class SglangRollout(Dispatcher):
    """Engines start when this is made; whoever asks the first thing of them waits."""

    def __init__(self, exp: Experiment, spec: SglangRolloutSpec, workers: Workers):
        self.spec, self.canary, self.canary_limit = spec, canary(exp), spec.limit(exp)
        super().__init__(exp, workers, spec.count(exp))

    def spawn(self, index: int) -> Handle:
        folder, shared = str(self.workers.run_dir.absolute() / FOLDER), str(self.workers.scratch / "weights")
        return self.workers.spawn(f"engine-{index}", SglangEngine, self.exp, index, folder, shared, self.canary)

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


def canary(exp: Experiment) -> list[list[int]]:
    """Token sequences that trainer and engines score after every update: held-out prompts with their answers."""
    from lpexp.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(exp.model.sized())
    prompts = exp.task.held_out(exp.seed, min(CANARIES, exp.eval.prompts), tokenizer)
    longest = min(CANARY_TOKENS, exp.task.max_prompt + exp.task.max_response)
    return [[*prompt.tokens, *tokenizer.encode(prompt.answer)][:longest] for prompt in prompts]
