"""`lpexp export RUN --precision P --out DIR`: a run's checkpoint as a Hugging Face directory, in any precision.

What is written is what the trainer would publish: its masters rounded to the weights of its forward pass, then
quantised by the precision itself. The tokenizer goes along, so that the directory can be served and trained from.
Left out: optimiser state, and checkpoints of other trainers than the embedded one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import yaml
from omegaconf import OmegaConf
from pydantic import ValidationError

from lpexp import checkpoint
from lpexp.config import Spec, load, resolve
from lpexp.errors import ConfigError, Mistake, RunError
from lpexp.explain import meant
from lpexp.groups import choices, read_choice
from lpexp.model import Model
from lpexp.precision import Precision
from lpexp.trainer.embedded import MASTER

if TYPE_CHECKING:
    from torch import Tensor

S = TypeVar("S", bound=Spec)
Named = tuple[str, "Tensor"]
WORDS = "NAME [KEY=VALUE ...]: a card of conf/precision/ and what is changed in it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--precision", nargs="+", required=True, metavar="P", help=WORDS)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="made by this command")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint; else the newest that verifies")


def main(args: argparse.Namespace) -> int:
    named = chosen("precision", args.precision, Precision, "--precision")
    if len(named) > 1:
        raise ConfigError(f"--precision: {', '.join(n for n, _ in named)}: one directory has one; name one")
    ((name, precision),) = named
    found = saved(args.source, args.step)
    export(found, precision, args.out, _shown)
    print(f"{args.out} serves {args.source} at step {found.step} in {name}")
    return 0


class Saved(NamedTuple):
    """A verified checkpoint of a run."""

    directory: Path
    step: int
    experiment: dict[str, Any]  # the config that it was trained with, as plain data
    model: Model
    precision: Precision  # that it was trained in


def saved(run: Path, step: int | None = None) -> Saved:
    """The newest checkpoint that verifies, or the one of a step; ConfigError says what is there instead."""
    folder = run / checkpoint.FOLDER
    if not run.is_dir():
        raise ConfigError(f"{run} is no directory; name a run, e.g. outputs/NAME/DATE_TIME")
    if run.parent.name == checkpoint.FOLDER and (run / checkpoint.MANIFEST).exists():
        raise ConfigError(f"{run} is one checkpoint of a run; type {run.parent.parent} --step {int(run.name)}")
    if not checkpoint.holds_run(run):
        raise ConfigError(f"{run} is no run: it has neither {checkpoint.FOLDER}/ nor metrics.jsonl")
    if step is None:
        skipped: list[str] = []
        found = checkpoint.newest(run, skipped.append)
        if found is None:
            raise ConfigError("\n  ".join([f"{run} has no complete checkpoint", *skipped]))
        for one in skipped:
            print(f"warning: {one}", file=sys.stderr)
        directory, state = found
    else:
        directory = folder / f"{step:06d}"
        if not directory.is_dir():
            there = ", ".join(sorted(str(int(d.name)) for d in folder.glob("*") if d.name.isdigit())) or "none"
            raise ConfigError(f"--step: {run} has no checkpoint of step {step}; there are {there}")
        if wrong := checkpoint.verify(directory):
            raise ConfigError(f"checkpoint {directory} is torn: {wrong}; name another with --step")
        state = json.loads((directory / checkpoint.STATE).read_bytes())
    if not (directory / MASTER).exists():
        raise ConfigError(f"checkpoint {directory} holds no {MASTER}; only the embedded trainer's can be read")
    try:
        model = Model.model_validate(state["experiment"]["model"]).sized()
        precision = Precision.model_validate(state["experiment"]["precision"])
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise ConfigError(f"checkpoint {directory} was written by another version of lpexp: {why}") from None
    return Saved(directory, state["step"], state["experiment"], model, precision)


def weights(found: Saved) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 values of the forward pass), one tensor in memory at a time."""
    from safetensors import safe_open

    with safe_open(found.directory / MASTER, framework="pt") as file:
        for param in found.model.params():
            master = file.get_tensor(param.name)
            yield param.name, master if param.kind == "router_bias" else found.precision.plain.round(master)


def _shown(tensors: Iterable[Named], count: int) -> Iterable[Named]:
    """The same tensors with a bar on the terminal."""
    from rich.console import Console
    from rich.progress import track

    out = Console(stderr=True)
    return track(tensors, "writing", count, console=out, transient=True, disable=not out.is_terminal)


def export(
    found: Saved,
    precision: Precision,
    out: Path,
    shown: Callable[[Iterable[Named], int], Iterable[Named]] = lambda tensors, count: tensors,
) -> None:
    """Write the directory; it appears whole or not at all. ConfigError for what cannot be, RunError for a disk."""
    from lpexp.model import hf
    from lpexp.model.tokenizer import CharTokenizer

    model = found.model
    judge(precision, model, f"{found.directory} cannot be exported:")
    with tempfile.TemporaryDirectory() as beside:
        if model.path is None:
            CharTokenizer().save(Path(beside))
            model = model.model_copy(update={"path": beside})
        elif not (Path(model.path) / "tokenizer.json").is_file():
            raise ConfigError(
                f"{model.path}/tokenizer.json, the tokenizer of this run (model.path), is gone; restore it"
            )
        try:
            hf.save(out, model, shown(weights(found), len(list(model.params()))), precision)
        except (NotADirectoryError, FileExistsError, PermissionError) as error:
            raise ConfigError(f"--out: {out} cannot be made ({error.strerror}); choose another") from None
        except OSError as error:
            raise RunError(f"{out} could not be written: {error.strerror or error}; nothing was left there") from error


def judge(precision: Precision, model: Model, title: str) -> None:
    """ConfigError when this model cannot be quantised so."""
    mistakes = list(precision.judge(list(model.params()), model.moe is not None))
    if mistakes:
        named = [Mistake(f"{precision.name}.{m.key}".rstrip("."), m.message) for m in mistakes]
        raise ConfigError(named, title)


def chosen(group: str, words: Sequence[str], kind: type[S], flag: str) -> list[tuple[str, S]]:
    """Cards of conf/GROUP and what is changed in each: ["A", "B+C", "key=32"] names A, and C on top of B, changed."""
    cards: list[tuple[list[str], Any]] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            for name in word.split("+"):
                if name not in choices(group):
                    hint = meant(name, choices(group))
                    raise ConfigError(f"{flag}: there is no {name!r}{hint} there are {', '.join(choices(group))}")
            cards.append(([word], OmegaConf.merge(*(read_choice(group, name) for name in word.split("+")))))
        elif not cards:
            raise ConfigError(f"{flag}: {word} changes nothing yet; type {flag} NAME {word}")
        else:
            try:
                OmegaConf.update(cards[-1][1], key.removeprefix(f"{group}."), yaml.safe_load(value))
            except yaml.YAMLError:
                raise ConfigError(f"{flag}: {word} cannot be read; quote the value") from None
            cards[-1][0].append(word)
    return [(" ".join(typed), _built(typed, card, kind, flag)) for typed, card in cards]


def _built(typed: list[str], card: Any, kind: type[S], flag: str) -> S:
    data: Any = OmegaConf.to_container(card)
    try:
        return load(data, resolve(data["_target_"], kind) if "_target_" in data else kind)  # type: ignore[return-value]
    except ConfigError as error:
        named = [Mistake(f"{typed[0]}.{m.key}".rstrip("."), m.message) for m in error.mistakes]
        raise ConfigError(named, f"{flag} {' '.join(typed)} is wrong:") from None
