"""`lpexp eval CHECKPOINT ... --precisions P ...`: the same weights under several serving precisions, as a matrix.

A row is a checkpoint: of a run (the newest that verifies), or a Hugging Face directory. A column is a precision that
serves it. Every cell answers the same held-out prompts with the same random numbers; the tokens that it sampled are
scored again under bf16, so d = lp_bf16 - lp_served. A quantised directory is served as it is stored, and in bf16 from
its dequantised values. The engine and every formula are the training run's own (rollout/embedded.py, metric/).
Left out: several engines, quantising a second time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lpexp import journal
from lpexp.config import load, resolve
from lpexp.data import Group, Metrics, Prompt
from lpexp.errors import ConfigError, Mistake
from lpexp.experiment import Experiment
from lpexp.export import WORDS, Saved, chosen, judge, saved, weights
from lpexp.groups import compose
from lpexp.metric.interval import effective, wilson
from lpexp.metric.mismatch import mismatch_metrics
from lpexp.metric.reward import eval_metrics
from lpexp.model import Model
from lpexp.model.served import agrees, precision_of
from lpexp.plan import table
from lpexp.precision import Parts, Precision
from lpexp.precision.bf16 import Bf16
from lpexp.rollout import Sampling
from lpexp.task import Task

if TYPE_CHECKING:
    from lpexp.rollout.embedded import EmbeddedEngine

BF16 = Bf16(name="bf16")
SET = "held_out"
PIECE = 64  # prompts answered between two signs of progress; changes no result
ROWS = 16  # sequences scored at once
STEP = 0  # of the random numbers: every cell draws with the same ones
# What the console shows: title, and how a cell's numbers are written.
SHOWN = (
    ("accuracy, greedy (95 % interval)", lambda cell: _share(cell, "greedy_acc")),
    ("accuracy, sampled (95 % interval)", lambda cell: _share(cell, "sampled_acc")),
    ("mean log-prob of its own sampled answers, a token (nat)", lambda cell: f"{cell['logprob_mean']:.4f}"),
    ("mismatch against bf16, mean |d| (nat)", lambda cell: _gap(cell["logprob_abs_diff_mean"])),
    ("mismatch against bf16, KL k3 (nat)", lambda cell: _gap(cell["kl_k3"])),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", type=Path, nargs="+", metavar="RUN_OR_DIR", help="rows: runs or model directories")
    own = "columns; without it bf16 and what each checkpoint was trained or stored in"
    parser.add_argument("--precisions", nargs="+", default=[], metavar="P", help=f"{own}. Each {WORDS}")
    parser.add_argument("--task", nargs="+", default=[], metavar="T", help="NAME [KEY=VALUE ...]; else the run's")
    parser.add_argument("--prompts", type=_positive, default=256, help="held-out prompts (256)")
    parser.add_argument("--samples", type=_positive, default=4, help="sampled answers a prompt (4)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampled answers (1.0)")
    parser.add_argument("--seed", type=_natural, default=1, help="of prompts and sampling (1)")
    parser.add_argument("--slots", type=_positive, default=128, help="sequences generated at once; changes no result")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every number, written when all are known")


def main(args: argparse.Namespace) -> int:
    if args.temperature <= 0:
        raise ConfigError(f"--temperature: {args.temperature:g} is not above 0; greedy answers are measured anyway")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise ConfigError(
            f"--json: {args.json} cannot be a file: {args.json.parent} is no directory, or it is one itself"
        )
    columns = chosen("precision", args.precisions, Precision, "--precisions")
    rows = [opened(source) for source in dict.fromkeys(args.sources)]
    task = _task(rows, args.task)
    columns = list(dict(columns or _own(rows)).items())
    cells = [cell for row in rows for cell in _cells(row, columns)]  # every refusal comes before the first answer
    experiments = {row.name: _experiment(row, task, args) for row in rows}
    found: list[dict[str, Any]] = []
    with _Progress(len(cells) * -(-args.prompts // PIECE)) as progress:
        for row in rows:
            mine = [name for at, name in cells if at == row.name]
            found += _measure(row, experiments[row.name], mine, dict(columns), args, progress)
    told = f"{task.name}, {args.prompts} held-out prompts, seed {args.seed}; 1 greedy and {args.samples} sampled "
    print(f"{told}answers a prompt, temperature {args.temperature:g}\n\n{_tables(rows, columns, found)}")
    if args.json:
        facts = {"task": task.dump(), "prompts": args.prompts, "samples": args.samples, "seed": args.seed}
        facts |= {"temperature": args.temperature, "checkpoints": [row.facts() for row in rows]}
        facts |= {"precisions": {name: precision.dump() for name, precision in columns}, "cells": found}
        journal.write(args.json, json.dumps(facts, indent=1) + "\n")
    return 0


# -- rows --------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One checkpoint: a run's, or a directory."""

    name: str  # as it was typed
    model: Model
    native: Precision  # trained in, or stored in
    saved: Saved | None  # None: a directory
    stored: bool  # a directory whose own quantised parts are served

    def facts(self) -> dict[str, Any]:
        step = self.saved.step if self.saved else None
        return {"name": self.name, "step": step, "stored": self.stored, "native": self.native.dump()}

    def label(self) -> str:
        return f"{self.name} ({'' if self.stored or not self.saved else f'step {self.saved.step}, '}{self.native.name})"


