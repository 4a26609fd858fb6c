"""What differs between two sides' parts of one tensor, found from the parts themselves: bytes, shapes, scales.

Left out: which of the differences matters; that is measured by scoring with and without it (lpexp/attribute/).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from lpexp.data import Param
from lpexp.precision import Parts, Precision, side

if TYPE_CHECKING:
    from torch import Tensor

# Causes, as the reports name them.
FORMAT, GROUP, SCALE_RULE, EXCLUDED = "format", "group size", "scale rule", "excluded module"
MISSING_SCALE, CODES = "missing scale", "other codes"


class Difference(NamedTuple):
    cause: str
    told: str  # both sides' words


def same(one: Parts, other: Parts) -> bool:
    """Equal names, types, shapes and bytes."""
    import torch

    return one.keys() == other.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))
        for a, b in ((one[suffix], other[suffix]) for suffix in one)
    )


def _bytes(part: Tensor) -> Tensor:
    import torch

    return part.contiguous().reshape(-1).view(torch.uint8)


def difference(
    param: Param, weight: Tensor, trainer: Precision, rollout: Precision, held: Parts, moe: bool
) -> Difference | None:
    """Why an engine's parts are not what the trainer multiplies with; None where they are.

    `weight` is the 16-bit tensor behind `held`, `trainer` and `rollout` are the sides' own precisions.
    """
    ours, theirs = side(param, trainer, moe), side(param, rollout, moe)
    made = ours.quantize(weight, param.name)
    if same(made, held):
        return None
    meant = theirs.quantize(weight, param.name)
    if not same(meant, held):
        return _spoiled(meant, held, theirs)
    return _declared(param, trainer, rollout, made, held, moe)


def _spoiled(meant: Parts, held: Parts, theirs: Precision) -> Difference:
    """The engine holds what its own precision does not make of these weights."""
    for suffix, part in held.items():
        if "scale" in suffix and suffix in meant and _ones(part) and not _ones(meant[suffix]):
            return Difference(MISSING_SCALE, f"{suffix} is 1 everywhere in the engine")
    return Difference(CODES, f"the engine holds codes that {theirs.name} does not make of these weights")


def _ones(part: Tensor) -> bool:
    return bool((part.float() == 1).all())


def _declared(param: Param, trainer: Precision, rollout: Precision, made: Parts, held: Parts, moe: bool) -> Difference:
    """Each side did what its precision says; they say different things."""
    covered = trainer.covers(param, moe), rollout.covers(param, moe)
    if covered[0] != covered[1] and type(trainer) is type(rollout):
        who = ("trainer", "rollout") if covered[0] else ("rollout", "trainer")
        return Difference(EXCLUDED, f"the {who[0]} quantises it, the {who[1]} does not")
    told = f"{side(param, trainer, moe).name} in the trainer, {side(param, rollout, moe).name} in the rollout"
    if covered == (True, True) and type(trainer) is type(rollout):
        fields = _fields(trainer, rollout)
        told = ", ".join(
            f"{name} {theirs} in the rollout, {ours} in the trainer" for name, (ours, theirs) in fields.items()
        )
        return Difference(GROUP if _other_groups(made, held) else SCALE_RULE, told)
    return Difference(FORMAT, told)


def _fields(trainer: Precision, rollout: Precision) -> Mapping[str, tuple[object, object]]:
    """Fields that change a code, where the two differ."""
    named = (name for name in type(trainer).model_fields if name not in ("name", "scope"))
    both = {name: (getattr(trainer, name), getattr(rollout, name)) for name in named}
    return {
        name: values
        for name, values in both.items()
        if values[0] != values[1] and trainer.model_copy(update={name: values[1]}).format() != trainer.format()
    }


def _other_groups(made: Parts, held: Parts) -> bool:
    """Are there more or fewer scales on one side?"""
    return any(
        "scale" in suffix and suffix in held and held[suffix].shape != part.shape for suffix, part in made.items()
    )


def inputs_differ(param: Param, trainer: Precision, rollout: Precision, moe: bool) -> Difference | None:
    """How products read their inputs, where that is not the same."""
    ours, theirs = side(param, trainer, moe), side(param, rollout, moe)
    if reading(ours) == reading(theirs):
        return None
    told = f"as {ours.name} in the trainer, as {theirs.name} in the rollout"
    if type(trainer) is type(rollout):
        if trainer.covers(param, moe) != rollout.covers(param, moe):
            return Difference(EXCLUDED, told)
        fields = _fields(trainer, rollout).items()
        told = ", ".join(f"{name} {theirs} in the rollout, {ours} in the trainer" for name, (ours, theirs) in fields)
        return Difference(SCALE_RULE, told)
    return Difference(FORMAT, told)


def reading(precision: Precision) -> tuple[object, ...]:
    """Equal where two precisions read, and round, the inputs of a product alike."""
    reads = type(precision).read is not Precision.read
    return (precision.plain.carries, *((type(precision), json.dumps(precision.format())) if reads else ()))
