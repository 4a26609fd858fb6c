"""Typing a command line in this process: what it prints, its exit code, and that nothing was started."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import launch
from lpexp import frontend


class Said(NamedTuple):
    """What a command answered."""

    code: int
    out: str
    err: str


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a shell without variables that change numerics."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "NVTE_FP8_BLOCK_SCALING_FP32_SCALES",
        "OPEN_TRAINING_INT4_FAKE_QAT_FLAG",
        "OPEN_TRAINING_INT4_GROUP_SIZE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return tmp_path


@pytest.fixture
def type_line(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`python launch.py ...` in this process; a run that would start ends with exit code 99 instead."""
    loop = types.ModuleType("lpexp.loop")
    loop.run = lambda exp, overrides: 99  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpexp.loop", loop)

    def type_line(*words: str, **env: str) -> Said:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        code = frontend.guard(launch.main, words)
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return type_line


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model at random: 16 bits, served copies of it, and what can be wrong with one."""
    import torch

    from lpexp.model import hf
    from lpexp.model.decoder import initial_tensors
    from lpexp.model.tokenizer import CharTokenizer
    from lpexp.precision.fp32 import Fp32

    at = tmp_path_factory.mktemp("directories")
    exp = frontend.experiment()
    tensors = {name: tensor.bfloat16().float() for name, tensor in initial_tensors(exp.model, 1).items()}
    group32 = ("precision=int4_qat", "precision.group_size=32")
    copies = {
        "plain": (),
        "served_pow2": ("precision=fp8", "precision.scale_format=pow2"),
        "served_g32": group32,
        "served_up": (*group32, "precision.scope=[mlp_up]"),
    }
    for name, words in copies.items():
        hf.save(at / name, exp.model, tensors.items(), frontend.experiment(*words).precision)
    other = initial_tensors(exp.model, 2).items()
    hf.save(at / "served_other", exp.model, other, frontend.experiment(*group32).precision)
    hf.save(at / "served_gap", exp.model, tensors.items(), frontend.experiment(*group32).precision, 200_000)
    hf.save(at / "served_cut", exp.model, tensors.items(), frontend.experiment(*group32).precision)
    hf.save(at / "served_half", exp.model, tensors.items(), Fp32(name="fp32"))
    CharTokenizer().save(at / "plain")
    next((at / "served_gap").glob("model-00002-*")).unlink()
    (shard,) = (at / "served_cut").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-10])
    (shard,) = (at / "served_half").glob("*.safetensors")
    from safetensors.torch import load_file, save_file

    save_file({name: tensor.to(torch.float16) for name, tensor in load_file(shard).items()}, shard)
    for name, change in {"served_unknown": {"quant_method": "mxfp4"}, "served_vague": {"quant_method": "fp8"}}.items():
        (at / name).mkdir()
        config = json.loads((at / "plain" / hf.CONFIG).read_text())
        (at / name / hf.CONFIG).write_text(json.dumps(config | {"quantization_config": change}))
        for file in (at / "plain").glob("model*"):
            (at / name / file.name).symlink_to(file)
    return at


@pytest.fixture
def files(here: Path, directories: Path) -> Path:
    """What the wrong configs point at."""
    rows = [{"prompt": f"{n}+{n}=", "label": str(2 * n)} for n in range(60)]
    (here / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "empty.jsonl").write_text("")
    (here / "malformed.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n{"promt": "1+2="}\nnot json\n')
    (here / "hollow").mkdir()
    own = here / "own"
    own.mkdir()
    (own / "torn.yaml").write_text("defaults: [config, _self_]\nsteps: [1\nseed: 2\n")
    (own / "typo.yaml").write_text("defaults: [config, _self_]\nstpes: 3\ntrainer: {lrr: 1}\n")
    (own / "stray.yaml").write_text("defaults: [config, {override /precision: fp9}, _self_]\n")
    (own / "strange.yaml").write_text("defaults: [config, _self_]\nprecision: {_target_: lpexp.precision.fp7.Fp7}\n")
    (own / "other.yaml").write_text("defaults: [config, _self_]\nprecision: {_target_: lpexp.cluster.Cluster}\n")
    for directory in directories.iterdir():
        (here / directory.name).symlink_to(directory)
    return here
