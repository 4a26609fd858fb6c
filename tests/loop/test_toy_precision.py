"""A precision that is one file and one card trains, serves and converts; nothing else in the house was touched.

Its promises (bytes, gradients, bits of the served product) are checked in tests/precision/test_contract.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.precision import toy

MAX = "mismatch/logprob_abs_diff_max"


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The search path with the toy's card; its module is found until the test ends."""
    folder = tmp_path / "conf" / "precision"
    folder.mkdir(parents=True)
    toy.install(folder, monkeypatch)
    yield f"hydra.searchpath=[file://{tmp_path / 'conf'}]"
    sys.modules.pop(f"lpexp.precision.{toy.NAME}", None)


def test_the_toy_trains_without_mismatch_and_everybody_names_it(card, inline, capsys):
    run = inline(card, f"precision={toy.NAME}", "steps=3")
    assert run.code == 0
    assert run.steps(MAX) == [0.0] * 3
    assert min(run.steps("train/grad_norm")) > 0
    lost = run.steps("quant/mlp_up/rel_error")
    assert min(lost) > 0.001 and max(lost) < 0.02  # 8 bits were kept
    said = json.loads((run.directory / "summary.json").read_text())
    for side in ("trainer", "rollout"):
        assert said[side].startswith(f"{toy.NAME}, quantises 14 of 25 tensors")
    assert f"trainer    {toy.NAME}, quantises 14 of 25 tensors" in capsys.readouterr().out


def test_the_toy_serves_a_trainer_of_another_precision_with_a_mismatch(card, inline):
    run = inline(card, "precision=bf16", f"precision@rollout.precision={toy.NAME}", "steps=2")
    assert run.code == 0
    assert min(run.steps(MAX)) > 0


@pytest.mark.parametrize("name", ["qwen3_tiny", "qwen3_moe_tiny", "deepseek_tiny"])
def test_a_model_converted_to_the_toy_reads_back_as_what_it_serves(card, tmp_path, name):
    from lpexp.convert import convert
    from lpexp.model import hf
    from lpexp.model.decoder import initial_tensors
    from lpexp.precision.bf16 import Bf16
    from lpexp.precision.wire import checksum, ship
    from tests.precision.contract import from_card, model

    small, precision = model(name), from_card(tmp_path / "conf" / "precision" / f"{toy.NAME}.yaml")
    plain = Bf16(name="bf16")
    weights = {n: plain.round(t) for n, t in initial_tensors(small, 1).items()}
    source = hf.save(tmp_path / "plain", small, weights.items(), plain)
    convert(source, made := tmp_path / "converted", precision)
    saved = hf.save(tmp_path / "saved", small, weights.items(), precision)

    read, found, parts = hf.load(made)
    assert found == precision and read.architecture == small.architecture
    params, moe = list(small.params()), small.moe is not None
    wire = {param.name: made for param, made in ship(weights, params, precision, moe)}
    assert checksum(parts) == checksum(wire) == checksum(hf.load(saved)[2])
    covered = [param.name for param in params if precision.covers(param, moe)]
    assert {parts[n]["weight"].dtype for n in covered} == {torch.int8} and covered
