"""The agreement on a precision: the only home of a number format.

Trainer, exporter, converter and rollout engine all ask one `Precision` object, so they cannot quantise differently.
`quantize` gives exactly what goes on the wire and on disk, `linear` trains on the same values that `serve` serves.
A new precision is one file beside this one and one YAML in conf/precision/. torch is imported inside the methods:
judging a config needs none.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lpexp.config import Spec
from lpexp.data import Param
from lpexp.errors import Mistake

if TYPE_CHECKING:
    from torch import Tensor

# Module classes that may be quantised; embedding, head, router, norms and biases never are.
EXPERTS = ("expert_up", "expert_down")
LINEARS = ("attn_qkv", "attn_out", "mlp_up", "mlp_down", "shared_up", "shared_down", *EXPERTS)

Parts = dict[str, "Tensor"]  # suffix -> tensor: {"weight": ...} or {"weight_packed": ..., "weight_scale": ...}


class Precision(Spec):
    """One number format and its arithmetic. `name` is the word in conf/precision/."""

    ABSTRACT: ClassVar[bool] = True
    name: str
    trains: ClassVar[bool] = True  # False: serves and exports only
    identity: ClassVar[str] = ""  # the quantiser string of a fixed format; see `contract`

    # -- what is quantised ------------------------------------------------------------------------------------------
    @abstractmethod
    def covers(self, param: Param, moe: bool) -> bool:
        """Is this tensor quantised? One rule for all who ask. `moe`: the model has routed experts."""

    def judge(self, params: Iterable[Param], moe: bool) -> Iterable[Mistake]:
        """Mistakes that only show on a model: a group that does not divide, a scope that covers nothing."""
        return ()

    # -- the wire -----------------------------------------------------------------------------------------------------
    @abstractmethod
    def quantize(self, weight: Tensor) -> Parts:
        """[out, in] model weight -> what is served and stored, keyed by suffix ("weight", "weight_scale_inv", ...)."""

    @abstractmethod
    def dequantize(self, parts: Parts) -> Tensor:
        """The served weight [out, in] as float32 values, exactly those that `linear` and `serve` multiply with."""

    # -- the arithmetic -----------------------------------------------------------------------------------------------
    @abstractmethod
    def round(self, x: Tensor) -> Tensor:
        """Round activations to what this precision carries between modules (values stay in float32 carriers)."""

    @abstractmethod
    def operand(self, parts: Parts) -> Any:
        """What the matrix product reads, made once per weight version from the served parts."""

    @abstractmethod
    def linear(self, x: Tensor, weight: Tensor, operand: Any = None) -> Tensor:
        """x [..., in] @ weight [out, in].T with autograd, as trained; `operand` of the same weight saves its making."""

    @abstractmethod
    def serve(self, x: Tensor, operand: Any) -> Tensor:
        """The same product from the served operand, without autograd: equal to `linear` bit for bit."""

    @property
    @abstractmethod
    def plain(self) -> Precision:
        """The unquantised precision of everything that `covers` leaves out."""

    # -- the neighbours -------------------------------------------------------------------------------------------------
    def hf(self, params: Iterable[Param], moe: bool) -> dict[str, Any] | None:
        """`quantization_config` for config.json; None when nothing is quantised."""
        return None

    def environment(self) -> dict[str, str]:
        """Variables that a production trainer reads and that change numerics; set on its workers, refused from the shell."""
        return {}

    @abstractmethod
    def format(self) -> dict[str, Any]:
        """Everything that determines the codes: format, block or group, scale rule, divisor, rounding."""

    def contract(self, params: Iterable[Param], moe: bool) -> dict[str, str]:
        """{tensor name: its quantiser}: what both sides compare before a run starts; `digest` of it is the hash."""
        quantised, plain = json.dumps(self.format(), sort_keys=True), json.dumps(self.plain.format(), sort_keys=True)
        return {p.name: quantised if self.covers(p, moe) else plain for p in params}


def digest(contract: dict[str, str]) -> str:
    """SHA-256 of a contract, 16 hex digits."""
    return hashlib.sha256(json.dumps(contract, sort_keys=True).encode()).hexdigest()[:16]


def scope_covers(scope: Literal["auto", "experts", "linears"] | tuple[str, ...], param: Param, moe: bool) -> bool:
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
