"""The e4m3 quantisers as loops for a CPU: runs of activations and gradients, tiles of weights, and what tiles lost.

numeric.py has them in torch, for GPUs and tests. Four to ten times as fast as torch's passes. The rules of
lpexp/kernels.py apply; arithmetic is float32, divisions are correctly rounded. Weights come as the bits of their bf16
values and go as bytes.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import boolean, float32, float64, int16, uint8

from lpexp.kernels import compiled, d1, f2, f3

BLOCK = 128  # values under one scale
h2, u2 = int16[:, ::1], uint8[:, ::1]


@numba.njit(inline="always")
def _scale(top: Any, floor: Any, pow2: Any) -> Any:
    """max(amax, floor) / 448 of an amax given by its bits; the least power of two not below it; 1 for a bad block."""
    if top >= np.int32(0x7F800000):
        return np.float32(1.0)
    amax = np.int32(top).view(np.float32)
    scale = (floor if amax < floor else amax) / np.float32(448.0)
    if pow2:
        bits = np.float32(scale).view(np.int32)
        scale = np.int32((bits + np.int32(0x7FFFFF)) & np.int32(~0x7FFFFF)).view(np.float32)
    return scale


@numba.njit(inline="always")
def _code(x: Any, scale: Any) -> Any:
    """RN8(clamp(x / s, +-448)): adding 1.5 * 2^20 times the value's power of two drops all bits but e4m3's."""
    y = x / scale
    y = np.float32(448.0) if y > np.float32(448.0) else y
    y = np.float32(-448.0) if y < np.float32(-448.0) else y
    magic = np.int32(np.float32(y).view(np.int32) & np.int32(0x7F800000)).view(np.float32)
    magic = np.float32(2.0**-6) if magic < np.float32(2.0**-6) else magic
    magic = magic * np.float32(1.5 * 2**20)
    return (y + magic) - magic


@compiled(f3, float32, boolean, f3, f2)
def quantize_runs(x: Any, floor: Any, pow2: Any, codes: Any, scales: Any) -> None:
    """Blocks along a row: x and codes [M, B, 128], scales [M, B]; a block with a NaN or an infinity is all NaN."""
    rows, blocks, size = x.shape
    for r in range(rows):
        for b in range(blocks):
            top = np.int32(0)
            for i in range(size):
                top = max(top, np.float32(x[r, b, i]).view(np.int32) & np.int32(0x7FFFFFFF))
            scale = _scale(top, floor, pow2)
            scales[r, b] = scale
            if top >= np.int32(0x7F800000):
                codes[r, b, :] = np.float32(np.nan)
            else:
                for i in range(size):
                    codes[r, b, i] = _code(x[r, b, i], scale)


@compiled(f2, float32, boolean, f2, f2)
def quantize_columns(x: Any, floor: Any, pow2: Any, codes: Any, scales: Any) -> None:
    """Blocks of 128 down a column: codes [B * 128, K] with zero rows at the end, scales [B, K]."""
    rows, cols = x.shape
    tops = np.empty(cols, np.int32)
    for b in range(scales.shape[0]):
        start, stop = b * BLOCK, min((b + 1) * BLOCK, rows)
        tops[:] = 0
        for r in range(start, stop):
            for i in range(cols):
                tops[i] = max(tops[i], np.float32(x[r, i]).view(np.int32) & np.int32(0x7FFFFFFF))
        for i in range(cols):
            scales[b, i] = _scale(tops[i], floor, pow2)
        for r in range(start, start + BLOCK):
            for i in range(cols):
                if tops[i] >= np.int32(0x7F800000):
                    codes[r, i] = np.float32(np.nan)
                else:
                    codes[r, i] = _code(x[r, i], scales[b, i]) if r < stop else np.float32(0.0)


# -- weights -----------------------------------------------------------------------------------------------------------
@numba.njit
def wide(bits: Any) -> Any:
    """The float32 of a bf16 pattern."""
    return np.int32(np.int32(bits) << np.int32(16)).view(np.float32)


@numba.njit
def top_bits(x: Any, top: Any) -> Any:
    """The largest magnitude among bf16 patterns and `top`; infinity and NaN are above all others."""
    for i in range(x.size):
        top = max(top, np.int32(np.int32(x[i]) & np.int32(0x7FFF)))
    return top


@numba.njit
def _byte(y: Any) -> Any:
    """RN8 of |y| <= 448 as e4m3 stores it: by the bits, or below 2^-6, where codes lie evenly, by adding 2^14."""
    bits = np.float32(y).view(np.int32)
    size = np.int32(bits & np.int32(0x7FFFFFFF))
    odd = np.int32(np.int32(size >> np.int32(20)) & np.int32(1))
    normal = np.int32((np.int32(size + np.int32(0x7FFFF) + odd) >> np.int32(20)) - np.int32(120 << 3))
    tiny = np.int32(np.float32(size.view(np.float32) + np.float32(2.0**14)).view(np.int32) - np.int32(0x46800000))
    code = tiny if size < np.int32(0x3C800000) else normal
    return np.int32(code | np.int32(np.int32(bits >> np.int32(24)) & np.int32(0x80)))


@numba.njit
def _value(code: Any) -> Any:
    """The float32 of a finite code."""
    size = np.int32(np.int32(code) & np.int32(0x7F))
    normal = np.int32(np.int32(size << np.int32(20)) + np.int32(120 << 23)).view(np.float32)
    found = np.float32(size) * np.float32(2.0**-9) if size < np.int32(8) else normal
    sign = np.int32(np.int32(np.int32(code) & np.int32(0x80)) << np.int32(24))
    return np.int32(np.float32(found).view(np.int32) | sign).view(np.float32)


@compiled(h2, float32, boolean, u2, f2)
def quantize_tiles(x: Any, floor: Any, pow2: Any, codes: Any, scales: Any) -> None:
    """Tiles of 128 x 128, cut off at the ends: x and codes [N, K], scales [ceil(N / 128), ceil(K / 128)].

    A tile with a NaN or an infinity gets a NaN for its scale, and codes that mean nothing.
    """
    rows, cols = x.shape
    for b in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            first, last = b * BLOCK, min((b + 1) * BLOCK, rows)
            start, stop = c * BLOCK, min((c + 1) * BLOCK, cols)
            top = np.int32(0)
            for r in range(first, last):
                top = top_bits(x[r, start:stop], top)
            scale = _scale(np.int32(top << np.int32(16)), floor, pow2)
            scales[b, c] = scale if top < np.int32(0x7F80) else np.float32(np.nan)
            for r in range(first, last):
                row, out = x[r, start:stop], codes[r, start:stop]
                for i in range(row.size):
                    y = wide(row[i]) / scale
                    y = np.float32(448.0) if y > np.float32(448.0) else y
                    y = np.float32(-448.0) if y < np.float32(-448.0) else y
                    out[i] = np.uint8(_byte(y))


@numba.njit(fastmath={"reassoc"})
def _sums(row: Any, codes: Any, scale: Any) -> Any:
    """Sums of (w - q s)^2 and of w^2 in float64, and how many codes are +-448."""
    lost, total, ends = 0.0, 0.0, np.int32(0)
    for i in range(row.size):
        w = wide(row[i])
        error = float64(np.float32(_value(codes[i]) * scale - w))
        lost += error * error
        total += float64(w) * float64(w)
        ends += np.int32(np.int32(codes[i]) & np.int32(0x7F)) == np.int32(0x7E)
    return lost, total, ends


@compiled(h2, u2, f2, d1)
def tally_tiles(x: Any, codes: Any, scales: Any, out: Any) -> None:
    """What `quantize_tiles` did to x: out = lost, total, codes of +-448, tiles of zeros."""
    rows, cols = x.shape
    out[:] = 0.0
    for b in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            start, stop, held = c * BLOCK, min((c + 1) * BLOCK, cols), 0.0
            for r in range(b * BLOCK, min((b + 1) * BLOCK, rows)):
                lost, total, ends = _sums(x[r, start:stop], codes[r, start:stop], scales[b, c])
                out[0] += lost
                held += total
                out[2] += ends
            out[1] += held
            out[3] += held == 0.0  # the square of the least bf16 is a float64
