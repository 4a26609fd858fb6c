"""Every precision trains on one card, with one rank and with two, and its mismatch lies in its band.

The bands are two-sided for mixed pairs: a pair that reads 1e-8 means that a quantiser never ran. Matched pairs are
exactly 0 on a CPU; on a card the products' order of summation may differ between prefill and decoding, so their band
is that of naive batching. Two ranks share the card and meet over gloo; with two cards they would meet over NCCL.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 20

Band = Mapping[str, tuple[float, float]]
MATCHED: Band = {"logprob_abs_diff_mean": (0, 1e-4), "kl_k3": (0, 1e-6), "mult_prob_error": (1, 1.0001)}
EIGHT_BITS: Band = {"logprob_abs_diff_mean": (5e-3, 5e-2), "kl_k3": (1e-4, 5e-3), "mult_prob_error": (1.005, 1.06)}
FOUR_BITS: Band = {"logprob_abs_diff_mean": (0.02, 0.1), "kl_k3": (2e-3, 3e-2), "mult_prob_error": (1.02, 1.12)}
MIXED = {("bf16", "fp8"): EIGHT_BITS, ("bf16", "int4_qat"): FOUR_BITS, ("int4_qat", "bf16"): FOUR_BITS}


def train(folder: Path, *words: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a run on the card that must end well."""
    on_card = [
        "cluster=gpu",
        "trainer.device=cuda",
        "rollout.device=cuda",
        "wandb.mode=disabled",
        f"output_dir={folder}",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), f"steps={STEPS}", *on_card, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def outside(lines: list[dict[str, Any]], band: Band) -> dict[str, float]:
    """The mismatch metrics whose mean over the steps lies outside its band."""
    means = {key: mean(line[f"mismatch/{key}"] for line in lines if f"mismatch/{key}" in line) for key in band}
    return {key: value for key, value in means.items() if not band[key][0] <= value <= band[key][1]}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8", "int4_qat"])
def test_twenty_steps_train_on_one_card_in_the_matched_band(tmp_path: Path, precision: str, ranks: int) -> None:
    lines = train(tmp_path / "run", f"precision={precision}", f"trainer.ranks={ranks}", "trainer.micro_batches=2")
    trained = [line for line in lines if "train/loss" in line]
    assert len(trained) == STEPS
    assert [line["sync/checksum_ok"] for line in trained] == [1] * STEPS
    assert all(line["train/grad_norm"] > 0 for line in trained)
    assert outside(trained, MATCHED) == {}


@pytest.mark.parametrize(("trainer", "rollout"), MIXED)
def test_a_mixed_pair_on_one_card_lies_in_its_two_sided_band(tmp_path: Path, trainer: str, rollout: str) -> None:
    lines = train(tmp_path / "run", f"precision={trainer}", f"precision@rollout.precision={rollout}")
    assert outside([line for line in lines if "train/loss" in line], MIXED[trainer, rollout]) == {}