def opened(source: Path) -> Row:
    """ConfigError when this is neither a run with a checkpoint nor a model directory."""
    from lpexp.model.hf import CONFIG, read_model

    if not (source / CONFIG).exists():
        if source.is_dir() and not (source / "checkpoints").exists() and not (source / "metrics.jsonl").exists():
            raise ConfigError(
                f"{source} is neither a run nor a model directory: it has no checkpoints/ and no {CONFIG}"
            )
        found = saved(source)
        return Row(str(source), found.model, found.precision, found, False)
    model = read_model(source)
    native = precision_of(source, model)
    covered = [param for param in model.params() if native.covers(param, model.moe is not None)]
    return Row(str(source), model, native, None, bool(covered))


def _task(rows: Sequence[Row], words: Sequence[str]) -> Task:
    """The task that was typed, or the one that every run among the rows was trained on."""
    if words:
        named = chosen("task", words, Task, "--task")
        if len(named) > 1:
            raise ConfigError(f"--task: {', '.join(name for name, _ in named)}: rows share one task; name one")
        return named[0][1]
    tasks = {row.name: _written(row.saved.experiment["task"]) for row in rows if row.saved}
    if not tasks:
        raise ConfigError("--task: a model directory does not say what it was trained on; type --task NAME")
    (first, task), *others = tasks.items()
    for name, other in others:
        if other != task:
            raise ConfigError(
                f"--task: {first} was trained on {task.name}, {name} on another task or other fields; type one"
            )
    return task


def _written(data: dict[str, Any]) -> Task:
    """The task of a run's config."""
    return load(data, resolve(data["_target_"], Task))  # type: ignore[return-value]


def _own(rows: Sequence[Row]) -> list[tuple[str, Precision]]:
    """bf16, and what each row was trained, served or stored in."""
    found: dict[str, Precision] = {BF16.name: BF16}
    for row in rows:
        served = row.saved.experiment["rollout"].get("precision") if row.saved else None
        for precision in (row.native, Precision.model_validate(served) if served else row.native):
            if precision not in found.values():
                found[_named(precision)] = precision
    return list(found.items())


def _named(precision: Precision) -> str:
    """The card's word and what differs from it, as a person would type it."""
    from lpexp.groups import choices, read_choice

    fields = {key: value for key, value in precision.dump().items() if key not in ("_target_", "name")}
    card = read_choice("precision", precision.name) if precision.name in choices("precision") else {}
    changed = [f"{key}={value}" for key, value in fields.items() if card.get(key) != value]
    return " ".join([precision.name, *changed])


def _cells(row: Row, columns: Sequence[tuple[str, Precision]]) -> Iterator[tuple[str, str]]:
    """(row, column) of what can be measured; ConfigError for what a person asked for and cannot be."""
    params, moe = list(row.model.params()), row.model.moe is not None
    for name, precision in columns:
        judge(precision, row.model, f"{row.name} cannot be served in {name}:")
        if row.stored and name != BF16.name and not agrees(precision, row.native, params, moe):
            continue  # would be quantised twice; the cell stays empty
        yield row.name, name
    if row.stored and not any(agrees(p, row.native, params, moe) for _, p in columns):
        own = _named(row.native)
        raise ConfigError(f"{row.name} is stored in {own} and served only so and in bf16; add --precisions {own}")


