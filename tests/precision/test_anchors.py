"""Worked examples, bit by bit, as numerics.md prints them, and the facts about torch that the arithmetic leans on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lpexp.precision import numeric
from lpexp.precision.bf16 import Bf16
from lpexp.precision.fp8 import Fp8
from lpexp.precision.int4 import Int4Qat

E4M3 = torch.float8_e4m3fn


def weight(patterns: str, width: int) -> Tensor:
    """One row: the given bf16 patterns, then zeros."""
    row = torch.zeros(1, width, dtype=torch.bfloat16)
    values = torch.tensor([int(p, 16) for p in patterns.split()], dtype=torch.int32).to(torch.int16)
    row[0, : len(values)] = values.view(torch.bfloat16)
    return row


def patterns(x: Tensor) -> str:
    """The bf16 patterns of float32 carriers."""
    return " ".join(f"{v & 0xFFFF:04x}" for v in x.to(torch.bfloat16).view(torch.int16).flatten().tolist())


@pytest.mark.parametrize(
    ("scale_format", "scale", "codes"),
    [("fp32", 0x3BDB6DB7, "7e f1 71 69 3c 9d 79 01"), ("pow2", 0x3C000000, "7c f0 70 68 3a 9c 78 01")],
)
def test_eight_bit_anchor_has_the_printed_scale_and_codes(scale_format: str, scale: int, codes: str):
    w = weight("4040 bf80 3f80 3f00 3c24 ba38 4000 3728", 128)
    parts = Fp8.model_validate({"name": "fp8", "scale_format": scale_format}).quantize(w)
    assert parts["weight_scale_inv"].view(torch.int32).tolist() == [[scale]]
    assert bytes(parts["weight"].view(torch.uint8)[0, :8].tolist()).hex(" ") == codes
    assert not parts["weight"].view(torch.uint8)[0, 8:].any()


@pytest.mark.parametrize(("scale_format", "scale"), [("fp32", 0x2A7B5123), ("pow2", 0x2A800000)])
def test_a_block_of_zeros_has_the_floor_scale_and_zero_codes(scale_format: str, scale: int):
    parts = Fp8.model_validate({"name": "fp8", "scale_format": scale_format}).quantize(torch.zeros(3, 5))
    assert parts["weight_scale_inv"].view(torch.int32).tolist() == [[scale]]
    assert not parts["weight"].view(torch.uint8).any()


@pytest.mark.parametrize(
    ("divisor", "scale", "values", "word"),
    [
        (7.0, "3b45", "3cac bc14 3b45 0000 0000 3cac bcac 3bc5", -1577547425),
        (7.5, "3b37", None, -1325893297),
    ],
)
def test_four_bit_anchor_has_the_printed_scale_values_and_word(divisor, scale, values, word):
    precision = Int4Qat(name="int4_qat", group_size=32, divisor=divisor)
    parts = precision.quantize(weight("3cac bc2c 3b45 bac5 0000 3ca1 bcac 3bf2", 32))
    assert patterns(parts["weight_scale"]) == scale
    assert parts["weight_packed"][0, 0].item() == word
    assert parts["weight_shape"].tolist() == [1, 32] and parts["weight_shape"].dtype == torch.int64
    if values:
        assert patterns(precision.dequantize(parts)[:, :8]) == values


def test_a_group_of_zeros_has_the_floor_scale_and_decodes_to_positive_zero():
    precision = Int4Qat(name="int4_qat", group_size=32)
    parts = precision.quantize(torch.full((1, 32), -0.0))
    assert patterns(parts["weight_scale"]) == "3728"
    assert parts["weight_packed"].tolist() == [[-2004318072] * 4]  # 0x88888888
    assert not torch.signbit(precision.dequantize(parts)).any()


def test_nibbles_are_packed_lowest_first_as_in_the_printed_example():
    codes = torch.tensor([[-7, -3, 0, 7, 1, -1, 4, 6]], dtype=torch.int8)
    assert numeric.pack(codes, 4).tolist() == [[-327550895]]
    assert torch.equal(numeric.unpack(numeric.pack(codes, 4), 4), codes)


# -- torch ------------------------------------------------------------------------------------------------------------


def test_torch_casts_to_e4m3_saturating_with_ties_to_even_and_nan_kept():
    x = torch.tensor([465.0, 1e9, float("inf"), -float("inf"), float("nan")])
    assert x.to(E4M3).float()[:4].tolist() == [448.0, 448.0, 448.0, -448.0]
    assert x.to(E4M3).float()[4].isnan()
    codes = torch.arange(127, dtype=torch.uint8)
    values = codes.view(E4M3).float()
    midpoints = (values[1:] + values[:-1]) / 2
    even = torch.where(codes[1:] % 2 == 0, codes[1:], codes[:-1])
    assert torch.equal(midpoints.to(E4M3).view(torch.uint8), even)
    assert torch.equal((-midpoints).to(E4M3).view(torch.uint8), even + 128)


def test_torch_cast_to_e5m2_does_not_saturate():
    assert torch.tensor([61440.0]).to(torch.float8_e5m2).float().isinf().item()


def test_torch_rounds_halves_to_even_and_keeps_denormals():
    assert torch.round(torch.tensor([0.5, 1.5, 2.5, -0.5])).tolist() == [0.0, 2.0, 2.0, -0.0]
    assert (torch.tensor([2.0**-133]).to(torch.bfloat16).float() * 0.5).item() == 2.0**-134


def test_torch_casts_to_e8m0_by_nearest_so_it_must_not_make_scales():
    x = torch.tensor([1.4, 1.5, 3.0]).to(torch.float8_e8m0fnu).float()
    assert x.tolist() == [1.0, 2.0, 4.0]


def test_torch_has_no_equality_of_eight_bit_tensors_but_of_their_bytes():
    x = torch.ones(2).to(E4M3)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.equal(x, x)
    assert torch.equal(x.view(torch.uint8), x.view(torch.uint8))


def test_in_place_rounding_equals_the_cast_of_torch_on_every_kind_of_value():
    patterns = torch.cat([torch.arange(start, 0x43E00001, 9973) for start in (0, 1, 2)])
    midpoints = (numeric.from_e4m3(torch.arange(126, dtype=torch.uint8).view(E4M3)) + 0.0).view(torch.int32)
    near = (midpoints[:, None] + torch.arange(-2, 3)).flatten().clamp(min=0)
    x = torch.cat([patterns.to(torch.int32), near]).view(torch.float32)
    x = torch.cat([x, -x])
    assert len(x) > 600_000
    assert torch.equal(numeric.round_e4m3(x), x.to(E4M3).float())


def test_decoding_by_table_equals_the_cast_of_torch():
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3)
    mine, torchs = numeric.from_e4m3(codes), codes.float()
    assert torch.equal(mine.nan_to_num(1e3), torchs.nan_to_num(1e3))
    assert torch.equal(torch.signbit(mine), torch.signbit(torchs))


def test_a_seventh_by_product_gives_the_same_bf16_scale_for_every_maximum():
    # So a golden vector cannot tell these two; what differs elsewhere is the scale that codes are computed from.
    amax = torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    divided, multiplied = amax / torch.full_like(amax, 7.0), amax * torch.tensor(1 / 7)
    assert torch.equal(divided.to(torch.bfloat16), multiplied.to(torch.bfloat16))
    assert not torch.equal(divided, multiplied)


def test_bf16_rounding_acts_on_values_and_on_gradients():
    x = torch.tensor([1.0 + 2.0**-9, 3.0], requires_grad=True)
    y = Bf16(name="bf16").round(x)
    assert y.tolist() == [1.0, 3.0]
    y.backward(torch.tensor([1.0 + 2.0**-8 + 2.0**-12, 1.0]))
    assert x.grad is not None and x.grad.tolist() == [1.0 + 2.0**-7, 1.0]
