"""The round trip through integer groups in one pass over a weight: RN16b(q * s) as a Triton kernel, for GPUs.

The same arithmetic as `numeric.quantize_groups` and `dequantize_groups`, which is what CPUs run and what the tests
compare every byte with: divisions rounded to nearest, the scale rounded to bf16 before the codes are made from it,
codes through an integer so that -0 does not exist. Left out: packing; that is the exporter's.
Has not run on a card yet: tests/gpu/test_fused.py says what must hold.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from lpexp.precision.numeric import INT4_FLOOR

ROWS = 16  # groups that one program takes


@triton.jit
def _round_trip(
    weight, out, groups, divisor, floor, low, high, GROUP: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (row < groups)[:, None]
    x = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(x), axis=1)
    scale = tl.maximum(tl.div_rn(amax, amax * 0.0 + divisor), floor).to(tl.bfloat16).to(tl.float32)
    codes = libdevice.rint(tl.div_rn(x, tl.broadcast_to(scale[:, None], (ROWS, GROUP))))
    codes = tl.minimum(tl.maximum(codes, low), high).to(tl.int32).to(tl.float32)
    tl.store(out + at, (codes * scale[:, None]).to(tl.bfloat16), mask=inside)


def round_trip(weight: Tensor, group: int, divisor: float, low: int, high: int) -> Tensor:
    """A finite bf16 CUDA weight [N, K] -> the bf16 values that are served of it; `group` divides K."""
    assert weight.is_cuda and weight.dtype == torch.bfloat16 and weight.shape[-1] % group == 0
    weight = weight.contiguous()
    out = torch.empty_like(weight)
    groups = weight.numel() // group
    grid = (triton.cdiv(groups, ROWS),)
    launch: Any = _round_trip
    launch[grid](weight, out, groups, divisor, INT4_FLOOR, float(low), float(high), GROUP=group, ROWS=ROWS)
    return out
