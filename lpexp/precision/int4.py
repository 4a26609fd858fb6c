"""int4: 4-bit weights in groups along the inputs, bf16 activations (W4A16), trained through the rounding.

The scale is rounded to its stored bf16 before the codes are computed, and forward products read RN16b(q * s): the
trained weight is the served weight, bit for bit. The gradient passes the rounding unchanged, for every element.
Left out: asymmetric grids, calibrated codes, activation quantisation. Layout: compressed-tensors pack-quantized.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lpexp.config import rule
from lpexp.data import Param
from lpexp.errors import Mistake, RunError
from lpexp.precision import Parts, Precision, Scope, judge_scope, left_out, read_scope, scope_covers
from lpexp.precision.bf16 import Bf16

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = Bf16(name="bf16")
GROUPS = (32, 64, 128)
RANGES = {7.0: (-7, 7), 7.5: (-8, 7)}  # divisor -> codes


class Int4Qat(Precision):
    """Symmetric 4-bit weights; divisor 7 is the grid of slime, miles and Kimi, 7.5 that of compressed-tensors."""

    reads: ClassVar[str] = "compressed-tensors pack-quantized, 4 bits in symmetric groups"
    scope: Scope = "auto"
    group_size: int = 128
    divisor: float = 7.0

    @rule
    def _grid_rules(self) -> Iterator[Mistake]:
        if self.divisor not in RANGES:
            yield Mistake("divisor", f"{self.divisor:g} is no grid; use 7 (codes -7..7) or 7.5 (codes -8..7)")
        if self.group_size < 8 or self.group_size % 8:
            yield Mistake("group_size", f"{self.group_size} is not a multiple of 8; use 32, 64 or 128")

    def covers(self, param: Param, moe: bool) -> bool:
        # Latent attention absorbs kv_b into other products, which no scale along its inputs survives.
        return scope_covers(self.scope, param, moe) and not param.name.endswith(".kv_b_proj.weight")

    def judge(self, params: Iterable[Param], moe: bool) -> Iterable[Mistake]:
        params = list(params)
        yield from judge_scope(self, self.scope, params, moe)
        covered = [p for p in params if self.covers(p, moe)]
        fitting = [str(g) for g in GROUPS if all(p.shape[1] % g == 0 for p in covered)]
        use = "use " + " or ".join(", ".join(fitting).rsplit(", ", 1)) if fitting else "no group fits; narrow the scope"
        misfits = {p.shape[1]: p.name for p in reversed(covered) if p.shape[1] % self.group_size}
        for inputs, name in sorted(misfits.items()):
            where = re.sub(r"\.\d+(?=\.)", ".*", name.removesuffix(".weight"))
            yield Mistake("group_size", f"{self.group_size} does not divide {inputs}, the inputs of {where}; {use}")
        if not misfits and covered and self.group_size not in GROUPS:
            yield Mistake("group_size", f"{self.group_size} is no group that engines serve; {use}")

    @property
    def _range(self) -> tuple[int, int]:
        return RANGES[self.divisor]

    def quantize(self, weight: Tensor, name: str = "weight") -> Parts:
        import torch

        from lpexp.precision import numeric

        w = numeric.bf16(weight.detach()).contiguous()
        numeric.check_finite(w, name)
        if weight.shape[1] % self.group_size:
            raise RunError(f"{name}: group_size {self.group_size} does not divide its {weight.shape[1]} inputs")
        codes, scale = numeric.quantize_groups(w, self.group_size, self.divisor, *self._range)
        shape = torch.tensor(weight.shape, dtype=torch.int64)
        return {"weight_packed": numeric.pack_nibbles(codes), "weight_scale": scale, "weight_shape": shape}

    def dequantize(self, parts: Parts) -> Tensor:
        from lpexp.precision import numeric

        return numeric.dequantize_groups(*self._unpack(parts))

    def _unpack(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """int8 codes [N, K] and bf16 scales [N, K / g]; RunError where the parts cannot be this precision's."""
        import torch

        from lpexp.precision import numeric

        packed, scale, shape = parts["weight_packed"], parts["weight_scale"], [int(n) for n in parts["weight_shape"]]
        low, high = self._range
        if packed.dtype != torch.int32 or list(packed.shape) != [shape[0], shape[1] // 8]:
            raise RunError(f"weight_packed is {packed.dtype} {list(packed.shape)}, not int32 of a weight {shape}")
        if scale.dtype != torch.bfloat16 or list(scale.shape) != [shape[0], shape[1] // self.group_size]:
            groups = f"bf16 in groups of {self.group_size}"
            raise RunError(f"weight_scale is {scale.dtype} {list(scale.shape)}, not {groups}")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise RunError("weight_scale holds a value that is not finite and positive")
        codes = numeric.unpack_nibbles(packed)
        least = int(codes.min())
        if least < low:
            raise RunError(f"weight_packed holds code {least}, outside {low}..{high} of divisor {self.divisor:g}")
        return codes, scale

    def stats(self, weight: Tensor, parts: Parts) -> dict[str, float]:
        from lpexp.precision import numeric

        codes, scale = self._unpack(parts)
        block = (1, self.group_size)
        return super().stats(weight, parts) | numeric.code_stats(weight, codes, scale, block, *self._range)

    def round(self, x: Tensor) -> Tensor:
        return PLAIN.round(x)

    def operand(self, parts: Parts) -> Tensor:
        return self.dequantize(parts)

    def join(self, operands: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat(list(operands))

    def linear(self, x: Tensor, weight: Tensor, operand: Tensor | None = None) -> Tensor:
        return PLAIN.linear(x, weight, self.operand(self.quantize(weight)) if operand is None else operand)

    def serve(self, x: Tensor, operand: Tensor) -> Tensor:
        return PLAIN.serve(x, operand)

    def served_bytes(self, shape: tuple[int, ...]) -> int:
        rows, cols = shape
        return rows * cols // 2 + 2 * rows * (cols // self.group_size) + 16  # codes, scales, the int64 shape

    @property
    def plain(self) -> Precision:
        return PLAIN

    def environment(self) -> dict[str, str]:
        return {"OPEN_TRAINING_INT4_FAKE_QAT_FLAG": "1", "OPEN_TRAINING_INT4_GROUP_SIZE": str(self.group_size)}

    def format(self) -> dict[str, Any]:
        low, high = self._range
        grid = f"g{self.group_size}:div={self.divisor:g}:range={low}..{high}"
        return {
            "identity": f"int4:{grid}:scale=bf16:floor=1e-5:rne:v1",
            "group_size": self.group_size,
            "divisor": self.divisor,
        }

    def hf(self, params: Iterable[Param], moe: bool) -> dict[str, Any]:
        weights = {
            "num_bits": 4,
            "type": "int",
            "strategy": "group",
            "group_size": self.group_size,
            "symmetric": True,
            "dynamic": False,
            "observer": "minmax",
            "actorder": None,
        }
        if self.divisor != 7:  # the config has no word for the divisor, and it cannot be told from the scales
            weights["observer_kwargs"] = {"divisor": self.divisor}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "kv_cache_scheme": None,
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "input_activations": None,
                    "output_activations": None,
                    "weights": weights,
                }
            },
            "ignore": left_out(self, params, moe),
        }

    @classmethod
    def read_hf(cls, config: dict[str, Any], params: list[Param], moe: bool) -> Precision | None:
        if config.get("quant_method") != "compressed-tensors" or config.get("format") != "pack-quantized":
            return None
        weights = config["config_groups"]["group_0"]["weights"]
        if weights["num_bits"] != 4 or weights["strategy"] != "group" or not weights["symmetric"]:
            return None
        scope = read_scope(cls, config["ignore"], params, moe)
        divisor = (weights.get("observer_kwargs") or {}).get("divisor", 7.0)
        return cls(name="int4_qat", scope=scope, group_size=weights["group_size"], divisor=divisor)
