"""Safetensors files by the byte: headers read and checked, rows of a tensor read, shards planned and written in place.

Where every part lies is decided before anything is computed, so several processes may write one file, in any order,
and the bytes are the same. The library maps whole files and writes whole files; here a few rows are in memory.
Left out: dtypes that no precision stores. Format: 8 bytes of header length, JSON, then the data without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lpexp.disk import write_json
from lpexp.precision import STORED, Layout, size_of

if TYPE_CHECKING:
    from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 4 * 2**30
HEADER_BYTES = 100 * 2**20  # no header is longer
NAMES: dict[str, str] = {word: dtype for dtype, (word, _) in STORED.items()}


class Entry(NamedTuple):
    """One stored tensor: where its bytes are."""

    file: str
    dtype: str  # as torch names it; a dtype that no precision stores keeps its word in the header
    shape: tuple[int, ...]
    start: int  # in the file

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * STORED[self.dtype][1]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * STORED[self.dtype][1]


def read_header(path: Path) -> dict[str, Entry]:
    """{tensor name: its entry}; ValueError where header and file disagree, OSError where it cannot be read."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, HEADER_BYTES):
            raise ValueError(f"it has {size} bytes, its header would have {length}")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found, base = {}, 8 + length
    end = 0
    for name, told in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        word, shape, (first, last) = told["dtype"], tuple(told["shape"]), told["data_offsets"]
        dtype = str(NAMES.get(word, word))
        if first != end or (dtype in STORED and last - first != math.prod(shape) * STORED[dtype][1]):
            raise ValueError(f"the bytes {first} to {last} that it gives to {name} cannot be right")
        found[name], end = Entry(path.name, dtype, shape, base + first), last
    if base + end != size:
        raise ValueError(f"it has {size} bytes, its header speaks of {base + end}")
    return found


def read(directory: Path, entry: Entry, first: int = 0, last: int | None = None) -> Tensor:
    """Rows first..last of a tensor (all of a scalar), in its stored dtype."""
    import torch

    if not entry.shape:
        first, last = 0, None
    count = (entry.shape[0] if entry.shape else 1) if last is None else last
    data = torch.empty((count - first) * entry.row_bytes if entry.shape else entry.nbytes, dtype=torch.uint8)
    shape = (count - first, *entry.shape[1:]) if entry.shape else ()
    dtype = getattr(torch, entry.dtype)
    if not data.numel():
        return torch.empty(shape, dtype=dtype)
    with (directory / entry.file).open("rb", buffering=0) as file:
        _fill(file.fileno(), data.numpy().data, entry.start + first * entry.row_bytes, directory / entry.file)
    return data.view(dtype).view(shape)


def _fill(descriptor: int, view: memoryview, at: int, path: Path) -> None:
    while view:
        got = os.preadv(descriptor, [view], at)
        if not got:
            raise OSError(f"{path} ends at byte {at}; it became shorter while it was read")
        view, at = view[got:], at + got


# -- writing -----------------------------------------------------------------------------------------------------------
class Plan(NamedTuple):
    """Every file of a directory before its first byte is written."""

    headers: dict[str, bytes]  # file -> what it opens with
    sizes: dict[str, int]  # file -> its bytes
    places: dict[str, Entry]  # stored name -> where it goes

    @property
    def total(self) -> int:
        """Bytes of all tensors: the index's total_size."""
        return sum(self.sizes.values()) - sum(map(len, self.headers.values()))


def plan(groups: Iterable[tuple[str, Layout]], limit: int) -> Plan:
    """Shards of at most `limit` bytes, or one tensor's parts where those are more; a tensor's parts stay together."""
    shards: list[dict[str, tuple[tuple[int, ...], str]]] = []
    held = limit + 1
    for name, layout in groups:
        size = size_of(layout)
        if held + size > limit:
            shards.append({})
            held = 0
        shards[-1] |= {part_name(name, suffix): told for suffix, told in layout.items()}
        held += size
    made = Plan({}, {}, {})
    for i, parts in enumerate(shards):
        _lay_out(made, f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors", parts)
    return made


def _lay_out(made: Plan, file: str, parts: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """Wide elements first, so that each lies at a multiple of its own size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in sorted(parts.items(), key=lambda item: -STORED[item[1][1]][1]):
        word, item = STORED[dtype]
        size = math.prod(shape) * item
        header[name] = {"dtype": word, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    made.headers[file] = len(text).to_bytes(8, "little") + text
    made.sizes[file] = len(made.headers[file]) + end
    for name, (shape, dtype) in parts.items():
        start = len(made.headers[file]) + header[name]["data_offsets"][0]
        made.places[name] = Entry(file, dtype, shape, start)


def create(directory: Path, made: Plan) -> None:
    """Every file at its full size, with its header; the data are holes."""
    for file, header in made.headers.items():
        with (directory / file).open("wb") as opened:
            opened.write(header)
            opened.truncate(made.sizes[file])


def write(directory: Path, entry: Entry, tensor: Tensor, first: int = 0) -> memoryview:
    """Put rows at their place, the first of them at row `first`; returns their bytes."""
    assert str(tensor.dtype) == f"torch.{entry.dtype}" and tuple(tensor.shape[1:]) == entry.shape[1:], entry
    left = written = raw(tensor)
    at = entry.start + first * entry.row_bytes
    descriptor = os.open(directory / entry.file, os.O_WRONLY)
    try:
        while left:
            done = os.pwrite(descriptor, left, at)
            left, at = left[done:], at + done
    finally:
        os.close(descriptor)
    return written


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes, row by row."""
    import torch

    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data.cast("B")


def write_index(directory: Path, made: Plan) -> None:
    """The index with true byte sizes."""
    places = {name: entry.file for name, entry in sorted(made.places.items())}
    write_json(directory / INDEX, {"metadata": {"total_size": made.total}, "weight_map": places})


def part_name(name: str, suffix: str) -> str:
    """The stored name of one part of a tensor: ("a.weight", "weight_scale") -> "a.weight_scale"."""
    if name.endswith(".weight"):
        return name.removesuffix("weight") + suffix
    assert suffix == "weight", f"{name} is no weight, it cannot have a part {suffix}"
    return name