def _experiment(row: Row, task: Task, args: argparse.Namespace) -> Experiment:
    """What an engine is built from: this model, this task; judged as a run's would be."""
    from omegaconf import OmegaConf

    base: Any = OmegaConf.to_container(compose(["cluster=inline", "precision=bf16"]), resolve=True)
    base |= {"seed": args.seed, "task": task.dump(), "model": row.model.dump()}
    base["eval"] |= {"prompts": args.prompts, "samples": args.samples}
    base["task"]["prompts_per_step"] = 2  # of training, which this is not
    try:
        return load(base, Experiment)
    except ConfigError as error:
        flags = {"eval.prompts": "--prompts"}
        mistakes = [Mistake(flags.get(m.key, m.key), m.message) for m in error.mistakes]
        raise ConfigError(mistakes, f"{row.name} cannot be evaluated:") from None


# -- cells -------------------------------------------------------------------------------------------------------------


def _measure(
    row: Row,
    exp: Experiment,
    names: Sequence[str],
    precisions: dict[str, Precision],
    args: argparse.Namespace,
    progress: _Progress,
) -> list[dict[str, Any]]:
    """Every cell of a row; the weights are read once."""
    from lpexp.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(exp.model)
    prompts = exp.task.held_out(args.seed, args.prompts, tokenizer)
    if row.stored:
        from lpexp.rollout.embedded import stored_parts

        parts = stored_parts(row.name)
        values = {p.name: _side(row, p).dequantize(parts[p.name]) for p in row.model.params()}
    elif row.saved:
        parts, values = None, dict(weights(row.saved))
    else:
        from lpexp.model.hf import load_weights

        parts, values = None, load_weights(row.name, row.model)
    judge_by = _engine(exp, BF16, _shipped(row, values, BF16), args.slots)
    found = []
    for name in names:
        progress.say(f"{row.name} in {name}")
        precision = precisions[name]
        engine = judge_by
        if precision != BF16:
            own = parts is not None and agrees(
                precision, row.native, list(row.model.params()), row.model.moe is not None
            )
            engine = _engine(exp, precision, parts if own and parts else _shipped(row, values, precision), args.slots)
        cell = _cell(exp, engine, judge_by, prompts, tokenizer, args, progress)
        found.append({"checkpoint": row.name, "precision": name, **cell})
    return found


def _side(row: Row, param: Any) -> Precision:
    from lpexp.precision import side

    return side(param, row.native, row.model.moe is not None)


def _shipped(row: Row, values: dict[str, Any], precision: Precision) -> dict[str, Parts]:
    from lpexp.precision.wire import ship

    return {param.name: made for param, made in ship(values, row.model.params(), precision, row.model.moe is not None)}


def _engine(exp: Experiment, precision: Precision, parts: dict[str, Parts], slots: int) -> EmbeddedEngine:
    """An engine in this process that serves these parts."""
    from lpexp.precision.wire import freeze
    from lpexp.rollout.embedded import EmbeddedEngine

    rollout = exp.rollout.model_copy(update={"precision": precision})
    engine = EmbeddedEngine(exp.model_copy(update={"rollout": rollout}), slots, exp.cluster.threads, "auto")
    engine.load({name: freeze(one) for name, one in parts.items()}, 0)
    return engine


def _cell(
    exp: Experiment,
    engine: EmbeddedEngine,
    judge_by: EmbeddedEngine,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    args: argparse.Namespace,
    progress: _Progress,
) -> Metrics:
    """The numbers of one cell."""
    greedy: list[Group] = []
    sampled: list[Group] = []
    longest = exp.task.held_out_response
    drawn = Sampling(temperature=args.temperature, samples=args.samples, max_response=longest)
    for at in range(0, len(prompts), PIECE):
        piece = prompts[at : at + PIECE]
        greedy += engine.sample(piece, Sampling(temperature=0.0, max_response=longest), STEP)[0]
        sampled += engine.sample(piece, drawn, STEP)[0]
        progress.advance()
    greedy, sampled = (exp.task.score(groups, tokenizer) for groups in (greedy, sampled))
    scores = {key.rpartition("/")[2]: value for key, value in eval_metrics(SET, greedy, sampled).items()}
    lp_bf16, lp_served, mask, entropy = rescored(judge_by, sampled, args.temperature)
    gap = mismatch_metrics(lp_bf16, lp_served, mask, entropy)
    counts = {
        key: effective(np.stack([group.parts["correct"] for group in groups]))
        for key, groups in (("greedy_acc", greedy), ("sampled_acc", sampled))
    }
    intervals = {f"{key}_95": list(wilson(scores[key], count)) for key, count in counts.items()}
    kept = ("logprob_abs_diff_mean", "logprob_abs_diff_max", "kl_k3", "valid_tokens")
    gaps = {key: gap[f"mismatch/{key}"] for key in kept}
    return scores | intervals | {"logprob_mean": -gap["mismatch/rollout_log_ppl"]} | gaps


