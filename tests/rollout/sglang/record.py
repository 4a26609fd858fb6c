"""python -m tests.rollout.sglang.record: ask a real server everything in calls.py, and write down what it answers.

Also the parameters that it reports to hold of each tiny model, for the tests of held.py. Needs `make sglang-env` and,
on a machine without a driver, the library of conftest.py. Run it when SGLang's lock changes.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from lpexp.rollout.sglang.client import Client
from lpexp.rollout.sglang.server import redacted
from tests.rollout.sglang.calls import CALLS, MODEL, outcome
from tests.rollout.sglang.conftest import Opened, driver_library

FILE = Path(__file__).with_name("recorded.json")
MODELS = {  # whose held parameters are recorded
    "qwen3_tiny fp32": ("model=qwen3_tiny", "precision=fp32"),
    "qwen3_tiny bf16": ("model=qwen3_tiny", "precision=bf16"),
    "qwen2_tiny fp32": ("model=qwen2_tiny", "precision=fp32"),
    "llama_tiny fp32": ("model=llama_tiny", "precision=fp32"),
}
SERVER = ("rollout=sglang", "cluster=inline", "rollout.concurrency=16")


class Tapped(Client):
    """A client that keeps what it said and heard."""

    def __init__(self, other: Client):
        super().__init__(other.host, other.port, other._key)
        self.heard: list[dict[str, Any]] = []

    def _exchange(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> tuple[int, bytes]:
        status, raw = super()._exchange(method, path, body, timeout_s)
        text = raw.decode()
        try:
            answer = json.loads(text)
        except ValueError:
            answer = text
        self.heard.append({"method": method, "path": path, "body": body, "status": status, "answer": answer})
        return status, raw


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LD_LIBRARY_PATH"] = driver_library(Path(folder))
        kept: dict[str, Any] = {"calls": {}, "held": {}}
        for name, words in MODELS.items():
            one = Opened(Path(folder) / name.replace(" ", "_"), *SERVER, *words, "seed=1")
            try:
                one.rollout.contract()
                one.rollout.load(one.shards(1)[0], 0).result()
                engine = one.engine()
                kept["held"][name] = engine.client.checksums(60)[0]
                if words == MODEL[:2]:
                    client = Tapped(engine.client)
                    for call, make in CALLS.items():
                        client.heard.clear()
                        result = outcome(make, client)
                        kept["calls"][call] = {"heard": list(client.heard), "outcome": result}
                    told = redacted(engine.client.info(), engine.server.key)
                    kept["versions"] = {"sglang": told["version"], "python": platform.python_version()}
            finally:
                one.close()
    FILE.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{FILE}: {len(kept['calls'])} calls, {len(kept['held'])} models, SGLang {kept['versions']['sglang']}")


if __name__ == "__main__":
    main()
