"""The SGLang rollout: servers that actors start and drive over HTTP. This file is its config, its rules and its plan.

server.py is a server's process, client.py what is said to it, transport.py how weights get in, held.py what it must
report to hold, engine.py the actor. What runs on which hardware, and what each message means: docs/sglang.md.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lpexp.config import Spec
from lpexp.disk import cache_dir
from lpexp.errors import Mistake
from lpexp.model import divisors
from lpexp.precision import KV_CACHES
from lpexp.rollout import Rollout, RolloutSpec
from lpexp.rollout.fit import engine_fits

if TYPE_CHECKING:
    from lpexp.cluster import Workers
    from lpexp.experiment import Experiment
    from lpexp.rollout.sglang.transport import Transport
    from lpexp.seats import Seat

LOCK = Path(__file__).resolve().parents[3] / "requirements-sglang.lock"
TESTED = "0.5.23"  # the server that this was written for and tested with
MOST_PARAMS_CPU = 1_000_000_000  # of a model that is served on cores
OURS = ("--config", "--model-path", "--host", "--port", "--api-key", "--admin-api-key")  # beside what `arguments` says


class Speculative(Spec):
    """A smaller model guesses, the served one checks; SGLang's own words."""

    algorithm: str
    draft: str | None  # a directory; None: the algorithm needs none
    steps: int = Field(ge=1)
    topk: int = Field(ge=1)
    draft_tokens: int = Field(ge=1)


