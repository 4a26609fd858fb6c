"""A run's journals: metrics.jsonl with one JSON object a step, events.jsonl with what happened beside the steps.

A line is appended by one write and is on disk when `append` returns. A last line without its end, left by a kill in
the middle of a write, is no part of a journal. Numbers keep their bits: JSON holds the shortest text that reads back
equal.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lpexp.errors import ConfigError

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"


def append(path: Path, line: dict[str, Any]) -> None:
    """Add one line; ValueError when a value is NaN or infinite."""
    text = json.dumps(line, allow_nan=False) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        _drop_torn(descriptor)
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a journal; [] when there is none. ConfigError names a line that is no JSON object."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line end was never finished
    return [_parse(path, number, text) for number, text in enumerate(lines, 1)]


def cut(path: Path, step: int) -> list[int]:
    """Drop the lines of `step` and later, and a torn one, in one replacement; returns the steps that stay."""
    if not path.exists():
        return []
    kept = [line for line in read(path) if line["step"] < step]
    write(path, "".join(json.dumps(line) + "\n" for line in kept))
    return [line["step"] for line in kept]


def write(path: Path, text: str) -> None:
    """Replace a file as a whole, on disk when this returns."""
    temp = path.with_name(f".tmp-{path.name}")
    with temp.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temp.replace(path)


def _drop_torn(descriptor: int) -> None:
    """Cut the file behind its last line end, so that what is appended begins a line."""
    end = size = os.fstat(descriptor).st_size
    while end and os.pread(descriptor, 1, end - 1) != b"\n":
        end -= 1
    if end < size:
        os.ftruncate(descriptor, end)


def _parse(path: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"{path}, line {number} is not JSON ({error}); it was altered after the run wrote it"
        ) from None
    if not isinstance(line, dict):
        raise ConfigError(f"{path}, line {number} is no JSON object; it was altered after the run wrote it")
    return line
