"""fp8_channel and fp8_tensor: e4m3 weights with one float32 scale an output row or a tensor; they only serve.

Activations get one scale a token at run time, so that a row's result does not depend on its neighbours:
y = RN16b((P * s_x) * s_w), P the float32 product of the codes. Scales are max(amax, 1e-10) / 448 as in fp8.py.
Left out: training, static activation scales, powers of two. Layouts: compressed-tensors float-quantized (channel) and
the per-tensor `fp8` of SGLang and vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from lpexp.data import Param
from lpexp.precision import Band, Layout, Parts, Precision, Scoped, Tally, left_out, read_scope
from lpexp.precision.bf16 import Bf16

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = Bf16(name="bf16")


class Operand(NamedTuple):
    codes: Tensor  # float32 carriers [N, K]
    scale_N: Tensor  # float32 [N], or [1] of a whole tensor


class Scaled(Scoped):
    """What the two have in common: they differ in over what a scale is taken."""

    ABSTRACT: ClassVar[bool] = True
    trains: ClassVar[bool] = False
    gap: ClassVar[Band | None] = Band((0.005, 0.1), (1e-4, 0.015))
    over: ClassVar[Literal["channel", "tensor"]]

    def quantize(self, weight: Tensor, name: str = "weight") -> Parts:
        from lpexp.precision import numeric

        w = numeric.bf16(weight.detach())
        numeric.check_finite(w, name)
        amax = w.abs().amax(1, keepdim=True) if self.over == "channel" else w.abs().amax().reshape(1)
        scale = numeric.scale_e4m3(amax, numeric.FLOOR, False)
        return {"weight": numeric.to_e4m3(w / scale).contiguous(), "weight_scale": scale}

    def layout(self, shape: tuple[int, ...]) -> Layout:
        scales = (shape[0], 1) if self.over == "channel" else (1,)
        return {"weight": (shape, "float8_e4m3fn"), "weight_scale": (scales, "float32")}

    def dequantize(self, parts: Parts) -> Tensor:
        from lpexp.precision import numeric

        return numeric.from_e4m3(parts["weight"]) * parts["weight_scale"]

    @property
    def closed(self) -> bool:
        return True

    def tally(self, weight: Tensor, parts: Parts) -> Tally:
        from lpexp.precision import numeric

        codes = parts["weight"]
        block = (1 if self.over == "channel" else codes.shape[0], codes.shape[1])
        ends, least = numeric.ends_e4m3(codes), numeric.least_e4m3(False)
        return numeric.tally(weight, self.dequantize(parts), ends, parts["weight_scale"], block, least)

    def round(self, x: Tensor) -> Tensor:
        return PLAIN.round(x)

    def read(self, x: Tensor) -> Tensor:
        from lpexp.precision import numeric

        codes, scale = numeric.quantize_e4m3(x, -1, numeric.FLOOR, False)
        return codes * scale

    def operand(self, parts: Parts) -> Operand:
        from lpexp.precision import numeric

        return Operand(numeric.from_e4m3(parts["weight"]), parts["weight_scale"].flatten())

    def join(self, operands: Any) -> Operand:
        import torch

        codes = [operand.codes for operand in operands]
        scales = [operand.scale_N.expand(len(operand.codes)) for operand in operands]
        return Operand(torch.cat(codes), torch.cat(scales))

    def linear(self, x: Tensor, weight: Tensor, operand: Operand | None = None) -> Tensor:
        return self.serve(x, self.operand(self.quantize(weight)) if operand is None else operand)

    def serve(self, x: Tensor, operand: Operand) -> Tensor:
        import torch

        from lpexp.precision import numeric

        with torch.no_grad():
            x2 = x.reshape(-1, x.shape[-1])
            q_x, s_x = numeric.quantize_e4m3(x2, 1, numeric.FLOOR, False)
            y = numeric.matmul_bf16(q_x, operand.codes).mul_(s_x).mul_(operand.scale_N)  # [M, K] @ [K, N]
            return numeric.bf16(y).reshape(*x.shape[:-1], y.shape[1])

    @property
    def plain(self) -> Precision:
        return PLAIN

    def format(self) -> dict[str, Any]:
        return {"identity": f"fp8:e4m3fn:w{self.over}:xtoken:scale=fp32:floor=1e-10:div:v1"}


class Fp8Channel(Scaled):
    """One scale an output row."""

    reads: ClassVar[str] = "compressed-tensors float-quantized, a scale a channel and dynamic activations"
    over: ClassVar[Literal["channel", "tensor"]] = "channel"
    rows: ClassVar[int | None] = 1

    def hf(self, params: Iterable[Param], moe: bool) -> dict[str, Any]:
        common = {"num_bits": 8, "type": "float", "symmetric": True}
        weights = {**common, "strategy": "channel", "dynamic": False, "observer": "minmax"}
        inputs = {**common, "strategy": "token", "dynamic": True, "observer": None}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "kv_cache_scheme": None,
            "config_groups": {"group_0": group},
            "ignore": left_out(self, params, moe),
        }

    @classmethod
    def read_hf(cls, config: dict[str, Any], params: list[Param], moe: bool) -> Precision | None:
        if config.get("quant_method") != "compressed-tensors" or config.get("format") != "float-quantized":
            return None
        groups = list((config.get("config_groups") or {}).values())
        weights, inputs = (
            ((groups[0].get(key) or {}) for key in ("weights", "input_activations")) if groups else ({}, {})
        )
        if len(groups) != 1 or weights.get("strategy") != "channel" or not inputs.get("dynamic"):
            return None
        return cls(name="fp8_channel", scope=read_scope(cls, config.get("ignore") or [], params, moe))


class Fp8Tensor(Scaled):
    """One scale a tensor."""

    reads: ClassVar[str] = "fp8 without blocks and with dynamic activations"
    over: ClassVar[Literal["channel", "tensor"]] = "tensor"

    def hf(self, params: Iterable[Param], moe: bool) -> dict[str, Any]:
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "modules_to_not_convert": left_out(self, params, moe),
        }

    @classmethod
    def read_hf(cls, config: dict[str, Any], params: list[Param], moe: bool) -> Precision | None:
        given = [config.get(key) for key in ("quant_method", "weight_block_size", "activation_scheme")]
        if given != ["fp8", None, "dynamic"]:
            return None
        return cls(name="fp8_tensor", scope=read_scope(cls, config.get("modules_to_not_convert") or [], params, moe))
