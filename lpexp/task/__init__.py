"""The agreement on a task: prompts, a reward, and for models that start from scratch the answers to warm up on.

Prompts are a function of (seed, step) alone, so they do not depend on workers, order or restarts. Training and
held-out prompts never overlap: each task says by a hash of the prompt's text which side it is on.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from lpexp.config import Spec
from lpexp.data import Group, Prompt
from lpexp.errors import Mistake, RunError

if TYPE_CHECKING:
    from lpexp.experiment import Experiment
    from lpexp.model.tokenizer import Tokenizer

HELD_OUT = 1 << 31  # ids of held-out prompts start here


class Score(NamedTuple):
    """A reward and its named parts, e.g. Score(0.7, {"exact": 0.0, "partial": 0.7}); `correct` counts for accuracy."""

    reward: float
    correct: bool
    parts: dict[str, float]


class Task(Spec):
    """Where prompts come from and what an answer is worth."""

    ABSTRACT: ClassVar[bool] = True
    name: str
    max_prompt: int = Field(ge=1)  # tokens
    max_response: int = Field(ge=1)  # tokens, stop token included
    prompts_per_step: int = Field(ge=1)  # P
    warmup: Warmup | None = None

    @abstractmethod
    def train(self, seed: int, step: int, tokenizer: Tokenizer) -> list[Prompt]:
        """The `prompts_per_step` prompts of a step; ids are step * prompts_per_step + index."""

    @abstractmethod
    def held_out(self, seed: int, count: int, tokenizer: Tokenizer) -> list[Prompt]:
        """`count` prompts that training never shows; ids are HELD_OUT + index."""

    @abstractmethod
    def reward(self, prompt: Prompt, answer: str, finish: str) -> Score:
        """What this answer (decoded, without the stop token) is worth. May raise: counted, scored 0, never silent."""

    @property
    def held_out_response(self) -> int:
        """Tokens of an answer to a held-out prompt, at most."""
        return self.max_response

    @property
    def longest_response(self) -> int:
        """Tokens of any answer, at most: what a cache and a position table must hold beside the prompt."""
        return max(self.max_response, self.held_out_response)

    def missing(self) -> str | None:
        """One sentence on what this machine lacks to ask these prompts, or None."""
        return None

    def supply(self) -> tuple[int, int] | None:
        """How many training and held-out prompts there are; None when the task cannot say."""
        return None

    def judge(self, exp: Experiment) -> Iterable[Mistake]:
        """Mistakes between this task and the rest of the experiment, under their full keys."""
        supply = self.supply()
        if supply is not None and exp.eval.prompts > supply[1]:
            message = f"{exp.eval.prompts} is more than the {supply[1]} held-out prompts of task {self.name}"
            yield Mistake("eval.prompts", f"{message}; use at most {supply[1]}")

    def examples(self, seed: int, step: int, count: int, tokenizer: Tokenizer) -> list[tuple[Prompt, str]]:
        """`count` training prompts with their right answers, for the warm-up; empty when the task has none."""
        return []

    def score(self, groups: Sequence[Group], tokenizer: Tokenizer) -> list[Group]:
        """The groups with rewards, parts and texts filled in."""
        scored = [self._score(group, tokenizer) for group in groups]
        answers = sum(len(group.samples) for group in scored)
        if answers and sum(group.errors for group in scored) == answers:
            raise RunError(
                f"task.reward: the reward of task {self.name} failed on all {answers} answers, so there is nothing to "
                "learn from; the warnings above say why"
            )
        return scored

    def _score(self, group: Group, tokenizer: Tokenizer) -> Group:
        texts = tuple(tokenizer.decode(sample.tokens_T) for sample in group.samples)
        scores, errors = [], 0
        for text, sample in zip(texts, group.samples, strict=True):
            try:
                scores.append(self.reward(group.prompt, text, sample.finish))
            except (Exception, SystemExit) as error:  # the user's code: count it, keep its message, go on
                errors += 1
                scores.append(Score(0.0, False, {}))
                self._report(error)
        names = sorted({name for score in scores for name in score.parts})
        parts = {name: np.array([score.parts.get(name, 0.0) for score in scores]) for name in names}
        parts["correct"] = np.array([float(score.correct) for score in scores])
        return dataclasses.replace(
            group, rewards_G=np.array([score.reward for score in scores]), parts=parts, errors=errors, texts=texts
        )

    def _report(self, error: BaseException) -> None:
        import logging

        logging.getLogger("lpexp").warning("reward of task %s raised %s: %s", self.name, type(error).__name__, error)


class Warmup(Spec):
    """Supervised warm-up from scratch: until sampled accuracy reaches `target`, at most `max_steps`."""

    target: float = Field(default=0.15, gt=0, lt=1)
    max_steps: int = Field(default=400, ge=1)
    batch_size: int = Field(default=64, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    check_every: int = Field(default=10, ge=1)


Task.model_rebuild()


def words(count: int, *key: object) -> np.ndarray:
    """uint64 [count]: random words that are a function of the key alone, on every machine (SHAKE-128)."""
    name = "\x1f".join(str(part) for part in key)
    return np.frombuffer(hashlib.shake_128(name.encode()).digest(8 * count), "<u8")


def is_held_out(text: str, one_in: int = 8) -> bool:
    """A fixed eighth of all prompts, by hash of their text."""
    return hashlib.blake2b(text.encode(), digest_size=4).digest()[0] % one_in == 0
