"""fp8: e4m3 codes with a scale a block, weights in tiles of 128 x 128, activations and gradients in runs of 128.

All three products of a training step read codes: Y = X W^T with runs along K, dX = dY W with runs along N,
dW = dY^T X with runs along the rows M (quantised from the bf16 originals, not from the other runs' codes).
Each block of the inner dimension is one float32 product, scaled and added in increasing order; bf16 outside.
Left out: scales a tensor or a channel (fp8_scaled.py), e5m2 gradients. Recipe: Transformer Engine `Float8BlockScaling`;
quantiser: round(clamp(x / s)) with s = max(amax, 1e-10) / 448, as SGLang's CUDA kernel computes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from lpexp.data import Param
from lpexp.precision import Band, Layout, Parts, Precision, Scoped, Tally, left_out, patterns, read_scope
from lpexp.precision.bf16 import Bf16

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = Bf16(name="bf16")


class Operand(NamedTuple):
    """One weight version, ready to multiply."""

    codes: Tensor  # float32 carriers [N, K]
    scale_BN: Tensor  # float32 [ceil(K / 128), N]: the tile scales of every output, for X W^T
    scale_BK: Tensor  # float32 [ceil(N / 128), K]: the same for dY W


class Fp8(Scoped):
    """Block-scaled e4m3; `backward` says what the gradient products read."""

    reads: ClassVar[str] = "fp8 with weight_block_size [128, 128] and dynamic activations"
    rows: ClassVar[int | None] = 128
    gap: ClassVar[Band | None] = Band((0.005, 0.1), (1e-4, 0.015))
    scale_format: Literal["fp32", "pow2"] = "fp32"
    backward: Literal["quantised", "high_precision", "dequantised"] = "quantised"

    def warnings(self, params: Iterable[Param], moe: bool) -> Iterable[str]:
        if cut := [p.name for p in params if self.covers(p, moe) and any(n > 128 and n % 128 for n in p.shape)]:
            yield f"transformers cannot read tensors that end inside a block of 128 (lpexp can): {patterns(cut)}"

    def quantize(self, weight: Tensor, name: str = "weight") -> Parts:
        from lpexp.precision import numeric

        codes, scale = numeric.encode_tiles(weight, self._pow2, name)
        return {"weight": codes, "weight_scale_inv": scale}

    def dequantize(self, parts: Parts) -> Tensor:
        from lpexp.precision import numeric

        codes, scale = parts["weight"], parts["weight_scale_inv"]
        rows, cols = codes.shape
        return numeric.from_e4m3(codes) * numeric.spread(numeric.spread(scale.t(), rows).t(), cols)

    def round(self, x: Tensor) -> Tensor:
        return PLAIN.round(x)

    def read(self, x: Tensor) -> Tensor:
        from lpexp.precision import numeric

        codes, scale = numeric.quantize_rows(x.reshape(-1, x.shape[-1]), numeric.FLOOR, self._pow2)
        return (codes * numeric.spread(scale, x.shape[-1])).reshape(x.shape)

    def operand(self, parts: Parts) -> Operand:
        from lpexp.precision import numeric

        codes, scale = parts["weight"], parts["weight_scale_inv"]
        rows, cols = codes.shape
        return Operand(numeric.from_e4m3(codes), numeric.spread(scale.t(), rows), numeric.spread(scale, cols))

    def join(self, operands: Sequence[Operand]) -> Operand | None:
        import torch

        from lpexp.precision import numeric

        if any(operand.codes.shape[0] % numeric.BLOCK for operand in operands):
            return None
        dims = zip(zip(*operands, strict=True), (0, 1, 0), strict=True)
        return Operand(*(torch.cat(parts, dim) for parts, dim in dims))

    def linear(self, x: Tensor, weight: Tensor, operand: Operand | None = None) -> Tensor:
        made = self.operand(self.quantize(weight)) if operand is None else operand
        return _product().apply(x, weight, made, self)

    def serve(self, x: Tensor, operand: Operand) -> Tensor:
        return _forward(x, operand, self._pow2)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        tiles = (-(-shape[0] // 128), -(-shape[1] // 128))
        return {"weight": (shape, "float8_e4m3fn"), "weight_scale_inv": (tiles, "float32")}

    @property
    def closed(self) -> bool:
        return True

    @property
    def plain(self) -> Precision:
        return PLAIN

    @property
    def _pow2(self) -> bool:
        return self.scale_format == "pow2"

    def environment(self) -> dict[str, str]:
        return {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "0" if self._pow2 else "1"}

    def format(self) -> dict[str, Any]:
        identity = f"fp8:e4m3fn:w128x128:x1x128:g1x128:scale={self.scale_format}:floor=1e-10/grad=448p-126:div:v1"
        return {"identity": identity, "block": [128, 128], "scale_format": self.scale_format}

    def hf(self, params: Iterable[Param], moe: bool) -> dict[str, Any]:
        config: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        config |= {"weight_block_size": [128, 128], "modules_to_not_convert": left_out(self, params, moe)}
        return config | ({"scale_fmt": "ue8m0"} if self._pow2 else {})

    @classmethod
    def read_hf(cls, config: dict[str, Any], params: list[Param], moe: bool) -> Precision | None:
        given = [config.get(key) for key in ("quant_method", "weight_block_size", "activation_scheme")]
        if given != ["fp8", [128, 128], "dynamic"]:
            return None
        scope = read_scope(cls, config.get("modules_to_not_convert") or [], params, moe)
        return cls(name="fp8", scope=scope, scale_format="pow2" if config.get("scale_fmt") == "ue8m0" else "fp32")

    def tally(self, weight: Tensor, parts: Parts) -> Tally:
        from lpexp.precision import numeric

        codes, scale = parts["weight"], parts["weight_scale_inv"]
        if numeric.has_loop(weight):
            return numeric.tally_tiles(weight, codes, scale)
        least = numeric.least_e4m3(self._pow2)
        return numeric.tally(weight, self.dequantize(parts), numeric.ends_e4m3(codes), scale, (128, 128), least)


def _forward(x: Tensor, operand: Operand, pow2: bool) -> Tensor:
    """x [..., K] of bf16 values -> [..., N]; `linear` and `serve` are this one function."""
    from lpexp.precision import numeric

    x2 = x.reshape(-1, x.shape[-1])
    q_x, s_x = numeric.quantize_rows(numeric.pad_to(x2, numeric.PAD_ROWS, 1), numeric.FLOOR, pow2)
    y = numeric.bf16(numeric.block_matmul(q_x, s_x, operand.codes, operand.scale_BN)[: x2.shape[0]])
    return y.reshape(*x.shape[:-1], y.shape[1])


@cache
def _product() -> Any:
    """The training product as an autograd function (made on first use: importing this module needs no torch)."""
    import torch

    from lpexp.precision import numeric
    from lpexp.precision.numeric import FLOOR, FLOOR_GRAD

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, operand: Operand, spec: Fp8) -> Tensor:
            ctx.save_for_backward(x, weight, *operand)
            ctx.spec = spec
            return _forward(x, operand, spec._pow2)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
            x, weight, codes, scale_BN, scale_BK = ctx.saved_tensors
            pow2, shape = ctx.spec._pow2, x.shape
            x, dy = x.reshape(-1, shape[-1]), numeric.bf16(grad.reshape(-1, codes.shape[0]))
            dx = dw = None
            if ctx.spec.backward == "quantised":
                if ctx.needs_input_grad[0]:
                    q_y, s_y = numeric.quantize_rows(dy, FLOOR_GRAD, pow2)
                    dx = numeric.block_matmul(q_y, s_y, codes.t(), scale_BK)  # [M, N] @ [N, K]
                if ctx.needs_input_grad[1]:
                    q_y, s_y = numeric.quantize_columns(dy, FLOOR_GRAD, pow2)
                    q_x, s_x = numeric.quantize_columns(x, FLOOR, pow2)
                    dw = numeric.block_outer(q_y, s_y, q_x, s_x)  # [N, M] @ [M, K]
            else:
                if ctx.spec.backward == "dequantised":
                    x = numeric.bf16(ctx.spec.read(x))
                    w = numeric.bf16(codes * numeric.spread(scale_BN.t(), shape[-1]))
                else:
                    w = numeric.bf16(weight)
                dx = numeric.matmul_bf16(dy, w.t()) if ctx.needs_input_grad[0] else None  # [M, N] @ [N, K]
                dw = numeric.matmul_bf16(dy.t(), x.t()) if ctx.needs_input_grad[1] else None  # [N, M] @ [M, K]
            return None if dx is None else numeric.bf16(dx).reshape(shape), dw, None, None

    return Product
