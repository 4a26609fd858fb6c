"""The arithmetic that every precision shares: bf16 rounding, row-invariant products, 8-bit blocks and 4-bit groups.

All values live in float32 carriers; all quantiser arithmetic is float32 with correctly rounded division.
Left out on purpose: which tensor gets which treatment; that is the precisions' own. This is the one module of the
package that imports torch at its top, so import it inside functions.
Source: docs/numerics.md; formats are OCP OFP8 (e4m3, no infinity) and compressed-tensors pack-quantized.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lpexp import kernels
from lpexp.errors import NonFiniteWeightError, RunError
from lpexp.precision import Tally, e4m3, integers, native
from lpexp.precision.e4m3 import BLOCK

PAD_ROWS = 16  # a product of a multiple of 16 rows has the same bits in every row, however many rows there are
NATIVE_COLUMNS = 32  # with fewer, oneDNN sums in another order for few rows than for many
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
FLOOR = 1e-10  # least amax of weights and activations
FLOOR_GRAD = 448.0 * 2.0**-126  # least amax of gradients: its scale 2^-126 still has a finite reciprocal
INT4_FLOOR = 1e-5  # least scale of a group
LEAST_GROUP = float(torch.tensor(INT4_FLOOR).to(torch.bfloat16))  # as it is stored

Product = Callable[[Tensor, Tensor], Tensor]


# -- rounding and products -----------------------------------------------------------------------------------------
def bf16(x: Tensor) -> Tensor:
    """RN16b: the nearest bf16 values, ties to even, in a float32 carrier; no autograd rule of its own."""
    if x.is_cuda or x.dtype != torch.float32:
        return x.to(torch.bfloat16).to(torch.float32)
    x = x.detach().contiguous()
    out = torch.empty_like(x)
    kernels.round_to(x.view(-1).numpy(), out.view(-1).numpy())
    return out


def _bf16_(x: Tensor) -> Tensor:
    """RN16b of a fresh float32 tensor, in its own memory where that is possible."""
    if x.is_cuda or not x.is_contiguous():
        return bf16(x)
    kernels.round_(x.view(-1).numpy())
    return x


class _Unrecorded:
    """Stands for the context of an autograd function whose gradient nobody will ask for."""

    needs_input_grad = ()

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


def recorded(function: Any, *args: Any) -> Any:
    """function.apply; without gradients its forward alone, which for small tensors takes half the time."""
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(_Unrecorded(), *args)


class _RoundBf16(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return bf16(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return bf16(grad)


def round_bf16(x: Tensor) -> Tensor:
    """RN16b of the values and, in the backward pass, of the gradient."""
    return recorded(_RoundBf16, x)


def pad_to(x: Tensor, rows: int, cols: int) -> Tensor:
    """[M, K] with zeros below and to the right, up to multiples of rows and cols; the tensor itself where it fits."""
    below, right = -x.shape[0] % rows, -x.shape[1] % cols
    return pad(x, (0, right, 0, below)) if below or right else x


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K] @ w [N, K].T in float32; TF32 would break every bitwise promise and is refused."""
    if x.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        raise RunError("torch.backends.cuda.matmul.allow_tf32 is on; the arithmetic of a precision needs it off")
    return x @ w.t()  # [M, K] @ [K, N]


def matmul_rows(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K] @ w [N, K].T whose row bits do not depend on M: rows are padded with zeros to PAD_ROWS and cropped."""
    return matmul(pad_to(x, PAD_ROWS, 1), w)[: x.shape[0]]


def matmul_bf16(x: Tensor, w: Tensor) -> Tensor:
    """The product of values that bf16 can hold, with float32 sums as output: by the bf16 units of a GPU, or of a CPU
    that has some, where it takes a third of the time. On a CPU a row's bits do not depend on how many there are."""
    if x.is_cuda:
        return torch.mm(x.to(torch.bfloat16), w.to(torch.bfloat16).t(), out_dtype=torch.float32)
    if native.bf16_units() is None or w.shape[0] < NATIVE_COLUMNS:
        return matmul_rows(x, w)
    onednn = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    onednn.fp32_precision = "bf16"  # it converts its operands, which changes none of these
    try:
        return matmul_rows(x, w)
    finally:
        onednn.fp32_precision = "none"


