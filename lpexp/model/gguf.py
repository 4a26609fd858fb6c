"""GGUF files of llama models, read once into a Hugging Face directory: weights, config.json, tokenizer, chat template.

llama.cpp stores q and k with the two halves of each head's rotary pairs interleaved; Hugging Face keeps halves, so
their rows are put back. Tensors are dequantised by the `gguf` package to float32 and written in bfloat16.
Left out: other architectures, tokenizers other than byte-level BPE with the pre-tokenizers of `SPLITTERS`.
Source: convert_hf_to_gguf.py and llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpexp.disk import write_json
from lpexp.errors import ConfigError
from lpexp.model import Model

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# GGUF's names of tensors -> Hugging Face's.
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens that are matched whole, before any splitting
SPLITTERS = ("smollm",)  # each digit alone, then GPT-2's pattern


class Gguf:
    """An opened file: its model, its tensors under Hugging Face names, its tokenizer. ConfigError names the file."""

    def __init__(self, path: str | Path):
        needs_package()
        from gguf import GGUFReader

        self.path = Path(path)
        try:
            reader = GGUFReader(self.path)
            self.facts: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        except Exception as error:  # the library raises anything on a file that is cut or no GGUF
            raise ConfigError(f"{self.path} is no complete GGUF file ({error}); fetch it again") from None
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.model = self._model()

    def _fact(self, key: str) -> Any:
        if key not in self.facts:
            raise ConfigError(f"{self.path}: key {key} is missing")
        return self.facts[key]

    def _model(self) -> Model:
        kind = self._fact("general.architecture")
        if kind != "llama":
            raise ConfigError(f"{self.path}: architecture {kind} is not supported; supported: llama")
        heads, hidden = self._fact("llama.attention.head_count"), self._fact("llama.embedding_length")
        head_dim = self.facts.get("llama.attention.key_length", hidden // heads)
        if self.facts.get("llama.rope.dimension_count", head_dim) != head_dim:
            raise ConfigError(f"{self.path}: llama.rope.dimension_count is not the head's {head_dim}: not supported")
        if scaling := sorted(key for key in self.facts if key.startswith("llama.rope.scaling")):
            raise ConfigError(f"{self.path}: {scaling[0]} is not supported")
        return Model(
            name=self.path.stem,
            architecture="llama",
            vocab_size=len(self._fact("tokenizer.ggml.tokens")),
            hidden_size=hidden,
            intermediate_size=self._fact("llama.feed_forward_length"),
            num_hidden_layers=self._fact("llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=self.facts.get("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            rope_theta=_shortest(self.facts.get("llama.rope.freq_base", 10000.0)),
            rms_norm_eps=_shortest(self._fact("llama.attention.layer_norm_rms_epsilon")),
            tie_word_embeddings="output.weight" not in self._tensors,
            max_position_embeddings=self._fact("llama.context_length"),
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, float32 tensor), one at a time; ConfigError for a tensor that llama does not have."""
        import torch
        from gguf.quants import dequantize

        for name, stored in self._tensors.items():
            try:
                values = dequantize(stored.data, stored.tensor_type)
            except (NotImplementedError, ValueError) as error:
                raise ConfigError(f"{self.path}: {name} cannot be dequantised ({error})") from None
            heads = {"attn_q": self.model.num_attention_heads, "attn_k": self.model.num_key_value_heads}
            part = name.split(".")[-2]
            if part in heads and name.startswith("blk."):
                values = halves(values, heads[part])
            yield self._renamed(name), torch.from_numpy(values.copy()).float()

    def _renamed(self, name: str) -> str:
        if name in OUTSIDE:
            return OUTSIDE[name]
        match name.split("."):
            case ["blk", layer, part, "weight"] if layer.isdigit() and part in INSIDE:
                return f"model.layers.{layer}.{INSIDE[part]}.weight"
        raise ConfigError(f"{self.path}: {name} is no tensor of a llama that the decoder has")

    def write_tokenizer(self, directory: Path) -> None:
        """tokenizer.json and tokenizer_config.json, the chat template in the latter."""
        import tokenizers
        from tokenizers import AddedToken, decoders, models, pre_tokenizers

        model, splitter = self._fact("tokenizer.ggml.model"), self.facts.get("tokenizer.ggml.pre")
        if model != "gpt2" or splitter not in SPLITTERS:
            known = ", ".join(f"gpt2 / {one}" for one in SPLITTERS)
            raise ConfigError(f"{self.path}: tokenizer {model} / {splitter} is not supported; supported: {known}")
        if self.facts.get("tokenizer.ggml.add_bos_token"):
            raise ConfigError(f"{self.path}: tokenizer.ggml.add_bos_token is not supported")
        tokens: list[str] = self._fact("tokenizer.ggml.tokens")
        kinds: list[int] = self._fact("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ")) for merge in self._fact("tokenizer.ggml.merges")]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        try:
            made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))  # pyright: ignore[reportArgumentType]
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{self.path}: its merges and tokens make no BPE ({error})") from None
        made.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        whole = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)]
        made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in whole])
        made.save(str(directory / "tokenizer.json"))
        roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
        named = {f"{role}_token": self._token(tokens, f"tokenizer.ggml.{key}_token_id") for role, key in roles.items()}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.model.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": False,
            **named,
            "chat_template": self.facts.get("tokenizer.chat_template"),
        }
        write_json(directory / "tokenizer_config.json", {k: v for k, v in settings.items() if v is not None})

    def _token(self, tokens: list[str], key: str) -> str | None:
        return tokens[self.facts[key]] if key in self.facts else None


def write(path: str | Path, directory: str | Path) -> Path:
    """The Hugging Face directory of a GGUF file; it appears whole or not at all."""
    import tempfile

    from lpexp.model import hf
    from lpexp.precision.bf16 import Bf16

    source = Gguf(path)
    with tempfile.TemporaryDirectory() as beside:
        source.write_tokenizer(Path(beside))
        model = source.model.model_copy(update={"path": beside})  # whose tokenizer is copied beside the weights
        return hf.save(directory, model, source.tensors(), Bf16(name="bf16"))


def needs_package() -> None:
    """ConfigError where the extra is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("reading a GGUF file needs the package gguf; pip install 'lpexp[smollm2]'")


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k [heads * D, in] from rotary pairs side by side to first and second halves of each head."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _shortest(value: float) -> float:
    """A float32 fact as the decimal number that a person wrote: 9.99999974e-06 -> 1e-05."""
    import numpy as np

    return float(str(np.float32(value)))
