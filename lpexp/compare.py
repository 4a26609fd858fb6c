"""`lpexp compare A B ...`: what the report says of runs and sweeps, as tables. `--exact A B`: are two runs equal?

With --exact every number of metrics.jsonl that is not volatile must be the same in every bit, and so must the weights
and optimiser state of the newest checkpoint; left out are events, records, and what the metric dictionary marks
volatile (times, speeds, memory).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lpexp import checkpoint, journal
from lpexp.errors import ConfigError
from lpexp.metric import is_volatile
from lpexp.plan import table
from lpexp.report import add_choices
from lpexp.report.advice import advise
from lpexp.report.findings import Findings, find
from lpexp.report.study import collect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("places", type=Path, nargs="+", metavar="DIR", help="runs, sweeps, or folders of them")
    parser.add_argument(
        "--exact", action="store_true", help="two runs: every number and the final weights, bit for bit"
    )
    add_choices(parser)


def main(args: argparse.Namespace) -> int:
    if not args.exact:
        print(text(find(collect(args.places, args.reference, args.allow), args.margin)))
        return 0
    if len(args.places) != 2:
        raise ConfigError(f"--exact: two run directories are compared, {len(args.places)} were given")
    return compare_exactly(*args.places)


def text(found: Findings) -> str:
    """What the page says, for a terminal."""
    study = found.study
    parts = [study.question] if study.question else []
    parts.append("\n".join([found.answer, *(f"  {verdict.sentence}" for verdict in found.verdicts)]))
    told = [f"  alarm, {who}: {what}" for who, what in found.alarms]
    told += [f"  note: {mark}" for mark in found.marks] + [f"  broken: {who} {why}" for who, why in study.broken]
    parts += ["\n".join(told)] if told else []
    parts += [
        "\n".join([title, table([one.head, *one.rows], "  "), *([f"  {one.note}"] if one.note else [])])
        for title, one in found.tables.items()
    ]
    for piece in advise(found):
        cases = [f"    {measured}{f'  ->  {typed}' if typed else ''}" for measured, typed in piece.cases]
        parts.append("\n".join([f"{piece.title}: {piece.why}", *cases]))
    return "\n\n".join(parts)


def compare_exactly(a: Path, b: Path) -> int:
    """0: no difference, 1: a difference, 2: a directory is no run or nothing compares."""
    try:
        runs = [_steps(a), _steps(b)]
        compared, difference = _compare_steps(*runs)
        if difference is None:
            if not compared:
                raise ConfigError(f"{a} and {b} have no number to compare")
            files, difference = _compare_weights(a, b)
            compared_files = f", and {files} checkpoint files" if files else "; neither run has a checkpoint to compare"
    except ConfigError as error:
        print(f"lpexp compare: {error}", file=sys.stderr)
        return 2
    if difference is not None:
        print(f"different: {difference}\n  A = {a}\n  B = {b}")
        return 1
    print(f"equal: {compared} numbers of {len(runs[0])} steps{compared_files}")
    return 0


def _steps(run_dir: Path) -> dict[int, dict[str, Any]]:
    """{step: line}; ConfigError when the directory is no run."""
    path = run_dir / journal.METRICS
    if not path.exists():
        raise ConfigError(f"{run_dir} is no run directory: it has no {journal.METRICS}")
    lines = journal.read(path)
    if any("step" not in line for line in lines):
        raise ConfigError(f"{path} has a line without a step; lpexp did not write it")
    steps = {line["step"]: line for line in lines}
    if len(steps) < len(lines):
        raise ConfigError(f"{path} has {len(lines)} lines for {len(steps)} steps; a step appears once")
    return steps


def _compare_steps(a: dict[int, dict[str, Any]], b: dict[int, dict[str, Any]]) -> tuple[int, str | None]:
    """How many numbers were equal, and the first difference."""
    compared = 0
    for step in sorted({*a, *b}):
        if step not in a or step not in b:
            return compared, f"step {step} is only in {'A' if step in a else 'B'}"
        for key in [*a[step], *(key for key in b[step] if key not in a[step])]:
            if key == "step" or is_volatile(key):
                continue
            # The shortest text that reads back equal: it tells -0.0 from 0.0 and 1 from 1.0.
            left, right = (json.dumps(line[step][key]) if key in line[step] else "absent" for line in (a, b))
            if left != right:
                return compared, f"step {step}, {key}: A {left}, B {right}"
            compared += 1
    return compared, None


def _compare_weights(a: Path, b: Path) -> tuple[int, str | None]:
    """How many files of the newest checkpoints were equal, and the first difference."""
    found = [checkpoint.newest(run, lambda skipped: print(f"warning: {skipped}", file=sys.stderr)) for run in (a, b)]
    if found[0] is None and found[1] is None:
        return 0, None
    if found[0] is None or found[1] is None:
        return 0, f"only {'A' if found[0] else 'B'} has a complete checkpoint"
    names = [f"{directory.name}" for directory, _ in found]  # type: ignore[misc]
    if names[0] != names[1]:
        return 0, f"the newest complete checkpoint is step {names[0]} in A, {names[1]} in B"
    # `newest` has verified that the files have these sums.
    sums = [json.loads((d / checkpoint.MANIFEST).read_bytes())["files"] for d, _ in found]  # type: ignore[misc]
    left, right = ({n: s for n, s in files.items() if n.endswith(".safetensors")} for files in sums)
    for name in sorted({*left, *right}):
        if left.get(name) != right.get(name):
            return 0, f"checkpoint {names[0]}, {name}: A {left.get(name, 'absent')}, B {right.get(name, 'absent')}"
    if not left:
        raise ConfigError(f"checkpoint {names[0]} of {a} holds no safetensors file")
    return len(left), None
