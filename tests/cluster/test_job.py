"""A Ray head that somebody else has started: a run is its job, or joins it from outside."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
RUN = ("steps=2", "task.warmup=null", "eval.prompts=8", "eval.show=0", "rollout.engines=1", "wandb.mode=disabled")


class Head(NamedTuple):
    address: str  # of the cluster
    client: str
    dashboard: str
    environment: dict[str, str]  # with the token that the cluster asks for

    def ask(self, path: str, token: bool = True) -> Any:
        """What the dashboard answers."""
        bearer = {"authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"} if token else {}
        with urllib.request.urlopen(
            urllib.request.Request(self.dashboard + path, headers=bearer), timeout=30
        ) as answer:
            return json.load(answer)

    def run(self, *command: str, where: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=where, env=self.environment, capture_output=True, text=True, timeout=280, check=False
        )

    def actors(self) -> list[dict]:
        """Every actor that the cluster has had, the dead ones too."""
        return self.ask("/api/v0/actors")["data"]["result"]["result"]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`ray start --head`, on ports of this test's own."""
    port, client, dashboard = _free_ports(3)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [*RAY, "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={port}"]
    command += [f"--ray-client-server-port={client}", f"--dashboard-port={dashboard}", "--include-dashboard=true"]
    session = tempfile.mkdtemp(prefix="ray-")  # pytest's folder is too deep for the path of a socket
    command += [f"--temp-dir={session}"]
    log = tmp_path_factory.mktemp("head") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        at = f"127.0.0.1:{port}", f"ray://127.0.0.1:{client}", f"http://127.0.0.1:{dashboard}"
        found = Head(*at, environment)
        _wait(found, process, log)
        yield found
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in family:
            one.terminate()
        for one in psutil.wait_procs(family, timeout=10)[1]:
            one.kill()
        process.wait()
        shutil.rmtree(session)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait(head: Head, process: subprocess.Popen, log: Path) -> None:
    said: Any = None
    for _ in range(120):
        assert process.poll() is None, log.read_text()
        try:
            head.ask("/api/version")
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            said = error
            time.sleep(1)
    raise AssertionError(f"the dashboard never answered: {said}\n{log.read_text()}")


def test_ray_job_submit_runs_the_demo_on_the_cluster_whose_job_it_is(head: Head, repo: Path, tmp_path: Path) -> None:
    launch = shlex.join([sys.executable, "launch.py", *RUN, f"output_dir={tmp_path / 'run'}"])
    entry = ["sh", "-c", f"cd {shlex.quote(str(repo))} && exec {launch}"]  # as docs/cluster.md says it
    done = head.run(*RAY, "job", "submit", "--address", head.dashboard, "--", *entry)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "local: CPU, of the Ray cluster at auto" in done.stdout
    assert (tmp_path / "run" / "finished.json").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    workers = [actor for actor in head.actors() if actor["class_name"] == "_Worker"]
    assert len(workers) == 3 and {actor["state"] for actor in workers} == {"DEAD"}  # two ranks, one engine: all gone


@pytest.mark.evidence
@pytest.mark.parametrize("door", ["address", "client"])
def test_a_driver_outside_joins_by_address(door: str, head: Head, repo: Path, tmp_path: Path) -> None:
    before = len(head.actors())
    words = [*RUN, f"output_dir={tmp_path / 'run'}", f"cluster.address={getattr(head, door)}"]
    done = head.run(sys.executable, "launch.py", *words, where=repo)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "finished.json").exists()
    assert len(head.actors()) > before
    assert not list((tmp_path / "run").glob(".lpexp-*"))  # the rendezvous folder is gone


def test_a_driver_without_the_token_is_refused(head: Head, repo: Path, tmp_path: Path) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        head.ask("/api/version", token=False)
    head = head._replace(environment=head.environment | {"RAY_AUTH_TOKEN": secrets.token_hex(32)})
    run = tmp_path / "run"
    done = head.run(
        sys.executable, "launch.py", *RUN, f"output_dir={run}", f"cluster.address={head.address}", where=repo
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "cluster.address: " in done.stderr and "Traceback" not in done.stderr
