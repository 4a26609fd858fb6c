"""With one precision on both sides the mismatch is exactly zero; and the check can fail."""

from __future__ import annotations

import pytest
import torch

MATCHED = ("fp32", "bf16", "fp8", "int4_qat")
MODELS = ("qwen3_tiny", "qwen3_moe_tiny", "deepseek_tiny")
MAX = "mismatch/logprob_abs_diff_max"


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", MATCHED)
def test_trainer_and_rollout_agree_bitwise_when_precisions_match(inline, precision, model, lag):
    run = inline(f"precision={precision}", f"model={model}", f"lag={lag}", "steps=20", *fast(model))
    assert run.steps(MAX) == [0.0] * 20
    if lag == 0:  # at lag 1 the weights also carry the staleness
        assert run.steps("correction/weight_min") == [1.0] * 20


@pytest.mark.evidence
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", MATCHED)
def test_fifty_steps_keep_the_zero(inline, precision, model, lag):
    run = inline(f"precision={precision}", f"model={model}", f"lag={lag}", "steps=50", *fast(model))
    assert run.steps(MAX) == [0.0] * 50


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_power_of_two_scales_several_updates_and_truncated_answers_keep_the_zero(inline, precision):
    more = ["algorithm.updates_per_batch=2", "rollout.temperature=0.8", "task.max_response=7"]
    if precision == "fp8":
        more.append("precision.scale_format=pow2")
    run = inline(f"precision={precision}", "steps=5", *more, *fast("llama_tiny"), "model=llama_tiny")
    assert run.steps(MAX) == [0.0] * 5


def test_one_flipped_served_code_shows(inline, monkeypatch):
    from lpexp.rollout import embedded

    honest = embedded.EmbeddedEngine.load

    def flipped(self, parts, version):
        name = "model.layers.1.mlp.down_proj.weight"
        dtype, shape, raw = parts[name]["weight"]
        raw = raw.copy()
        raw[77] ^= 0x40
        checksum = honest(self, parts, version)
        honest(self, parts | {name: parts[name] | {"weight": (dtype, shape, raw)}}, version)
        return checksum  # an engine that lies about what it holds

    monkeypatch.setattr(embedded.EmbeddedEngine, "load", flipped)
    assert min(inline("precision=fp8", "steps=3", *fast("qwen3_tiny")).steps(MAX)) > 0


def test_a_flipped_code_is_caught_by_the_checksum(inline, monkeypatch):
    from lpexp.errors import RunError
    from lpexp.precision import wire

    honest = wire.thaw

    def torn(parts, device="cpu"):
        made = honest(parts, device)
        if "weight_packed" in made:
            made["weight_packed"][0, 0] ^= 1
        return made

    monkeypatch.setattr(wire, "thaw", torn)
    with pytest.raises(RunError, match="engine 0 holds"):
        inline("precision=int4_qat", "steps=1", *fast("qwen3_tiny"))


def test_decoding_without_row_padding_shows(inline, monkeypatch):
    from lpexp.precision import numeric

    monkeypatch.setattr(numeric, "PAD_ROWS", 1)
    run = inline("precision=fp32", "steps=3", "rollout.slots=3", *fast("qwen3_tiny"))
    assert max(run.steps(MAX)) > 0


def test_attention_in_float32_shows(inline, monkeypatch):
    from lpexp.model import ops

    def float32(q, keys_RS, allowed_RS, k, v, scale):
        k, v = (x[keys_RS].transpose(1, 2).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        mask = allowed_RS[:, None, None]
        return torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, scale=scale)[
            :, :, 0
        ]

    steps = ("precision=fp32", "steps=3", *fast("qwen3_tiny"))
    monkeypatch.setattr(ops, "attention", ops.plain_attention)
    assert inline(*steps).steps(MAX) == [0.0] * 3  # the plain definition is in float64
    monkeypatch.setattr(ops, "_attend_rows", float32)
    assert max(inline(*steps, name="float32").steps(MAX)) > 0


def test_lag_keeps_staleness_apart_from_the_mismatch(inline):
    run = inline("precision=fp8", "lag=1", "steps=4", "trainer.lr=1e-3", *fast("qwen3_tiny"))
    assert run.steps(MAX) == [0.0] * 4
    assert run.steps("staleness/version_gap_max") == [0, 1, 1, 1]
    gaps = run.steps("staleness/logprob_abs_diff_mean")
    assert gaps[0] == 0.0 and min(gaps[1:]) > 0


def fast(model: str) -> list[str]:
    """A warm start is learned for the default model only; the others start at random."""
    return [] if model == "qwen3_tiny" else ["task.warmup=null"]
