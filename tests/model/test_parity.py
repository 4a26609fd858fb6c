"""The embedded decoder computes what transformers computes, for every architecture, in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lpexp.model import hf
from lpexp.model.decoder import Decoder, TrainWeights
from lpexp.precision.fp32 import Fp32
from tests.model.small import VARIANTS, build, weights

TOLERANCE = 1e-4  # absolute, of logits of order 1: float32 sums in another order, through two layers
FP32 = Fp32(name="fp32")


def ours(model, tensors, tokens):
    with torch.no_grad():
        return Decoder(model).logits(TrainWeights(model, FP32, tensors), tokens)


def theirs(directory, tokens):
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    reference, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    with torch.no_grad():
        return reference.eval()(tokens).logits


@pytest.fixture
def tokens():
    # Past 32 tokens, the original context of the YaRN variants, and no multiple of any padding.
    return torch.randint(0, 97, (2, 45), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_of_transformers(name, tokens, tmp_path):
    model = build(name)
    tensors = weights(model)
    hf.save(tmp_path / "hf", model, tensors.items(), FP32)
    expected = theirs(tmp_path / "hf", tokens)
    found = ours(model, tensors, tokens)
    assert expected.std() > 0.3, "logits too small for the tolerance to mean anything"
    assert (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    "name, change",
    [
        ("llama", {"rope_theta": 20000.0}),
        ("qwen3", {"rms_norm_eps": 1e-3}),
        ("qwen3_moe", {"moe": {"top_k": 3}}),
        ("deepseek_v3", {"moe": {"scaling": 2.4}}),
        ("deepseek_v3, experts in groups", {"moe": {"top_groups": 3}}),
        ("deepseek_v3, YaRN", {"rope_scaling": {"factor": 4.1}}),
        ("deepseek_v3, YaRN as DeepSeek scales it", {"rope_scaling": {"mscale": 1.0}}),
    ],
    ids=str,
)
def test_a_slightly_different_architecture_leaves_the_tolerance(name, change, tokens):
    model = build(name)
    update = {
        key: getattr(model, key).model_copy(update=value) if isinstance(value, dict) else value
        for key, value in change.items()
    }
    tensors = weights(model)
    apart = (ours(model, tensors, tokens) - ours(model.model_copy(update=update), tensors, tokens)).abs().max()
    assert apart > 10 * TOLERANCE


def test_what_transformers_saves_is_what_lpexp_loads(tokens, tmp_path):
    """Its own exporter, bf16, sharded: names, shapes and values come back."""
    model = build("deepseek_v3, low-rank queries")
    tensors = {name: t if "correction" in name else t.bfloat16().float() for name, t in weights(model).items()}
    hf.save(tmp_path / "ours", model, tensors.items(), FP32)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    again = hf.read_model(tmp_path / "theirs")
    assert list(again.params()) == list(model.params())
    loaded = hf.load_weights(tmp_path / "theirs", again)
    for name, tensor in tensors.items():
        if "correction" not in name:
            assert torch.equal(loaded[name], tensor), name
    assert (ours(again, loaded, tokens) - ours(model, loaded, tokens)).abs().max() == 0