class _Linear(torch.autograd.Function):
    """Y = round(X W^T), dX = round(dY W), dW = dY^T X in float32; `half` rounds to bf16.

    `w` holds the values, `weight` takes the gradient.

    X holds rounded values already, as everything between modules does; dY is rounded on entry.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, w: Tensor, half: bool, product: Product, unrounded: bool
    ) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(x2, w)
        ctx.shape, ctx.half, ctx.product, ctx.unrounded = x.shape, half, product, unrounded
        y = product(x2, w)  # [M, K] @ [K, N]
        return (_bf16_(y) if half and not unrounded else y).reshape(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x2, w = ctx.saved_tensors
        dy = grad.reshape(-1, w.shape[0])
        dy = bf16(dy) if ctx.half and not ctx.unrounded else dy
        product = matmul_rows if ctx.unrounded else ctx.product  # dY of unrounded sums is float32
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = product(dy, w.t())  # [M, N] @ [N, K]
            dx = (_bf16_(dx) if ctx.half else dx).reshape(ctx.shape)
        if ctx.needs_input_grad[1]:
            dw = product(dy.t(), x2.t())  # [N, M] @ [M, K]
        return dx, dw, None, None, None, None


def linear(x: Tensor, weight: Tensor, w: Tensor, half: bool, product: Product = matmul_rows) -> Tensor:
    """x [..., K] times the values w [N, K], whose gradient goes to `weight`; `half` rounds output and dX."""
    return recorded(_Linear, x, weight, w, half, product, False)


def accumulate(x: Tensor, weight: Tensor, w: Tensor, half: bool) -> Tensor:
    """As `linear`, with the float32 sums themselves as output (head, router); only the input gradient is rounded."""
    return recorded(_Linear, x, weight, w, half, matmul_bf16 if half else matmul_rows, True)


# -- checks --------------------------------------------------------------------------------------------------------
def check_finite(weight: Tensor, name: str) -> None:
    """Raise NonFiniteWeightError with the first bad index, its value and the number of bad values."""
    if not weight.numel() or all(
        math.isfinite(end) for end in torch.aminmax(weight.detach())
    ):  # NaN shows in both ends
        return
    bad = ~torch.isfinite(weight)
    if bool(bad.any()):
        index = tuple(int(i) for i in bad.nonzero()[0])
        raise NonFiniteWeightError(name, index, float(weight[index]), int(bad.sum()))


# -- 8-bit blocks --------------------------------------------------------------------------------------------------
def scale_e4m3(amax: Tensor, floor: float, pow2: bool) -> Tensor:
    """Decode scale of blocks: max(amax, floor) / 448, or the least power of two not below it (by integer steps)."""
    top = amax.clamp(min=floor)
    scale = top / torch.full_like(top, E4M3_MAX)  # a tensor divisor: CUDA multiplies by the reciprocal of a scalar
    if pow2:
        bits = scale.view(torch.int32)
        scale = ((bits + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)  # exponent + 1 where the mantissa is not 0
    return scale


def least_e4m3(pow2: bool) -> float:
    """The scale of a block of zeros."""
    return float(scale_e4m3(torch.zeros(1), FLOOR, pow2))


def to_e4m3(x: Tensor) -> Tensor:
    """RN8(clamp(x, +-448)): the codes as e4m3."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


_decoded: dict[torch.device, Tensor] = {}


def from_e4m3(codes: Tensor) -> Tensor:
    """The codes' values in float32; a table look-up, five times faster on a CPU than torch's cast."""
    table = _decoded.get(codes.device)
    if table is None:
        table = torch.arange(256, dtype=torch.uint8, device=codes.device).view(E4M3).to(torch.float32)
        _decoded[codes.device] = table
    return table.index_select(0, codes.view(torch.uint8).flatten().to(torch.int32)).view(codes.shape)


