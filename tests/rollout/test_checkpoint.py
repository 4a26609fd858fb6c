"""`rollout.checkpoint`: the directory is version 0, bit for bit; every later version is the trainer's own rounding."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lpexp import frontend, loop, plan
from lpexp.compare import compare
from lpexp.errors import ConfigError, NonFiniteWeightError, RunError
from lpexp.model import hf
from lpexp.precision import Parts, side
from lpexp.precision.wire import checksum, ship
from tests.small_run import SMALL, calibrated, events, exported, lines, same, train

G32 = ("precision=int4_qat", "precision.group_size=32")
UP = "model.layers.0.mlp.up_proj.weight"
MAX = "mismatch/logprob_abs_diff_max"


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run: two steps from a random start; plain and served copies of it; cal: one code is not the nearest."""
    at = tmp_path_factory.mktemp("served")
    train(at / "run", "steps=2", "task.warmup=null")
    for name, words in {
        "plain": "bf16",
        "single": "fp32",
        "g32": "int4_qat group_size=32",
        "g64": "int4_qat group_size=64",
        "fp8": "fp8",
        "pow2": "fp8 scale_format=pow2",
        "channel": "fp8_channel",
        "tensor": "fp8_tensor",
        "w8": "w8a16 group_size=32",
    }.items():
        exported(at / "run", words, at / name)
    calibrated(at / "g32", at / "cal")
    return at


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Parts]]:
    """Everything that an engine served from, in order."""
    from lpexp.model import decoder

    seen: list[dict[str, Parts]] = []

    class Watched(decoder.ServedWeights):
        def __init__(self, model: Any, precision: Any, parts: Any):
            seen.append(dict(parts))
            super().__init__(model, precision, parts)

    monkeypatch.setattr(decoder, "ServedWeights", Watched)
    return seen


def words(at: Path, name: str, *more: str) -> list[str]:
    return [f"model.path={at / 'plain'}", f"rollout.checkpoint={at / name}", *more]


def experiment(at: Path, name: str, *more: str) -> Any:
    return frontend.experiment(*SMALL, *words(at, name, *more))


def steps(run: Path, key: str = MAX) -> list[float]:
    return [line[key] for line in lines(run)]


# -- what is served ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [(), G32], ids=["bf16", "int4_qat"])
def test_version_0_is_the_directory_s_bytes_and_every_later_one_the_trainer_s(at, tmp_path, served, trained):
    run = train(tmp_path / "run", *words(at, "cal", "steps=2", *trained))
    first, *later = served
    assert same(first, hf.load(at / "cal")[2]) == []
    assert same(first, hf.load(at / "g32")[2]) == [UP], "rounding to nearest would have served other bytes"
    assert len(later) == 2
    for version, parts in enumerate(later, 1):
        made = exported(run, "int4_qat group_size=32", tmp_path / f"v{version}", version)
        assert same(parts, hf.load(made)[2]) == []
    assert len(same(later[0], first)) > 10, "the update moved nothing, so the test could not fail"


def test_a_directory_that_was_only_rounded_keeps_the_zero_and_one_other_code_breaks_it_until_the_update(at, tmp_path):
    rounded = train(tmp_path / "rounded", *words(at, "g32", "steps=3", *G32))
    assert steps(rounded) == [0.0, 0.0, 0.0]
    calibrated_first = train(tmp_path / "cal", *words(at, "cal", "steps=3", *G32))
    first, *later = steps(calibrated_first)
    assert first > 0 and later == [0.0, 0.0]


@pytest.mark.parametrize(("name", "trained", "wire"), [
    ("fp8", "bf16", "fp8"), ("g32", "bf16", "int4_qat"), ("pow2", "int4_qat", "fp8"), ("plain", "fp8", "bf16"),
    ("plain", "bf16", "bf16"), ("single", "bf16", "fp32"),
])  # fmt: skip
def test_the_directory_decides_what_the_rollout_serves(at, name, trained, wire):
    exp = experiment(at, name, f"precision={trained}")
    assert (exp.precision.name, exp.wire.name) == (trained, wire)
    model = exp.model
    _, found, parts = hf.load(at / name)
    expected = ship({n: torch.zeros(p.shape) for n, p in _params(model).items()}, model.params(), exp.wire, False)
    for param, made in expected:
        stored = parts[param.name]
        assert {k: (v.dtype, v.shape) for k, v in stored.items()} == {k: (v.dtype, v.shape) for k, v in made.items()}
    assert (found is None) == (wire in ("bf16", "fp32"))


