"""Small Hugging Face directories to convert, and what is compared of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpexp.model import Model, hf
from lpexp.precision import Precision
from lpexp.precision.bf16 import Bf16
from lpexp.precision.fp8 import Fp8
from lpexp.precision.fp8_scaled import Fp8Channel, Fp8Tensor
from lpexp.precision.int4 import Int4Qat
from lpexp.precision.int8 import W8A16
from tests.golden import make
from tests.model.small import BASE

BF16 = Bf16(name="bf16")
# Words after `lpexp convert`, and the precision that they mean.
WAYS: dict[str, tuple[list[str], Precision]] = {
    "fp8": (["fp8", "--strategy", "block", "--block-size", "128", "128"], Fp8(name="fp8")),
    "fp8 ue8m0": (["fp8", "--scale-fmt", "ue8m0"], Fp8(name="fp8", scale_format="pow2")),
    "fp8 channel": (["fp8", "--strategy", "channel"], Fp8Channel(name="fp8_channel")),
    "fp8 tensor": (["fp8", "--strategy", "tensor"], Fp8Tensor(name="fp8_tensor")),
    "int4 g32": (["int4", "--quant-group-size", "32"], Int4Qat(name="int4_qat", group_size=32)),
    "int4 g128": (["int4", "--method", "rtn", "--quant-type", "W4A16"], Int4Qat(name="int4_qat")),
    "int4 /7.5": (
        ["int4", "--group-size", "64", "--divisor", "7.5"],
        Int4Qat(name="int4_qat", group_size=64, divisor=7.5),
    ),
    "w8a16": (["int4", "--quant-type", "W8A16"], W8A16(name="w8a16")),
    "w8a16 /127.5": (["int4", "--quant-type", "W8A16", "--divisor", "127.5"], W8A16(name="w8a16", divisor=127.5)),
}
GOLDEN_SIZES: dict[str, Any] = BASE | {
    "vocab_size": 16,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
GOLDEN = Model(name="golden", architecture="qwen3", **GOLDEN_SIZES)


def random(model: Model, seed: int = 0) -> dict[str, Tensor]:
    """bf16 weights: normal ones, and one tensor each of ties, zeros, maxes and tiny values among the linears."""
    generator = torch.Generator().manual_seed(seed)
    found = {p.name: torch.randn(p.shape, generator=generator) * 0.05 for p in model.params()}
    linears = [p for p in model.params() if "proj" in p.name]
    for param, kind in zip(linears, ("ties", "zeros", "maxes", "tiny"), strict=False):
        found[param.name] = planted(kind, param.shape)
    return {name: tensor.bfloat16() for name, tensor in found.items()}


def planted(kind: str, shape: tuple[int, ...]) -> Tensor:
    """The classes of the conformance suite that random values miss."""
    if kind == "ties":
        return ((torch.arange(shape[0] * shape[1]) % 29 - 14) / 2.0).view(shape)
    if kind == "zeros":
        some = torch.zeros(shape)
        some[-1, -1], some[0, 0] = 1.0, -0.0
        return some
    if kind == "maxes":
        return torch.full(shape, 3.0e4) * (-1.0) ** torch.arange(shape[1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)) * 1e-38


def golden_weights() -> dict[str, Tensor]:
    """The same on every machine: from a counter hash and exactly rounded operations."""
    return {p.name: torch.from_numpy(make.normal(p.name, *p.shape) * 0.05).float().bfloat16() for p in GOLDEN.params()}


def plain(at: Path, model: Model, tensors: dict[str, Tensor] | None = None, **more: Any) -> Path:
    """A bf16 directory."""
    return hf.save(at, model, (random(model) if tensors is None else tensors).items(), BF16, **more)


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def edit(directory: Path, **keys: Any) -> None:
    """Change keys of config.json."""
    path = directory / hf.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
