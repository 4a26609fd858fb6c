"""Small models of each architecture, with random weights under their Hugging Face names."""

from __future__ import annotations

from typing import Any

import torch

from lpexp.model import Mla, Model, Moe, RopeScaling
from lpexp.precision.bf16 import Bf16
from lpexp.precision.fp8 import Fp8
from lpexp.precision.fp32 import Fp32
from lpexp.precision.int4 import Int4Qat

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
}
ROUTED: dict[str, Any] = {"num_experts": 8, "top_k": 2, "intermediate_size": 64}
SIGMOID: dict[str, Any] = {**ROUTED, "num_shared": 2, "first_dense": 1, "scoring": "sigmoid", "scaling": 2.5}
LATENT: dict[str, Any] = {
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
}
YARN: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0}


def _deepseek(moe: dict | None = None, mla: dict | None = None, **more: Any) -> dict[str, Any]:
    sizes = {"architecture": "deepseek_v3", "num_key_value_heads": 4, "head_dim": 24}
    return sizes | {"moe": Moe(**SIGMOID | (moe or {})), "mla": Mla(**LATENT | (mla or {}))} | more


VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama"},
    "llama, tied embeddings": {"architecture": "llama", "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "qwen2 with its biases": {"architecture": "qwen2"},
    "qwen2, tied embeddings": {"architecture": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen3": {"architecture": "qwen3", "rope_theta": 1e6},
    "qwen3, heads wider than the hidden size": {"architecture": "qwen3", "head_dim": 64, "tie_word_embeddings": True},
    "qwen3_moe": {"architecture": "qwen3_moe", "moe": Moe(**ROUTED)},
    "qwen3_moe, first layer dense, shares not normed": {
        "architecture": "qwen3_moe",
        "moe": Moe(**ROUTED, first_dense=1, norm_topk=False),
    },
    "deepseek_v3": _deepseek(),
    "deepseek_v3, low-rank queries": _deepseek(mla={"q_lora_rank": 48}),
    "deepseek_v3, experts in groups": _deepseek({"num_groups": 4, "top_groups": 2, "num_shared": 1}),
    "deepseek_v3, shares not normed": _deepseek({"norm_topk": False, "first_dense": 0}),
    "deepseek_v3, YaRN": _deepseek(rope_scaling=RopeScaling(**YARN)),
    "deepseek_v3, YaRN as DeepSeek scales it": _deepseek(
        mla={"q_lora_rank": 48}, rope_scaling=RopeScaling(**{**YARN, "mscale": 0.707})
    ),
    "deepseek_v3, YaRN without mscale_all_dim": _deepseek(rope_scaling=RopeScaling(**{**YARN, "mscale_all_dim": 0.0})),
}
PRECISIONS = {
    "fp32": Fp32(name="fp32"),
    "bf16": Bf16(name="bf16"),
    "fp8": Fp8(name="fp8"),
    "fp8 pow2": Fp8(name="fp8", scale_format="pow2"),
    "int4 g32": Int4Qat(name="int4_qat", group_size=32, scope="linears"),
    "int4 g64": Int4Qat(name="int4_qat", group_size=64),
    "int4 /7.5": Int4Qat(name="int4_qat", group_size=32, divisor=7.5),
}


def build(name: str) -> Model:
    return Model(name=name, **(BASE | VARIANTS[name]))


def weights(model: Model, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random, and large enough that a wrong constant shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for param in model.params():
        tensor = torch.randn(param.shape, generator=generator)
        if param.kind == "norm":
            tensor = 1 + 0.2 * tensor
        elif param.kind == "router_bias":
            tensor = 0.1 * tensor
        elif len(param.shape) == 2 and param.kind != "embed":
            tensor = tensor * (1.5 / param.shape[1] ** 0.5)
        found[param.name] = tensor
    return found
