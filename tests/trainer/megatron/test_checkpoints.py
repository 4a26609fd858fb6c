"""Checkpoints in megatron-core's torch_dist: the same layout goes on bitwise, another one on the same curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpexp.trainer.megatron.stored import FOLDER, Masters
from tests.trainer.megatron import cases
from tests.trainer.megatron.processes import Processes

STEPS, BEFORE = 4, 2
# Steps taken after the layout changed: gradients are summed in another order, and AdamW amplifies what is near 0.
CURVE = {"loss": 1e-4, "grad_norm": 1e-3, "lp": 2e-3}


def findings(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [cases.whole(answers, step) for step in range(STEPS - BEFORE)]


@pytest.mark.parametrize(
    ("words", "layout", "fresh"),
    [
        (("precision=bf16",), "", False),
        (("precision=fp8", "lag=1"), "trainer.pp=2", True),
        (("precision=bf16", "algorithm.kl_coef=0.1"), "trainer.tp=2", True),
        (("precision=int4_qat", "model=qwen3_moe_tiny"), "trainer.ep=2", True),
        (("precision=bf16", "model=deepseek_tiny"), "trainer.ranks=2", False),
    ],
)
def test_the_same_layout_goes_on_to_the_same_bits(
    pair: Processes, tmp_path: Path, words: tuple[str, ...], layout: str, fresh: bool
) -> None:
    typed = (*words, *layout.split())
    ranks = cases.experiment(*typed).trainer.world(cases.experiment(*typed))  # type: ignore[attr-defined]
    whole = pair.run(cases.saved, typed, str(tmp_path), STEPS, BEFORE, ranks=ranks)
    resumed = pair.run(cases.resumed, typed, str(tmp_path), STEPS, BEFORE, fresh, ranks=ranks)
    for one, other in zip(findings(whole), findings(resumed), strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)
    for one, other in zip(whole, resumed, strict=True):
        assert one["masters"].keys() == other["masters"].keys()
        assert all(np.array_equal(one["masters"][name], other["masters"][name]) for name in one["masters"])


@pytest.mark.parametrize(
    ("model", "layout", "others"),
    [
        ("model=qwen3_tiny", "trainer.tp=2", ("", "trainer.ranks=2", "trainer.pp=2")),
        ("model=qwen3_moe_tiny", "trainer.ep=2", ("", "trainer.tp=2 trainer.etp=2")),
        ("model=deepseek_tiny", "trainer.pp=2", ("trainer.tp=2 trainer.ep=2",)),
    ],
)
def test_another_layout_goes_on_with_the_same_curve(
    pair: Processes, tmp_path: Path, model: str, layout: str, others: tuple[str, ...]
) -> None:
    words = ("precision=fp32", model, "algorithm.kl_coef=0.1", "precision@reference.precision=fp32")
    answers = pair.run(cases.saved, (*words, *layout.split()), str(tmp_path), STEPS, BEFORE)
    whole, stored = findings(answers), Masters(tmp_path / FOLDER, cases.experiment(*words).model.sized())
    assert all(np.array_equal(stored.tensor(name), held) for name, held in answers[0]["saved"].items())
    for other in others:
        typed = (*words, *other.split())
        ranks = cases.experiment(*typed).trainer.world(cases.experiment(*typed))  # type: ignore[attr-defined]
        resumed = findings(pair.run(cases.resumed, typed, str(tmp_path), STEPS, BEFORE, True, ranks=ranks))
        for one, two in zip(whole, resumed, strict=True):
            found = {
                "loss": abs(one["loss"] - two["loss"]),
                "grad_norm": abs(one["grad_norm"] / two["grad_norm"] - 1),
                "lp": float(np.abs(one["lp_C"] - two["lp_C"]).max()),
            }
            assert all(found[key] < CURVE[key] for key in CURVE), (other, found)
            assert float(np.abs(one["lp_ref"] - two["lp_ref"]).max()) < 1e-4  # the reference came along
