"""`lpexp attribute` on small runs: planted causes are named first, parts add up, nothing is left unexplained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpexp import cli, record
from tests.loop.conftest import Ran, inline

__all__ = ["inline"]  # the fixture

DENSE = ("task.warmup=null", "eval.every=9", "steps=2", "trainer.lr=1e-3")
MOE = ("model=qwen3_moe_tiny", *DENSE)
FP8_ROLLOUT = ("precision=bf16", "precision@rollout.precision=fp8")


def attributed(run: Ran, step: int, *words: str) -> dict[str, Any]:
    """What the command wrote."""
    assert cli.main(["attribute", str(run.directory), "--step", str(step), *words]) == 0
    return json.loads((run.directory / "attribute" / f"{step:06d}.json").read_text())


def adds_up(found: dict[str, Any]) -> None:
    whole, unexplained = found["gap"]["kl_k3"], found["gap"]["unexplained"]
    parts = sum(factor["kl_k3"] for factor in found["factors"])
    assert parts + unexplained == pytest.approx(whole, rel=1e-9)
    assert abs(unexplained) <= 0.05 * whole


@pytest.mark.parametrize(
    ("words", "fault", "cause", "step"),
    [
        (("precision=int4_qat", *DENSE), "group_size", "group size", 0),
        (("precision=fp8", *DENSE), "scale_rule", "scale rule", 0),
        (("precision=fp8", *MOE), "excluded_module", "excluded module", 0),
        (("precision=fp8", *DENSE), "missing_scale", "missing scale", 0),
        (("precision=int4_qat", *MOE), "missing_scale", "missing scale", 0),
        (("precision=fp8", *DENSE), "stale_weights", "stale weights", 1),
        (("precision=bf16", *MOE), "stale_weights", "stale weights", 1),
        (("precision=bf16", *DENSE), "temperature", "sampling convention", 0),
    ],
    ids=str,
)
def test_a_planted_cause_is_named_first_with_at_least_ninety_percent(inline, words, fault, cause, step, capsys):
    run = inline(*words, f"fault={fault}", "fault.hidden=true")
    found = attributed(run, step, "--no-modules")
    adds_up(found)
    first = found["causes"][0]
    named = first["share"] + (routing(found) if cause != "sampling convention" else 0.0)
    assert first["cause"] == cause and named >= 0.9, found["causes"]
    assert found["gap"]["kl_k3"] == pytest.approx(run.rows[step]["mismatch/kl_k3"])
    assert cause in capsys.readouterr().out


def routing(found: dict[str, Any]) -> float:
    """Experts that flip because of the planted cause are a share of their own."""
    return sum(factor["share"] for factor in found["factors"] if factor["factor"] == "routing")


def test_weights_and_activations_are_told_apart_and_a_single_one_gets_everything(inline):
    found = attributed(inline(*FP8_ROLLOUT, *DENSE), 1)
    adds_up(found)
    names = {factor["factor"]: factor["share"] for factor in found["factors"]}
    assert set(names) == {"weight_quant", "activation_quant"} and min(names.values()) > 0.1
    only = attributed(inline("precision=bf16", "precision@rollout.precision=int4_qat", *DENSE, name="int4"), 1)
    assert [factor["factor"] for factor in only["factors"]] == ["weight_quant"]
    assert only["factors"][0]["share"] == pytest.approx(1)
    assert only["mismatch/attribution/weight_quant"] == pytest.approx(only["gap"]["kl_k3"])


def test_a_mixture_of_experts_has_a_share_for_its_routing_and_none_with_replay(inline):
    free = attributed(inline(*FP8_ROLLOUT, *MOE), 1, "--no-modules")
    bound = attributed(inline(*FP8_ROLLOUT, *MOE, "trainer.routing_replay=true", name="replay"), 1, "--no-modules")
    for found in (free, bound):
        adds_up(found)
    assert "routing" in [factor["factor"] for factor in free["factors"]]
    assert "routing" not in [factor["factor"] for factor in bound["factors"]]
    assert "replays" in bound["inactive"]["routing"]


def test_with_lag_the_staleness_is_a_share_of_the_whole_gap(inline):
    run = inline(*FP8_ROLLOUT, *DENSE, "lag=1")
    found = attributed(run, 1, "--no-modules")
    adds_up(found)
    assert {factor["factor"] for factor in found["factors"]} == {"weight_quant", "activation_quant", "staleness"}
    batch, arrays = record.load(run.directory / "record" / "000001.safetensors")
    d = (arrays["lp_P"].astype(np.float64) - batch.logprobs_rollout_NT)[batch.mask_NT]
    assert found["gap"]["kl_k3"] == pytest.approx(float(np.mean(np.expm1(d) - d)))


def test_single_precision_against_half_has_head_and_cache_among_its_factors(inline):
    run = inline("precision=fp32", "precision@rollout.precision=bf16", *DENSE)
    found = attributed(run, 1, "--no-modules")
    adds_up(found)
    names = {factor["factor"] for factor in found["factors"]}
    assert names == {"weight_quant", "activation_quant", "kv_quant", "head"}


def test_more_than_six_factors_are_averaged_over_orders_and_still_add_up(inline):
    words = ("precision=fp32", "precision@rollout.precision=fp8", *MOE, "lag=1")
    found = attributed(inline(*words, "fault=temperature", "fault.hidden=true"), 1, "--no-modules", "--rows", "8")
    adds_up(found)
    assert len(found["factors"]) > 6
    assert all(factor["standard_error"] is not None for factor in found["factors"])


def test_sums_that_depend_on_their_neighbours_are_named(inline, monkeypatch):
    from lpexp.precision import numeric

    monkeypatch.setattr(numeric, "PAD_ROWS", 1)
    run = inline("precision=fp32", *DENSE, "rollout.slots=3")
    found = attributed(run, 0)
    adds_up(found)
    assert found["gap"]["kl_k3"] > 0 and [factor["factor"] for factor in found["factors"]] == ["batching"]
    assert found["factors"][0]["share"] >= 0.9


def test_other_weights_that_no_version_has_are_told_as_such(inline, monkeypatch):
    from lpexp.fault import NoFault

    def scaled(self, exp, given, before, version):
        name = "model.embed_tokens.weight"
        return {**given, name: {"weight": given[name]["weight"] * 1.25}}

    monkeypatch.setattr(NoFault, "held", scaled)
    monkeypatch.setattr(NoFault, "hidden", True, raising=False)
    run = inline("precision=fp8", *DENSE, "fault.hidden=true")
    found = attributed(run, 0, "--no-modules")
    adds_up(found)
    assert found["causes"][0]["cause"] == "stale weights" and found["causes"][0]["share"] >= 0.9
    assert "other weights (of no version that is stored)" in found["causes"][0]["told"]


def test_calibrated_codes_are_told_from_rounded_ones(inline, monkeypatch):
    from lpexp.fault import NoFault

    def nudged(self, exp, given, before, version):
        name = "model.layers.1.mlp.up_proj.weight"
        packed = given[name]["weight_packed"].clone()
        packed[packed & 15 == 8] += 1
        return {**given, name: given[name] | {"weight_packed": packed}}

    monkeypatch.setattr(NoFault, "held", nudged)
    run = inline("precision=int4_qat", *DENSE, "fault.hidden=true")
    found = attributed(run, 0, "--no-modules")
    adds_up(found)
    assert found["causes"][0]["cause"] == "other codes" and found["causes"][0]["share"] == pytest.approx(1)


# -- modules and tokens ------------------------------------------------------------------------------------------------


def test_a_module_that_is_alone_in_being_rounded_gets_all_of_it_and_what_to_keep_is_measured(inline, capsys):
    scope = "rollout.precision.scope=[model.layers.1.mlp.down_proj.weight,attn_out]"
    run = inline("precision=bf16", "precision@rollout.precision=int4_qat", scope, *DENSE)
    found = attributed(run, 1)
    modules = {(one["layer"], one["kind"]): one for one in found["modules"]}
    assert set(modules) == {(1, "mlp_down"), (0, "attn_out"), (1, "attn_out")}
    for one in modules.values():
        assert one["contribution"] == pytest.approx((one["alone"] + one["missed"]) / 2)
    proposal = found["proposal"]
    assert 0 < proposal["share"] < 1 and proposal["predicted"] >= 0.5 and 0 < proposal["measured"] <= 1
    assert f"measured on this batch {proposal['measured']:.0%} less" in capsys.readouterr().out
    # What was measured on the batch is what a run with this scope shows on the same tokens.
    kept = {tuple(module) for module in proposal["modules"]}
    left = [tensor for key, one in modules.items() if key not in kept for tensor in one["tensors"]]
    assert proposal["override"].startswith("'rollout.precision.scope=[")
    words = proposal["override"].strip("'").partition("[")[2].rstrip("]").split(",")
    assert {word for word in words if "." in word} <= set(left) and words != [""]


def test_the_proposal_measures_what_a_run_with_that_scope_shows(inline):
    """The first batch is drawn by the same weights in both runs; its tokens are scored by either engine."""
    from lpexp.attribute import experiment
    from lpexp.attribute.modules import quantised, rank
    from lpexp.attribute.rescore import Rescorer, load

    base = ("precision=bf16", "precision@rollout.precision=int4_qat", *DENSE)
    run = inline(*base)
    scorer = Rescorer(load(run.directory, experiment(run.directory), 0))
    found = rank(scorer)
    assert found.gap == pytest.approx(run.rows[0]["mismatch/kl_k3"])
    assert len(found.modules) == len(quantised(scorer)) == 8 and found.proposal is not None
    narrow = inline(*base, found.proposal.override.strip("'"), name="narrow")
    again = Rescorer(load(narrow.directory, experiment(narrow.directory), 0))
    plain = {name for module in found.proposal.modules for name in module.tensors}
    served = {name for name in again.names if again.quantised(again.side(name, "rollout"))}
    assert served == {name for name in scorer.names if scorer.quantised(scorer.side(name, "rollout"))} - plain
    assert narrow.rows[0]["mismatch/kl_k3"] < run.rows[0]["mismatch/kl_k3"]


def test_worst_tokens_are_in_words_and_bins_hold_all_of_the_gap(inline, capsys):
    run = inline(*FP8_ROLLOUT, *DENSE)
    found = attributed(run, 1, "--no-modules")
    worst = found["worst_tokens"]
    assert worst[0]["abs_diff"] == pytest.approx(run.rows[1]["mismatch/logprob_abs_diff_max"], rel=1e-6)
    assert [one["abs_diff"] for one in worst] == sorted((one["abs_diff"] for one in worst), reverse=True)
    assert all(len(one["text"]) == 1 or one["text"] == "<stop>" for one in worst)
    bins = found["by_probability"].values()
    assert sum(one["kl_share"] for one in bins) == pytest.approx(1)
    assert sum(one["token_frac"] for one in bins) == pytest.approx(1)
    out = capsys.readouterr().out
    assert repr(worst[0]["text"]) in out and "gap by probability in the rollout" in out


# -- which steps, and what is refused ----------------------------------------------------------------------------------


def test_sides_that_agree_are_told_so(inline, capsys):
    run = inline("precision=fp8", *DENSE)
    found = attributed(run, 1)
    assert found["gap"]["kl_k3"] == 0 and found["factors"] == [] and found["gap"]["unexplained"] == 0
    assert "the sides agree exactly" in capsys.readouterr().out


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    def refused(*words: str) -> str:
        capsys.readouterr()
        assert cli.main(["attribute", *words]) == 2
        return capsys.readouterr().err

    return refused


def test_it_says_which_steps_it_can_serve(inline, refused, capsys, tmp_path: Path):
    run = inline("precision=bf16", *DENSE, "steps=9", "record.keep=2", "record.weights_every=3")
    batches, whole = record.steps(run.directory)
    assert whole == [0, 1, 3, 6] and batches == [0, 1, 3, 6, 7, 8]
    assert [path.name for path in sorted((run.directory / "record" / "weights").iterdir())] == [
        f"{n:06d}" for n in whole
    ]
    said = refused(str(run.directory), "--step", "7")
    assert "--step: 7 cannot be served; steps kept whole: 0, 1, 3, 6 (of 7, 8 only the batch is stored)" in said
    assert cli.main(["attribute", str(run.directory), "--no-modules"]) == 0
    assert "step 6: trainer bf16" in capsys.readouterr().out  # the newest
    shutil.rmtree(run.directory / "record" / "weights")
    assert "has no step whose weights are stored" in refused(str(run.directory))
    assert "is no run" in refused(str(tmp_path))


@pytest.mark.parametrize("words", [("record.keep=0",), ("record.weights_every=0",)])
def test_what_was_not_kept_is_not_there(inline, refused, words):
    run = inline("precision=bf16", *DENSE, *words)
    assert "has no step whose weights are stored" in refused(str(run.directory))
