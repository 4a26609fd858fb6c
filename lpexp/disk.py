"""Writing that survives a kill: JSON files and directories that are on disk before they get their name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """fsync one file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """fsync everything in a directory, then itself."""
    for path in (*directory.rglob("*"), directory):
        sync(path)


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


def replace_json(path: Path, data: Any) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never a part."""
    temp = path.with_name(f".tmp-{path.name}")
    write_json(temp, data)
    sync(temp)
    temp.rename(path)
    sync(path.parent)


def cache_dir(kind: str) -> Path:
    """Where what can be made again is kept between runs: $XDG_CACHE_HOME/lpexp/KIND."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lpexp" / kind