class SglangRolloutSpec(RolloutSpec):
    """Servers on `gpus_per_engine` GPUs each (`ep` of them share the experts out), or on this machine's cores."""

    python: str | None  # an interpreter with SGLang; None: the one of `make sglang-env`
    device: Literal["auto", "cpu", "cuda"]  # auto: GPUs where the cluster has some
    engines: int | None = Field(ge=1)  # None: as many as the GPUs hold, one on cores
    gpus_per_engine: int = Field(ge=1)
    ep: int = Field(ge=1)
    mem_fraction: float = Field(gt=0, lt=1)  # of a GPU's memory, for weights and cache
    concurrency: int = Field(ge=1)  # samples in flight, an engine
    cuda_graphs: bool
    kv_cache_dtype: Literal[KV_CACHES]  # type: ignore[valid-type]
    deterministic: bool  # batch-invariant kernels and seeded sampling, where the attention backend has them
    attention_backend: str | None
    speculative: Speculative | None
    args: tuple[str, ...] = Field(strict=False)  # further arguments of the server, as it spells them
    transport: Literal["tensors", "broadcast", "disk"]
    bucket_mb: int = Field(ge=1)
    sync_dir: str | None  # of transport disk: a directory that every node sees; None: a temporary one
    canary_limit: float | None = Field(gt=0)  # nat a token; None: what the two precisions explain
    start_timeout_s: float = Field(gt=0)
    update_timeout_s: float = Field(gt=0)
    generate_timeout_s: float = Field(gt=0)  # of all answers to one prompt
    heartbeat_s: float = Field(gt=0)
    hang_s: float = Field(gt=0)  # without a sign of life, after which a server is replaced

    # -- rules -----------------------------------------------------------------------------------------------------
    def judge(self, exp: Experiment) -> Iterable[Mistake]:
        for name in sorted(name for name in os.environ if name.startswith("SGLANG_")):
            way = f"the config alone decides: unset {name}"
            yield Mistake(name, f"{os.environ[name]!r} in your shell would change what the server computes; {way}")
        yield from self._judge_cpu(exp) if self.on(exp) == "cpu" else self._judge_gpus(exp)
        given = {word.partition("=")[0] for word in self.args if word.startswith("-")}
        for flag in sorted(given & {*OURS, *self.arguments(exp, 0)}):
            yield Mistake("rollout.args", f"{flag} is decided by other keys of the config; leave it out")
        if self.transport == "broadcast":
            yield from self._judge_broadcast(exp)
        if self.transport == "disk" and exp.cluster.nodes > 1 and self.sync_dir is None:
            message = f"is needed by rollout.transport=disk on {exp.cluster.nodes} nodes: name a directory all see"
            yield Mistake("rollout.sync_dir", message)

    def _judge_broadcast(self, exp: Experiment) -> Iterable[Mistake]:
        way = "type rollout.transport=tensors"
        if exp.cluster.kind == "inline":
            message = "broadcast needs a trainer that sends while servers receive, and inline is one process"
            yield Mistake("rollout.transport", f"{message}; {way}, or cluster=local")
        if exp.trainer.reads_layout:
            yield Mistake("rollout.transport", f"broadcast is sent by trainer=embedded only; {way}")
        if self.on(exp) == "cuda" and exp.cluster.colocate:
            message = "broadcast needs GPUs of their own for the engines: NCCL takes one rank a GPU"
            yield Mistake("rollout.transport", f"{message}; {way}, or cluster.colocate=false")

    def _judge_cpu(self, exp: Experiment) -> Iterable[Mistake]:
        """A server on cores computes in 16 or 32 bits, alone, with torch's own attention."""
        lacking, model = exp.wire.sglang().no_cpu, exp.model.sized()
        if lacking:
            key = "rollout.precision" if exp.rollout.precision else "precision"
            others = "type rollout.precision=bf16, or a cluster with GPUs, or rollout=embedded"
            yield Mistake(key, f"{exp.wire.name}: {lacking}; {others}")
        if model.num_params() > MOST_PARAMS_CPU:
            size, most = f"{model.num_params() / 1e9:.3g}e9", f"{MOST_PARAMS_CPU / 1e9:.3g}e9"
            message = f"sglang on cores serves at most {most} parameters, {model.name} has {size}"
            yield Mistake("rollout", f"{message}; type a cluster with GPUs, or scale=laptop")
        wants = {
            "rollout.gpus_per_engine": (self.gpus_per_engine > 1, self.gpus_per_engine, 1),
            "rollout.ep": (self.ep > 1, self.ep, 1),
            "rollout.deterministic": (self.deterministic, "true", "false"),
            "rollout.speculative": (self.speculative is not None, "speculative decoding", "null"),
            "rollout.kv_cache_dtype": (self.kv_cache_dtype not in ("auto", "bfloat16"), self.kv_cache_dtype, "auto"),
        }
        for key, (wanted, value, instead) in wants.items():
            if wanted:
                yield Mistake(key, f"{value} needs GPUs, this server runs on cores; use {instead}")

    def _judge_gpus(self, exp: Experiment) -> Iterable[Mistake]:
        world, model = exp.cluster.engine_gpus, exp.model.sized()
        if world == 0:
            way = "type rollout.device=cpu, or a cluster with GPUs"
            yield Mistake("rollout.device", f"cuda, and cluster {exp.cluster.name} has no GPU; {way}")
            return
        if world % self.gpus_per_engine:
            yield Mistake(
                "rollout.gpus_per_engine", f"{self.gpus_per_engine} does not divide {world} GPUs; use a divisor"
            )
        if self.gpus_per_engine % self.ep:
            yield Mistake(
                "rollout.ep", f"{self.ep} does not divide rollout.gpus_per_engine {self.gpus_per_engine}; use a divisor"
            )
        if model.moe is None and self.ep > 1:
            yield Mistake("rollout.ep", f"{self.ep}, but {model.name} has no experts; use 1")
        elif model.moe and model.moe.num_experts % self.ep:
            experts = model.moe.num_experts
            yield Mistake("rollout.ep", f"{self.ep} does not divide {experts} experts; use one of {divisors(experts)}")
        if exp.cluster.colocate and exp.lag:
            message = "1 generates while the trainer learns, and with cluster.colocate=true both use the same GPUs"
            yield Mistake("lag", f"{message}; use 0, or cluster.colocate=false")
        yield from engine_fits(exp, self.gpus_per_engine, self.ep, self.mem_fraction)
        if self.engines is not None and self.engines * self.gpus_per_engine > world:
            over = f"{self.engines} of {self.gpus_per_engine} GPUs are more than the {world} there are"
            yield Mistake("rollout.engines", f"{over}; use at most {world // self.gpus_per_engine}")

    # -- what it comes to ------------------------------------------------------------------------------------------
    def on(self, exp: Experiment) -> Literal["cpu", "cuda"]:
        """Where the servers compute."""
        if self.device != "auto":
            return self.device
        return "cuda" if exp.cluster.gpus_per_node else "cpu"

    def count(self, exp: Experiment) -> int:
        """Engines."""
        if self.engines is not None:
            return self.engines
        return 1 if self.on(exp) == "cpu" else exp.cluster.engine_gpus // self.gpus_per_engine

    def seats(self, exp: Experiment, seats: Sequence[Seat], index: int) -> Sequence[Seat]:
        """The GPUs of an engine; none on cores."""
        if self.on(exp) == "cpu" or not seats:
            return ()
        mine, each = seats[-exp.cluster.engine_gpus :], self.gpus_per_engine
        return mine[index * each : (index + 1) * each]

    def limit(self, exp: Experiment) -> float:
        """How far the canary's log-probabilities may be apart, nat a token."""
        if self.canary_limit is not None:
            return self.canary_limit
        ours, theirs = exp.precision, exp.wire
        shift = 0.0 if ours.format() == theirs.format() else ours.shift + theirs.shift
        return 2 * (max(ours.noise, theirs.noise) + shift)

    def interpreter(self) -> str:
        return self.python or str(built())

    def arguments(self, exp: Experiment, index: int) -> dict[str, Any]:
        """The server's command line but for its address and key: {flag: value, or True}."""
        serving, cpu = exp.wire.sglang(), self.on(exp) == "cpu"
        each = exp.task.max_prompt + max(exp.task.max_response, exp.task.held_out_response or 0)
        graphs = None if self.cuda_graphs and not cpu else "disabled"
        said: dict[str, Any] = {
            "--device": self.on(exp),
            "--load-format": "dummy",  # version 0 comes as every other version does
            "--skip-tokenizer-init": True,
            "--dtype": serving.dtype,
            "--quantization": serving.quantization,
            "--kv-cache-dtype": self.kv_cache_dtype,
            "--tp-size": self.gpus_per_engine,
            "--ep-size": self.ep,
            "--attention-backend": "torch_native" if cpu and not self.attention_backend else self.attention_backend,
            "--sampling-backend": "pytorch" if cpu else None,
            "--sampling-defaults": "openai",
            "--mem-fraction-static": self.mem_fraction,
            "--max-running-requests": self.concurrency,
            "--max-total-tokens": (self.concurrency + 1) * each + 4096 if cpu else None,
            "--cuda-graph-backend-decode": graphs,
            "--cuda-graph-backend-prefill": graphs,
            "--disable-overlap-schedule": cpu,
            "--sleep-on-idle": True,
            "--enable-memory-saver": exp.cluster.colocate and not cpu,
            "--enable-deterministic-inference": self.deterministic,
            "--random-seed": (exp.seed * 1009 + index) % (1 << 31),
        }
        if draft := self.speculative:
            said |= {
                "--speculative-algorithm": draft.algorithm,
                "--speculative-draft-model-path": draft.draft,
                "--speculative-draft-load-format": "auto" if draft.draft else None,
                "--speculative-num-steps": draft.steps,
                "--speculative-eagle-topk": draft.topk,
                "--speculative-num-draft-tokens": draft.draft_tokens,
            }
        return said

    def expected_report(self, exp: Experiment) -> dict[str, Sequence[Any]]:
        """What /server_info must say after it resolved the arguments: an engine that chose otherwise is refused."""
        serving, cpu = exp.wire.sglang(), self.on(exp) == "cpu"
        kv_cache = {"auto": ("auto", serving.dtype), "bfloat16": ("bfloat16", "bf16")}
        said: dict[str, Sequence[Any]] = {
            "device": (self.on(exp),),
            "dtype": (serving.dtype,),
            "quantization": (serving.quantization,),
            "kv_cache_dtype": kv_cache.get(self.kv_cache_dtype, (self.kv_cache_dtype,)),
            "tp_size": (self.gpus_per_engine,),
            "ep_size": (self.ep,),
            "enable_deterministic_inference": (self.deterministic,),
        }
        if backend := "torch_native" if cpu and not self.attention_backend else self.attention_backend:
            said["attention_backend"] = (backend,)
        return said

    def model_json(self, exp: Experiment, stop_id: int) -> dict[str, Any]:
        """The config.json that a server starts from: the model's, in the rollout's precision, with our stop token."""
        from lpexp.model.hf import config_json, read_config, served_config

        model = exp.model.sized()
        config: Mapping[str, Any] = config_json(model) if model.path is None else read_config(model.path)
        served = served_config(config, list(model.params()), model.moe is not None, exp.wire)
        return served | {"eos_token_id": stop_id}

    def server_environment(self, exp: Experiment) -> dict[str, str]:
        """Of the server's processes; no SGLANG_ variable of the shell reaches them."""
        cpu = self.on(exp) == "cpu"
        return {
            "OMP_NUM_THREADS": str(exp.cluster.threads),
            "SGLANG_HEALTH_CHECK_TIMEOUT": str(max(1, round(self.hang_s))),
            "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",  # five seconds in which callers would wait
            **({"GLOO_SOCKET_IFNAME": "lo"} if exp.cluster.nodes == 1 else {}),
            **({"SGLANG_USE_CPU_ENGINE": "1"} if cpu else {}),
        }

    def transport_of(self, exp: Experiment, shared: Path) -> Transport:
        from lpexp.rollout.sglang.transport import Disk, Tensors

        model = exp.model.sized()
        if self.transport == "disk":
            return Disk(model, exp.wire, Path(self.sync_dir) if self.sync_dir else shared, self.update_timeout_s)
        limit = self.bucket_mb << 20
        return Tensors(model, exp.wire, limit, self.gpus_per_engine, self.on(exp), self.update_timeout_s)

    # -- the loop's side -------------------------------------------------------------------------------------------
    def build(self, exp: Experiment, workers: Workers) -> Rollout:
        from lpexp.rollout.sglang.rollout import SglangRollout

        return SglangRollout(exp, self, workers)

    def plan(self, exp: Experiment) -> list[dict[str, Any]]:
        cpu = self.on(exp) == "cpu"
        where = "cores" if cpu else f"{self.gpus_per_engine} GPUs (experts over {self.ep})"
        if not cpu:
            whose = "colocated" if exp.cluster.colocate else "on GPUs of their own"
            where += f", {whose}, memory fraction {self.mem_fraction:g}"
        what = f"SGLang server on {where}; weights by {self.transport}; serves {exp.wire.name}"
        gpus = 0 if cpu else self.gpus_per_engine
        return [{"role": "rollout engine", "count": self.count(exp), "what": what, "gpus": gpus}]

    def environment(self, exp: Experiment) -> dict[str, str]:
        return self.server_environment(exp)

    def missing(self, exp: Experiment) -> str | None:
        if self.on(exp) == "cuda" and self.gpus_per_engine > exp.cluster.gpus_per_node:
            each = exp.cluster.gpus_per_node
            return f"an engine that spans nodes is not built in this version; type rollout.gpus_per_engine={each}"
        if self.python is None:
            done = built().parents[1] / ".installed"
            return None if done.exists() else f"SGLang's own environment is not built ({done}); type: make sglang-env"
        if not os.access(self.python, os.X_OK):
            way = "name the interpreter of an environment with SGLang, or null for that of make sglang-env"
            return f"rollout.python: {self.python} is no program; {way}"
        return None


def built() -> Path:
    """The interpreter that `make sglang-env` makes for this lock."""
    name = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12] if LOCK.exists() else "unknown"
    return cache_dir("envs") / f"sglang-{name}" / "bin" / "python"
