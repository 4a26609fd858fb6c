"""A served directory, judged without torch: whose model it is, in which precision, and whether all of it is there.

What is read: config.json, the headers of the safetensors files, and the bytes of one embedding. Every byte of every
part is checked when an engine loads it (hf.py). Left out: tokenizers, which are the model's own (`model.path`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from lpexp.data import Param
from lpexp.errors import ConfigError
from lpexp.model import Model
from lpexp.model.hf import CONFIG, Stored, read_model, read_precision
from lpexp.precision import LINEARS, Precision, expected, side
from lpexp.precision.bf16 import Bf16
from lpexp.precision.fp32 import Fp32

PLAIN: dict[str, Precision] = {
    "bfloat16": Bf16(name="bf16"),
    "float32": Fp32(name="fp32"),
}  # stored as -> the precision that serves it so
EMBEDDING = "model.embed_tokens.weight"
COMPARED = 1 << 25  # elements of an embedding, so that a large one does not keep the judge waiting
# Fields of a Model that change no value of a forward pass.
NO_NUMBERS = {"name", "path", "parallel", "scale", "initializer_range", "max_position_embeddings"}


def precision_of(directory: str | Path, model: Model) -> Precision:
    """The precision that a directory serves `model` in; ConfigError when it is unreadable or of another model."""
    directory = Path(directory)
    if differs := difference(model, read_model(directory)):
        key, ours, theirs = differs
        raise ConfigError(f"{directory / CONFIG} has {key} {theirs}, model {model.name} has {ours}")
    params, moe = list(model.params()), model.moe is not None
    precision = read_precision(directory, model)
    stored = Stored(directory, model, precision)
    if precision is None:
        precision = _plain(directory, params, stored)
    for param in params:
        if not precision.covers(param, moe):
            found = stored.place[param.name].dtype
            _, served = expected(side(param, precision, moe), param.shape)["weight"]
            if found != served:
                raise ConfigError(f"{stored.where(param.name)} is {found}, {precision.name} serves it as {served}")
    return precision


def difference(ours: Model, theirs: Model) -> tuple[str, Any, Any] | None:
    """(key, ours, theirs) of the first field that makes two models compute differently."""
    unused = NO_NUMBERS | ({"head_dim"} if ours.mla and theirs.mla else set())
    return next(_differences(ours, theirs, unused), None)


def _differences(ours: Any, theirs: Any, unused: set[str]) -> Iterator[tuple[str, Any, Any]]:
    for key in type(ours).model_fields:
        left, right = getattr(ours, key), getattr(theirs, key)
        if key in unused or left == right:
            continue
        if isinstance(left, BaseModel) and isinstance(right, BaseModel):
            yield from ((f"{key}.{inner}", *values) for inner, *values in _differences(left, right, set()))
        else:
            yield key, left, right


def _plain(directory: Path, params: list[Param], stored: Stored) -> Precision:
    """What an unquantised directory is served in, by the type of its matrices."""
    kinds = sorted({stored.place[p.name].dtype for p in params if p.kind in LINEARS})
    if len(kinds) != 1 or kinds[0] not in PLAIN:
        held = " and ".join(kinds)
        raise ConfigError(f"{directory} stores its matrices as {held}; only {' or '.join(PLAIN)} is served as it is")
    return PLAIN[kinds[0]]


def copies(directory: str | Path, original: str | Path, model: Model) -> bool:
    """Do both directories hold the same embedding, which no quantiser touches? Its beginning, as bf16 values."""
    count = min(math.prod(next(p.shape for p in model.params() if p.kind == "embed")), COMPARED)
    return np.array_equal(_embedding(directory, model, count), _embedding(original, model, count))


def _embedding(directory: str | Path, model: Model, count: int) -> np.ndarray:
    """The first elements as bf16 bit patterns (float32 rounded to nearest even)."""
    directory = Path(directory)
    entry = Stored(directory, model, read_precision(directory, model)).place[EMBEDDING]
    kind = {"bfloat16": "<u2", "float32": "<u4", "float16": "<f2"}[entry.dtype]
    found = np.fromfile(directory / entry.file, kind, count, offset=entry.start)
    if entry.dtype == "bfloat16":
        return found
    bits: Any = found.astype("<f4").view("<u4") if entry.dtype == "float16" else found
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")


# -- against what a run serves -----------------------------------------------------------------------------------------


def agrees(found: Precision, served: Precision, params: list[Param], moe: bool) -> bool:
    """Would both make the same codes of every tensor?"""
    return found.format() == served.format() and found.contract(params, moe) == served.contract(params, moe)


def contradiction(found: Precision, served: Precision, mount: str, params: list[Param], moe: bool) -> tuple[str, str]:
    """The first difference, a sentence's end with {holder} for who says otherwise; and the overrides that mend it."""
    fields = type(found).model_fields
    alike = type(found) is type(served)
    changed = {}
    for name in fields:
        theirs, ours = getattr(found, name), getattr(served, name) if alike else fields[name].default
        if name != "name" and theirs != ours:
            one = found.model_copy(update={name: ours})
            if not agrees(one, found, params, moe):  # else it changes no served code
                changed[name] = (theirs, ours)
    typed = [f"{mount}={found.name}"]
    typed += [f"{mount}.{name}={_typed(name, theirs, found, params, moe)}" for name, (theirs, _) in changed.items()]
    if not alike or not changed:
        return f"{found.name}, {{holder}} has {served.name}", " ".join(typed)
    name, (theirs, ours) = next(iter(changed.items()))
    message = f"{found.name} with {name} {theirs}, {{holder}} has {ours}"
    if name == "scope":
        differs = next(p.name for p in params if found.covers(p, moe) != served.covers(p, moe))
        left = "leaves" if served.covers(next(p for p in params if p.name == differs), moe) else "quantises"
        message = f"{found.name} that {left} {differs}{' plain' if left == 'leaves' else ''}, {{holder}} does not"
    return message, " ".join(typed)


def _typed(name: str, value: Any, found: Precision, params: list[Param], moe: bool) -> str:
    """A value as it is typed on the command line; a scope by its module classes where they are whole."""
    if name == "scope" and isinstance(value, tuple):
        covered = [p for p in params if found.covers(p, moe)]
        kinds = dict.fromkeys(p.kind for p in covered)
        whole = {kind for kind in kinds if all(found.covers(p, moe) for p in params if p.kind == kind)}
        value = (*(k for k in kinds if k in whole), *(p.name for p in covered if p.kind not in whole))
    return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
