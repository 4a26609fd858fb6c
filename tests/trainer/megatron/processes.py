"""Two processes that wait for work: each of a test's functions runs in both, as the ranks of one trainer."""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.connection
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
        self.folder = tempfile.TemporaryDirectory()
        self.runs, self.count = 0, count
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.workers = [], []
        for _ in range(self.count):
            ours, theirs = context.Pipe()
            worker = context.Process(target=serve, args=(theirs,))
            worker.start()
            self.pipes.append(ours)
            self.workers.append(worker)

    def run(self, function: Callable[..., Any], *args: Any, ranks: int = 2) -> list[Any]:
        self.runs += 1
        meet = str(Path(self.folder.name) / f"meet-{self.runs}")
        waiting = dict(enumerate(self.pipes[:ranks]))
        for rank, pipe in waiting.items():
            pipe.send((function, (rank, ranks, meet, *args)))
        answers: dict[int, Any] = {}
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting.values()), HANGS_S)
            told = {rank: pipe.recv() for rank, pipe in waiting.items() if pipe in ready}
            wrong = [f"rank {rank}: {text}" for rank, (good, text) in told.items() if not good]
            if wrong or not told:  # the others wait for this one: none of them can be used again
                self._stop()
                self._start()
                raise AssertionError("\n".join(wrong) or f"no rank has answered for {HANGS_S:g} s; stacks: stderr")
            answers |= {rank: answer for rank, (_, answer) in told.items()}
            waiting = {rank: pipe for rank, pipe in waiting.items() if rank not in answers}
        return [answers[rank] for rank in range(ranks)]

    def _stop(self) -> None:
        for worker in self.workers:
            worker.kill()

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)  # they end by themselves what megatron-core has started below them
        for worker in self.workers:
            worker.join(10)
        self._stop()
        self.folder.cleanup()


def serve(pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    while (asked := pipe.recv()) is not None:
        function, args = asked
        faulthandler.dump_traceback_later(HANGS_S - 5, file=sys.stderr)
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
        pipe.send(answer)