def test_the_trainer_s_own_format_with_equal_fields_is_the_trainer_s(at):
    exp = experiment(at, "cal", *G32)
    assert exp.rollout.precision is None and exp.wire is exp.precision


def test_a_field_that_changes_no_served_code_may_differ(at):
    exp = experiment(at, "fp8", "precision=fp8", "precision.backward=high_precision")
    assert exp.wire is exp.precision


def test_both_typed_precisions_stand_when_the_directory_agrees(at):
    more = ("precision=int4_qat", "rollout.precision=int4_qat", "rollout.precision.group_size=32")
    exp = experiment(at, "g32", *more)
    assert (exp.precision.group_size, exp.wire.group_size) == (128, 32)


@pytest.mark.parametrize(("name", "wire"), [("channel", "fp8_channel"), ("tensor", "fp8_tensor"), ("w8", "w8a16")])
def test_a_precision_that_only_serves_is_served_from_its_directory_and_kept_by_the_updates(
    at, tmp_path, served, name, wire
):
    run = train(tmp_path / "run", *words(at, name, "steps=1"))
    assert same(served[0], hf.load(at / name)[2]) == []
    fields = f"{wire} group_size=32" if wire == "w8a16" else wire
    assert same(served[1], hf.load(exported(run, fields, tmp_path / "out"))[2]) == []


@pytest.mark.parametrize("model", ["qwen3_moe_tiny", "deepseek_tiny", "qwen2_tiny"])
def test_other_architectures_are_served_from_their_directories_too(tmp_path, served, model):
    run = train(tmp_path / "start", f"model={model}", "task.warmup=null", "steps=1")
    at = exported(run, "int4_qat group_size=32", tmp_path / "g32").parent
    exported(run, "bf16", at / "plain")
    served.clear()
    train(tmp_path / "run", f"model={model}", *words(at, "g32", "steps=1"))
    assert same(served[0], hf.load(at / "g32")[2]) == []


def test_two_engines_and_ranks_in_processes_serve_the_same_bytes(at, tmp_path):
    inline = train(tmp_path / "inline", *words(at, "cal", "steps=2"))
    apart = train(tmp_path / "apart", *words(at, "cal", "steps=2", "cluster=local"))
    assert compare(inline, apart, exact=True) == 0
    said = [events(run, "checkpoint_served")[0]["checksum"] for run in (inline, apart)]
    assert said[0] == said[1] == checksum(hf.load(at / "cal")[2])


def test_an_engine_that_died_is_given_the_directory_again(at, tmp_path, served):
    from lpexp.cluster import Workers, _Done
    from lpexp.model.tokenizer import load_tokenizer
    from lpexp.rollout import Sampling

    class Dead(_Done):
        def died(self) -> bool:
            return True

    exp, told = experiment(at, "cal"), []
    workers = Workers(exp.cluster, lambda kind, **fields: told.append(kind), tmp_path)
    rollout: Any = exp.rollout.build(exp, workers)
    rollout.open(str(at / "cal"))
    prompts = exp.task.held_out(1, 4, load_tokenizer(exp.model))
    call = ("sample", prompts, Sampling(samples=2), 0)
    expected, _ = rollout.engines[0].call(*call).result()
    served.clear()
    dead = Dead(None, RunError("killed"))
    healed, _ = rollout.owed(0, rollout.engines[0], dead, call, (rollout.shards, rollout.version))
    assert told == ["engine_healed"] and len(served) == 1 and same(served[0], hf.load(at / "cal")[2]) == []
    answers = [
        [sample.tokens_T.tolist() for group in groups for sample in group.samples] for groups in (expected, healed)
    ]
    assert answers[0] == answers[1]
    workers.close()


# -- what is said ------------------------------------------------------------------------------------------------------


