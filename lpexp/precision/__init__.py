"""The agreement on a precision: the only home of a number format.

Trainer, exporter, converter and rollout engine all ask one `Precision` object, so they cannot quantise differently.
`quantize` gives exactly what goes on the wire and on disk, `linear` trains on the same values that `serve` serves.
A new precision is one file beside this one and one YAML in conf/precision/. torch is imported inside the methods:
judging a config needs none.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import pkgutil
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import PlainValidator
from pydantic_core import PydanticCustomError

from lpexp.config import Spec
from lpexp.data import Param
from lpexp.errors import ConfigError, Mistake

if TYPE_CHECKING:
    from torch import Tensor

# Module classes that may be quantised; embedding, head, router, norms and biases never are.
EXPERTS = ("expert_up", "expert_down")
LINEARS = ("attn_qkv", "attn_out", "mlp_up", "mlp_down", "shared_up", "shared_down", *EXPERTS)

SCOPES = ("auto", "experts", "linears")


def _judge_scope(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str) and value in SCOPES:
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value):
        return tuple(value)
    names = ", ".join(SCOPES)
    raise PydanticCustomError("scope", f"should be {names}, or a list of module classes or tensor names")


# "auto", "experts", "linears", or names: module classes ("attn_qkv") and whole tensors.
Scope = Annotated[str | tuple[str, ...], PlainValidator(_judge_scope)]
Parts = dict[str, "Tensor"]  # suffix -> tensor: {"weight": ...} or {"weight_packed": ..., "weight_scale": ...}
Layout = dict[str, tuple[tuple[int, ...], str]]  # suffix -> shape, dtype as torch names it
# dtype -> its word in a safetensors header, bytes of an element.
STORED = {
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
}


@dataclass(frozen=True)
class Tally:
    """What quantisation did, in counts and sums that add up over rows, tensors and processes."""

    lost: float = 0.0  # sum of (W - dq(W))^2
    total: float = 0.0  # sum of W^2
    codes: int = 0
    saturated: int = 0  # codes at an end of the range
    blocks: int = 0
    zero_blocks: int = 0  # blocks whose weights are all zero
    scale_min: float = math.inf
    scale_max: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.lost + other.lost,
            self.total + other.total,
            self.codes + other.codes,
            self.saturated + other.saturated,
            self.blocks + other.blocks,
            self.zero_blocks + other.zero_blocks,
            min(self.scale_min, other.scale_min),
            max(self.scale_max, other.scale_max),
        )

    def row(self) -> list[Any]:
        return list(vars(self).values())

    def stats(self) -> dict[str, float]:
        """Keys of the `quant/*` metrics: error norm(W - dq(W)) / norm(W) and its SQNR in dB, shares, extreme scales."""
        relative = math.sqrt(self.lost / self.total) if self.total else 0.0
        found = {"rel_error": relative, "sqnr_db": -20 * math.log10(relative) if relative else math.inf}
        if self.codes:
            found |= {
                "saturated_frac": self.saturated / self.codes,
                "zero_block_frac": self.zero_blocks / self.blocks,
                "scale_min": self.scale_min,
                "scale_max": self.scale_max,
            }
        return found


class Band(NamedTuple):
    """Where a mismatch should lie, nat; two-sided, since a gap that is too small means that nothing was quantised."""

    abs_mean: tuple[float, float]  # <|d|>
    kl_k3: tuple[float, float]


class Precision(Spec):
    """One number format and its arithmetic. `name` is the word in conf/precision/."""

    ABSTRACT: ClassVar[bool] = True
    name: str
    trains: ClassVar[bool] = True  # False: serves and exports only
    carries: ClassVar[Literal["bfloat16", "float32"]] = (
        "bfloat16"  # the values between modules, which `round` rounds to
    )
    rows: ClassVar[int | None] = (
        None  # so many rows are quantised alone to the bytes of the whole; None: only the whole
    )
    gap: ClassVar[Band | None] = None  # of a first batch, where only one side computes so and the other is plain
    reads: ClassVar[str] = ""  # the kind of `quantization_config` that `read_hf` understands

    # -- what is quantised -----------------------------------------------------------------------------------------
    @abstractmethod
    def covers(self, param: Param, moe: bool) -> bool:
        """Is this tensor quantised? One rule for all who ask. `moe`: the model has routed experts."""

    def judge(self, params: Iterable[Param], moe: bool) -> Iterable[Mistake]:
        """Mistakes that only show on a model: a group that does not divide, a scope that covers nothing."""
        return ()

    def warnings(self, params: Iterable[Param], moe: bool) -> Iterable[str]:
        """What a person should know who serves this model so: tensors that another reader cannot read."""
        return ()

    # -- the wire --------------------------------------------------------------------------------------------------
    @abstractmethod
    def quantize(self, weight: Tensor, name: str = "weight") -> Parts:
        """[out, in] model weight -> what is served and stored, keyed by suffix ("weight", "weight_scale_inv", ...).

        The 16-bit values are quantised, whatever the weight's own type. NonFiniteWeightError says `name`.
        """

    @abstractmethod
    def dequantize(self, parts: Parts) -> Tensor:
        """The served weight [out, in] as float32 values, exactly those that `linear` and `serve` multiply with."""

    # -- the arithmetic --------------------------------------------------------------------------------------------
    @abstractmethod
    def round(self, x: Tensor) -> Tensor:
        """Round activations to what this precision carries between modules (values stay in float32 carriers)."""

    @abstractmethod
    def operand(self, parts: Parts) -> Any:
        """What the matrix product reads, made once per weight version from the served parts."""

    def join(self, operands: Sequence[Any]) -> Any | None:
        """Operands of matrices that share their input as one operand with the rows of all; None where that would
        change a code, as when a block would straddle two of them."""
        return None

    @abstractmethod
    def linear(self, x: Tensor, weight: Tensor, operand: Any = None) -> Tensor:
        """x [..., in] @ weight [out, in].T with autograd, as trained; x holds values that `round` leaves alone.

        `operand` of the same weight saves its making.
        """

    @abstractmethod
    def serve(self, x: Tensor, operand: Any) -> Tensor:
        """The same product from the served operand, without autograd: equal to `linear` bit for bit."""

    def read(self, x: Tensor) -> Tensor:
        """The float32 values that a product reads in place of its input x [..., K], which `round` leaves alone."""
        return x

    def accumulate(self, x: Tensor, weight: Tensor, operand: Any = None) -> Tensor:
        """The plain product with its float32 sums unrounded, with autograd: head and router on both sides."""
        return self.plain.accumulate(x, weight, operand)

    @property
    @abstractmethod
    def plain(self) -> Precision:
        """The unquantised precision of everything that `covers` leaves out."""

    def layout(self, shape: tuple[int, ...]) -> Layout | None:
        """What `quantize` makes of a tensor of this shape, without torch; None: not said."""
        return None

    def served_bytes(self, shape: tuple[int, ...]) -> int | None:
        """Bytes of what `quantize` makes of a tensor of this shape, for plans; None: not said."""
        layout = self.layout(shape)
        return None if layout is None else size_of(layout)

    def fixed(self, shape: tuple[int, ...]) -> Parts:
        """The parts that depend on the tensor's shape alone; all others have rows, as the tensor has."""
        return {}

    @property
    def closed(self) -> bool:
        """Does quantising its own decoded bf16 values again change no decoded value?"""
        return False

    # -- the neighbours --------------------------------------------------------------------------------------------
    def hf(self, params: Iterable[Param], moe: bool) -> dict[str, Any] | None:
        """`quantization_config` for config.json; None when nothing is quantised."""
        return None

    @classmethod
    def read_hf(cls, config: dict[str, Any], params: list[Param], moe: bool) -> Precision | None:
        """The precision that `hf` wrote this `quantization_config` for; None when it is not this class's."""
        return None

    def environment(self) -> dict[str, str]:
        """Variables that a production trainer reads and that change numerics; refused from the shell."""
        return {}

    @abstractmethod
    def format(self) -> dict[str, Any]:
        """Everything that determines the codes: format, block or group, scale rule, divisor, rounding."""

    def contract(self, params: Iterable[Param], moe: bool) -> dict[str, str]:
        """{tensor name: its quantiser}: what both sides compare before a run starts; `digest` of it is the hash."""
        quantised, plain = json.dumps(self.format(), sort_keys=True), json.dumps(self.plain.format(), sort_keys=True)
        return {p.name: quantised if self.covers(p, moe) else plain for p in params}

    def tally(self, weight: Tensor, parts: Parts) -> Tally:
        """What quantisation did to this tensor, or to these rows of it."""
        from lpexp.precision import numeric

        return numeric.tally(weight, self.dequantize(parts))

    def stats(self, weight: Tensor, parts: Parts) -> dict[str, float]:
        """What quantisation did to one tensor, keys of the `quant/*` metrics."""
        return self.tally(weight, parts).stats()


