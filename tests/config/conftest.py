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


@pytest.fixture
def files(here: Path) -> Path:
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
    for name, config in {
        "served_pow2": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0"},
        "served_unknown": {"quant_method": "mxfp4"},
    }.items():
        if name == "served_pow2":
            exp = frontend.experiment("precision=fp8", "precision.scale_format=pow2")
            config = exp.precision.hf(list(exp.model.params()), False)
        (here / name).mkdir()
        (here / name / "config.json").write_text(json.dumps({"quantization_config": config}))
    return here
