"""The embedded rollout: engines that serve the decoder from what came over the wire.

An engine prefills each prompt once for its whole group, keeps keys and values in slots, decodes all occupied slots
together and refills a slot as soon as its sample ends (continuous batching). The dispatcher spreads groups over
engines and heals: a dead engine is replaced, given the current weights and the prompts it owed.
Results do not depend on the number of engines or slots (sampling.py, model/decoder.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from lpexp.data import Group, Prompt, Sample
from lpexp.errors import RunError
from lpexp.precision import digest
from lpexp.rollout import RolloutSpec, Sampling

if TYPE_CHECKING:
    from lpexp.cluster import Future, Handle, Workers
    from lpexp.experiment import Experiment
    from lpexp.precision.wire import Frozen


HEAL_ATTEMPTS = 3


class EmbeddedRolloutSpec(RolloutSpec):
    """`engines` workers of `slots` sequences each; neither changes a result."""

    engines: int = Field(ge=1)
    slots: int = Field(ge=1)
    device: Literal["auto", "cpu", "cuda"]

    def build(self, exp: Experiment, workers: Workers) -> EmbeddedRollout:
        return EmbeddedRollout(exp, self, workers)

    def plan(self, exp: Experiment) -> list[dict[str, Any]]:
        count = 1 if exp.cluster.kind == "inline" else self.engines
        return [
            {
                "role": "rollout engine",
                "count": count,
                "what": f"embedded decoder, {self.slots} slots, serves {exp.wire.name}",
            }
        ]


class EmbeddedEngine:
    """One engine: weights in served form, a slot cache, and a sampler. Runs in an actor or in this process."""

    def __init__(self, exp: Experiment, slots: int, threads: int, device: str):

        from lpexp.model.decoder import Cache, Decoder, pick_device, settle, span_of
        from lpexp.model.tokenizer import load_tokenizer

        settle(threads)
        self.exp, self.slots, self.device = exp, slots, pick_device(device)
        self.model = exp.model.sized()
        self.stop_id = load_tokenizer(self.model).stop_id
        self.decoder = Decoder(self.model, self.device)
        self.span = span_of(exp.task.max_prompt + exp.task.max_response)
        self.cache = Cache(self.model, slots, self.span, self.device)
        self.weights: Any = None
        self.version = -1

    def contract(self) -> dict[str, str]:
        """What this engine serves, from its own copy of the config."""
        return self.exp.wire.contract(self.model.params(), self.model.moe is not None)

    def load(self, parts: dict[str, dict[str, Frozen]], version: int) -> tuple[str, float]:
        """Serve these parts from now on; returns the checksum of what is held, and seconds."""
        from lpexp.model.decoder import ServedWeights
        from lpexp.precision.wire import checksum, thaw

        start = time.perf_counter()
        held = {name: thaw(tensors, self.device) for name, tensors in parts.items()}
        self.weights = ServedWeights(self.model, self.exp.wire, held)
        self.version = version
        return checksum(held), time.perf_counter() - start

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> list[Group]:
        """`sampling.samples` answers to each prompt, in order."""
        import torch

        with torch.inference_mode():
            return Generation(self, prompts, sampling, step).run()


class Generation:
    """One call of `sample`: the queue of prompts, the occupied slots, and what they have emitted so far."""

    def __init__(self, engine: EmbeddedEngine, prompts: Sequence[Prompt], sampling: Sampling, step: int):
        self.engine, self.prompts, self.sampling, self.step = engine, prompts, sampling, step
        self.longest = engine.exp.task.max_response
        self.done: dict[tuple[int, int], Sample] = {}
        self.waiting = [(p, g) for p in range(len(prompts)) for g in range(sampling.samples)][::-1]
        self.free = list(range(engine.slots))[::-1]
        self.prefilled: dict[int, tuple[Any, Any, Any]] = {}

    def run(self) -> list[Group]:
        import torch

        from lpexp.model.decoder import token_logprobs
        from lpexp.rollout.sampling import draw, uniforms

        engine, sampling, moe = self.engine, self.sampling, self.engine.model.moe is not None
        device, seed = engine.device, engine.exp.seed
        # One row an occupied slot; the arrays are rebuilt when a sample ends or starts.
        slots, rows, length = np.zeros(0, np.int64), np.zeros((0, 2), np.int64), np.zeros(0, np.int64)
        logits = torch.empty(0, engine.model.vocab_size, device=device)
        tokens: list[list[int]] = []
        logprobs: list[list[float]] = []
        routes: list[list[np.ndarray]] = []
        while self.waiting or len(slots):
            if self.waiting and self.free:
                start = self._admit()
                slots = np.concatenate([slots, start["slots"]])
                rows = np.concatenate([rows, start["rows"]])
                length = np.concatenate([length, start["length"]])
                logits = torch.cat([logits, start["logits"]])
                routes += start["routes"]
                tokens += [[] for _ in start["slots"]]
                logprobs += [[] for _ in start["slots"]]
            emitted = np.array([len(t) for t in tokens])
            ids = np.array([self.prompts[p].id for p in rows[:, 0]])
            u = torch.from_numpy(uniforms(seed, self.step, ids, rows[:, 1], emitted)).to(device)
            drawn = draw(logits, u, sampling.temperature, sampling.top_p, sampling.top_k)
            lp = token_logprobs(logits, drawn, sampling.temperature).cpu().numpy()
            ids_drawn = drawn.cpu().numpy()
            for i, (token, value) in enumerate(zip(ids_drawn.tolist(), lp.tolist(), strict=True)):
                tokens[i].append(token)
                logprobs[i].append(value)
            ended = (ids_drawn == engine.stop_id) | (emitted + 1 >= self.longest)
            for i in np.flatnonzero(ended):
                self._finish(rows[i], tokens[i], logprobs[i], routes[i] if moe else None)
                self.free.append(int(slots[i]))
            stay = np.flatnonzero(~ended)
            slots, rows, length = slots[stay], rows[stay], length[stay]
            tokens, logprobs = [tokens[i] for i in stay], [logprobs[i] for i in stay]
            routes = [routes[i] for i in stay] if moe else []
            if not len(stay):
                logits = logits[:0]
                continue
            keep: list[Any] | None = [] if moe else None
            hidden = engine.decoder.decode(
                engine.weights,
                drawn[torch.from_numpy(stay).to(device)],
                torch.from_numpy(length).to(device),
                engine.cache,
                torch.from_numpy(slots).to(device),
                keep,
            )
            if keep is not None:
                chosen = torch.stack(keep, 1).cpu().numpy().astype(np.int16)  # [R, layers, K]
                for i, choice in enumerate(chosen):
                    routes[i].append(choice[None])
            logits = engine.decoder.head(engine.weights, hidden)
            length = length + 1
        return [
            Group(prompt, tuple(self.done[p, g] for g in range(sampling.samples)))
            for p, prompt in enumerate(self.prompts)
        ]

    def _admit(self) -> dict[str, Any]:
        """Give waiting samples to free slots; a prompt's keys and values are computed once for its group."""
        import torch

        engine = self.engine
        taken = [self.waiting.pop() for _ in range(min(len(self.waiting), len(self.free)))]
        slots = [self.free.pop() for _ in taken]
        fresh = [p for p in dict.fromkeys(p for p, _ in taken) if p not in self.prefilled]
        if fresh:
            self._prefill(fresh)
        logits, routes = [], []
        at = torch.tensor(slots, device=engine.device)
        for layer in range(engine.model.num_hidden_layers):
            for cache, which in ((engine.cache.k, 0), (engine.cache.v, 1)):
                rows = torch.stack([self.prefilled[p][0][layer][which] for p, _ in taken])  # [R, heads, Tp, D]
                cache[layer][at, :, : rows.shape[2]] = rows.to(engine.cache.dtype)
        for p, _ in taken:
            logits.append(self.prefilled[p][1])
            routes.append([self.prefilled[p][2]])
        lengths = np.array([len(self.prompts[p].tokens) for p, _ in taken], np.int64)
        done = {p for p in self.prefilled if p not in {w for w, _ in self.waiting[-1:]}}
        for p in done:  # samples are admitted prompt by prompt: only the next one's prefill can still be needed
            del self.prefilled[p]
        return {
            "slots": np.array(slots, np.int64),
            "rows": np.array(taken, np.int64),
            "length": lengths,
            "logits": torch.stack(logits),
            "routes": routes,
        }

    def _prefill(self, fresh: list[int]) -> None:
        import torch

        engine = self.engine
        width = engine.exp.task.max_prompt
        tokens = np.zeros((len(fresh), width), np.int64)
        for i, p in enumerate(fresh):
            tokens[i, : len(self.prompts[p].tokens)] = self.prompts[p].tokens
        keep: list[Any] = []
        layers: list[Any] = []
        routes: list[Any] | None = [] if engine.model.moe else None
        tokens_PT = torch.from_numpy(tokens).to(engine.device)
        hidden = engine.decoder.hidden(engine.weights, tokens_PT, engine.span, keep, routes)
        last = torch.tensor([len(self.prompts[p].tokens) - 1 for p in fresh], device=engine.device)
        logits = engine.decoder.head(engine.weights, hidden[torch.arange(len(fresh), device=engine.device), last])
        chosen = torch.stack(routes, 2).cpu().numpy().astype(np.int16) if routes else None  # [P, T, layers, K]
        for i, p in enumerate(fresh):
            layers = [(k[i], v[i]) for k, v in keep]
            seen = None if chosen is None else chosen[i, : len(self.prompts[p].tokens)]
            self.prefilled[p] = (layers, logits[i], seen)

    def _finish(
        self, row: np.ndarray, tokens: list[int], logprobs: list[float], routes: list[np.ndarray] | None
    ) -> None:
        p, g = int(row[0]), int(row[1])
        self.done[p, g] = Sample(
            prompt_id=self.prompts[p].id,
            index=g,
            tokens_T=np.array(tokens, np.int32),
            logprobs_T=np.array(logprobs, np.float32),
            version=self.engine.version,
            finish="stop" if tokens[-1] == self.engine.stop_id else "length",
            experts=None if routes is None else np.concatenate(routes),
        )


