"""prompts: your own questions from a JSONL or parquet file, with a reward by math-verify or by any function.

A row has a prompt (a text, or a list of {"role", "content"} messages) and a label. Held-out prompts come from
`held_out_path`, or are the eighth of `path` that the hash split chooses. Each epoch is shuffled by (seed, epoch); the
last rows of an epoch that fill no step are left out, so no step shows a prompt twice.
Left out: other columns, weights of sources, several files, images.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from pydantic import Field

from lpexp import hub
from lpexp.config import rule
from lpexp.data import Prompt
from lpexp.errors import ConfigError, Mistake
from lpexp.task import HELD_OUT, Score, Task, is_held_out, words

if TYPE_CHECKING:
    from lpexp.experiment import Experiment
    from lpexp.model.tokenizer import Tokenizer

SHOWN = 3  # bad rows that are named one by one
TIMEOUT_S = 5  # of one parse or comparison by math-verify

Messages = tuple[tuple[str, str], ...]  # (role, content)
RewardFunction = Callable[[str, str, str], float]  # (prompt text, answer, label) -> reward


class Row(NamedTuple):
    """One question of the file; `line` counts from 1."""

    line: int
    prompt: str | Messages
    label: str

    @property
    def text(self) -> str:
        """What the split hashes and the reward sees: the prompt, or the contents of its messages, one a line."""
        return self.prompt if isinstance(self.prompt, str) else "\n".join(content for _, content in self.prompt)


class Prompts(Task):
    """Questions from a file."""

    path: str | None  # a file, or hub:OWNER/NAME/FILE of a data set in the Hugging Face cache
    held_out_path: str | None = None
    prompt_key: str = Field("prompt", min_length=1)
    label_key: str = Field("label", min_length=1)
    reward_by: str = Field("math", alias="reward", min_length=1)  # the key is `reward`; the method has the name
    chat_template: bool = True
    max_response_held_out: int | None = Field(None, ge=1)  # tokens; None: max_response

    @property
    def held_out_response(self) -> int:
        return self.max_response_held_out or self.max_response

    def missing(self) -> str | None:
        absent = [path for path in (self.path, self.held_out_path) if path is not None and _located(path) is None]
        typed = " && ".join(hub.command(path) for path in absent)
        return f"the prompts of task={self.name} are not here yet; type: {typed}" if absent else None

    def supply(self) -> tuple[int, int] | None:
        return None if self.missing() else (len(self._rows(False)), len(self._rows(True)))

    def judge(self, exp: Experiment) -> Iterator[Mistake]:
        yield from super().judge(exp)
        if exp.model.sized().path is None and not self.missing():
            yield from self._fits_characters()

    def train(self, seed: int, step: int, tokenizer: Tokenizer) -> list[Prompt]:
        kept = _tokenize(self, False, tokenizer)  # pyright: ignore[reportArgumentType]  # frozen: hashes
        if len(kept) < self.prompts_per_step:
            short = f"all {len(kept)} training prompts of at most max_prompt={self.max_prompt} tokens"
            raise ConfigError([Mistake("task.prompts_per_step", f"{self.prompts_per_step} is more than {short}")])
        epoch, at = divmod(step, len(kept) // self.prompts_per_step)
        order = _shuffled(len(kept), "prompts", seed, epoch)[at * self.prompts_per_step :][: self.prompts_per_step]
        return [_prompt(step * self.prompts_per_step + index, *kept[row]) for index, row in enumerate(order)]

    def held_out(self, seed: int, count: int, tokenizer: Tokenizer) -> list[Prompt]:
        kept = _tokenize(self, True, tokenizer)  # pyright: ignore[reportArgumentType]
        if len(kept) < count:
            raise ConfigError([Mistake("eval.prompts", f"{count} is more than all {len(kept)} held-out prompts")])
        order = _shuffled(len(kept), "held-out prompts", seed)[:count]
        return [_prompt(HELD_OUT + index, *kept[row]) for index, row in enumerate(order)]

    def reward(self, prompt: Prompt, answer: str, finish: str) -> Score:
        """By math-verify 1 or 0, else what the function says; a truncated answer is never correct."""
        if self.reward_by == "math":
            boxed, equal = math_equal(answer, prompt.answer)
            correct = equal and finish == "stop"
            return Score(float(correct), correct, {"exact": float(correct), "format": float(boxed)})
        value = import_reward(self.reward_by)(prompt.text, answer, prompt.answer)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{self.reward_by} returned {value!r}, not a finite number")
        return Score(float(value), value >= 1 and finish == "stop", {})

    @rule
    def _files(self) -> Iterator[Mistake]:
        if self.path is None:
            yield Mistake("path", "is missing; name a JSONL or parquet file: task.path=FILE")
            return
        for key, path in (("path", self.path), ("held_out_path", self.held_out_path)):
            if path is not None and _located(path) is not None:
                for column, message in self._read(path)[1]:
                    yield Mistake(column or key, message)

    @rule
    def _split(self) -> Iterator[Mistake]:
        if any(True for _ in self._files()) or self.missing():
            return
        training, held_out = self._rows(False), self._rows(True)
        if self.held_out_path is not None:
            seen = {row.text: row.line for row in training}
            both = [(seen[row.text], row.line) for row in held_out if row.text in seen]
            if both:
                message = (
                    f"{len(both)} of its prompts are in {self.path} too (line {both[0][1]} is line {both[0][0]} there)"
                )
                yield Mistake("held_out_path", f"{self.held_out_path}: {message}; take them out of one file")
        elif not held_out:
            yield Mistake(
                "path", f"{self.path}: the hash split holds out none of its {len(training)} prompts; set held_out_path"
            )
        if self.prompts_per_step > len(training):
            yield Mistake(
                "prompts_per_step", f"{self.prompts_per_step} is more than all {len(training)} training prompts"
            )

    @rule
    def _reward_exists(self) -> Iterator[Mistake]:
        if self.reward_by == "math":
            if importlib.util.find_spec("math_verify") is None:
                yield Mistake("reward", "math needs the package math-verify; pip install 'lpexp[math]'")
            return
        try:
            import_reward(self.reward_by)
        except Exception as error:  # importing runs the user's module, which may raise anything
            yield Mistake("reward", f"{self.reward_by!r} {error}; use math, or package.module:function")

    @rule
    def _no_warmup(self) -> Iterator[Mistake]:
        if self.warmup is not None:
            yield Mistake("warmup", "labels are no full answers to warm up on; use task.warmup=null")

    def _fits_characters(self) -> Iterator[Mistake]:
        """A model that starts from scratch reads characters: no chat, and no character outside the table."""
        from lpexp.model.tokenizer import CharTokenizer

        if self.chat_template:
            message = "true, but a model without model.path has the character tokenizer, which has no chat template"
            yield Mistake("task.chat_template", f"{message}; use false, or set model.path")
            return
        for key, held_out in (
            ("task.path", False),
            ("task.held_out_path" if self.held_out_path else "task.path", True),
        ):
            for row in self._rows(held_out):
                try:
                    CharTokenizer().encode(row.text)
                except ValueError as error:
                    path = self.held_out_path if key == "task.held_out_path" else self.path
                    yield Mistake(key, f"{path}, line {row.line}: {error}; a model without model.path knows no others")
                    return

    def _rows(self, held_out: bool) -> list[Row]:
        """The rows of one side of the split."""
        assert self.path is not None
        if self.held_out_path is not None:
            return list(self._read(self.held_out_path if held_out else self.path)[0])
        return [row for row in self._read(self.path)[0] if is_held_out(row.text) == held_out]

    def _read(self, path: str) -> tuple[tuple[Row, ...], tuple[tuple[str, str], ...]]:
        found = _located(path)
        assert found is not None, f"{path} is not here, which `missing` says"
        try:
            stat = Path(found).stat()
        except OSError as error:
            return (), (("", f"{path} cannot be read: {error.strerror}"),)
        return _read(found, self.prompt_key, self.label_key, self.chat_template, stat.st_mtime_ns, stat.st_size)


def _located(path: str) -> str | None:
    """The file itself, or where the Hugging Face cache has it; None while it is not there."""
    if not hub.FILE.fullmatch(path):
        return path
    found = hub.file(path)
    return None if found is None else str(found)


def math_equal(answer: str, label: str) -> tuple[bool, bool]:
    r"""(has the answer a \boxed{...} that parses, is the last one equal to the label).

    TimeoutError after 5 s; ValueError for a label that cannot be parsed. Main thread only: math-verify uses SIGALRM.
    """
    import math_verify
    from math_verify.errors import TimeoutException

    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math-verify's time limit works in the main thread only")

    def parse(text: str) -> list[Any]:
        return math_verify.parse(rf"\boxed{{{text}}}", parsing_timeout=TIMEOUT_S, raise_on_error=True)

    boxed = last_boxed(answer)
    if boxed is None:
        return False, False
    try:
        gold = parse(last_boxed(label) or label.strip().strip("$"))
        if not gold:
            raise ValueError(f"math-verify cannot parse the label {label!r}")
        try:
            given = parse(boxed)
            return bool(given), math_verify.verify(gold, given, timeout_seconds=TIMEOUT_S, raise_on_error=True)
        except Exception:  # sympy raises anything on what a model may write: a wrong answer, not a broken reward
            return False, False
    except TimeoutException as error:  # a BaseException there
        raise TimeoutError(f"math-verify took over {TIMEOUT_S} s on {boxed!r}: {error}") from None


def last_boxed(text: str) -> str | None:
    r"""What stands between the braces of the last \boxed{...}; None when there is none, or it never closes."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth = 1
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[start:at]
    return None


