"""An engine and its dispatcher over a fake server: starts, updates, samples, faults. The lane has a real one."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import psutil
import pytest

from lpexp.data import Group, Prompt
from lpexp.errors import RunError
from lpexp.rollout import Sampling
from lpexp.rollout.sglang.engine import ASKS
from lpexp.rollout.sglang.server import free_port
from tests.rollout.sglang.conftest import ROOT

PROMPTS = [Prompt(id=n, tokens=(5 + n, 6, 7, 3), text="", answer="") for n in range(6)]
FOUR = Sampling(samples=4)


def assert_each_sample_once(groups: list[Group], version: int, prompts: list[Prompt] = PROMPTS) -> None:
    assert [group.prompt.id for group in groups] == [prompt.id for prompt in prompts]
    drawn = Counter((sample.prompt_id, sample.index) for group in groups for sample in group.samples)
    assert drawn == Counter((prompt.id, g) for prompt in prompts for g in range(4))
    assert {sample.version for group in groups for sample in group.samples} == {version}


@pytest.mark.parametrize("transport", ["tensors", "disk"])
def test_weights_arrive_and_every_sample_is_of_their_version(fake, opened, transport):
    one = opened(*fake.words(f"rollout.transport={transport}", "rollout.bucket_mb=1"))
    one.rollout.contract()
    for version in (0, 1):
        shards, sent = one.shards(seed=version)
        held, seconds = one.rollout.load(shards, version).result()
        assert held == [sent] and set(seconds) == {"transfer", "load"}
        assert_each_sample_once(one.rollout.sample(PROMPTS, FOUR, version).result(), version)
    order = [call for call in fake.calls() if call not in ("/health_generate", "/server_info", "/generate")]
    update = ["/update_weights_from_disk"]
    if transport == "tensors":
        update = ["/begin_weight_update", *["/update_weights_from_tensor"] * 2, "/end_weight_update"]
    assert order == 2 * ["/pause_generation", "/flush_cache", *update, "/weights_checker", "/continue_generation"]


def test_a_bucket_is_bounded_and_only_the_last_one_names_the_version(fake, opened, monkeypatch):
    one = opened(*fake.words("rollout.bucket_mb=1"))
    one.rollout.contract()
    client, named = one.engine().client, []
    honest = client.load_tensors

    def watched(ranks, version, timeout_s):
        named.append((len(ranks[0]), version))
        honest(ranks, version, timeout_s)

    monkeypatch.setattr(client, "load_tensors", watched)
    one.rollout.load(one.shards()[0], 4).result()
    assert [version for _, version in named] == [None, 4]
    assert max(size for size, _ in named) < 20_000  # handles of memory, not the memory


def test_a_tensor_that_the_server_holds_otherwise_stops_the_run_with_its_class(fake, opened):
    one = opened(*fake.words())
    one.rollout.contract()
    fake.fault("wrong")
    with pytest.raises(RunError, match=r"version 0: engine 0 holds another .*gate_up_proj.*class|mlp_up: .*gate_proj"):
        one.rollout.load(one.shards()[0], 0).result()
    assert one.told("engine_healed") == [] and fake.left() == []


def test_a_canary_that_computes_otherwise_stops_the_run(fake, opened):
    one = opened(*fake.words("rollout.canary_limit=0.5"))
    one.rollout.contract()
    loading = one.rollout.load(one.shards()[0], 0)
    loading.result()
    agreed = loading.canaries[0]
    assert loading.gap(agreed) == 0.0 and loading.gap(agreed + 0.4) == pytest.approx(0.4, rel=1e-5)
    with pytest.raises(RunError, match=r"differ by 0\.6 nat a token, the limit is 0\.5"):
        loading.gap(agreed - 0.6)
    with pytest.raises(RunError, match="differ by nan"):
        loading.gap(np.full_like(agreed, np.nan))


def test_a_server_that_decodes_otherwise_than_it_reads_stops_the_run(fake, opened):
    one = opened(*fake.words("rollout.canary_limit=0.5"))
    one.rollout.contract()
    fake.fault("sour*")
    with pytest.raises(RunError, match="decodes and reads the same tokens"):
        one.rollout.load(one.shards()[0], 0).result()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("die/generate", "its server ended"),
        ("garbage", "an answer cannot be read"),
        ("slow deaf", "no sign of life for"),
    ],
)
def test_an_engine_that_is_lost_while_it_generates_is_replaced_and_asked_for_the_rest(fake, opened, fault, says):
    one = opened(*fake.words("rollout.concurrency=8"))
    one.rollout.contract()
    one.rollout.load(one.shards()[0], 3).result()
    fake.fault(*fault.split())
    assert_each_sample_once(one.rollout.sample(PROMPTS, FOUR, 3).result(), 3)
    (healed,) = one.told("engine_healed")
    assert healed["engine"] == 0 and healed["owed"] == "sample" and says in healed["reason"]
    assert fake.left() == []


def test_what_a_lost_engine_had_finished_is_not_asked_for_again(fake, opened):
    one = opened(*fake.words("rollout.concurrency=4"))  # one prompt after the other
    one.rollout.contract()
    one.rollout.load(one.shards()[0], 0).result()
    before = fake.calls().count("/generate")
    engine, honest, asked = one.engine(), one.engine()._group, []

    def third_dies(prompt, sampling, call):
        asked.append(prompt.id)
        if len(asked) == 3:
            fake.fault("die/generate")
        return honest(prompt, sampling, call)

    engine._group = third_dies  # type: ignore[method-assign]
    assert_each_sample_once(one.rollout.sample(PROMPTS, FOUR, 0).result(), 0)
    assert asked == [0, 1, 2, 3, 4, 5]  # the fourth to sixth met a dead server
    canary = 2  # after the successor's load
    assert fake.calls().count("/generate") - before == 3 + 4 + canary


@pytest.mark.parametrize("call", ["die/update_weights_from_tensor", "refuse/update_weights_from_tensor"])
def test_an_engine_that_is_lost_in_an_update_is_replaced_and_given_it_again(fake, opened, call):
    one = opened(*fake.words())
    one.rollout.contract()
    fake.fault(call)
    shards, sent = one.shards()
    loading, pending = one.rollout.load(shards, 5), one.rollout.sample(PROMPTS, FOUR, 5)
    assert loading.result()[0] == [sent]
    assert_each_sample_once(pending.result(), 5)
    assert [event["owed"] for event in one.told("engine_healed")] == ["load", "sample"]


def test_an_engine_that_is_lost_again_and_again_ends_the_run(fake, opened):
    one = opened(*fake.words())
    one.rollout.contract()
    one.rollout.load(one.shards()[0], 0).result()
    fake.fault("garbage*")
    with pytest.raises(RunError, match="engine 0 was lost 4 times in a row"):
        one.rollout.sample(PROMPTS[:1], FOUR, 0).result()
    assert len(one.told("engine_healed")) == 3


def test_aborted_answers_are_asked_for_again_and_never_become_samples(fake, opened):
    one = opened(*fake.words())
    one.rollout.contract()
    one.rollout.load(one.shards()[0], 0).result()
    fake.fault("abort")
    groups = one.rollout.sample(PROMPTS, FOUR, 0).result()
    assert_each_sample_once(groups, 0)
    assert {sample.finish for group in groups for sample in group.samples} == {"length"}
    fake.fault(*["abort"] * ASKS)
    one.rollout.sample(PROMPTS[:1], FOUR, 0).result()
    assert "aborted" in one.told("engine_healed")[0]["reason"]


def test_a_sample_of_another_version_stops_the_run(fake, opened):
    one = opened(*fake.words())
    one.rollout.contract()
    one.rollout.load(one.shards()[0], 2).result()
    fake.fault("stale")
    with pytest.raises(RunError, match="answered with weights of version 77, it was given 2"):
        one.rollout.sample(PROMPTS[:1], FOUR, 2).result()


# -- start and end -----------------------------------------------------------------------------------------------------


def test_a_server_that_never_comes_up_says_why_with_the_end_of_its_log(fake, opened):
    fake.fault("stillborn")
    one = opened(*fake.words())
    with pytest.raises(RunError, match=r"(?s)ended while it started.*a library is missing.*libcuda\.so\.1: cannot"):
        one.rollout.contract()


def test_a_server_that_takes_too_long_is_given_up(fake, opened):
    fake.fault("mute")
    one = opened(*fake.words("rollout.start_timeout_s=1"))
    with pytest.raises(RunError, match="not ready after 1 s"):
        one.rollout.contract()
    assert one.engine().server.ended()


def test_a_server_that_chose_another_dtype_is_refused(fake, opened):
    fake.fault("dtype")
    one = opened(*fake.words())
    with pytest.raises(RunError, match="dtype is 'float16', not 'float32'"):
        one.rollout.contract()


def test_the_key_is_in_no_file_that_stays_and_in_no_command_line(fake, opened, tmp_path):
    one = opened(*fake.words())
    one.rollout.contract()
    server = one.engine().server
    assert stat.S_IMODE(server.scratch.stat().st_mode) == 0o700 and not (server.scratch / "key.yaml").exists()
    log, report = (tmp_path / "run" / "engines" / name for name in ("engine-0.log", "engine-0.json"))
    assert "ServerArgs(api_key='[key]')" in log.read_text() and json.loads(report.read_text())["api_key"] == "[key]"
    kept = [path.read_text(errors="replace") for path in (tmp_path / "run").rglob("*") if path.is_file()]
    lines = [" ".join(psutil.Process(pid).cmdline()) for pid in (server.pid, *children(server.pid))]
    assert len(lines) == 2 and not [text for text in [*kept, *lines] if server.key in text]


def children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def test_closing_ends_every_process_and_removes_what_was_for_the_server_only(fake, opened):
    one = opened(*fake.words())
    one.rollout.contract()
    server = one.engine().server
    family = [psutil.Process(pid) for pid in (server.pid, *children(server.pid))]
    one.rollout.close()
    assert len(family) == 2 and not [process for process in family if process.is_running()]
    assert not server.scratch.exists()


def test_no_server_outlives_the_process_that_started_it(fake, tmp_path):
    words = fake.words()
    code = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom tests.rollout.sglang.conftest import Opened\n"
        f"one = Opened(Path({str(tmp_path / 'run')!r}), *{words!r})\none.rollout.contract()\n"
        "print(one.engine().server.pid, flush=True)\ntime.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    keeper = psutil.Process(int(owner.stdout.readline()))
    family = [keeper, *keeper.children(recursive=True)]
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert len(family) == 2 and alive == []


def test_two_servers_never_get_one_port():
    assert free_port("127.0.0.1") != free_port("127.0.0.1")


def test_the_memory_of_colocated_engines_is_released_and_resumed_in_order(fake, opened):
    """What a server on GPUs is told when it takes turns with the trainer; the memory itself needs a GPU."""
    one = opened(*fake.words("rollout.canary_limit=9"))
    one.rollout.contract()
    one.rollout.turns = True
    one.rollout.load(one.shards()[0], 0).result()
    first, second = one.rollout.sample(PROMPTS, FOUR, 0), one.rollout.sample(PROMPTS, FOUR, 0)
    first.result()
    assert "/release_memory_occupation" not in fake.calls()  # the second batch is still owed
    second.result()
    assert fake.calls()[-2:] == ["/flush_cache", "/release_memory_occupation"]
    one.rollout.load(one.shards(2)[0], 1).result()
    told = [call for call in fake.calls() if "memory" in call or "pause" in call or "weight_update" in call]
    assert told[-6:] == [
        "/release_memory_occupation",
        "/resume_memory_occupation",
        "/pause_generation",
        "/begin_weight_update",
        "/end_weight_update",
        "/resume_memory_occupation",
    ]
    one.rollout.sample(PROMPTS, FOUR, 1).result()  # and rests again: the same weights come back for whoever asks next
    groups = one.rollout.sample(PROMPTS, FOUR, 1).result()
    assert_each_sample_once(groups, 1)


def test_the_wait_for_a_server_says_what_it_does(fake, opened, monkeypatch, capfd):
    from lpexp.rollout.sglang import rollout

    monkeypatch.setattr(rollout, "TOLD_EVERY_S", 0.0)
    one = opened(*fake.words())
    begin = time.monotonic()
    one.rollout.contract()
    assert time.monotonic() - begin < 60
    assert "engine-0 is starting: " in capfd.readouterr().err
    (ready,) = one.told("engine_ready")
    assert ready["engine"] == 0 and ready["url"].startswith("http://127.0.0.1:")
