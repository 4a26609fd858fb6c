"""`lpexp export`: the bytes are what the trainer published; what cannot be exported is said in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lpexp import cli, frontend
from lpexp.model import hf, shards
from lpexp.model.decoder import Decoder, ServedWeights
from lpexp.model.tokenizer import SYMBOLS, CharTokenizer, HfTokenizer
from lpexp.precision import side
from lpexp.precision.wire import thaw
from tests.small_run import SMALL, exported, named, same, train


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("runs")
    train(at / "run", "steps=3", "task.warmup=null", "precision=int4_qat", "precision.group_size=32")
    return at


@pytest.fixture
def own(at: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    shutil.copytree(at / "run", tmp_path / "run")
    return tmp_path / "run"


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    return said.err


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "wire"), [
    ("qwen3_tiny", "bf16"), ("qwen3_tiny", "fp8"), ("qwen3_tiny", "int4_qat group_size=32"),
    ("deepseek_tiny", "fp8 scale_format=pow2"), ("qwen3_moe_tiny", "int4_qat"),
])  # fmt: skip
def test_the_exported_bytes_are_what_the_trainer_published_at_that_version(tmp_path, monkeypatch, model, wire):
    from lpexp.rollout.embedded import EmbeddedRollout

    published: dict[int, Any] = {}
    honest = EmbeddedRollout.load

    def watched(self, shards, version):
        published[version] = {name: thaw(parts) for shard in shards for name, parts in shard.items()}
        return honest(self, shards, version)

    monkeypatch.setattr(EmbeddedRollout, "load", watched)
    name, *fields = wire.split()
    words = [f"precision={name}", *(f"precision.{field}" for field in fields)]
    run = train(tmp_path / "run", f"model={model}", "task.warmup=null", "steps=2", *words)
    assert sorted(published) == [0, 1, 2]
    for step in (1, 2):
        out = exported(run, wire, tmp_path / f"at{step}", step)
        assert same(hf.load(out)[2], published[step]) == []
    assert same(published[1], published[2]) != [], "nothing was learned, so the test could not fail"


def test_the_newest_checkpoint_is_exported_unless_a_step_is_named(at, tmp_path):
    newest = hf.load(exported(at / "run", "bf16", tmp_path / "newest"))[2]
    assert same(newest, hf.load(exported(at / "run", "bf16", tmp_path / "three", 3))[2]) == []
    assert same(newest, hf.load(exported(at / "run", "bf16", tmp_path / "two", 2))[2]) != []


@pytest.mark.parametrize("words", ["bf16", "fp32", "fp8", "fp8 scale_format=pow2", "int4_qat precision.group_size=64"])
def test_a_run_is_exported_in_any_precision_from_its_16_bit_weights(at, tmp_path, words):
    out, precision = exported(at / "run", words, tmp_path / "out"), named(words)
    plain = hf.load_weights(exported(at / "run", "bf16", tmp_path / "plain"), hf.read_model(tmp_path / "plain"))
    model, _, parts = hf.load(out)
    expected = {p.name: side(p, precision, False).quantize(plain[p.name]) for p in model.params()}
    assert same(parts, expected) == []


def test_the_command_says_what_the_directory_serves(at, tmp_path, capsys):
    typed = ["export", at / "run", "--precision", "fp8", "scale_format=pow2", "--out", tmp_path / "out", "--step", "2"]
    assert cli.main([str(word) for word in typed]) == 0
    said = capsys.readouterr().out
    assert said == f"{tmp_path / 'out'} serves {at / 'run'} at step 2 in fp8 scale_format=pow2\n"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["scale_fmt"] == "ue8m0"


def test_the_exported_model_answers_as_the_run_does(at, tmp_path):
    """Reloaded, the same logits; so the directory is enough to go on from."""
    out = exported(at / "run", "int4_qat group_size=32", tmp_path / "out")
    model, precision, parts = hf.load(out)
    master = load_file(at / "run" / "checkpoints" / "000003" / "master.safetensors")
    run = frontend.experiment(*SMALL, "precision=int4_qat", "precision.group_size=32")
    made = {
        p.name: side(p, run.precision, False).quantize(run.precision.plain.round(master[p.name]))
        for p in model.params()
    }
    tokens = torch.tensor([CharTokenizer().encode("badcfe>")])
    assert precision is not None
    left, right = (
        Decoder(m).logits(ServedWeights(m, p, w), tokens)
        for m, p, w in ((model, precision, parts), (run.model, run.precision, made))
    )
    assert torch.equal(left, right)


def test_the_directory_has_the_character_table_as_a_tokenizer(at, tmp_path):
    out = exported(at / "run", "bf16", tmp_path / "out")
    table, stored = CharTokenizer(), HfTokenizer(out)
    assert (stored.stop_id, stored.vocab_size) == (table.stop_id, table.vocab_size)
    for text in ("", "abc>", "12+30=", "a b\n\\ \"<'", SYMBOLS, SYMBOLS[::-1]):
        assert stored.encode(text) == stored.encode_prompt(text) == table.encode(text)
    generator = torch.Generator().manual_seed(0)
    for length in range(40):
        ids = torch.randint(0, 64, (length,), generator=generator).tolist()
        assert stored.decode(ids) == table.decode(ids)
    with pytest.raises(Exception, match="UNK"):
        stored.encode("A")


def test_transformers_reads_the_tokenizer(at, tmp_path):
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(exported(at / "run", "bf16", tmp_path / "out"))
    assert read("ab c>").input_ids == CharTokenizer().encode("ab c>")
    assert (read.eos_token_id, read.decode(CharTokenizer().encode("ab c>"))) == (1, "ab c>")


def test_a_run_that_starts_from_the_directory_exports_its_tokenizer_files_on(at, tmp_path):
    first = exported(at / "run", "bf16", tmp_path / "first")
    (first / "chat_template.jinja").write_text("{{ messages[0].content }}")
    second = exported(train(tmp_path / "run", f"model.path={first}", "steps=1"), "fp8", tmp_path / "second")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (second / name).read_bytes() == (first / name).read_bytes()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("typed", "says"), [
    (("--precision", "fp9"), "--precision: there is no 'fp9' -- did you mean 'fp8'? there are "),
    (("--precision", "group_size=32"), "--precision: group_size=32 changes nothing yet; type --precision NAME"),
    (("--precision", "bf16", "fp8"), "--precision: bf16, fp8: one directory has one; name one"),
    (("--precision", "int4_qat", "groupsize=32"), "int4_qat.groupsize: unknown key, given 32 -- did you mean"),
    (("--precision", "int4_qat", "divisor=6"), "int4_qat.divisor: 6 is no grid"),
    (("--precision", "int4_qat", "group_size=[1"), "--precision: group_size=[1 cannot be read"),
    (("--precision", "int4_qat", "group_size=48"), "int4_qat.group_size: 48 does not divide 128, the inputs of"),
    (("--precision", "int4_qat", "scope=experts"), "experts covers nothing: the model has no routed experts"),
    (("--precision", "bf16", "--step", "7"), "has no checkpoint of step 7; there are 1, 2, 3"),
])  # fmt: skip
def test_what_cannot_be_written_is_refused_and_leaves_nothing(at, tmp_path, capsys, typed, says):
    assert says in refused(capsys, "export", at / "run", "--out", tmp_path / "out", *typed)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_untouched(at, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    said = refused(capsys, "export", at / "run", "--precision", "bf16", "--out", tmp_path / "out")
    assert f"{tmp_path / 'out'} exists already" in said
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
    said = refused(capsys, "export", at / "run", "--precision", "bf16", "--out", tmp_path / "out" / "mine" / "in")
    assert "cannot be made" in said


def test_what_is_no_run_is_refused(at, tmp_path, capsys):
    def export(source: Path) -> str:
        return refused(capsys, "export", source, "--precision", "bf16", "--out", tmp_path / "out")

    assert f"{tmp_path / 'none'} is no directory; name a run" in export(tmp_path / "none")
    assert f"{tmp_path} is no run: it has neither checkpoints/ nor metrics.jsonl" in export(tmp_path)
    assert f"type {at / 'run'} --step 2" in export(at / "run" / "checkpoints" / "000002")
    (tmp_path / "metrics.jsonl").write_text("")
    assert f"{tmp_path} has no complete checkpoint" in export(tmp_path)


def tear(run: Path, step: int) -> None:
    path = run / "checkpoints" / f"{step:06d}" / "master.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def test_a_torn_checkpoint_is_named_and_passed_over_but_not_when_it_was_asked_for(own, tmp_path, capsys):
    tear(own, 3)
    assert cli.main(["export", str(own), "--precision", "bf16", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "at step 2" in said.out and "000003 is skipped" in said.err and "master.safetensors has" in said.err
    words = ("--precision", "bf16", "--out", tmp_path / "other")
    assert "000003 is torn: master.safetensors has" in refused(capsys, "export", own, *words, "--step", 3)
    tear(own, 2)
    tear(own, 1)
    said = refused(capsys, "export", own, *words)
    assert "has no complete checkpoint" in said and all(f"00000{step}" in said for step in (1, 2, 3))
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_that_is_gone_is_refused(at, tmp_path, capsys):
    first = exported(at / "run", "bf16", tmp_path / "first")
    run = train(tmp_path / "run", f"model.path={first}", "steps=1")
    shutil.rmtree(first)
    said = refused(capsys, "export", run, "--precision", "bf16", "--out", tmp_path / "out")
    assert "first/tokenizer.json" in said and "is gone" in said and not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_behind(at, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    broken: Callable[..., None] = full
    monkeypatch.setattr(shards, "write", broken)
    assert cli.main(["export", str(at / "run"), "--precision", "bf16", "--out", str(tmp_path / "out")]) == 1
    assert "could not be written: No space left on device; nothing was left there" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
