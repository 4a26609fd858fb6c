"""`lpexp convert`: the bytes that the exporter writes, for any number of workers and whatever happens on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from lpexp import cli
from lpexp.convert import LOCK, NOTES, Work, convert
from lpexp.model import hf, shards
from lpexp.precision.wire import ship
from tests.convert.directories import BF16, WAYS, digests, plain, random
from tests.precision.contract import MODELS, model, same_bytes

WAY = WAYS["fp8"][1]


# -- one contract, five places -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_converter_exporter_wire_and_reload_hold_the_same_bytes(way: str, name: str, tmp_path: Path):
    """Random, boundary, zero, maximum and tiny weights, in the trainer's products too."""
    words, precision = WAYS[way]
    small, tensors = model(name), random(model(name))
    source = plain(tmp_path / "source", small, tensors)
    words = [*words, "--model-dir", str(source), "--save-dir", str(tmp_path / "converted"), "--max-workers", "1"]
    assert cli.main(["convert", *words]) == 0
    saved = hf.save(tmp_path / "saved", small, tensors.items(), precision)
    assert digests(tmp_path / "converted") == digests(saved)

    _, found, reloaded = hf.load(tmp_path / "converted")
    params, moe = list(small.params()), small.moe is not None
    assert found is not None and found.contract(params, moe) == precision.contract(params, moe)
    sent = {param.name: parts for param, parts in ship(tensors, params, precision, moe)}
    assert all(same_bytes(reloaded[name], sent[name]) for name in sent) and reloaded.keys() == sent.keys()
    x = precision.round(torch.randn(3, 128))
    for param in params:
        if precision.covers(param, moe) and param.shape[1] == 128 and torch.isfinite(tensors[param.name]).all():
            served = precision.serve(x, precision.operand(reloaded[param.name]))
            assert torch.equal(served, precision.linear(x, tensors[param.name].float())), param.name


def test_a_changed_code_in_the_converter_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = plain(tmp_path / "source", model("qwen3_tiny"))
    saved = hf.save(tmp_path / "saved", model("qwen3_tiny"), random(model("qwen3_tiny")).items(), WAY)
    write = shards.write

    def off_by_one(directory, entry, tensor, first=0):
        if entry.dtype == "float8_e4m3fn" and first == 0:
            tensor = tensor.clone()
            tensor.view(torch.uint8)[0, 0] ^= 1
        return write(directory, entry, tensor, first)

    monkeypatch.setattr(shards, "write", off_by_one)
    convert(source, tmp_path / "converted", WAY)
    assert digests(tmp_path / "converted") != digests(saved)


