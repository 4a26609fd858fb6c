"""A real SGLang server on this machine's cores: `make test-sglang`. Every bound says where it comes from.

Log-probabilities of server and trainer are compared token by token, at the sampling temperature. Measured on two
cores with AVX-512, AVX-512 and AMX hidden from torch, and AVX2; torch 2.13 beside torch 2.14 in the server.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from lpexp.data import Group, Prompt
from lpexp.errors import RunError
from lpexp.model.decoder import Decoder, ServedWeights, token_logprobs
from lpexp.precision.wire import thaw
from lpexp.rollout import Sampling
from tests.rollout.sglang.calls import CALLS, MODEL, outcome
from tests.rollout.sglang.conftest import ROOT, Opened, driver_library

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]
SMALL = ("eval.prompts=8", "eval.samples=2", "eval.show=0", "wandb.mode=offline", "checkpoint.every=100")
QUICK = ("rollout.heartbeat_s=2", "rollout.hang_s=20", "rollout.concurrency=64")
# Largest difference of one token's log-probability, and the mean: ten times what was measured in fp32, where both sides
# compute the same products in another order; in bf16 the rounding of one product may fall the other way.
BOUNDS = {"fp32": (1e-4, 1e-5), "bf16": (0.1, 0.01)}


@pytest.fixture(scope="session", autouse=True)
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("LD_LIBRARY_PATH")
    os.environ["LD_LIBRARY_PATH"] = driver_library(tmp_path_factory.mktemp("driver"))
    yield
    os.environ.pop("LD_LIBRARY_PATH")
    if before is not None:
        os.environ["LD_LIBRARY_PATH"] = before


class Run:
    """A run of launch.py in the background, with Ray."""

    def __init__(self, directory: Path, *words: str):
        self.directory, self.log = directory, directory.with_suffix(".log")
        typed = ["rollout=sglang", "cluster=local", *SMALL, *QUICK, f"output_dir={directory}", *words]
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "launch.py"), *typed], cwd=ROOT, stdout=out, stderr=out
            )

    def rows(self) -> list[dict[str, Any]]:
        return lines(self.directory / "metrics.jsonl")

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in lines(self.directory / "events.jsonl") if event["kind"] == kind]

    def until(self, true: Callable[[], Any], timeout_s: float = 400) -> Any:
        give_up = time.monotonic() + timeout_s
        while not (found := true()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < give_up, "the run stands still"
            time.sleep(0.05)
        return found

    def server(self) -> psutil.Process:
        """The keeper of the newest server, above all its processes."""
        return psutil.Process(self.until(lambda: self.events("engine_ready"))[-1]["pid"])

    def end(self, timeout_s: float = 600) -> int:
        return self.process.wait(timeout_s)

    def said(self) -> str:
        return self.log.read_text()


def lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def part(server: psutil.Process, name: str) -> psutil.Process:
    """A process of the server: the scheduler computes, the detokenizer answers."""
    return next(p for p in server.children(recursive=True) if any(name in word for word in p.cmdline()))


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "transport", "more"),
    [
        ("fp32", "disk", ()),
        ("fp32", "tensors", ()),
        ("fp32", "broadcast", ("rollout.engines=2",)),
        ("bf16", "tensors", ("task.prompts_per_step=4", "algorithm.samples_per_prompt=8")),  # 224 tokens a step
    ],
)
def test_a_run_rolls_out_on_a_real_server_and_both_sides_agree(tmp_path, precision, transport, more):
    steps = 4
    run = Run(tmp_path / "run", f"precision={precision}", f"rollout.transport={transport}", f"steps={steps}", *more)
    assert run.end() == 0, run.said()
    trained = [row for row in run.rows() if "train/loss" in row]
    assert [row["sync/version"] for row in trained] == list(range(1, steps + 1))
    most, mean = BOUNDS[precision]
    for row in trained:
        assert 0 < row["mismatch/logprob_abs_diff_max"] < most and row["mismatch/logprob_abs_diff_mean"] < mean
        assert row["sync/canary_abs_diff_mean"] < mean and row["sync/checksum_ok"] == row["sync/contract_ok"] == 1
        assert min(row[f"sync/{name}_seconds"] for name in ("quantize", "transfer", "load")) > 0
        assert row["train/grad_norm"] > 0
    assert run.events("engine_healed") == []
    log = (tmp_path / "run" / "engines" / "engine-0.log").read_text()
    assert "19 of 19 parameters are compared after every update" in log
    assert_the_key_is_nowhere(run)


def assert_the_key_is_nowhere(run: Run) -> None:
    """SGLang prints its key when it starts; what stands there now is what replaced it."""
    log = (run.directory / "engines" / "engine-0.log").read_text()
    report = json.loads((run.directory / "engines" / "engine-0.json").read_text())
    assert "api_key='[key]'" in log and report["api_key"] == "[key]" and "--api-key [key]" in report["launch_command"]
    assert list((run.directory / "wandb").rglob("*.wandb"))
    keys = r"[0-9a-f]{64}"
    found = subprocess.run(["grep", "-raoE", keys, run.directory], capture_output=True, text=True).stdout.splitlines()
    strange = [line for line in found if "manifest.json" not in line and "/checkpoints/" not in line]
    assert strange == []  # nothing that looks like one but SHA-256 sums of checkpoints


def test_a_killed_driver_leaves_no_server_behind(tmp_path):
    run = Run(tmp_path / "run", "precision=fp32", "steps=500")
    keeper = run.server()
    run.until(lambda: len(run.rows()) >= 1)
    family = [keeper, *keeper.children(recursive=True)]
    assert len(family) >= 4  # keeper, HTTP, scheduler, detokenizer
    os.kill(run.process.pid, signal.SIGKILL)
    run.end()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def test_whatever_happens_to_the_server_the_run_goes_on_with_each_sample_once(tmp_path):
    """Killed and stopped while it generates, and killed in an update, in one run: three successors, no sample lost."""
    from lpexp.record import load

    steps = 8
    words = ("precision=fp32", f"steps={steps}", f"record.keep={steps}", "rollout.update_timeout_s=60")
    run = Run(tmp_path / "run", *words, "task.prompts_per_step=64")
    first = run.server()
    log = tmp_path / "run" / "engines" / "engine-0.log"

    def generating() -> bool:
        return len(run.rows()) >= 1 and log.read_text().rstrip().splitlines()[-1].find("batch") > 0

    run.until(generating)
    os.kill(part(first, "scheduler").pid, signal.SIGKILL)
    run.until(lambda: len(run.events("engine_healed")) >= 1 and len(run.rows()) >= 3)
    second = psutil.Process(lines_of_pids(log)[-1])
    os.kill(part(second, "scheduler").pid, signal.SIGSTOP)
    run.until(lambda: any("no sign of life" in event["reason"] for event in run.events("engine_healed")))
    run.until(lambda: len(run.rows()) >= 5)
    third = psutil.Process(lines_of_pids(log)[-1])
    size = log.stat().st_size
    run.until(lambda: "pause_generation" in log.read_text()[size:])
    third.kill()
    assert run.end() == 0, run.said()
    assert len(run.events("engine_healed")) >= 3
    assert len({event["owed"] for event in run.events("engine_healed")}) >= 1
    trained = [row for row in run.rows() if "train/loss" in row]
    assert len(trained) == steps
    for step in range(steps):
        batch, _ = load(tmp_path / "run" / "record" / f"{step:06d}.safetensors")
        drawn = Counter(zip(batch.prompt_ids_N.tolist(), batch.sample_index_N.tolist(), strict=True))
        assert set(drawn.values()) == {1} and len(drawn) == 64 * 16
        assert set(Counter(prompt for prompt, _ in drawn).values()) == {16}
        assert set(batch.versions_N.tolist()) == {step}
    most, mean = BOUNDS["fp32"]
    assert max(row["mismatch/logprob_abs_diff_max"] for row in trained) < most


def lines_of_pids(log: Path) -> list[int]:
    """Keepers of the servers that wrote this log, in order."""
    found = [line for line in log.read_text().splitlines() if line.startswith("lpexp: server of process ")]
    return [int(line.split()[4]) for line in found]


# -- one server for the rest -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    words = ("rollout=sglang", "cluster=inline", "rollout.concurrency=16", *MODEL)
    made = Opened(tmp_path_factory.mktemp("one") / "run", *words)
    made.rollout.contract()
    yield made
    made.close()


PROMPTS = [Prompt(id=n, tokens=(5 + n, 6, 7, 9, 3), text="", answer="") for n in range(8)]


def trainer_logprobs(one: Opened, shards: list[Any], groups: list[Group], temperature: float) -> np.ndarray:
    """What the embedded decoder says of the same tokens, from the same parts."""
    model = one.exp.model.sized()
    parts = {name: thaw(frozen) for name, frozen in shards[0].items()}
    decoder, weights = Decoder(model), ServedWeights(model, one.exp.wire, parts)
    found = []
    for group in groups:
        for sample in group.samples:
            tokens = torch.tensor([*group.prompt.tokens, *sample.tokens_T.tolist()])
            with torch.no_grad():
                logits = decoder.logits(weights, tokens[None, :-1])[0][len(group.prompt.tokens) - 1 :]
            found.append(token_logprobs(logits, tokens[len(group.prompt.tokens) :], temperature)[0].numpy())
    return np.concatenate(found)


def server_logprobs(groups: list[Group]) -> np.ndarray:
    return np.concatenate([sample.logprobs_T for group in groups for sample in group.samples])


@pytest.mark.parametrize(
    "how",
    [
        Sampling(samples=2),
        Sampling(samples=2, temperature=0.5),
        Sampling(samples=2, temperature=1.7),
        Sampling(temperature=0.0),
        Sampling(samples=2, temperature=0.7, top_p=0.8),
        Sampling(samples=2, temperature=0.7, top_k=5),
    ],
    ids=str,
)
def test_log_probabilities_follow_one_convention(one, how):
    """Of the softmax at the temperature, before top-p and top-k cut it; greedy ones at temperature 1."""
    shards, _ = one.shards(1)
    one.rollout.load(shards, 0).result()
    groups = one.rollout.sample(PROMPTS, how, 0).result()
    gaps = np.abs(server_logprobs(groups) - trainer_logprobs(one, shards, groups, how.temperature))
    assert gaps.max() < BOUNDS["fp32"][0]
    if how.temperature not in (0.0, 1.0):  # the other convention would be seen
        other = np.abs(server_logprobs(groups) - trainer_logprobs(one, shards, groups, 1.0))
        assert other.mean() > 0.01
    if how.top_k:
        model_top = [len(set(s.tokens_T.tolist())) for group in groups for s in group.samples]
        assert model_top


@pytest.mark.parametrize("transport", ["tensors", "disk"])
def test_after_an_update_both_sides_agree_and_without_it_they_do_not(one, transport, monkeypatch):
    from lpexp.rollout.sglang.transport import Disk

    engine = one.engine()
    if transport == "disk":
        disk = Disk(one.exp.model.sized(), one.exp.wire, engine.folder / "weights", 60)
        monkeypatch.setattr(engine, "transport", disk)
    old, new = one.shards(1)[0], one.shards(2)[0]
    how = Sampling(samples=2)
    for version, shards, other in ((10, old, new), (11, new, old)):
        one.rollout.load(shards, version).result()
        groups = one.rollout.sample(PROMPTS, how, version).result()
        said = server_logprobs(groups)
        assert np.abs(said - trainer_logprobs(one, shards, groups, 1.0)).max() < BOUNDS["fp32"][0]
        assert np.abs(said - trainer_logprobs(one, other, groups, 1.0)).mean() > 0.05


def test_one_wrong_value_in_one_tensor_is_found_by_its_hash_and_named(one, monkeypatch):
    engine, honest = one.engine(), one.engine().transport

    class Wrong:
        def send(self, client: Any, parts: Any, version: int) -> dict[str, float]:
            spoiled = {name: dict(made) for name, made in parts.items()}
            spoiled["model.layers.1.self_attn.k_proj.weight"]["weight"] = (
                spoiled["model.layers.1.self_attn.k_proj.weight"]["weight"]
                .clone()
                .index_fill_(1, torch.tensor([3]), 1.0)
            )
            return honest.send(client, spoiled, version)

    monkeypatch.setattr(engine, "transport", Wrong())
    with pytest.raises(RunError, match=r"holds another model\.layers\.1\.self_attn\.qkv_proj\.weight .*attn_qkv"):
        one.rollout.load(one.shards(3)[0], 12).result()
    monkeypatch.undo()
    one.rollout.load(one.shards(1)[0], 13).result()  # and goes on


def test_wrong_weights_that_hash_as_they_should_are_found_by_the_canary(one):
    """As if the trainer shipped other weights than it computes with: every hash agrees, the canary does not."""
    loading = one.rollout.load(one.shards(2)[0], 14)
    loading.result()
    scored = loading.canaries[0]
    loading = one.rollout.load(one.shards(1)[0], 15)
    loading.result()
    assert np.abs(loading.canaries[0] - scored).mean() > 100 * one.rollout.canary_limit
    with pytest.raises(RunError, match="canary: engine 0 and the trainer differ by"):
        loading.gap(scored)


def test_an_update_that_the_server_refuses_brings_a_successor(one, monkeypatch):
    """The real server's own refusal: a tensor of another shape."""
    shards, sent = one.shards(1)
    engine, honest, tried = one.engine(), one.engine().client.load_tensors, []

    def first_is_cut(ranks, version, timeout_s):
        tried.append(version)
        honest([ranks[0][:-9]] if len(tried) == 1 else ranks, version, timeout_s)

    monkeypatch.setattr(engine.client, "load_tensors", first_is_cut)
    loading, pending = one.rollout.load(shards, 16), one.rollout.sample(PROMPTS, Sampling(samples=2), 16)
    assert loading.result()[0] == [sent]
    groups = pending.result()
    assert Counter((s.prompt_id, s.index) for g in groups for s in g.samples) == Counter(
        (p.id, g) for p in PROMPTS for g in range(2)
    )
    assert [event["owed"] for event in one.told("engine_healed")][-2:] == ["load", "sample"]


