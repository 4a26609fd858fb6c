"""A stored batch scored again, each factor as the trainer or as the rollout has it.

`Setting` says whose values are used: which version of the weights, which quantiser for each tensor, how products read
their inputs, the head, the key/value cache, the experts, the temperature, and whether sequences are scored whole or
token by token as an engine decodes them. With everything as one side has it the pass is that side's own, bit for bit;
mixtures multiply the one side's weight values with the other side's reading of the inputs in float32.

Left out: backends that compute otherwise than the embedded ones; what they add shows as `unexplained`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpexp import checkpoint, record
from lpexp.data import Batch, Prompt
from lpexp.experiment import Experiment
from lpexp.model.decoder import Cache, Decoder, Routes, Weights, is_product, settle, token_logprobs
from lpexp.model.ops import Rotation
from lpexp.model.tokenizer import load_tokenizer
from lpexp.precision import Parts, Precision, numeric, side
from lpexp.precision.compare import reading, same
from lpexp.rollout import Sampling
from lpexp.rollout.embedded import Generation, Live
from lpexp.trainer.embedded import Shared

LOGITS = 1 << 26  # that are held at a time
TRAINER, ROLLOUT = "trainer", "rollout"


@dataclass
class Stored:
    """A step as both sides kept it."""

    exp: Experiment
    step: int
    batch: Batch
    found: dict[str, np.ndarray]  # lp_T, lp_P, ...
    weights: dict[str, dict[str, Tensor]]  # TRAINER and ROLLOUT: the 16-bit weights behind each side's, as float32
    held: dict[str, Parts]  # what the engine served
    rollout: Precision  # in which it served
    sampling: Sampling
    version: str  # whose weights the engine held, in words; "" where they are those that it said
    knows: bool  # are the engine's 16-bit weights known?

    @property
    def target(self) -> np.ndarray:
        """The trainer's log-probabilities that the whole gap is measured from: under its newest weights."""
        return self.found["lp_P"]


def load(run: Path, exp: Experiment, step: int) -> Stored:
    """The batch of a step with both sides' weights; which version an engine held is found by comparing tensors."""
    at = record.beside(run, step)
    batch, found = record.load(run / record.FOLDER / f"{step:06d}.safetensors")
    said, facts = _plain(at / record.TRAINER, exp)
    newest = _plain(at / record.NEWEST, exp)[0] if (at / record.NEWEST).exists() else said
    held, told = checkpoint.load_parts(at / record.ROLLOUT)
    rollout = Precision.model_validate(json.loads(told["precision"]))
    sampling = Sampling.model_validate(json.loads(told["sampling"]))
    behind, version, knows = said, "", True
    if not _behind(held, said, exp, rollout):
        candidates = [(newest, f"version {step}, the newest")] if newest is not said else []
        for other in reversed(record.steps(run)[1]):
            weights, theirs = _plain(record.beside(run, other) / record.TRAINER, exp)
            candidates.append((weights, f"version {theirs['version']}"))
        right = [(weights, name) for weights, name in candidates if _behind(held, weights, exp, rollout)]
        where = f"the engine was to hold version {facts['version']} and holds "
        if right:
            behind, version = right[0][0], where + right[0][1]
        else:
            knows, version = False, where + "other weights (of no version that is stored)"
            params, moe = exp.model.sized().params(), exp.model.sized().moe is not None
            behind = {param.name: side(param, rollout, moe).dequantize(held[param.name]) for param in params}
    weights = {TRAINER: newest, ROLLOUT: behind}
    return Stored(exp, step, batch, found, weights, held, rollout, sampling, version, knows)


def _plain(path: Path, exp: Experiment) -> tuple[dict[str, Tensor], dict[str, str]]:
    """16-bit weights as float32 values."""
    parts, facts = checkpoint.load_parts(path)
    model, plain = exp.model.sized(), exp.precision.plain
    sides = {param.name: side(param, plain, model.moe is not None) for param in model.params()}
    return {name: sides[name].dequantize(one) for name, one in parts.items()}, facts


def _behind(held: Mapping[str, Parts], weights: Mapping[str, Tensor], exp: Experiment, rollout: Precision) -> bool:
    """Are these the weights of what the engine held? Told by the tensors that no quantiser touches."""
    model = exp.model.sized()
    plain = [param for param in model.params() if not rollout.covers(param, model.moe is not None)]
    return all(
        same(side(param, rollout, model.moe is not None).quantize(weights[param.name]), held[param.name])
        for param in plain
    )


