"""The six production recipes: their plans against slime's table, and what is said to a recipe with one thing wrong.

Source of the table: slime's `scripts/low_precision/`. Where a card departs from it, CORRECTED says so and the card why.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from lpexp import frontend, plan
from lpexp.experiment import Experiment
from lpexp.groups import CONF

BROKEN: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "broken_recipes.yaml").read_text())


class Row(NamedTuple):
    """A column of the table."""

    nodes: int
    gpus: int
    trains: str  # as the plan describes both sides
    sizes: tuple[int, int, int, int, int, int, int | None]  # tp pp cp ep etp, dp, edp
    last_stage: tuple[int, int] | None  # layers of the last, and of each other
    max_tokens: int
    steps: int
    prompts: int
    samples: int
    updates: int
    sampled_prompts: int  # with over-sampling
    max_response: int
    temperature: str
    eval_every: int
    eval_samples: int
    eval_length: int
    eval_top_p: str
    cpu_adam: bool
    dispatcher: str | None
    attention: str
    bucket_mb: int
    engines: int
    engine_gpus: int
    memory: str


FP8 = "fp8 (scope auto, scale_format fp32, backward quantised, param_gather False)"
INT4 = "int4_qat (scope auto, group_size {}, divisor 7.0)"
TABLE = {
    "qwen3_4b_fp8": Row(
        1, 8, FP8, (2, 1, 1, 1, 1, 4, None), None, 9216, 3000, 32, 8, 1, 32, 8192, "1", 20, 16, 16384, "1",
        False, None, "flash", 512, 4, 2, "0.7",
    ),
    "qwen3_30b_fp8": Row(
        2, 8, FP8, (1, 4, 1, 4, 1, 4, 1), None, 20480, 200, 16, 8, 1, 16, 8192, "1", 20, 16, 16384, "1",
        True, "deepep", "flash", 512, 2, 8, "0.6",
    ),
    "moonlight_16b_int4": Row(
        1, 4, INT4.format(128), (2, 1, 1, 4, 1, 2, 1), None, 8192, 3000, 128, 8, 4, 256, 4096, "0.8", 20, 8, 4096,
        "0.7", True, "deepep", "auto", 512, 1, 4, "0.7",
    ),
    "qwen3_30b_int4": Row(
        1, 8, INT4.format(128), (4, 1, 1, 8, 1, 2, 1), None, 8192, 100, 32, 8, 1, 32, 8192, "0.8", 10, 8, 16384, "0.7",
        True, "alltoall", "flash", 512, 8, 1, "0.7",
    ),
    "qwen3_235b_int4": Row(
        8, 8, INT4.format(128), (4, 4, 2, 16, 1, 2, 1), (22, 24), 16384, 300, 32, 8, 1, 32, 8192, "0.8", 10, 16, 16384,
        "0.7", True, "alltoall", "flash", 512, 8, 8, "0.7",
    ),
    "kimi_k2_thinking_int4": Row(
        32, 8, INT4.format(32), (8, 8, 4, 32, 1, 1, 1), (5, 8), 16384, 100, 128, 8, 4, 256, 16384, "0.8", 10, 16, 16384,
        "0.7", True, "alltoall", "auto", 2048, 32, 8, "0.7",
    ),
}  # fmt: skip
# Upstream's value -> ours. Each card names its own in a comment.
CORRECTED = {
    "qwen3_4b_fp8": ("trains bf16", "model's sizes from a path that does not exist", "corrects nothing", "weight 0"),
    "qwen3_30b_fp8": ("a path that does not exist", "NCCL_TIMEOUT_MS", "process list"),
    "moonlight_16b_int4": ("shares no experts out", "named after the INT4 model", "without importance weights"),
    "qwen3_30b_int4": ("names no data set", "for the whole process", "without </think>"),
    "qwen3_235b_int4": ("check for NaN off", "turns NVLS off", "NCCL_TIMEOUT_MS"),
    "kimi_k2_thinking_int4": ("flash attention", "check for NaN off", "turns NVLS off", "that of one checkout"),
}


def planned(name: str) -> tuple[Experiment, dict[str, str], dict[str, tuple[str, str]], str]:
    """The experiment, its plan's head and its workers as {name: text}, and the whole text."""
    exp = frontend.experiment(f"experiment={name}", "dry_run=true")
    text = plan.text(exp)
    head = dict(re.findall(r"^  (\w+) {2,}(.*)$", text.partition("who sits where")[0], re.MULTILINE))
    workers = {
        who: (count, what) for who, count, what in re.findall(r"^  (\w+ \w+)  +(\d+)  +(.*)$", text, re.MULTILINE)
    }
    return exp, head, workers, text


