"""The embedded decoder: one forward pass for `llama qwen2 qwen3 qwen3_moe deepseek_v3`, shared by trainer and rollout.

Every matrix product goes through a `Weights`, which asks the precision. The same code object scores whole sequences
and decodes token by token from a cache; the two agree bit for bit because no result depends on how many rows are
computed beside it: matrix products pad their rows, attention runs in float64 over a fixed span of keys and is
rounded once, and SiLU is composed of position-independent operations (numerics of each: docs/numerics.md).
Values are carried in float32 and rounded to the precision's activations at module boundaries.

Left out: dropout, sliding windows, fused kernels.
"""

from __future__ import annotations

import ctypes
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lpexp.data import Param
from lpexp.errors import RunError
from lpexp.model import Model
from lpexp.precision import Parts, Precision, numeric

QUERY_ROWS = 4  # float64 products on CPU are row-invariant from 4 rows on
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
Rotation = tuple[Tensor, Tensor]  # cos, sin
SPAN = 16  # keys are padded to a multiple of this


class Weights(ABC):
    """A model's tensors in a precision. B batch, T token, I in, O out."""

    def __init__(self, model: Model, precision: Precision):
        self.precision, self.plain = precision, precision.plain
        self.kinds = {param.name: param for param in model.params()}
        self._together: dict[tuple[str, ...], Any] = {}
        self.covered = {name for name, param in self.kinds.items() if precision.covers(param, model.moe is not None)}

    def round(self, x: Tensor) -> Tensor:
        return self.plain.round(x)

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """A norm, bias or embedding as float32 values."""

    @abstractmethod
    def linear(self, x: Tensor, name: str) -> Tensor:
        """x [..., I] @ W[name] [O, I].T, rounded to the activations' precision."""

    def linears(self, x: Tensor, names: Sequence[str]) -> Sequence[Tensor]:
        """`linear` by each name; one product where the precision can join the matrices without changing a code."""
        joined = self._joined(tuple(names))
        if joined is None:
            return [self.linear(x, name) for name in names]
        return joined(x).split([self.kinds[name].shape[0] for name in names], -1)

    @abstractmethod
    def _joined(self, names: tuple[str, ...]) -> Callable[[Tensor], Tensor] | None: ...

    def side(self, name: str) -> Precision:
        return self.precision if name in self.covered else self.plain

    def _join(self, names: tuple[str, ...], operands: Mapping[str, Any]) -> Any:
        """The operands as one, made once; None where a block would straddle two matrices or their precisions differ."""
        if names not in self._together:
            sides = {name in self.covered for name in names}
            alike = self.side(names[0]).join([operands[name] for name in names]) if len(sides) == 1 else None
            self._together[names] = alike
        return self._together[names]

    def accumulate(self, x: Tensor, name: str) -> Tensor:
        """The same product left in float32: router and head."""
        return self.plain.accumulate(x, self.tensor(name))


