"""GGUF files: a tiny one made here reads to what was put in, transformers agrees, and a broken one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lpexp.errors import ConfigError
from lpexp.model import gguf, hf
from lpexp.model.tokenizer import HfTokenizer

HEADS, KV, HIDDEN, MLP, LAYERS = 4, 2, 64, 96, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>a\n' }}"
)


def byte_letters() -> list[str]:
    """The 256 letters of byte-level BPE in GPT-2's order."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in kept]
    letters = {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    return [letters[byte] for byte in range(256)]


TOKENS = [*SPECIAL, *byte_letters(), *(merge.replace(" ", "") for merge in MERGES)]


def as_llama_cpp(weight: np.ndarray, heads: int) -> np.ndarray:
    """q or k as convert_hf_to_gguf.py stores it: row 2i of a head is its row i, row 2i + 1 its row D/2 + i."""
    dim = len(weight) // heads
    order = [head * dim + half * dim // 2 + i for head in range(heads) for i in range(dim // 2) for half in (0, 1)]
    return weight[order]


def q4_1(weight: np.ndarray) -> np.ndarray:
    """Values after 4-bit codes with a float16 scale and minimum for each 32, computed without the gguf package."""
    blocks = weight.reshape(-1, 32)
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    scale = (high - low) / np.float32(15)
    with np.errstate(divide="ignore"):
        codes = np.where(scale == 0, 0, np.clip(np.trunc((blocks - low) * (1 / scale) + np.float32(0.5)), 0, 15))
    halved = (codes * scale.astype(np.float16).astype(np.float32)) + low.astype(np.float16).astype(np.float32)
    return halved.reshape(weight.shape).astype(np.float32)


def weights() -> dict[str, np.ndarray]:
    """Hugging Face names -> float32, before anything is quantised."""
    rng = np.random.default_rng(3)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (len(TOKENS), HIDDEN), "model.norm": (HIDDEN,)}
    dim = HIDDEN // HEADS
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.input_layernorm": (HIDDEN,), f"{at}.post_attention_layernorm": (HIDDEN,)}
        shapes |= {
            f"{at}.self_attn.{n}_proj": (rows * dim, HIDDEN) for n, rows in zip("qkv", (HEADS, KV, KV), strict=True)
        }
        shapes |= {f"{at}.self_attn.o_proj": (HIDDEN, HIDDEN), f"{at}.mlp.down_proj": (HIDDEN, MLP)}
        shapes |= {f"{at}.mlp.{n}_proj": (MLP, HIDDEN) for n in ("gate", "up")}
    return {f"{n}.weight": rng.normal(0, 0.3, shape).astype(np.float32) for n, shape in shapes.items()}


def write(path: Path, **facts: Any) -> Path:
    """A GGUF file of these weights: linears in Q4_1, the embedding in Q8_0, norms in F32; `facts` override keys."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    writer = GGUFWriter(path, facts.get("architecture", "llama"))
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_tokenizer_model(facts.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(facts.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = {new: old for old, new in gguf.OUTSIDE.items()}
    for name, value in weights().items():
        stored = names.get(name)
        if stored is None:
            _, _, layer, rest = name.split(".", 3)
            inside = next(old for old, new in gguf.INSIDE.items() if f"{new}.weight" == rest)
            stored = f"blk.{layer}.{inside}.weight"
            value = (
                as_llama_cpp(value, {"attn_q": HEADS, "attn_k": KV}[inside])
                if inside in ("attn_q", "attn_k")
                else value
            )
        kind = GGMLQuantizationType.F32
        if value.ndim == 2:
            kind = GGMLQuantizationType.Q8_0 if stored == "token_embd.weight" else GGMLQuantizationType.Q4_1
        writer.add_tensor(stored, quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face directory of the tiny file, which lies beside it."""
    at = tmp_path_factory.mktemp("gguf")
    return gguf.write(write(at / "tiny.gguf"), at / "tiny")


def test_every_tensor_is_what_was_stored_dequantised_with_q_and_k_back_in_halves(made: Path) -> None:
    model = hf.read_model(made)
    read, put = hf.load_weights(made, model), weights()
    assert set(read) == set(put)
    for name, tensor in read.items():
        expected = q4_1(put[name]) if put[name].ndim == 2 and "embed" not in name else put[name]
        wanted = torch.from_numpy(expected).bfloat16().float()
        if "embed" in name:  # 8 bits: within half a step of each block of 32
            step = torch.from_numpy(np.abs(put[name]).reshape(-1, 32).max(1, keepdims=True) / 127)
            assert ((tensor - torch.from_numpy(put[name])).reshape(-1, 32).abs() <= 0.51 * step + 2**-9).all()
        else:
            assert torch.equal(tensor, wanted), name


def test_the_sizes_are_the_file_s_and_the_numbers_are_those_a_person_wrote(made: Path) -> None:
    model = hf.read_model(made)
    assert (model.architecture, model.vocab_size, model.hidden_size, model.head_dim) == ("llama", 265, 64, 16)
    assert (model.rope_theta, model.rms_norm_eps, model.tie_word_embeddings) == (100000.0, 1e-5, True)


def test_transformers_reads_the_same_weights_and_gives_the_same_logits(made: Path) -> None:
    """transformers has a GGUF reader of its own; and its llama on our directory agrees with our decoder."""
    from transformers import AutoModelForCausalLM

    from lpexp.model.decoder import Decoder, TrainWeights
    from lpexp.precision.fp32 import Fp32

    model = hf.read_model(made)
    ours = hf.load_weights(made, model)
    theirs = AutoModelForCausalLM.from_pretrained(made.parent, gguf_file="tiny.gguf", dtype=torch.float32)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs.state_dict()[name].bfloat16().float()), name
    peer = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = Decoder(model).logits(TrainWeights(model, Fp32(name="fp32"), ours), ids)
        assert (logits - peer(ids).logits).abs().max() < 1e-4


