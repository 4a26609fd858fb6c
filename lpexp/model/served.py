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
from lpexp.model.hf import CONFIG, Header, _read_json, _some, headers, model_from_config
from lpexp.precision import LINEARS, Precision, from_hf, side
from lpexp.precision.bf16 import Bf16
from lpexp.precision.fp32 import Fp32

PLAIN = {"BF16": Bf16(name="bf16"), "F32": Fp32(name="fp32")}  # stored as -> the precision that serves it so
EMBEDDING = "model.embed_tokens.weight"
COMPARED = 1 << 25  # elements of an embedding, so that a large one does not keep the judge waiting
# Fields of a Model that change no value of a forward pass.
NO_NUMBERS = {"name", "path", "parallel", "scale", "initializer_range", "max_position_embeddings"}


def precision_of(directory: str | Path, model: Model) -> Precision:
    """The precision that a directory serves `model` in; ConfigError when it is unreadable or of another model."""
    directory = Path(directory)
    config = _read_json(directory / CONFIG)
    if differs := difference(model, model_from_config(config, directory.name, str(directory))):
        key, ours, theirs = differs
        raise ConfigError(f"{directory / CONFIG} has {key} {theirs}, model {model.name} has {ours}")
    params, moe = list(model.params()), model.moe is not None
    stored = headers(directory)
    precision = _quantised(directory, config, params, moe)
    if precision is None:
        precision = _plain(directory, params, stored)
    if problem := next(_problems(directory, params, moe, precision, stored), None):
        raise ConfigError(problem)
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


def _quantised(directory: Path, config: dict[str, Any], params: list[Param], moe: bool) -> Precision | None:
    quantised = config.get("quantization_config")
    if not quantised:
        return None
    try:
        return from_hf(quantised, params, moe)
    except ConfigError as error:
        raise ConfigError(f"{directory / CONFIG}: {'; '.join(m.message for m in error.mistakes)}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # a field of it is missing or of another kind
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(f"{directory / CONFIG}: quantization_config cannot be read ({why})") from None


def _plain(directory: Path, params: list[Param], stored: dict[str, Header]) -> Precision:
    """What an unquantised directory is served in, by the type of its matrices."""
    kinds = sorted({stored[p.name].dtype for p in params if p.kind in LINEARS and p.name in stored})
    if len(kinds) != 1 or kinds[0] not in PLAIN:
        held = " and ".join(kinds) or "nothing"
        raise ConfigError(f"{directory} stores its matrices as {held}; served as they are they must be all BF16 or F32")
    return PLAIN[kinds[0]]


def _problems(
    directory: Path, params: list[Param], moe: bool, precision: Precision, stored: dict[str, Header]
) -> Iterator[str]:
    """What is missing, of another shape, or stored in a type that this precision does not serve."""
    types = {plain.name: dtype for dtype, plain in PLAIN.items()}
    modules = {name.partition(".weight")[0] for name in stored}
    for param in params:
        if precision.covers(param, moe):
            if param.name.removesuffix(".weight") not in modules:
                yield f"{directory} lacks {param.name}"
            continue
        if param.name not in stored:
            yield f"{directory} lacks {param.name}"
            continue
        found, served = stored[param.name], types[side(param, precision, moe).name]
        if found.shape != param.shape:
            yield f"{found.file}: {param.name} has shape {list(found.shape)}, the model's is {list(param.shape)}"
        elif found.dtype != served:
            yield f"{found.file}: {param.name} is {found.dtype}, {precision.name} serves it as {served}"


def copies(directory: str | Path, original: str | Path) -> bool:
    """Do both directories hold the same embedding, which no quantiser touches? Its beginning, as bf16 values."""
    ours, theirs = (headers(one).get(EMBEDDING) for one in (directory, original))
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return False
    count = min(math.prod(ours.shape), COMPARED)
    return np.array_equal(_values(ours, count), _values(theirs, count))


def _values(header: Header, count: int) -> np.ndarray:
    """The first elements as bf16 bit patterns (float32 rounded to nearest even)."""
    kinds = {"BF16": np.dtype("<u2"), "F32": np.dtype("<u4"), "F16": np.dtype("<f2")}
    if header.dtype not in kinds:
        raise ConfigError(f"{header.file}: {EMBEDDING} is {header.dtype}, expected one of {_some(kinds)}")
    kind = kinds[header.dtype]
    found = np.fromfile(header.file, kind, count, offset=header.start)
    if header.dtype == "BF16":
        return found
    bits: Any = found.astype("<f4").view("<u4") if header.dtype == "F16" else found
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
