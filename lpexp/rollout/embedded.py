"""The embedded rollout: engines that serve the decoder from what came over the wire.

An engine prefills each prompt once for its whole group, keeps keys and values in slots, decodes all occupied slots
together and refills a slot as soon as its sample ends (continuous batching). The dispatcher spreads groups over
engines and heals: a dead engine is replaced, given the current weights and the prompts it owed.
Results do not depend on the number of engines or slots (sampling.py, model/decoder.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from lpexp.data import Group, Prompt, Sample, SyncReport
from lpexp.errors import RunError
from lpexp.precision import digest
from lpexp.rollout import RolloutSpec, Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from lpexp.cluster import Future, Handle, Workers
    from lpexp.experiment import Experiment
    from lpexp.precision import Parts
    from lpexp.precision.wire import Frozen


HEAL_ATTEMPTS = 3


class EmbeddedRolloutSpec(RolloutSpec):
    """`engines` workers of `slots` sequences each; neither changes a result."""

    arithmetic: ClassVar[str] = "lpexp"
    returns_experts: ClassVar[bool] = True
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

    def __init__(self, exp: Experiment, slots: int, threads: int, device: str, index: int = 0):
        from lpexp.model.decoder import Cache, Decoder, pick_device, settle
        from lpexp.model.tokenizer import load_tokenizer

        settle(threads)
        self.exp, self.slots, self.device = exp.fault.rollout(exp), slots, pick_device(device, -1 - index)
        self.promised = exp if exp.fault.hidden else self.exp
        self.model = exp.model.sized()
        self.stop_id = load_tokenizer(self.model).stop_id
        self.decoder = Decoder(self.model, self.device)
        self.cache = Cache(self.model, slots, exp.task.max_prompt + exp.task.max_response, self.device)
        self.weights: Any = None
        self.held: Mapping[str, Parts] | None = None
        self.version = -1

    def contract(self) -> dict[str, str]:
        """What this engine serves, from its own copy of the config, or from the directory that it will load."""
        from lpexp.model.served import precision_of

        directory = self.exp.rollout.checkpoint
        return self.promised.contract(None if directory is None else precision_of(directory, self.model))

    def load(self, shards: dict[str, dict[str, Frozen]] | str, version: int) -> tuple[str, float]:
        """Serve these parts, or those of a directory, from now on; the checksum of what is held, and seconds."""
        from lpexp.model.decoder import ServedWeights
        from lpexp.precision.wire import checksum, thaw

        start = time.perf_counter()
        if isinstance(shards, str):
            given = {name: self._placed(parts) for name, parts in stored_parts(shards).items()}
        else:
            given = {name: thaw(tensors, self.device) for name, tensors in shards.items()}
        self.held = self.exp.fault.held(self.exp, given, self.held, version)
        self.weights = ServedWeights(self.model, self.exp.wire, self.held)
        self.version = version
        return checksum(given if self.exp.fault.hidden else self.held), time.perf_counter() - start

    def _placed(self, parts: Parts) -> Parts:
        return {suffix: part.to(self.device) for suffix, part in parts.items()}

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, step: int) -> tuple[list[Group], float]:
        """`sampling.samples` answers to each prompt, in order; and the seconds that took."""
        import torch

        begin = time.perf_counter()
        with torch.inference_mode():
            return Generation(self, prompts, self.drawn(sampling), step).run(), time.perf_counter() - begin

    def drawn(self, asked: Sampling) -> Sampling:
        """How this engine samples when it is asked to sample so."""
        return asked.model_copy(update={"temperature": self.exp.fault.temperature(asked.temperature)})

    def record(self, path: str, sampling: Sampling) -> None:
        """Write what is held and how it is served."""
        from lpexp.checkpoint import save_parts

        assert self.held is not None
        facts = {"precision": self.exp.wire.dump(), "sampling": self.drawn(sampling).dump(), "version": self.version}
        save_parts(Path(path), self.held, {name: json.dumps(value) for name, value in facts.items()})


def stored_parts(directory: str) -> dict[str, Parts]:
    """What a served directory holds: {tensor: parts}, as its quantiser left them."""
    from lpexp.model import hf

    return hf.load(directory)[2]


@dataclass
class Live:
    """A sample being generated: prompt p's answer g. Row i of the batch is slot i of the cache."""

    p: int
    g: int
    length: int  # tokens in the cache
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    routes: list[np.ndarray] = field(default_factory=list)  # [tokens, moe layers, top_k] each