class Scoped(Precision):
    """A precision with a `scope`: which linears it takes."""

    ABSTRACT: ClassVar[bool] = True
    auto: ClassVar[str] = "linears"  # what the scope "auto" means here
    scope: Scope = "auto"

    def covers(self, param: Param, moe: bool) -> bool:
        return scope_covers(self.auto if self.scope == "auto" else self.scope, param, moe)

    def judge(self, params: Iterable[Param], moe: bool) -> Iterable[Mistake]:
        yield from judge_scope(self, self.scope, list(params), moe)


def side(param: Param, precision: Precision, moe: bool) -> Precision:
    """The precision that this tensor is served in; a router's selection bias keeps float32, as its authors ship it."""
    if param.kind == "router_bias":
        from lpexp.precision.fp32 import Fp32

        return Fp32(name="fp32")
    return precision if precision.covers(param, moe) else precision.plain


def expected(precision: Precision, shape: tuple[int, ...]) -> Layout:
    """The layout that a precision says, or that it shows on a tensor of zeros."""
    layout = precision.layout(shape)
    if layout is not None:
        return layout
    import torch

    parts = precision.quantize(torch.zeros(shape))
    return {suffix: (tuple(part.shape), str(part.dtype).removeprefix("torch.")) for suffix, part in parts.items()}


