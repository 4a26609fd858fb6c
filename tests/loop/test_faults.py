"""Whatever is killed, nothing is lost: an engine heals inside the run, everything else resumes to the same bytes."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lpexp.compare import compare
from tests.loop.conftest import ROOT, SMALL, Ran

RUN = ("precision=fp8", "steps=7", "checkpoint.every=2", "eval.every=3", "cluster=local")
DIES_IN_CHECKPOINT = """
import os, signal, sys
from lpexp import checkpoint
honest = checkpoint._write_manifest
def torn(directory, step):
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(directory, step)
checkpoint._write_manifest = torn
sys.path.insert(0, {root!r})
import launch
from lpexp import frontend
sys.exit(frontend.guard(launch.main, sys.argv[1:]))
"""


class Live:
    """A run in the background."""

    def __init__(self, directory: Path, *overrides: str, code: str | None = None):
        self.directory = directory
        self.words = [*SMALL, f"output_dir={directory}", *overrides]
        start = [sys.executable, "-c", code] if code else [sys.executable, str(ROOT / "launch.py")]
        self.log = directory.with_suffix(".log").open("ab")
        self.process = subprocess.Popen([*start, *self.words], cwd=ROOT, stdout=self.log, stderr=self.log)
        self.family: list[psutil.Process] = []

    def lines(self) -> int:
        path = self.directory / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def until(self, lines: int, timeout_s: float = 120) -> None:
        """Wait until this many steps are logged; remember every process of the run."""
        give_up = time.monotonic() + timeout_s
        while self.lines() < lines:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < give_up, "the run stands still"
            time.sleep(0.02)
        self.family = [self.process_tree(), *self.process_tree().children(recursive=True)]

    def process_tree(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def pid(self, worker: str) -> int:
        events = [json.loads(line) for line in (self.directory / "events.jsonl").read_text().splitlines()]
        return next(event["pids"][worker] for event in reversed(events) if event["kind"] == "workers")

    @property
    def said(self) -> str:
        return self.directory.with_suffix(".log").read_text()

    def end(self, timeout_s: float = 150) -> int:
        code = self.process.wait(timeout_s)
        self.log.close()
        return code

    def assert_nothing_is_left(self) -> None:
        _, alive = psutil.wait_procs(self.family, timeout=20)
        assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """lag -> the directory of the same run, never killed, in one process."""
    made: dict[int, Path] = {}

    def run(lag: int) -> Path:
        if lag not in made:
            made[lag] = tmp_path_factory.mktemp(f"lag{lag}") / "whole"
            finish(Live(made[lag], *RUN, f"lag={lag}", "cluster=inline"))
        return made[lag]

    return run


def finish(live: Live) -> None:
    assert live.end() == 0, live.said


def same(a: Path, b: Path) -> bool:
    return compare(a, b, exact=True) == 0


def lags(*main_lane: int):
    """Both lags are evidence; those named run in the main lane too."""
    return pytest.mark.parametrize(
        "lag", [pytest.param(lag, marks=[] if lag in main_lane else pytest.mark.evidence) for lag in (0, 1)]
    )


@lags(0, 1)
def test_an_engine_that_dies_is_healed_inside_the_run(undisturbed, tmp_path, lag):
    live = Live(tmp_path / "run", *RUN, f"lag={lag}")
    live.until(3)
    os.kill(live.pid("engine-1"), signal.SIGKILL)
    finish(live)
    healed = [event for event in Ran(0, live.directory).events if event["kind"] == "engine_healed"]
    assert healed and {event["engine"] for event in healed} == {1}
    assert same(undisturbed(lag), live.directory)


@lags(1)
def test_a_killed_driver_leaves_nothing_behind_and_resumes_to_the_same_bytes(undisturbed, tmp_path, lag):
    live = Live(tmp_path / "run", *RUN, f"lag={lag}")
    live.until(4)
    os.kill(live.process.pid, signal.SIGKILL)
    assert live.end() == -signal.SIGKILL
    live.assert_nothing_is_left()
    finish(Live(live.directory, *RUN, f"lag={lag}", "resume=auto"))
    assert same(undisturbed(lag), live.directory)


@lags(0)
def test_a_killed_trainer_rank_is_named_and_the_run_resumes_to_the_same_bytes(undisturbed, tmp_path, lag):
    live = Live(tmp_path / "run", *RUN, f"lag={lag}")
    live.until(4)
    os.kill(live.pid("trainer-1"), signal.SIGKILL)
    assert live.end() == 1
    live.assert_nothing_is_left()
    assert "trainer-1 died" in live.said and "resume=auto" in live.said and "Traceback" not in live.said
    finish(Live(live.directory, *RUN, f"lag={lag}", "resume=auto", "cluster=inline"))
    assert same(undisturbed(lag), live.directory)


@lags(0, 1)
def test_a_driver_killed_inside_a_checkpoint_resumes_from_the_one_before(undisturbed, tmp_path, lag):
    code = DIES_IN_CHECKPOINT.format(step=4, root=str(ROOT))
    live = Live(tmp_path / "run", *RUN, f"lag={lag}", "cluster=inline", code=code)
    assert live.end() == -signal.SIGKILL
    assert sorted(path.name for path in (live.directory / "checkpoints").glob("0*")) == ["000002"]
    finish(Live(live.directory, *RUN, f"lag={lag}", "cluster=inline", "resume=auto"))
    assert same(undisturbed(lag), live.directory)


@lags(0)
def test_sigterm_stops_after_the_step_in_hand_and_resumes_to_the_same_bytes(undisturbed, tmp_path, lag):
    live = Live(tmp_path / "run", *RUN, f"lag={lag}", "stop_grace_s=60")
    live.until(2)
    live.process.send_signal(signal.SIGTERM)
    assert live.end() == 143
    live.assert_nothing_is_left()
    assert live.lines() < 7 and "after the step in hand" in live.said
    finish(Live(live.directory, *RUN, f"lag={lag}", "cluster=inline", "resume=auto"))
    assert same(undisturbed(lag), live.directory)


@lags(1)
def test_a_step_that_outlasts_the_grace_is_dropped_and_replays_bitwise(undisturbed, tmp_path, lag):
    live = Live(tmp_path / "run", *RUN, f"lag={lag}", "stop_grace_s=0")
    live.until(3)
    os.kill(live.pid("trainer-1"), signal.SIGSTOP)  # the step in hand, or the next one, cannot end
    time.sleep(1)
    live.process.send_signal(signal.SIGINT)
    assert live.end() == 130
    assert "was dropped" in live.said
    finish(Live(live.directory, *RUN, f"lag={lag}", "cluster=inline", "resume=auto"))
    assert same(undisturbed(lag), live.directory)


def test_a_run_listens_on_loopback_only(tmp_path):
    live = Live(tmp_path / "run", *RUN, "wandb.mode=offline")
    live.until(2)
    listening = [
        (process.name(), connection.laddr.ip)
        for process in live.family
        if process.is_running()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    live.process.send_signal(signal.SIGTERM)
    assert live.end() == 143
    assert len(listening) > 5  # Ray's servers were seen
    assert [each for each in listening if not loopback(each[1])] == []
    assert not loopback("0.0.0.0") and not loopback("::") and loopback("::ffff:127.0.0.1")


def loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@lags(0)
@pytest.mark.parametrize(
    "words", [("rollout.slots=5",), ("rollout.engines=1", "trainer.ranks=1", "cluster=local")], ids=str
)
def test_workers_and_slots_change_no_number(undisturbed, tmp_path, words, lag):
    live = Live(tmp_path / "run", *RUN, f"lag={lag}", "cluster=inline", *words)
    finish(live)
    assert same(undisturbed(lag), live.directory)
