"""fp8_qdq: the values of fp8 in ordinary products (quantise, dequantise, multiply), as published ablations fake it.

Codes, tiles and runs are those of fp8.py. Only the sums differ: one float32 product over the whole inner dimension in
place of one a block, which moves about 3 in 10 000 outputs by a bf16 rounding. So a trainer of this precision before an
fp8 engine isolates what quantised operands do from what the block products do; `backward=high_precision` quantises the
forward pass alone. Dequantised operands stay float32: rounded to bf16 they would lose a tenth of what fp8 itself loses.
Left out: reading checkpoints (they are fp8's). Source: "Unified FP8", LMSYS, November 2025: its four cases.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from lpexp.precision.fp8 import Fp8, Operand, _product

if TYPE_CHECKING:
    from torch import Tensor


class Fp8Qdq(Fp8):
    """As Fp8; `backward=quantised` reads all three operands of the gradient products through their codes."""

    reads: ClassVar[str] = ""

    def linear(self, x: Tensor, weight: Tensor, operand: Operand | None = None) -> Tensor:
        made = self.operand(self.quantize(weight)) if operand is None else operand
        return _faked().apply(x, weight, made, self)

    def serve(self, x: Tensor, operand: Operand) -> Tensor:
        return _forward(x, operand, self._pow2)


def _forward(x: Tensor, operand: Operand, pow2: bool) -> Tensor:
    """x [..., K] of bf16 values -> [..., N]."""
    from lpexp.precision import numeric

    x2 = x.reshape(-1, x.shape[-1])
    q_x, s_x = numeric.quantize_rows(x2, numeric.FLOOR, pow2)
    y = numeric.bf16(numeric.matmul_rows(q_x * numeric.spread(s_x, x2.shape[1]), _weight(operand)))
    return y.reshape(*x.shape[:-1], y.shape[1])


def _weight(operand: Operand) -> Tensor:
    """The decoded weight [N, K]."""
    from lpexp.precision import numeric

    return operand.codes * numeric.spread(operand.scale_BN.t(), operand.codes.shape[1])


@cache
def _faked() -> Any:
    """The training product as an autograd function; what is not quantised in the backward pass is fp8's own."""
    from lpexp.precision import numeric
    from lpexp.precision.numeric import FLOOR, FLOOR_GRAD

    class Faked(_product()):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, operand: Operand, spec: Fp8Qdq) -> Tensor:
            ctx.save_for_backward(x, weight, *operand)
            ctx.spec = spec
            return _forward(x, operand, spec._pow2)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            if ctx.spec.backward != "quantised":
                return _product().backward(ctx, grad)
            x, _, *operand = ctx.saved_tensors
            made, pow2, shape = Operand(*operand), ctx.spec._pow2, x.shape
            x, dy = x.reshape(-1, shape[-1]), numeric.bf16(grad.reshape(-1, made.codes.shape[0]))
            dx = dw = None
            if ctx.needs_input_grad[0]:
                q_y, s_y = numeric.quantize_rows(dy, FLOOR_GRAD, pow2)
                spread = q_y * numeric.spread(s_y, dy.shape[1])
                dx = numeric.bf16(numeric.matmul_rows(spread, _weight(made).t())).reshape(shape)  # [M, N] @ [N, K]
            if ctx.needs_input_grad[1]:
                q_y, s_y = numeric.quantize_columns(dy, FLOOR_GRAD, pow2)
                q_x, s_x = numeric.quantize_columns(x, FLOOR, pow2)
                left, right = (q_y * s_y[:, None]).flatten(0, 1), (q_x * s_x[:, None]).flatten(0, 1)
                dw = numeric.matmul(left.t(), right.t())  # [N, M] @ [M, K]
            return dx, dw, None, None

    return Faked
