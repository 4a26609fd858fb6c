"""Two processes that wait for work: each of a test's functions runs in both, as the ranks of one trainer."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HANGS_S = 280.0


class Processes:
    """`run(function, ...)` calls function(rank, ranks, meet, ...) in the first `ranks` of them; what each answers."""

    def __init__(self, count: int):
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.workers, self.runs = [], [], 0
        for _ in range(count):
            ours, theirs = context.Pipe()
            worker = context.Process(target=serve, args=(theirs,), daemon=True)
            worker.start()
            self.pipes.append(ours)
            self.workers.append(worker)

    def run(self, function: Callable[..., Any], *args: Any, ranks: int = 2) -> list[Any]:
        self.runs += 1
        meet = str(Path(self.folder.name) / f"meet-{self.runs}")
        for rank, pipe in enumerate(self.pipes[:ranks]):
            pipe.send((function, (rank, ranks, meet, *args)))
        answers = []
        for rank, pipe in enumerate(self.pipes[:ranks]):
            if not pipe.poll(HANGS_S):
                raise AssertionError(f"rank {rank} has not answered after {HANGS_S:g} s; its stack is on stderr")
            answers.append(pipe.recv())
        wrong = [text for good, text in answers if not good]
        assert not wrong, "\n".join(wrong)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.folder.cleanup()


def serve(pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    while True:
        function, args = pipe.recv()
        faulthandler.dump_traceback_later(HANGS_S - 5, file=sys.stderr)
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        pipe.send(answer)
