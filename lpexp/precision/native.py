"""Whether this machine's CPU multiplies bf16 values in units of its own. No torch: the driver asks too.

Products of bf16 values are exact in float32, so such units differ from float32 products in the order of their sums,
and in nothing else but values below 2^-126, which they take for zero. Left out: AVX512-BF16 alone, which saves
nothing once operands are converted, and units that are not x86.
"""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def bf16_units() -> str | None:
    """The name of the units that `numeric.matmul_bf16` uses on this CPU; None: it multiplies in float32."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return None
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    return "AMX" if {"amx_tile", "amx_bf16"} <= set(flags.split()) else None
