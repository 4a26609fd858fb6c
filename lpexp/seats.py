"""Seats: the GPUs of a run, node by node, reserved in a Ray cluster before the first worker starts.

One bundle a node holds all the GPUs that the run has there (strategy STRICT_SPREAD: no two bundles on one node).
Workers are put into a node's bundle and told their GPUs by CUDA_VISIBLE_DEVICES; they ask Ray for none, so trainer and
engine can sit on the same ones in turn. Waiting is bounded, and says what is missing.
Left out: bundles of single GPUs, which Ray may lay across nodes and hand out in any order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lpexp.errors import RunError

TELL_S = 30.0  # how often a wait is told of
ACCELERATOR = "accelerator_type:"  # Ray's resource that names a node's GPUs


class Seat(NamedTuple):
    """One GPU of the run. Seat number n is GPU n % gpus_per_node of node n // gpus_per_node."""

    node: int  # counts from 0, the first is the trainer's rank 0
    gpu: str  # what CUDA calls it on that node
    address: str  # of the node


class Reservation:
    """`nodes` nodes with `gpus` GPUs each, held until `release`; RunError when they are not there in time."""

    def __init__(
        self, nodes: int, gpus: int, kind: str | None, wait_s: float, tell: Callable[[str], None] = lambda text: None
    ):
        from ray.util.placement_group import placement_group

        self.nodes, self.gpus = nodes, gpus
        self.group = placement_group([{"GPU": gpus}] * nodes, strategy="STRICT_SPREAD", name="lpexp")
        try:
            self._wait(wait_s, tell)
            self.seats = self._look(kind)
        except BaseException:  # a stop too: what was asked for is not kept
            self.release()
            raise

    def _wait(self, wait_s: float, tell: Callable[[str], None]) -> None:
        start, told = time.monotonic(), 0.0
        while not self.group.wait(1):
            waited = time.monotonic() - start
            if waited >= wait_s:
                way = "add nodes or free some, raise cluster.wait_s, or ask for less (model.parallel.nodes)"
                raise RunError(f"cluster: after {waited:.0f} s {shortage(self.nodes, self.gpus)}; {way}")
            if waited - told >= TELL_S or not told:
                tell(f"waiting for the cluster: {shortage(self.nodes, self.gpus)} (up to {wait_s:.0f} s)")
                told = waited

    def _look(self, kind: str | None) -> list[Seat]:
        """Ask each node for its address and the GPUs of its bundle."""
        import ray

        def here() -> tuple[str, str, list[str]]:
            context = ray.get_runtime_context()
            ids = context.get_accelerator_ids().get("GPU", [])
            return context.get_node_id(), ray.util.get_node_ip_address(), sorted(map(str, ids), key=_number)

        ask = ray.remote(num_cpus=0, num_gpus=self.gpus)(here)
        found = ray.get([ask.options(scheduling_strategy=self.strategy(node)).remote() for node in range(self.nodes)])
        self._check_kind(kind, {node_id: address for node_id, address, _ in found})
        return [Seat(node, gpu, address) for node, (_, address, gpus) in enumerate(found) for gpu in gpus]

    def _check_kind(self, kind: str | None, ours: dict[str, str]) -> None:
        """RunError where Ray knows a node's GPUs as others than the config says."""
        import ray

        if kind in (None, "any"):
            return
        for node in ray.nodes():
            named = [key.removeprefix(ACCELERATOR) for key in node["Resources"] if key.startswith(ACCELERATOR)]
            if node["NodeID"] in ours and named and kind not in named:
                raise RunError(
                    f"cluster.gpu: {kind}, but node {ours[node['NodeID']]} has {', '.join(named)}; type the cluster "
                    "of the machines that are there (cluster=h100, h200, b200), or keep other nodes out of this cluster"
                )

    def strategy(self, node: int) -> Any:
        """How Ray is told to put a worker on a node."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=node)

    def release(self) -> None:
        from ray.util import remove_placement_group

        remove_placement_group(self.group)


def shortage(nodes: int, gpus: int) -> str:
    """What a connected Ray cluster lacks for a run, e.g. "2 of 4 nodes with 8 GPUs are there; missing 16 GPUs"."""
    import ray

    alive = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    there = sum(count >= gpus for count in alive)
    smaller = [count for count in alive if 0 < count < gpus]
    if there < nodes:
        text = f"{there} of {nodes} nodes with {gpus} GPUs are there; missing {(nodes - there) * gpus} GPUs"
        return text + (f" ({len(smaller)} nodes have fewer, at most {max(smaller)})" if smaller else "")
    free = int(ray.available_resources().get("GPU", 0))
    told = f"other jobs hold some: {free} of {sum(alive)} are free"
    return f"{nodes} of {nodes} nodes with {gpus} GPUs are there, but {told}"


def span(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 3] -> "0-3"."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _number(gpu: str) -> tuple[int, str]:
    return (int(gpu), "") if gpu.isdigit() else (0, gpu)
