"""What the GPUs of a production backend must be able to do for a format.

The embedded backends emulate every format on any device; these rules are for Megatron-core and SGLang.
Sources: Transformer Engine `Float8BlockScaling`, SGLang's block and channel kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from lpexp.errors import Mistake
from lpexp.precision import Scoped

ADA, HOPPER, BLACKWELL = 89, 90, 100  # CUDA compute capability times ten


class EightBitProducts(Scoped):
    """Products of 8-bit floating-point operands: Ada and later serve them, Hopper and later train with them."""

    ABSTRACT: ClassVar[bool] = True

    def needs(self, capability: int, trains: bool) -> Iterable[Mistake]:
        least, does = (HOPPER, "train on GPUs older than Hopper") if trains else (ADA, "serve on GPUs older than Ada")
        if capability < least:
            way = "choose another cluster or precision, or trainer=embedded rollout=embedded, which emulate it"
            yield Mistake("", f"{self.name} has no kernels to {does}; {way}")
        scale = self.format().get("scale_format", "pow2")
        if capability >= BLACKWELL and scale != "pow2":
            yield Mistake("scale_format", f"{scale}, but Blackwell's products take powers of two only; use pow2")
