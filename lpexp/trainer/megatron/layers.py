"""The local layer spec: megatron-core's own layers with the precision's arithmetic, for machines without its engine.

Each parallel linear multiplies its shard by `precision.linear`, the shard of every checkpoint tensor under its own
name, so a fused matrix gives the codes of its parts. What lies between the products is the embedded decoder's
(model/ops.py), so that at one rank a forward pass differs from the embedded trainer's in no rounding.
Parameters are float32 masters; every use rounds them to the 16-bit model.

Left out: packed sequences and context parallelism, which this attention does not have; dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lpexp.model import Model, Moe, ops
from lpexp.model.decoder import route, spans
from lpexp.precision import Parts, Precision, numeric, side
from lpexp.trainer.megatron import cpu
from lpexp.trainer.megatron.names import Piece, Table

cpu.imported()

from megatron.core.models.gpt.moe_module_specs import MLPSubmodules  # noqa: E402
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.tensor_parallel.mappings import (  # noqa: E402
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.mlp import MLP  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.moe.experts import SequentialMLP  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP  # noqa: E402
from megatron.core.transformer.multi_latent_attention import (  # noqa: E402
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (  # noqa: E402
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)


class Arithmetic:
    """What the layers of one rank compute with; `use` and `renew` when precision or weights change."""

    def __init__(self, model: Model, precision: Precision):
        self.model = model
        self.params = {param.name: param for param in model.params()}
        self.use(precision)

    def use(self, precision: Precision) -> None:
        self.precision, self.plain = precision, precision.plain
        self.half = self.plain.carries == "bfloat16"
        self.renew()

    def renew(self) -> None:
        """The weights have changed: what was made of them is forgotten."""
        self._operands: dict[Linear, tuple[list[Precision], list[Any], Any]] = {}

    def side(self, name: str) -> Precision:
        return side(self.params[name], self.precision, self.model.moe is not None)

    def round(self, x: Tensor) -> Tensor:
        """Values, and their gradient, to what modules hand on."""
        return self.plain.round(x)

    def weight(self, w: Tensor) -> Tensor:
        """A norm, bias or embedding as the 16-bit model holds it; the gradient goes to the master unrounded."""
        return _StraightThrough.apply(w) if self.half else w

    def parts(self, linear: Linear, weight: Tensor) -> dict[str, Parts]:
        """{checkpoint name: this shard of it, quantised}, which is what the product reads."""
        ordered = linear.ordered(weight.detach())
        cut = ordered.split(linear.sizes)
        return {name: self.side(name).quantize(w, name) for name, w in zip(linear.names, cut, strict=True)}

    def linear(self, x: Tensor, weight: Tensor, linear: Linear) -> Tensor:
        """x [..., I] @ weight [O, I].T, its columns in the order of the weight's rows."""
        if linear not in self._operands:
            sides = [self.side(name) for name in linear.names]
            made = [s.operand(p) for s, p in zip(sides, self.parts(linear, weight).values(), strict=True)]
            joined = made[0] if len(made) == 1 else sides[0].join(made) if all(s == sides[0] for s in sides) else None
            self._operands[linear] = sides, made, joined
        sides, made, joined = self._operands[linear]
        ordered = linear.ordered(weight)
        if joined is not None:
            return linear.restored(sides[0].linear(x, ordered, joined))
        cut = ordered.split(linear.sizes)
        return linear.restored(torch.cat([s.linear(x, w, m) for s, w, m in zip(sides, cut, made, strict=True)], -1))

    def accumulate(self, x: Tensor, weight: Tensor) -> Tensor:
        """The plain product with unrounded float32 sums: head and router."""
        return self.plain.accumulate(x, weight)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return numeric.bf16(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Bound:
    """A module that is told what to compute with once the model stands."""

    arithmetic: Arithmetic

    def bind(self, arithmetic: Arithmetic, pieces: list[Piece]) -> None:
        self.arithmetic = arithmetic


class Linear(Bound):
    """The product of a weight whose rows belong to one or more checkpoint tensors."""

    def bind(self, arithmetic: Arithmetic, pieces: list[Piece]) -> None:
        super().bind(arithmetic, pieces)
        rows: dict[str, list[int]] = {}
        for piece in pieces:
            rows.setdefault(piece.name, []).extend(range(piece.at, piece.at + piece.rows[1] - piece.rows[0]))
        self.names, self.sizes = list(rows), [len(own) for own in rows.values()]
        order = [row for own in rows.values() for row in own]
        self._order = self._inverse = None
        if order != list(range(len(order))):  # heads lie interleaved
            self._order = torch.tensor(order)
            self._inverse = torch.argsort(self._order)

    def ordered(self, weight: Tensor) -> Tensor:
        """The rows, tensor by tensor."""
        return weight if self._order is None else weight.index_select(0, self._order.to(weight.device))

    def restored(self, y: Tensor) -> Tensor:
        """Columns as the weight's rows lie."""
        return y if self._inverse is None else y.index_select(-1, self._inverse.to(y.device))


class Column(Linear, ColumnParallelLinear):
    """Split by outputs."""

    def _forward_impl(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, allreduce_dgrad: bool = False,
        sequence_parallel: bool = False, tp_group: Any = None, **rest: Any,
    ) -> Tensor:  # fmt: skip
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        y = self.arithmetic.linear(input, weight, self)
        return y if bias is None else self.arithmetic.round(y + self.arithmetic.weight(bias))


class Row(Linear, RowParallelLinear):
    """Split by inputs; the ranks' results are added by whoever calls."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **rest: Any) -> Tensor:
        return self.arithmetic.linear(input, weight, self)


class Whole(Linear, MegatronModule):
    """Held by every rank of the tensor-parallel group, each at work on its own share of the sequence."""

    def __init__(self, inputs: int, outputs: int, config: Any):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.arithmetic.linear(x, self.weight, self), None


class Norm(Bound, MegatronModule):
    """Root-mean-square norm over the last axis."""

    def __init__(self, config: Any, hidden_size: int, eps: float, **rest: Any):
        super().__init__(config)
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weight = self.arithmetic.weight(self.weight)
        return ops.rms_norm(rows, weight, self.eps, self.arithmetic.half).view(x.shape)


class LatentNorm(Norm):
    """That of a latent, which is 1e-6 whatever the model's epsilon says, as its authors compute it."""

    def __init__(self, config: Any, hidden_size: int, eps: float, **rest: Any):
        super().__init__(config, hidden_size, 1e-6)


class Add(Bound, MegatronModule):
    """The residual sum; asked for as megatron-core asks for its fused bias, dropout and addition."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def forward(self, training: bool, fused: bool) -> Any:
        return self._add

    def _add(self, with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        y, bias = with_bias
        assert bias is None and not dropout
        return ops.add(residual, self.arithmetic.round(y), self.arithmetic.half)


class Gate(Bound, MegatronModule):
    """silu(gate) * up"""

    def forward(self, y: Tensor) -> Tensor:
        rows = ops.silu_mul(y.reshape(-1, y.shape[-1]), self.arithmetic.half)
        return rows.view(*y.shape[:-1], -1)


class CoreAttention(Bound, MegatronModule):
    """Causal attention over whole sequences; key and value heads may be fewer, and of another width, than queries."""

    def __init__(self, config: Any, softmax_scale: float | None = None, **rest: Any):
        super().__init__(config)
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **rest: Any) -> Tensor:
        """[T, B, heads, D] each -> [T, B, heads * Dv]; what lies right of a token changes nothing for it."""
        assert rest.get("packed_seq_params") is None
        length, batch = query.shape[:2]
        q, k = self.arithmetic.round(query), self.arithmetic.round(key)
        rows = [x.transpose(0, 1).reshape(batch * length, *x.shape[2:]) for x in (q, k, value)]
        t_T = torch.arange(length, device=query.device)
        first_BT = (torch.arange(batch, device=query.device) * length)[:, None].expand(-1, length)
        seen = spans(first_BT, (t_T + 1).expand(batch, -1))
        mixed = ops.attention(*rows, seen, self.scale, self.arithmetic.half)
        return mixed.view(batch, length, -1).transpose(0, 1).contiguous()


class Latent(MLASelfAttention):
    """Multi-head latent attention with whole down-projections, as Transformer Engine's spec has them."""

    def __init__(self, config: Any, **rest: Any):
        super().__init__(config, **rest)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = Whole(config.hidden_size, config.q_lora_rank, config)
        joint = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = Whole(config.hidden_size, joint, config)


class Router(Bound, TopKRouter):
    """The embedded decoder's choice of experts, in megatron-core's form."""

    moe: Moe

    def bind(self, arithmetic: Arithmetic, pieces: list[Piece]) -> None:
        super().bind(arithmetic, pieces)
        assert arithmetic.model.moe is not None
        self.moe = arithmetic.model.moe

    def gating(self, input: Tensor) -> Tensor:
        return self.arithmetic.accumulate(input, self.weight)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Shares [tokens, experts] and which of them are chosen."""
        logits = logits.reshape(-1, self.moe.num_experts)
        chosen, share = route(self.moe, logits, self.expert_bias)
        shares = torch.zeros_like(logits).scatter(1, chosen, share)
        return shares, torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)


class Experts(SequentialMLP):
    """Weighs what an expert answers, as engines do; megatron-core's own weighs what it multiplies last."""

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, shares: Tensor) -> tuple[Tensor, None]:
        counts = tokens_per_expert.tolist()
        answers = []
        for expert, own, share in zip(self.local_experts, tokens.split(counts), shares.split(counts), strict=True):
            y = expert(own)[0] if len(own) else own  # of no rows; the ranks that meet here all need a gradient of it
            answers.append(y * share[:, None])
        return torch.cat(answers), None


