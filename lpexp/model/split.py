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


class Cut(NamedTuple):
    """How matrices of one size are cut."""

    ways: Ways
    rows: bool  # else columns
    size: int
    piece: float
    block: int


def cuts(
    model: Model, precision: Precision, linears: Ways, experts: Ways, fused: bool, interleaved: bool = False
) -> Iterator[Mistake]:
    """A Mistake for each size of matrix whose shards are no whole blocks or groups.

    `fused`: pieces lie in one matrix; `interleaved`: queries, keys and values head by head, as Megatron lays them.
    """
    covered = [p for p in model.params() if precision.covers(p, model.moe is not None) and not p.name.endswith(WHOLE)]

    def piece(param: Param, count: int) -> float:
        """Rows or columns of a shard that one block must not leave."""
        if param.kind == "attn_qkv" and model.mla is None:
            heads = param.shape[0] // model.head_dim
            return model.head_dim * (1 if fused and interleaved else max(heads / count, 1))
        return param.shape[_axis(param)] / count

    def whole(param: Param, count: int) -> bool:
        uncut = count == 1 and not (fused and _axis(param) == 0)
        return uncut or piece(param, count) % precision.block[_axis(param)] == 0

    found: dict[Cut, list[str]] = {}
    for param in covered:
        ways, axis = experts if param.kind in EXPERTS else linears, _axis(param)
        if not whole(param, ways.count):
            cut = Cut(ways, axis == 0, param.shape[axis], piece(param, ways.count), precision.block[axis])
            found.setdefault(cut, []).append(param.name)
    for cut, names in found.items():
        ways = cut.ways
        alike = [param for param in covered if (experts if param.kind in EXPERTS else linears) is ways]
        fewer = [n for n in range(ways.count - 1, 0, -1) if ways.count % n == 0]
        fits = next((n for n in fewer if all(whole(param, n) for param in alike)), None)
        way = "choose another precision or scope for it" if fits is None else f"use {ways.instead(fits)}"
        what, unit = ("rows", "block") if cut.rows else ("columns", "block or group")
        over = f"{cut.size} {what} of {patterns(names)} over {ways.because} are pieces of {cut.piece:g}"
        yield Mistake(ways.key, f"{over}, which cut the {unit} of {cut.block}; {way}")


def _axis(param: Param) -> int:
    return 0 if param.kind in BY_ROWS else 1
