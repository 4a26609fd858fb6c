"""w8a16: 8-bit weights in groups along the inputs, bf16 activations; serves and exports only.

The arithmetic and its layout are those of packed.py.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lpexp.data import Param
from lpexp.precision import Band, Precision
from lpexp.precision.packed import Packed


class W8A16(Packed):
    """Symmetric 8-bit weights; divisor 127 is a fixed point of quantising again, 127.5 is compressed-tensors' grid."""

    reads: ClassVar[str] = "compressed-tensors pack-quantized, 8 bits in symmetric groups"
    trains: ClassVar[bool] = False
    gap: ClassVar[Band | None] = Band((2e-4, 0.025), (1e-7, 5e-4))
    bits: ClassVar[int] = 8
    ranges: ClassVar[dict[float, tuple[int, int]]] = {127.0: (-127, 127), 127.5: (-128, 127)}
    word: ClassVar[str] = "int8"
    divisor: float = 127.0

    @classmethod
    def read_hf(cls, config: dict[str, Any], params: list[Param], moe: bool) -> Precision | None:
        return cls._read("w8a16", config, params, moe)