def test_the_tokenizer_splits_digits_merges_words_and_matches_special_tokens_whole(made: Path) -> None:
    tokenizer = HfTokenizer(made)
    pieces = [TOKENS[index] for index in tokenizer.encode("hello hello 12<|im_end|>é")]
    assert pieces == [
        "hello",
        "Ġhello",
        "Ġ",
        "1",
        "2",
        "<|im_end|>",
        "Ã",
        "©",
    ]  # 1 2 is a merge that digits never reach
    assert tokenizer.decode(tokenizer.encode("hello é 12")) == "hello é 12"
    assert (TOKENS[tokenizer.stop_id], tokenizer.vocab_size) == ("<|im_end|>", len(TOKENS))
    assert tokenizer.chat("hello") == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>a\n"


def test_the_same_file_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    again = gguf.write(made.parent / "tiny.gguf", tmp_path / "again")
    for file in made.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"architecture": "falcon"}, "architecture falcon is not supported; supported: llama"),
        ({"tokenizer": "llama"}, "tokenizer llama / smollm is not supported; supported: gpt2 / smollm"),
        ({"pre": "qwen2"}, "tokenizer gpt2 / qwen2 is not supported; supported: gpt2 / smollm"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, facts: dict[str, str], says: str) -> None:
    file = write(tmp_path / "odd.gguf", **facts)
    with pytest.raises(ConfigError) as refused:
        gguf.write(file, tmp_path / "out")
    assert str(refused.value) == f"{file}: {says}"
    assert not (tmp_path / "out").exists()


def test_a_cut_file_is_refused(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes((made.parent / "tiny.gguf").read_bytes()[:-4000])
    with pytest.raises(ConfigError, match=r"is no complete GGUF file .*; fetch it again"):
        gguf.write(file, tmp_path / "out")


def test_a_missing_package_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as refused:
        gguf.Gguf("any.gguf")
    assert str(refused.value) == "reading a GGUF file needs the package gguf; pip install 'lpexp[smollm2]'"


def test_the_stop_token_and_template_are_in_the_tokenizer_s_settings(made: Path) -> None:
    settings = json.loads((made / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"], settings["chat_template"]) == (
        "<|im_start|>",
        "<|im_end|>",
        TEMPLATE,
    )
