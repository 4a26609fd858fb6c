"""Megatron-core's tensors and the checkpoint's: which rows and columns of which Hugging Face tensor a shard holds.

One table serves both directions: `pieces` says of every local tensor of a rank what it is made of. Loading copies the
pieces in, publishing and exporting gather them back, and the emulated layers quantise each shard under its own name.
It knows the names of the local layer spec and those of Transformer Engine's. No torch here.
Left out: multi-token prediction, virtual pipeline stages. Why no bridge library: docs/decisions.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from lpexp.errors import RunError
from lpexp.model import Model

Span = tuple[int, int]  # first and last + 1


class Place(NamedTuple):
    """Where a rank sits: (its index, how many) along each way of splitting, and the first layer of its stage."""

    tp: Span = (0, 1)
    etp: Span = (0, 1)  # of the experts' own tensor-parallel group
    ep: Span = (0, 1)
    first_layer: int = 0


class Piece(NamedTuple):
    """A part of the tensor `name`: its `rows` and `cols` (None: all) lie in the local tensor from row `at` on."""

    name: str
    rows: Span
    cols: Span | None
    at: int


LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.linear_fc([12])\.weight|linear_fc([12])\.weight(\d+))")

# What every rank of a tensor-parallel group holds whole. Transformer Engine keeps a norm with the matrix behind it.
WHOLE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
}
# Split by rows, and by columns.
BY_ROWS = {
    "self_attention.linear_q_proj.weight": "self_attn.q_proj.weight",
    "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
}
BY_COLUMNS = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared_experts.down_proj.weight",
}
GATED = {"mlp.linear_fc1.weight": "mlp", "mlp.shared_experts.linear_fc1.weight": "mlp.shared_experts"}


class Table:
    """The pieces of one rank's tensors."""

    def __init__(self, model: Model, place: Place):
        self.model, self.place = model, place
        self.shapes = {param.name: param.shape for param in model.params()}

    def pieces(self, name: str) -> list[Piece]:
        """What the local tensor `name` is made of; RunError for a name that no rule knows."""
        return list(self._pieces(name))

    def _pieces(self, name: str) -> Iterator[Piece]:
        place = self.place
        if name == "embedding.word_embeddings.weight":
            yield self._rows("model.embed_tokens.weight", place.tp)
        elif name == "output_layer.weight":
            tied = self.model.tie_word_embeddings
            yield self._rows("model.embed_tokens.weight" if tied else "lm_head.weight", place.tp)
        elif name == "decoder.final_layernorm.weight":
            yield self._rows("model.norm.weight")
        elif found := LAYER.fullmatch(name):
            yield from self._layer(f"model.layers.{int(found[1]) + place.first_layer}", found[2], name)
        else:
            raise RunError(f"megatron: no rule says what {name} is in a checkpoint of {self.model.name}")

    def _layer(self, at: str, rest: str, name: str) -> Iterator[Piece]:
        place = self.place
        if rest in WHOLE:
            yield self._rows(f"{at}.{WHOLE[rest]}")
        elif rest == "self_attention.q_layernorm.weight":
            yield self._rows(f"{at}.self_attn.{'q_a_layernorm' if self.model.mla else 'q_norm'}.weight")
        elif rest in BY_ROWS:
            yield self._rows(f"{at}.{BY_ROWS[rest]}", place.tp)
        elif rest in BY_COLUMNS:
            yield self._columns(f"{at}.{BY_COLUMNS[rest]}", place.tp)
        elif rest in GATED:
            yield from self._gated(f"{at}.{GATED[rest]}", place.tp)
        elif rest in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
            yield from self._grouped(f"{at}.self_attn", rest.rpartition(".")[2])
        elif found := EXPERT.fullmatch(rest):
            assert self.model.moe is not None
            local, which = int(found[1] or found[4] or 0), found[2] or found[3]
            index, count = place.ep
            expert = f"{at}.mlp.experts.{index * (self.model.moe.num_experts // count) + local}"
            if which == "1":
                yield from self._gated(expert, place.etp)
            else:
                yield self._columns(f"{expert}.down_proj.weight", place.etp)
        else:
            raise RunError(f"megatron: no rule says what {name} is in a checkpoint of {self.model.name}")

    def _rows(self, name: str, share: Span = (0, 1), at: int = 0) -> Piece:
        return Piece(name, part(self.shapes[name][0], share), None, at)

    def _columns(self, name: str, share: Span) -> Piece:
        rows, cols = self.shapes[name]
        return Piece(name, (0, rows), part(cols, share), 0)

    def _gated(self, at: str, share: Span) -> Iterator[Piece]:
        """The gate's rows, then the up projection's."""
        gate = self._rows(f"{at}.gate_proj.weight", share)
        yield gate
        yield self._rows(f"{at}.up_proj.weight", share, gate.rows[1] - gate.rows[0])

    def _grouped(self, at: str, kind: str) -> Iterator[Piece]:
        """Of the rows of all groups one after the other (query heads, key, value), those of this rank."""
        model = self.model
        dim, each = model.head_dim, model.num_attention_heads // model.num_key_value_heads
        first, last = part(model.num_key_value_heads * (each + 2) * dim, self.place.tp)
        at_row = 0
        for group in range(model.num_key_value_heads):
            for which, heads in (("q", each), ("k", 1), ("v", 1)):
                size = heads * dim
                low, high = max(first - at_row, 0), min(last - at_row, size)
                if low < high:
                    rows = (group * size + low, group * size + high)
                    yield Piece(f"{at}.{which}_proj.{kind}", rows, None, at_row + low - first)
                at_row += size


def part(size: int, share: Span) -> Span:
    """The rows first..last of share (index, count) of `size` equal parts."""
    index, count = share
    each, left = divmod(size, count)
    assert not left, f"{size} is not cut evenly by {count}"
    return index * each, (index + 1) * each
