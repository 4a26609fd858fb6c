"""A Ray cluster of made-up nodes on this machine, and what a run gets of it: `-m tests.cluster.simulated NAME ...`.

Each node is a real raylet that claims 8 GPUs and keeps a small object store; 120 MB of memory a node. One JSON object a
name is printed: of a recipe, or of `refusals`. Who joins is a process of its own too (`--join ADDRESS`, names on its
standard input): its guardian ends whatever stands below it, and Ray reads its settings when it is imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from lpexp import frontend
from lpexp.cluster import Workers
from lpexp.errors import RunError

STORE = 80 * 2**20  # bytes; Ray's least


# -- the machines ------------------------------------------------------------------------------------------------------
def serve(names: list[str]) -> None:
    """Start the cluster, grow it to each recipe's size, and let a process join it."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"
    from ray.cluster_utils import Cluster

    small: Any = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    cluster, nodes = Cluster(initialize_head=True, head_node_args=small), 0
    command = [sys.executable, "-m", __spec__.name, "--join", cluster.address]
    joiner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert joiner.stdin is not None and joiner.stdout is not None
    try:
        for name in names:
            wanted = 2 if name == "refusals" else frontend.experiment(f"experiment={name}").cluster.nodes
            added = [(8, "H200")] * (wanted - nodes)
            added += [(16, "A100")] if name == "refusals" else []  # another kind of machine beside them
            for gpus, kind in added:
                named = {f"accelerator_type:{kind}": 1}
                cluster.add_node(wait=False, num_cpus=1, num_gpus=gpus, object_store_memory=STORE, resources=named)
            nodes = max(nodes, wanted)
            print(name, file=joiner.stdin, flush=True)
            line = next((line for line in joiner.stdout if line.startswith("{")), None)  # Ray may print too
            if line is None:
                raise SystemExit(f"{name}: the joining process ended")
            print(json.dumps(json.loads(line) | {"memory_gb": round(_memory() / 1e9, 2)}), flush=True)
    finally:
        joiner.stdin.close()
        joiner.wait()
        cluster.shutdown()


def _memory() -> int:
    """Bytes of this process and all below it, shared pages counted once."""
    held, mine = 0, psutil.Process()
    for process in (mine, *mine.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # a worker that ended meanwhile
            held += process.memory_full_info().pss
    return held


# -- who joins them ----------------------------------------------------------------------------------------------------
class Glance:
    """A worker that tells where it sits and what it sees."""

    def look(self) -> tuple[str, str]:
        import ray

        return ray.get_runtime_context().get_node_id(), os.environ["CUDA_VISIBLE_DEVICES"]


def workers(address: str, told: list[str], *words: str) -> Workers:
    """As a run opens them."""
    exp = frontend.experiment(*words, f"cluster.address={address}")
    return Workers(exp.cluster, lambda *_, **__: None, Path(tempfile.mkdtemp()), lambda kind, text: told.append(text))


def recipe(address: str, name: str) -> dict[str, Any]:
    """Wait for a recipe's seats, then put three workers on them."""
    begin = time.monotonic()
    opened = workers(address, [], f"experiment={name}", "cluster.wait_s=120")
    seconds, seats = time.monotonic() - begin, opened.seats
    try:
        asked = [("engine", seats[:2]), ("rank", seats[-1:]), ("any", [])]
        looks = [opened.spawn(who, Glance, seats=where).call("look") for who, where in asked]
        places, sees = zip(*(look.result() for look in looks), strict=True)
        numbers = [(seat.node, seat.gpu) for seat in seats]
        return {"recipe": name, "seats": numbers, "sees": sees, "places": places, "seconds": round(seconds, 1)}
    finally:
        opened.close()


def refusals(address: str) -> dict[str, Any]:
    """What a run is told that asks for more than there is, for what another holds, and for other GPUs."""
    from lpexp.seats import Reservation

    told: list[str] = []
    said: dict[str, Any] = {"told": told}
    said["missing"] = _refused(lambda: workers(address, told, "experiment=qwen3_235b_int4", "cluster.wait_s=2"))
    wide = ("experiment=qwen3_4b_fp8", "model.parallel.gpus_per_node=16", "cluster.wait_s=2")
    said["kind"] = _refused(lambda: workers(address, [], *wide))
    holder = workers(address, [], "experiment=qwen3_30b_fp8")
    said["held"] = _refused(lambda: Reservation(2, 8, "H200", 1.5))
    holder.close()
    again = workers(address, [], "experiment=qwen3_30b_fp8")  # what was refused, and what was closed, holds nothing
    said["free_again"] = len(again.seats)
    again.close()
    return said


def _refused(call: Any) -> str:
    try:
        call()
    except RunError as error:
        return str(error)
    raise AssertionError("it was not refused")


if __name__ == "__main__":
    if sys.argv[1] == "--join":
        at = sys.argv[2]
        for asked in map(str.strip, sys.stdin):
            print(json.dumps(refusals(at) if asked == "refusals" else recipe(at, asked)), flush=True)
    else:
        serve(sys.argv[1:])