class Generation:
    """One call of `sample`: the samples that wait, the live ones, and those that are done."""

    def __init__(self, engine: EmbeddedEngine, prompts: Sequence[Prompt], sampling: Sampling, step: int):
        from lpexp.rollout.sampling import uniforms

        self.engine, self.prompts, self.sampling = engine, prompts, sampling
        self.longest = engine.exp.task.max_response
        p, g, place = np.indices((len(prompts), sampling.samples, self.longest)).reshape(3, -1)
        ids = np.array([prompt.id for prompt in prompts])[p]
        u = uniforms(engine.exp.seed, step, ids, g, place)  # of every token that may be drawn
        self.uniforms_PGT = u.reshape(len(prompts), sampling.samples, self.longest)
        self.waiting = [(p, g) for p in range(len(prompts)) for g in range(sampling.samples)][::-1]
        self.prefilled: dict[int, Prefilled] = {}
        self.live: list[Live] = []
        self.done: dict[tuple[int, int], Sample] = {}

    def run(self) -> list[Group]:
        import torch

        engine = self.engine
        logits = torch.empty(0, engine.model.vocab_size, device=engine.device)
        while self.waiting or self.live:
            if self.waiting and len(self.live) < engine.slots:
                logits = torch.cat([logits, self._admit()])
            drawn = self._draw(logits)
            order = self._end_finished(drawn.tolist())
            logits = self._decode(drawn[torch.tensor(order, dtype=torch.long, device=engine.device)])
        return [
            Group(prompt, tuple(self.done[p, g] for g in range(self.sampling.samples)))
            for p, prompt in enumerate(self.prompts)
        ]

    def _draw(self, logits: Tensor) -> Tensor:
        """The next token of every live sample, and its log-probability."""
        import torch

        from lpexp.model.decoder import token_logprobs
        from lpexp.rollout.sampling import draw

        how, live = self.sampling, self.live
        p, g, place = np.array([(one.p, one.g, len(one.tokens)) for one in live]).T
        u = self.uniforms_PGT[p, g, place]
        drawn = draw(logits, torch.from_numpy(u).to(logits.device), how.temperature, how.top_p, how.top_k)
        logprobs, _ = token_logprobs(logits, drawn, how.temperature)
        for one, token, logprob in zip(live, drawn.tolist(), logprobs.tolist(), strict=True):
            one.tokens.append(token)
            one.logprobs.append(logprob)
        return drawn

    def _end_finished(self, drawn: list[int]) -> list[int]:
        """Take finished samples out; the last live ones move into their slots. Returns the rows that stay, in order."""
        ended = [
            token == self.engine.stop_id or len(one.tokens) >= self.longest
            for one, token in zip(self.live, drawn, strict=True)
        ]
        for one, over in zip(self.live, ended, strict=True):
            if over:
                self.done[one.p, one.g] = self._sample(one)
        count = ended.count(False)
        holes = [i for i in range(count) if ended[i]]
        movers = [i for i in range(count, len(ended)) if not ended[i]]
        self.engine.cache.move(movers, holes)
        order = list(range(count))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        self.live = [self.live[i] for i in order]
        return order

    def _decode(self, tokens_B: Tensor) -> Tensor:
        """Logits [B, V] after these tokens."""
        import torch

        from lpexp.model.decoder import Routes

        engine, live = self.engine, self.live
        if not live:
            return torch.empty(0, engine.model.vocab_size, device=engine.device)
        routes = Routes() if engine.model.moe else None
        positions_B = torch.tensor([one.length for one in live], device=engine.device)
        hidden = engine.decoder.decode(engine.weights, tokens_B, positions_B, engine.cache, routes)
        for one in live:
            one.length += 1
        if routes:
            chosen = torch.stack(routes.chosen, 1).cpu().numpy().astype(np.int16)  # [B and padding, layers, K]
            for one, choice in zip(live, chosen, strict=False):
                one.routes.append(choice[None])
        return engine.decoder.head(engine.weights, hidden)

    def _admit(self) -> Tensor:
        """Give waiting samples the slots behind the live ones; the logits [B, V] that follow their prompts."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        engine = self.engine
        cache, free = engine.cache, engine.slots - len(self.live)
        taken = [self.waiting.pop() for _ in range(min(len(self.waiting), free))]
        asked = list(dict.fromkeys(p for p, _ in taken))
        self._prefill([p for p in asked if p not in self.prefilled])
        begin, made = len(self.live), [self.prefilled[p] for p, _ in taken]
        place = {p: i for i, p in enumerate(asked)}
        owner = torch.tensor([place[p] for p, _ in taken], device=engine.device)
        for layer in range(engine.model.num_hidden_layers):
            kept = ([self.prefilled[p].layers[layer][which] for p in asked] for which in (0, 1))
            cache.put(layer, begin, *(pad_sequence(rows, batch_first=True)[owner] for rows in kept))
        for (p, g), one in zip(taken, made, strict=True):
            self.live.append(Live(p, g, len(self.prompts[p].tokens), routes=list(one.routes)))
        needed = self.waiting[-1][0] if self.waiting else None  # samples are admitted prompt by prompt
        self.prefilled = {p: one for p, one in self.prefilled.items() if p == needed}
        return torch.stack([one.logits for one in made])

    def _prefill(self, fresh: list[int]) -> None:
        """Keys, values, routes and last logits of prompts: once for a whole group."""
        import torch

        from lpexp.model.decoder import Routes

        if not fresh:
            return
        engine = self.engine
        lengths = [len(self.prompts[p].tokens) for p in fresh]
        tokens = np.zeros((len(fresh), max(lengths)), np.int64)
        for row, p in enumerate(fresh):
            tokens[row, : lengths[row]] = self.prompts[p].tokens
        keep: list[tuple[Tensor, Tensor]] = []
        routes = Routes() if engine.model.moe else None
        tokens_PT = torch.from_numpy(tokens).to(engine.device)
        hidden = engine.decoder.hidden(engine.weights, tokens_PT, keep, routes)
        last = hidden[torch.arange(len(fresh)), torch.tensor(lengths) - 1]
        logits = engine.decoder.head(engine.weights, last)
        chosen = torch.stack(routes.chosen, 1).cpu().numpy().astype(np.int16) if routes else None  # [P T, layers, K]
        for row, p in enumerate(fresh):
            at = row * tokens.shape[1]
            seen = [] if chosen is None else [chosen[at : at + lengths[row]]]
            self.prefilled[p] = Prefilled([(k[row], v[row]) for k, v in keep], logits[row], seen)

    def _sample(self, one: Live) -> Sample:
        return Sample(
            prompt_id=self.prompts[one.p].id,
            index=one.g,
            tokens_T=np.array(one.tokens, np.int32),
            logprobs_T=np.array(one.logprobs, np.float32),
            version=self.engine.version,
            finish="stop" if one.tokens[-1] == self.engine.stop_id else "length",
            experts=np.concatenate(one.routes) if one.routes else None,
        )


class Prefilled(NamedTuple):
    """A prompt, computed."""

    layers: list[tuple[Tensor, Tensor]]  # k, v [T, heads, D]
    logits: Tensor  # [V], after its last token
    routes: list[np.ndarray]


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
            index,
            env=spec.environment(self.exp),
        )

    def contract(self) -> dict[str, str]:
        contracts = [future.result() for future in [engine.call("contract") for engine in self.engines]]
        for other in contracts[1:]:
            if other != contracts[0]:
                raise RunError(f"engines disagree on their contract: {digest(contracts[0])} and {digest(other)}")
        return contracts[0]

    def load(self, shards: Any, version: int) -> EmbeddedLoading:
        self.shards, self.version = shards, version
        return EmbeddedLoading(self, ("load", shards, version))

    def open(self, directory: str) -> SyncReport:
        """Every engine reads the directory by itself; what they hold is compared with what lies on disk."""
        from lpexp.precision.wire import checksum, quantized_share

        begin, model = time.perf_counter(), self.exp.model.sized()
        parts = stored_parts(directory)
        sent, size = checksum(parts), sum(part.nbytes for one in parts.values() for part in one.values())
        del parts
        held, seconds = self.load(directory, 0).result()
        share = quantized_share(model.params(), self.exp.wire, model.moe is not None)
        spent = seconds | {"sync": time.perf_counter() - begin}
        return SyncReport(0, size, spent, sent, tuple(held), share, {})

    def record(self, path: Path, sampling: Sampling) -> EmbeddedRecording:
        return EmbeddedRecording(self, ("record", str(path), sampling))

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


class EmbeddedLoading:
    """Engines taking new weights; what they are asked next, they do with these."""

    def __init__(self, rollout: EmbeddedRollout, call: tuple[Any, ...]):
        self.rollout, self.call = rollout, call
        self.futures = [(engine, engine.call(*call)) for engine in rollout.engines]

    def result(self) -> tuple[list[str], dict[str, float]]:
        held = [self.rollout.owed(i, engine, future, self.call) for i, (engine, future) in enumerate(self.futures)]
        return [checksum for checksum, _ in held], {"load": max(seconds for _, seconds in held)}


class EmbeddedRecording:
    """An engine writing down what it holds; all engines hold the same."""

    def __init__(self, rollout: EmbeddedRollout, call: tuple[Any, ...]):
        self.rollout, self.call, self.engine = rollout, call, rollout.engines[0]
        self.served, self.future = (rollout.shards, rollout.version), self.engine.call(*call)

    def result(self) -> None:
        self.rollout.owed(0, self.engine, self.future, self.call, self.served)


class EmbeddedPending:
    """Groups being generated: engine i has prompts i, i + n, i + 2n, ..."""

    def __init__(self, rollout: EmbeddedRollout, prompts: Sequence[Prompt], sampling: Sampling, step: int):
        self.rollout, self.count = rollout, len(prompts)
        n = len(rollout.engines)
        self.calls = [("sample", list(prompts[i::n]), sampling, step) for i in range(n)]
        self.served, self.seconds = (rollout.shards, rollout.version), 0.0
        self.engines = list(rollout.engines)
        self.futures = [engine.call(*call) for engine, call in zip(self.engines, self.calls, strict=True)]

    def result(self) -> list[Group]:
        groups: list[Any] = [None] * self.count
        n = len(self.futures)
        for index, (engine, future, call) in enumerate(zip(self.engines, self.futures, self.calls, strict=True)):
            groups[index::n], seconds = self.rollout.owed(index, engine, future, call, self.served)
            self.seconds = max(self.seconds, seconds)
        return groups


def reason(future: Future) -> str:
    """The first line of what a dead worker left."""
    return next((line.strip() for line in str(future.error()).splitlines() if line.strip()), "no reason given")
