"""A served directory judged without torch: its headers, whose model it is, and whether it is a copy of another."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lpexp.errors import ConfigError
from lpexp.model import hf
from lpexp.model.served import COMPARED, EMBEDDING, agrees, contradiction, copies, difference, precision_of
from tests.model.small import PRECISIONS, VARIANTS, build, weights


@pytest.mark.parametrize("name", PRECISIONS)
def test_headers_say_what_the_library_says(tmp_path: Path, name: str) -> None:
    model = build("qwen3")
    hf.save(tmp_path / "hf", model, weights(model).items(), PRECISIONS[name], shard_bytes=200_000)
    found = hf.headers(tmp_path / "hf")
    seen = {}
    for path in (tmp_path / "hf").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                view = file.get_slice(key)
                seen[key] = (view.get_dtype(), tuple(view.get_shape()), path)
                raw = path.read_bytes()[found[key].start : found[key].stop]
                assert raw == bytes(file.get_tensor(key).contiguous().reshape(-1).view(torch.uint8).tolist())
    assert {key: (one.dtype, one.shape, one.file) for key, one in found.items()} == seen


@pytest.mark.parametrize("raw", [
    b"", b"\x01", struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 4) + b"nope", struct.pack("<Q", 2) + b"[]",
    struct.pack("<Q", 2) + b"{}" + b"more", struct.pack("<Q", 7) + b'{"a":1}',
])  # fmt: skip
def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / hf.SINGLE).write_bytes(raw)
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a complete safetensors file"):
        hf.headers(tmp_path)


def test_an_index_that_lies_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / hf.SINGLE)
    (tmp_path / hf.INDEX).write_text(json.dumps({"weight_map": {"a": hf.SINGLE, "b": hf.SINGLE}}))
    with pytest.raises(ConfigError, match=r"model\.safetensors does not hold b"):
        hf.headers(tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["fp8", "int4 g32", "bf16", "fp32"])
def test_the_precision_is_found_that_wrote_the_directory(tmp_path: Path, variant: str, name: str) -> None:
    model, precision = build(variant), PRECISIONS[name]
    if name.startswith("int4") and variant.startswith("deepseek"):
        precision = precision.model_copy(update={"scope": "experts"})
    hf.save(tmp_path / "hf", model, weights(model).items(), precision)
    assert agrees(precision_of(tmp_path / "hf", model), precision, list(model.params()), model.moe is not None)


def test_the_first_field_that_computes_differently_is_named_nested_ones_too() -> None:
    model = build("deepseek_v3, YaRN")
    assert model.moe and model.mla and model.rope_scaling
    assert difference(model, model.model_copy(update={"name": "x", "path": "y", "initializer_range": 1.0})) is None
    assert difference(model, model.model_copy(update={"head_dim": 99})) is None, "latent attention does not use it"
    for key, inner, value in (("moe", "top_k", 3), ("mla", "v_head_dim", 99), ("rope_scaling", "factor", 9.0)):
        part = getattr(model, key)
        other = model.model_copy(update={key: part.model_copy(update={inner: value})})
        assert difference(model, other) == (f"{key}.{inner}", getattr(part, inner), value)
    assert difference(model, model.model_copy(update={"rope_scaling": None})) == (
        "rope_scaling",
        model.rope_scaling,
        None,
    )


def embedding(at: Path, tensor: torch.Tensor) -> Path:
    at.mkdir()
    save_file({EMBEDDING: tensor}, at / hf.SINGLE)
    return at


def test_copies_are_told_by_the_embedding_as_bf16_values(tmp_path: Path) -> None:
    """Rounded as torch rounds, ties and all; beyond what is compared nothing is read."""
    exact = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).half().float()
    exact[0, :4] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 0.0, -0.0])
    plain = embedding(tmp_path / "bf16", exact.bfloat16())
    assert copies(plain, embedding(tmp_path / "fp32", exact))
    assert copies(plain, embedding(tmp_path / "fp16", exact.half()))
    other = exact.bfloat16()
    other[63, 31] += 1
    assert not copies(plain, embedding(tmp_path / "other", other))
    assert not copies(plain, embedding(tmp_path / "longer", torch.cat((other, other))))
    assert COMPARED > 64 * 32


def test_a_scope_is_typed_by_its_module_classes_where_they_are_whole() -> None:
    model = build("qwen3")
    params = list(model.params())
    base = PRECISIONS["int4 g32"]
    names = [p.name for p in params if p.kind == "mlp_up"] + ["model.layers.0.mlp.down_proj.weight"]
    found, served = (base.model_copy(update={"scope": scope}) for scope in (tuple(names), ("mlp_up",)))
    message, typed = contradiction(found, served, "precision", params, False)
    assert message == "int4_qat that quantises model.layers.0.mlp.down_proj.weight, {holder} does not"
    assert typed == "precision=int4_qat precision.scope=[mlp_up,model.layers.0.mlp.down_proj.weight]"
    assert "leaves model.layers.0.mlp.down_proj.weight plain" in contradiction(served, found, "p", params, False)[0]
