"""int4: 4-bit weights in groups along the inputs, bf16 activations (W4A16), trained through the rounding.

Forward products read RN16b(q * s): the trained weight is the served weight, bit for bit. The gradient passes the
rounding unchanged, for every element. The arithmetic and its layout are those of packed.py.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lpexp.data import Param
from lpexp.precision import Band, Precision
from lpexp.precision.packed import Packed


class Int4Qat(Packed):
    """Symmetric 4-bit weights; divisor 7 is the grid of slime, miles and Kimi, 7.5 that of compressed-tensors."""

    reads: ClassVar[str] = "compressed-tensors pack-quantized, 4 bits in symmetric groups"
    gap: ClassVar[Band | None] = Band((0.003, 0.35), (2e-5, 0.1))
    bits: ClassVar[int] = 4
    ranges: ClassVar[dict[float, tuple[int, int]]] = {7.0: (-7, 7), 7.5: (-8, 7)}
    word: ClassVar[str] = "int4"
    divisor: float = 7.0

    def environment(self) -> dict[str, str]:
        return {"OPEN_TRAINING_INT4_FAKE_QAT_FLAG": "1", "OPEN_TRAINING_INT4_GROUP_SIZE": str(self.group_size)}

    @classmethod
    def read_hf(cls, config: dict[str, Any], params: list[Param], moe: bool) -> Precision | None:
        return cls._read("int4_qat", config, params, moe)
