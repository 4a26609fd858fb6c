"""What the ranks of a test do: make a trainer of one layout, learn from made-up batches, answer what was found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from lpexp import frontend
from lpexp.data import Batch
from lpexp.experiment import Experiment

SMALL = ("cluster=local", "task.prompts_per_step=4", "algorithm.samples_per_prompt=4", "task.warmup=null")
PLAIN = ("trainer.weight_decay=0", "trainer.betas=[0.9,0.95]", "trainer.lr=1e-3")  # as the embedded trainer's default


def experiment(*words: str) -> Experiment:
    return frontend.experiment("trainer=megatron", *SMALL, *PLAIN, *words)


def embedded(*words: str) -> Experiment:
    return frontend.experiment("cluster=inline", *SMALL[1:], "trainer.lr=1e-3", *words)


def batch(exp: Experiment, seed: int = 0, version: int = 0) -> Batch:
    """Prompts of several lengths, answers of several lengths, advantages of both signs."""
    rng = np.random.default_rng(seed)
    prompts, samples = exp.task.prompts_per_step, exp.algorithm.samples_per_prompt
    count = prompts * samples
    before = np.repeat(rng.integers(3, 9, prompts), samples)
    after = rng.integers(1, 8, count)
    lengths = before + after
    width = int(lengths.max())
    tokens = rng.integers(1, exp.model.sized().vocab_size, (count, width))
    for row in range(count):
        first = row - row % samples
        tokens[row, : before[row]] = tokens[first, : before[row]]
        tokens[row, lengths[row] :] = 0
    place = np.arange(width)
    mask = (place >= before[:, None]) & (place < lengths[:, None])
    return Batch(
        step=seed,
        tokens_NT=tokens.astype(np.int32),
        mask_NT=mask,
        logprobs_rollout_NT=np.where(mask, -4.0 + 0.1 * rng.standard_normal(mask.shape), 0.0).astype(np.float32),
        advantages_N=rng.standard_normal(count).astype(np.float32),
        rewards_N=rng.random(count),
        lengths_N=lengths.astype(np.int32),
        prompt_lengths_N=before.astype(np.int32),
        versions_N=np.full(count, version, np.int32),
        prompt_ids_N=np.repeat(np.arange(prompts), samples).astype(np.int64),
        sample_index_N=np.tile(np.arange(samples), prompts).astype(np.int32),
        group_size=samples,
    )


@contextlib.contextmanager
def rank_of(exp: Experiment, rank: int, ranks: int, meet: str) -> Iterator[Any]:
    """A rank at version 0, its weights a random start whose norms and biases are not 1 and 0."""
    from lpexp.trainer.megatron.rank import MegatronRank

    made = MegatronRank(exp, rank, ranks, meet)
    try:
        made.load(start(exp).items())
        made.reference = made._rounded() if exp.uses_reference else None
        yield made
    finally:
        made.shutdown()


def start(exp: Experiment, seed: int = 7) -> dict[str, torch.Tensor]:
    """Weights that no symmetry hides a mistake in."""
    from tests.model.small import weights

    return weights(exp.model.sized(), seed)


def learned(rank: int, ranks: int, meet: str, words: tuple[str, ...], steps: int = 1) -> dict[str, Any]:
    """What each step found, in words that need no library, and the weights after them (on the first rank)."""
    exp = experiment(*words)
    with rank_of(exp, rank, ranks, meet) as made:
        found = [made.step(batch(exp, seed, seed)) for seed in range(steps)]
        weights = {name: tensor.numpy() for name, tensor in made.exported().items()}
    return {"steps": found, "weights": weights}


def learned_embedded(words: tuple[str, ...], steps: int = 1) -> dict[str, Any]:
    from lpexp.trainer.embedded import EmbeddedRank

    exp = embedded(*words)
    made = EmbeddedRank(exp, 0, 1, None)
    made.start(start(exp))
    if exp.uses_reference:
        made._refer(made.model_weights())
    found = [made.step(batch(exp, seed, seed)) for seed in range(steps)]
    return {"steps": found, "weights": {name: tensor.numpy() for name, tensor in made.model_weights().items()}}


def whole(answers: list[dict[str, Any]], step: int = 0) -> dict[str, Any]:
    """One step of all ranks: arrays by name, the loss, the gradient norm."""
    arrays: dict[str, np.ndarray] = {}
    loss = 0.0
    for answer in answers:
        found = answer["steps"][step]
        loss += found["sums"].get("loss", 0.0)
        for first, last, named in found["found"]:
            for name, rows in named.items():
                arrays.setdefault(name, np.zeros((99, rows.shape[1]), np.float32))[first:last] = rows
    return {"loss": loss, "grad_norm": answers[0]["steps"][step]["grad_norm"], **arrays}
