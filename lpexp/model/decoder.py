"""The embedded decoder: one forward pass for `llama qwen2 qwen3 qwen3_moe deepseek_v3`, shared by trainer and rollout.

Every matrix product goes through a `Weights`, which asks the precision. The same code object scores whole sequences
and decodes token by token from a cache; the two agree bit for bit because no result depends on how many rows are
computed beside it: matrix products pad their rows, attention sums over a row's own keys in float64 and is rounded
once, everything between goes row by row (ops.py; numerics of each: docs/numerics.md).
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
from lpexp.model import Model, ops
from lpexp.model.ops import Rotation
from lpexp.precision import Parts, Precision, numeric

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h


class Weights(ABC):
    """A model's tensors in a precision. B batch, T token, I in, O out."""

    def __init__(self, model: Model, precision: Precision):
        self.precision, self.plain = precision, precision.plain
        self.half = self.plain.carries == "bfloat16"
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

    def joined(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """`linear` by each name, side by side; one product where the precision can join the matrices without changing
        a code."""
        product = self._joined(tuple(names))
        return torch.cat([self.linear(x, name) for name in names], -1) if product is None else product(x)

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


class Routes:
    """The routers of one forward pass over R rows: what they chose, and what they are made to use instead.

    `given` [R, moe layers, top_k] holds the choices of another pass, in the order in which their shares are summed; -1
    leaves a row its own. `chosen` and, if `margins` are asked for, `margin` receive a tensor for each layer with
    experts: a row's own choice [R, top_k], and by how much its last expert beat the first that was left out [R]. Rows
    beyond R are padding.
    """

    def __init__(self, given: Tensor | None = None, margins: bool = False):
        self.given, self.margins = given, margins
        self.chosen: list[Tensor] = []
        self.margin: list[Tensor] = []

    def choose(self, ranked_RE: Tensor, top_k: int) -> Tensor:
        """The experts [R, top_k] of the next layer."""
        own = ranked_RE.topk(top_k, -1).indices
        if self.margins and top_k < ranked_RE.shape[-1]:
            best = ranked_RE.topk(top_k + 1, -1).values
            self.margin.append(best[:, -2] - best[:, -1])
        layer = len(self.chosen)
        self.chosen.append(own)
        if self.given is None:
            return own
        given = torch.full_like(own, -1)
        given[: len(self.given)] = self.given[:, layer]
        return given.where(given >= 0, own)


class Cache:
    """Keys and values of `slots` sequences, each up to `span` tokens: a row a token, [slots * span, heads, D]."""

    def __init__(self, model: Model, slots: int, span: int, device: torch.device | str = "cpu"):
        k_dim, v_dim, heads = head_dims(model)
        self.span = span
        rows, layers = slots * span, model.num_hidden_layers
        self.k = [torch.zeros(rows, heads, k_dim, device=device) for _ in range(layers)]
        self.v = [torch.zeros(rows, heads, v_dim, device=device) for _ in range(layers)]

    def put(self, layer: int, slot: int, k: Tensor, v: Tensor) -> None:
        """The first tokens of consecutive slots: k and v [slots, T, heads, D]."""
        for kept, given in ((self.k[layer], k), (self.v[layer], v)):
            kept.unflatten(0, (-1, self.span))[slot : slot + len(given), : given.shape[1]] = given

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole sequences to other slots."""
        if sources:
            for kept in (*self.k, *self.v):
                slots = kept.unflatten(0, (-1, self.span))
                slots[list(targets)] = slots[list(sources)]


def head_dims(model: Model) -> tuple[int, int, int]:
    """(key dim, value dim, key/value heads) of the attention core."""
    if model.mla:
        return model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim, model.mla.v_head_dim, model.num_attention_heads
    return model.head_dim, model.head_dim, model.num_key_value_heads


class Decoder:
    """The forward pass of one architecture; holds rotary tables and no weights."""

    def __init__(self, model: Model, device: torch.device | str = "cpu"):
        self.model = model
        self.rope = Rope(model, device)
        k_dim, _, _ = head_dims(model)
        self.scale = k_dim**-0.5
        if model.mla and model.rope_scaling and model.rope_scaling.mscale_all_dim:
            self.scale *= yarn_mscale(model.rope_scaling.factor, model.rope_scaling.mscale_all_dim) ** 2

    def logits(self, weights: Weights, tokens_BT: Tensor) -> Tensor:
        """[B, T] token ids -> float32 logits [B, T, V]; causal, so right padding changes nothing before it."""
        return self.head(weights, self.hidden(weights, tokens_BT))

    def head(self, weights: Weights, hidden: Tensor) -> Tensor:
        tied = self.model.tie_word_embeddings
        return weights.accumulate(hidden, "model.embed_tokens.weight" if tied else "lm_head.weight")

    def hidden(
        self,
        weights: Weights,
        tokens_BT: Tensor,
        keep: list[tuple[Tensor, Tensor]] | None = None,
        routes: Routes | None = None,
    ) -> Tensor:
        """Whole sequences -> final normed hidden states [B, T, H].

        `keep` receives each layer's (k, v) [B, T, heads, D]; the rows of `routes` are the tokens, sequence by sequence.
        """
        batch, length = tokens_BT.shape
        t_T = torch.arange(length, device=tokens_BT.device)
        first_BT = (torch.arange(batch, device=tokens_BT.device) * length)[:, None].expand(-1, length)
        seen_R4 = spans(first_BT, (t_T + 1).expand(batch, -1))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
            if keep is not None:
                own = (x[: batch * length].unflatten(0, (batch, length)) for x in (k, v))
                keep.append((next(own), next(own)))
            return ops.attention(q, k, v, seen, self.scale, weights.half)

        x = self._layers(weights, tokens_BT.reshape(-1), t_T.repeat(batch), seen_R4, attend, routes)
        return x.unflatten(0, (batch, length))

    def continued(
        self,
        weights: Weights,
        prompts_PT: Tensor,
        answers_NT: Tensor,
        owner_N: Tensor,
        lengths_N: Tensor,
        routes: Routes | None = None,
    ) -> Tensor:
        """Answers whose prompts are computed once for all of them -> hidden states [P * Tp + N * Ta, H].

        prompts_PT [P, Tp] and answers_NT [N, Ta] are right-padded; answer n continues prompt owner_N[n], which has
        lengths_N[n] tokens. The same bits as `hidden` of the joined sequences, for a fraction of the rows.
        """
        (prompts, tp), (answers, ta) = prompts_PT.shape, answers_NT.shape
        device = prompts_PT.device
        t_T, j_T = torch.arange(tp, device=device), torch.arange(ta, device=device)
        p_P, n_N = torch.arange(prompts, device=device), torch.arange(answers, device=device)
        seen_P = spans((p_P * tp)[:, None].expand(-1, tp), (t_T + 1).expand(prompts, -1))
        own = (prompts * tp + n_N * ta)[:, None].expand(-1, ta)
        before, length = (x[:, None].expand(-1, ta) for x in (owner_N * tp, lengths_N))
        seen_N = spans(before, length, own, (j_T + 1).expand(answers, -1))
        tokens_R = torch.cat((prompts_PT.reshape(-1), answers_NT.reshape(-1)))
        positions_R = torch.cat((t_T.repeat(prompts), (lengths_N[:, None] + j_T).reshape(-1)))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
            return ops.attention(q, k, v, seen, self.scale, weights.half)

        return self._layers(weights, tokens_R, positions_R, torch.cat((seen_P, seen_N)), attend, routes)

    def decode(
        self,
        weights: Weights,
        tokens_B: Tensor,
        positions_B: Tensor,
        cache: Cache,
        routes: Routes | None = None,
    ) -> Tensor:
        """One token for each of the cache's first B sequences, at its position -> hidden [B, H]."""
        rows = len(tokens_B)
        first_B = torch.arange(rows, device=tokens_B.device) * cache.span
        at_B = first_B + positions_B

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
            cache.k[layer].index_copy_(0, at_B, k[:rows])
            cache.v[layer].index_copy_(0, at_B, v[:rows])
            return ops.attention(q, cache.k[layer], cache.v[layer], seen, self.scale, weights.half)

        return self._layers(weights, tokens_B, positions_B, spans(first_B, positions_B + 1), attend, routes)

    def _layers(
        self,
        weights: Weights,
        tokens_R: Tensor,
        positions_R: Tensor,
        seen_R4: Tensor,
        attend: Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor],
        routes: Routes | None,
    ) -> Tensor:
        """R rows, each a token at its position; `attend` (layer, q, k, v, seen) says whose keys `seen` speaks of.

        Rows are padded here once, with rows that see nothing, so that no product needs to pad.
        """
        model, rows = self.model, len(tokens_R)
        if more := -rows % numeric.PAD_ROWS:
            pad = torch.nn.functional.pad
            tokens_R, positions_R, seen_R4 = (
                pad(tokens_R, (0, more)),
                pad(positions_R, (0, more)),
                pad(seen_R4, (0, 0, 0, more)),
            )
        x = torch.nn.functional.embedding(tokens_R, weights.tensor("model.embed_tokens.weight"))  # [R, H]
        turn = self.rope(positions_R)
        for layer in range(model.num_hidden_layers):
            at = f"model.layers.{layer}"
            normed = self._norm(weights, x, f"{at}.input_layernorm.weight")
            project = self._latent if model.mla else self._grouped
            q, k, v = project(weights, normed, f"{at}.self_attn", turn)
            mixed = attend(layer, q, k, v, seen_R4).flatten(1)
            x = ops.add(x, weights.linear(mixed, f"{at}.self_attn.o_proj.weight"), weights.half)
            normed = self._norm(weights, x, f"{at}.post_attention_layernorm.weight")
            if model.is_moe_layer(layer):
                x = ops.add(x, self._experts(weights, normed, f"{at}.mlp", routes), weights.half)
            else:
                x = ops.add(x, mlp(weights, normed, f"{at}.mlp"), weights.half)
        return self._norm(weights, x, "model.norm.weight")[:rows]

    def _norm(self, weights: Weights, x: Tensor, name: str) -> Tensor:
        return ops.rms_norm(x, weights.tensor(name), self.model.rms_norm_eps, weights.half)

    def _grouped(self, weights: Weights, x: Tensor, at: str, turn: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Grouped-query attention: q [R, Hq, D], k and v [R, Hkv, D]."""
        model, names = self.model, [f"{at}.{name}_proj" for name in "qkv"]
        y = weights.joined(x, [f"{name}.weight" for name in names])
        if f"{names[0]}.bias" in weights.kinds:
            y = weights.round(y + torch.cat([weights.tensor(f"{name}.bias") for name in names]))
        q_norm, k_norm = (
            weights.tensor(name) if name in weights.kinds else None
            for name in (f"{at}.q_norm.weight", f"{at}.k_norm.weight")
        )
        sizes = (model.num_attention_heads, model.num_key_value_heads)
        return ops.heads(y, q_norm, k_norm, model.rms_norm_eps, turn, *sizes, weights.half)

    def _latent(self, weights: Weights, x: Tensor, at: str, turn: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Multi-head latent attention; keys and values are cached decompressed, which changes no value."""
        mla, heads = self.model.mla, self.model.num_attention_heads
        assert mla is not None
        if mla.q_lora_rank is None:
            q = weights.linear(x, f"{at}.q_proj.weight")
        else:
            latent = self._latent_norm(
                weights, weights.linear(x, f"{at}.q_a_proj.weight"), f"{at}.q_a_layernorm.weight"
            )
            q = weights.linear(latent, f"{at}.q_b_proj.weight")
        q = q.unflatten(-1, (heads, -1))  # [R, heads, nope + rope]
        q_nope, q_rope = q.split((mla.qk_nope_head_dim, mla.qk_rope_head_dim), -1)
        down = weights.linear(x, f"{at}.kv_a_proj_with_mqa.weight")
        latent, k_rope = down.split((mla.kv_lora_rank, mla.qk_rope_head_dim), -1)
        latent = self._latent_norm(weights, latent, f"{at}.kv_a_layernorm.weight")
        kv = weights.linear(latent, f"{at}.kv_b_proj.weight").unflatten(-1, (heads, -1))
        k_nope, v = kv.split((mla.qk_nope_head_dim, mla.v_head_dim), -1)
        q_rope = ops.rotate(deinterleave(q_rope), turn, weights.half)
        k_rope = ops.rotate(deinterleave(k_rope)[:, None], turn, weights.half).expand(-1, heads, -1)
        return torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, k_rope), -1), v

    def _latent_norm(self, weights: Weights, x: Tensor, name: str) -> Tensor:
        return ops.rms_norm(x, weights.tensor(name), 1e-6, weights.half)  # whatever rms_norm_eps says, as upstream

    def _experts(self, weights: Weights, x: Tensor, at: str, routes: Routes | None) -> Tensor:
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
        chosen_RK = (routes or Routes()).choose(ranked_RE.detach(), moe.top_k)
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
    both = weights.joined(x, [f"{at}.gate_proj.weight", f"{at}.up_proj.weight"])
    return weights.linear(ops.silu_mul(both, weights.half), f"{at}.down_proj.weight")


def spans(first: Tensor, count: Tensor, first2: Tensor | None = None, count2: Tensor | None = None) -> Tensor:
    """Two spans of keys for each row (the second may be left out), as `ops.attention` reads them: int64 [R, 4]."""
    nothing = torch.zeros_like(first)
    parts = (first, count, nothing if first2 is None else first2, nothing if count2 is None else count2)
    return torch.stack(parts, -1).reshape(-1, 4)


def deinterleave(x: Tensor) -> Tensor:
    """DeepSeek stores rotary pairs side by side; bring them to halves."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


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
        return Rotation(self.cos, self.sin, positions_R)


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at `tokens`, and the entropy (nat) of that softmax over the whole vocabulary.

    logits [..., V] float32, tokens [...] -> two float32 [...]. The one function behind lp_R, lp_T and lp_C.
    Temperature 0 (greedy) reports at temperature 1. The entropy has no gradient.
    """
    found = ops.log_softmax_at(logits.flatten(0, -2), tokens.flatten(), temperature or 1.0)
    return found[0].view(tokens.shape), found[1].view(tokens.shape)


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
