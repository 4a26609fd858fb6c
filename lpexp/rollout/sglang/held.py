"""What an SGLang server must report to hold: the hash of every parameter, from the parts that it was sent.

A server fuses (q, k and v; gate and up; all experts of a layer), splits over its ranks, and hashes what it holds. This
module does the same with the parts. A quantised weight is hashed as its bf16 values where SGLang's checker decodes it,
and cannot be told where a kernel's own layout replaces it: those are counted as unchecked, and the canary is left.
Source: sglang 0.5.23, srt/utils/weight_checker.py and kernels/ops/memory/gpu_tensor_hash.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lpexp.data import Param
from lpexp.model import Model
from lpexp.precision import Parts, Precision, side

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VOCAB_MULTIPLE = 64  # rows of the embedding and the head that a server pads to
FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "q_a_proj": ("fused_qkv_a_proj_with_mqa", 0),
}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
BY_COLUMNS = ("o_proj", "down_proj")  # split along their inputs; the rest along their outputs
WHOLE = ("norm", "router", "router_bias")


class Place(NamedTuple):
    """Where a server puts a checkpoint tensor: its parameter, and the order among those that share it."""

    name: str
    order: tuple[int, ...] = ()


def place(param: Param, model: Model) -> Place:
    if found := EXPERT.fullmatch(param.name):
        at, expert, part = found.groups()
        return Place(f"{at}.{'w2' if part == 'down' else 'w13'}_weight", (int(expert), part == "up"))
    at, _, leaf = param.name.rpartition(".")
    at, _, module = at.rpartition(".")
    if model.mla and model.mla.q_lora_rank is None:
        fused = {name: to for name, to in FUSED.items() if name not in ("q_proj", "q_a_proj")}
    elif model.mla:
        fused = {name: to for name, to in FUSED.items() if name != "q_proj"}
        fused["kv_a_proj_with_mqa"] = ("fused_qkv_a_proj_with_mqa", 1)
    else:
        fused = FUSED
    if module in fused:
        name, order = fused[module]
        return Place(f"{at}.{name}.{leaf}", (order,))
    return Place(param.name)


Expected = dict[str, tuple[str, str]]  # parameter of a server -> its hash, and the class and name of what it is made of


def expectations(
    parts: Mapping[str, Parts], model: Model, precision: Precision, device: str, tp: int, ep: int
) -> list[Expected]:
    """What each rank of a server must report, where that can be told."""
    return [
        {
            name: (hash_of(tensor, device), f"{_kinds(params)}: {params[0].name}{' ...' if len(params) > 1 else ''}")
            for name, params, tensor in held(parts, model, precision, rank, tp, ep)
        }
        for rank in range(tp)
    ]


def _kinds(params: Sequence[Param]) -> str:
    return ", ".join(dict.fromkeys(param.kind for param in params))


def held(
    parts: Mapping[str, Parts], model: Model, precision: Precision, rank: int = 0, tp: int = 1, ep: int = 1
) -> Iterator[tuple[str, list[Param], Tensor]]:
    """(parameter of the server, the tensors it is made of, what a rank holds), where that can be told."""
    import torch

    moe = model.moe is not None
    made_of: dict[str, list[tuple[Place, Param]]] = {}
    for param in model.params():
        if param.name in parts:
            made_of.setdefault(place(param, model).name, []).append((place(param, model), param))
    for name, members in made_of.items():
        members.sort(key=lambda member: member[0].order)
        params = [param for _, param in members]
        values = [_values(parts[param.name], side(param, precision, moe), precision) for param in params]
        if any(value is None for value in values):
            continue
        shards = [
            _shard(value, param, model, rank, tp, ep)
            for value, param in zip(values, params, strict=True)
            if value is not None
        ]
        if params[0].kind in ("expert_up", "expert_down"):
            yield name, params, _experts(shards, members, model, rank, tp, ep)
        else:
            yield name, params, torch.cat(shards) if len(shards) > 1 else shards[0]


def _values(parts: Parts, served: Precision, precision: Precision) -> Tensor | None:
    """The tensor that a server's checker hashes for these parts; None where it hashes a layout of its own."""
    import torch

    if len(parts) == 1:
        return parts["weight"]
    if precision.sglang().decoded:
        return served.dequantize(parts).to(torch.bfloat16)
    return None