def test_header_summary_and_plan_say_for_how_long_the_directory_is_served(at, tmp_path, capsys):
    run = train(tmp_path / "run", *words(at, "cal", "steps=1"))
    text = (
        f"{at / 'cal'} serves version 0 as it is stored; the first weight update replaces its (calibrated) values by "
        "the trainer's own rounding to int4_qat"
    )
    assert capsys.readouterr().out.count(text) == 2
    assert json.loads((run / "summary.json").read_text())["checkpoint"] == text
    assert text in plan.text(experiment(at, "cal"))
    assert "rollout.checkpoint" not in json.loads((run / "summary.json").read_text())["next"]


def test_a_run_without_a_directory_says_nothing_of_one(at):
    assert json.loads((at / "run" / "summary.json").read_text()).get("checkpoint") is None
    assert events(at / "run", "checkpoint_served") == []


# -- resume ------------------------------------------------------------------------------------------------------------


def interrupted(run: Path, out: Path, step: int) -> Path:
    """What a run that was killed after the checkpoint of `step` had left."""
    shutil.copytree(run, out)
    (out / "finished.json").unlink()
    for folder in (out / "checkpoints").iterdir():
        if folder.is_dir() and int(folder.name) > step:
            shutil.rmtree(folder)
    return out


def resumed(out: Path, *more: str) -> Path:
    typed = [*SMALL, f"output_dir={out}", "resume=auto", *more]
    assert loop.run(frontend.experiment(*typed), typed) == 0
    return out


@pytest.mark.parametrize(("lag", "step"), [(0, 1), (1, 1), (1, 2)])
def test_a_killed_run_resumes_to_the_same_bytes(at, tmp_path, lag, step):
    more = words(at, "cal", "steps=3", f"lag={lag}")
    whole = train(tmp_path / "whole", *more)
    half = resumed(interrupted(whole, tmp_path / "half", step), *more)
    assert compare(whole, half, exact=True) == 0
    assert len(events(half, "checkpoint_served")) == (2 if lag and step == 1 else 1), "only while version 0 is served"


@pytest.fixture
def own(at, tmp_path) -> Path:
    """Directories that a test may change."""
    for name in ("plain", "cal"):
        shutil.copytree(at / name, tmp_path / name)
    return tmp_path


def test_after_the_first_update_the_directory_s_values_play_no_part(own, at):
    more = words(own, "cal", "steps=3")
    whole = train(own / "whole", *more)
    shutil.rmtree(own / "cal")
    shutil.copytree(at / "g32", own / "cal")
    assert compare(whole, resumed(interrupted(whole, own / "half", 1), *more), exact=True) == 0


def test_a_directory_that_is_gone_can_be_done_without_after_the_first_update(own):
    more = words(own, "cal", "steps=3")
    whole = train(own / "whole", *more)
    half = interrupted(whole, own / "half", 1)
    shutil.rmtree(own / "cal")
    with pytest.raises(ConfigError, match=r"rollout\.checkpoint: .*cannot be read"):
        frontend.experiment(*SMALL, *more)
    without = ["rollout.precision=int4_qat", "rollout.precision.group_size=32", "resume_force=true"]
    resumed(half, more[0], "steps=3", *without)
    assert compare(whole, half, exact=True) == 0


def test_a_directory_that_changed_while_version_0_is_still_served_is_refused(own, at):
    more = words(own, "cal", "steps=3", "lag=1")
    half = interrupted(train(own / "whole", *more), own / "half", 1)
    shutil.rmtree(own / "cal")
    shutil.copytree(at / "g32", own / "cal")
    with pytest.raises(RunError, match="has changed since this run began"):
        resumed(half, *more)


# -- refusals beside tests/config/wrong_configs.yaml -------------------------------------------------------------------


@pytest.mark.parametrize(("name", "more"), [
    ("g32", ("precision=int4_qat",)),
    ("pow2", ("precision=fp8",)),
    ("g32", ("rollout.precision=fp8",)),
    ("g32", ("rollout.precision=int4_qat", "rollout.precision.group_size=64")),
    ("plain", ("rollout.precision=fp8",)),
    ("g32", (*G32, "precision.scope=[mlp_up]")),
])  # fmt: skip
def test_the_overrides_that_a_refusal_names_are_accepted(at, name, more):
    with pytest.raises(ConfigError) as refused:
        experiment(at, name, *more)
    assert len(refused.value.mistakes) == 1
    typed = str(refused.value).rpartition("; type ")[2].split()
    keys = [word.partition("=")[0] for word in typed]
    kept = [word for word in more if word.partition("=")[0] not in keys]
    assert experiment(at, name, *kept, *typed).wire is not None


