"""One engine: an actor that owns a SGLang server, gives it weights, asks it for samples and watches over it.

Whatever the server does that it should not (end, hang, answer garbage, refuse an update) makes the engine lost: it
stops the server and raises EngineLost with what was finished, and the dispatcher brings a successor.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lpexp.data import Group, Prompt, Sample
from lpexp.disk import write_json
from lpexp.errors import EngineLost, RunError
from lpexp.rollout import Sampling
from lpexp.rollout.sglang.client import Answer, Client, Refused, Unreachable
from lpexp.rollout.sglang.server import Server, environment, mistakes, redacted

if TYPE_CHECKING:
    from lpexp.experiment import Experiment
    from lpexp.precision import Parts
    from lpexp.precision.wire import Frozen
    from lpexp.rollout.sglang import SglangRolloutSpec
    from lpexp.rollout.sglang.broadcast import Announced
    from lpexp.rollout.sglang.held import Expected

    Shard = dict[str, dict[str, Frozen]] | str  # {tensor: its parts}, or a directory

ASKS = 3  # times that an answer is asked for before the engine counts as lost
LOOK_S = 0.5
RESTING = ("kv_cache", "weights", "cuda_graph")  # what a resting server gives back
DECODED = 8  # tokens of the canary that are decoded greedily


class SglangEngine:
    """`canary`: token sequences that are scored after every load. Starts its server when made; `ready` says when."""

    def __init__(self, exp: Experiment, index: int, folder: str, shared: str, canary: Sequence[Sequence[int]]):
        from lpexp.model.decoder import settle
        from lpexp.model.tokenizer import load_tokenizer

        settle(exp.cluster.threads)
        self.exp, self.index, self.canary = exp, index, canary
        self.spec: SglangRolloutSpec = exp.rollout  # type: ignore[assignment]
        self.model, self.folder = exp.model.sized(), Path(folder)
        self.stop_id = load_tokenizer(self.model).stop_id
        self.version, self.asked, self.compared = -1, 0, False
        self.joined: str | None = None  # the process group that its server is in
        self.resting = False  # its server has given its GPUs' memory back
        self.transport = self.spec.transport_of(exp, Path(shared))
        self.server = self._start()
        self.client = Client(self.server.host, self.server.port, self.server.key)
        self.watch: Watch | None = None
        self.report: dict[str, Any] = {}

    def _start(self) -> Server:
        env = environment(os.environ, self.spec.server_environment(self.exp))
        log = self.folder / f"engine-{self.index}.log"
        python, arguments = self.spec.interpreter(), self.spec.arguments(self.exp, self.index)
        model = self.spec.model_json(self.exp, self.stop_id)
        return Server(python, arguments, model, env, address(self.exp), log)

    # -- start -----------------------------------------------------------------------------------------------------
    def ready(self) -> tuple[dict[str, Any] | None, str]:
        """What the server says of itself once it answers, else None; and what it does. RunError when it will not."""
        if self.watch is not None:
            return self.report, "ready"
        if self.server.ended():
            raise self.server.failure(f"of engine {self.index} ended while it started")
        if not self.client.healthy(self.spec.hang_s):
            if self.server.seconds() > self.spec.start_timeout_s:
                error = self.server.failure(
                    f"of engine {self.index} is not ready after {self.spec.start_timeout_s:g} s"
                )
                self.close()
                raise error
            return None, self.server.last_line()
        told = self.client.info()
        if wrong := mistakes(self.spec.expected_report(self.exp), told):
            self.close()
            raise RunError(f"the server of engine {self.index} does not serve what was asked for: {'; '.join(wrong)}")
        self.server.forget_key_file()
        write_json(self.folder / f"engine-{self.index}.json", redacted(told, self.server.key))
        self.report = {
            "engine": self.index,
            "version": told.get("version"),
            "pid": self.server.pid,
            "url": f"http://{self.server.host}:{self.server.port}",
            "seconds": round(self.server.seconds(), 1),
            "log": str(self.server.log),
        }
        self.watch = Watch(self.server, self.client, self.spec.heartbeat_s, self.spec.hang_s)
        return self.report, "ready"

    def contract(self) -> dict[str, str]:
        """What this engine serves, from its own copy of the config, or from the directory that it will load."""
        from lpexp.model.served import precision_of

        directory = self.exp.rollout.checkpoint
        precision = self.exp.wire if directory is None else precision_of(directory, self.model)
        return precision.contract(self.model.params(), self.model.moe is not None)

    # -- weights ---------------------------------------------------------------------------------------------------
    def load(
        self, shard: Shard | Announced, version: int, *more: Shard
    ) -> tuple[str, dict[str, float], np.ndarray | None]:
        """Serve these weights: the checksum of what was sent, which the server holds; seconds; the canary's scores.

        RunError when the server holds something else. The order: memory for weights, pause, flush, update, compare,
        memory for keys and values, resume, canary.
        """
        from lpexp.rollout.sglang.broadcast import Announced

        self._alive()
        try:
            with self._watching().suspended():
                if self.resting:
                    self.client.occupy(["weights"])
                self.client.pause()
                self.client.flush()
                if isinstance(shard, Announced):
                    sent, expected, spent = shard.checksum, shard.expected, self._receive(shard, version)
                else:
                    sent, expected, spent = self._give((shard, *more), version)
                self._compare(expected, self.client.checksums(self.spec.update_timeout_s), version)
                if self.resting:
                    self.client.occupy([tag for tag in RESTING if tag != "weights"])
                    self.resting = False
                self.client.proceed()
            self.version = version
            scores = self._score_canary() if self.canary else None
        except (Unreachable, Refused, EngineLost) as error:
            raise self._lost(f"the update to version {version}", error) from None
        return sent, spent, scores

    def _give(self, shards: Sequence[Shard], version: int) -> tuple[str, list[Expected], dict[str, float]]:
        from lpexp.precision.wire import checksum, thaw
        from lpexp.rollout.dispatch import stored_parts
        from lpexp.rollout.sglang.held import expectations

        spec = self.spec
        parts: dict[str, Parts] = {}
        for one in shards:
            parts |= stored_parts(one) if isinstance(one, str) else {name: thaw(raw) for name, raw in one.items()}
        spent = self.transport.send(self.client, parts, version)
        on = spec.on(self.exp)
        return checksum(parts), expectations(parts, self.model, self.exp.wire, on, spec.gpus_per_engine, spec.ep), spent

    def _receive(self, sent: Announced, version: int) -> dict[str, float]:
        """Have the server take what a trainer's rank sends meanwhile."""
        timeout_s, begin, name = self.spec.update_timeout_s, time.perf_counter(), sent.meeting.name
        if self.joined != name:
            if self.joined is not None:
                self.client.leave(self.joined)
            self.client.join(sent.meeting.joining(self.index), timeout_s)
            self.joined = name
        joined = time.perf_counter()
        self.client.begin(timeout_s)
        for number, bucket in enumerate(sent.buckets, 1):
            self.client.receive(name, bucket, version if number == len(sent.buckets) else None, timeout_s)
        self.client.end(timeout_s)
        return {"transfer": joined - begin, "load": time.perf_counter() - joined}

    def _compare(self, expected: Sequence[Expected], reported: Sequence[Mapping[str, str]], version: int) -> None:
        """RunError that names the class and the first tensor in which the server holds what was not sent."""
        if len(reported) != len(expected):
            raise EngineLost(f"{len(reported)} ranks report what they hold, the server has {len(expected)}")
        compared = 0
        for wanted, told in zip(expected, reported, strict=True):
            for name, (wants, what) in wanted.items():
                compared += name in told
                if told.get(name, wants) != wants:
                    raise RunError(
                        f"weights of version {version}: engine {self.index} holds another {name} than was sent ({what})"
                    )
        if not compared:
            raise RunError(f"engine {self.index} reports nothing that can be compared: {sorted(reported[0])[:5]}")
        if not self.compared:
            self.compared = True
            everything = sum(len(told) for told in reported)
            with self.server.log.open("a") as file:
                file.write(f"lpexp: {compared} of {everything} parameters are compared after every update\n")

    def rest(self) -> None:
        """Give the GPUs' memory back until the next load; nothing may be owed."""
        if self.resting:
            return
        self._alive()
        try:
            with self._watching().suspended():
                self.client.flush()
                self.client.release(RESTING)
        except (Unreachable, Refused) as error:
            raise self._lost("the release of its memory", error) from None
        self.resting = True

    def _score_canary(self) -> np.ndarray:
        """The canary's log-probabilities; RunError where the server decodes otherwise than it reads."""
        timeout_s, limit = self.spec.update_timeout_s, self.spec.limit(self.exp)
        prompt = list(self.canary[0])
        (greedy,) = self.client.generate(
            prompt, [f"canary.{self.version}"], Sampling(temperature=0.0), DECODED, self.stop_id, timeout_s
        )
        read = self.client.score([*self.canary, prompt + greedy.tokens_T.tolist()], timeout_s)
        decoded = float(np.abs(read[-len(greedy.tokens_T) :] - greedy.logprobs_T).mean())
        if not decoded <= limit:
            raise RunError(
                f"canary: engine {self.index} decodes and reads the same tokens with log-probabilities that differ by "
                f"{decoded:.2g} nat a token, the limit is {limit:.2g}"
            )
        return read[: sum(len(tokens) - 1 for tokens in self.canary)]

    # -- samples ---------------------------------------------------------------------------------------------------
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> tuple[list[Group], float]:
        """`sampling.samples` answers to each prompt, in order; and the seconds that took."""
        begin = time.perf_counter()
        self._alive()
        if not prompts:
            return [], 0.0
        self.asked += 1
        at_once = max(1, self.spec.concurrency // sampling.samples)  # the samples of a prompt go together
        with ThreadPoolExecutor(min(at_once, len(prompts)), thread_name_prefix="ask") as pool:
            asked = [pool.submit(self._group, prompt, sampling, f"{step}.{self.asked}") for prompt in prompts]
            wait(asked)
        failed = [future.exception() for future in asked if future.exception() is not None]
        groups = [future.result() for future in asked if future.exception() is None]
        if not failed:
            return groups, time.perf_counter() - begin
        if isinstance(failed[0], Unreachable | EngineLost):
            raise self._lost(f"sampling for step {step}", failed[0], groups)
        raise failed[0]  # type: ignore[misc]

    def _group(self, prompt: Prompt, sampling: Sampling, call: str) -> Group:
        """All answers to one prompt. What fails is dropped at the server before it is asked for again under another
        name, so an answer that comes late belongs to nobody and no sample is drawn twice."""
        done: dict[int, Answer] = {}
        for attempt in range(ASKS):
            left = [g for g in range(sampling.samples) if g not in done]
            names = [f"{call}.{prompt.id}.{g}.{attempt}" for g in left]
            longest = sampling.max_response or self.exp.task.max_response
            try:
                answers = self.client.generate(
                    prompt.tokens, names, sampling, longest, self.stop_id, self.spec.generate_timeout_s
                )
            except Unreachable:
                if self.server.ended() or attempt == ASKS - 1:
                    raise
                self.client.abort(names)
                continue
            done |= {g: answer for g, answer in zip(left, answers, strict=True) if answer.finish != "abort"}
            if len(done) == sampling.samples:
                return Group(prompt, tuple(self._sample(prompt, g, done[g]) for g in range(sampling.samples)))
        raise EngineLost(f"prompt {prompt.id}: answers were aborted {ASKS} times")

    def _sample(self, prompt: Prompt, g: int, answer: Answer) -> Sample:
        if answer.version != str(self.version):
            raise RunError(
                f"engine {self.index} answered with weights of version {answer.version}, it was given {self.version}"
            )
        return Sample(prompt.id, g, answer.tokens_T, answer.logprobs_T, self.version, answer.finish)

    # -- health ----------------------------------------------------------------------------------------------------
    def _watching(self) -> Watch:
        """Its watch; waits until the server is ready."""
        while self.watch is None:
            if self.ready()[0] is None:
                time.sleep(LOOK_S)
        return self.watch

    def _alive(self) -> None:
        if verdict := self._watching().verdict():
            raise self._lost("the time between two calls", RunError(verdict))

    def _lost(self, during: str, error: BaseException, finished: Sequence[Group] = ()) -> EngineLost:
        """Stop what is left of the server; why."""
        watch = self._watching()
        time.sleep(LOOK_S)  # a server that is about to end gives the better reason
        why = watch.verdict() or str(error)
        watch.close()
        self.server.stop()
        return EngineLost(f"during {during}: {why}", finished)

    def close(self) -> None:
        if self.watch is not None:
            self.watch.close()
        self.server.stop()


def address(exp: Experiment) -> str:
    """Where a server listens: loopback on one machine, the node's own address in a cluster of several."""
    from lpexp.rollout.sglang.broadcast import LOOPBACK

    if exp.cluster.nodes == 1:
        return LOOPBACK
    import ray

    return ray.util.get_node_ip_address()


class Watch:
    """Looks after a server from a thread of its own. One that gives no sign of life for `hang_s` is stopped, which
    ends every call that waits for it."""

    def __init__(self, server: Server, client: Client, heartbeat_s: float, hang_s: float):
        self.server, self.client, self.heartbeat_s, self.hang_s = server, client, heartbeat_s, hang_s
        self._verdict: str | None = None
        self._over, self._busy = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._look, name="heartbeat", daemon=True)
        self._thread.start()

    def verdict(self) -> str | None:
        """What is wrong with the server, or None."""
        if self._verdict is None and self.server.ended():
            last = self.server.lines[-1] if self.server.lines else "nothing"
            return f"its server ended; it said: {last}"
        return self._verdict

    def suspended(self) -> Any:
        """For the time of an update, in which a healthy server does not generate; a context manager."""
        return self._busy

    def close(self) -> None:
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(self.heartbeat_s):
            if self.server.ended():
                return
            if time.monotonic() - self.client.answered < self.heartbeat_s:
                continue
            with self._busy:
                healthy = self.client.healthy(self.hang_s)
            silent = time.monotonic() - self.client.answered
            if not healthy and silent > self.hang_s and not self._over.is_set():
                self._verdict = f"its server gave no sign of life for {silent:.0f} s"
                self.server.stop()
                return