class TrainWeights(Weights):
    """The trainer's: float32 leaves (values already rounded to the model's dtype) that collect gradients."""

    def __init__(self, model: Model, precision: Precision, tensors: Mapping[str, Tensor], grad: bool = False):
        super().__init__(model, precision)
        self.leaves = {name: tensor.detach().requires_grad_(grad) for name, tensor in tensors.items()}
        self._operands: dict[str, Any] = {}

    def tensor(self, name: str) -> Tensor:
        return self.leaves[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return self.side(name).linear(x, self.leaves[name], self._operand(name))

    def _operand(self, name: str) -> Any:
        if name not in self._operands:  # once per weight version: quantising costs as much as a small product
            self._operands[name] = self.side(name).operand(self.side(name).quantize(self.leaves[name].detach()))
        return self._operands[name]

    def adopt(self, parts: Mapping[str, Parts]) -> None:
        """Take these parts, quantised from the same weights in the same precision, instead of quantising again."""
        for name, param in self.kinds.items():
            if is_product(param):
                self._operands[name] = self.side(name).operand(parts[name])

    def _joined(self, names: tuple[str, ...]) -> Callable[[Tensor], Tensor] | None:
        operand = self._join(names, {name: self._operand(name) for name in names})
        if operand is None:
            return None
        return lambda x: self.side(names[0]).linear(x, torch.cat([self.leaves[name] for name in names]), operand)


class ServedWeights(Weights):
    """The rollout's: built from what came over the wire, nothing else."""

    def __init__(self, model: Model, precision: Precision, parts: Mapping[str, Parts]):
        super().__init__(model, precision)
        missing = sorted(set(self.kinds) - set(parts))
        if missing:
            raise KeyError(f"served weights lack {missing[0]} and {len(missing) - 1} more")
        self._operands = {}
        for name, param in self.kinds.items():
            side = self.side(name)
            self._operands[name] = (
                side.operand(parts[name]) if is_product(param) else self.plain.dequantize(parts[name])
            )
        if model.tie_word_embeddings:
            self._operands["lm_head.weight"] = self._operands["model.embed_tokens.weight"]

    def tensor(self, name: str) -> Tensor:
        return self._operands[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return self.side(name).serve(x, self._operands[name])

    def _joined(self, names: tuple[str, ...]) -> Callable[[Tensor], Tensor] | None:
        operand = self._join(names, self._operands)
        return None if operand is None else lambda x: self.side(names[0]).serve(x, operand)


def is_product(param: Param) -> bool:
    """Is this a matrix that `linear` multiplies with? Embedding, head and router are used as they are."""
    return len(param.shape) == 2 and param.kind not in ("embed", "head", "router")


class Cache:
    """Keys and values of `slots` sequences, each up to `span` tokens; in the type that attention reads them in."""

    dtype = torch.float64

    def __init__(self, model: Model, slots: int, span: int, device: torch.device | str = "cpu"):
        k_dim, v_dim, heads = head_dims(model)
        self.span = span
        size = (slots, heads, span)
        self.k = [torch.zeros(*size, k_dim, dtype=self.dtype, device=device) for _ in range(model.num_hidden_layers)]
        self.v = [torch.zeros(*size, v_dim, dtype=self.dtype, device=device) for _ in range(model.num_hidden_layers)]

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole sequences to other slots."""
        if sources:
            for tensor in (*self.k, *self.v):
                tensor[list(targets)] = tensor[list(sources)]


def head_dims(model: Model) -> tuple[int, int, int]:
    """(key dim, value dim, key/value heads) of the attention core."""
    if model.mla:
        return model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim, model.mla.v_head_dim, model.num_attention_heads
    return model.head_dim, model.head_dim, model.num_key_value_heads


def span_of(length: int) -> int:
    """Keys that attention runs over for sequences of at most `length` tokens."""
    return -(-length // SPAN) * SPAN


class Decoder:
    """The forward pass of one architecture; holds rotary tables and no weights."""

    def __init__(self, model: Model, device: torch.device | str = "cpu"):
        self.model = model
        self.rope = Rope(model, device)
        k_dim, _, _ = head_dims(model)
        self.scale = k_dim**-0.5
        if model.mla and model.rope_scaling and model.rope_scaling.mscale_all_dim:
            self.scale *= yarn_mscale(model.rope_scaling.factor, model.rope_scaling.mscale_all_dim) ** 2

    def logits(self, weights: Weights, tokens_BT: Tensor, span: int | None = None) -> Tensor:
        """[B, T] token ids -> float32 logits [B, T, V]; causal, so right padding changes nothing before it."""
        return self.head(weights, self.hidden(weights, tokens_BT, span=span))

    def head(self, weights: Weights, hidden: Tensor) -> Tensor:
        tied = self.model.tie_word_embeddings
        return weights.accumulate(hidden, "model.embed_tokens.weight" if tied else "lm_head.weight")

    def hidden(
        self,
        weights: Weights,
        tokens_BT: Tensor,
        span: int | None = None,
        keep: list[tuple[Tensor, Tensor]] | None = None,
        routes: list[Tensor] | None = None,
    ) -> Tensor:
        """Whole sequences -> final normed hidden states [B, T, H].

        `span` fixes the padded key length (default: T rounded up); `keep` receives each layer's (k, v)
        [B, heads, T, D]; `routes` each mixture-of-experts layer's choices [B, T, top_k].
        """
        batch, length = tokens_BT.shape
        span = max(span or 0, span_of(length))
        allowed_TS = torch.ones(length, span, dtype=torch.bool, device=tokens_BT.device).tril()

        def attend(layer: int, *rows_R: Tensor) -> Tensor:
            q, k, v = (rows.unflatten(0, (batch, length)).transpose(1, 2) for rows in rows_R)
            if keep is not None:
                keep.append((k, v))
            mixed = attention(q, pad_keys(k, span), pad_keys(v, span), allowed_TS, self.scale)
            return mixed.transpose(1, 2).flatten(0, 1)

        positions_R = torch.arange(length, device=tokens_BT.device).repeat(batch)
        x = self._layers(weights, tokens_BT.reshape(-1), positions_R, attend, routes)
        if routes is not None:
            routes[:] = [chosen.unflatten(0, (batch, length)) for chosen in routes]
        return x.unflatten(0, (batch, length))

    def continued(
        self,
        weights: Weights,
        prompts_PT: Tensor,
        answers_NT: Tensor,
        owner_N: Tensor,
        lengths_N: Tensor,
        span: int | None = None,
    ) -> Tensor:
        """Answers whose prompts are computed once for all of them -> hidden states [P * Tp + N * Ta + filler, H].

        prompts_PT [P, Tp] and answers_NT [N, Ta] are right-padded; answer n continues prompt owner_N[n], which has
        lengths_N[n] tokens. The same bits as `hidden` of the joined sequences, for a fraction of the rows.
        """
        (prompts, tp), (answers, ta) = prompts_PT.shape, answers_NT.shape
        device, split = prompts_PT.device, prompts * tp
        span = max(span or 0, span_of(tp + ta))
        causal_TS = torch.ones(tp, span, dtype=torch.bool, device=device).tril()
        places_NT = lengths_N[:, None] + torch.arange(ta, device=device)  # absolute positions of the answers' tokens
        keys_S = torch.arange(span, device=device)
        allowed_NTS = keys_S <= places_NT[..., None]
        ragged = bool((lengths_N != tp).any())
        # Where key s of an answer lies in [prompt | answer]; past the end anything will do, it is not allowed.
        source_NS = torch.where(keys_S < lengths_N[:, None], keys_S, keys_S - lengths_N[:, None] + tp)
        source_NS = source_NS.clamp_max(tp + ta - 1)

        filler = -(split + answers * ta) % numeric.PAD_ROWS  # padded once here, no product needs to pad again
        sizes = (split, answers * ta, filler)

        def joined(before: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
            before = before.unflatten(0, (prompts, tp)).transpose(1, 2)  # [P, heads, Tp, D]
            own = own.unflatten(0, (answers, ta)).transpose(1, 2)  # [N, heads, Ta, D]
            whole = torch.cat((before.index_select(0, owner_N), own), 2)
            if ragged:
                index = source_NS[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3])
                return pad_keys(before, span), whole.gather(2, index)
            return pad_keys(before, span), pad_keys(whole, span)

        def attend(layer: int, q_R: Tensor, k_R: Tensor, v_R: Tensor) -> Tensor:
            (q, q_own, _), (k, k_own, _), (v, v_own, _) = (rows.split(sizes) for rows in (q_R, k_R, v_R))
            (k, k_whole), (v, v_whole) = joined(k, k_own), joined(v, v_own)
            q = q.unflatten(0, (prompts, tp)).transpose(1, 2)
            first = attention(q, k, v, causal_TS, self.scale).transpose(1, 2).flatten(0, 1)
            q = q_own.unflatten(0, (answers, ta)).transpose(1, 2)
            second = attention(q, k_whole, v_whole, allowed_NTS, self.scale).transpose(1, 2).flatten(0, 1)
            return torch.cat((first, second, first.new_zeros(filler, *first.shape[1:])))

        none = prompts_PT.new_zeros(filler)
        tokens_R = torch.cat((prompts_PT.reshape(-1), answers_NT.reshape(-1), none))
        positions_R = torch.cat((torch.arange(tp, device=device).repeat(prompts), places_NT.reshape(-1), none))
        return self._layers(weights, tokens_R, positions_R, attend, None)

    def decode(
        self,
        weights: Weights,
        tokens_B: Tensor,
        positions_B: Tensor,
        cache: Cache,
        routes: list[Tensor] | None = None,
    ) -> Tensor:
        """One token for each of the cache's first B sequences, at its position -> hidden [B, H]."""
        rows = len(tokens_B)
        allowed_B1S = (torch.arange(cache.span, device=tokens_B.device) <= positions_B[:, None])[:, None]
        rows_B = torch.arange(rows, device=tokens_B.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.k[layer][rows_B, :, positions_B] = k.to(cache.dtype)
            cache.v[layer][rows_B, :, positions_B] = v.to(cache.dtype)
            return attention(q[:, :, None], cache.k[layer][:rows], cache.v[layer][:rows], allowed_B1S, self.scale)[
                :, :, 0
            ]

        return self._layers(weights, tokens_B, positions_B, attend, routes)

    def _layers(
        self, weights: Weights, tokens_R: Tensor, positions_R: Tensor, attend: Any, routes: list[Tensor] | None
    ) -> Tensor:
        """R rows, each a token at its position; only `attend` (of q, k, v [R, heads, D]) knows how they are ordered."""
        model = self.model
        x = torch.nn.functional.embedding(tokens_R, weights.tensor("model.embed_tokens.weight"))  # [R, H]
        rope = self.rope(positions_R)
        for layer in range(model.num_hidden_layers):
            at = f"model.layers.{layer}"
            normed = self._norm(weights, x, f"{at}.input_layernorm.weight")
            project = self._latent if model.mla else self._grouped
            mixed = weights.round(attend(layer, *project(weights, normed, f"{at}.self_attn", rope))).flatten(1)
            x = weights.round(x + weights.linear(mixed, f"{at}.self_attn.o_proj.weight"))
            normed = self._norm(weights, x, f"{at}.post_attention_layernorm.weight")
            if model.is_moe_layer(layer):
                x = weights.round(x + self._experts(weights, normed, f"{at}.mlp", routes))
            else:
                x = weights.round(x + mlp(weights, normed, f"{at}.mlp"))
        return self._norm(weights, x, "model.norm.weight")

    def _norm(self, weights: Weights, x: Tensor, name: str) -> Tensor:
        return rms_norm(weights, x, name, self.model.rms_norm_eps)

    def _grouped(self, weights: Weights, x: Tensor, at: str, rope: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Grouped-query attention: q [R, Hq, D], k and v [R, Hkv, D]."""
        names = [f"{at}.{name}_proj" for name in "qkv"]
        made = list(weights.linears(x, [f"{name}.weight" for name in names]))
        if f"{names[0]}.bias" in weights.kinds:
            made = [weights.round(y + weights.tensor(f"{n}.bias")) for n, y in zip(names, made, strict=True)]
        q, k, v = (y.unflatten(-1, (-1, self.model.head_dim)) for y in made)  # [R, heads, D]
        sizes = (q.shape[1], k.shape[1])
        both = torch.cat((q, k), 1)  # norm and rotation treat each head alike
        if f"{at}.q_norm.weight" in weights.kinds:
            scales = [
                weights.tensor(f"{at}.{n}_norm.weight").expand(heads, -1) for n, heads in zip("qk", sizes, strict=True)
            ]
            both = weights.round(_RmsNorm.apply(both, torch.cat(scales), self.model.rms_norm_eps))  # type: ignore[arg-type]
        q, k = weights.round(rotate(both, rope)).split(sizes, 1)
        return q, k, v

    def _latent(self, weights: Weights, x: Tensor, at: str, rope: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Multi-head latent attention; keys and values are cached decompressed, which changes no value."""
        mla, heads = self.model.mla, self.model.num_attention_heads
        assert mla is not None
        if mla.q_lora_rank is None:
            q = weights.linear(x, f"{at}.q_proj.weight")
        else:
            latent = rms_norm(weights, weights.linear(x, f"{at}.q_a_proj.weight"), f"{at}.q_a_layernorm.weight", 1e-6)
            q = weights.linear(latent, f"{at}.q_b_proj.weight")
        q = q.unflatten(-1, (heads, -1))  # [R, heads, nope + rope]
        q_nope, q_rope = q.split((mla.qk_nope_head_dim, mla.qk_rope_head_dim), -1)
        down = weights.linear(x, f"{at}.kv_a_proj_with_mqa.weight")
        latent, k_rope = down.split((mla.kv_lora_rank, mla.qk_rope_head_dim), -1)
        latent = rms_norm(weights, latent, f"{at}.kv_a_layernorm.weight", 1e-6)
        kv = weights.linear(latent, f"{at}.kv_b_proj.weight").unflatten(-1, (heads, -1))
        k_nope, v = kv.split((mla.qk_nope_head_dim, mla.v_head_dim), -1)
        q_rope = weights.round(rotate(deinterleave(q_rope), rope))
        k_rope = weights.round(rotate(deinterleave(k_rope)[:, None], rope)).expand(-1, heads, -1)
        return torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, k_rope), -1), v

    def _experts(self, weights: Weights, x: Tensor, at: str, routes: list[Tensor] | None) -> Tensor:
        """Mixture of experts: each token's top_k experts, weighted; sums run in expert order in float32."""
        moe = self.model.moe
        assert moe is not None
        scores_RE = weights.accumulate(x, f"{at}.gate.weight")
        if moe.scoring == "sigmoid":
            scores_RE = 1 / (1 + torch.exp(-scores_RE))
            ranked_RE = scores_RE + weights.tensor(f"{at}.gate.e_score_correction_bias")
            if moe.num_groups > 1:
                grouped = ranked_RE.unflatten(-1, (moe.num_groups, -1))
                best_RG = grouped.topk(2, -1).values.sum(-1)
                kept = torch.zeros_like(best_RG, dtype=torch.bool).scatter(
                    1, best_RG.topk(moe.top_groups, -1).indices, True
                )
                ranked_RE = grouped.masked_fill(~kept[..., None], 0.0).flatten(1)
        else:
            scores_RE = ranked_RE = torch.softmax(scores_RE, -1)
        chosen_RK = ranked_RE.detach().topk(moe.top_k, -1).indices
        if routes is not None:
            routes.append(chosen_RK)
        share_RK = scores_RE.gather(1, chosen_RK)
        if moe.norm_topk:
            share_RK = share_RK / (share_RK.sum(-1, keepdim=True) + (1e-20 if moe.scoring == "sigmoid" else 0.0))
        share_RK = share_RK * moe.scaling
        out = torch.zeros_like(x)
        for expert in range(moe.num_experts):
            rows, ranks = (chosen_RK == expert).nonzero(as_tuple=True)
            if len(rows):
                y = mlp(weights, x[rows], f"{at}.experts.{expert}") * share_RK[rows, ranks, None]
                out = out.index_add(0, rows, y)  # a token meets an expert once, so the order of the sum is the experts'
        if moe.num_shared:
            out = out + mlp(weights, x, f"{at}.shared_experts")
        return weights.round(out)


def mlp(weights: Weights, x: Tensor, at: str) -> Tensor:
    """SwiGLU on rows [R, H]."""
    gate, up = weights.linears(x, [f"{at}.gate_proj.weight", f"{at}.up_proj.weight"])
    return weights.linear(weights.round(_SiluMul.apply(gate, up)), f"{at}.down_proj.weight")  # type: ignore[arg-type]


def rms_norm(weights: Weights, x: Tensor, name: str, eps: float) -> Tensor:
    """Root-mean-square norm in float32 over the last axis."""
    return weights.round(_RmsNorm.apply(x, weights.tensor(name), eps))  # type: ignore[arg-type]


class _SiluMul(torch.autograd.Function):
    """silu(gate) * up; composed, because torch's own SiLU depends on the element's position in the tensor."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gate / (torch.exp(-gate).add_(1)) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        share = torch.exp(-gate).add_(1).reciprocal_()  # sigmoid
        silu = gate * share
        slope = (1 - share).mul_(silu).add_(share)  # share * (1 + gate * (1 - share))
        return slope.mul_(grad).mul_(up), silu.mul_(grad)


class _RmsNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        factor = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        normed = x * factor
        ctx.save_for_backward(normed, factor, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        normed, factor, weight = ctx.saved_tensors
        leading = grad.dim() - weight.dim()
        dw = (grad * normed).flatten(0, leading - 1).sum(0) if ctx.needs_input_grad[1] else None
        dy = grad * weight
        dx = (dy - normed * (dy * normed).mean(-1, keepdim=True)).mul_(factor)
        return dx, dw, None


def attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v in float64, rounded once to float32; gradients in float32.

    q [B, Hq, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], allowed [T, S] or [B, T, S] -> [B, Hq, T, Dv].
    Query rows are padded to QUERY_ROWS and keys to a fixed span, so that a sequence scored whole and one decoded
    token by token run the same sums. Forbidden keys have weight exactly 0.
    """
    return _Attention.apply(q, k, v, allowed[None, None] if allowed.dim() == 2 else allowed[:, None], scale)  # type: ignore[return-value]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
        batch, heads, length, dim = q.shape
        groups = k.shape[1]
        rows = q.double().reshape(batch, groups, -1, dim)  # [B, Hkv, Hq/Hkv * T, D]
        short = -rows.shape[2] % QUERY_ROWS
        if short:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, short))
        scores = (rows @ k.double().transpose(2, 3)).mul_(scale)  # [B, Hkv, R, S]
        own = scores[:, :, : rows.shape[2] - short].unflatten(2, (heads // groups, length))
        own.masked_fill_(~allowed[:, :, None], -torch.inf)
        weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
        total = weights.sum(-1, keepdim=True)
        mixed = (weights @ v.double()).div_(total)[:, :, : rows.shape[2] - short]  # [B, Hkv, R, Dv]
        out = mixed.reshape(batch, heads, length, -1).float()
        if any(ctx.needs_input_grad):
            share = weights.div_(total)[:, :, : rows.shape[2] - short].float()
            ctx.save_for_backward(q, k, v, share, out)
            ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        q, k, v, share, out = ctx.saved_tensors  # share: the softmax [B, Hkv, R, S]
        batch, groups, rows = share.shape[:3]
        dy = grad.reshape(batch, groups, rows, -1)
        dv = share.transpose(2, 3) @ dy
        inner = (grad * out).sum(-1, keepdim=True).reshape(batch, groups, rows, 1)
        dscores = (dy @ v.float().transpose(2, 3)).sub_(inner).mul_(share).mul_(ctx.scale)
        dq = (dscores @ k.float()).reshape(q.shape)
        dk = dscores.transpose(2, 3) @ q.reshape(batch, groups, rows, -1)
        return dq, dk, dv, None, None


def pad_keys(x: Tensor, span: int) -> Tensor:
    """[B, heads, T, D] -> [B, heads, span, D], zeros behind."""
    return torch.nn.functional.pad(x, (0, 0, 0, span - x.shape[2]))


def deinterleave(x: Tensor) -> Tensor:
    """DeepSeek stores rotary pairs side by side; bring them to halves."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def rotate(x: Tensor, rope: Rotation) -> Tensor:
    """Rotary embedding of x [R, heads, D] by (cos, sin) [R, 1, D]."""
    cos, sin = rope
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class Rope:
    """Rotary tables in float32, made once; with YaRN where the card says so (arXiv 2309.00071)."""

    def __init__(self, model: Model, device: torch.device | str):
        dim = model.mla.qk_rope_head_dim if model.mla else model.head_dim
        inverse = 1.0 / model.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        self.factor = 1.0
        if yarn := model.rope_scaling:
            both = yarn.mscale and yarn.mscale_all_dim
            self.factor = (
                yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
                if both
                else yarn_mscale(yarn.factor)
            )

            def turn(rotations: float) -> float:  # the dimension that turns this often over the original context
                length = yarn.original_max_position_embeddings
                return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(model.rope_theta))

            low, high = max(math.floor(turn(yarn.beta_fast)), 0), min(math.ceil(turn(yarn.beta_slow)), dim - 1)
            ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
            inverse = inverse / yarn.factor * ramp + inverse * (1 - ramp)
        self.inverse = inverse.to(device)
        self.cos = self.sin = torch.empty(0)
        self._grow(256)

    def _grow(self, length: int) -> None:
        angle = torch.arange(length, dtype=torch.float32, device=self.inverse.device)[:, None] * self.inverse
        angle = torch.cat((angle, angle), -1)  # [length, D]
        self.cos, self.sin = angle.cos() * self.factor, angle.sin() * self.factor

    def __call__(self, positions_R: Tensor) -> Rotation:
        longest = int(positions_R.max()) + 1
        if longest > len(self.cos):
            self._grow(1 << (longest - 1).bit_length())
        return self.cos[positions_R][:, None], self.sin[positions_R][:, None]


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) at `tokens`; logits [..., V] float32, tokens [...] -> [...] float32.

    The one function behind lp_R, lp_T and lp_C. Temperature 0 (greedy) reports at temperature 1.
    """
    z = logits / (temperature or 1.0)
    return z.gather(-1, tokens[..., None])[..., 0] - z.logsumexp(-1)


def token_entropy(logits: Tensor, temperature: float) -> Tensor:
    """Entropy in nat of softmax(logits / temperature) over the whole vocabulary: [..., V] -> [...]."""
    z = logits / (temperature or 1.0)
    total = z.logsumexp(-1)
    return total - ((z - total[..., None]).exp() * z).sum(-1)


def initial_tensors(model: Model, seed: int) -> dict[str, Tensor]:
    """Random start: normal with the card's initializer_range, norms 1, biases 0; one stream a tensor."""
    tensors = {}
    for index, param in enumerate(model.params()):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        if param.kind == "norm":
            tensor = torch.ones(param.shape)
        elif param.kind in ("bias", "router_bias"):
            tensor = torch.zeros(param.shape)
        else:
            tensor = torch.randn(param.shape, generator=generator) * model.initializer_range
        tensors[param.name] = tensor
    return tensors


def pick_device(wish: str, index: int = 0) -> torch.device:
    """auto: a GPU if there is one. Worker `index` takes the GPU of that number, counted round (-1: the last)."""
    if wish == "auto":
        wish = "cuda" if torch.cuda.is_available() else "cpu"
    if wish == "cuda" and not torch.cuda.is_available():
        raise RunError("trainer.device or rollout.device is cuda, but torch sees no GPU here; use auto or cpu")
    return torch.device("cuda", index % torch.cuda.device_count()) if wish == "cuda" else torch.device(wish)


def settle(threads: int) -> None:
    """Prepare this process for tensor work: its threads, and memory that is kept instead of handed back.

    glibc returns every large tensor to the kernel and faults its pages in again at the next one, which costs as much
    as the arithmetic of a small model.
    """
    torch.set_num_threads(threads)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc; elsewhere only the speed differs
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        libc.mallopt(M_ARENA_MAX, 1)  # other threads' arenas are cut off at 64 MiB and fault again
