"""A card quantises to the very bytes that a CPU does: weights in every precision, and activations in runs and tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lpexp import frontend

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.gpu
WORDS = [
    ("precision=fp32",),
    ("precision=bf16",),
    ("precision=fp8",),
    ("precision=fp8", "precision.scale_format=pow2"),
    *[("precision=int4_qat", f"precision.group_size={size}") for size in (32, 64, 128)],
    ("precision=int4_qat", "precision.divisor=7.5"),
]


def weights() -> dict[str, Tensor]:
    """[256, 384] each: what training meets, and what sits on an edge of a format."""
    import torch

    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(256, 384, generator=generator)
    return {
        "normal": normal * 0.02,
        "heavy tails": normal**5,
        "zero": torch.zeros(256, 384),
        "one large value a row": torch.where(torch.arange(384) == 5, 3.0e4, normal * 1e-6),
        "subnormal": normal * 1e-40,
        "ties": (torch.randint(-32, 33, (256, 384), generator=generator) / 4).float(),
        "largest": torch.full((256, 384), torch.finfo(torch.bfloat16).max),
    }


def raw(tensor: Tensor) -> bytes:
    import torch

    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
@pytest.mark.parametrize(
    "kind", ["normal", "heavy tails", "zero", "one large value a row", "subnormal", "ties", "largest"]
)
def test_a_card_makes_the_same_weight_codes_as_a_cpu(words: tuple[str, ...], kind: str) -> None:
    precision, weight = frontend.experiment(*words).precision, weights()[kind]
    on_cpu, on_card = precision.quantize(weight), precision.quantize(weight.cuda())
    assert {name: raw(part) for name, part in on_card.items()} == {name: raw(part) for name, part in on_cpu.items()}
    assert raw(precision.dequantize(on_card)) == raw(precision.dequantize(on_cpu))


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize(
    "kind", ["normal", "heavy tails", "zero", "one large value a row", "subnormal", "ties", "largest"]
)
def test_a_card_makes_the_same_activation_codes_as_a_cpu(kind: str, pow2: bool) -> None:
    from lpexp.precision import numeric

    x = numeric.bf16(weights()[kind])
    for quantize in (numeric.quantize_rows, numeric.quantize_columns):
        on_cpu, on_card = quantize(x, numeric.FLOOR, pow2), quantize(x.cuda(), numeric.FLOOR, pow2)
        assert [raw(part) for part in on_card] == [raw(part) for part in on_cpu]
