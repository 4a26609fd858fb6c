"""A fake server for quick tests, and what the tests of a real one need."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lpexp import frontend
from lpexp.cluster import Workers
from lpexp.rollout.sglang.engine import SglangEngine
from lpexp.rollout.sglang.rollout import SglangRollout

ROOT = Path(__file__).resolve().parents[3]


class Fake:
    """The home of a fake server: an interpreter that starts one, its faults, and what it was asked."""

    def __init__(self, home: Path):
        self.home, self.python = home, home / "python"
        code = (
            f"#!{sys.executable}\nimport sys, pathlib\nsys.path[:] = {[str(ROOT), *sys.path]!r}\n"
            f"from tests.rollout.sglang.fake import main\nmain(pathlib.Path({str(home)!r}), sys.argv[3:])\n"
        )
        self.python.write_text(code)
        self.python.chmod(self.python.stat().st_mode | stat.S_IXUSR)

    def fault(self, *words: str) -> None:
        (self.home / "faults").write_text(" ".join(words))

    def left(self) -> list[str]:
        """Faults that nobody met."""
        return (self.home / "faults").read_text().split()

    def calls(self) -> list[str]:
        return (self.home / "calls").read_text().split()

    def words(self, *more: str) -> list[str]:
        quick = ("rollout.heartbeat_s=0.2", "rollout.hang_s=1", "rollout.canary_limit=9", "precision=fp32")
        return ["rollout=sglang", f"rollout.python={self.python}", "cluster=inline", *quick, *more]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    home = tmp_path / "fake"
    home.mkdir()
    return Fake(home)


class Opened:
    """A rollout without a trainer, and the events that it told."""

    def __init__(self, run_dir: Path, *words: str):
        self.exp = frontend.experiment(*words)
        self.events: list[dict[str, Any]] = []
        self.workers = Workers(self.exp.cluster, self._event, run_dir)
        self.rollout: SglangRollout = self.exp.rollout.build(self.exp, self.workers)  # type: ignore[assignment]

    def _event(self, kind: str, **fields: Any) -> None:
        self.events.append({"kind": kind, **fields})

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    def shards(self, seed: int = 1) -> tuple[list[Any], str]:
        """Random weights as a trainer ships them, and their checksum."""
        from lpexp.model.decoder import initial_tensors
        from lpexp.precision.wire import checksum, freeze, ship

        model = self.exp.model.sized()
        parts = ship(initial_tensors(model, seed), model.params(), self.exp.wire, model.moe is not None)
        held = {param.name: made for param, made in parts}
        return [{name: freeze(one) for name, one in held.items()}], checksum(held)

    def engine(self, index: int = 0) -> SglangEngine:
        return self.rollout.engines[index]._held  # type: ignore[attr-defined]

    def close(self) -> None:
        self.rollout.close()
        self.workers.close()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    made: list[Opened] = []

    def make(*words: str) -> Opened:
        made.append(Opened(tmp_path / "run", *words))
        return made[-1]

    yield make
    for one in made:
        one.close()


# -- what a real server needs ------------------------------------------------------------------------------------------

LOCKED = next(
    line.partition("==")[2].strip()
    for line in (ROOT / "requirements-sglang.lock").read_text().splitlines()
    if line.startswith("sglang==")
)
DRIVER = """
int cuInit(unsigned flags) { return 100; }
int cuDriverGetVersion(int *version) { *version = 0; return 100; }
int cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) { return 201; }
"""


def driver_library(folder: Path) -> str:
    """LD_LIBRARY_PATH with which SGLang's kernels can be imported where no NVIDIA driver is: they link its library.

    Three functions that answer "no device" are enough for the dynamic linker; no code of a GPU ever runs.
    """
    found = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    paths = os.environ.get("LD_LIBRARY_PATH", "")
    if "libcuda.so.1" in found:
        return paths
    source = folder / "driver.c"
    source.write_text(DRIVER)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True)
    return f"{folder}:{paths}" if paths else str(folder)
