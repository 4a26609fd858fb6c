"""The guardian: no process of a run outlives its driver, even one that was killed with SIGKILL.

Ray's own agents wait on pipes that their siblings hold open, and stay behind when the driver is killed. This small
process knows the run's processes in two ways, because each misses some: those below the driver, looked at every
second (a process that died with its parent's tree is still remembered), and a token in the environment (which a
process that renames itself overwrites). When the driver's end of its pipe closes, it kills them all.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time

TOKEN = "LPEXP_RUN_TOKEN"
LOOK_S = 1.0
SWEEPS, PAUSE_S = 20, 0.25  # a dying process may still be starting another


class Guardian:
    """Started before any worker; `release` (or the driver's death) makes it clean up and end."""

    def __init__(self) -> None:
        self.token = f"{os.getpid()}-{os.urandom(8).hex()}"
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _bootstrap(), self.token, str(os.getpid())],
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


def _bootstrap() -> str:
    """Run this file's `watch` with the same import path."""
    call = "from lpexp.guardian import watch; watch(sys.argv[1], int(sys.argv[2]))"
    return f"import sys; sys.path[:] = {sys.path!r}; {call}"


def watch(token: str, driver: int) -> None:
    """Wait for the end of process `driver`, then end its family."""
    import psutil

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
