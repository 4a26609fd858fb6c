"""The masters of a torch_dist checkpoint, one checkpoint tensor at a time, whatever layout wrote them.

Reads torch.distributed.checkpoint's own index and files; megatron-core is not needed. The index is a pickle of torch's:
verify the checkpoint's manifest first. Left out: optimiser moments.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpexp.errors import RunError
from lpexp.model import Model
from lpexp.trainer.megatron.names import Piece, Place, Table

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "torch_dist"
MASTERS = "optimizer.state.param."  # before a tensor's name: its float32 master
STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)")  # layers that are alike are one tensor, the first axis says which
EXPERTS = re.compile(r"(.+\.mlp\.experts\.)experts\.(.+)")  # as experts always are


class Masters:
    """What lies in a checkpoint's folder `torch_dist`."""

    def __init__(self, directory: Path, model: Model):
        self.directory, self.params = directory, {param.name: param for param in model.params()}
        self.files: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
        for (key, offset), place in _places(directory).items():
            self.files.setdefault(key, []).append((offset, place))
        table = Table(model, Place())  # of one rank, which holds everything
        self.places: dict[str, list[tuple[str, tuple[int, ...], Piece]]] = {}
        for key in self.files:
            if key.startswith(("decoder.", "embedding.", "output_layer.")) and "_extra_state" not in key:
                for at, local in self._locals(key, model):
                    for piece in table.pieces(local):
                        self.places.setdefault(piece.name, []).append((key, at, piece))
        if missing := sorted(set(self.params) - set(self.places)):
            raise RunError(f"{directory} lacks {missing[0]} and {len(missing) - 1} more")

    def _locals(self, key: str, model: Model) -> Iterator[tuple[tuple[int, ...], str]]:
        """(leading indices, name on one rank) of every tensor that is stored under a key."""
        layered = STACKED.fullmatch(key)
        layers = [((i,), f"decoder.layers.{i}.{layered[1]}") for i in range(model.num_hidden_layers)] if layered else []
        for at, name in layers or [((), key)]:
            expert = EXPERTS.fullmatch(name)
            if expert is None or model.moe is None:
                yield at, name
            else:
                for e in range(model.moe.num_experts):
                    yield (*at, e), f"{expert[1]}local_experts.{e}.{expert[2]}"

    def tensor(self, name: str) -> Tensor:
        """A whole master in float32."""
        import torch

        whole = torch.full(self.params[name].shape, float("nan"))
        for key, at, piece in self.places[name]:
            stored = MASTERS + key if MASTERS + key in self.files else key
            rows = piece.rows[1] - piece.rows[0]
            for offset, place in self.files[stored]:
                lead, (first, *rest) = offset[: len(at)], offset[len(at) :]
                if lead != at or first >= piece.at + rows:
                    continue
                shard = _read(self.directory, place).flatten(0, len(at)) if at else _read(self.directory, place)
                low, high = max(first, piece.at), min(first + len(shard), piece.at + rows)
                if low < high:
                    to = piece.rows[0] + low - piece.at
                    columns = [slice(o, o + n) for o, n in zip(rest, shard.shape[1:], strict=True)]
                    whole[(slice(to, to + high - low), *columns)] = shard[low - first : high - first].float()
        if not bool(torch.isfinite(whole).all()):
            raise RunError(f"{self.directory}: {name} is not all there, or not finite")
        return whole


def difference(a: Path, b: Path) -> str | None:
    """The first tensor that two folders, written by the same layout, do not share to the bit."""
    import torch

    left, right = _places(a), _places(b)
    if left.keys() != right.keys():
        return f"{min(left.keys() ^ right.keys())[0]} is not stored alike; another layout wrote one of them"
    for key, offset in sorted(left):
        one, other = (_read(folder, places[key, offset]) for folder, places in ((a, left), (b, right)))
        if one.dtype != other.dtype or not torch.equal(
            *(t.contiguous().view(-1).view(torch.uint8) for t in (one, other))
        ):
            return f"{key} differs"
    return None


def _places(directory: Path) -> dict[tuple[str, tuple[int, ...]], Any]:
    """{(key, offset of the shard in the whole): where it lies} of every stored tensor."""
    from torch.distributed.checkpoint import FileSystemReader

    found = FileSystemReader(directory).read_metadata().storage_data or {}
    return {(index.fqn, tuple(index.offset)): place for index, place in found.items() if index.offset is not None}


def _read(directory: Path, place: Any) -> Tensor:
    import torch

    with (directory / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        return torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
