"""The quantisers once more, from their definition and without torch: value tables and float64, one rounding at a time.

Everything is numpy. Rounding to a format is a search in the table of its values; a float64 quotient of two float32
numbers rounded to float32 is the correctly rounded float32 quotient.
"""

from __future__ import annotations

import numpy as np

F32, F64 = np.float32, np.float64


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns -> float64."""
    return (bits.astype(np.uint32) << 16).view(F32).astype(F64)


def round_bf16(x: np.ndarray) -> np.ndarray:
    """Nearest multiple of the bf16 spacing at x, ties to even; float64 in and out."""
    spacing = np.ldexp(1.0, np.maximum(np.frexp(x)[1] - 8, -133))
    return np.rint(x / spacing) * spacing


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """Bit patterns of the nearest bf16 values; infinity from half a spacing above the largest one."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = np.where(np.isfinite(x), round_bf16(np.where(np.isfinite(x), x, 0.0)), x)
        return (rounded.astype(F32).view(np.uint32) >> 16).astype(np.uint16)


def _e4m3_value(code: int) -> float:
    exponent, mantissa = code >> 3, code & 7
    return mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)


E4M3 = np.array([_e4m3_value(code) for code in range(127)])  # codes 0x00..0x7E; 0x7F is NaN


def e4m3_codes(x: np.ndarray) -> np.ndarray:
    """Nearest table entry of |x|, ties to the even code, with the sign bit of x (-0 keeps its own)."""
    size = np.minimum(np.abs(x), 448.0)
    above = np.clip(np.searchsorted(E4M3, size), 1, 126)
    down, up = size - E4M3[above - 1], E4M3[above] - size
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)
    return (code + 128 * np.signbit(x)).astype(np.uint8)


def e4m3_values(codes: np.ndarray) -> np.ndarray:
    return np.where(codes & 128, -1.0, 1.0) * E4M3[codes & 127]


def e4m3_scales(amax: np.ndarray, pow2: bool, floor: float = 1e-10) -> np.ndarray:
    scale = (np.maximum(amax, F64(F32(floor))) / 448.0).astype(F32).astype(F64)
    if pow2:
        mantissa, exponent = np.frexp(scale)  # in [0.5, 1)
        scale = np.ldexp(1.0, exponent - (mantissa == 0.5))
    return scale


def quantize_e4m3(
    x: np.ndarray, block: tuple[int, int], pow2: bool, floor: float = 1e-10
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [R, C] -> codes uint8 [R, C], scales float64 [ceil(R / rows), ceil(C / cols)]."""
    rows, cols = block
    down, across = -(-x.shape[0] // rows), -(-x.shape[1] // cols)
    codes, scales = np.zeros(x.shape, np.uint8), np.zeros((down, across))
    for i in range(down):
        for j in range(across):
            at = np.s_[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]
            scales[i, j] = e4m3_scales(np.abs(x[at]).max(), pow2, floor)
            codes[at] = e4m3_codes((x[at] / scales[i, j]).astype(F32).astype(F64))
    return codes, scales


def quantize_int4(
    w: np.ndarray, group: int, divisor: float, low: int, high: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float64 [N, K] -> codes int8 [N, K], scales float64 [N, K / group], decoded values float64 [N, K]."""
    groups = w.reshape(w.shape[0], -1, group)
    amax = (np.abs(groups).max(2) / divisor).astype(F32).astype(F64)
    scales = round_bf16(np.maximum(amax, F64(F32(1e-5))))
    codes = np.clip(np.rint((groups / scales[:, :, None]).astype(F32)), low, high).astype(np.int8)
    decoded = round_bf16(codes.astype(F64) * scales[:, :, None])
    return codes.reshape(w.shape), scales, decoded.reshape(w.shape)


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """int8 [N, K] -> int32 [N, K / 8]: element i in bits 4 * (i mod 8) upward of word i // 8, stored as q + 8."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.int64)
    for i in range(codes.shape[1]):
        words[:, i // 8] |= (codes[:, i].astype(np.int64) + 8) << 4 * (i % 8)
    return words.astype(np.uint32).view(np.int32)


def expand(scales: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """Each scale over its block, cropped to shape."""
    return scales.repeat(block[0], 0).repeat(block[1], 1)[: shape[0], : shape[1]]


def decode_e4m3(x: np.ndarray, block: tuple[int, int], pow2: bool, floor: float = 1e-10) -> np.ndarray:
    """Exact float64 values q * s of a quantised x."""
    codes, scales = quantize_e4m3(x, block, pow2, floor)
    return e4m3_values(codes) * expand(scales, block, x.shape)
