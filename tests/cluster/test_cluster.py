"""GPUs of a Ray cluster: reserved node by node, on simulated clusters of the recipes' true sizes; joining one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lpexp import frontend, plan
from lpexp.cluster import JOB, Workers
from lpexp.errors import ConfigError

SMALL = ("qwen3_4b_fp8", "moonlight_16b_int4", "qwen3_30b_int4", "qwen3_30b_fp8", "qwen3_235b_int4")  # 1 to 8 nodes
LARGE = "kimi_k2_thinking_int4"  # 32 nodes: 4 GB of memory


def simulate(repo: Path, *names: str) -> dict[str, dict[str, Any]]:
    """What each recipe got of a simulated cluster of its size."""
    command = [sys.executable, "-m", "tests.cluster.simulated", *names]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(names, lines, strict=True))


def check(name: str, found: dict[str, Any]) -> None:
    """Seats in the order of nodes and GPUs, workers on them, and each worker sees its own GPUs."""
    cluster = frontend.experiment(f"experiment={name}").cluster
    numbers = [[node, str(gpu)] for node in range(cluster.nodes) for gpu in range(cluster.gpus_per_node)]
    assert found["seats"] == numbers
    last = str(cluster.gpus_per_node - 1)
    assert found["sees"] == ["0,1", last, ",".join(map(str, range(cluster.gpus_per_node)))]
    engine, rank, anyone = found["places"]
    assert engine == anyone and (rank == engine) == (cluster.nodes == 1)


@pytest.fixture(scope="module")
def simulated(repo: Path) -> dict[str, dict[str, Any]]:
    """One cluster that grows from recipe to recipe; before its last growth a run asks for what it has not."""
    return simulate(repo, *SMALL[:-1], "refusals", SMALL[-1])


def test_each_recipe_of_up_to_eight_nodes_gets_its_seats(simulated: dict[str, dict[str, Any]]) -> None:
    for name in SMALL:
        check(name, simulated[name])
        assert simulated[name]["memory_gb"] < 4


@pytest.mark.evidence
def test_the_recipe_of_32_nodes_gets_its_seats(repo: Path) -> None:
    found = simulate(repo, LARGE)[LARGE]
    check(LARGE, found)
    assert found["memory_gb"] < 8
    print(found["seconds"], "s,", found["memory_gb"], "GB")


def test_a_wait_ends_with_what_is_missing_and_holds_nothing(simulated: dict[str, dict[str, Any]]) -> None:
    said = simulated["refusals"]
    way = "add nodes or free some, raise cluster.wait_s, or ask for less (model.parallel.nodes)"
    lacks = "2 of 8 nodes with 8 H200 GPUs are there (and 1 of another kind (A100)); missing 48 GPUs"
    assert lacks in said["missing"] and said["missing"].endswith(way)
    assert said["told"] == [f"waiting for the cluster: {lacks} (up to 2 s)"]
    other = "0 of 1 nodes with 16 H200 GPUs are there (and 2 nodes with fewer and 1 of another kind (A100))"
    assert f"{other}; missing 16 GPUs" in said["kind"]
    held = "all 2 nodes with 8 H200 GPUs are there, but other jobs hold some: 16 of 32 are free"
    assert held in said["held"]
    assert said["free_again"] == 16


# -- joining -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("address", "said"),
    [("127.0.0.1:9", "nothing answers at 127.0.0.1:9"), ("ray://127.0.0.1:9", "nothing answers at 127.0.0.1:9")],
)
def test_an_address_where_nothing_answers_is_refused_at_once(address: str, said: str, tmp_path: Path) -> None:
    cluster = frontend.experiment(f"cluster.address={address}").cluster
    with pytest.raises(ConfigError, match=said) as refused:
        Workers(cluster, lambda *_, **__: None, tmp_path)
    assert [mistake.key for mistake in refused.value.mistakes] == ["cluster.address"]
    assert list(tmp_path.iterdir()) == []


def test_a_joined_cluster_s_gpus_are_not_looked_for_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "gpus_here", list)
    words = ("experiment=qwen3_30b_fp8",)
    assert "needs 16 H200 GPUs" in str(plan.missing(frontend.experiment(*words)))
    joined = frontend.experiment(*words, "cluster.address=head:6379")
    assert "GPUs" not in str(plan.missing(joined))
    assert "of the Ray cluster at head:6379" in plan.text(joined)


def test_a_ray_job_joins_the_cluster_whose_job_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    local, inline = frontend.experiment().cluster, frontend.experiment("cluster=inline").cluster
    assert (local.joins, inline.joins) == (None, None)
    monkeypatch.setenv(JOB, "{}")
    assert (local.joins, inline.joins) == ("auto", None)


def test_apart_the_engines_have_the_last_gpus_and_the_trainer_the_rest() -> None:
    exp = frontend.experiment(
        "experiment=qwen3_30b_int4", "cluster.colocate=false", "cluster.rollout_gpus=8", "model.parallel.nodes=2"
    )
    assert (exp.cluster.trainer_gpus, exp.cluster.engine_gpus) == (8, 8)
    rows = plan.placement(exp).splitlines()[2:]
    assert [" ".join(row.split()) for row in rows] == [
        "node 0 8 H200 GPUs trainer ranks 0-7",
        "node 1 8 H200 GPUs rollout engines 0-7",
    ]
