"""The plan: printed anywhere, from the config alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lpexp import frontend, plan
from lpexp.groups import choices
from lpexp.precision import side


def test_dry_run_prints_the_plan_and_starts_nothing(type_line: Any, here: Path) -> None:
    said = type_line("dry_run=true", "model=qwen3_30b", "precision=int4_qat")
    assert said.code == 0
    for part in ("who sits where", "which tensors are quantised how", "environment", "memory", "contract"):
        assert part in said.out
    assert "expert_up     12,288" in said.out  # 48 layers x 128 experts x gate and up
    assert "OPEN_TRAINING_INT4_GROUP_SIZE=128" in said.out
    assert list(here.iterdir()) == []


def test_the_plan_counts_every_tensor_once() -> None:
    exp = frontend.experiment("model=deepseek_tiny", "precision=int4_qat", "rollout.precision=fp8")
    params = list(exp.model.params())
    rows = plan.kinds(exp)
    assert sum(row.tensors for row in rows) == len(params)
    assert sum(row.elements for row in rows) == sum(math.prod(param.shape) for param in params)
    assert {row.kind: row.trained for row in rows}["expert_up"] == "int4_qat"
    assert {row.kind: row.served for row in rows}["attn_out"] == "fp8"
    assert {row.kind: row.served for row in rows}["router_bias"] == "fp32"


@pytest.mark.parametrize("precision", choices("precision"))
def test_the_planned_bytes_are_those_of_the_served_tensors(precision: str) -> None:
    import torch

    exp = frontend.experiment(f"precision@rollout.precision={precision}", "model=qwen3_moe_tiny")
    for param in exp.model.params():
        one = side(param, exp.wire, True)
        parts = one.quantize(torch.zeros(param.shape))
        assert one.served_bytes(param.shape) == sum(part.nbytes for part in parts.values()), param.name


def test_a_mixed_run_shows_two_contracts_and_a_matched_one_shows_one() -> None:
    assert "on both sides" in plan.text(frontend.experiment("precision=fp8"))
    assert "they differ, as asked for" in plan.text(frontend.experiment("rollout.precision=fp8"))


def test_what_is_missing_is_said_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    exp = frontend.experiment("model=qwen3_4b", "precision=fp8")
    monkeypatch.setattr(plan, "gpus_here", list)
    assert plan.missing(exp) == (
        "model=qwen3_4b precision=fp8 on cluster=h200 needs 8 H200 GPUs and this machine has none; "
        "join a Ray cluster that has them (cluster.address=...), or type scale=laptop to run its small twin here"
    )
    monkeypatch.setattr(plan, "gpus_here", lambda: ["NVIDIA H200"] * 8)
    assert "GPUs" not in str(plan.missing(exp))
    assert plan.missing(frontend.experiment()) is None


def test_hidden_gpus_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert plan.gpus_here() == []