@pytest.mark.parametrize("call", CALLS)
def test_the_server_answers_today_as_was_recorded(one, call):
    kept = json.loads(Path(__file__).with_name("recorded.json").read_text())["calls"][call]["outcome"]
    one.rollout.load(one.shards(1)[0], 0).result()
    found = json.loads(json.dumps(outcome(CALLS[call], one.engine().client)))
    assert found[0] == kept[0]
    if call in ("scores", "greedy"):
        assert flat(found[1]) == pytest.approx(flat(kept[1]), abs=1e-3)


def flat(value: Any) -> list[float]:
    if isinstance(value, list):
        return [x for one in value for x in flat(one)]
    return [float(value)] if isinstance(value, int | float) else []


def test_a_request_without_the_key_is_refused(one):
    client = one.engine().client
    for path, method in (("/generate", "POST"), ("/server_info", "GET"), ("/update_weights_from_disk", "POST")):
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            connection = http.client.HTTPConnection(client.host, client.port, timeout=30)
            connection.request(method, path, "{}", {"Content-Type": "application/json", **headers})
            assert connection.getresponse().status == 401, path
            connection.close()


def test_no_command_line_of_the_server_holds_the_key(one):
    engine = one.engine()
    keeper = psutil.Process(engine.server.pid)
    said = [" ".join(p.cmdline()) for p in (keeper, *keeper.children(recursive=True))]
    assert len(said) >= 4 and "sglang.launch_server" in said[0]
    assert not [line for line in said if engine.server.key in line]


def test_a_format_that_this_machine_cannot_serve_is_refused_by_the_server_with_a_reason(tmp_path, monkeypatch):
    """Were the rule not there, the server's own refusal would be told."""
    from lpexp.rollout.sglang import SglangRolloutSpec

    monkeypatch.setattr(SglangRolloutSpec, "_judge_cpu", lambda self, exp: ())
    made = Opened(tmp_path / "run", "rollout=sglang", "cluster=inline", "precision=fp8")
    try:
        with pytest.raises(RunError, match=r"(?s)cannot serve the format.*AMX"):
            made.rollout.contract()
    finally:
        made.close()
