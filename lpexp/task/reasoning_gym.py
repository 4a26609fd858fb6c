"""reasoning_gym: the procedural data sets of the package reasoning-gym, each with its own scorer.

A question is a function of (data set, options, seed), and its seed of (the run's seed, step, attempt) through a hash:
drawn until it lies on the wanted side of the held-out split, is new within its step and fits `max_prompt`.
The data set's `score_answer` judges what `extract` takes from the answer; an answer that was cut scores 0.
Left out: curricula, mixtures of data sets, the package's `seed` and `size`, data sets whose questions depend on
Python's hash seed.
Source: reasoning-gym 0.1.25, arXiv 2505.24760.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lpexp.config import nearest, rule
from lpexp.data import Prompt
from lpexp.errors import ConfigError, Mistake
from lpexp.task import HELD_OUT, Score, Task, is_held_out, words

if TYPE_CHECKING:
    from lpexp.experiment import Experiment
    from lpexp.model.tokenizer import Tokenizer

OWN = ("seed", "size")  # options that the task sets
# Their questions differ between processes (they iterate over sets of strings), so a resumed run would see others.
UNSTABLE = ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")
PATIENCE = 200  # draws for each wanted prompt before the data set is called too small
NUMBER = re.compile(r"-?\d+(?:[.,/]\d+)*")


class ReasoningGym(Task):
    """One data set of reasoning-gym with its options."""

    dataset: str = Field(min_length=1)
    options: dict[str, Any] = {}
    system: str | None = None  # the system message; None: the chat template's own
    shots: int = Field(0, ge=0, le=16)  # worked examples before the question, the same in every prompt
    held_out_one_in: int = Field(8, ge=2, le=256)  # by hash of the question; a small data set may hold out more
    extract: Literal["whole", "tag", "number"] = "whole"  # of the answer: all, inside <answer>, the last number

    def judge(self, exp: Experiment) -> Iterator[Mistake]:
        yield from super().judge(exp)
        if exp.model.sized().path is None:
            message = f"{self.dataset!r} asks through a chat template, which a model without model.path does not have"
            yield Mistake("task.dataset", f"{message}; set model.path, or choose model=smollm2_135m")

    def train(self, seed: int, step: int, tokenizer: Tokenizer) -> list[Prompt]:
        return self._draw(self.prompts_per_step, False, step * self.prompts_per_step, tokenizer, "train", seed, step)

    def held_out(self, seed: int, count: int, tokenizer: Tokenizer) -> list[Prompt]:
        return self._draw(count, True, HELD_OUT, tokenizer, "held-out", seed)

    def reward(self, prompt: Prompt, answer: str, finish: str) -> Score:
        """What the data set's own scorer says, 0 to 1; correct at 1. An answer that was cut is worth 0."""
        assert prompt.source is not None, "a prompt of this task knows its seed"
        given = self.extracted(answer)
        dataset, entry = self._entry(prompt.source)
        score = float(dataset.score_answer(given, entry)) if given is not None and finish == "stop" else 0.0
        if not math.isfinite(score):
            raise ValueError(f"the scorer of {self.dataset} returned {score}")
        return Score(score, score >= 1, {"exact": float(score >= 1), "format": float(given is not None)})

    def extracted(self, answer: str) -> str | None:
        """What is scored; None when the answer has no such part."""
        if self.extract == "whole":
            return answer.strip()
        if self.extract == "tag":
            from reasoning_gym.utils import extract_answer

            return extract_answer(answer)
        found = NUMBER.findall(answer)
        return found[-1] if found else None

    def _draw(self, count: int, held_out: bool, first: int, tokenizer: Tokenizer, *key: object) -> list[Prompt]:
        """`count` different prompts of one side; ConfigError when the data set does not have so many."""
        made: dict[str, Prompt] = {}
        before, shown = self._before()
        too_long = 0
        for attempt in range(PATIENCE * count):
            source = _source(*key, attempt)
            entry = self._entry(source)[1]
            text = entry["question"]
            if is_held_out(text, self.held_out_one_in) != held_out or text in made or text in shown:
                continue
            asked = [*before, {"role": "user", "content": text}]
            tokens = tuple(tokenizer.encode_prompt(asked, chat=True))
            if len(tokens) > self.max_prompt:
                too_long += 1
                continue
            made[text] = Prompt(first + len(made), tokens, text, str(entry["answer"]), source)
            if len(made) == count:
                return list(made.values())
        side, drawn = "held-out" if held_out else "training", PATIENCE * count
        message = f"{self.dataset} gave {len(made)} different {side} prompts in {drawn} draws, {count} are needed"
        if too_long:
            message += f"; {too_long} had more than max_prompt={self.max_prompt} tokens"
        raise ConfigError([Mistake("task.options", f"{message}; ask for fewer, or widen the options")])

    def _before(self) -> tuple[list[dict[str, str]], set[str]]:
        """The messages before every question, and the questions among them, which are never asked."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        shown: set[str] = set()
        for attempt in range(PATIENCE * self.shots):
            if len(shown) == self.shots:
                break
            entry = self._entry(_source("shot", attempt))[1]
            if entry["question"] not in shown:
                shown.add(entry["question"])
                messages.append({"role": "user", "content": entry["question"]})
                messages.append({"role": "assistant", "content": str(entry["answer"])})
        return messages, shown

    def _entry(self, source: int) -> tuple[Any, dict[str, Any]]:
        return _entry(self.dataset, json.dumps(self.options, sort_keys=True), source)

    @rule
    def _known(self) -> Iterator[Mistake]:
        if importlib.util.find_spec("reasoning_gym") is None:
            yield Mistake("dataset", "needs the package reasoning-gym; pip install 'lpexp[reasoning-gym]'")
            return
        from reasoning_gym.factory import DATASETS

        if self.dataset not in DATASETS or self.dataset == "composite":
            near = nearest(self.dataset, DATASETS, cutoff=0.0)
            yield Mistake("dataset", f"reasoning-gym has no {self.dataset!r}; the nearest is {near}")
            return
        if self.dataset in UNSTABLE:
            message = (
                f"{self.dataset!r} asks other questions in each process, so a run could not be resumed or repeated"
            )
            yield Mistake("dataset", f"{message}; choose another")
            return
        known = {field.name for field in dataclasses.fields(DATASETS[self.dataset][1])} - {*OWN}
        for name in sorted(set(self.options) - known):
            near = nearest(name, known)
            hint = f"did you mean {near!r}?" if near else f"it has {', '.join(sorted(known)) or 'none'}"
            why = "is set by the run" if name in OWN else f"is no option of {self.dataset}; {hint}"
            yield Mistake(f"options.{name}", why)
        if not set(self.options) - known:
            try:
                self._entry(0)
            except Exception as error:  # the data set's own assertions, and whatever wrong types lead to
                said = str(error) or type(error).__name__
                yield Mistake("options", f"{self.dataset} refuses {self.options}: {said}")

    @rule
    def _no_warmup(self) -> Iterator[Mistake]:
        if self.warmup is not None:
            yield Mistake("warmup", "reasoning-gym tasks start from a trained model; use task.warmup=null")


def _source(*key: object) -> int:
    """The seed behind a key; below 2**32, as numpy's generators ask."""
    return int(words(1, "reasoning_gym", *key)[0]) % 2**32


@functools.lru_cache(maxsize=4096)
def _entry(dataset: str, options: str, source: int) -> tuple[Any, dict[str, Any]]:
    """(data set, its one entry): a data set of one question for each seed, because some make all theirs at once."""
    import reasoning_gym

    made = reasoning_gym.create_dataset(dataset, seed=source, size=1, **json.loads(options))
    return made, made[0]