@functools.cache
def import_reward(name: str) -> RewardFunction:
    """The function behind "package.module:function"; ImportError says what is wrong with the name."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ImportError("is no package.module:function")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        raise ImportError(f"cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(found):
        raise ImportError(f"is not there: {module} has no function {function}")
    return cast(RewardFunction, found)


@functools.lru_cache(maxsize=8)
def _read(
    path: str, prompt_key: str, label_key: str, chat: bool, mtime_ns: int, size: int
) -> tuple[tuple[Row, ...], tuple[tuple[str, str], ...]]:
    """The rows of a file and its mistakes (key, or "" for the file itself; message); times and size guard the cache."""
    rows: list[Row] = []
    bad: list[tuple[str, str]] = []
    first: dict[str, Row] = {}
    repeated = 0
    try:
        records = list(_parquet(path, prompt_key, label_key) if path.endswith(".parquet") else _jsonl(path))
    except (OSError, UnicodeDecodeError) as error:
        return (), (("", f"{path} cannot be read: {error}"),)
    if not records:
        return (), (("", f"{path} is empty; it needs one question a line"),)
    for line, record in records:
        try:
            row = _row(line, record, prompt_key, label_key, chat)
        except _BadRow as error:
            if not (error.key and error.key in dict(bad)):  # a wrong key is wrong in every row: said once
                bad.append((error.key, f"{path}, line {line}: {error}"))
            continue
        before = first.setdefault(row.text, row)
        if before is row:
            rows.append(row)
        elif before.label == row.label:
            repeated += 1
        else:
            message = f"the same prompt as line {before.line}, with label {row.label!r} instead of {before.label!r}"
            bad.append(("", f"{path}, line {line}: {message}"))
    if repeated:
        logging.getLogger("lpexp").warning("%s: left out %d rows that repeat an earlier one", path, repeated)
    if len(bad) > SHOWN:
        bad[SHOWN:] = [("", f"{path}: {len(bad) - SHOWN} more rows are wrong")]
    return tuple(rows), tuple(bad)


class _BadRow(Exception):
    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key


def _jsonl(path: str) -> Iterator[tuple[int, Any]]:
    with Path(path).open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            if text.strip():
                try:
                    yield line, json.loads(text)
                except json.JSONDecodeError as error:
                    yield line, error


def _parquet(path: str, *keys: str) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        known = pyarrow.parquet.read_schema(path).names
        table = pyarrow.parquet.read_table(path, columns=[key for key in keys if key in known])
    except pyarrow.ArrowInvalid as error:
        raise OSError(f"no parquet file ({error})") from None
    missing = {key for key in keys if key not in known}
    if missing and table.num_rows:  # once is enough: every row lacks it
        yield 1, dict.fromkeys(known)
        return
    yield from enumerate(table.to_pylist(), start=1)


def _row(line: int, record: Any, prompt_key: str, label_key: str, chat: bool) -> Row:
    if isinstance(record, json.JSONDecodeError):
        raise _BadRow("", f"no JSON ({record.msg} at column {record.colno})")
    if not isinstance(record, dict):
        raise _BadRow("", f"a row is an object with {prompt_key!r} and {label_key!r}, not {json.dumps(record)[:60]}")
    for name, key in (("prompt_key", prompt_key), ("label_key", label_key)):
        if key not in record:
            raise _BadRow(name, f"has no {key!r}; its columns are {', '.join(sorted(record)) or 'none'}")
    prompt, label = record[prompt_key], record[label_key]
    if isinstance(prompt, list):
        if not chat:
            raise _BadRow("chat_template", f"{prompt_key!r} is a list of messages; use task.chat_template=true")
        try:
            prompt = tuple((str(message["role"]), str(message["content"])) for message in prompt)
        except (TypeError, KeyError):
            raise _BadRow("", f"{prompt_key!r} is a list, but not of {{'role', 'content'}} messages") from None
    elif not isinstance(prompt, str):
        raise _BadRow("", f"{prompt_key!r} is neither a text nor a list of messages, but {prompt!r}")
    if not prompt:
        raise _BadRow("", f"{prompt_key!r} is empty")
    if label is None or (isinstance(label, float) and not math.isfinite(label)):
        raise _BadRow("", f"{label_key!r} is {label!r}")
    return Row(line, prompt, label if isinstance(label, str) else json.dumps(label))


@functools.lru_cache(maxsize=4)
def _tokenize(task: Prompts, held_out: bool, tokenizer: Tokenizer) -> list[tuple[Row, tuple[int, ...]]]:
    """The rows of one side with their tokens; those over `max_prompt` are left out, and their number is logged."""
    rows = task._rows(held_out)
    kept = []
    for row in rows:
        asked = row.prompt if isinstance(row.prompt, str) else [{"role": r, "content": c} for r, c in row.prompt]
        tokens = tuple(tokenizer.encode_prompt(asked, chat=task.chat_template))
        if len(tokens) <= task.max_prompt:
            kept.append((row, tokens))
    if len(kept) < len(rows):
        side = "held-out" if held_out else "training"
        logging.getLogger("lpexp").warning(
            "task %s: left out %d of %d %s prompts, longer than max_prompt=%d tokens",
            task.name, len(rows) - len(kept), len(rows), side, task.max_prompt,
        )  # fmt: skip
    return kept


def _shuffled(count: int, *key: object) -> np.ndarray:
    """int64 [count]: an order of 0..count-1 that is a function of the key alone."""
    return np.argsort(words(count, *key), kind="stable")


def _prompt(id: int, row: Row, tokens: tuple[int, ...]) -> Prompt:
    return Prompt(id, tokens, row.text, row.label)
