"""fp32: no rounding anywhere. The reference for parity with other implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lpexp.data import Param
from lpexp.precision import Band, Layout, Parts, Precision

if TYPE_CHECKING:
    from torch import Tensor


class Fp32(Precision):
    """Weights, activations and gradients in float32."""

    carries: ClassVar = "float32"
    rows: ClassVar[int | None] = 1
    gap: ClassVar[Band | None] = Band((5e-4, 0.015), (1e-6, 2e-4))  # against bf16

    def covers(self, param: Param, moe: bool) -> bool:
        return False

    def quantize(self, weight: Tensor, name: str = "weight") -> Parts:
        from lpexp.precision import numeric

        numeric.check_finite(weight, name)
        return {"weight": weight.detach().float()}

    def dequantize(self, parts: Parts) -> Tensor:
        return parts["weight"].float()

    def round(self, x: Tensor) -> Tensor:
        return x

    def operand(self, parts: Parts) -> Tensor:
        return self.dequantize(parts)

    def join(self, operands: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat(list(operands))

    def linear(self, x: Tensor, weight: Tensor, operand: Tensor | None = None) -> Tensor:
        from lpexp.precision import numeric

        return numeric.linear(x, weight, weight.detach() if operand is None else operand, False)

    def serve(self, x: Tensor, operand: Tensor) -> Tensor:
        import torch

        with torch.no_grad():
            return self.linear(x, operand, operand)

    def accumulate(self, x: Tensor, weight: Tensor, operand: Tensor | None = None) -> Tensor:
        return self.linear(x, weight, operand)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return {"weight": (shape, "float32")}

    @property
    def closed(self) -> bool:
        return True

    @property
    def plain(self) -> Precision:
        return self

    def format(self) -> dict[str, Any]:
        return {"identity": "fp32"}
