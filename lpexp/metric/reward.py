"""reward/*, response/* and eval/* of scored groups. Formulas: the dictionary in lpexp/metric/__init__.py."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lpexp.data import Group, Metrics, Sample
from lpexp.errors import RunError
from lpexp.metric.mismatch import plain

ZERO_STD = 1e-8
NGRAM = 4  # tokens
REPEATED = 0.3  # share of n-grams that occurred before


def reward_metrics(groups: Sequence[Group]) -> Metrics:
    """reward/* over the finished samples of scored groups; RunError when no sample finished."""
    finished = [(group, np.array([sample.finish != "abort" for sample in group.samples])) for group in groups]
    finished = [(group, done) for group, done in finished if done.any()]
    if not finished:
        raise RunError("reward: no sample of the step finished")
    rewards = [_rewards(group)[done] for group, done in finished]
    everything = np.concatenate(rewards)
    stds = np.array([one.std() for one in rewards])
    found: Metrics = {
        "mean": everything.mean(),
        "std": everything.std(),
        "min": everything.min(),
        "max": everything.max(),
        "group_std_mean": stds.mean(),
        "zero_std_group_frac": (stds < ZERO_STD).mean(),
        "all_correct_group_frac": np.mean([group.parts["correct"][done].all() for group, done in finished]),
        "all_wrong_group_frac": np.mean([(one <= 0).all() for one in rewards]),
        "errors": sum(group.errors for group in groups),
    }
    for name in sorted({name for group, _ in finished for name in group.parts}):
        if name in found:
            raise RunError(f"reward: a part is named {name!r}, which is a key of the dictionary; rename it")
        parts = [group.parts[name][done] for group, done in finished if name in group.parts]
        found[name] = np.concatenate(parts).mean()
    return {f"reward/{key}": plain(value) for key, value in found.items()}


def response_metrics(groups: Sequence[Group]) -> Metrics:
    """response/* over all samples of the groups; lengths in tokens, the stop token included."""
    samples = [sample for group in groups for sample in group.samples]
    if not samples:
        raise RunError("response: the step has no sample")
    lengths = np.array([len(sample.tokens_T) for sample in samples])
    found = {
        "length_mean": lengths.mean(),
        "length_p50": np.quantile(lengths, 0.5),
        "length_p95": np.quantile(lengths, 0.95),
        "length_max": lengths.max(),
        "truncated_frac": np.mean([sample.finish == "length" for sample in samples]),
        "aborted_frac": np.mean([sample.finish == "abort" for sample in samples]),
        "empty_frac": (lengths == 0).mean(),
        "repetition_frac": np.mean([_repetition(sample) > REPEATED for sample in samples]),
    }
    return {f"response/{key}": plain(value) for key, value in found.items()}


def eval_metrics(name: str, greedy: Sequence[Group], sampled: Sequence[Group]) -> Metrics:
    """eval/<name>/*: `greedy` holds one answer a prompt at temperature 0, `sampled` n answers a prompt; k = n."""
    correct = [group.parts["correct"] for group in sampled]
    if not correct or not greedy:
        raise RunError(f"eval/{name}: no held-out prompt was answered")
    return {
        f"eval/{name}/greedy_acc": float(np.concatenate([group.parts["correct"] for group in greedy]).mean()),
        f"eval/{name}/sampled_acc": float(np.concatenate(correct).mean()),
        f"eval/{name}/pass_at_k": float(np.mean([pass_at_k(len(one), int(one.sum()), len(one)) for one in correct])),
        f"eval/{name}/mean_reward": float(np.concatenate([_rewards(group) for group in sampled]).mean()),
    }


def eval_answers(greedy: Sequence[Group], sampled: Sequence[Group]) -> dict[str, Any]:
    """What an evaluation's scores are made of: `prompts` names the set of prompts (16 hex digits), and of each prompt
    how many of its `answers` sampled ones were right, and whether the greedy one was."""
    texts = "\0".join(group.prompt.text for group in sampled)
    return {
        "prompts": hashlib.sha256(texts.encode()).hexdigest()[:16],
        "answers": len(sampled[0].samples),
        "correct": [int(group.parts["correct"].sum()) for group in sampled],
        "greedy": [int(group.parts["correct"].sum()) for group in greedy],
    }


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k answers is right when c of n were: 1 - C(n-c, k) / C(n, k); 1 <= k <= n.

    Source: arXiv 2107.03374, eq. 1.
    """
    assert 1 <= k <= n and 0 <= c <= n
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _rewards(group: Group) -> np.ndarray:
    assert group.rewards_G is not None, "the group has not been scored"
    return group.rewards_G


def _repetition(sample: Sample) -> float:
    """Share of the response's n-grams that occurred in it before; 0 when it is shorter than one."""
    if len(sample.tokens_T) <= NGRAM:
        return 0.0
    tokens = sample.tokens_T.tolist()
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return (len(grams) - len(set(grams))) / len(grams)
