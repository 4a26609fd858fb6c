"""A served directory judged without torch: its headers, whose model it is, and whether it is a copy of another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lpexp.model import hf
from lpexp.model.served import COMPARED, EMBEDDING, agrees, contradiction, copies, difference, precision_of
from tests.model.small import PRECISIONS, VARIANTS, build, weights


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


def test_copies_are_told_by_the_embedding_as_bf16_values(tmp_path: Path) -> None:
    """Rounded as torch rounds, ties and all."""
    model, tensors = build("qwen3"), weights(build("qwen3"))
    exact = tensors[EMBEDDING]
    exact.copy_(exact.half().float())
    exact[0, :4] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 0.0, -0.0])

    def stored(name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        at = tmp_path / name
        at.mkdir()
        (at / hf.CONFIG).write_text(json.dumps(hf.config_json(model)))
        save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, at / hf.SINGLE)
        return at

    plain = stored("bf16")
    assert copies(plain, stored("fp32", torch.float32), model)
    assert copies(plain, stored("fp16", torch.float16), model)
    exact[-1, -1] += 1
    assert not copies(plain, stored("other"), model)
    assert exact.numel() < COMPARED


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