def rescored(
    engine: EmbeddedEngine, groups: Sequence[Group], temperature: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(log-probs under this engine's weights, those that the samples came with, mask, entropy), all [N, T]."""
    import torch

    from lpexp.model.decoder import token_logprobs

    rows = [(group.prompt.tokens, sample) for group in groups for sample in group.samples]
    width = max(len(prompt) + len(sample.tokens_T) for prompt, sample in rows)
    shape = (len(rows), width)
    tokens, mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
    served, scored, entropy = (np.zeros(shape, np.float32) for _ in range(3))
    for row, (prompt, sample) in enumerate(rows):
        start, stop = len(prompt), len(prompt) + len(sample.tokens_T)
        tokens[row, :start], tokens[row, start:stop] = prompt, sample.tokens_T
        mask[row, start:stop], served[row, start:stop] = True, sample.logprobs_T
    with torch.inference_mode():
        for at in range(0, len(rows), ROWS):
            part = slice(at, at + ROWS)
            held, on = torch.from_numpy(tokens[part]).to(engine.device), torch.from_numpy(mask[part]).to(engine.device)
            hidden = engine.decoder.hidden(engine.weights, held)
            logits = engine.decoder.head(engine.weights, hidden[:, :-1][on[:, 1:]])  # of the token before each
            found = token_logprobs(logits, held[on], temperature)
            for into, values in zip((scored, entropy), found, strict=True):
                into[part][mask[part]] = values.cpu().numpy()
    return scored, served, mask, entropy


# -- what is printed ---------------------------------------------------------------------------------------------------


def _tables(rows: Sequence[Row], columns: Sequence[tuple[str, Precision]], found: Sequence[dict[str, Any]]) -> str:
    """One matrix a measure; * marks what a row was trained or stored in."""
    cells = {(cell["checkpoint"], cell["precision"]): cell for cell in found}
    told = []
    for title, write in SHOWN:
        lines = [["checkpoint", *(name for name, _ in columns)]]
        for row in rows:
            params, moe = list(row.model.params()), row.model.moe is not None
            line = [row.label()]
            for name, precision in columns:
                own = "*" if agrees(precision, row.native, params, moe) else ""
                line.append(write(cells[row.name, name]) + own if (row.name, name) in cells else "-")
            lines.append(line)
        told.append(f"{title}\n{table(lines, '  ')}\n")
    return "\n".join([*told, "* the precision that the checkpoint was trained or stored in"])


def _share(cell: dict[str, Any], key: str) -> str:
    low, high = cell[f"{key}_95"]
    return f"{cell[key]:.3f} [{low:.3f}, {high:.3f}]"


def _gap(value: float) -> str:
    return "exactly 0" if value == 0 else f"{value:.2e}"


class _Progress:
    """A bar on a terminal, a line a cell elsewhere; both on stderr."""

    def __init__(self, total: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        out = Console(stderr=True)
        self._bar = Progress(*columns, console=out, transient=True) if out.is_terminal else None
        self._task = self._bar.add_task("", total=total) if self._bar else None

    def __enter__(self) -> _Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, what: str) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, description=what)
        else:
            print(f"evaluating {what}", file=sys.stderr, flush=True)

    def advance(self) -> None:
        if self._bar and self._task is not None:
            self._bar.advance(self._task)


def _positive(text: str) -> int:
    return _number(text, 1)


def _natural(text: str) -> int:
    return _number(text, 0)


def _number(text: str, least: int) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return int(text)