class EmbeddedRollout:
    """The dispatcher: splits prompts over the engines, waits, and replaces an engine that died."""

    def __init__(self, exp: Experiment, spec: EmbeddedRolloutSpec, workers: Workers):
        self.exp, self.spec, self.workers = exp, spec, workers
        count = 1 if exp.cluster.kind == "inline" else spec.engines
        self.engines = [self._spawn(i) for i in range(count)]
        self.shards: Any = None
        self.version = -1

    def _spawn(self, index: int) -> Handle:
        spec, cluster = self.spec, self.exp.cluster
        return self.workers.spawn(
            f"engine-{index}",
            EmbeddedEngine,
            self.exp,
            spec.slots,
            cluster.threads,
            spec.device,
            env=spec.environment(self.exp),
        )

    def contract(self) -> dict[str, str]:
        contracts = [future.result() for future in [engine.call("contract") for engine in self.engines]]
        for other in contracts[1:]:
            if other != contracts[0]:
                raise RunError(f"engines disagree on their contract: {digest(contracts[0])} and {digest(other)}")
        return contracts[0]

    def load(self, shards: Any, version: int) -> tuple[list[str], dict[str, float]]:
        self.shards, self.version = shards, version
        call = ("load", shards, version)
        futures = [(engine, engine.call(*call)) for engine in self.engines]
        held = [self.owed(index, engine, future, call) for index, (engine, future) in enumerate(futures)]
        return [checksum for checksum, _ in held], {"load": max(seconds for _, seconds in held)}

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> EmbeddedPending:
        return EmbeddedPending(self, prompts, sampling, step)

    def owed(
        self,
        index: int,
        engine: Handle,
        future: Future,
        call: tuple[Any, ...],
        served: tuple[Any, int] | None = None,
    ) -> Any:
        """What an engine owes. If it died: its successor makes the same call, with the weights `served` at the time."""
        for attempt in range(1, HEAL_ATTEMPTS + 1):
            if not future.died():
                return future.result()
            self.workers.event("engine_healed", engine=index, attempt=attempt, owed=call[0], reason=reason(future))
            if self.engines[index] is engine:  # else an earlier debt has brought a successor already
                self.engines[index] = self._spawn(index)
            engine = self.engines[index]
            if served:
                engine.call("load", *served)
            future = engine.call(*call)
            if served and served[1] != self.version:  # its next call must find the newest weights again
                engine.call("load", self.shards, self.version)
        raise RunError(f"rollout engine {index} died {HEAL_ATTEMPTS} times in a row: {reason(future)}")

    def close(self) -> None:
        for engine in self.engines:
            engine.stop()


class EmbeddedPending:
    """Groups being generated: engine i has prompts i, i + n, i + 2n, ..."""

    def __init__(self, rollout: EmbeddedRollout, prompts: Sequence[Prompt], sampling: Sampling, step: int):
        self.rollout, self.count = rollout, len(prompts)
        n = len(rollout.engines)
        self.calls = [("sample", list(prompts[i::n]), sampling, step) for i in range(n)]
        self.served = (rollout.shards, rollout.version)
        self.engines = list(rollout.engines)
        self.futures = [engine.call(*call) for engine, call in zip(self.engines, self.calls, strict=True)]

    def result(self) -> list[Group]:
        groups: list[Any] = [None] * self.count
        n = len(self.futures)
        for index, (engine, future, call) in enumerate(zip(self.engines, self.futures, self.calls, strict=True)):
            groups[index::n] = self.rollout.owed(index, engine, future, call, self.served)
        return groups


def reason(future: Future) -> str:
    """The first line of what a dead worker left."""
    return next((line.strip() for line in str(future.error()).splitlines() if line.strip()), "no reason given")
