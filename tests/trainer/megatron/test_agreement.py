"""The Megatron-core trainer beside the embedded one, and its layouts beside one rank: the same weights, the same batch.

Bounds. Log-probabilities before any update come from the same operations on the same values, so in one rank, and
where data, stages or experts are spread, they are equal to the last bit, in every precision. A tensor-parallel split
adds partial sums in another order: in fp32 that is 1e-5, in 16 bits each partial sum is rounded once more. Gradients
of shared prompts are summed over other rows than the embedded trainer's, which computes a prompt once: in fp32 and
bf16 that is rounding; in 8 bits the rows that share a scale are others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.trainer.megatron import cases
from tests.trainer.megatron.processes import Processes

DENSE, EXPERTS, LATENT = (), ("model=qwen3_moe_tiny",), ("model=deepseek_tiny",)
MODELS = {"dense": DENSE, "experts": EXPERTS, "latent": LATENT}
STEPS = 2
# Relative difference of the gradient norm; mean difference of a weight after one update, as a share of its change.
BOUNDS = {"fp32": (1e-6, 1e-5), "bf16": (5e-3, 1e-2), "fp8": (1e-2, 0.1), "int4_qat": (5e-3, 1e-2)}
# A split beside one rank, in fp32: on the same weights, and after one update of each.
SPLIT = (1e-5, 5e-4)
LOSS = 1e-6  # relative, in every precision


def apart(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
    """How far two trainers' findings of one step are from each other."""
    scale = max(abs(b["loss"]), 1e-2)  # advantages of both signs leave little of it
    return {
        "lp": float(np.abs(a["lp_C"] - b["lp_C"]).max()),
        "entropy": float(np.abs(a["entropy"] - b["entropy"]).max()),
        "loss": abs(a["loss"] - b["loss"]) / scale,
        "grad_norm": abs(a["grad_norm"] / b["grad_norm"] - 1),
    }


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("model", MODELS)
def test_one_rank_scores_bit_for_bit_as_the_embedded_trainer_and_learns_alike(
    pair: Processes, model: str, precision: str
) -> None:
    words = (*MODELS[model], f"precision={precision}")
    ours = pair.run(cases.learned, words, ranks=1)
    (theirs,) = pair.run(cases.learned_embedded_in, words, 1, ranks=1)
    found = apart(cases.whole(ours), cases.whole([theirs]))
    norm, weight = BOUNDS[precision]
    assert found["lp"] == found["entropy"] == 0.0
    assert found["loss"] < LOSS and found["grad_norm"] < norm, found
    exp = cases.experiment(*words)
    start = {name: exp.precision.plain.round(tensor).numpy() for name, tensor in cases.start(exp).items()}
    a, b = ours[0]["weights"], theirs["weights"]
    moved = sum(float(np.abs(b[name] - start[name]).sum()) for name in b)
    assert moved > 0 and sum(float(np.abs(a[name] - b[name]).sum()) for name in b) / moved < weight


@pytest.mark.parametrize(
    ("model", "layout", "exact"),
    [
        ("dense", "trainer.tp=2", False),
        ("dense", "trainer.pp=2", True),
        ("dense", "trainer.ranks=2", True),
        ("experts", "trainer.ep=2", True),
        ("experts", "trainer.tp=2 trainer.etp=2", False),
        ("experts", "trainer.pp=2", True),
        ("latent", "trainer.tp=2 trainer.ep=2", False),
        ("latent", "trainer.pp=2", True),
    ],
)
def test_a_layout_agrees_with_one_rank(pair: Processes, model: str, layout: str, exact: bool) -> None:
    words = (*MODELS[model], "precision=fp32")
    one = pair.run(cases.learned, words, STEPS, ranks=1)
    two = pair.run(cases.learned, (*words, *layout.split()), STEPS)
    for step in range(STEPS):
        found = apart(cases.whole(two, step), cases.whole(one, step))
        assert found["lp"] <= (0.0 if exact and step == 0 else SPLIT[step]), found
        assert found["loss"] < SPLIT[step] and found["grad_norm"] < SPLIT[step], found
    weights, others = two[0]["weights"], one[0]["weights"]
    assert weights.keys() == others.keys()
    # A gradient near 0 may have another sign, and AdamW's first steps are of size lr whatever the gradient's.
    assert max(float(np.abs(weights[name] - others[name]).max()) for name in others) <= 2.1e-3 * STEPS
    assert np.mean([float(np.abs(weights[name] - others[name]).mean()) for name in others]) < 1e-5


def test_two_ranks_of_a_tensor_split_agree_in_sixteen_bits(pair: Processes) -> None:
    words = ("precision=bf16",)
    one = pair.run(cases.learned, words, ranks=1)
    two = pair.run(cases.learned, (*words, "trainer.tp=2"))
    found = apart(cases.whole(two), cases.whole(one))
    assert 0 < found["lp"] < 0.1 and found["grad_norm"] < 2e-2, found


def test_several_updates_and_a_reference_agree_with_the_embedded_trainer(pair: Processes) -> None:
    words = ("precision=fp32", "algorithm.kl_coef=0.1", "algorithm.updates_per_batch=2")
    words += ("precision@reference.precision=fp32",)
    ours = pair.run(cases.learned, (*words, "trainer.ranks=2"), STEPS)
    (theirs,) = pair.run(cases.learned_embedded_in, words, STEPS, ranks=1)
    for step in range(STEPS):
        a, b = cases.whole(ours, step), cases.whole([theirs], step)
        assert apart(a, b)["loss"] < 1e-4 and apart(a, b)["grad_norm"] < 1e-4
        assert float(np.abs(a["lp_ref"] - b["lp_ref"]).max()) < 1e-6
        assert float(np.abs(a["lp_P"] - b["lp_P"]).max()) < 1e-4
    assert float(np.abs(a["lp_C"] - a["lp_P"]).max()) > 1e-3  # the second update saw other weights


def test_the_reference_stays_sixteen_bits_beside_a_quantised_actor(pair: Processes) -> None:
    words = ("precision=fp8", "algorithm.kl_coef=0.1")
    (found,) = pair.run(cases.learned, words, ranks=1)
    step = cases.whole([found])
    (plain,) = pair.run(cases.learned, ("precision=bf16",), ranks=1)
    assert np.array_equal(step["lp_ref"], cases.whole([plain])["lp_P"])
    assert float(np.abs(step["lp_ref"] - step["lp_P"]).max()) > 1e-3


def test_micro_batches_change_a_gradient_by_rounding_only(pair: Processes) -> None:
    whole = pair.run(cases.learned, ("precision=fp32",), ranks=1)
    cut = pair.run(cases.learned, ("precision=fp32", "trainer.max_tokens_per_gpu=40"), ranks=1)
    found = apart(cases.whole(cut), cases.whole(whole))
    assert found["lp"] == 0.0 and found["loss"] < 1e-6 and found["grad_norm"] < 1e-6, found


def test_stale_samples_are_scored_by_the_weights_that_sampled_them(pair: Processes) -> None:
    (first,) = pair.run(cases.learned, ("precision=fp32", "lag=1"), ranks=1)
    (second,) = pair.run(cases.learned_from_stale, ("precision=fp32", "lag=1"), ranks=1)
    step = cases.whole([second], 1)
    assert np.array_equal(step["lp_T"], cases.whole([first])["lp_T"])
    assert float(np.abs(step["lp_P"] - step["lp_T"]).max()) > 1e-3
