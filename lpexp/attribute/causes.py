"""The factors in which two sides of a stored step differ, and how much of the gap each one makes.

A factor is active where the sides' own data differ: the bytes of their tensors, how their products read inputs, whose
weights an engine held, experts, temperature, the result of decoding against scoring. The worth of a set of switched
factors is k3 of the batch scored with these as the trainer has them and all others as the rollout has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lpexp.attribute.rescore import ROLLOUT, TRAINER, Rescorer, Setting, pure
from lpexp.attribute.shares import Share, shapley
from lpexp.metric.mismatch import k3
from lpexp.model.decoder import is_product
from lpexp.precision.compare import FORMAT, Difference, difference, inputs_differ

WEIGHTS, INPUTS, CACHE, HEAD = "weight_quant", "activation_quant", "kv_quant", "head"
ORDER, ROUTING, SAMPLING, STALENESS = "batching", "routing", "sampling_convention", "staleness"
WORDS = {
    WEIGHTS: "weight quantisation",
    INPUTS: "activation quantisation",
    CACHE: "key/value cache precision",
    HEAD: "head precision",
    ORDER: "order of sums",
    ROUTING: "expert routing",
    SAMPLING: "sampling convention",
    STALENESS: "staleness",
}


class Factor(NamedTuple):
    """One thing to switch. `cause` tells apart what is done to different tensors for different reasons."""

    name: str
    cause: str = ""
    told: str = ""
    tensors: tuple[str, ...] = ()


@dataclass
class Attribution:
    """What `attribute` found of one step. All values in nat."""

    whole: float  # k3 of the recorded log-probabilities
    factors: list[Factor]
    shares: list[Share[int]]  # by index into `factors`
    alone: list[float]  # the gap that each factor makes with everything else as the rollout has it
    inactive: dict[str, str]  # factor -> why it cannot matter here
    unexplained: float
    passes: int

    @property
    def rounds(self) -> bool:
        """Do the sides quantise differently?"""
        return any(factor.name in (WEIGHTS, INPUTS) for factor in self.factors)

    @property
    def causes(self) -> list[tuple[str, str, float]]:
        """(cause, in words, its shares together), largest first: what to mend."""
        found: dict[str, tuple[str, float]] = {}
        for factor, share in zip(self.factors, self.shares, strict=True):
            key = factor.cause if factor.cause not in ("", FORMAT) else WORDS[factor.name]
            told, value = found.get(key, (factor.told, 0.0))
            found[key] = (told, value + share.value)
        return sorted(((key, told, value) for key, (told, value) in found.items()), key=lambda one: -one[2])


def attribute(scorer: Rescorer, seed: int = 0) -> Attribution:
    """Split the gap of a stored step over its factors."""
    factors, inactive = active(scorer)
    mask = scorer.batch.mask_NT
    lp_R = scorer.batch.logprobs_rollout_NT[mask].astype(np.float64)
    target = scorer.stored.target[: len(mask)][mask].astype(np.float64)

    def worth(switched: frozenset[int]) -> float:
        lp = scorer.score(setting(scorer, [factors[i] for i in sorted(switched)]))
        return float(k3(lp.astype(np.float64) - lp_R).mean())

    shares = shapley(range(len(factors)), worth, seed)
    none, everything = frozenset[int](), frozenset(range(len(factors)))
    whole = float(k3(target - lp_R).mean())
    alone = [worth(frozenset([i])) - worth(none) for i in range(len(factors))]
    unexplained = whole - (worth(everything) - worth(none))
    return Attribution(whole, factors, shares, alone, inactive, unexplained, scorer.passes)


def setting(scorer: Rescorer, switched: Sequence[Factor]) -> Setting:
    """These factors as the trainer has them, the others as the rollout has them."""
    names = {factor.name for factor in switched}

    def who(name: str) -> str:
        return TRAINER if name in names else ROLLOUT

    # Where an engine's 16-bit weights are not known, its codes come and go with them.
    quant = dict.fromkeys(scorer.names, ROLLOUT if scorer.stored.knows else who(STALENESS))
    inputs = dict.fromkeys(scorer.names, ROLLOUT)
    for factor in switched:
        if factor.name in (WEIGHTS, INPUTS):
            (quant if factor.name == WEIGHTS else inputs).update(dict.fromkeys(factor.tensors, TRAINER))
    carries = any(factor.name == INPUTS and factor.cause == FORMAT for factor in switched)
    return Setting(
        version=who(STALENESS), quant=quant, inputs=inputs, carrier=TRAINER if carries else ROLLOUT, cache=who(CACHE),
        head=who(HEAD), routing=who(ROUTING), sampling=who(SAMPLING), order=who(ORDER) if scorer.decodes else TRAINER,
    )  # fmt: skip


def active(scorer: Rescorer) -> tuple[list[Factor], dict[str, str]]:
    """What differs between the sides; and why the rest cannot matter."""
    stored, (trainer, rollout) = scorer.stored, (scorer.precision(TRAINER), scorer.precision(ROLLOUT))
    found: list[Factor] = []
    weights, inputs = {}, {}
    for name, param in scorer.params.items():
        weight = stored.weights[ROLLOUT][name]
        if (
            param.kind != "head"
            and stored.knows
            and (one := difference(param, weight, trainer, rollout, stored.held[name], scorer.moe))
        ):
            weights[name] = one
        if is_product(param) and (one := inputs_differ(param, trainer, rollout, scorer.moe)):
            inputs[name] = one
    found += _grouped(WEIGHTS, weights) + _grouped(INPUTS, inputs)
    absent: dict[str, str] = {}
    if not weights:
        absent[WEIGHTS] = "both sides hold the same bytes" if stored.knows else "the engine's own weights are not known"
    if not inputs:
        absent[INPUTS] = "both sides read inputs alike"
    carried = trainer.plain.carries, rollout.plain.carries
    for name in (CACHE, HEAD):
        if carried[0] != carried[1]:
            found.append(Factor(name, "", f"{carried[0]} in the trainer, {carried[1]} in the rollout"))
        else:
            absent[name] = f"{carried[0]} on both sides" if name == CACHE else "float32 sums on both sides"
    if stored.weights[TRAINER] is not stored.weights[ROLLOUT]:
        lag = f"the trainer is at version {stored.step}, the samples are of version {stored.step - 1} (lag 1)"
        found.append(Factor(STALENESS, "stale weights" if stored.version else "", stored.version or lag))
    else:
        absent[STALENESS] = "the engine held the trainer's version"
    if scorer.routes is None:
        absent[ROUTING] = "a dense model"
    elif np.array_equal(scorer.routes[TRAINER], scorer.routes[ROLLOUT]):
        replayed = getattr(scorer.exp.trainer, "routing_replay", False)
        absent[ROUTING] = "the trainer replays the rollout's" if replayed else "both sides choose the same experts"
    else:
        differ = (np.sort(scorer.routes[TRAINER], -1) != np.sort(scorer.routes[ROLLOUT], -1)).any(-1)
        found.append(Factor(ROUTING, "", f"{differ.sum()} choices of experts differ"))
    asked, drew = (scorer.temperatures[who] for who in (TRAINER, ROLLOUT))
    if asked != drew:
        told = f"temperature {drew:g} in the rollout, {asked:g} in the trainer"
        found.append(Factor(SAMPLING, "sampling convention", told))
    else:
        absent[SAMPLING] = f"temperature {asked:g} on both sides"
    return _order(scorer, found, absent), absent


def _grouped(name: str, differences: dict[str, Difference]) -> list[Factor]:
    """One factor a cause, in the order of the model."""
    causes: dict[str, list[str]] = {}
    for tensor, one in differences.items():
        causes.setdefault(one.cause, []).append(tensor)
    return [Factor(name, cause, _told(differences, tensors), tuple(tensors)) for cause, tensors in causes.items()]


def _told(differences: dict[str, Difference], tensors: list[str]) -> str:
    told = list(dict.fromkeys(differences[name].told for name in tensors))
    where = tensors[0] if len(tensors) == 1 else f"{len(tensors)} tensors"
    return f"{told[0]}{f' and {len(told) - 1} more' if len(told) > 1 else ''} ({where})"


def _order(scorer: Rescorer, found: list[Factor], absent: dict[str, str]) -> list[Factor]:
    """Does decoding token by token differ from scoring whole sequences? Tried with everything as the rollout has it."""
    rollout = pure(ROLLOUT, scorer.names)
    if np.array_equal(scorer.score(rollout), scorer.score(rollout._replace(order=TRAINER))):
        absent[ORDER] = "decoding token by token and scoring whole sequences give the same bits"
        return found
    scorer.decodes = True
    return [*found, Factor(ORDER, "", "decoding token by token is not scoring whole sequences")]
