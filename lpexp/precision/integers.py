"""Integers in groups as loops for a CPU: the quantiser with its packing, and what it lost.

numeric.py has them in torch, for GPUs and tests. Eight times as fast as torch's passes. The rules of lpexp/kernels.py
apply; arithmetic is float32, divisions are correctly rounded. Weights and scales are the bits of bf16 values.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import float32, float64, int64

from lpexp.kernels import compiled, d1
from lpexp.precision.e4m3 import h2, top_bits, u2, wide


@numba.njit
def _round(x: Any) -> Any:
    """RN16b of a finite value, as its float32 bits."""
    bits = np.float32(x).view(np.int32)
    odd = np.int32(np.int32(bits >> np.int32(16)) & np.int32(1))
    return np.int32(np.int32(bits + np.int32(0x7FFF) + odd) & np.int32(-65536))


@compiled(h2, float32, float32, float32, float32, int64, u2, h2)
def quantize_groups(x: Any, divisor: Any, floor: Any, low: Any, high: Any, bits: Any, packed: Any, scales: Any) -> None:
    """x [N, K], scales [N, K / g] of bf16, packed [N, K * bits / 8]: codes of 4 or 8 bits, the first one lowest.

    A group with a NaN or an infinity gets a scale that is no finite number, and codes that mean nothing.
    """
    rows, cols = x.shape
    size = cols // scales.shape[1]
    held, middle = size * bits // 8, np.int32(1 << (bits - 1))
    codes = np.empty(size, np.uint8)
    for r in range(rows):
        for g in range(scales.shape[1]):
            group, out = x[r, g * size : (g + 1) * size], packed[r, g * held : (g + 1) * held]
            top = top_bits(group, np.int32(0))
            scale = wide(top) / divisor
            scale = floor if scale < floor else scale
            stored = _round(scale) if top < np.int32(0x7F80) else np.int32(0x7FC00000)
            scales[r, g] = np.int16(stored >> np.int32(16))
            scale = np.int32(stored).view(np.float32)
            for i in range(group.size):
                y = wide(group[i]) / scale
                y = (y + np.float32(12582912.0)) - np.float32(12582912.0)  # the nearest integer, ties to even
                y = high if y > high else y
                y = low if y < low else y
                codes[i] = np.uint8(np.int32(y) + middle)
            if bits == 8:
                for i in range(out.size):
                    out[i] = codes[i]
            else:
                for i in range(out.size):
                    out[i] = np.uint8(codes[2 * i] | (codes[2 * i + 1] << 4))


@numba.njit(fastmath={"reassoc"})
def _sums(group: Any, codes: Any, scale: Any, middle: Any, low: Any, high: Any) -> Any:
    """Sums of (w - RN16b(q s))^2 and of w^2 in float64, and how many codes are at an end of the range."""
    lost, total, ends = 0.0, 0.0, np.int32(0)
    for i in range(group.size):
        w, q = wide(group[i]), np.int32(np.int32(codes[i]) - middle)
        error = float64(np.float32(np.int32(_round(np.float32(q) * scale)).view(np.float32) - w))
        lost += error * error
        total += float64(w) * float64(w)
        ends += (q <= low) | (q >= high)
    return lost, total, ends


@compiled(h2, u2, h2, int64, int64, int64, d1)
def tally_groups(x: Any, packed: Any, scales: Any, bits: Any, low: Any, high: Any, out: Any) -> None:
    """What `quantize_groups` did to x: out = lost, total, codes at an end of the range, groups of zeros."""
    rows, cols = x.shape
    size = cols // scales.shape[1]
    held, middle = size * bits // 8, np.int32(1 << (bits - 1))
    codes = np.empty(size, np.uint8)
    out[:] = 0.0
    for r in range(rows):
        for g in range(scales.shape[1]):
            part = packed[r, g * held : (g + 1) * held]
            if bits == 8:
                for i in range(part.size):
                    codes[i] = part[i]
            else:
                for i in range(part.size):
                    codes[2 * i] = part[i] & 15
                    codes[2 * i + 1] = part[i] >> 4
            group, scale = x[r, g * size : (g + 1) * size], wide(scales[r, g])
            lost, total, ends = _sums(group, codes, scale, middle, np.int32(low), np.int32(high))
            out[0] += lost
            out[1] += total
            out[2] += ends
            out[3] += total == 0.0  # the square of the least bf16 is a float64
