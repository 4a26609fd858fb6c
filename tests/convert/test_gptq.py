"""`lpexp convert int4 --method gptq`: codes chosen with text, written in lpexp's layout, better than rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM

from lpexp import calibrate, cli
from lpexp.calibrate import draw, texts
from lpexp.convert import convert
from lpexp.model import hf
from lpexp.precision.int4 import Int4Qat
from lpexp.precision.packed import Packed
from lpexp.precision.targets import Calibration
from tests.convert.directories import BF16, digests, plain, random
from tests.convert.test_readers import decompressed, in_transformers, served
from tests.precision.contract import model

ALPHABET = "abcdefghijklmnopqrstuvwxyz ."
TEXT = [" ".join("abc"[i % 3] * (1 + i % 5) + "xyz"[(i * i) % 3] for i in range(j, j + 400)) + "." for j in range(8)]


def source_of(name: str, at: Path) -> Path:
    """A directory with a tokenizer of letters; attention and MLP far from random rounding: a few loud inputs."""
    small = model(name)
    tensors = {key: tensor.float() for key, tensor in random(small).items()}
    for param in small.params():
        generator = torch.Generator().manual_seed(len(param.name))
        tensors[param.name] = torch.randn(param.shape, generator=generator) * (1.0 if len(param.shape) == 1 else 0.08)
    directory = plain(at, small, {key: tensor.bfloat16() for key, tensor in tensors.items()})
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(ALPHABET)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return directory


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("\n\n".join(TEXT))
    return tmp_path / "text.txt"


def gptq(source: Path, out: Path, text: Path, *more: str) -> int:
    words = ["--input-dir", str(source), "--output-dir", str(out), "--data-dir", str(text)]
    words += ["--num-calibration-samples", "16", "--max-sequence-length", "64"]
    return cli.main(["convert", "int4", *words, *more])


@pytest.mark.parametrize(
    ("name", "flags", "groups"),
    [
        ("qwen3_tiny", ["--quant-group-size", "32"], 4),
        ("qwen3_tiny", ["--quant-group-size", "64", "--quant-type", "W8A16"], 2),
        ("qwen3_moe_tiny", ["--quant-group-size", "64", "--scope", "linears"], 2),
    ],
)
def test_its_directory_has_the_asked_group_size_and_loads_in_all_three_readers(name, flags, groups, text, tmp_path):
    source = source_of(name, tmp_path / "source")
    assert gptq(source, tmp_path / "out", text, *flags) == 0
    ours = served(tmp_path / "out")
    _, precision, parts = hf.load(tmp_path / "out")
    assert isinstance(precision, Packed) and not precision.closed
    assert all(parts[key]["weight_scale"].shape[1] == value.shape[1] * groups // 128 for key, value in ours.items())
    told = hf.read_config(tmp_path / "out")["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert told["group_size"] == 128 // groups and told["observer_kwargs"] == {"divisor": max(type(precision).ranges)}
    theirs, third = in_transformers(tmp_path / "out", model(name), torch.bfloat16), decompressed(tmp_path / "out")
    assert len(ours) >= 14
    for key, values in ours.items():
        assert torch.equal(theirs[key].float(), values) and torch.equal(third[key].float(), values), key
    for key, tensor in hf.read_weights(source, model(name)):
        if key not in ours:
            assert torch.equal(theirs[key].float(), tensor), key


def logits(directory: Path, text: str) -> torch.Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return loaded(torch.tensor([[ALPHABET.index(letter) for letter in text[:400]]])).logits[0]


@pytest.mark.parametrize("group", ["32", "64"])
def test_it_keeps_the_logits_of_the_text_better_than_rounding_does(group: str, text, tmp_path):
    source = source_of("qwen3_tiny", tmp_path / "source")
    rounded = Int4Qat(name="int4_qat", group_size=int(group), divisor=7.5)
    convert(source, tmp_path / "rtn", rounded)
    assert gptq(source, tmp_path / "gptq", text, "--quant-group-size", group) == 0
    reference = logits(source, TEXT[3])
    lost = {}
    for way in ("rtn", "gptq"):
        convert(tmp_path / way, tmp_path / f"{way}-16", BF16)
        lost[way] = float((logits(tmp_path / f"{way}-16", TEXT[3]) - reference).square().mean())
    assert 0 < lost["gptq"] < 0.8 * lost["rtn"], lost


def test_the_seed_decides_the_bytes(text, tmp_path):
    source = source_of("qwen3_tiny", tmp_path / "source")
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert gptq(source, tmp_path / out, text, "--quant-group-size", "32", "--seed", seed) == 0
    assert digests(tmp_path / "a") == digests(tmp_path / "b") != digests(tmp_path / "c")


def test_calibrated_scales_are_kept_or_the_way_back_is_refused(text, tmp_path, capsys):
    source = source_of("qwen3_tiny", tmp_path / "source")
    assert gptq(source, tmp_path / "out", text, "--quant-group-size", "32") == 0
    assert "the first weight update of a run replaces calibrated values" in capsys.readouterr().out
    words = ["--model-dir", str(tmp_path / "out"), "--save-dir", str(tmp_path / "bf16"), "--max-workers", "1"]
    assert cli.main(["convert", "bf16", *words]) == 0
    words = ["--model-dir", str(tmp_path / "bf16"), "--save-dir", str(tmp_path / "again")]
    for divisor in ([], ["--divisor", "7.5"]):
        assert cli.main(["convert", "int4", "--quant-group-size", "32", *divisor, *words]) == 2
        assert "whose scales cannot be found again from its values" in capsys.readouterr().err


# -- text --------------------------------------------------------------------------------------------------------------
def test_a_text_a_jsonl_and_a_parquet_file_and_their_directory_hold_the_same_text(text: Path, tmp_path: Path):
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": one, "n": 1}) for one in TEXT) + "\n\n")
    parquet.write_table(pa.table({"text": [*TEXT, ""]}), tmp_path / "train-00000-of-00001.parquet")
    assert list(texts(text)) == ["\n\n".join(TEXT)]
    assert list(texts(tmp_path / "lines.jsonl")) == TEXT == list(texts(tmp_path / "train-00000-of-00001.parquet"))
    assert list(texts(tmp_path)) == [*TEXT, "\n\n".join(TEXT), *TEXT]


def wish(**changes) -> Calibration:
    made = Calibration(Int4Qat(name="int4_qat", divisor=7.5), "text", 50, 10, 0.01, 0, False)
    return made._replace(**changes)


def test_windows_come_from_everywhere_in_the_text_and_depend_on_the_seed():
    tokens = list(range(1000))
    windows = draw(tokens, wish())
    assert all(row == list(range(row[0], row[0] + 10)) for row in windows) and len(windows) == 50
    assert min(row[0] for row in windows) < 150 and max(row[0] for row in windows) > 850
    assert draw(tokens, wish()) == windows != draw(tokens, wish(seed=1))
    assert draw(tokens, wish(length=1000, samples=1)) == [tokens]


BAD = {
    "nowhere": ("nowhere", None, "--data-dir: HERE/nowhere does not exist; name a .parquet, .txt, .jsonl file or a "),
    "an empty directory": ("d", lambda p: p.mkdir(), "--data-dir: HERE/d holds no text that can be read; name a "),
    "another kind": ("t.csv", lambda p: p.write_text("a"), "--data-dir: HERE/t.csv holds no text that can be read; "),
    "empty": ("e.txt", lambda p: p.write_text(" \n"), "--data-dir: HERE/e.txt holds no text; name one that does"),
    "no key": (
        "k.jsonl",
        lambda p: p.write_text('{"content": "a"}'),
        "--data-dir: HERE/k.jsonl cannot be read as text ",
    ),
    "no JSON": (
        "j.jsonl",
        lambda p: p.write_text("{"),
        "--data-dir: HERE/j.jsonl cannot be read as text under the key",
    ),
    "no parquet": ("p.parquet", lambda p: p.write_text("PAR"), "--data-dir: HERE/p.parquet cannot be read as text "),
    "short": (
        "s.txt",
        lambda p: p.write_text("abc"),
        "--data-dir: HERE/s.txt holds 3 tokens, fewer than one sample of 64",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_text_that_cannot_calibrate_is_refused_before_the_model_is_loaded(case, tmp_path, capsys, monkeypatch):
    name, write, says = BAD[case]
    source = source_of("qwen3_tiny", tmp_path / "source")
    if write:
        write(tmp_path / name)
    monkeypatch.setattr(calibrate, "_gptq", lambda *_: pytest.fail("the model was loaded"))
    assert gptq(source, tmp_path / "out", tmp_path / name) == 2
    assert capsys.readouterr().err.replace(str(tmp_path), "HERE").startswith(says)
    assert not (tmp_path / "out").exists()


def test_what_is_missing_of_source_or_extra_is_said(text, tmp_path, capsys, monkeypatch):
    source = source_of("qwen3_tiny", tmp_path / "source")
    assert gptq(source, tmp_path / "out", text, "--max-sequence-length", "4096") == 2
    assert "--max-sequence-length 4096: the model has 512 positions; use at most 512" in capsys.readouterr().err
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    assert gptq(source, tmp_path / "out", text) == 2
    assert (
        "has no tokenizer (tokenizer.json, tokenizer.model, tiktoken.model, vocab.json); copy"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(calibrate, "find_spec", lambda name: None if name == "llmcompressor" else name)
    assert gptq(source, tmp_path / "out", text) == 2
    assert "--method gptq needs llmcompressor: pip install 'lpexp[int4]'" in capsys.readouterr().err
