"""The libraries that will read converted directories decode them to exactly our values; and back through 16 bits."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from lpexp import cli
from lpexp.convert import convert
from lpexp.errors import ConfigError
from lpexp.model import Model, hf
from lpexp.precision import Parts
from tests.convert.directories import BF16, GOLDEN, WAYS, digests, edit, golden_weights, plain, random
from tests.precision.contract import MODELS, model, same_bytes

KEPT = Path(__file__).parents[1] / "golden" / "converted"


def in_transformers(directory: Path, small: Model, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every matrix as transformers holds it after loading, under its checkpoint name."""
    told = json.loads((directory / "config.json").read_text())["quantization_config"]["quant_method"]
    more = {"quantization_config": CompressedTensorsConfig(run_compressed=False)} if told != "fp8" else {}
    state = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **more).state_dict()
    found = {}
    for param in small.params():
        if expert := re.match(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj", param.name):
            at, index, which = expert[1], int(expert[2]), expert[3]
            if f"{at}.{index}.{which}_proj.weight" in state:
                found[param.name] = state[f"{at}.{index}.{which}_proj.weight"]
            elif which == "down":
                found[param.name] = state[f"{at}.down_proj"][index]
            else:
                found[param.name] = state[f"{at}.gate_up_proj"][index].chunk(2)[which == "up"]
        else:
            found[param.name] = state[param.name]
    return found


def served(directory: Path) -> dict[str, Tensor]:
    """Every quantised tensor's values as lpexp serves them."""
    small, precision, parts = hf.load(directory)
    assert precision is not None
    moe = small.moe is not None
    return {p.name: precision.dequantize(parts[p.name]) for p in small.params() if precision.covers(p, moe)}


def made(tmp_path: Path, way: str, small: Model) -> Path:
    source = plain(tmp_path / "source", small)
    convert(source, tmp_path / "served", WAYS[way][1])
    return tmp_path / "served"


def spoil(directory: Path, suffix: str) -> None:
    """Double every scale of one shard."""
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    save_file({n: t * 2 if n.endswith(suffix) else t for n, t in tensors.items()}, path, {"format": "pt"})


# -- the libraries -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["fp8", "fp8 ue8m0"])
def test_transformers_dequantises_eight_bit_blocks_to_our_values(way: str, name: str, dtype, tmp_path: Path):
    directory = made(tmp_path, way, model(name))
    ours, theirs = served(directory), in_transformers(directory, model(name), dtype)
    assert len(ours) > 10
    for key, values in ours.items():
        assert torch.equal(theirs[key], values.to(dtype)), key


@pytest.mark.parametrize("name", ["qwen3_tiny", "qwen3_moe_tiny"])
@pytest.mark.parametrize("way", ["int4 g32", "int4 g128", "int4 /7.5", "w8a16", "w8a16 /127.5"])
def test_transformers_decompresses_integers_to_our_values(way: str, name: str, tmp_path: Path):
    directory = made(tmp_path, way, model(name))
    ours, theirs = served(directory), in_transformers(directory, model(name), torch.bfloat16)
    assert len(ours) > 10
    for key, values in ours.items():
        assert torch.equal(theirs[key].float(), values), key


@pytest.mark.parametrize(("way", "suffix"), [("fp8", "weight_scale_inv"), ("int4 g32", "weight_scale")])
def test_another_scale_would_be_noticed(way: str, suffix: str, tmp_path: Path):
    directory = made(tmp_path, way, model("qwen3_tiny"))
    ours = served(directory)
    spoil(directory, suffix)
    theirs = in_transformers(directory, model("qwen3_tiny"), torch.bfloat16)
    same = [key for key, values in ours.items() if torch.equal(theirs[key].float(), values.bfloat16().float())]
    assert all(not ours[key].any() for key in same) and len(same) < len(ours) / 4


def decompressed(directory: Path) -> dict[str, Tensor]:
    """Every quantised tensor as compressed-tensors decompresses it, by the directory's own config."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    told = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate({k: v for k, v in told.items() if k != "quant_method"})
    compressor: Any = BaseCompressor.load_from_registry(told["format"])
    small, precision, parts = hf.load(directory)
    assert precision is not None
    scheme = config.config_groups["group_0"]
    covered = [p.name for p in small.params() if precision.covers(p, small.moe is not None)]
    return {name: compressor.decompress(dict(parts[name]), scheme)["weight"] for name in covered}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["int4 g32", "int4 g128", "int4 /7.5", "w8a16", "w8a16 /127.5", "fp8 channel"])
def test_compressed_tensors_decompresses_to_our_values(way: str, name: str, tmp_path: Path):
    directory = made(tmp_path, way, model(name))
    ours, theirs = served(directory), decompressed(directory)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for key, values in ours.items():
        assert torch.equal(theirs[key].float(), values.to(theirs[key].dtype).float()), key


@pytest.mark.parametrize("way", ["int4 g32", "w8a16"])
def test_compressed_tensors_packs_our_values_into_our_words(way: str):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    precision: Any = WAYS[way][1]
    parts = precision.quantize(torch.randn(5, 256) * 0.05)
    codes, _ = precision._unpack(parts)
    assert torch.equal(pack_to_int32(codes, precision.bits), parts["weight_packed"])


# -- through bf16 and back ---------------------------------------------------------------------------------------------
def there_and_back(tmp_path: Path, way: str, small: Model) -> tuple[Path, Path]:
    directory, precision = made(tmp_path, way, small), WAYS[way][1]
    convert(directory, tmp_path / "bf16", BF16)
    convert(tmp_path / "bf16", tmp_path / "again", precision)
    return directory, tmp_path / "again"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["fp8", "fp8 channel", "fp8 tensor", "int4 g32", "int4 g128", "w8a16"])
def test_through_16_bits_and_back_changes_no_byte(way: str, name: str, tmp_path: Path):
    directory, again = there_and_back(tmp_path, way, model(name))
    assert digests(again) == digests(directory)


@pytest.mark.parametrize("name", MODELS)
def test_through_16_bits_and_back_changes_no_value_with_powers_of_two(name: str, tmp_path: Path, capsys):
    directory, again = there_and_back(tmp_path, "fp8 ue8m0", model(name))
    before, after = served(directory), served(again)
    assert all(torch.equal(before[key], after[key]) for key in before)
    (_, _, old), (_, _, new) = hf.load(directory), hf.load(again)
    moved = {suffix: _moved(suffix, old, new, list(before)) for suffix in ("weight", "weight_scale_inv")}
    with capsys.disabled():
        print(f"\n{name}: {moved['weight']:.1%} of codes, {moved['weight_scale_inv']:.1%} of scales move, no value")
    assert moved["weight"] < 0.5


def _moved(suffix: str, old: dict[str, Parts], new: dict[str, Parts], names: list[str]) -> float:
    pairs = [(old[name][suffix].view(torch.uint8), new[name][suffix].view(torch.uint8)) for name in names]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


@pytest.mark.parametrize("way", ["int4 /7.5", "w8a16 /127.5"])
def test_through_16_bits_and_back_is_refused_where_the_scales_would_move(way: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="whose scales cannot be found again"):
        there_and_back(tmp_path, way, model("qwen3_tiny"))
    convert(tmp_path / "bf16", tmp_path / "fp8", WAYS["fp8"][1])  # another format is another question


def test_the_config_of_a_directory_that_came_back_is_what_it_was(tmp_path: Path):
    """But for the note on where its values come from."""
    directory = made(tmp_path, "fp8", model("qwen3_tiny"))
    convert(directory, tmp_path / "bf16", BF16)
    source, back = (json.loads((tmp_path / at / "config.json").read_text()) for at in ("source", "bf16"))
    note = back.pop(hf.DECODED)
    assert back == source and note == hf.read_config(directory)["quantization_config"]
    assert all(
        torch.equal(tensor, served(directory).get(name, tensor).bfloat16().float())
        for name, tensor in hf.read_weights(tmp_path / "bf16", model("qwen3_tiny"))
    )


# -- Kimi-K2-Thinking --------------------------------------------------------------------------------------------------
KIMI_IGNORES = [
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
]


def kimi(tmp_path: Path) -> Path:
    """Its layout: routed experts in groups of 32, patterns that name the rest, int32 shapes, its own model type."""
    directory = made(tmp_path, "int4 g32", model("deepseek_tiny"))
    told = hf.read_config(directory)["quantization_config"] | {"ignore": KIMI_IGNORES}
    told["config_groups"]["group_0"]["weights"] |= {"observer_kwargs": {}, "block_structure": None}
    edit(directory, quantization_config=told, model_type="kimi_k2")
    (path,) = directory.glob("*.safetensors")
    narrow = {n: t.int() if n.endswith("weight_shape") else t for n, t in load_file(path).items()}
    save_file(narrow, path, {"format": "pt"})
    return directory


def test_a_directory_in_the_layout_of_kimi_comes_back_to_16_bits(tmp_path: Path):
    directory = kimi(tmp_path)
    words = ["--input-dir", str(directory), "--output-dir", str(tmp_path / "bf16"), "--max-workers", "1"]
    assert cli.main(["convert", "bf16", *words]) == 0
    source, precision = random(model("deepseek_tiny")), WAYS["int4 g32"][1]
    found = hf.load_weights(tmp_path / "bf16", model("deepseek_tiny"))
    for param in model("deepseek_tiny").params():
        expected = source[param.name].float()
        if "experts." in param.name and "shared" not in param.name:
            expected = precision.dequantize(precision.quantize(expected))
        assert torch.equal(found[param.name], expected), param.name
    assert hf.read_config(tmp_path / "bf16")["model_type"] == "kimi_k2"


def test_patterns_of_ignored_modules_resolve_to_the_modules_they_match():
    params = list(model("deepseek_tiny").params())
    told = WAYS["int4 g32"][1].hf(params, True)
    assert told is not None
    from lpexp.precision import from_hf

    for ignore in (KIMI_IGNORES, [*KIMI_IGNORES, "re:.*mlp.gate$"]):
        assert from_hf(told | {"ignore": ignore}, params, True) == WAYS["int4 g32"][1]
    attention_too = from_hf(told | {"ignore": KIMI_IGNORES[:1] + KIMI_IGNORES[2:]}, params, True)
    covered = {p.kind for p in params if attention_too.covers(p, True)}
    assert covered == {"attn_qkv", "attn_out", "expert_up", "expert_down"}


# -- golden files ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", WAYS)
def test_a_tiny_model_converts_to_the_committed_bytes(way: str, tmp_path: Path):
    """Two directories are committed whole, of the others the SHA-256 of every file."""
    source = plain(tmp_path / "source", GOLDEN, golden_weights())
    convert(source, tmp_path / "out", WAYS[way][1])
    assert digests(tmp_path / "out") == json.loads((KEPT / "manifest.json").read_text())[way]


@pytest.mark.parametrize("way", ["fp8", "int4 g32"])
def test_a_committed_directory_has_the_digests_of_the_manifest_and_loads(way: str):
    directory = KEPT / way.replace(" ", "_")
    assert digests(directory) == json.loads((KEPT / "manifest.json").read_text())[way]
    _, precision, parts = hf.load(directory)
    assert precision is not None and precision == WAYS[way][1]
    weights = golden_weights()
    for param in GOLDEN.params():
        if precision.covers(param, False):
            assert same_bytes(parts[param.name], precision.quantize(weights[param.name])), param.name


def test_golden_directories_stay_small():
    assert sum(path.stat().st_size for path in KEPT.rglob("*") if path.is_file()) < 220_000
    assert hashlib.sha256(b"").hexdigest() not in (KEPT / "manifest.json").read_text()
