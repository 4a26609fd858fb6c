"""One rank's part of a megatron-core GPTModel, and the log-probabilities of tokens from its hidden states.

The vocabulary stays split over the tensor-parallel group and tokens are scored some at a time, so that no rank ever
holds [tokens, vocabulary]. Left out: virtual pipeline stages, multi-token prediction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lpexp.model import Model
from lpexp.model.decoder import token_logprobs
from lpexp.trainer.megatron import cpu, layers
from lpexp.trainer.megatron.layers import Arithmetic
from lpexp.trainer.megatron.names import Place, Table

cpu.imported()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import finalize_model_grads  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_config import MLATransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset  # noqa: E402

if TYPE_CHECKING:
    from lpexp.trainer.megatron import MegatronTrainerSpec

LOGITS_BYTES = 1 << 26  # of the logits that a rank holds at a time


class Policy(GPTModel):
    """Ends with the final norm: whoever scores asks for the head where it needs it."""

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    @property
    def head(self) -> Tensor:
        """The rows of the head [V / tp, H] that this rank holds; tied ones are the embedding's."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def transformer_config(model: Model, spec: MegatronTrainerSpec) -> TransformerConfig:
    """Megatron-core's words for this architecture and these sizes, for the local layer spec."""
    fields: dict[str, Any] = {
        "num_layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_key_value_heads,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.rms_norm_eps,
        "qk_layernorm": model.architecture in ("qwen3", "qwen3_moe", "deepseek_v3"),
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": model.architecture == "qwen2" or model.attention_bias,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": spec.tp,
        "pipeline_model_parallel_size": spec.pp,
        "context_parallel_size": spec.cp,
        "expert_model_parallel_size": spec.ep,
        "expert_tensor_parallel_size": spec.etp,
        "num_layers_in_last_pipeline_stage": spec.last_stage_layers,
        "sequence_parallel": spec.tp > 1,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",  # the one that takes sequences of any length
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "use_cpu_initialization": cpu.needed(),
        "perform_initialization": False,  # weights are given
        "use_te_activation_func": True,  # an activation that is a module: our Gate
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "finalize_model_grads_func": finalize_model_grads,
    }
    if model.moe:
        fields |= _moe(model)
    if model.mla:
        return MLATransformerConfig(**fields, **_mla(model))
    return TransformerConfig(**fields)


def _moe(model: Model) -> dict[str, Any]:
    moe = model.moe
    assert moe is not None
    sigmoid = moe.scoring == "sigmoid"
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.intermediate_size,
        "moe_shared_expert_intermediate_size": moe.num_shared * moe.intermediate_size or None,
        "moe_layer_freq": [int(model.is_moe_layer(i)) for i in range(model.num_hidden_layers)],
        "moe_router_score_function": moe.scoring,
        "moe_router_pre_softmax": sigmoid or not moe.norm_topk,
        "moe_router_topk_scaling_factor": None if moe.scaling == 1.0 else moe.scaling,
        "moe_router_num_groups": moe.num_groups if moe.num_groups > 1 else None,
        "moe_router_group_topk": moe.top_groups if moe.num_groups > 1 else None,
        "moe_router_enable_expert_bias": sigmoid,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": 0.0,
    }


def _mla(model: Model) -> dict[str, Any]:
    mla, yarn = model.mla, model.rope_scaling
    assert mla is not None
    rope: dict[str, Any] = {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    if yarn:
        rope = {
            "rope_type": "yarn",
            "rotary_scaling_factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    return {
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_head_dim": mla.qk_nope_head_dim,
        "qk_pos_emb_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "rotary_base": model.rope_theta,
        **rope,
    }


def build(model: Model, spec: MegatronTrainerSpec, arithmetic: Arithmetic) -> tuple[Policy, Table]:
    """This rank's stage, its weights not yet set, and the table of what its tensors are."""
    config = transformer_config(model, spec)
    network = Policy(
        config,
        layers.block_spec(config, model),
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=model.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,  # type: ignore[arg-type]
    )
    place = Place(
        (parallel_state.get_tensor_model_parallel_rank(), spec.tp),
        (parallel_state.get_expert_tensor_parallel_rank(), spec.etp),
        (parallel_state.get_expert_model_parallel_rank(), spec.ep),
        get_transformer_layer_offset(config),
    )
    table = Table(model, place)
    layers.bind(network, arithmetic, table)
    if network.pre_process:
        network.embedding.register_forward_hook(lambda module, args, out: arithmetic.weight(out))
    return network, table


def score(
    hidden: Tensor, head: Tensor, tokens: Tensor, temperature: float, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [N] float32 of `tokens` [N] after hidden states [N, H]; head [V / tp, H]."""
    group = parallel_state.get_tensor_model_parallel_group()
    each = max(LOGITS_BYTES // (4 * len(head)), 1)
    found = []
    for rows, own in zip(hidden.split(each), tokens.split(each), strict=True):
        args = (rows, head, own, temperature, arithmetic, group)
        if len(hidden) > each:  # the logits of more than one piece are never kept: they are computed again
            found.append(checkpoint(_score, *args, use_reentrant=False))
        else:
            found.append(_score(*args))
    logprobs, entropy = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def _score(
    hidden: Tensor, head: Tensor, tokens: Tensor, temperature: float, arithmetic: Arithmetic, group: Any
) -> tuple[Tensor, Tensor]:
    logits = arithmetic.accumulate(hidden, head)
    if group.size() == 1:
        return token_logprobs(logits, tokens, temperature)
    z = logits / (temperature or 1.0)
    top = z.detach().amax(-1)
    torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX, group)
    shifted = z - top[:, None]
    total = reduce_from_tensor_model_parallel_region(shifted.exp().sum(-1), group).log()
    own = tokens - group.rank() * len(head)
    held = (own >= 0) & (own < len(head))
    chosen = shifted.gather(1, own.where(held, 0)[:, None])[:, 0].where(held, 0.0)
    with torch.no_grad():
        share = (shifted - total[:, None]).exp()
        expected = reduce_from_tensor_model_parallel_region((share * shifted).sum(-1), group)
    return reduce_from_tensor_model_parallel_region(chosen, group) - total, total.detach() - expected