# -- whose values are used ---------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """Whose values a pass uses: TRAINER or ROLLOUT each. `plain` tensors are unquantised on the side they come from."""

    version: str
    quant: Mapping[str, str]  # by tensor
    inputs: Mapping[str, str]  # by tensor
    carrier: str  # how values between modules are rounded
    cache: str  # how keys and values are rounded in the cache
    head: str
    routing: str
    sampling: str
    order: str
    plain: frozenset[str] = frozenset()


def pure(who: str, names: Sequence[str], plain: frozenset[str] = frozenset()) -> Setting:
    """Everything as one side has it."""
    mine = dict.fromkeys(names, who)
    return Setting(who, mine, mine, who, who, who, who, who, who, plain)


class Made:
    """One tensor ready to use: `operand` is what `serve` reads, `values` what it stands for."""

    def __init__(self, side: Precision, parts: Parts, product: bool):
        self.side, self._parts = side, parts
        self.operand: Any = side.operand(parts) if product else None

    @functools.cached_property
    def values(self) -> Tensor:
        return self.operand if isinstance(self.operand, Tensor) else self.side.dequantize(self._parts)


class Mixed(Weights):
    """The tensors of a setting."""

    def __init__(self, scorer: Rescorer, setting: Setting):
        self.scorer, self.setting = scorer, setting
        self._fits: dict[str, bool] = {}
        super().__init__(scorer.model, scorer.precision(setting.carrier).plain)
        self.head_name = "model.embed_tokens.weight" if scorer.model.tie_word_embeddings else "lm_head.weight"

    def tensor(self, name: str) -> Tensor:
        return self._made(name).values

    def _made(self, name: str) -> Made:
        setting = self.setting
        return self.scorer.made(name, setting.quant[name], setting.version, name in setting.plain)

    def _reader(self, name: str) -> Precision:
        who = self.scorer.side(name, self.setting.inputs[name])
        return who.plain if name in self.setting.plain else who

    def _own(self, name: str) -> bool:
        """Do inputs and carrier fit the weight, so that its own product is the one to use?"""
        if name not in self._fits:
            made = self._made(name)
            alike = reading(self._reader(name)) == reading(made.side)
            self._fits[name] = alike and made.side.plain.carries == self.plain.carries
        return self._fits[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        made = self._made(name)
        if self._own(name):
            return made.side.serve(x, made.operand)
        x2 = self._reader(name).read(x).reshape(-1, x.shape[-1])
        return self.round(numeric.matmul_rows(x2, made.values).reshape(*x.shape[:-1], -1))  # [R, K] @ [K, N]

    def _joined(self, names: tuple[str, ...]) -> Callable[[Tensor], Tensor] | None:
        made = [self._made(name) for name in names]
        covered = {self.scorer.quantised(one.side) for one in made}
        if len(covered) > 1 or any(one.side != made[0].side for one in made) or not all(map(self._own, names)):
            return None
        if names not in self._together:
            self._together[names] = made[0].side.join([one.operand for one in made])
        operand = self._together[names]
        return None if operand is None else lambda x: made[0].side.serve(x, operand)

    def accumulate(self, x: Tensor, name: str) -> Tensor:
        if name != self.head_name:
            return super().accumulate(x, name)
        plain = self.scorer.precision(self.setting.head).plain
        made = self.scorer.made(name, self.setting.head, self.setting.version, False)
        return plain.accumulate(plain.round(x), made.values)


class Probe(Decoder):
    """The decoder, with the cache's rounding and the experts of a setting."""

    def __init__(self, scorer: Rescorer, setting: Setting):
        super().__init__(scorer.model)
        self.cached = scorer.precision(setting.cache).plain

    def _grouped(self, weights: Weights, x: Tensor, at: str, turn: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._grouped(weights, x, at, turn)
        return q, self.cached.round(k), self.cached.round(v)

    def _latent(self, weights: Weights, x: Tensor, at: str, turn: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._latent(weights, x, at, turn)
        return q, self.cached.round(k), self.cached.round(v)


# -- scoring -----------------------------------------------------------------------------------------------------------


class Rescorer:
    """Scores one stored batch again and again; tensors and scores that were made are kept."""

    def __init__(self, stored: Stored):
        settle(stored.exp.cluster.threads)
        self.stored, self.exp, self.model = stored, stored.exp, stored.exp.model.sized()
        self.batch, self.decodes = stored.batch, False
        self.moe = self.model.moe is not None
        self.params = {param.name: param for param in self.model.params()}
        self.names = list(self.params)
        self.precisions = {TRAINER: self.exp.precision, ROLLOUT: stored.rollout}
        self.temperatures = {TRAINER: self.exp.rollout.temperature, ROLLOUT: stored.sampling.temperature}
        self._made: dict[tuple[Any, ...], Made] = {}
        self._scores: dict[Any, tuple[np.ndarray, np.ndarray]] = {}
        self.routes = self._routes() if self.batch.experts is not None else None
        self.passes = 0

    def precision(self, who: str) -> Precision:
        return self.precisions[who]

    def side(self, name: str, who: str) -> Precision:
        return side(self.params[name], self.precisions[who], self.moe)

    def quantised(self, precision: Precision) -> bool:
        return precision is not precision.plain

    def made(self, name: str, quant: str, version: str, plain: bool) -> Made:
        """A tensor of a version as a side quantises it, or as the engine held it."""
        stored = self.stored
        one_version = stored.weights[TRAINER] is stored.weights[ROLLOUT]
        version = ROLLOUT if one_version else version
        key = (name, quant, version, plain)
        if key not in self._made:
            precision = self.side(name, quant)
            if plain:
                precision = precision.plain
                parts = precision.quantize(stored.weights[version][name])
            elif quant == ROLLOUT and version == ROLLOUT:
                parts = stored.held[name]
            else:
                parts = precision.quantize(stored.weights[version][name])
            self._made[key] = Made(precision, parts, is_product(self.params[name]))
        return self._made[key]

    def score(self, setting: Setting) -> np.ndarray:
        """Log-probabilities float32 [tokens] of the batch's response tokens, row by row."""
        return self.scored(setting)[0]

    def scored(self, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities and entropies [tokens]."""
        key = (setting._replace(quant=(), inputs=()), tuple(setting.quant.items()), tuple(setting.inputs.items()))
        if key not in self._scores:
            self.passes += 1
            with torch.inference_mode():
                self._scores[key] = self._decoded(setting) if setting.order == ROLLOUT else self._whole(setting)
        return self._scores[key]

    def _whole(self, setting: Setting, note: list[Tensor] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Sequences as a whole, in the trainer's micro-batches; `note` receives the experts that routers choose."""
        weights, decoder = Mixed(self, setting), Probe(self, setting)
        found = []
        for part, rows in self._parts():
            view = Shared(part)
            prompts, answers, owner, lengths, before, tokens = (torch.from_numpy(a) for a in view.arrays)
            routes = None
            if self.batch.experts is not None:
                given = None if note is not None else torch.from_numpy(view.experts(self._experts(setting)[rows]))
                routes = Routes(given)
            hidden = decoder.continued(weights, prompts, answers, owner, lengths, routes)
            if note is not None and routes is not None:
                note.append(torch.stack(routes.chosen, 1))
            logits = decoder.head(weights, hidden[before])
            found.append(token_logprobs(logits, tokens, self.temperatures[setting.sampling]))
        lp, entropy = (torch.cat(one).numpy() for one in zip(*found, strict=True))
        return lp, entropy

    def _parts(self) -> Iterator[tuple[Batch, slice]]:
        """The micro-batches, cut further where their logits would not fit."""
        size, micro = len(self.batch), getattr(self.exp.trainer, "micro_batches", 1)
        share = -(-size // (self.exp.algorithm.updates_per_batch * micro))
        for start in range(0, size, share):
            stop = min(start + share, size)
            tokens = int(self.batch.mask_NT[start:stop].sum())
            pieces = max(-(-tokens * self.model.vocab_size // LOGITS), 1)
            each = max((stop - start) // pieces, 1)
            for at in range(start, stop, each):
                rows = slice(at, min(at + each, stop))
                yield self.batch.rows(rows.start, rows.stop), rows

    # -- experts ---------------------------------------------------------------------------------------------------
    def _routes(self) -> dict[str, np.ndarray]:
        """Each side's choices [N, T - 1, layers, top_k]."""
        recorded = self.batch.experts
        assert recorded is not None
        if getattr(self.exp.trainer, "routing_replay", False):
            return {TRAINER: recorded, ROLLOUT: recorded}
        self.routes = {TRAINER: recorded, ROLLOUT: recorded}
        note: list[Tensor] = []
        with torch.inference_mode():
            self._whole(pure(TRAINER, self.names), note)
        own = recorded.copy()
        for (part, rows), chosen in zip(self._parts(), note, strict=True):
            mine = own[rows].reshape(-1, *own.shape[2:])  # a view: rows are consecutive
            places = Shared(part).experts(np.arange(len(mine)).reshape(len(part), -1, 1, 1))[:, 0, 0]
            mine[places[places >= 0]] = chosen.numpy()[: len(places)][places >= 0]
        return {TRAINER: own, ROLLOUT: recorded}

    def _experts(self, setting: Setting) -> np.ndarray:
        assert self.routes is not None
        return self.routes[setting.routing]

    # -- token by token ----------------------------------------------------------------------------------------------
    def _decoded(self, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
        """As the engines do it: the same prompts and slots on each, with the recorded tokens in place of drawn ones."""
        exp, batch = self.exp, self.batch
        engines = 1 if exp.cluster.kind == "inline" else getattr(exp.rollout, "engines", 1)
        firsts = range(0, len(batch), batch.group_size)
        lp, entropy = (np.zeros(batch.tokens_NT.shape, np.float32) for _ in range(2))
        for engine in range(engines):
            mine = list(firsts)[engine::engines]
            if mine:
                forced = Forced(self, setting, mine)
                forced.run()
                for row, values in forced.found.items():
                    lp[row][batch.mask_NT[row]], entropy[row][batch.mask_NT[row]] = zip(*values, strict=True)
        return lp[batch.mask_NT], entropy[batch.mask_NT]


class Forced(Generation):
    """A generation that is told which tokens to draw."""

    def __init__(self, scorer: Rescorer, setting: Setting, firsts: Sequence[int]):
        exp, batch, model = scorer.exp, scorer.batch, scorer.model
        self.scorer, self.setting, self.firsts = scorer, setting, firsts
        span, slots = exp.task.max_prompt + exp.task.max_response, getattr(exp.rollout, "slots", len(batch))
        engine: Any = SimpleNamespace(
            exp=exp, slots=slots, device=torch.device("cpu"), model=model, version=0,
            stop_id=load_tokenizer(model).stop_id, cache=Cache(model, slots, span),
            weights=Mixed(scorer, setting), decoder=ForcedProbe(scorer, setting),
        )  # fmt: skip
        self.probe: ForcedProbe = engine.decoder
        prompts = [
            Prompt(int(batch.prompt_ids_N[n]), tuple(batch.tokens_NT[n, : batch.prompt_lengths_N[n]].tolist()), "", "")
            for n in firsts
        ]
        sampling = Sampling(temperature=scorer.temperatures[setting.sampling], samples=batch.group_size)
        super().__init__(engine, prompts, sampling, batch.step)
        self.found: dict[int, list[tuple[float, float]]] = {}

    def row(self, one: Live) -> int:
        return self.firsts[one.p] + one.g

    def _draw(self, logits: Tensor) -> Tensor:
        batch = self.scorer.batch
        places = [(self.row(one), int(batch.prompt_lengths_N[self.row(one)]) + len(one.tokens)) for one in self.live]
        tokens = torch.tensor([int(batch.tokens_NT[place]) for place in places])
        logprobs, entropies = token_logprobs(logits, tokens, self.sampling.temperature)
        for one, token, *values in zip(self.live, tokens.tolist(), logprobs.tolist(), entropies.tolist(), strict=True):
            one.tokens.append(token)
            one.logprobs.append(values[0])
            self.found.setdefault(self.row(one), []).append((values[0], values[1]))
        return tokens

    def _decode(self, tokens_B: Tensor) -> Tensor:
        self._follow([(self.row(one), one.length) for one in self.live])
        return super()._decode(tokens_B)

    def _prefill(self, fresh: list[int]) -> None:
        lengths = [len(self.prompts[p].tokens) for p in fresh]
        self._follow([(self.firsts[p], t) for p in fresh for t in range(max(lengths))] if fresh else [])
        super()._prefill(fresh)

    def _follow(self, places: list[tuple[int, int]]) -> None:
        """The experts at (row, position) of the pass to come."""
        if self.scorer.batch.experts is not None and places:
            experts = self.scorer._experts(self.setting)
            rows, positions = np.array(places).T
            self.probe.given = torch.from_numpy(experts[rows, positions].astype(np.int64))


class ForcedProbe(Probe):
    """A probe whose next pass follows `given` experts."""

    given: Tensor | None = None

    def _experts(self, weights: Weights, x: Tensor, at: str, routes: Routes | None) -> Tensor:
        if routes is not None:
            routes.given = self.given
        return super()._experts(weights, x, at, routes)


def whole_batch(stored: Stored, rows: int) -> Stored:
    """The first rows, in whole groups."""
    size = max(rows // stored.batch.group_size, 1) * stored.batch.group_size
    found = {name: array[:size] for name, array in stored.found.items()}
    return dataclasses.replace(stored, batch=stored.batch.rows(0, size), found=found)