# -- bytes do not depend on how it is done -----------------------------------------------------------------------------
@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sharded source whose tensors are cut into many jobs of many pieces."""
    for name, values in (("JOB_VALUES", 1 << 14), ("SLICE_VALUES", 1 << 12)):
        monkeypatch.setattr(f"lpexp.convert.{name}", values)
    return plain(tmp_path / "source", model("qwen3_moe_tiny"), shard_bytes=300_000)


@pytest.mark.parametrize("way", ["fp8", "fp8 tensor", "int4 g32"])
def test_the_number_of_workers_and_of_pieces_changes_no_byte(way: str, tmp_path: Path):
    precision, source = WAYS[way][1], plain(tmp_path / "source", model("qwen3_moe_tiny"), shard_bytes=300_000)
    convert(source, tmp_path / "one", precision, shard_bytes=200_000)
    convert(source, tmp_path / "three", precision, workers=3, shard_bytes=200_000)
    assert digests(tmp_path / "one") == digests(tmp_path / "three") and len(digests(tmp_path / "one")) > 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lpexp.convert.JOB_VALUES", 1 << 14)
        patch.setattr("lpexp.convert.SLICE_VALUES", 1 << 12)
        convert(source, tmp_path / "pieces", precision, shard_bytes=200_000)
    assert digests(tmp_path / "pieces") == digests(tmp_path / "one")


def test_a_tensor_is_never_whole_in_memory_where_its_rows_are_independent(many: Path, monkeypatch: pytest.MonkeyPatch):
    read, largest = shards.read, 0

    def watched(directory, entry, first=0, last=None):
        nonlocal largest
        tensor = read(directory, entry, first, last)
        largest = max(largest, tensor.numel())
        return tensor

    monkeypatch.setattr(shards, "read", watched)
    convert(many, many.with_name("out"), WAYS["int4 g32"][1])
    assert (
        0 < largest <= 1 << 12 < max(p.shape[0] * p.shape[1] for p in model("qwen3_moe_tiny").params() if p.shape[1:])
    )


@pytest.mark.parametrize(
    ("workers", "damage"),
    [(2, "nothing"), (1, "nothing"), (1, "a byte of a finished piece"), (1, "the last note"), (1, "the source")],
)
def test_a_killed_conversion_goes_on_to_the_bytes_of_an_undisturbed_one(workers, damage, many, tmp_path, capsys):
    whole, out, temp = tmp_path / "whole", tmp_path / "out", tmp_path / ".tmp-out"
    convert(many, whole, WAY)
    killed = _killed_after(20, many, out, workers)
    assert killed == -signal.SIGKILL and not out.exists()
    noted = (temp / NOTES).read_text().splitlines()
    assert len(noted) == 21  # and the key
    if damage == "a byte of a finished piece":
        made = hf.plan(list(model("qwen3_moe_tiny").params()), True, WAY)
        work = Work(hf.Stored(many, hf.read_model(many), None), WAY, list(hf.read_model(many).params()), made, temp)
        entry = made.places[work.params[work.jobs[json.loads(noted[1])[0]].param].name]
        with (temp / entry.file).open("r+b") as file:
            file.seek(entry.start)
            byte = file.read(1)[0]
            file.seek(entry.start)
            file.write(bytes([byte ^ 0xFF]))
    elif damage == "the last note":
        (temp / NOTES).write_text("\n".join(noted)[:-9])
    elif damage == "the source":
        (shard,) = [path for path in many.iterdir() if "00001-of" in path.name]
        os.utime(shard, ns=(1, 1))
    said: list[str] = []
    convert(many, out, WAY, workers=workers, say=said.append)
    assert digests(out) == digests(whole) and not temp.exists()
    kept = {"nothing": 20, "a byte of a finished piece": 19, "the last note": 19}.get(damage)
    assert any(line.startswith(f"going on: {kept} of ") for line in said) == (kept is not None)
    assert any("starting again" in line for line in said) == (damage == "the source")


KILLED = """
import os, signal, sys
from pathlib import Path
import lpexp.convert as module
from tests.convert.directories import WAYS
module.JOB_VALUES, module.SLICE_VALUES = 1 << 14, 1 << 12
noted, count = module._noted, 0

