"""Every production recipe has a twin that trains on two cores; at full size it is a plan and one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loop.conftest import ROOT, compose

RECIPES = (  # model, precision, architecture, module classes that are quantised
    ("qwen3_4b", "fp8", "qwen3", {"attn_qkv", "attn_out", "mlp_up", "mlp_down"}),
    ("qwen3_30b", "fp8", "qwen3_moe", {"attn_qkv", "attn_out", "expert_up", "expert_down"}),
    ("qwen3_30b", "int4_qat", "qwen3_moe", {"expert_up", "expert_down"}),
    ("qwen3_235b", "int4_qat", "qwen3_moe", {"expert_up", "expert_down"}),
    ("moonlight_16b", "int4_qat", "deepseek_v3", {"expert_up", "expert_down"}),
    ("kimi_k2_thinking", "int4_qat", "deepseek_v3", {"expert_up", "expert_down"}),
)
names = [f"{model}-{precision}" for model, precision, *_ in RECIPES]


def covered(model, precision) -> set[str]:
    """Module classes that are quantised."""
    return {param.kind for param in model.params() if precision.covers(param, model.moe is not None)}


@pytest.mark.parametrize(("model", "precision", "family", "quantised"), RECIPES, ids=names)
def test_the_twin_trains_three_steps_without_mismatch_and_keeps_family_and_scope(
    inline, model, precision, family, quantised
):
    words = (f"model={model}", f"precision={precision}")
    full, twin = compose(*words), compose(*words, "scale=laptop")
    large, small = full.model.sized(), twin.model.sized()
    assert large.architecture == small.architecture == family
    assert large.num_params() > 1e9 and small.num_params() < 2e6
    assert {param.kind for param in small.params()} == {param.kind for param in large.params()}
    assert covered(large, full.precision) == covered(small, twin.precision) == quantised
    assert (twin.precision, twin.algorithm) == (full.precision, full.algorithm)
    assert small.rope_scaling == large.rope_scaling
    if large.moe and small.moe:
        kept = ("scoring", "norm_topk", "scaling")
        assert [getattr(small.moe, key) for key in kept] == [getattr(large.moe, key) for key in kept]
    if model == "kimi_k2_thinking":
        assert twin.precision.group_size == 32  # type: ignore[attr-defined]

    run = inline(*words, "scale=laptop", "steps=3", "task.warmup=null")
    assert run.code == 0
    assert run.steps("mismatch/logprob_abs_diff_max") == [0.0] * 3
    assert max(run.steps("train/grad_norm")) > 0  # now and then a random start is never right, and has no gradient


@pytest.mark.parametrize(("model", "precision"), [recipe[:2] for recipe in RECIPES], ids=names)
def test_without_its_gpus_a_recipe_is_a_plan_and_one_sentence(tmp_path: Path, model, precision):
    words = (f"model={model}", f"precision={precision}")
    dry, wet = launched(tmp_path, *words, "dry_run=true"), launched(tmp_path, *words)
    assert (dry.returncode, dry.stderr) == (0, "")
    assert wet.returncode == 2
    for plan in (dry.stdout, wet.stdout):
        assert plan.startswith(f"plan of sort_letters_{model}_{precision}\n")
        for part in ("who sits where", "which tensors are quantised how", "environment that each worker gets"):
            assert f"\n{part}\n" in plan
    gpus = compose(*words).cluster
    sentence = wet.stderr.strip()
    assert sentence.count("\n") == 0
    assert sentence.startswith(f"model={model} precision={precision} on cluster={gpus.name} needs ")
    assert f"needs {gpus.nodes * gpus.gpus_per_node} " in sentence
    assert sentence.endswith("or type scale=laptop to run its small twin here")
    assert not list(tmp_path.iterdir())  # nothing was started


def launched(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`python launch.py` in an empty folder, on a machine without a visible GPU."""
    command = [sys.executable, str(ROOT / "launch.py"), *words]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
