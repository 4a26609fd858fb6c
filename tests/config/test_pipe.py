"""A reader that leaves early is no error worth a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_closed_pipe_ends_the_plan_without_a_traceback():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-u", str(ROOT / "launch.py"), "dry_run=true"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert "Traceback" not in done.stderr and done.returncode == 141, done.stderr
