"""Which tensors are quantised, what a config may say, and what the neighbours are told."""

from __future__ import annotations

import pytest

from lpexp.config import Spec, load
from lpexp.data import Param
from lpexp.errors import ConfigError
from lpexp.precision import Precision, digest, from_hf
from lpexp.precision.bf16 import Bf16
from lpexp.precision.fp8 import Fp8
from lpexp.precision.int4 import Int4Qat
from tests.precision import contract

FP8 = "lpexp.precision.fp8.Fp8"
INT4 = "lpexp.precision.int4.Int4Qat"


class Holder(Spec):
    """Stands for the experiment."""

    precision: Precision


def covered(precision: Precision, name: str) -> set[str]:
    moe = contract.model(name).moe is not None
    return {p.kind for p in contract.params(name) if precision.covers(p, moe)}


def mistakes(precision: Precision, params: list[Param], moe: bool = False) -> list[str]:
    return [str(m) for m in precision.judge(params, moe)]


def test_eight_bits_cover_all_linears_of_every_model():
    dense = {"attn_qkv", "attn_out", "mlp_up", "mlp_down"}
    experts = {"expert_up", "expert_down"}
    assert covered(Fp8(name="fp8"), "qwen3_tiny") == dense
    assert covered(Fp8(name="fp8"), "qwen3_moe_tiny") == {"attn_qkv", "attn_out"} | experts
    assert covered(Fp8(name="fp8"), "deepseek_tiny") == dense | experts | {"shared_up", "shared_down"}


def test_four_bits_cover_routed_experts_of_a_mixture_and_all_linears_of_a_dense_model():
    assert covered(Int4Qat(name="int4_qat"), "qwen3_moe_tiny") == {"expert_up", "expert_down"}
    assert covered(Int4Qat(name="int4_qat"), "qwen3_tiny") == {"attn_qkv", "attn_out", "mlp_up", "mlp_down"}


def test_four_bits_leave_out_the_latent_up_projection_that_eight_bits_take():
    four, eight = Int4Qat(name="int4_qat", scope="linears"), Fp8(name="fp8")
    params = contract.params("deepseek_tiny")
    differ = [p.name for p in params if four.covers(p, True) != eight.covers(p, True)]
    assert differ == [f"model.layers.{layer}.self_attn.kv_b_proj.weight" for layer in (0, 1)]


def test_a_scope_may_name_classes_and_tensors():
    name = "model.layers.1.self_attn.o_proj.weight"
    precision = load({"_target_": FP8, "name": "fp8", "scope": ["mlp_down", name]}, Precision)
    taken = [p.name for p in contract.params("qwen3_tiny") if precision.covers(p, False)]
    assert taken == ["model.layers.0.mlp.down_proj.weight", name, "model.layers.1.mlp.down_proj.weight"]
    assert mistakes(precision, contract.params("qwen3_tiny")) == []


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"_target_": INT4, "divisor": 8}, "divisor: 8 is no grid; use 7 (codes -7..7) or 7.5 (codes -8..7)"),
        ({"_target_": INT4, "group_size": 12}, "group_size: 12 is not a multiple of 8; use 32, 64 or 128"),
        ({"_target_": INT4, "group_size": 0}, "group_size: 0 is not a multiple of 8; use 32, 64 or 128"),
        ({"_target_": INT4, "group_size": 32.5}, "group_size: should be a valid integer, got 32.5"),
        (
            {"_target_": FP8, "scope": "expert"},
            "scope: should be auto, experts, linears, or a list of module classes or tensor names, got 'expert'",
        ),
        ({"_target_": FP8, "scope": []}, "scope: should be auto, experts, linears, or a list of module classes"),
        ({"_target_": FP8, "scale_format": "ue8m0"}, "scale_format: should be 'fp32' or 'pow2', got 'ue8m0'"),
        ({"_target_": FP8, "group_size": 32}, "group_size: unknown key"),
        ({"_target_": FP8, "backward": "quantized"}, "backward: should be 'quantised'"),
    ],
    ids=str,
)
def test_a_wrong_precision_is_refused_with_key_value_and_way_out(data: dict, text: str):
    with pytest.raises(ConfigError) as caught:
        load({"precision": {"name": "x", **data}}, Holder)
    assert f"precision.{text}" in str(caught.value)


def test_a_group_that_does_not_divide_is_refused_with_the_ones_that_do():
    params = [Param(f"model.layers.{i}.mlp.down_proj.weight", (512, 1408), "mlp_down") for i in range(2)]
    assert mistakes(Int4Qat(name="int4_qat", group_size=48), params) == [
        "group_size: 48 does not divide 1408, the inputs of model.layers.*.mlp.down_proj; use 32, 64 or 128"
    ]
    params.append(Param("model.layers.0.mlp.experts.3.up_proj.weight", (512, 96), "expert_up"))
    assert mistakes(Int4Qat(name="int4_qat", group_size=64, scope="linears"), params) == [
        "group_size: 64 does not divide 96, the inputs of model.layers.*.mlp.experts.*.up_proj; use 32"
    ]
    params.append(Param("model.layers.0.mlp.up_proj.weight", (512, 100), "mlp_up"))
    assert mistakes(Int4Qat(name="int4_qat", group_size=32, scope="linears"), params) == [
        "group_size: 32 does not divide 100, the inputs of model.layers.*.mlp.up_proj; no group fits; narrow the scope"
    ]


