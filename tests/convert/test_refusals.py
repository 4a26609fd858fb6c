"""Bad inputs of `lpexp convert`: what is said, that the exit code is right, and that nothing is left half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lpexp import cli
from lpexp.model import hf, shards
from tests.convert.directories import WAYS, edit, plain, random
from tests.precision.contract import model

Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
FIRST = "model-00001-of-00004.safetensors"
HERE = ["--model-dir", "HERE/source", "--save-dir", "HERE/out", "--max-workers", "1"]


def shard_with(directory: Path, name: str) -> Path:
    return directory / json.loads((directory / hf.INDEX).read_text())["weight_map"][name]


def change(name: str, how: Callable[[torch.Tensor], object]) -> Callable[[Path], None]:
    """Rewrite one tensor of a directory."""

    def damage(directory: Path) -> None:
        path = shard_with(directory, name)
        tensors = load_file(path)
        changed = how(tensors[name])
        if isinstance(changed, torch.Tensor):
            tensors[name] = changed
        save_file(tensors, path, {"format": "pt"})

    return damage


def put(index: tuple[int, int], value: float) -> Callable[[torch.Tensor], object]:
    return lambda tensor: tensor.index_put_(tuple(torch.tensor(i) for i in index), torch.tensor(value).to(tensor.dtype))


def lying_index(directory: Path) -> None:
    index = json.loads((directory / hf.INDEX).read_text())
    places = index["weight_map"]
    places[Q] = next(file for file in places.values() if file != places[Q])
    (directory / hf.INDEX).write_text(json.dumps(index))


def truncate(directory: Path) -> None:
    path = shard_with(directory, Q)
    path.write_bytes(path.read_bytes()[:-10])


def quantise(way: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        shutil.rmtree(directory)
        hf.save(directory, model("qwen3_tiny"), random(model("qwen3_tiny")).items(), WAYS[way][1])

    return damage


def foreign_codes(directory: Path) -> None:
    """A calibrated directory of another tool, whose config does not say which codes its grid has."""
    quantise("int4 /7.5")(directory)
    config = json.loads((directory / hf.CONFIG).read_text())
    del config["quantization_config"]["config_groups"]["group_0"]["weights"]["observer_kwargs"]
    (directory / hf.CONFIG).write_text(json.dumps(config))


def decoded(way: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        quantise(way)(directory)
        words = ["--model-dir", str(directory), "--save-dir", str(directory.with_name("back")), "--max-workers", "1"]
        assert cli.main(["convert", "bf16", *words]) == 0
        shutil.rmtree(directory)
        directory.with_name("back").rename(directory)

    return damage


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda directory: (directory.parent / name).write_text(text) and None  # type: ignore[func-returns-value]


# What is typed, what is wrong with the files, and what is said. {file} is the shard that holds q_proj of layer 0.
CASES: dict[str, tuple[list[str], Callable[[Path], object] | None, str]] = {
    # -- the directory
    "no such directory": (
        ["fp8", "--model-dir", "HERE/nowhere", "--save-dir", "HERE/out"],
        None,
        "HERE/nowhere/config.json cannot be read (No such file or directory); a Hugging Face directory is needed",
    ),
    "an existing output": (
        ["fp8", *HERE],
        lambda d: shutil.copytree(d, d.with_name("out")),
        "HERE/out exists already; remove it or choose another directory",
    ),
    "a file in the way": (
        ["fp8", *HERE],
        write("out", "mine"),
        "HERE/out exists already; remove it or choose another directory",
    ),
    "quantised already": (
        ["int4", *HERE],
        quantise("fp8"),
        "HERE/source is quantised already (fp8); quantising twice loses twice: convert the 16-bit directory it was "
        "made from, or take it back first with `lpexp convert bf16`",
    ),
    "16 bits already": (
        ["bf16", *HERE],
        None,
        "HERE/source is not quantised, all its tensors are bfloat16 already; copy it",
    ),
    "scales that cannot be found again": (
        ["int4", "--group-size", "64", *HERE],
        decoded("int4 /7.5"),
        "HERE/source was decoded from int4:g64:div=7.5:range=-8..7:scale=bf16:floor=1e-5:rne:v1, whose scales cannot "
        "be found again from its values; use the quantised directory itself, or convert the weights that it was "
        "calibrated from",
    ),
    "an unknown architecture": (
        ["fp8", *HERE],
        lambda d: edit(d, architectures=["MambaForCausalLM"]),
        "HERE/source/config.json: architecture MambaForCausalLM is not supported; supported: LlamaForCausalLM, "
        "Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM, DeepseekV3ForCausalLM",
    ),
    "a config that is no JSON": (
        ["fp8", *HERE],
        lambda d: (d / "config.json").write_text("{"),
        "HERE/source/config.json is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1)",
    ),
    "a quantisation that nobody reads": (
        ["bf16", *HERE],
        lambda d: edit(d, quantization_config={"quant_method": "awq"}),
        "HERE/source/config.json: quant_method 'awq' is read by no precision; known: KNOWN",
    ),
    "a quantisation that is no object": (
        ["bf16", *HERE],
        lambda d: edit(d, quantization_config=["fp8"]),
        "HERE/source/config.json: quantization_config cannot be read: AttributeError(\"'list' object has no attribute "
        "'get'\")",
    ),
    "an index without a map": (
        ["fp8", *HERE],
        lambda d: (d / hf.INDEX).write_text("{}"),
        "HERE/source/model.safetensors.index.json has no weight_map; write the index again",
    ),
    "an index that leads outside": (
        ["fp8", *HERE],
        lambda d: (d / hf.INDEX).write_text(json.dumps({"weight_map": {Q: "../x.safetensors"}})),
        f"HERE/source/model.safetensors.index.json places {Q} outside of its directory, in ../x.safetensors",
    ),
    # -- shards and tensors
    "a missing shard": (
        ["fp8", *HERE],
        lambda d: (d / FIRST).unlink(),
        f"HERE/source/{FIRST} is missing, model.safetensors.index.json says that it holds HELD",
    ),
    "an index that lies": (
        ["fp8", *HERE],
        lying_index,
        f"HERE/source/OTHER does not hold {Q}, model.safetensors.index.json says that it does",
    ),
    "a truncated shard": (
        ["fp8", *HERE],
        truncate,
        "HERE/source/FILE is not a complete safetensors file (it has SIZE bytes, its header speaks of MORE); copy it "
        "again",
    ),
    "an empty shard": (
        ["fp8", *HERE],
        lambda d: (d / FIRST).write_bytes(b""),
        f"HERE/source/{FIRST} is not a complete safetensors file (it has 0 bytes, its header would have 0); copy it "
        "again",
    ),
    "only pickles": (
        ["fp8", *HERE],
        lambda d: [p.unlink() for p in d.glob("*.safetensors*")] and (d / "pytorch_model.bin").write_bytes(b"x"),
        "HERE/source has no weights: model.safetensors.index.json or model.safetensors is needed, there is only "
        "pytorch_model.bin, which would have to be unpickled; convert it to safetensors",
    ),
    "a NaN": (
        ["fp8", *HERE],
        change(Q, put((130, 7), float("nan"))),
        f"HERE/source/FILE: {Q}: 1 non-finite value(s), the first is nan at [130, 7]",
    ),
    "an infinity in the last row": (
        ["int4", *HERE],
        change(DOWN, put((127, 255), float("-inf"))),
        f"HERE/source/DOWN: {DOWN}: 1 non-finite value(s), the first is -inf at [127, 255]",
    ),
    "NaN in a tensor that stays plain": (
        ["int4", *HERE],
        change("model.norm.weight", lambda t: t.fill_(float("nan"))),
        "HERE/source/NORM: model.norm.weight: 128 non-finite value(s), the first is nan at [0]",
    ),
    "another shape": (
        ["fp8", *HERE],
        change(Q, lambda t: t[:64].clone()),
        f"HERE/source does not hold the weights of source:\n  FILE: {Q} has shape [64, 128], expected [256, 128]",
    ),
    "eight bits without a config": (
        ["fp8", *HERE],
        change(Q, lambda t: t.to(torch.float8_e4m3fn)),
        f"HERE/source does not hold the weights of source:\n  FILE: {Q} is float8_e4m3fn, expected float32, bfloat16, "
        "float16",
    ),
    "codes of another grid": (
        ["bf16", *HERE],
        foreign_codes,
        "HERE/source/model-00001-of-00001.safetensors: model.layers.0.mlp.gate_proj.weight_packed: weight_packed "
        "holds code -8, outside -7..7 of divisor 7; if another tool made it, name its divisor with --divisor",
    ),
    # -- flags
    "no source": (["fp8", "--save-dir", "HERE/out"], None, "--model-dir (or --input-dir) is missing; name a directory"),
    "no output": (["int4", "--input-dir", "x"], None, "--save-dir (or --output-dir) is missing; name a directory"),
    "no workers": (["fp8", *HERE[:4], "--max-workers", "0"], None, "--max-workers 0: at least one process is needed"),
    "a group of blocks": (
        ["fp8", "--quant-group-size", "32", *HERE],
        None,
        "--quant-group-size belongs to `lpexp convert int4`, not to fp8; leave it out",
    ),
    "a block of groups": (
        ["int4", "--block-size", "128", "128", *HERE],
        None,
        "--block-size belongs to `lpexp convert fp8`, not to int4; leave it out",
    ),
    "another block": (
        ["fp8", "--block-size", "64", "64", *HERE],
        None,
        "flags have mistakes:\n  --block-size: 64 64 is no block that trainer and engines share; use --block-size 128 "
        "128",
    ),
    "a block of channels": (
        ["fp8", "--strategy", "channel", "--block-size", "128", "128", *HERE],
        None,
        "flags have mistakes:\n  --block-size: blocks go with --strategy block; --strategy channel has one scale a "
        "channel, leave it out",
    ),
    "powers of two a tensor": (
        ["fp8", "--strategy", "tensor", "--scale-fmt", "ue8m0", *HERE],
        None,
        "flags have mistakes:\n  --scale-fmt: ue8m0: scales a tensor are fp32; use --strategy block for powers of two",
    ),
    "a strategy": (
        ["fp8", "--strategy", "row", *HERE],
        None,
        "flags have mistakes:\n  --strategy: there is no 'row'; use block, channel, tensor",
    ),
    "a scale format": (
        ["fp8", "--scale-fmt", "e8m0", *HERE],
        None,
        "flags have mistakes:\n  --scale-fmt: there is no 'e8m0'; use fp32 or ue8m0",
    ),
    "a type spelt wrong": (
        ["int4", "--quant-type", "W4A61", *HERE],
        None,
        "flags have mistakes:\n  --quant-type: there is no 'W4A61'; did you mean W4A16?",
    ),
    "a method": (
        ["int4", "--method", "awq", *HERE],
        None,
        "flags have mistakes:\n  --method: there is no 'awq'; use rtn or gptq",
    ),
    "an asymmetric grid": (
        ["int4", "--is-symmetric", "False", *HERE],
        None,
        "flags have mistakes:\n  --is-symmetric: False: asymmetric grids are not supported; leave it out",
    ),
    "a group that does not divide": (
        ["int4", "--quant-group-size", "96", *HERE],
        None,
        "HERE/source cannot be quantised like this:\n"
        "  group_size: 96 does not divide 128, the inputs of model.layers.*.self_attn.q_proj; use 32, 64 or 128\n"
        "  group_size: 96 does not divide 256, the inputs of model.layers.*.self_attn.o_proj; use 32, 64 or 128",
    ),
    "a group of odd size": (
        ["int4", "--quant-group-size", "12", *HERE],
        None,
        "flags have mistakes:\n  --quant-group-size: 12 is not a multiple of 8; use 32, 64 or 128",
    ),
    "a divisor": (
        ["int4", "--divisor", "8", *HERE],
        None,
        "flags have mistakes:\n  --divisor: 8 is no grid; use 7 (codes -7..7) or 7.5 (codes -8..7)",
    ),
    "a divisor of a source without one": (
        ["bf16", "--divisor", "7.5", *HERE],
        quantise("fp8"),
        "--divisor 7.5 does not go with fp8: Extra inputs are not permitted",
    ),
    "experts of a dense model": (
        ["int4", "--scope", "experts", *HERE],
        None,
        "HERE/source cannot be quantised like this:\n  scope: experts covers nothing: the model has no routed experts; "
        "use linears",
    ),
    "a scope": (
        ["fp8", "--scope", "attn_qkv", "lm_head.weight", *HERE],
        None,
        "HERE/source cannot be quantised like this:\n  scope: 'lm_head.weight' is nothing that can be quantised here; "
        "use attn_qkv, attn_out, mlp_up, mlp_down or a tensor's name",
    ),
    # -- calibration
    "calibration without text": (
        ["int4", "--method", "gptq", *HERE],
        None,
        "flags have mistakes:\n  --data-dir: gptq needs text: a wikitext .parquet, a .txt or a .jsonl file, or a "
        "directory of them",
    ),
    "text that is not read": (
        ["int4", "--method", "rtn", "--data-dir", "x", *HERE],
        None,
        "flags have mistakes:\n  --data-dir: says how to calibrate, and --method rtn reads no text; leave it out or "
        "use --method gptq",
    ),
    "dampening of 1": (
        ["int4", "--data-dir", "x", "--dampening-frac", "1", "--num-calibration-samples", "0", *HERE],
        None,
        "flags have mistakes:\n  --num-calibration-samples: 0 is too few; use 1 or more\n"
        "  --dampening-frac: 1 should be between 0 and 1; 0.01 is usual",
    ),
    "a grid that gptq lacks": (
        ["int4", "--data-dir", "x", "--divisor", "7", *HERE],
        None,
        "flags have mistakes:\n  --divisor: 7: gptq's grid is that of divisor 7.5",
    ),
}


def expand(text: str, here: Path) -> str:
    """The words that stand for what only this machine knows."""
    source = here / "source"
    if not (source / hf.INDEX).exists() or not any(
        w in text for w in ("FILE", "DOWN", "NORM", "OTHER", "HELD", "SIZE")
    ):
        return text
    places = json.loads((source / hf.INDEX).read_text())["weight_map"]
    held = sorted(name for name, file in places.items() if file == FIRST)
    path = source / places[Q]
    size = path.stat().st_size if path.exists() else 0
    words = {
        "FILE": places[Q],
        "OTHER": places[Q],
        "DOWN": places[DOWN],
        "NORM": places["model.norm.weight"],
        "HELD": ", ".join(held[:3]) + (f" and {len(held) - 3} more" if len(held) > 3 else ""),
        "SIZE": str(size),
        "MORE": str(size + 10),
    }
    for word, value in words.items():
        text = text.replace(word, value)
    return text


@pytest.mark.parametrize("case", CASES)
def test_a_bad_conversion_is_refused_in_these_words_and_leaves_nothing(case: str, tmp_path: Path, capsys):
    typed, damage, says = CASES[case]
    plain(tmp_path / "source", model("qwen3_tiny"), shard_bytes=250_000)
    if damage is not None:
        damage(tmp_path / "source")
    before = set(tmp_path.rglob("*"))
    capsys.readouterr()
    code = cli.main(["convert", *(word.replace("HERE", str(tmp_path)) for word in typed)])
    said = capsys.readouterr().err.replace(str(tmp_path), "HERE").rstrip("\n")
    expected = expand(says, tmp_path)
    if "KNOWN" in expected:
        expected, said = expected.partition("KNOWN")[0], said[: len(expected.partition("KNOWN")[0])]
    assert said == expected
    assert code == (1 if case in ("a NaN", "an infinity in the last row", "codes of another grid") else 2) or (
        case == "NaN in a tensor that stays plain" and code == 1
    )
    assert set(tmp_path.rglob("*")) == before


def test_there_are_more_than_twenty_cases_and_the_undamaged_directory_converts(tmp_path: Path):
    """Without this the corpus could pass because everything is refused."""
    assert len({says for _, _, says in CASES.values()}) > 40
    plain(tmp_path / "source", model("qwen3_tiny"), shard_bytes=250_000)
    assert cli.main(["convert", "fp8", *(word.replace("HERE", str(tmp_path)) for word in HERE)]) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_told_with_the_tensor_and_the_bytes_and_leaves_nothing(workers, tmp_path, monkeypatch, capsys):
    """Writes that fail as those to a full disk do, in this process and in a worker."""
    plain(tmp_path / "source", model("qwen3_tiny"))
    words = [word.replace("HERE", str(tmp_path)) for word in HERE[:4]]
    if workers == 1:

        def full(descriptor, data, at):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwrite", full)
    else:
        code = (
            "import errno, os\ndef full(*a): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\nos.pwrite = full\n"
        )
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    assert cli.main(["convert", "fp8", *words, "--max-workers", str(workers)]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / '.tmp-out'}: no space left while model." in said and "(No space left on device)" in said
    assert "bytes are needed; free some or choose another --save-dir" in said
    assert not (tmp_path / "out").exists() and not (tmp_path / ".tmp-out").exists()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    plain(tmp_path / "source", model("qwen3_tiny"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(shards, "write", lambda *_: pytest.fail("something was written"))
    assert cli.main(["convert", "fp8", *(word.replace("HERE", str(tmp_path)) for word in HERE)]) == 2
    said = capsys.readouterr().err.replace(str(tmp_path), "HERE")
    assert said.startswith("HERE has 1,000 bytes free, ") and said.endswith("are needed; choose another --save-dir\n")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_two_conversions_into_one_directory_are_refused(tmp_path, capsys):
    import fcntl

    plain(tmp_path / "source", model("qwen3_tiny"))
    (tmp_path / ".tmp-out").mkdir()
    with (tmp_path / ".tmp-out" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cli.main(["convert", "fp8", *(word.replace("HERE", str(tmp_path)) for word in HERE)]) == 2
    assert "is in use: another process converts into this directory" in capsys.readouterr().err


def test_a_flag_that_nobody_knows_ends_with_the_usage(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", "fp8", "--blocksize", "128"])
    assert ended.value.code == 2 and "--blocksize" in capsys.readouterr().err
