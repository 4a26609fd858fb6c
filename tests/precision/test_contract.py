"""Every precision keeps every promise; a precision that breaks one is found out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lpexp.precision import Precision, numeric
from lpexp.precision.fp32 import Fp32
from lpexp.precision.int4 import Int4Qat
from tests.precision import contract, toy

VARIANTS: dict[str, list[dict[str, object]]] = {
    "fp8": [{"scale_format": "pow2"}, {"backward": "high_precision"}, {"backward": "dequantised"}],
    "fp8_qdq": [{"scale_format": "pow2", "backward": "high_precision"}],
    "int4_qat": [{"group_size": 32}, {"group_size": 64, "divisor": 7.5}, {"scope": "linears", "group_size": 32}],
    "w8a16": [{"group_size": 32}, {"group_size": 64, "divisor": 127.5}],
}
ALL = [(card, changes) for card in contract.CARDS for changes in ({}, *VARIANTS.get(card.stem, []))]


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    ("card", "changes"), ALL, ids=[f"{c.stem}{'-' if v else ''}{'-'.join(map(str, v.values()))}" for c, v in ALL]
)
def test_precision_keeps_its_promise(card: Path, changes: dict[str, object], check):
    check(contract.from_card(card, **changes))


def test_every_precision_has_a_card_and_three_only_serve():
    assert {card.stem for card in contract.CARDS} >= {"fp32", "bf16", "fp8", "int4_qat"}
    serving = {card.stem for card in contract.CARDS if not contract.from_card(card).trains}
    assert serving == {"fp8_channel", "fp8_tensor", "w8a16"}


def test_a_precision_of_one_file_and_one_card_is_tested_by_existing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    card = toy.install(tmp_path, monkeypatch)
    precision = contract.from_card(card)
    for check in contract.CHECKS:
        check(precision)
    monkeypatch.delitem(sys.modules, f"lpexp.precision.{toy.NAME}")


@pytest.mark.parametrize("card", contract.CARDS, ids=lambda card: card.stem)
def test_without_row_padding_the_sums_of_few_rows_would_have_other_bits(card: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(numeric, "PAD_ROWS", 1)
    with pytest.raises(AssertionError):
        contract.head_and_router_sums_agree_bitwise_for_any_number_of_rows(contract.from_card(card))


def test_without_row_padding_the_promise_about_rows_is_broken(monkeypatch: pytest.MonkeyPatch):
    # In fp32, where no rounding hides the last bit; rounded outputs differ too, but only here and there.
    monkeypatch.setattr(numeric, "PAD_ROWS", 1)
    with pytest.raises(AssertionError):
        contract.linear_and_serve_agree_bitwise_for_any_number_of_rows(Fp32(name="fp32"))


class Unfaithful(Int4Qat):
    """Trains on the 16-bit weight and serves the 4-bit one: post-training quantisation that calls itself QAT."""

    def linear(self, x, weight, operand=None):
        return self.plain.linear(x, weight)


class Masking(Int4Qat):
    """Gives no gradient to weights that round to zero."""

    def linear(self, x, weight, operand=None):
        return super().linear(x, weight * (self.dequantize(self.quantize(weight)) != 0), operand)


class Silent(Int4Qat):
    """Quantises what it is given, finite or not."""

    def quantize(self, weight, name="weight"):
        return super().quantize(torch.nan_to_num(weight), name)


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (Unfaithful, contract.trainer_exporter_engine_and_reload_hold_the_same_bytes),
        (Masking, contract.gradients_reach_every_input_and_every_weight),
        (Silent, contract.a_weight_that_is_not_finite_is_named),
    ],
    ids=lambda v: v.__name__,
)
def test_a_precision_that_breaks_a_promise_is_found_out(kind: type[Precision], check):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(kind.model_validate({"name": "broken"}))
    check(Int4Qat(name="int4_qat"))
