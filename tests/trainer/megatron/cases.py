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


def learned_from_stale(rank: int, ranks: int, meet: str, words: tuple[str, ...]) -> dict[str, Any]:
    """The first batch twice: when it comes again, the weights that sampled it are one version old."""
    exp = experiment(*words)
    with rank_of(exp, rank, ranks, meet) as made:
        return {"steps": [made.step(batch(exp, 0, 0)) for _ in range(2)]}


def learned_embedded_in(rank: int, ranks: int, meet: str, words: tuple[str, ...], steps: int) -> dict[str, Any]:
    """What the embedded trainer finds, in a process of one thread."""
    torch.set_num_threads(1)
    return learned_embedded(words, steps)


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


def went_through(rank: int, ranks: int, meet: str, words: tuple[str, ...], source: str, out: str) -> None:
    """A Hugging Face directory through the ranks' shards into another directory."""
    from pathlib import Path

    from lpexp.model import hf
    from lpexp.trainer.megatron.rank import MegatronRank

    exp = experiment(*words)
    made = MegatronRank(exp, rank, ranks, meet)
    try:
        made.load(made._read(Path(source)))
        tensors = ((param.name, tensor) for param, tensor in made.gathered(made.tensors, made.params))
        if rank == 0:
            hf.save(out, exp.model.sized(), tensors, exp.precision.plain)
        else:
            list(tensors)
    finally:
        made.shutdown()


def shipped(rank: int, ranks: int, meet: str, words: tuple[str, ...], bucket_bytes: int) -> Any:
    """Buckets as they travel and their report, from the first rank; how many parameters each bucket has."""
    exp = experiment(*words)
    with rank_of(exp, rank, ranks, meet) as made:
        made._fill_buckets(bucket_bytes)
        buckets = [made.ship(0, bucket)[0] for bucket in range(made.count_buckets())]
        return buckets, made.shipped(0) if rank == 0 else None


def shipped_embedded(rank: int, ranks: int, meet: str, words: tuple[str, ...]) -> Any:
    from lpexp.trainer.embedded import EmbeddedRank

    torch.set_num_threads(1)
    exp = embedded(*words)
    made = EmbeddedRank(exp, 0, 1, None)
    made.start(start(exp))
    frozen, report = made.served(0)
    return frozen, report, made.prepare(0, True)


def effective(rank: int, ranks: int, meet: str, words: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """Of a rank's matrices: (checkpoint name, spans of its rows, columns, {part: bytes}, values that products read)."""
    exp = experiment(*words)
    with rank_of(exp, rank, ranks, meet) as made:
        found = []
        for name, pieces, parts in made.effective():
            raw = {suffix: t.contiguous().view(torch.uint8).numpy() for suffix, t in parts.items()}
            values = made.arithmetic.side(name).dequantize(parts).numpy()
            found.append((name, [piece.rows for piece in pieces], pieces[0].cols, raw, values))
        return found


def saved(
    rank: int, ranks: int, meet: str, words: tuple[str, ...], directory: str, steps: int, before: int
) -> dict[str, Any]:
    """Learn `before` steps, save, and go on to `steps`."""
    exp = experiment(*words)
    with rank_of(exp, rank, ranks, meet) as made:
        for seed in range(before):
            made.step(batch(exp, seed, seed))
        made.save(directory)
        held = {name: tensor.numpy() for name, tensor in made.exported().items()}
        found = [made.step(batch(exp, seed, seed)) for seed in range(before, steps)]
        return {"steps": found, "saved": held, "masters": masters(made)}


def resumed(
    rank: int, ranks: int, meet: str, words: tuple[str, ...], directory: str, steps: int, before: int, fresh: bool
) -> dict[str, Any]:
    """Restore and go on to `steps`; not fresh: from other weights and moments than those that were saved."""
    exp = experiment(*words)
    with rank_of(exp, rank, ranks, meet) as made:
        if fresh:
            assert made.version == 0
        else:
            made.step(batch(exp, 77))
        assert made.restore(directory) == before
        found = [made.step(batch(exp, seed, seed)) for seed in range(before, steps)]
        return {"steps": found, "masters": masters(made)}


def masters(made: Any) -> dict[str, np.ndarray]:
    return {name: tensor.detach().clone().numpy() for name, tensor in made.tensors.items()}


def scored_in_pieces(rank: int, ranks: int, meet: str, words: tuple[str, ...], logits_bytes: int) -> Any:
    """One step with so many bytes of logits at a time: what was found, and the largest logits that a rank held."""
    from lpexp.trainer.megatron import network

    exp, whole = experiment(*words), network.LOGITS_BYTES
    network.LOGITS_BYTES = logits_bytes
    try:
        with rank_of(exp, rank, ranks, meet) as made:
            sizes, given = [], made.arithmetic.accumulate

            def accumulate(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
                y = given(x, weight)
                sizes.append(y.numel())
                return y

            made.arithmetic.accumulate = accumulate
            return {"steps": [made.step(batch(exp))]}, max(sizes)
    finally:
        network.LOGITS_BYTES = whole
