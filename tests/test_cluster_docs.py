"""docs/cluster.md, its KubeRay manifest and docs/from-slime.md: their commands compose, their keys and flags exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from lpexp import cli, frontend, plan
from lpexp.groups import CONF, choices, groups, read_choice

RECIPES = (
    "qwen3_4b_fp8",
    "qwen3_30b_fp8",
    "moonlight_16b_int4",
    "qwen3_30b_int4",
    "qwen3_235b_int4",
    "kimi_k2_thinking_int4",
)
# Every flag and variable that the slime low-precision guide and the miles INT4 guide name.
GUIDES = (
    *("--model-dir", "--save-dir", "--strategy", "--block-size", "--max-workers", "--hf-checkpoint", "--ref-load"),
    *("--fp8-format", "--fp8-recipe", "--fp8-param-gather", "--optimizer-cpu-offload", "--input-dir", "--output-dir"),
    *("--data-dir", "--quant-type", "--quant-group-size", "--num-calibration-samples", "--max-sequence-length"),
    *("--dampening-frac", "--trust-remote-code", "--group-size", "--is-symmetric", "--ignore-rules"),
    *("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "OPEN_TRAINING_INT4_FAKE_QAT_FLAG", "OPEN_TRAINING_INT4_GROUP_SIZE"),
)


def known_keys() -> set[str]:
    """Every dotted key that some choice of the groups brings."""
    found = set(_flat(OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"), resolve=False)))
    for group in groups():
        for name in choices(group):
            card = read_choice(group, name)
            found |= {
                key if group in ("model", "layout", "experiment", "scale") else f"{group}.{key}" for key in _flat(card)
            }
    mounts = {f"{mount}.precision" for mount in ("rollout", "reference")}
    return found | mounts | {f"model.{key}" for key in ("path",)} | set(groups())


def _flat(data: Any, at: str = "") -> Iterator[str]:
    for key, value in data.items():
        yield f"{at}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{at}{key}.")


def rows(page: Path) -> list[list[list[str]]]:
    """The table's rows as lists of the words in backticks of each cell."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ") and "---" not in line]
    return [[re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.fixture(scope="module")
def table(repo: Path) -> list[list[list[str]]]:
    return rows(repo / "docs" / "from-slime.md")


# -- from slime --------------------------------------------------------------------------------------------------------
def test_every_flag_and_variable_of_the_guides_is_in_the_table(table: list[list[list[str]]]) -> None:
    there = {word.split()[0] for row in table for word in row[0]}
    assert [word for word in GUIDES if word not in there] == []


def test_every_key_that_replaces_one_exists_and_has_a_value_that_composes(table: list[list[list[str]]]) -> None:
    known = known_keys()
    keys = [word for row in table for word in row[1] if re.match(r"[a-z_.]+=", word)]
    assert len(keys) >= 50
    assert [word for word in keys if word.partition("=")[0] not in known] == []


def test_every_command_and_flag_that_replaces_one_exists(
    table: list[list[list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = {word for row in table for word in row[1] if word.startswith(("lpexp ", "--"))}
    named = sorted({word.split()[1] for word in words if word.startswith("lpexp ")})
    for command in ("convert fp8", "convert int4", "convert bf16", *named):
        with pytest.raises(SystemExit, match="0"):
            cli.main([*command.split(), "--help"])
    helps = capsys.readouterr().out
    lacking = [word for word in words if word.startswith("--") and word.split()[0] not in helps]
    assert lacking == []
    assert {"convert", "export", "eval"} <= set(named)


def test_what_is_not_there_would_be_found() -> None:
    assert "precision.param_gathr" not in known_keys()
    assert {"precision.param_gather", "trainer.dispatcher", "task.max_response_held_out", "oversample"} <= known_keys()


# -- clusters ----------------------------------------------------------------------------------------------------------
def _launches(page: Path) -> list[list[str]]:
    """The words of every `python launch.py` in a block of commands, a directory of the reader's own left out."""
    blocks = re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line.partition("#")[0] for block in blocks for line in block.splitlines() if "python launch.py" in line]
    return [[w for w in line.partition("launch.py")[2].rstrip('"').split() if "DIR" not in w] for line in lines]


def test_every_command_of_the_page_composes_and_each_recipe_has_one(repo: Path) -> None:
    launches = _launches(repo / "docs" / "cluster.md")
    for words in launches:
        assert "who sits where" in plan.text(frontend.experiment(*words))
    assert {f"experiment={name}" for name in RECIPES} <= {word for words in launches for word in words}


def test_the_page_s_table_is_that_of_the_cards(repo: Path) -> None:
    text = (repo / "docs" / "cluster.md").read_text()
    told = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| `(.*?)`", text, re.MULTILINE)
    assert [name for name, *_ in told] == list(RECIPES)
    for name, machines, sizes, engines, path in told:
        exp = frontend.experiment(f"experiment={name}")
        trainer, rollout, cluster = exp.trainer, exp.rollout, exp.cluster
        assert machines == f"{cluster.nodes} × {cluster.gpus_per_node}"
        assert sizes == " · ".join(str(getattr(trainer, key)) for key in ("tp", "pp", "cp", "ep"))
        each: Any = rollout.gpus_per_engine  # type: ignore[attr-defined]
        assert engines == f"{cluster.world // each} × {each}"
        assert exp.model.path == f"hub:{path}"
        assert f"hf download {path}" in text


def test_the_kuberay_manifest_is_of_the_recipe_that_it_names(repo: Path) -> None:
    text = (repo / "docs" / "kuberay" / "cluster.yaml").read_text()
    manifest = yaml.safe_load(text)
    name = re.search(r"experiment=(\w+)", text)
    assert name is not None
    cluster = frontend.experiment(f"experiment={name[1]}").cluster
    (workers,) = manifest["spec"]["workerGroupSpecs"]
    assert {workers[key] for key in ("replicas", "minReplicas", "maxReplicas")} == {cluster.nodes}
    (container,) = workers["template"]["spec"]["containers"]
    for kind in ("requests", "limits"):
        assert container["resources"][kind]["nvidia.com/gpu"] == str(cluster.gpus_per_node)
    assert f"ray=={manifest['spec']['rayVersion']}\n" in (repo / "requirements.lock").read_text()
    assert f"service/{manifest['metadata']['name']}-head-svc" in (repo / "docs" / "cluster.md").read_text()
    shared = {mount["name"] for mount in container["volumeMounts"]}
    assert shared == {volume["name"] for volume in workers["template"]["spec"]["volumes"]}