def size_of(layout: Layout) -> int:
    """Bytes of all parts."""
    return sum(math.prod(shape) * STORED[dtype][1] for shape, dtype in layout.values())


def digest(contract: dict[str, str]) -> str:
    """SHA-256 of a contract, 16 hex digits."""
    return hashlib.sha256(json.dumps(contract, sort_keys=True).encode()).hexdigest()[:16]


def from_hf(config: dict[str, Any], params: Iterable[Param] = (), moe: bool = False) -> Precision:
    """The precision behind a checkpoint's `quantization_config`; with the model's tensors its scope is found too.

    ConfigError when no precision of this package reads it.
    """
    params = list(params)
    for kind in _formats():
        found = kind.read_hf(config, params, moe)
        if found is not None:
            return found
    keys = ("quant_method", "format", "weight_block_size")
    given = ", ".join(f"{key} {config[key]!r}" for key in keys if key in config)
    known = "; ".join(kind.reads for kind in _formats())
    raise ConfigError([Mistake("quantization_config", f"{given or config} is read by no precision; known: {known}")])


def _formats() -> list[type[Precision]]:
    """Every class beside this file that reads a served checkpoint."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        if module.name not in ("numeric", "wire", "e4m3", "integers", "targets"):  # no formats
            members = vars(importlib.import_module(f"{__name__}.{module.name}")).values()
            found += [m for m in members if isinstance(m, type) and issubclass(m, Precision) and m.reads]
    return sorted(set(found), key=lambda kind: kind.reads)


def scope_covers(scope: str | tuple[str, ...], param: Param, moe: bool) -> bool:
    """Does a scope take this tensor? "auto" is the routed experts of a mixture of experts, else all linears.

    A tuple names module classes ("attn_qkv") or whole tensors ("model.layers.0.self_attn.q_proj.weight").
    """
    if param.kind not in LINEARS:
        return False
    if scope == "auto":
        scope = "experts" if moe else "linears"
    if scope == "experts":
        return param.kind in EXPERTS
    return scope == "linears" or param.kind in scope or param.name in scope


def judge_scope(
    precision: Precision, scope: str | tuple[str, ...], params: list[Param], moe: bool
) -> Iterator[Mistake]:
    """Mistakes of a scope that covers nothing, or that names what the model does not have."""
    covered = [p for p in params if precision.covers(p, moe)]
    if isinstance(scope, tuple):
        words = {word for p in covered for word in (p.kind, p.name)}
        classes = ", ".join(dict.fromkeys(p.kind for p in params if p.kind in LINEARS))
        for name in scope:
            if name not in words:
                use = f"use {classes} or a tensor's name"
                yield Mistake("scope", f"{name!r} is nothing that can be quantised here; {use}")
    elif not covered:
        yield Mistake("scope", f"{scope} covers nothing: the model has no routed experts; use linears")


def patterns(names: Iterable[str]) -> str:
    """Names of tensors with layers and experts as stars, each once."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name.removesuffix(".weight")) for name in names))


def left_out(precision: Precision, params: Iterable[Param], moe: bool) -> list[str]:
    """Sorted module names of every linear that stays plain, the head (tied or not) among them."""
    linears = (p for p in params if p.kind in (*LINEARS, "head", "router"))
    return sorted({p.name.removesuffix(".weight") for p in linears if not precision.covers(p, moe)} | {"lm_head"})


def read_scope(kind: type[Precision], ignored: Iterable[str], params: list[Param], moe: bool) -> str | tuple[str, ...]:
    """The scope that leaves out just these modules; "auto" when the model's tensors are not known.

    Modules are named whole, or by a regular expression after "re:" that fits from their start, as engines read it.
    """
    if not params:
        return "auto"
    ignored = list(ignored)
    names = {word for word in ignored if not word.startswith("re:")}
    patterns = [re.compile(word.removeprefix("re:")) for word in ignored if word.startswith("re:")]
    linears = [(p.name, p.name.removesuffix(".weight")) for p in params if p.kind in LINEARS]
    covered = [name for name, at in linears if at not in names and not any(p.match(at) for p in patterns)]
    for scope in SCOPES:
        read = kind.model_validate({"name": "", "scope": scope})
        # A router or a head that is not listed changes nothing: no scope takes one.
        if covered and covered == [p.name for p in params if read.covers(p, moe)]:
            return scope
    return tuple(covered)