def counted(result):
    global count
    count += 1
    if count > {after}:
        print(*[child.pid for child in __import__("psutil").Process().children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return noted(result)

module._noted = counted
module.convert(Path({source!r}), Path({out!r}), WAYS["fp8"][1], workers={workers})
"""


def _killed_after(after: int, source: Path, out: Path, workers: int) -> int:
    """Exit code of a conversion that ends itself with SIGKILL when so many pieces were noted; its workers end too."""
    code = KILLED.format(after=after, source=str(source), out=str(out), workers=workers)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    children = [int(pid) for pid in done.stdout.split()]
    assert len(children) == (workers if workers > 1 else 0), done.stderr
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in children):
        assert time.monotonic() < deadline, "a worker outlives the conversion"
        time.sleep(0.05)
    return done.returncode


def test_a_killed_worker_is_told_and_the_same_command_goes_on(many, tmp_path, monkeypatch):
    def kill_one(result):
        victims = psutil.Process().children()
        if victims:
            victims[0].kill()
        return [result.checksum, result.tally.row(), result.bytes]

    from lpexp.errors import RunError

    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"a worker ended with code -9"):
        patch.setattr("lpexp.convert._noted", kill_one)
        convert(many, tmp_path / "out", WAY, workers=2)
    assert (tmp_path / ".tmp-out" / NOTES).exists() and not (tmp_path / "out").exists()
    convert(many, tmp_path / "out", WAY, workers=2)
    convert(many, tmp_path / "whole", WAY)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(many, tmp_path, monkeypatch, capsys):
    words = ["convert", "fp8", "--model-dir", str(many), "--save-dir", str(tmp_path / "out"), "--max-workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("lpexp.convert._noted", lambda result: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(words) == 130
    assert f"the same command goes on from {tmp_path / '.tmp-out'}" in capsys.readouterr().err
    assert (tmp_path / ".tmp-out" / LOCK).exists()
    assert cli.main(words) == 0


# -- what is written ---------------------------------------------------------------------------------------------------
def test_the_index_tells_true_sizes_and_the_library_reads_every_shard(many: Path, tmp_path: Path):
    convert(many, tmp_path / "out", WAY, shard_bytes=150_000)
    index = json.loads((tmp_path / "out" / hf.INDEX).read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    held = {path.name: load_file(path) for path in files}
    assert len(files) > 3
    assert {name: file for file in held for name in held[file]} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in held.values() for t in file.values())


def test_config_and_files_beside_it_travel_and_weights_of_other_kinds_do_not(tmp_path: Path):
    source = plain(tmp_path / "source", model("qwen3_tiny"))
    for name in ("tokenizer.json", "modeling_mine.py", "consolidated.pth", ".hidden", "other.safetensors.index.json"):
        (source / name).write_text("{}")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_mine.M"}}))
    convert(source, tmp_path / "out", WAY)
    names = {path.name for path in (tmp_path / "out").iterdir() if "safetensors" not in path.name}
    assert names == {"config.json", "tokenizer.json", "modeling_mine.py"}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["auto_map"] == {"AutoModel": "modeling_mine.M"}
    assert written["quantization_config"] == WAY.hf(list(model("qwen3_tiny").params()), False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_source_of_another_float_type_is_rounded_to_16_bits_first(dtype, tmp_path: Path):
    small = model("qwen3_tiny")
    tensors = {name: (torch.randn(t.shape) * 0.05).to(dtype) for name, t in random(small).items()}
    directory = plain(tmp_path / "bf16", small, tensors)
    from safetensors.torch import save_file

    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / hf.SINGLE)
    (tmp_path / "source" / "config.json").write_text((directory / "config.json").read_text())
    convert(tmp_path / "source", tmp_path / "a", WAY)
    convert(directory, tmp_path / "b", WAY)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    convert(tmp_path / "source", tmp_path / "c", BF16)
    assert digests(tmp_path / "c") == digests(directory)


def test_the_report_counts_tensors_codes_and_zero_blocks_by_module_class(tmp_path: Path, capsys):
    small = model("qwen3_moe_tiny")
    tensors = random(small)
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    tensors[name] = torch.zeros_like(tensors[name])
    source = plain(tmp_path / "source", small, tensors)
    report = convert(source, tmp_path / "out", WAYS["int4 g32"][1])
    count, tally = report.kinds["expert_up"]
    assert count == 32 and set(report.kinds) == {"expert_up", "expert_down"}
    assert tally.zero_blocks == 128 * 4 and tally.blocks == 32 * 128 * 4 and tally.codes == 32 * 128 * 128
    assert tally.stats()["sqnr_db"] == pytest.approx(20.3, abs=0.3)
    lines = report.text().splitlines()
    assert " ".join(lines[0].split()) == "module class tensors relative error SQNR saturated codes zero blocks"
    assert lines[1].startswith("expert_up") and lines[1].endswith(" 512")


def test_ragged_blocks_are_warned_of_by_name_and_reload(tmp_path: Path, capsys):
    from tests.model.small import build, weights

    small = build("qwen3")  # 192 wide MLP
    source = plain(tmp_path / "source", small, {k: v.bfloat16() for k, v in weights(small).items()})
    assert cli.main(["convert", "fp8", "--input-dir", str(source), "--output-dir", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out.splitlines()[0]
    assert told.startswith("warning: transformers cannot read tensors that end inside a block of 128 (lpexp can): ")
    assert told.endswith(", ".join(f"model.layers.*.mlp.{part}_proj" for part in ("gate", "up", "down")))
    _, _, parts = hf.load(tmp_path / "out")
    for param in small.params():
        if WAY.covers(param, False):
            assert same_bytes(parts[param.name], WAY.quantize(weights(small)[param.name]))


def test_nothing_moves_on_a_stream_that_is_no_terminal(many: Path, tmp_path: Path, capsys):
    words = ["convert", "fp8", "--model-dir", str(many), "--save-dir", str(tmp_path / "out"), "--max-workers", "1"]
    assert cli.main(words) == 0
    assert capsys.readouterr().err == ""


def test_a_terminal_sees_speed_and_time_left(many: Path, tmp_path: Path):
    import pty

    primary, secondary = pty.openpty()
    words = ["convert", "fp8", "--model-dir", str(many), "--save-dir", str(tmp_path / "out"), "--max-workers", "1"]
    code = f"from lpexp import cli; raise SystemExit(cli.main({words!r}))"
    with subprocess.Popen([sys.executable, "-c", code], stderr=secondary, stdout=subprocess.DEVNULL) as process:
        os.close(secondary)
        seen = b""
        while True:
            try:
                chunk = os.read(primary, 4096)
            except OSError:
                break
            if not chunk:
                break
            seen += chunk
        os.close(primary)
    assert process.returncode == 0 and b"B/s" in seen and b"0:00:0" in seen