def _shard(value: Tensor, param: Param, model: Model, rank: int, tp: int, ep: int) -> Tensor:
    """What one rank of `tp` holds of a tensor; experts are split by `ep` first (see `_experts`)."""
    import torch

    if param.kind in ("embed", "head"):
        rows = -(-value.shape[0] // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        padded = torch.cat([value, value.new_zeros(rows - value.shape[0], *value.shape[1:])])
        return padded.chunk(tp)[rank]
    split, at = (tp // ep, rank % (tp // ep)) if param.kind.startswith("expert") else (tp, rank)
    if split == 1 or param.kind in WHOLE:
        return value
    module = param.name.split(".")[-2]
    if module in ("q_a_proj", "kv_a_proj_with_mqa"):
        return value
    if module in BY_COLUMNS:
        return value.chunk(split, 1)[at]
    if module in ("k_proj", "v_proj") and split > model.num_key_value_heads:  # a head is held by several ranks
        return value.chunk(model.num_key_value_heads)[at * model.num_key_value_heads // split]
    return value.chunk(split)[at]


def _experts(
    shards: Sequence[Tensor], members: Sequence[tuple[Place, Param]], model: Model, rank: int, tp: int, ep: int
) -> Tensor:
    """[experts of this rank, rows, inputs]: gate above up in w13, down alone in w2."""
    import torch

    assert model.moe is not None
    each, group = model.moe.num_experts // ep, rank // (tp // ep)
    stacks: dict[int, list[Tensor]] = {}
    for shard, (where, _) in zip(shards, members, strict=True):
        stacks.setdefault(where.order[0], []).append(shard)
    mine = range(group * each, (group + 1) * each)
    return torch.stack([torch.cat(stacks[expert]) for expert in mine])


# -- the hashes --------------------------------------------------------------------------------------------------------


def hash_of(tensor: Tensor, device: str) -> str:
    """What a server on this kind of device reports for a tensor, 16 hex digits."""
    import torch

    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if device == "cpu":
        return hashlib.sha256(raw.cpu().numpy().data).digest()[:8].hex()
    return f"{_gpu_hash(raw):016x}"


TILE = 8192  # 32-bit words that are summed before a second mixing
SEED = 0x243F6A88
SEEDS = (SEED, (SEED * 0x9E3779B1 ^ 0xDEADBEEF) & 0xFFFFFFFF)
PLACES = ((0x27D4EB2D, 15), (0x165667B1, 13))
LOW = 0xFFFFFFFF


def _gpu_hash(raw: Tensor) -> int:
    """The GPU kernel's hash of bytes, on whatever device they are: 32-bit arithmetic in int64."""
    import torch
    from torch.nn.functional import pad

    words = pad(raw, (0, -len(raw) % 4)).view(torch.int32).long() & LOW
    if not len(words):
        return 0
    total = 0
    for start in range(0, len(words), TILE * 256):  # a few megabytes at a time
        some = words[start : start + TILE * 256]
        index = torch.arange(start, start + len(some), device=raw.device) & LOW
        halves = []
        for seed, (factor, turn) in zip(SEEDS, PLACES, strict=True):
            at = ((index * factor + seed) & LOW) ^ (((index << turn) | (index >> (32 - turn))) & LOW)
            mixed = pad(_mix(some ^ at), (0, -len(some) % TILE)).view(-1, TILE).sum(1) & LOW
            halves.append(_mix(mixed ^ (len(words) * 4 & LOW)))
        total += sum((high << 32) + low for high, low in zip(*(half.tolist() for half in halves), strict=True))
    return _splitmix(total & (1 << 64) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finaliser of 32-bit words."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & LOW
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & LOW
    return x ^ (x >> 16)


def _splitmix(x: int) -> int:
    whole = (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & whole
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & whole
    return x ^ (x >> 31)
