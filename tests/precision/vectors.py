"""The golden vectors, and the check that today's arithmetic still gives exactly these bits."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
GRIDS = {"int4_g32_7": (32, 7.0, -7, 7), "int4_g32_7.5": (32, 7.5, -8, 7), "int4_g128_7": (128, 7.0, -7, 7)}


def manifest() -> dict[str, dict]:
    return json.loads((GOLDEN / "manifest.json").read_text())["files"]


def cases(name: str) -> dict[str, dict[str, np.ndarray]]:
    """{case: {array: values}} of one file, whose bytes must be those of the manifest."""
    path = GOLDEN / f"{name}.npz"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == manifest()[path.name]["sha256"]
    found: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    with np.load(path) as arrays:
        for key in arrays.files:
            parts = key.split("|")
            found["/".join(parts[:2])]["/".join(parts[2:])] = arrays[key]
    return found


def from_bf16_bits(bits: np.ndarray) -> Tensor:
    """uint16 patterns -> float32 carriers."""
    return torch.from_numpy(bits.astype(np.int16)).view(torch.bfloat16).float()


def bits(x: Tensor) -> np.ndarray:
    """The bit patterns of any tensor, as unsigned integers of its own width."""
    signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.element_size()]
    return x.contiguous().view(signed).numpy().view(unsigned)


def same_values(x: Tensor, expected_bits: np.ndarray) -> bool:
    """Float32 carriers that hold exactly these bf16 patterns."""
    return bool(np.array_equal(bits(x), expected_bits.astype(np.uint32) << 16))


def differing_fp8(numeric: ModuleType) -> list[str]:
    """Names of the golden fp8 arrays that this arithmetic does not reproduce."""
    wrong = []
    everything = cases("fp8")
    scale = everything.pop("scale/amax_bits")[""]
    amax = torch.from_numpy(scale.astype(np.int32)).view(torch.float32)
    for mode in ("fp32", "pow2"):
        pow2 = mode == "pow2"
        expected = everything.pop(f"scale/{mode}")["scale_bits"]
        if not np.array_equal(bits(numeric.scale_e4m3(amax, numeric.FLOOR, pow2)), expected):
            wrong.append(f"scale/{mode}")
        for name, case in everything.items():
            if name.startswith("scale/"):
                continue
            x = from_bf16_bits(case["x_bits"])
            codes, scales = numeric.quantize_tiles(x, pow2)
            stored, stored_scales = numeric.encode_tiles(x, pow2, name)
            row_codes, row_scales = numeric.quantize_rows(x, numeric.FLOOR, pow2)
            values = torch.from_numpy(case[f"{mode}/row_codes"]).view(torch.float8_e4m3fn).float()
            right = {
                "tile codes": np.array_equal(bits(codes), case[f"{mode}/tile_codes"]),
                "tile scales": np.array_equal(bits(scales), case[f"{mode}/tile_scale_bits"]),
                "stored codes": np.array_equal(bits(stored), case[f"{mode}/tile_codes"]),
                "stored scales": np.array_equal(bits(stored_scales), case[f"{mode}/tile_scale_bits"]),
                "row codes": torch.equal(row_codes, values),
                "row scales": np.array_equal(bits(row_scales), case[f"{mode}/row_scale_bits"]),
            }
            if f"{mode}/decoded_bits" in case:
                spread = numeric.spread(numeric.spread(scales.t(), x.shape[0]).t(), x.shape[1])
                decoded = numeric.bf16(numeric.from_e4m3(codes) * spread)
                right["decoded"] = same_values(decoded, case[f"{mode}/decoded_bits"])
            wrong += [f"{name} {mode} {what}" for what, ok in right.items() if not ok]
    return wrong


def differing_int4(numeric: ModuleType) -> list[str]:
    """Names of the golden int4 arrays that this arithmetic does not reproduce."""
    wrong = []
    for file, grid in GRIDS.items():
        for name, case in cases(file).items():
            x = from_bf16_bits(case["x_bits"])
            codes, scale = numeric.quantize_groups(x, *grid)
            stored, stored_scale = numeric.encode_groups(x, *grid, 4, name)
            packed = numeric.pack(codes, 4)
            served = numeric.dequantize_groups(numeric.unpack(packed, 4), scale)
            right = {
                "packed": np.array_equal(bits(packed), case["packed"].view(np.uint32)),
                "scales": scale.dtype == torch.bfloat16 and np.array_equal(bits(scale), case["scale_bits"]),
                "stored words": np.array_equal(bits(stored), case["packed"].view(np.uint32)),
                "stored scales": np.array_equal(bits(stored_scale), case["scale_bits"]),
                "trained values": same_values(numeric.dequantize_groups(codes, scale), case["decoded_bits"]),
                "served values": same_values(served, case["decoded_bits"]),
            }
            wrong += [f"{file} {name} {what}" for what, ok in right.items() if not ok]
    return wrong
