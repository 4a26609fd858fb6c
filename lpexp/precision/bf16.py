"""bf16: values of 8 significant bits, float32 sums, one rounding at the end of every product.

On a CPU the values live in float32 carriers; on a GPU products run in the native bf16 kernels.
Left out: unrounded outputs, which head and router ask for with `accumulate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lpexp.data import Param
from lpexp.precision import Layout, Parts, Precision

if TYPE_CHECKING:
    from torch import Tensor


class Bf16(Precision):
    """The 16-bit model: what every quantiser starts from, and the plain precision beside each of them."""

    rows: ClassVar[int | None] = 1
    noise: ClassVar[float] = 0.01
    shift: ClassVar[float] = 0.0

    def covers(self, param: Param, moe: bool) -> bool:
        return False

    def quantize(self, weight: Tensor, name: str = "weight") -> Parts:
        import torch

        from lpexp.precision import numeric

        rounded = weight.detach().to(torch.bfloat16)
        numeric.check_finite(rounded, name)
        return {"weight": rounded}

    def dequantize(self, parts: Parts) -> Tensor:
        return parts["weight"].float()

    def round(self, x: Tensor) -> Tensor:
        from lpexp.precision import numeric

        return numeric.round_bf16(x)

    def operand(self, parts: Parts) -> Tensor:
        return self.dequantize(parts)

    def join(self, operands: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat(list(operands))

    def linear(self, x: Tensor, weight: Tensor, operand: Tensor | None = None) -> Tensor:
        from lpexp.precision import numeric

        w = numeric.bf16(weight.detach()) if operand is None else operand
        return numeric.linear(x, weight, w, True, numeric.matmul_bf16)

    def serve(self, x: Tensor, operand: Tensor) -> Tensor:
        import torch

        with torch.no_grad():
            return self.linear(x, operand, operand)

    def accumulate(self, x: Tensor, weight: Tensor, operand: Tensor | None = None) -> Tensor:
        from lpexp.precision import numeric

        w = numeric.bf16(weight.detach()) if operand is None else operand
        return numeric.accumulate(x, weight, w, True)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        return {"weight": (shape, "bfloat16")}

    @property
    def closed(self) -> bool:
        return True

    @property
    def plain(self) -> Precision:
        return self

    def format(self) -> dict[str, Any]:
        return {"identity": "bf16"}


PLAIN = Bf16(name="bf16")  # of what a quantised precision leaves out
