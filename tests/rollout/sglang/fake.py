"""A program that takes the place of an SGLang server in quick tests: the same command line, the same HTTP surface.

It holds the bytes it is given (as an unquantised model of one rank does) and answers uniformly drawn tokens with the
log-probability 1 / 64 each. Its faults are asked for by a file. What the real server answers is recorded in
recorded.json, and the lane drives the real one; nothing about SGLang is proved here.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import pickle
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

VOCABULARY = 64


class State:
    def __init__(self, arguments: argparse.Namespace, key: str, home: Path):
        self.arguments, self.key, self.home = arguments, key, home
        self.version, self.paused, self.lock = "default", False, threading.Lock()
        self.tensors: dict[str, Any] = {}

    def fault(self, name: str) -> bool:
        """Is this fault asked for now? Each word of the file once, or always where it ends in *."""
        asked = self.home / "faults"
        with self.lock:
            words = asked.read_text().split() if asked.exists() else []
            if name in words:
                words.remove(name)
                asked.write_text(" ".join(words))
                return True
            return f"{name}*" in words


class Handler(BaseHTTPRequestHandler):
    state: State

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        state, path = self.state, self.path.partition("?")[0]
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with state.lock, (state.home / "calls").open("a") as file:
            file.write(path + "\n")
        if path == "/health_generate":
            if state.fault("deaf"):
                time.sleep(60)
            return self.answer(None)
        if self.headers.get("Authorization") != f"Bearer {state.key}":
            return self.answer({"error": "Unauthorized"}, 401)
        body = json.loads(raw) if raw else {}
        if state.fault(f"die{path}"):
            print(f"[2026-01-01 00:00:00] dying in {path}", flush=True)
            os._exit(7)
        if state.fault(f"refuse{path}"):
            return self.answer({"success": False, "message": "as was asked for"}, 400)
        return self.answer(getattr(self, path.strip("/"))(body))

    def answer(self, body: Any, status: int = 200) -> None:
        raw = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    # -- what the real one has -------------------------------------------------------------------------------------
    def server_info(self, body: Any) -> Any:
        told = dict(vars(self.state.arguments))
        told |= {"version": "fake", "api_key": self.state.key, "launch_command": f"--api-key {self.state.key}"}
        if self.state.fault("dtype"):
            told["dtype"] = "float16"
        return told

    def pause_generation(self, body: Any) -> Any:
        self.state.paused = True
        return {}

    def continue_generation(self, body: Any) -> Any:
        self.state.paused = False
        return {}

    def nothing(self, body: Any) -> Any:
        return {"success": True, "message": "Success"}

    flush_cache = begin_weight_update = end_weight_update = abort_request = nothing
    release_memory_occupation = resume_memory_occupation = nothing

    def update_weights_from_tensor(self, body: Any) -> Any:
        for name, tensor in pickle.loads(base64.b64decode(body["serialized_named_tensors"][0])):
            self.state.tensors[name] = tensor.clone()
        self.state.version = body.get("weight_version", self.state.version)
        return self.nothing(body)

    def update_weights_from_disk(self, body: Any) -> Any:
        from safetensors.torch import load_file

        for path in Path(body["model_path"]).glob("*.safetensors"):
            self.state.tensors |= load_file(path)
        self.state.version = body["weight_version"]
        return self.nothing(body)

    def weights_checker(self, body: Any) -> Any:
        import torch

        from lpexp.data import Param
        from lpexp.model.hf import model_from_config
        from lpexp.rollout.sglang.held import hash_of, place

        config = json.loads((Path(self.state.arguments.model_path) / "config.json").read_text())
        model, members = model_from_config(config, "held", None), {}
        for param in model.params():
            assert isinstance(param, Param)
            where = place(param, model)
            members.setdefault(where.name, []).append((where.order, self.state.tensors[param.name]))
        held = {name: torch.cat([t for _, t in sorted(found, key=lambda f: f[0])]) for name, found in members.items()}
        if self.state.fault("wrong"):
            held["model.layers.1.mlp.gate_up_proj.weight"][0, 0] += 1
        rank = {"rank": 0, "tp_rank": 0, "role": "target"}
        told = {name: hash_of(tensor, "cpu") for name, tensor in held.items()}
        return {"success": True, "ranks": [{"checksums": told, "parallelism_info": [rank]}]}

    def generate(self, body: Any) -> Any:
        state, how = self.state, body["sampling_params"]
        while state.paused:
            time.sleep(0.01)
        if state.fault("slow"):
            time.sleep(60)
        if how["max_new_tokens"] == 0:
            return [self.scored(tokens) for tokens in body["input_ids"]]
        names = body["rid"]
        if state.fault("garbage"):
            return [{"text": "hello"} for _ in names]
        kind = "abort" if state.fault("abort") else "length"
        drawn = [[random.randrange(3, VOCABULARY) for _ in range(how["max_new_tokens"])] for _ in names]
        version = "77" if state.fault("stale") else state.version
        return [
            {
                "output_ids": tokens,
                "meta_info": {
                    "id": name,
                    "finish_reason": {"type": kind},
                    "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
                    "output_token_logprobs": [[-math.log(VOCABULARY), token, None] for token in tokens],
                },
            }
            for name, tokens in zip(names, drawn, strict=True)
        ]

    def scored(self, tokens: list[int]) -> Any:
        gap = -1.0 if self.state.fault("sour") else 0.0
        told = [[None if i == 0 else gap - math.log(VOCABULARY), token, None] for i, token in enumerate(tokens)]
        return {"meta_info": {"input_token_logprobs": told}}


def main(home: Path, argv: list[str]) -> None:
    """Serve as these arguments say; `home` holds the file `faults` and gets the file `calls`."""
    parser = argparse.ArgumentParser()
    for flag in ("config", "model-path", "host", "device", "dtype", "quantization", "attention-backend"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--kv-cache-dtype")
    for flag in ("port", "tp-size", "ep-size"):
        parser.add_argument(f"--{flag}", type=int)
    parser.add_argument("--enable-deterministic-inference", action="store_true")
    arguments, _ = parser.parse_known_args(argv)
    assert Path(arguments.config).stat().st_mode & 0o777 == 0o600
    state = State(arguments, Path(arguments.config).read_text().split()[1], home)
    print(f"[2026-01-01 00:00:00] ServerArgs(api_key={state.key!r})", flush=True)
    if state.fault("stillborn"):
        print("ImportError: libcuda.so.1: cannot open shared object file: No such file or directory", flush=True)
        sys.exit(1)
    if state.fault("mute"):
        time.sleep(600)
    Handler.state = state
    ThreadingHTTPServer((arguments.host, arguments.port), Handler).serve_forever()
