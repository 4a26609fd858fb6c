"""Weights from a trainer's rank straight to the servers' ranks, in a process group of their own.

The rank announces what it will send (names, order, and the hash of every parameter as each server rank should hold it),
which travels to the engines as a small message; then it sends bucket by bucket while the servers receive.
NCCL between GPUs, gloo between CPUs. The group outlives updates; a new one is made after an engine was replaced.
Source of the rendezvous, which both sides must do alike: sglang 0.5.23, `init_custom_process_group`.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from lpexp.model import Model
from lpexp.precision import Parts, Precision
from lpexp.rollout.sglang.held import Expected, expectations
from lpexp.rollout.sglang.transport import Piece, buckets, named, pieces

if TYPE_CHECKING:
    from torch import Tensor


LOOPBACK = "127.0.0.1"


class Meeting(NamedTuple):
    """A process group: the sending rank is its first, then come the ranks of engine 0, of engine 1, ..."""

    address: str
    port: int
    name: str
    engines: int
    ranks: int  # of one engine
    ep: int
    limit: int  # bytes of a bucket
    device: str  # "cpu" | "cuda": of the servers
    timeout_s: float

    @property
    def backend(self) -> str:
        return "gloo" if self.device == "cpu" else "nccl"

    def joining(self, engine: int) -> dict[str, Any]:
        """What a server is told."""
        return {
            "master_address": self.address,
            "master_port": self.port,
            "rank_offset": 1 + engine * self.ranks,
            "world_size": 1 + self.engines * self.ranks,
            "group_name": self.name,
            "backend": self.backend,
        }


class Announced(NamedTuple):
    """What will be sent, and what servers must report to hold afterwards."""

    meeting: Meeting
    buckets: list[list[Piece]]
    checksum: str
    expected: list[Expected]  # one a rank of a server


def announce(parts: Mapping[str, Parts], model: Model, precision: Precision, meeting: Meeting) -> Announced:
    from lpexp.precision.wire import checksum

    made = pieces(model, precision)
    expected = expectations(parts, model, precision, meeting.device, meeting.ranks, meeting.ep)
    sent = [[piece for param in bucket for piece in made[param]] for bucket in buckets(made, meeting.limit)]
    return Announced(meeting, sent, checksum(parts), expected)


class Sender:
    """The first rank of a meeting's group; blocks until the servers have joined."""

    def __init__(self, meeting: Meeting):
        self.meeting, self._group = meeting, _join(meeting)

    def send(self, parts: Mapping[str, Parts], model: Model, precision: Precision) -> None:
        import torch

        for bucket in buckets(pieces(model, precision), self.meeting.limit):
            works = [self._broadcast(tensor) for _, tensor in named(bucket, parts)]
            for work, _ in works:
                work.wait()
        if self.meeting.device == "cuda":
            torch.cuda.synchronize()

    def _broadcast(self, tensor: Tensor) -> tuple[Any, Tensor]:
        """The work, and the tensor that must live until it is done."""
        import torch

        there = tensor.to(self.meeting.device).contiguous()
        options = torch.distributed.BroadcastOptions()  # type: ignore[attr-defined]
        options.rootRank = 0
        return self._group.broadcast([there], options), there


def _join(meeting: Meeting) -> Any:
    import torch.distributed.distributed_c10d as c10d

    if meeting.address == LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = datetime.timedelta(seconds=meeting.timeout_s)
    world = meeting.joining(0)["world_size"]
    found = c10d.rendezvous(f"tcp://{meeting.address}:{meeting.port}", 0, world, timeout=timeout)
    store, rank, world = next(found)
    store.set_timeout(timeout)
    group, _ = c10d._new_process_group_helper(
        world,
        rank,
        [],
        c10d.Backend(meeting.backend),
        c10d.PrefixStore(meeting.name, store),
        group_name=c10d.GroupName(meeting.name),
        timeout=timeout,
    )
    return group
