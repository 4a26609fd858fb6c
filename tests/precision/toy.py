"""A precision of one file and one YAML, as somebody else would add it: 8-bit integers with a scale for each output."""

from __future__ import annotations

from pathlib import Path

import pytest

import lpexp.precision

NAME = "toy_rows"
MODULE = '''
"""toy_rows: 8-bit integer weights, one float32 scale a row, bf16 activations."""

from lpexp.precision import Precision, scope_covers
from lpexp.precision.bf16 import Bf16

PLAIN = Bf16(name="bf16")


class ToyRows(Precision):
    reads = "quant_method toy_rows"
    top: int = 127

    def covers(self, param, moe):
        return scope_covers("linears", param, moe)

    def quantize(self, weight, name="weight"):
        import torch

        w = PLAIN.quantize(weight, name)["weight"].float()
        scale = (w.abs().amax(1, keepdim=True) / self.top).clamp(min=1e-10)
        return {"weight": torch.round(w / scale).to(torch.int8), "row_scale": scale}

    def dequantize(self, parts):
        return PLAIN.dequantize(PLAIN.quantize(parts["weight"].float() * parts["row_scale"]))

    def round(self, x):
        return PLAIN.round(x)

    def operand(self, parts):
        return self.dequantize(parts)

    def linear(self, x, weight, operand=None):
        return PLAIN.linear(x, weight, self.operand(self.quantize(weight)) if operand is None else operand)

    def serve(self, x, operand):
        return PLAIN.serve(x, operand)

    @property
    def plain(self):
        return PLAIN

    def format(self):
        return {"identity": f"toy:rows:top={self.top}"}

    def hf(self, params, moe):
        return {"quant_method": "toy_rows", "top": self.top}

    @classmethod
    def read_hf(cls, config, params, moe):
        if config.get("quant_method") != "toy_rows":
            return None
        return cls(name="toy_rows", top=config["top"])
'''
CARD = f"_target_: lpexp.precision.{NAME}.ToyRows\nname: {NAME}\n"


def install(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the module and its card; the package finds the module until the test ends. Returns the card."""
    (directory / f"{NAME}.py").write_text(MODULE)
    card = directory / f"{NAME}.yaml"
    card.write_text(CARD)
    monkeypatch.setattr(lpexp.precision, "__path__", [*lpexp.precision.__path__, str(directory)])
    return card