def block_spec(config: Any, model: Model) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage and the norm behind the last one."""
    first = get_transformer_layer_offset(config)
    own = range(first, first + get_num_layers_to_build(config))
    return TransformerBlockSubmodules([_layer(model, model.is_moe_layer(i)) for i in own], layer_norm=Norm)


def _layer(model: Model, routed: bool) -> ModuleSpec:
    products = MLPSubmodules(linear_fc1=Column, linear_fc2=Row, activation_func=Gate)
    mlp = ModuleSpec(MLP, submodules=products)
    if routed:
        experts = ModuleSpec(Experts, submodules=products)
        shared = ModuleSpec(SharedExpertMLP, submodules=products)
        mlp = ModuleSpec(MoELayer, submodules=MoESubmodules(experts, shared, Router))
    return ModuleSpec(
        TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=_latent() if model.mla else _grouped(model),
            self_attn_bda=Add,
            pre_mlp_layernorm=Norm,
            mlp=mlp,
            mlp_bda=Add,
        ),
    )


def _grouped(model: Model) -> ModuleSpec:
    norm = {"q_layernorm": Norm, "k_layernorm": Norm} if model.architecture in ("qwen3", "qwen3_moe") else {}
    parts = SelfAttentionSubmodules(linear_qkv=Column, core_attention=CoreAttention, linear_proj=Row, **norm)
    return ModuleSpec(SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=parts)


def _latent() -> ModuleSpec:
    return ModuleSpec(
        Latent,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=Column,
            linear_q_down_proj=ColumnParallelLinear,  # the only kind it takes; Latent puts a whole one in its place
            linear_q_up_proj=Column,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=Column,
            core_attention=CoreAttention,
            linear_proj=Row,
            q_layernorm=LatentNorm,
            kv_layernorm=LatentNorm,
        ),
    )


def bind(network: torch.nn.Module, arithmetic: Arithmetic, table: Table) -> None:
    """Tell every layer of a stage what it computes with and whose shards it holds."""
    for name, module in network.named_modules():
        if isinstance(module, Bound):
            module.bind(arithmetic, table.pieces(f"{name}.weight") if isinstance(module, Linear) else [])
