"""The guardian: no process of a run outlives its driver, even one that was killed with SIGKILL.

`Kept` does the same for one program that is not ours and its process group: it ends with the process that started it.

Ray's own agents wait on pipes that their siblings hold open, and stay behind when the driver is killed. This small
process knows the run's processes in two ways, because each misses some: those below the driver, looked at every
second (a process that died with its parent's tree is still remembered), and a token in the environment (which a
process that renames itself overwrites). When the driver's end of its pipe closes, it kills them all.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TOKEN = "LPEXP_RUN_TOKEN"
LOOK_S = 1.0
SWEEPS, PAUSE_S = 20, 0.25  # a dying process may still be starting another


class Guardian:
    """Started before any worker; `release` (or the driver's death) makes it clean up and end."""

    def __init__(self) -> None:
        self.token = f"{os.getpid()}-{os.urandom(8).hex()}"
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _bootstrap("watch"), self.token, str(os.getpid())],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        os.environ[TOKEN] = self.token

    def release(self) -> None:
        """After an orderly end: whatever is still there goes too."""
        os.environ.pop(TOKEN, None)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Kept:
    """A command in a process group of its own, which ends with the command, with `end`, or with this process.

    `output` is a pipe of what it and its children print, and at last of how it ended. `scratch` is removed then.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], scratch: Path):
        self._keeper = subprocess.Popen(
            [sys.executable, "-S", "-c", _bootstrap("keep"), str(scratch), *command],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._keeper.stdout is not None
        self.pid, self.output = self._keeper.pid, self._keeper.stdout

    def ended(self) -> bool:
        return self._keeper.poll() is not None

    def end(self) -> None:
        """End the whole group, and return when it has ended."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait()


def _bootstrap(function: str) -> str:
    """Run a function of this file with the same import path."""
    return f"import sys; sys.path[:] = {sys.path!r}; from lpexp.guardian import {function}; {function}(*sys.argv[1:])"


def keep(scratch: str, *command: str) -> None:
    """Run a command until it ends or this process's stdin closes; then end every other process of this group."""
    import psutil

    child, code = subprocess.Popen(command, stdin=subprocess.DEVNULL), None
    while code is None and not select.select([sys.stdin], [], [], LOOK_S / 5)[0]:
        code = child.poll()
    for _ in range(SWEEPS):
        group = {p for p in psutil.process_iter() if p.pid != os.getpid() and _group(p.pid) == os.getpgrp()}
        if not kill(group):
            break
        time.sleep(PAUSE_S)
    shutil.rmtree(scratch, ignore_errors=True)
    if code is not None:
        ended = f"exit code {code}" if code >= 0 else f"signal {-code}"
        print(f"the program ended with {ended}", flush=True)


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def watch(token: str, driver_pid: str) -> None:
    """Wait for the end of the driver, then end its family."""
    import psutil

    driver = int(driver_pid)
    family: set[psutil.Process] = set()
    while not select.select([sys.stdin], [], [], LOOK_S)[0]:  # readable: the driver has gone
        try:
            family |= set(psutil.Process(driver).children(recursive=True))
        except psutil.NoSuchProcess:
            break
    family.discard(psutil.Process())
    for _ in range(SWEEPS):
        if not kill(family | marked(token)):
            return
        time.sleep(PAUSE_S)


def marked(token: str) -> set:
    """Every process that carries the token, this one left out."""
    import psutil

    found = set()
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(TOKEN) == token:
                found.add(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended meanwhile, or is another user's
            continue
    return found


def kill(processes: set) -> int:
    """SIGKILL to each (psutil sees to it that a pid which was given anew is spared); how many were alive."""
    import psutil

    alive = 0
    for process in processes:
        try:
            alive += process.status() != psutil.STATUS_ZOMBIE
            process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return alive