@pytest.mark.parametrize("name", TABLE)
def test_the_plan_of_a_recipe_says_every_value_of_the_table(name: str) -> None:
    row, (exp, head, workers, text) = TABLE[name], planned(name)
    assert head["trainer"] == row.trains and head["rollout"] == f"{row.trains} (the trainer's)"
    assert "on both sides" in head["contract"]
    assert head["cluster"] == f"h200: {row.nodes} x {row.gpus} H200 GPUs"
    assert head["reference"] == "none (algorithm.kl_coef is 0)"
    assert head["correction"] == "tis_token (ratio_max 2.0)"
    for said in ("clip_low 0.2", "clip_high 0.28", "std_norm True", "reduction seq_mean_token_mean"):
        assert said in head["algorithm"]
    batch = row.prompts * row.samples // row.updates
    best = f" (the best to learn from of {row.sampled_prompts} prompts)" if row.sampled_prompts > row.prompts else ""
    steps = f"{row.updates} optimiser step{'s' if row.updates > 1 else ''} of {batch} samples"
    asked = f"{row.prompts} prompts x {row.samples} samples of dapo_math{best}"
    assert head["batch"] == f"{asked}, {steps}, lag 0, {row.steps} steps"
    assert head["answers"] == f"at most {row.max_response} tokens after at most 1024, temperature {row.temperature}"
    evaluation = f"every {row.eval_every} steps, 30 prompts x {row.eval_samples} samples of at most {row.eval_length}"
    assert head["evaluation"] == f"{evaluation} tokens, temperature {row.temperature}, top-p {row.eval_top_p}"
    assert head["checkpoints"].startswith("every 20 steps")
    count, trainer = workers["trainer rank"]
    tp, pp, cp, ep, etp, dp, edp = row.sizes
    assert int(count) == row.nodes * row.gpus
    assert f"tp {tp} x pp {pp} x cp {cp} x dp {dp};" in trainer
    experts = f"experts ep {ep} x etp {etp} x pp {pp} x dp {edp} by {row.dispatcher}"
    assert (experts in trainer) == (row.dispatcher is not None)
    if row.last_stage:
        assert f"last stage {row.last_stage[0]} layers, others {row.last_stage[1]}" in trainer
        assert row.last_stage[0] + (pp - 1) * row.last_stage[1] == exp.model.num_hidden_layers
    else:
        assert "last stage" not in trainer and exp.model.num_hidden_layers % pp == 0
    assert f"attention {row.attention};" in trainer and f"at most {row.max_tokens} tokens a GPU" in trainer
    assert f"Adam on the {'CPU' if row.cpu_adam else 'GPU'}, lr 1e-06" in trainer
    engines, engine = workers["rollout engine"]
    assert int(engines) == row.engines and f"{row.engine_gpus} GPUs" in engine
    assert f"colocated, memory fraction {row.memory};" in engine
    assert text.count("\n  node ") == row.nodes
    trained: Any = exp.trainer
    assert (trained.bucket_mb, list(trained.betas), trained.weight_decay, trained.clip_grad) == (
        row.bucket_mb, [0.9, 0.98], 0.1, 1.0,
    )  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_s_workers_get_variables_that_have_readers(name: str) -> None:
    exp = frontend.experiment(f"experiment={name}")
    environment = exp.trainer.environment(exp)
    readers = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_NVLS_ENABLE": "1"} | exp.precision.environment()
    deepep = {"NVSHMEM_DISABLE_NCCL": "1"} if TABLE[name].dispatcher == "deepep" else {}
    assert environment == readers | deepep
    pcie = frontend.experiment(f"experiment={name}", "cluster.interconnect=pcie")
    assert pcie.trainer.environment(pcie)["NCCL_NVLS_ENABLE"] == "0"


@pytest.mark.parametrize("name", TABLE)
def test_a_card_names_each_mistake_that_it_corrects(name: str) -> None:
    comments = [
        line for line in (CONF / "experiment" / f"{name}.yaml").read_text().splitlines() if line.startswith("#")
    ]
    for mistake in CORRECTED[name]:
        assert any(mistake in line for line in comments), mistake


def test_an_engine_that_shares_experts_out_cuts_none_of_them() -> None:
    """The corrected split of Moonlight; upstream's is refused (broken_recipes.yaml)."""
    rollout: Any = frontend.experiment("experiment=moonlight_16b_int4").rollout
    assert (rollout.gpus_per_engine, rollout.ep) == (4, 4)


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_asks_for_weights_and_prompts_of_the_hub_and_says_how_to_bring_them(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    exp = frontend.experiment(f"experiment={name}")
    monkeypatch.setattr(plan, "gpus_here", lambda: ["NVIDIA H200"] * exp.cluster.world)
    for part in (type(exp.trainer), type(exp.rollout)):
        monkeypatch.setattr(part, "missing", lambda self, exp: None)
    path = str(exp.model.path).removeprefix("hub:")
    assert plan.missing(exp) == f"the weights of model={exp.model.name} are not here yet; type: hf download {path}"
    here = exp.model_copy(update={"model": exp.model.model_copy(update={"path": None})})
    assert plan.missing(here) == (
        "the prompts of task=dapo_math are not here yet; type: "
        "hf download --repo-type dataset zhuzilin/dapo-math-17k dapo-math-17k.jsonl && "
        "hf download --repo-type dataset zhuzilin/aime-2024 aime-2024.jsonl"
    )


# -- one thing wrong ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", BROKEN, ids=lambda case: " ".join(case["typed"]))
def test_a_recipe_with_one_thing_wrong_is_refused_with_the_reason(
    case: dict[str, Any], type_line: Callable[..., Any]
) -> None:
    said = type_line(*case["typed"])
    assert said.err.rstrip("\n") == case["says"]
    assert said.code == 2


def test_at_least_twenty_of_them_are_there_and_every_recipe_is_broken_somehow() -> None:
    assert len({" ".join(case["typed"]) for case in BROKEN}) == len(BROKEN) >= 20
    typed = {word for case in BROKEN for word in case["typed"]}
    assert {f"experiment={name}" for name in TABLE} <= typed


@pytest.mark.parametrize("name", TABLE)
def test_a_whole_recipe_is_not_refused(name: str, type_line: Callable[..., Any]) -> None:
    """Without this the refusals could be of the recipe itself."""
    said = type_line(f"experiment={name}", "dry_run=true")
    assert (said.code, said.err) == (0, "")
