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
import pkgutil
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

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


class Precision(Spec):
    """One number format and its arithmetic. `name` is the word in conf/precision/."""

    ABSTRACT: ClassVar[bool] = True
    name: str
    trains: ClassVar[bool] = True  # False: serves and exports only
    carries: ClassVar[Literal["bfloat16", "float32"]] = (
        "bfloat16"  # the values between modules, which `round` rounds to
    )
    reads: ClassVar[str] = ""  # the kind of `quantization_config` that `read_hf` understands

    # -- what is quantised -----------------------------------------------------------------------------------------
    @abstractmethod
    def covers(self, param: Param, moe: bool) -> bool:
        """Is this tensor quantised? One rule for all who ask. `moe`: the model has routed experts."""

    def judge(self, params: Iterable[Param], moe: bool) -> Iterable[Mistake]:
        """Mistakes that only show on a model: a group that does not divide, a scope that covers nothing."""
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

    def accumulate(self, x: Tensor, weight: Tensor, operand: Any = None) -> Tensor:
        """The plain product with its float32 sums unrounded, with autograd: head and router on both sides."""
        return self.plain.accumulate(x, weight, operand)

    @property
    @abstractmethod
    def plain(self) -> Precision:
        """The unquantised precision of everything that `covers` leaves out."""

    def served_bytes(self, shape: tuple[int, ...]) -> int | None:
        """Bytes of what `quantize` makes of a tensor of this shape, for plans; None: not said."""
        return None

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

    def stats(self, weight: Tensor, parts: Parts) -> dict[str, float]:
        """What quantisation did to one tensor, keys of the `quant/*` metrics."""
        from lpexp.precision import numeric

        return numeric.error(weight, self.dequantize(parts))


def side(param: Param, precision: Precision, moe: bool) -> Precision:
    """The precision that this tensor is served in; a router's selection bias keeps float32, as its authors ship it."""
    if param.kind == "router_bias":
        from lpexp.precision.fp32 import Fp32

        return Fp32(name="fp32")
    return precision if precision.covers(param, moe) else precision.plain


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
        if module.name not in ("numeric", "wire", "e4m3"):  # no formats, and they import torch
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


def left_out(precision: Precision, params: Iterable[Param], moe: bool) -> list[str]:
    """Sorted module names of every linear that stays plain, the head (tied or not) among them."""
    linears = (p for p in params if p.kind in (*LINEARS, "head", "router"))
    return sorted({p.name.removesuffix(".weight") for p in linears if not precision.covers(p, moe)} | {"lm_head"})


def read_scope(kind: type[Precision], ignored: Iterable[str], params: list[Param], moe: bool) -> str | tuple[str, ...]:
    """The scope that leaves out just these modules; "auto" when the model's tensors are not known."""
    if not params:
        return "auto"
    for scope in SCOPES:
        if left_out(kind.model_validate({"name": "", "scope": scope}), params, moe) == sorted(ignored):
            return scope
    ignored = set(ignored)
    return tuple(p.name for p in params if p.kind in LINEARS and p.name.removesuffix(".weight") not in ignored)
