"""How weights get from an engine's actor into its server. Three ways that move the same bytes.

`disk`: a Hugging Face directory that the server reads; works everywhere, and is what the others are tested against.
`tensors`: memory that both processes of one node see: shared memory for a CPU server, CUDA IPC for one on GPUs.
`broadcast`: the trainer's ranks send to the servers' ranks in a process group (NCCL between GPUs, gloo between CPUs);
nothing passes through the actor.
Left out: RDMA, deltas, trainers and servers that share memory without a copy.
"""

from __future__ import annotations

import fcntl
import io
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from lpexp.data import Param
from lpexp.model import Model
from lpexp.model.shards import part_name
from lpexp.precision import STORED, Parts, Precision, expected, side

if TYPE_CHECKING:
    from torch import Tensor

    from lpexp.rollout.sglang.client import Client

ALIGNED = 64  # bytes: where a tensor may begin in a bucket
KEPT_VERSIONS = 2  # directories: an engine may still read the one before
Named = tuple[str, "Tensor"]


class Transport(Protocol):
    def send(self, client: Client, parts: Mapping[str, Parts], version: int) -> dict[str, float]:
        """Give all weights to a server that is paused; seconds by what they were spent on: transfer, load."""
        ...


# -- what is sent together ---------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """One stored tensor on its way."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = STORED[self.dtype][1]
        for n in self.shape:
            size *= n
        return size


def pieces(model: Model, precision: Precision) -> dict[Param, list[Piece]]:
    """Everything that an update moves, tensor by tensor, in the order of a forward pass; told by the config alone."""
    moe = model.moe is not None
    return {
        param: [
            Piece(part_name(param.name, suffix), dtype, shape)
            for suffix, (shape, dtype) in expected(side(param, precision, moe), param.shape).items()
        ]
        for param in model.params()
    }


def buckets(made: Mapping[Param, list[Piece]], limit: int) -> Iterator[list[Param]]:
    """The tensors in order, together at most `limit` bytes, or what cannot be parted where that is more.

    The parts of a tensor, and an attention block, which some models fuse while they load, are not parted.
    """
    bucket: list[Param] = []
    size = 0
    for group in _inseparable(made):
        more = sum(piece.nbytes + ALIGNED for param in group for piece in made[param])
        if bucket and size + more > limit:
            yield bucket
            bucket, size = [], 0
        bucket += group
        size += more
    if bucket:
        yield bucket


def _inseparable(params: Iterable[Param]) -> Iterator[list[Param]]:
    group: list[Param] = []
    at = None
    for param in params:
        block = param.name.partition(".self_attn.")[0] if ".self_attn." in param.name else param.name
        if group and block != at:
            yield group
            group = []
        group.append(param)
        at = block
    if group:
        yield group


# -- the three ways ----------------------------------------------------------------------------------------------------


class Disk:
    """Written once a node by whichever engine comes first; removed when two newer versions are there."""

    def __init__(self, model: Model, precision: Precision, folder: Path, timeout_s: float):
        self.model, self.precision, self.folder, self.timeout_s = model, precision, folder, timeout_s

    def send(self, client: Client, parts: Mapping[str, Parts], version: int) -> dict[str, float]:
        begin = time.perf_counter()
        directory = self._written(parts, version)
        written = time.perf_counter()
        client.load_directory(str(directory), version, self.timeout_s)
        return {"transfer": written - begin, "load": time.perf_counter() - written}

    def _written(self, parts: Mapping[str, Parts], version: int) -> Path:
        from lpexp.model import hf

        self.folder.mkdir(parents=True, exist_ok=True)
        directory = self.folder / f"{version:06d}"
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not directory.exists():
                plain = self.model.model_copy(update={"path": None})  # the server has its own tokenizer's files
                hf.save(directory, plain, parts.items(), self.precision)
            for old in sorted(path for path in self.folder.iterdir() if path.name.isdigit())[:-KEPT_VERSIONS]:
                shutil.rmtree(old)
        return directory


class Tensors:
    """Bucket by bucket, each in one piece of memory of which the server gets the handle."""

    def __init__(self, model: Model, precision: Precision, limit: int, ranks: int, device: str, timeout_s: float):
        self.made = pieces(model, precision)
        self.limit, self.ranks, self.device, self.timeout_s = limit, ranks, device, timeout_s

    def send(self, client: Client, parts: Mapping[str, Parts], version: int) -> dict[str, float]:
        spent = {"transfer": 0.0, "load": 0.0}
        cuts = list(buckets(self.made, self.limit))
        mark = time.perf_counter()
        client.begin(self.timeout_s)
        spent["load"] += time.perf_counter() - mark
        for number, params in enumerate(cuts, 1):
            mark = time.perf_counter()
            named = [
                (part_name(param.name, suffix), part) for param in params for suffix, part in parts[param.name].items()
            ]
            shared = together(named, self.device)
            payloads = [handles(shared) for _ in range(self.ranks)]
            copied = time.perf_counter()
            client.load_tensors(payloads, version if number == len(cuts) else None, self.timeout_s)
            del shared  # only now: the server has copied what it needed
            spent["transfer"] += copied - mark
            spent["load"] += time.perf_counter() - copied
        mark = time.perf_counter()
        client.end(self.timeout_s)
        spent["load"] += time.perf_counter() - mark
        return spent


def named(params: Iterable[Param], parts: Mapping[str, Parts]) -> list[Named]:
    """The stored tensors of these, under their names in a checkpoint."""
    return [(part_name(param.name, suffix), part) for param in params for suffix, part in parts[param.name].items()]


def together(tensors: Sequence[Named], device: str) -> list[Named]:
    """The same tensors as views of one buffer, in memory that another process can open."""
    import torch

    starts, at = [], 0
    for _, tensor in tensors:
        starts.append(at)
        at += -(-tensor.nbytes // ALIGNED) * ALIGNED
    buffer = torch.empty(max(at, 1), dtype=torch.uint8, device=device)
    if buffer.device.type == "cpu":
        torch.multiprocessing.set_sharing_strategy("file_system")  # a name that a stranger can open
        buffer.share_memory_()
    views = []
    for start, (name, tensor) in zip(starts, tensors, strict=True):
        view = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        views.append((name, view.copy_(tensor)))
    if buffer.device.type == "cuda":
        torch.cuda.synchronize(buffer.device)
    return views


def handles(shared: list[Named]) -> bytes:
    """What a server's rank opens this memory with. GPUs are named by their UUID: its numbers are another process's."""
    from multiprocessing.reduction import ForkingPickler

    import torch.multiprocessing.reductions as reductions

    class Portable(ForkingPickler):
        def reducer_override(self, obj: Any) -> Any:
            import torch

            if not (isinstance(obj, torch.Tensor) and obj.is_cuda):
                return NotImplemented
            rebuild, told = reductions.reduce_tensor(obj)
            uuid = str(torch.cuda.get_device_properties(obj.device).uuid)
            return rebuild, (*told[:DEVICE], uuid, *told[DEVICE + 1 :])

    written = io.BytesIO()
    Portable(written).dump(shared)
    return written.getvalue()


DEVICE = 6  # of the arguments that torch rebuilds a CUDA tensor from
