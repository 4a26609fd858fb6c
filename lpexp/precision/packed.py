"""Integers in symmetric groups along the inputs, weight-only: what int4.py and int8.py have in common.

The scale is rounded to its stored bf16 before the codes are computed; products read RN16b(q * s) in bf16 arithmetic.
Left out: asymmetric grids, activation quantisation. Layout: compressed-tensors pack-quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lpexp.config import rule
from lpexp.data import Param
from lpexp.errors import Mistake, RunError
from lpexp.precision import Layout, Parts, Precision, Scoped, Tally, left_out, patterns, read_scope
from lpexp.precision.bf16 import PLAIN

if TYPE_CHECKING:
    from torch import Tensor

GROUPS = (32, 64, 128)


class Packed(Scoped):
    """`divisor` is the code on which a group's maximum lands."""

    ABSTRACT: ClassVar[bool] = True
    auto: ClassVar[str] = "auto"
    rows: ClassVar[int | None] = 1
    noise: ClassVar[float] = 0.01
    shift: ClassVar[float] = 0.1
    bits: ClassVar[int]
    ranges: ClassVar[dict[float, tuple[int, int]]]  # divisor -> least and largest code
    word: ClassVar[str]  # the format's, in its identity string
    group_size: int = 128
    divisor: float

    @rule
    def _grid_rules(self) -> Iterator[Mistake]:
        if self.divisor not in self.ranges:
            known = " or ".join(f"{d:g} (codes {low}..{high})" for d, (low, high) in self.ranges.items())
            yield Mistake("divisor", f"{self.divisor:g} is no grid; use {known}")
        if self.group_size < 8 or self.group_size % 8:
            yield Mistake("group_size", f"{self.group_size} is not a multiple of 8; use 32, 64 or 128")

    def covers(self, param: Param, moe: bool) -> bool:
        # Latent attention absorbs kv_b into other products, which no scale along its inputs survives.
        return super().covers(param, moe) and not param.name.endswith(".kv_b_proj.weight")

    def judge(self, params: Iterable[Param], moe: bool) -> Iterable[Mistake]:
        params = list(params)
        yield from super().judge(params, moe)
        covered = [p for p in params if self.covers(p, moe)]
        fitting = [str(g) for g in GROUPS if all(p.shape[1] % g == 0 for p in covered)]
        use = "use " + " or ".join(", ".join(fitting).rsplit(", ", 1)) if fitting else "no group fits; narrow the scope"
        misfits = {p.shape[1]: p.name for p in reversed(covered) if p.shape[1] % self.group_size}
        for inputs, name in sorted(misfits.items()):
            message = f"{self.group_size} does not divide {inputs}, the inputs of {patterns([name])}; {use}"
            yield Mistake("group_size", message)
        if not misfits and covered and self.group_size not in GROUPS:
            yield Mistake("group_size", f"{self.group_size} is no group that engines serve; {use}")

    @property
    def _range(self) -> tuple[int, int]:
        return self.ranges[self.divisor]

    @property
    def closed(self) -> bool:
        return self.divisor == self._range[1]

    def quantize(self, weight: Tensor, name: str = "weight") -> Parts:
        from lpexp.precision import numeric

        w = numeric.bf16(weight.detach()).contiguous()
        numeric.check_finite(w, name)
        if weight.shape[1] % self.group_size:
            raise RunError(f"{name}: group_size {self.group_size} does not divide its {weight.shape[1]} inputs")
        codes, scale = numeric.quantize_groups(w, self.group_size, self.divisor, *self._range)
        return {"weight_packed": numeric.pack(codes, self.bits), "weight_scale": scale} | self.fixed(tuple(w.shape))

    def adopt(self, weight: Tensor, scale: Tensor, name: str = "weight") -> Parts:
        """The parts of a weight that lies on this grid already, with the scales [N, K / g] that somebody chose."""
        import torch

        from lpexp.precision import numeric

        numeric.check_finite(weight, name)
        groups = weight.float().contiguous().view(*scale.shape, self.group_size)
        codes = torch.round(groups / scale.float()[:, :, None]).clamp(*self._range).to(torch.int8).view(weight.shape)
        packed = {"weight_packed": numeric.pack(codes, self.bits), "weight_scale": scale.to(torch.bfloat16)}
        parts = packed | self.fixed(tuple(weight.shape))
        if not torch.equal(self.dequantize(parts), weight.float()):
            raise RunError(f"{name}: its values are not codes times the scales given for it")
        return parts

    def fixed(self, shape: tuple[int, ...]) -> Parts:
        import torch

        return {"weight_shape": torch.tensor(shape, dtype=torch.int64)}

    def layout(self, shape: tuple[int, ...]) -> Layout:
        rows, cols = shape
        return {
            "weight_packed": ((rows, cols * self.bits // 32), "int32"),
            "weight_scale": ((rows, cols // self.group_size), "bfloat16"),
            "weight_shape": ((2,), "int64"),
        }

    def dequantize(self, parts: Parts) -> Tensor:
        from lpexp.precision import numeric

        return numeric.dequantize_groups(*self._unpack(parts))

    def _unpack(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """int8 codes [N, K] and bf16 scales [N, K / g]; RunError where the parts cannot be this precision's."""
        import torch

        from lpexp.precision import numeric

        packed, scale, shape = parts["weight_packed"], parts["weight_scale"], [int(n) for n in parts["weight_shape"]]
        low, high = self._range
        if packed.dtype != torch.int32 or list(packed.shape) != [shape[0], shape[1] * self.bits // 32]:
            raise RunError(f"weight_packed is {packed.dtype} {list(packed.shape)}, not int32 of a weight {shape}")
        if scale.dtype != torch.bfloat16 or list(scale.shape) != [shape[0], shape[1] // self.group_size]:
            groups = f"bf16 in groups of {self.group_size}"
            raise RunError(f"weight_scale is {scale.dtype} {list(scale.shape)}, not {groups}")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise RunError("weight_scale holds a value that is not finite and positive")
        codes = numeric.unpack(packed, self.bits)
        least = int(codes.min())
        if least < low:
            raise RunError(f"weight_packed holds code {least}, outside {low}..{high} of divisor {self.divisor:g}")
        return codes, scale

    def tally(self, weight: Tensor, parts: Parts) -> Tally:
        from lpexp.precision import numeric

        codes, scale = self._unpack(parts)
        low, high = self._range
        served, ends = numeric.dequantize_groups(codes, scale), (codes <= low) | (codes >= high)
        return numeric.tally(weight, served, ends, scale, (1, self.group_size), numeric.LEAST_GROUP)

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

    @property
    def plain(self) -> Precision:
        return PLAIN

    def format(self) -> dict[str, Any]:
        low, high = self._range
        grid = f"g{self.group_size}:div={self.divisor:g}:range={low}..{high}"
        return {
            "identity": f"{self.word}:{grid}:scale=bf16:floor=1e-5:rne:v1",
            "group_size": self.group_size,
            "divisor": self.divisor,
        }

    def hf(self, params: Iterable[Param], moe: bool) -> dict[str, Any]:
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "strategy": "group",
            "group_size": self.group_size,
            "symmetric": True,
            "dynamic": False,
            "observer": "minmax",
            "actorder": None,
        }
        if not self.closed:  # the config has no word for the divisor, and it cannot be told from the scales
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
    def _read(cls, name: str, config: dict[str, Any], params: list[Param], moe: bool) -> Self | None:
        """`read_hf` under the name of the card."""
        if config.get("quant_method") != "compressed-tensors" or config.get("format") != "pack-quantized":
            return None
        groups = list((config.get("config_groups") or {}).values())
        weights = groups[0].get("weights") or {} if len(groups) == 1 else {}
        given = [weights.get(key) for key in ("num_bits", "strategy", "symmetric")]
        if given != [cls.bits, "group", True] or weights.get("actorder") is not None:
            return None
        scope = read_scope(cls, config.get("ignore") or [], params, moe)
        divisor = (weights.get("observer_kwargs") or {}).get("divisor", min(cls.ranges))
        return cls(name=name, scope=scope, group_size=weights["group_size"], divisor=divisor)
