"""What a model is: its architecture, named as in a Hugging Face config.json, and the list of its tensors.

Cards live in conf/model/. The embedded decoder that runs it is decoder.py; reading and writing directories is hf.py.
No torch here: plans and contracts are made from `Model.params()` alone.
Architectures: config.json of each model family; table in docs/models.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from lpexp.config import Spec, rule
from lpexp.data import Param
from lpexp.errors import Mistake

Architecture = Literal["llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3"]
LAPTOP_LAYERS = 2


class Moe(Spec):
    """Routed experts. `shared` experts see every token; the first `first_dense` layers have a dense MLP."""

    num_experts: int = Field(ge=2)
    top_k: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)  # of one expert
    num_shared: int = Field(default=0, ge=0)
    first_dense: int = Field(default=0, ge=0)
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk: bool = True
    scaling: float = Field(default=1.0, gt=0)
    num_groups: int = Field(default=1, ge=1)
    top_groups: int = Field(default=1, ge=1)


class Mla(Spec):
    """Multi-head latent attention: keys and values are projected up from a small shared latent."""

    q_lora_rank: int | None = Field(default=None, ge=1)  # None: queries are projected directly
    kv_lora_rank: int = Field(ge=1)
    qk_nope_head_dim: int = Field(ge=1)
    qk_rope_head_dim: int = Field(ge=2)
    v_head_dim: int = Field(ge=1)


class RopeScaling(Spec):
    """YaRN, as Kimi-K2 and DeepSeek-V3 use it (arXiv 2309.00071)."""

    factor: float = Field(ge=1)
    original_max_position_embeddings: int = Field(ge=1)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


class Parallel(Spec):
    """How production trainers and engines split this model; facts of the card or its layout, unused when embedded."""

    nodes: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=8, ge=1)
    tp: int = Field(default=1, ge=1)
    pp: int = Field(default=1, ge=1)
    cp: int = Field(default=1, ge=1)
    ep: int = Field(default=1, ge=1)
    etp: int = Field(default=1, ge=1)
    last_stage_layers: int | None = Field(default=None, ge=1)  # None: layers split evenly
    max_tokens_per_gpu: int = Field(default=8192, ge=1)  # of a micro-batch
    bucket_mb: int = Field(default=512, ge=1)  # of 16-bit weights under way at a time in a weight update
    optimizer_offload: bool = False  # Adam's state in host memory
    dispatcher: Literal["alltoall", "deepep"] = "alltoall"  # how tokens travel to their experts
    engine_gpus: int = Field(default=1, ge=1)  # GPUs of one rollout engine
    engine_ep: int = Field(default=1, ge=1)  # of which this many share the experts out
    engine_memory: float = Field(default=0.7, gt=0, lt=1)  # share of a GPU's memory


class Model(Spec):
    """One architecture with its sizes. `scale: laptop` keeps the family and shrinks the sizes."""

    name: str
    architecture: Architecture
    vocab_size: int = Field(ge=2)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)  # of the dense MLP
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2)
    rope_theta: float = Field(gt=0)
    rms_norm_eps: float = Field(gt=0)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    max_position_embeddings: int = Field(ge=1)
    initializer_range: float = Field(default=0.02, gt=0)
    moe: Moe | None = None
    mla: Mla | None = None
    rope_scaling: RopeScaling | None = None
    parallel: Parallel = Parallel()
    path: str | None = None  # HF directory with weights and tokenizer; None: random start, character tokenizer
    scale: Literal["full", "laptop"] = "full"

    @rule
    def _shape_rules(self) -> Iterator[Mistake]:
        if self.num_attention_heads % self.num_key_value_heads:
            yield Mistake(
                "num_key_value_heads",
                f"{self.num_key_value_heads} does not divide num_attention_heads {self.num_attention_heads}; "
                f"use one of {divisors(self.num_attention_heads)}",
            )
        if self.moe and self.moe.top_k > self.moe.num_experts:
            yield Mistake(
                "moe.top_k", f"{self.moe.top_k} of {self.moe.num_experts} experts; use at most {self.moe.num_experts}"
            )
        if self.moe and self.moe.num_experts % self.moe.num_groups:
            yield Mistake(
                "moe.num_groups", f"{self.moe.num_groups} does not divide moe.num_experts {self.moe.num_experts}"
            )
        if (self.architecture in ("qwen3_moe", "deepseek_v3")) != (self.moe is not None):
            yield Mistake(
                "moe", f"architecture {self.architecture} {'has' if self.moe is None else 'has no'} routed experts"
            )
        if (self.architecture == "deepseek_v3") != (self.mla is not None):
            yield Mistake(
                "mla", f"architecture {self.architecture} {'needs' if self.mla is None else 'has no'} latent attention"
            )
        if self.head_dim % 2:
            yield Mistake("head_dim", f"{self.head_dim} is odd; rotary embedding needs an even one")

    def sized(self) -> Model:
        """The model that runs: itself, or its small twin when `scale` is laptop."""
        return _laptop(self) if self.scale == "laptop" else self

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer >= self.moe.first_dense

    def params(self) -> Iterator[Param]:
        """Every tensor under its Hugging Face name, in the order of a forward pass."""
        h = self.hidden_size
        yield Param("model.embed_tokens.weight", (self.vocab_size, h), "embed")
        for layer in range(self.num_hidden_layers):
            at = f"model.layers.{layer}"
            yield Param(f"{at}.input_layernorm.weight", (h,), "norm")
            yield from self._attention(f"{at}.self_attn")
            yield Param(f"{at}.post_attention_layernorm.weight", (h,), "norm")
            yield from (
                self._experts(f"{at}.mlp")
                if self.is_moe_layer(layer)
                else _mlp(f"{at}.mlp", h, self.intermediate_size, "mlp")
            )
        yield Param("model.norm.weight", (h,), "norm")
        if not self.tie_word_embeddings:
            yield Param("lm_head.weight", (self.vocab_size, h), "head")

    def _attention(self, at: str) -> Iterator[Param]:
        h, heads = self.hidden_size, self.num_attention_heads
        if self.mla:
            mla = self.mla
            qk = mla.qk_nope_head_dim + mla.qk_rope_head_dim
            if mla.q_lora_rank is None:
                yield Param(f"{at}.q_proj.weight", (heads * qk, h), "attn_qkv")
            else:
                yield Param(f"{at}.q_a_proj.weight", (mla.q_lora_rank, h), "attn_qkv")
                yield Param(f"{at}.q_a_layernorm.weight", (mla.q_lora_rank,), "norm")
                yield Param(f"{at}.q_b_proj.weight", (heads * qk, mla.q_lora_rank), "attn_qkv")
            yield Param(f"{at}.kv_a_proj_with_mqa.weight", (mla.kv_lora_rank + mla.qk_rope_head_dim, h), "attn_qkv")
            yield Param(f"{at}.kv_a_layernorm.weight", (mla.kv_lora_rank,), "norm")
            yield Param(
                f"{at}.kv_b_proj.weight",
                (heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank),
                "attn_qkv",
            )
            yield Param(f"{at}.o_proj.weight", (h, heads * mla.v_head_dim), "attn_out")
            return
        q, kv = heads * self.head_dim, self.num_key_value_heads * self.head_dim
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield Param(f"{at}.{name}_proj.weight", (rows, h), "attn_qkv")
            if self.architecture == "qwen2" or self.attention_bias:
                yield Param(f"{at}.{name}_proj.bias", (rows,), "bias")
        if self.architecture in ("qwen3", "qwen3_moe"):
            yield Param(f"{at}.q_norm.weight", (self.head_dim,), "norm")
            yield Param(f"{at}.k_norm.weight", (self.head_dim,), "norm")
        yield Param(f"{at}.o_proj.weight", (h, q), "attn_out")

    def _experts(self, at: str) -> Iterator[Param]:
        assert self.moe is not None
        yield Param(f"{at}.gate.weight", (self.moe.num_experts, self.hidden_size), "router")
        if self.moe.scoring == "sigmoid":
            yield Param(f"{at}.gate.e_score_correction_bias", (self.moe.num_experts,), "router_bias")
        for expert in range(self.moe.num_experts):
            yield from _mlp(f"{at}.experts.{expert}", self.hidden_size, self.moe.intermediate_size, "expert")
        if self.moe.num_shared:
            width = self.moe.num_shared * self.moe.intermediate_size
            yield from _mlp(f"{at}.shared_experts", self.hidden_size, width, "shared")

    def num_params(self) -> int:
        total = 0
        for param in self.params():
            size = 1
            for dim in param.shape:
                size *= dim
            total += size
        return total


def _mlp(at: str, hidden: int, width: int, kind: str) -> Iterator[Param]:
    yield Param(f"{at}.gate_proj.weight", (width, hidden), f"{kind}_up")
    yield Param(f"{at}.up_proj.weight", (width, hidden), f"{kind}_up")
    yield Param(f"{at}.down_proj.weight", (hidden, width), f"{kind}_down")


def divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def _laptop(model: Model) -> Model:
    """The twin: same family, precision scope and MoE shape, head_dim 64, quantised dimensions multiples of 128."""
    sizes: dict[str, Any] = {
        "name": f"{model.name} (laptop twin)",
        "scale": "full",
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": LAPTOP_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if model.mla else 2,
        "head_dim": 64,
        "max_position_embeddings": min(model.max_position_embeddings, 4096),
        "parallel": Parallel(gpus_per_node=1),
        "path": None,
    }
    if model.moe:
        fewer = {"num_shared": min(model.moe.num_shared, 1), "first_dense": min(model.moe.first_dense, 1)}
        small = {"num_experts": 8, "top_k": 2, "intermediate_size": 128}
        sizes["moe"] = model.moe.model_copy(update=small | fewer)
    if model.mla:
        lora = None if model.mla.q_lora_rank is None else 128
        sizes["mla"] = Mla(q_lora_rank=lora, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=128, v_head_dim=64)
    return model.model_copy(update=sizes)