def damaged(at: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    shutil.copytree(at / "g32", out)
    (shard,) = out.glob("*.safetensors")
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)
    (out / hf.INDEX).unlink()
    shard.rename(out / hf.SINGLE)
    return out


NORM, SCALE = "model.norm.weight", "model.layers.0.mlp.up_proj.weight_scale"


@pytest.mark.parametrize(("change", "says"), [
    (lambda t: t.pop(NORM), f"{NORM} is missing"),
    (lambda t: t.pop(SCALE), f"{SCALE} is missing"),
    (lambda t: t.update(stray=t[NORM].clone()), "stray is no tensor of"),
    (lambda t: t.update({NORM: t[NORM].half()}), f"{NORM} is float16, int4_qat serves it as bfloat16"),
    (lambda t: t.update({NORM: t[NORM][:64].clone()}), rf"{NORM} has shape \[64\], expected \[128\]"),
    (lambda t: t.update({SCALE: t[SCALE][:, :2].clone()}), rf"{SCALE} has shape \[256, 2\], expected"),
])  # fmt: skip
def test_what_the_headers_show_is_refused_when_the_config_is_judged(at, tmp_path, change, says):
    out = damaged(at, tmp_path / "bad", change)
    with pytest.raises(ConfigError, match=rf"(?s)rollout\.checkpoint: .*{says}"):
        frontend.experiment(*SMALL, f"model.path={at / 'plain'}", f"rollout.checkpoint={out}")


@pytest.mark.parametrize(("change", "error", "says"), [
    (lambda t: t[SCALE].fill_(float("nan")), NonFiniteWeightError, f"{SCALE}: 512 non-finite|{SCALE}: .* non-finite"),
    (lambda t: t[SCALE].neg_(), RunError, "weight_scale holds a value that is not finite and positive"),
])  # fmt: skip
def test_what_only_the_values_show_stops_the_run_before_its_first_answer(at, tmp_path, change, error, says):
    out = damaged(at, tmp_path / "bad", change)
    with pytest.raises(error, match=says):
        train(tmp_path / "run", f"model.path={at / 'plain'}", f"rollout.checkpoint={out}")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_directory_that_was_swapped_after_judging_is_refused_by_the_contract(own, at):
    exp = experiment(own, "cal", f"output_dir={own / 'run'}")
    shutil.rmtree(own / "cal")
    shutil.copytree(at / "g64", own / "cal")
    with pytest.raises(RunError, match=r"rollout disagrees on model\.layers\.0\.mlp\.down_proj\.weight"):
        loop.run(exp)


def test_an_engine_that_holds_other_bytes_than_the_disk_is_refused(at, tmp_path, monkeypatch):
    from lpexp.rollout import embedded

    honest = embedded.EmbeddedEngine._placed

    def torn(self, parts):
        made = {suffix: part.clone() for suffix, part in honest(self, parts).items()}
        if "weight_packed" in made:
            made["weight_scale"][0, 0] *= 2
        return made

    monkeypatch.setattr(embedded.EmbeddedEngine, "_placed", torn)
    with pytest.raises(RunError, match="engine 0 holds"):
        train(tmp_path / "run", *words(at, "cal", "steps=1"))


def test_judging_a_served_directory_loads_no_torch(at):
    typed = [*SMALL, *words(at, "cal")]
    code = (
        "import sys; from lpexp import frontend\n"
        f"exp = frontend.experiment(*{typed!r})\n"
        "print(exp.wire.name, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["int4_qat", "False"]


def _params(model: Any) -> dict[str, Any]:
    return {param.name: param for param in model.params()}


def test_parts_of_a_directory_are_not_quantised_again(at):
    """What the fixture relies on: the calibrated code is not what the precision would make of its own value."""
    model, precision, parts = hf.load(at / "cal")
    assert precision is not None
    param = _params(model)[UP]
    plain = hf.load_weights(at / "plain", model)[UP]
    again = side(param, precision, False).quantize(plain)
    assert not torch.equal(again["weight_packed"], parts[UP]["weight_packed"])
