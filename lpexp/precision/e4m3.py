"""The e4m3 quantiser of activations and gradients as loops for a CPU; numeric.py has it in torch, for GPUs and tests.

Four times as fast as torch's passes. The rules of lpexp/kernels.py apply; arithmetic is float32, divisions are
correctly rounded.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import boolean, float32

from lpexp.kernels import compiled, f2, f3

BLOCK = 128  # values under one scale


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
