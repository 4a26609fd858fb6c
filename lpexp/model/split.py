"""How production backends split a model's matrices over GPUs, and which splits cut a block or a group of a precision.

Matrices that widen (queries, keys, values, gate, up) are cut by rows, those that narrow (attention output, down) by
columns. Latent attention's down-projections are copied to every rank, whole. Gate and up are one matrix in memory, and
so are queries, keys and values: their pieces must end where blocks end, on one GPU too.
Source: Megatron-core's parallel linears, SGLang's fused ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from lpexp.data import Param
from lpexp.errors import Mistake
from lpexp.model import Model
from lpexp.precision import EXPERTS, Precision, patterns

BY_ROWS = ("attn_qkv", "mlp_up", "shared_up", "expert_up")
WHOLE = (".q_a_proj.weight", ".kv_a_proj_with_mqa.weight")


class Ways(NamedTuple):
    """Matrices are cut into `count` shards, because of what `because` says ("trainer.tp 8")."""

    count: int
    key: str  # of the Mistake
    because: str
    instead: Callable[[int], str]  # what to type for another count


def cuts(
    model: Model, precision: Precision, linears: Ways, experts: Ways, fused: bool, interleaved: bool = False
) -> Iterator[Mistake]:
    """A Mistake for each kind of matrix whose shards are no whole blocks or groups.

    `fused`: pieces lie in one matrix; `interleaved`: queries, keys and values head by head, as Megatron lays them.
    """
    found: dict[str, Mistake] = {}
    for param in model.params():
        if not precision.covers(param, model.moe is not None) or param.name.endswith(WHOLE):
            continue
        ways = experts if param.kind in EXPERTS else linears
        kind = patterns([param.name])
        if kind in found or (ways.count == 1 and not fused):
            continue
        by_rows = param.kind in BY_ROWS
        block = precision.block[0 if by_rows else 1]

        def shard(count: int, param: Param = param, by_rows: bool = by_rows) -> float:
            if by_rows and param.kind == "attn_qkv" and model.mla is None:
                heads = param.shape[0] // model.head_dim
                return model.head_dim * (1 if interleaved and fused else max(heads / count, 1))
            return param.shape[0 if by_rows else 1] / count

        if (ways.count == 1 and not by_rows) or not shard(ways.count) % block:
            continue
        fitting = [n for n in range(ways.count, 0, -1) if ways.count % n == 0 and not shard(n) % block]
        found[kind] = _mistake(kind, param.shape[0 if by_rows else 1], by_rows, shard(ways.count), block, ways, fitting)
    yield from found.values()


def _mistake(kind: str, size: int, by_rows: bool, shard: float, block: int, ways: Ways, fitting: list[int]) -> Mistake:
    what = "rows" if by_rows else "columns"
    unit = f"the {'block' if by_rows else 'block or group'} of {block}" if block > 1 else "whole numbers"
    way = f"use {ways.instead(fitting[0])}" if fitting else "choose another precision or scope for it"
    over = f"{size} {what} of {kind} over {ways.because} are pieces of {shard:g}"
    return Mistake(ways.key, f"{over}, which cut {unit}; {way}")