def round_e4m3(x: Tensor) -> Tensor:
    """RN8 of values within +-448, in float32: adding 1.5 * 2^20 times the value's power of two drops all but the bits
    that e4m3 keeps (below 2^-6 it keeps multiples of 2^-9). Equal to torch's cast but for the sign of a zero.
    """
    magic = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=2.0**-6) * (1.5 * 2**20)
    return (x + magic) - magic


def quantize_e4m3(x: Tensor, dim: int, floor: float, pow2: bool) -> tuple[Tensor, Tensor]:
    """Codes (float32 carriers) and scales [..., 1, ...] of blocks that run along `dim`, in plain torch.

    A block with a NaN or an infinity is poisoned: all its codes are NaN, its scale is 1, so that the loss shows it.
    """
    amax = x.abs().amax(dim, keepdim=True)
    scale, poisoned = scale_e4m3(amax, floor, pow2), ~torch.isfinite(amax)
    codes = round_e4m3((x / scale).clamp(-E4M3_MAX, E4M3_MAX))
    return codes.masked_fill(poisoned, float("nan")), scale.masked_fill(poisoned, 1.0)


def quantize_rows(x: Tensor, floor: float, pow2: bool) -> tuple[Tensor, Tensor]:
    """[M, K] in blocks of 1 x 128 along K -> codes [M, K], scales [M, ceil(K / 128)]."""
    rows, cols = x.shape
    blocks = pad_to(x, 1, BLOCK).contiguous().view(rows, -(-cols // BLOCK), BLOCK)
    if x.is_cuda:
        codes, scale = quantize_e4m3(blocks, 2, floor, pow2)
    else:
        codes, scale = torch.empty_like(blocks), blocks.new_empty(blocks.shape[:2])
        e4m3.quantize_runs(blocks.detach().numpy(), floor, pow2, codes.numpy(), scale.numpy())
    return codes.flatten(1)[:, :cols], scale.view(rows, -(-cols // BLOCK))


def quantize_columns(x: Tensor, floor: float, pow2: bool) -> tuple[Tensor, Tensor]:
    """[M, K] in blocks of 128 x 1 along M -> codes [B, 128, K] with zero rows at the end, scales [B, K]."""
    if x.is_cuda:
        padded = pad_to(x, BLOCK, 1)
        codes, scale = quantize_e4m3(padded.view(padded.shape[0] // BLOCK, BLOCK, x.shape[1]), 1, floor, pow2)
        return codes, scale.squeeze(1)
    blocks = -(-x.shape[0] // BLOCK)
    codes, scale = x.new_empty(blocks * BLOCK, x.shape[1]), x.new_empty(blocks, x.shape[1])
    e4m3.quantize_columns(x.detach().contiguous().numpy(), floor, pow2, codes.numpy(), scale.numpy())
    return codes.view(blocks, BLOCK, x.shape[1]), scale


def quantize_tiles(w: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """A finite weight [N, K] in tiles of 128 x 128 -> e4m3 codes [N, K], scales [ceil(N / 128), ceil(K / 128)], in
    plain torch."""
    rows, cols = w.shape
    padded = pad_to(w, BLOCK, BLOCK)
    tiles = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scale = scale_e4m3(tiles.abs().amax((1, 3)), FLOOR, pow2)
    codes = to_e4m3(tiles / scale[:, None, :, None]).view(padded.shape)[:rows, :cols].contiguous()
    return codes, scale


def encode_tiles(weight: Tensor, pow2: bool, name: str) -> tuple[Tensor, Tensor]:
    """`quantize_tiles` of a weight's 16-bit values; NonFiniteWeightError says `name`."""
    w = weight.detach().to(torch.bfloat16).contiguous()
    if w.is_cuda:
        check_finite(w, name)
        return quantize_tiles(w.float(), pow2)
    codes = torch.empty(w.shape, dtype=torch.uint8)
    scale = torch.empty([-(-size // BLOCK) for size in w.shape])
    e4m3.quantize_tiles(w.view(torch.int16).numpy(), FLOOR, pow2, codes.numpy(), scale.numpy())
    if not bool(torch.isfinite(scale).all()):
        check_finite(w, name)
    return codes.view(E4M3), scale


def spread(scale: Tensor, size: int) -> Tensor:
    """[R, B] -> [R, size]: each scale 128 times, cropped."""
    return scale.repeat_interleave(BLOCK, 1)[:, :size].contiguous()


def block_matmul(q_x: Tensor, s_x: Tensor, q_w: Tensor, s_w: Tensor) -> Tensor:
    """Scaled product with one float32 step a block of the inner dimension, in increasing order.

    q_x [M, K], s_x [M, B], q_w [N, K], s_w [B, N] -> y [M, N]; y_b = fma(P_b * s_x, s_w, y_(b-1)), P_b in float32.
    """
    y = None
    for b in range(s_x.shape[1]):
        k = slice(b * BLOCK, (b + 1) * BLOCK)
        part = matmul_bf16(q_x[:, k], q_w[:, k]).mul_(s_x[:, b, None])  # [M, 128] @ [128, N]
        y = part.mul_(s_w[b]) if y is None else y.addcmul_(part, s_w[b])  # a first sum, onto 0, is a product
    assert y is not None
    return y


def block_outer(q_y: Tensor, s_y: Tensor, q_x: Tensor, s_x: Tensor) -> Tensor:
    """dW [N, K] = sum over row blocks b of (q_y[b].T @ q_x[b]) * s_y[b, n] * s_x[b, k], in increasing order.

    q_y [B, 128, N], s_y [B, N], q_x [B, 128, K], s_x [B, K].
    """
    total = q_y.new_zeros(q_y.shape[2], q_x.shape[2])
    for b in range(q_y.shape[0]):
        part = matmul_bf16(q_y[b].t(), q_x[b].t())  # [N, 128] @ [128, K]
        total.addcmul_(part.mul_(s_y[b, :, None]), s_x[b])
    return total


# -- integers in groups ---------------------------------------------------------------------------------------------
def quantize_groups(w: Tensor, group: int, divisor: float, low: int, high: int) -> tuple[Tensor, Tensor]:
    """A finite weight [N, K] in groups along K -> codes int8 [N, K], scales bf16 [N, K / group], in plain torch.

    The scale is rounded to bf16 before the codes are computed from it; codes are integers, so -0 does not exist.
    """
    groups = w.view(w.shape[0], -1, group)
    amax = groups.abs().amax(2)
    scale = (amax / torch.full_like(amax, divisor)).clamp(min=INT4_FLOOR).to(torch.bfloat16)
    codes = torch.round(groups / scale.to(torch.float32)[:, :, None]).clamp(low, high)
    return codes.to(torch.int8).view(w.shape), scale


def encode_groups(
    weight: Tensor, group: int, divisor: float, low: int, high: int, bits: int, name: str
) -> tuple[Tensor, Tensor]:
    """`quantize_groups` of a weight's 16-bit values, its codes as `pack` stores them; NonFiniteWeightError says `name`.

    -> int32 [N, K * bits / 32], scales bf16 [N, K / group]
    """
    w = weight.detach().to(torch.bfloat16).contiguous()
    if w.is_cuda:
        check_finite(w, name)
        codes, scale = quantize_groups(w.float(), group, divisor, low, high)
        return pack(codes, bits), scale
    packed = torch.empty(w.shape[0], w.shape[1] * bits // 8, dtype=torch.uint8)
    scale = torch.empty(w.shape[0], w.shape[1] // group, dtype=torch.int16)
    x = w.view(torch.int16).numpy()
    integers.quantize_groups(x, divisor, INT4_FLOOR, low, high, bits, packed.numpy(), scale.numpy())
    scale = scale.view(torch.bfloat16)
    if not bool(torch.isfinite(scale).all()):
        check_finite(w, name)
    return packed.view(torch.int32), scale


def dequantize_groups(codes: Tensor, scale: Tensor) -> Tensor:
    """RN16b(q * s) in float32 carriers; codes int8 [N, K], scale bf16 [N, K / group]."""
    groups = codes.to(torch.float32).view(*scale.shape, -1)
    return bf16(groups * scale.to(torch.float32)[:, :, None]).view(codes.shape)


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 [N, K] codes of 4 or 8 bits -> int32 [N, K * bits / 32], offset-binary, the first in the lowest bits."""
    v = (codes.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    if bits == 4:
        v = v[:, 0::2] | (v[:, 1::2] << 4)
    return v.contiguous().view(torch.int32)  # bytes of a little-endian word


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: int8 [N, K]."""
    v = packed.contiguous().view(torch.uint8)
    if bits == 4:
        v = torch.stack((v & 15, v >> 4), 2).view(packed.shape[0], -1)
    return (v - (1 << bits - 1)).view(torch.int8)


# -- what quantisation did -----------------------------------------------------------------------------------------
def tally(
    weight: Tensor,
    served: Tensor,
    ends: Tensor | None = None,
    scale: Tensor | None = None,
    block: tuple[int, int] = (1, 1),
    least: float = 0.0,
) -> Tally:
    """Squares of W and of W - dq(W); with a mask of the codes at an `end` of the range also blocks and scales.

    `least` is the scale of a block of zeros; no other block has a smaller one.
    """
    w = weight.detach().to(torch.float32)
    total, lost = _squares(w), _squares(served - w)
    if ends is None or scale is None:
        return Tally(lost, total)
    rows, cols = block
    zero, low, high = 0, *(float(end) for end in torch.aminmax(scale.to(torch.float32)))
    if low <= least:
        padded = pad_to(w, rows, cols)
        amax = padded.view(padded.shape[0] // rows, rows, -1, cols).abs().amax((1, 3))
        zero = amax.numel() - int(amax.count_nonzero())
    return Tally(lost, total, ends.numel(), int(ends.count_nonzero()), scale.numel(), zero, low, high)


def has_loop(weight: Tensor) -> bool:
    """Is this a weight that `tally_tiles` and `tally_groups` take, which read it once?"""
    return weight.dtype == torch.bfloat16 and not weight.is_cuda


def tally_tiles(weight: Tensor, codes: Tensor, scale: Tensor) -> Tally:
    """`tally` of a bf16 weight on a CPU and its tiles of 128 x 128."""
    sums, x = torch.empty(4, dtype=torch.float64), weight.detach().contiguous().view(torch.int16)
    e4m3.tally_tiles(x.numpy(), codes.view(torch.uint8).numpy(), scale.numpy(), sums.numpy())
    return _tally(sums, codes.numel(), scale)


def tally_groups(weight: Tensor, packed: Tensor, scale: Tensor, bits: int, low: int, high: int) -> Tally:
    """`tally` of a bf16 weight on a CPU and its packed groups."""
    sums, x = torch.empty(4, dtype=torch.float64), weight.detach().contiguous().view(torch.int16)
    stored = packed.contiguous().view(torch.uint8).numpy(), scale.contiguous().view(torch.int16).numpy()
    integers.tally_groups(x.numpy(), *stored, bits, low, high, sums.numpy())
    return _tally(sums, weight.numel(), scale)


def _tally(sums: Tensor, codes: int, scale: Tensor) -> Tally:
    lost, total, ends, zero = sums.tolist()
    low, high = (float(end) for end in torch.aminmax(scale.to(torch.float32)))
    return Tally(lost, total, codes, int(ends), scale.numel(), int(zero), low, high)


def _squares(x: Tensor) -> float:
    """The sum of squares, in float32 where it can hold it: float64 takes three times as long."""
    found = float(x.square().sum())
    return found if 1e-20 < found < math.inf else float(x.to(torch.float64).square().sum())


def ends_e4m3(codes: Tensor) -> Tensor:
    """Which codes are +-448."""
    return (codes.view(torch.uint8) & 0x7F) == 0x7E
