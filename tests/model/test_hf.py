"""Hugging Face directories: what is saved comes back bit for bit, and what is wrong is named."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from lpexp.errors import ConfigError, NonFiniteWeightError, RunError
from lpexp.model import Model, hf
from lpexp.precision.wire import side
from tests.model.small import PRECISIONS, VARIANTS, build, weights

FP32, BF16 = PRECISIONS["fp32"], PRECISIONS["bf16"]


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def boundary(shape: tuple[int, ...]) -> torch.Tensor:
    """Exact ties: a row of halves whose block maximum makes the scale 1, -0, and the smallest values beside it."""
    tensor = (torch.arange(shape[-1]).float() % 15 - 7.5) * torch.tensor([1.0, -1.0]).repeat(shape[-1])[: shape[-1]]
    tensor = tensor.expand(shape).clone()
    tensor[..., 0], tensor[..., 1], tensor[..., 2] = 448.0, -0.0, 2.0**-10
    return tensor


FILLS = {
    "random": lambda shape: torch.randn(shape, generator=torch.Generator().manual_seed(3)),
    "boundary": boundary,
    "zero": torch.zeros,
    "largest bf16": lambda shape: torch.full(shape, torch.finfo(torch.bfloat16).max),
    "tiny": lambda shape: torch.full(shape, 1e-38),
}


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_saved_and_loaded_parts_are_the_quantised_bytes(precision, fill, tmp_path):
    model = build("qwen3")
    tensors = {param.name: FILLS[fill](param.shape) for param in model.params()}
    hf.save(tmp_path / "hf", model, tensors.items(), precision)
    again, found, stored = hf.load(tmp_path / "hf")
    assert list(again.params()) == list(model.params())
    assert (found is None) == (precision.hf(list(model.params()), False) is None)
    for param in model.params():
        expected = side(param, precision, False).quantize(tensors[param.name])
        assert stored[param.name].keys() == expected.keys()
        for suffix, part in expected.items():
            assert same_bytes(stored[param.name][suffix], part), (param.name, suffix)


@pytest.mark.parametrize("name", ["fp8", "fp8 pow2", "int4 g32", "int4 g64", "int4 /7.5"])
@pytest.mark.parametrize("variant", ["qwen2 with its biases", "qwen3_moe", "deepseek_v3, low-rank queries"])
def test_the_loaded_precision_quantises_as_the_one_that_saved(name, variant, tmp_path):
    model, precision = build(variant), PRECISIONS[name]
    if variant.startswith("deepseek") and name.startswith("int4"):
        precision = precision.model_copy(update={"scope": "experts", "group_size": 32})
    params, moe = list(model.params()), model.moe is not None
    hf.save(tmp_path / "hf", model, weights(model).items(), precision)
    _, found, _ = hf.load(tmp_path / "hf")
    assert found is not None
    assert found.contract(params, moe) == precision.contract(params, moe)
    assert any(precision.covers(param, moe) for param in params)


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_weight_is_refused_by_name_and_leaves_no_directory(precision, bad, tmp_path):
    model = build("qwen3")
    tensors = weights(model)
    tensors["model.layers.1.mlp.down_proj.weight"][5, 7] = bad
    with pytest.raises(NonFiniteWeightError, match=r"model\.layers\.1\.mlp\.down_proj\.weight.*\[5, 7\]"):
        hf.save(tmp_path / "hf", model, tensors.items(), precision)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_load_as_float32_of_the_stored_values(dtype, tmp_path):
    model = build("qwen2 with its biases")
    tensors = {name: tensor.to(dtype) for name, tensor in weights(model).items()}
    plain_directory(tmp_path, model, tensors)
    loaded = hf.load_weights(tmp_path, hf.read_model(tmp_path))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bytes(loaded[name], tensor.float()), name


# -- what is on disk ---------------------------------------------------------------------------------------------------


def test_no_shard_is_larger_than_its_bound_and_the_index_tells_true_sizes(tmp_path):
    model = build("qwen3_moe")
    bound = 200_000
    hf.save(tmp_path / "hf", model, weights(model).items(), PRECISIONS["fp8"], shard_bytes=bound)
    index = json.loads((tmp_path / "hf" / hf.INDEX).read_text())
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert [shard.name for shard in shards] == sorted(set(index["weight_map"].values())) and len(shards) > 2
    total = 0
    for shard in shards:
        held = load_file(shard)
        assert {index["weight_map"][name] for name in held} == {shard.name}
        size = sum(tensor.nbytes for tensor in held.values())
        assert size <= bound
        total += size
    assert index["metadata"]["total_size"] == total


def test_a_part_carries_the_name_of_its_weight(tmp_path):
    model = build("qwen3")
    hf.save(tmp_path / "hf", model, weights(model).items(), PRECISIONS["fp8"])
    with safe_open(next((tmp_path / "hf").glob("*.safetensors")), "pt") as file:
        names = set(file.keys())
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight_scale_inv"} <= names
    assert "model.norm.weight" in names and "model.norm.weight_scale_inv" not in names


def test_weights_are_taken_one_at_a_time(tmp_path):
    """Nothing is buffered: when the next tensor is asked for, the bytes of the last one are in its file."""
    model, last, seen = build("qwen3"), b"", []

    def produce():
        nonlocal last
        for name, tensor in weights(model).items():
            files = list(tmp_path.glob(".tmp-*/*.safetensors"))
            seen.append(any(last in path.read_bytes() for path in files))
            last = tensor.numpy().tobytes()
            yield name, tensor

    hf.save(tmp_path / "hf", model, produce(), FP32, shard_bytes=100_000)
    assert len(seen) > 20 and all(seen)


def test_a_save_that_dies_leaves_nothing_under_the_name(tmp_path):
    model = build("qwen3")

    def produce():
        yield from list(weights(model).items())[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.save(tmp_path / "hf", model, produce(), FP32)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_not_overwritten(tmp_path):
    (tmp_path / "keep").write_text("mine")
    model = build("qwen3")
    with pytest.raises(ConfigError, match="exists already"):
        hf.save(tmp_path, model, weights(model).items(), FP32)
    assert (tmp_path / "keep").read_text() == "mine"


@pytest.mark.parametrize("drop, extra, message", [
    ("model.norm.weight", None, "1 tensors of the model did not come: model.norm.weight"),
    (None, "model.other.weight", "model.other.weight is no tensor of this model"),
])  # fmt: skip
def test_saving_less_or_more_than_the_model_is_refused(drop, extra, message, tmp_path):
    model = build("qwen3")
    tensors = {name: tensor for name, tensor in weights(model).items() if name != drop}
    if extra:
        tensors[extra] = torch.zeros(2)
    with pytest.raises(RunError, match=message):
        hf.save(tmp_path / "hf", model, tensors.items(), FP32)


def test_the_tokenizer_of_the_model_travels_with_its_export(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    model = build("qwen3").model_copy(update={"path": str(tmp_path / "base")})
    hf.save(tmp_path / "hf", model, weights(model).items(), FP32)
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "{}"


# -- config.json -------------------------------------------------------------------------------------------------------


def sizes(model: Model) -> dict[str, Any]:
    """What decides the forward pass; latent attention does not use head_dim."""
    return model.model_dump(exclude={"name", "path", "parallel", *(("head_dim",) if model.mla else ())})


@pytest.mark.parametrize("name", VARIANTS)
def test_a_config_reads_back_as_the_model_that_wrote_it(name):
    model = build(name)
    config = json.loads(json.dumps(hf.config_json(model)))
    assert sizes(hf.model_from_config(config, name, None)) == sizes(model)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_config_without_the_keys_of_transformers_5_reads_the_same(name):
    model = build(name)
    config = hf.config_json(model)
    del config["rope_parameters"]
    assert sizes(hf.model_from_config(config, name, None)) == sizes(model)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_config_that_transformers_wrote_reads_the_same(name, tmp_path):
    model = build(name)
    (tmp_path / "config.json").write_text(json.dumps(hf.config_json(model)))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    config.setdefault("architectures", hf.config_json(model)["architectures"])
    assert sizes(hf.model_from_config(config, name, None)) == sizes(model)


def test_an_unknown_architecture_is_named_beside_the_supported_ones():
    with pytest.raises(ConfigError) as refused:
        hf.model_from_config({"architectures": ["MambaForCausalLM"]}, "m", "/models/m")
    assert "/models/m/config.json: architecture MambaForCausalLM is not supported" in str(refused.value)
    assert all(name in str(refused.value) for name in hf.CLASSES.values())


@pytest.mark.parametrize("name, change, key", [
    ("llama", {"attention_bias": True}, "attention_bias=True"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}}, "rope_parameters"),
    ("qwen2 with its biases", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False"),
])  # fmt: skip
def test_an_option_that_the_decoder_lacks_is_refused_by_name(name, change, key):
    with pytest.raises(ConfigError, match=key):
        hf.model_from_config(hf.config_json(build(name)) | change, name, None)


def test_a_missing_key_of_a_config_is_named():
    config = hf.config_json(build("llama"))
    del config["vocab_size"]
    with pytest.raises(ConfigError, match="key 'vocab_size' is missing"):
        hf.model_from_config(config, "llama", None)


def test_a_model_that_no_config_can_say_is_refused():
    model = build("qwen3_moe")
    assert model.moe is not None
    with pytest.raises(ConfigError, match=r"moe\.scoring"):
        hf.config_json(model.model_copy(update={"moe": model.moe.model_copy(update={"scoring": "sigmoid"})}))


# -- what is wrong in a directory --------------------------------------------------------------------------------------


def plain_directory(directory, model, tensors):
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / hf.SINGLE)
    (directory / hf.CONFIG).write_text(json.dumps(hf.config_json(model)))


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "read", [lambda d: hf.load(d), lambda d: hf.load_weights(d, hf.read_model(d))], ids=["load", "weights"]
)
@pytest.mark.parametrize("damage, message", [
    (lambda t: t.pop(Q), f"{Q} is missing"),
    (lambda t: t.update(stray=torch.zeros(2)), "model.safetensors: stray is no tensor of"),
    (lambda t: t.update({Q: torch.zeros(3, 128)}), rf"safetensors: {Q} has shape \[3, 128\], expected \[128, 128\]"),
    (lambda t: t.update({Q: t[Q].T.contiguous()[:64]}), r"has shape \[64, 128\]"),
    (lambda t: t.update({Q: t[Q].to(torch.int8)}), f"{Q} is int8, expected float32, bfloat16, float16"),
    (lambda t: t[Q].fill_(float("nan")), f"model.safetensors: {Q}: 16384 non-finite"),
    (lambda t: t[Q][3, 4].fill_(float("inf")), rf"{Q}: 1 non-finite value\(s\), the first is inf at \[3, 4\]"),
])  # fmt: skip
def test_a_wrong_tensor_is_named_with_its_file(read, damage, message, tmp_path):
    model = build("qwen3")
    tensors = weights(model)
    damage(tensors)
    plain_directory(tmp_path, model, tensors)
    with pytest.raises((ConfigError, NonFiniteWeightError), match=message):
        read(tmp_path)


def test_all_wrong_tensors_are_named_at_once(tmp_path):
    model = build("qwen3")
    tensors = weights(model)
    del tensors[Q], tensors["model.norm.weight"]
    plain_directory(tmp_path, model, tensors | {"stray": torch.zeros(2)})
    with pytest.raises(ConfigError) as refused:
        hf.load_weights(tmp_path, model)
    assert all(name in str(refused.value) for name in (Q, "model.norm.weight", "stray"))


def quantised(tmp_path, precision="fp8", **more):
    model = build("qwen3")
    hf.save(tmp_path / "hf", model, weights(model).items(), PRECISIONS[precision], **more)
    return tmp_path / "hf"


def rewrite(directory, change):
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, directory / hf.SINGLE)
    path.unlink()
    (directory / hf.INDEX).unlink()


SCALE = "model.layers.0.self_attn.q_proj.weight_scale_inv"


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(SCALE), f"{SCALE} is missing"),
    (lambda t: t.update({SCALE: t[SCALE].bfloat16()}), f"{SCALE} is bfloat16, expected float32"),
    (lambda t: t.update({SCALE: t[SCALE].repeat(2, 1)}), rf"{SCALE} has shape \[2, 1\], expected \[1, 1\]"),
    (lambda t: t.update({Q: t[Q].float()}), f"{Q} is float32, expected float8_e4m3fn"),
    (lambda t: t.update({"model.norm.weight_scale_inv": t[SCALE].clone()}), "model.norm.weight_scale_inv is no tensor"),
    (lambda t: t[SCALE].fill_(float("nan")), f"{SCALE}: 1 non-finite"),
])  # fmt: skip
def test_a_wrong_part_of_a_quantised_tensor_is_named(change, message, tmp_path):
    directory = quantised(tmp_path)
    rewrite(directory, change)
    with pytest.raises((ConfigError, NonFiniteWeightError), match=message):
        hf.load(directory)


def test_a_shape_stored_as_int32_is_read_as_the_int64_it_means(tmp_path):
    directory = quantised(tmp_path, "int4 g32")
    shape = "model.layers.0.self_attn.q_proj.weight_shape"
    rewrite(directory, lambda t: t.update({shape: t[shape].int()}))
    _, _, stored = hf.load(directory)
    assert stored[Q]["weight_shape"].dtype == torch.int64 and stored[Q]["weight_shape"].tolist() == [128, 128]


def test_a_quantised_directory_is_no_source_of_training_weights(tmp_path):
    directory = quantised(tmp_path)
    with pytest.raises(ConfigError, match=r"is quantised \(quant_method fp8\)"):
        hf.load_weights(directory, build("qwen3"))


def test_an_unknown_quantisation_is_refused(tmp_path):
    directory = quantised(tmp_path)
    config = json.loads((directory / hf.CONFIG).read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (directory / hf.CONFIG).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"(?s)config\.json.*quant_method 'mxfp4'"):
        hf.load(directory)


def test_a_torn_shard_is_named(tmp_path):
    directory = quantised(tmp_path, shard_bytes=100_000)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=f"{shard.name} is not a complete safetensors file"):
        hf.load(directory)


def test_a_missing_shard_is_named_with_what_it_held(tmp_path):
    directory = quantised(tmp_path, shard_bytes=100_000)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ConfigError, match=rf"{shard.name} is missing, .* says that it holds model\."):
        hf.load(directory)


def test_an_index_cannot_point_outside_of_its_directory(tmp_path):
    directory = quantised(tmp_path)
    index = json.loads((directory / hf.INDEX).read_text())
    index["weight_map"][Q] = "../model.safetensors"
    (directory / hf.INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="outside of its directory"):
        hf.load(directory)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_pickled_weights_are_refused_unread(tmp_path):
    model = build("qwen3")
    (tmp_path / hf.CONFIG).write_text(json.dumps(hf.config_json(model)))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ConfigError, match=r"only pytorch_model\.bin, which would have to be unpickled"):
        hf.load_weights(tmp_path, model)


def test_a_tied_head_may_be_stored_when_it_equals_the_embedding(tmp_path):
    model = build("llama, tied embeddings")
    tensors = weights(model)
    plain_directory(tmp_path, model, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert hf.load_weights(tmp_path, model).keys() == tensors.keys()
    plain_directory(tmp_path, model, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(ConfigError, match=r"lm_head\.weight differs from the embedding"):
        hf.load_weights(tmp_path, model)


def test_an_untied_head_that_is_missing_is_named(tmp_path):
    model = build("llama")
    tensors = weights(model)
    del tensors["lm_head.weight"]
    plain_directory(tmp_path, model, tensors)
    with pytest.raises(ConfigError, match=r"lm_head\.weight is missing"):
        hf.load_weights(tmp_path, model)


def test_a_directory_without_weights_or_config_is_refused_in_words(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        hf.read_model(tmp_path)
    (tmp_path / hf.CONFIG).write_text(json.dumps(hf.config_json(build("llama"))))
    with pytest.raises(ConfigError, match="has no weights"):
        hf.load_weights(tmp_path, build("llama"))


def test_a_producer_may_reuse_its_buffer(tmp_path):
    """Shards are buffered; a tensor handed over is the directory's own from then on."""
    model = build("qwen3")
    tensors = weights(model)
    buffer = torch.empty(max(tensor.numel() for tensor in tensors.values()))

    def produce():
        for name, tensor in tensors.items():
            view = buffer[: tensor.numel()].view(tensor.shape)
            yield name, view.copy_(tensor)

    hf.save(tmp_path / "hf", model, produce(), FP32)
    loaded = hf.load_weights(tmp_path / "hf", model)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
