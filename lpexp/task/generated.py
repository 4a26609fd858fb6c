"""Tasks whose prompts are made, not read: each is a function of (seed, step, index) through a hash.

The hash is SHAKE-128, so prompts are the same under every version of numpy and on every machine. A prompt is drawn
until it lies on the wanted side of the held-out split and is new within its step. The reward is
0.2 x the share of right positions + 0.8 x exact.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from lpexp.config import rule
from lpexp.data import Prompt
from lpexp.errors import ConfigError, Mistake
from lpexp.task import HELD_OUT, Score, Task, is_held_out, words

if TYPE_CHECKING:
    from lpexp.model.tokenizer import Tokenizer

PARTIAL, EXACT = 0.2, 0.8
COUNTED = 1 << 14  # spaces up to this size are counted exactly by listing them


class Generated(Task):
    """A task that can make any number of prompts with their right answers."""

    ABSTRACT: ClassVar[bool] = True

    @abstractmethod
    def size(self) -> int:
        """How many different prompts there are."""

    @abstractmethod
    def texts(self) -> Iterator[str]:
        """Every prompt text once; asked only of small spaces."""

    @abstractmethod
    def draw(self, *key: object) -> str:
        """The prompt text of a key, uniform over all texts or nearly so."""

    @abstractmethod
    def solve(self, text: str) -> str:
        """The right answer."""

    @abstractmethod
    def longest(self) -> tuple[int, int]:
        """Most characters of a prompt, and of a right answer without the stop token."""

    def supply(self) -> tuple[int, int]:
        """How many training and held-out prompts there are; estimated low where they are too many to list."""
        if self.size() > COUNTED:
            return self.size() * 3 // 4, self.size() // 10  # of 7/8 and 1/8: at COUNTED already 9 sigma away
        return _listed(self)  # pyright: ignore[reportArgumentType]  # a frozen Spec hashes

    def train(self, seed: int, step: int, tokenizer: Tokenizer) -> list[Prompt]:
        texts = self._draw_distinct(self.prompts_per_step, False, "train", seed, step)
        return self._prompts(texts, step * self.prompts_per_step, tokenizer)

    def held_out(self, seed: int, count: int, tokenizer: Tokenizer) -> list[Prompt]:
        return self._prompts(self._draw_distinct(count, True, "held-out", seed), HELD_OUT, tokenizer)

    def examples(self, seed: int, step: int, count: int, tokenizer: Tokenizer) -> list[tuple[Prompt, str]]:
        prompts = self._prompts(self._draw_distinct(count, False, "warmup", seed, step), step * count, tokenizer)
        return [(prompt, prompt.answer) for prompt in prompts]

    def reward(self, prompt: Prompt, answer: str, finish: str) -> Score:
        """0.2 x right positions / length + 0.8 x exact; a truncated answer is not exact, whatever it says."""
        right = sum(given == wanted for given, wanted in zip(answer, prompt.answer, strict=False))
        partial, exact = right / len(prompt.answer), finish == "stop" and answer == prompt.answer
        return Score(PARTIAL * partial + EXACT * exact, exact, {"partial": partial, "exact": float(exact)})

    def _draw_distinct(self, count: int, held_out: bool, *key: object) -> list[str]:
        """`count` different texts of one side; ConfigError when there are not so many."""
        side, available = ("held-out", self.supply()[1]) if held_out else ("training", self.supply()[0])
        if count > available:
            message = f"{self.name} has {available} different {side} prompts, but {count} are asked for"
            raise ConfigError([Mistake("task", message)])
        texts: dict[str, None] = {}
        for attempt in itertools.count():
            text = self.draw(self.name, *key, attempt)
            if is_held_out(text) == held_out:
                texts.setdefault(text)
                if len(texts) == count:
                    return list(texts)
        raise AssertionError("unreachable")

    def _prompts(self, texts: list[str], first: int, tokenizer: Tokenizer) -> list[Prompt]:
        return [
            Prompt(first + index, tuple(tokenizer.encode_prompt(text)), text, self.solve(text))
            for index, text in enumerate(texts)
        ]

    @rule
    def _fits(self) -> Iterator[Mistake]:
        prompt, answer = self.longest()
        if self.max_prompt < prompt:
            yield Mistake("max_prompt", f"{self.max_prompt} is less than a prompt's {prompt} characters; use {prompt}")
        if self.max_response < answer + 1:
            message = f"{self.max_response} is less than a right answer's {answer} characters and its stop token"
            yield Mistake("max_response", f"{message}; use {answer + 1}")

    @rule
    def _enough(self) -> Iterator[Mistake]:
        if self.size() == 0:
            return  # another rule says why
        train, held_out = self.supply()
        if self.prompts_per_step > train:
            yield Mistake("prompts_per_step", f"{self.prompts_per_step} is more than all {train} training prompts")
        if held_out == 0:
            yield Mistake("", f"none of the {self.size()} possible prompts is held out; make the task larger")
        if self.warmup and self.warmup.batch_size > train:
            yield Mistake("warmup.batch_size", f"{self.warmup.batch_size} is more than all {train} training prompts")


class Letters(Generated):
    """Prompts `letters>` over the first `alphabet` letters of a-z."""

    ABSTRACT: ClassVar[bool] = True
    length: int = Field(6, ge=1, le=16)
    alphabet: int = Field(26, ge=2, le=26)
    distinct: bool = True  # no letter comes twice in a prompt

    def size(self) -> int:
        return math.perm(self.alphabet, self.length) if self.distinct else self.alphabet**self.length

    def texts(self) -> Iterator[str]:
        letters = _letters(self.alphabet)
        every = (itertools.permutations if self.distinct else _repeated)(letters, self.length)
        return ("".join(word) + ">" for word in every)

    def draw(self, *key: object) -> str:
        left, word = list(_letters(self.alphabet)), ""
        for random in words(self.length, *key).tolist():
            place = random % len(left)
            word += left.pop(place) if self.distinct else left[place]
        return word + ">"

    def longest(self) -> tuple[int, int]:
        return self.length + 1, self.length

    @rule
    def _distinct_letters(self) -> Iterator[Mistake]:
        if self.distinct and self.length > self.alphabet:
            yield Mistake(
                "length",
                f"{self.length} distinct letters cannot come from alphabet {self.alphabet}; use distinct=false",
            )


@functools.lru_cache(maxsize=16)
def _listed(task: Generated) -> tuple[int, int]:
    held_out = sum(is_held_out(text) for text in task.texts())
    return task.size() - held_out, held_out


def _repeated(letters: str, length: int) -> Iterator[tuple[str, ...]]:
    return itertools.product(letters, repeat=length)


def _letters(count: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[:count]