def test_a_group_that_divides_but_that_no_engine_serves_is_refused():
    params = [Param("model.layers.0.mlp.down_proj.weight", (512, 1408), "mlp_down")]
    assert mistakes(Int4Qat(name="int4_qat", group_size=16), params) == [
        "group_size: 16 is no group that engines serve; use 32, 64 or 128"
    ]


@pytest.mark.parametrize("kind", [Fp8, Int4Qat])
def test_a_scope_that_covers_nothing_is_refused(kind: type[Precision]):
    params = contract.params("qwen3_tiny")
    experts = kind.model_validate({"name": "x", "scope": "experts"})
    assert mistakes(experts, params) == ["scope: experts covers nothing: the model has no routed experts; use linears"]
    named = kind.model_validate({"name": "x", "scope": ("attn_out", "lm_head.weight")})
    assert mistakes(named, params) == [
        "scope: 'lm_head.weight' is nothing that can be quantised here; "
        "use attn_qkv, attn_out, mlp_up, mlp_down or a tensor's name"
    ]


@pytest.mark.parametrize("name", contract.MODELS)
def test_the_cards_fit_the_tiny_models(name: str):
    for card in contract.CARDS:
        assert mistakes(contract.from_card(card), contract.params(name), contract.model(name).moe is not None) == []


def test_eight_bit_checkpoints_say_so_in_the_words_of_engines():
    config = Fp8(name="fp8").hf(contract.params("qwen3_moe_tiny"), True)
    assert config == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
    }
    assert Fp8(name="fp8", scale_format="pow2").hf([], False)["scale_fmt"] == "ue8m0"


def test_four_bit_checkpoints_list_every_linear_that_is_not_packed():
    config = Int4Qat(name="int4_qat", group_size=32).hf(contract.params("qwen3_moe_tiny"), True)
    attention = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "koqv"]
    assert config["ignore"] == sorted(["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate", *attention])
    assert config["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": 32,
        "symmetric": True,
        "dynamic": False,
        "observer": "minmax",
        "actorder": None,
    }
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert (config["quantization_status"], config["kv_cache_scheme"]) == ("compressed", None)


def test_the_scope_of_a_checkpoint_is_found_from_what_it_left_out():
    params = contract.params("deepseek_tiny")
    for scope in ("auto", "experts", "linears", ("mlp_down", "model.layers.1.self_attn.o_proj.weight")):
        written = Int4Qat.model_validate({"name": "int4_qat", "scope": scope, "group_size": 64, "divisor": 7.5})
        read = from_hf(written.hf(params, True), params, True)
        assert read.contract(params, True) == written.contract(params, True)
        assert isinstance(read, Int4Qat) and (read.group_size, read.divisor) == (64, 7.5)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64]},
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128, 128]},
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "strategy": "group", "symmetric": False}}},
            "ignore": [],
        },
    ],
    ids=str,
)
def test_a_checkpoint_of_another_format_is_refused_with_the_known_ones(config: dict):
    with pytest.raises(ConfigError) as caught:
        from_hf(config)
    text = str(caught.value)
    assert repr(config["quant_method"]) in text
    assert "compressed-tensors pack-quantized" in text and "weight_block_size [128, 128]" in text


def test_contracts_differ_where_formats_differ_and_only_there():
    params = contract.params("qwen3_tiny")
    base = Fp8(name="fp8").contract(params, False)
    assert digest(base) == digest(Fp8(name="other", scope="linears", backward="dequantised").contract(params, False))
    for other in (Fp8(name="fp8", scale_format="pow2"), Bf16(name="bf16"), Int4Qat(name="int4_qat")):
        found = other.contract(params, False)
        differ = {name for name in base if base[name] != found[name]}
        assert differ == {p.name for p in params if Fp8(name="fp8").covers(p, False)}
    grids = [Int4Qat(name="i", group_size=g, divisor=d) for g in (32, 64, 128) for d in (7.0, 7.5)]
    assert len({digest(grid.contract(params, False)) for grid in grids}) == 6


def test_trainers_are_told_by_environment_what_changes_numerics():
    assert Fp8(name="fp8").environment() == {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}
    assert Fp8(name="fp8", scale_format="pow2").environment() == {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "0"}
    assert Int4Qat(name="int4_qat", group_size=32).environment() == {
        "OPEN_TRAINING_INT4_FAKE_QAT_FLAG": "1",
        "OPEN_TRAINING_INT4_GROUP_SIZE": "32",
    }
    assert Bf16(name="bf16").environment() == {}
