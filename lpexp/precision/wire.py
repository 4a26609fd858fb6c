"""Weights on their way from trainer to rollout: quantised once, in the wire's precision, tensor by tensor.

`ship` is the meaning of a weight update; every transport moves what it yields and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
import xxhash
from torch import Tensor

from lpexp.data import Param
from lpexp.precision import Parts, Precision, side

Frozen = tuple[str, tuple[int, ...], np.ndarray]  # dtype name, shape, bytes


def ship(
    weights: Mapping[str, Tensor], params: Iterable[Param], precision: Precision, moe: bool
) -> Iterator[tuple[Param, Parts]]:
    """(param, its served parts), one tensor in memory at a time."""
    for param in params:
        yield param, side(param, precision, moe).quantize(weights[param.name])


def freeze(parts: Parts) -> dict[str, Frozen]:
    """Tensors of any dtype as raw bytes that every process and every torch can read."""
    return {suffix: _bytes(tensor) for suffix, tensor in parts.items()}


def thaw(parts: Mapping[str, Frozen], device: torch.device | str = "cpu") -> Parts:
    return {
        suffix: torch.from_numpy(raw.copy()).view(getattr(torch, dtype)).view(shape).to(device)
        for suffix, (dtype, shape, raw) in parts.items()
    }


def _bytes(tensor: Tensor) -> Frozen:
    flat = tensor.detach().cpu().contiguous()
    return str(flat.dtype).removeprefix("torch."), tuple(flat.shape), flat.reshape(-1).view(torch.uint8).numpy()


def checksum(weights: Mapping[str, Parts]) -> str:
    """XXH3 over names, dtypes, shapes and bytes, 16 hex digits; recomputed from what an engine holds.

    It tells accidents, not malice, and costs a twentieth of SHA-256 on the way between two steps.
    """
    return checksum_frozen({name: freeze(parts) for name, parts in weights.items()})


def checksum_frozen(weights: Mapping[str, Mapping[str, Frozen]]) -> str:
    """The same, of weights on their way."""
    found = xxhash.xxh3_64()
    for name in sorted(weights):
        for suffix, (dtype, shape, raw) in sorted(weights[name].items()):
            found.update(f"{name}|{suffix}|{dtype}|{shape}|".encode())
            found.update(raw.data)
    return found.hexdigest()[:16]


def quantized_share(params: Iterable[Param], precision: Precision, moe: bool) -> float:
    """Parameters that travel quantised / all of them."""
    sizes = [(math.prod(param.shape), precision.covers(param, moe)) for param in params]
    return sum(size for size, covered in sizes if covered) / sum(size for size, _ in sizes)
