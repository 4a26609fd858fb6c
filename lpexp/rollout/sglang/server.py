"""One SGLang server: its command line, its process group, its log, and what went wrong when it did not come up.

The key of a run's server is made here and handed over in a file that only this user reads; SGLang repeats it in its
log and in its report, so both are redacted before they are kept.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lpexp.disk import write_json
from lpexp.errors import RunError
from lpexp.guardian import Kept

KEPT_LINES, SHOWN_LINES = 200, 12
HIDDEN = "[key]"
# What a log says, what it most likely means, and the way out. The first that is found counts.
REASONS = (
    (r"No module named '?sglang", "{python} has no SGLang; type make sglang-env, or name one with rollout.python"),
    (
        r"libcuda\.so|libcudart|cannot open shared object file",
        "a library is missing: SGLang's kernels need the NVIDIA driver's libcuda, also to be imported; on a machine "
        "without a driver see docs/sglang.md",
    ),
    (r"address already in use|Errno 98", "the port was taken meanwhile by another program; start the run again"),
    (
        r"out of memory|OutOfMemory|Not enough memory|Cannot allocate memory|signal 9",
        "there was not enough memory: lower rollout.mem_fraction or rollout.concurrency, or free some",
    ),
    (
        r"(?i)requires that CPU|AMX support|not supported on (?:this|the current)|no kernel image|"
        r"compute capability|Unsupported quantization|quantization.*not supported|Marlin",
        "this hardware cannot serve the format: choose another rollout.precision, or another machine (docs/sglang.md)",
    ),
    (r"unrecognized arguments|invalid choice|error: argument", "an argument is not one of this SGLang's: rollout.args"),
    (r"No NVIDIA driver|CUDA driver|no CUDA-capable", "no GPU is visible; type rollout.device=cpu or free one"),
)


class Server:
    """A server that starts when this is made; `model` is the config.json that it builds its model from."""

    def __init__(
        self,
        python: str,
        arguments: Mapping[str, Any],
        model: Mapping[str, Any],
        env: Mapping[str, str],
        host: str,
        log: Path,
    ):
        self.python, self.host, self.port, self.log = python, host, free_port(host), log
        self.key = secrets.token_hex(32)
        self.scratch = Path(tempfile.mkdtemp(prefix="lpexp-sglang-"))
        self.began, self.lines = time.monotonic(), deque(maxlen=KEPT_LINES)
        log.parent.mkdir(parents=True, exist_ok=True)
        key_file = self.scratch / "key.yaml"
        descriptor = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"api-key: {self.key}\n")
        directory = self.scratch / "model"
        directory.mkdir()
        write_json(directory / "config.json", model)
        own = {"--config": str(key_file), "--model-path": str(directory), "--host": host, "--port": self.port}
        self._process = Kept([python, "-m", "sglang.launch_server", *typed(own | dict(arguments))], env, self.scratch)
        self.pid = self._process.pid
        self._pump = threading.Thread(target=self._keep_log, name="sglang-log", daemon=True)
        self._pump.start()

    def _keep_log(self) -> None:
        with self.log.open("a") as file:
            file.write(f"lpexp: server of process {self.pid}, port {self.port}\n")
            for raw in self._process.output:
                line = raw.decode(errors="replace").replace(self.key, HIDDEN).rstrip()
                self.lines.append(line)
                file.write(line + "\n")
                file.flush()

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def ended(self) -> bool:
        return self._process.ended()

    def last_line(self) -> str:
        """What the server does now, for those who wait for it."""
        told = (line for line in reversed(self.lines) if re.match(r"\[\d{4}-", line))
        return re.sub(r"^\[[^]]*\]\s*", "", next(told, "its first lines are still to come"))[:100]

    def failure(self, what: str) -> RunError:
        """Why it did not come up: the likely reason, and the last lines of its log."""
        self._pump.join(timeout=5)
        text = "\n".join(self.lines)
        why = next(
            (way.format(python=self.python) for pattern, way in REASONS if re.search(pattern, text)), "see the log"
        )
        last = "\n  ".join(list(self.lines)[-SHOWN_LINES:])
        return RunError(f"the SGLang server {what}. Likely: {why}. All of its log is in {self.log}; its end:\n  {last}")

    def forget_key_file(self) -> None:
        (self.scratch / "key.yaml").unlink(missing_ok=True)

    def stop(self) -> None:
        """End every process of the server."""
        self._process.end()
        self._pump.join(timeout=5)


def typed(arguments: Mapping[str, Any]) -> list[str]:
    """A command line: a flag whose value is True stands alone, one whose value is None or False is left out."""
    words: list[str] = []
    for flag, value in arguments.items():
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return words


def environment(shell: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, str]:
    """The server's environment: the shell's without what belongs to our interpreter, and what the config derives."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP")
    kept = {name: value for name, value in shell.items() if name not in dropped and not name.startswith("SGLANG_")}
    return kept | dict(ours)


def redacted(value: Any, key: str) -> Any:
    """The same data without the key."""
    return json.loads(json.dumps(value).replace(key, HIDDEN))


def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def mistakes(wanted: Mapping[str, Sequence[Any]], report: Mapping[str, Any]) -> list[str]:
    """What the server's report says otherwise than was asked for: "dtype is 'bfloat16', not 'float32'"."""
    return [
        f"{name} is {report.get(name)!r}, not {' or '.join(map(repr, allowed))}"
        for name, allowed in wanted.items()
        if report.get(name) not in allowed
    ]
