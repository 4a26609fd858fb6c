"""A LearnReport small enough to compute by hand, and a random one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lpexp.data import Batch, Group, LearnReport, Prompt, Sample


def make_report(
    lp_R: np.ndarray,
    lp_T: np.ndarray,
    mask: np.ndarray,
    *,
    lp_P: np.ndarray | None = None,
    lp_C: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    entropy: np.ndarray | None = None,
    advantages: Any = None,
    rewards: Any = None,
    versions: Any = None,
    version: int = 3,
    lp_ref: np.ndarray | None = None,
    scalars: dict[str, float] | None = None,
) -> LearnReport:
    """float32 arrays [N, T]; what is not given is as in a step without lag, correction or earlier updates."""
    n = len(mask)
    first = mask.argmax(axis=1)
    batch = Batch(
        step=0,
        tokens_NT=np.arange(mask.size, dtype=np.int32).reshape(mask.shape),
        mask_NT=mask,
        logprobs_rollout_NT=lp_R.astype(np.float32),
        advantages_N=np.asarray(np.zeros(n) if advantages is None else advantages, np.float32),
        rewards_N=np.asarray(np.zeros(n) if rewards is None else rewards, np.float64),
        lengths_N=(first + mask.sum(axis=1)).astype(np.int32),
        prompt_lengths_N=first.astype(np.int32),
        versions_N=np.asarray([version] * n if versions is None else versions, np.int32),
        prompt_ids_N=np.arange(n, dtype=np.int64),
        sample_index_N=np.zeros(n, np.int32),
        group_size=1,
    )
    lp_T = lp_T.astype(np.float32)
    lp_P = lp_T if lp_P is None else lp_P.astype(np.float32)
    return LearnReport(
        batch=batch,
        lp_T=lp_T,
        lp_P=lp_P,
        lp_C=lp_P if lp_C is None else lp_C.astype(np.float32),
        entropy=np.ones(mask.shape, np.float32) if entropy is None else entropy.astype(np.float32),
        weights=mask.astype(np.float32) if weights is None else weights.astype(np.float32),
        more={} if lp_ref is None else {"lp_ref": lp_ref.astype(np.float32)},
        version=version,
        scalars=scalars or {},
        seconds={},
        recompute="shared",
    )


@pytest.fixture
def report() -> Callable[..., LearnReport]:
    return make_report


@pytest.fixture
def random_report() -> Callable[..., LearnReport]:
    """random_report(seed, rows, width): ragged responses behind prompts of different lengths, garbage outside them."""

    def make(seed: int = 0, rows: int = 6, width: int = 12) -> LearnReport:
        rng = np.random.default_rng(seed)
        starts, lengths = rng.integers(1, 4, rows), rng.integers(1, width - 4, rows)
        at = np.arange(width)
        mask = (at >= starts[:, None]) & (at < (starts + lengths)[:, None])
        lp_R = -rng.exponential(1.5, mask.shape)
        lp_T = lp_R + 0.3 * rng.standard_normal(mask.shape)
        made = make_report(
            lp_R,
            lp_T,
            mask,
            lp_C=lp_T + 0.3 * rng.standard_normal(mask.shape),
            entropy=rng.exponential(1.0, mask.shape),
            weights=mask * np.minimum(np.exp(lp_T - lp_R), 1.2) * (rng.random(mask.shape) > 0.2),
            advantages=rng.standard_normal(rows),
            rewards=rng.integers(0, 2, rows),
            lp_ref=lp_T - 0.5,
        )
        return made

    return make


@pytest.fixture
def padded() -> Callable[..., LearnReport]:
    """padded(report, columns, value): the same report with columns appended that hold `value`, outside the mask."""

    def pad(report: LearnReport, columns: int, value: float) -> LearnReport:
        def wide(array: Any) -> Any:
            if not (isinstance(array, np.ndarray) and array.ndim == 2):
                return array
            fill = False if array.dtype == bool else (0 if array.dtype.kind == "i" else value)
            return np.concatenate([array, np.full((len(array), columns), fill, array.dtype)], axis=1)

        batch = Batch(**{name: wide(held) for name, held in vars(report.batch).items()})
        fields: dict[str, Any] = {field.name: wide(getattr(report, field.name)) for field in dataclasses.fields(report)}
        fields |= {"batch": batch, "more": {name: wide(held) for name, held in report.more.items()}}
        return LearnReport(**fields)

    return pad


def make_group(rewards: list[float], correct: list[float] | None = None, **more: Any) -> Group:
    """A scored group; `lengths`, `finish`, `tokens`, `errors`, `version` say what its samples are."""
    tokens = more.get("tokens") or [list(range(n)) for n in more.get("lengths", [3] * len(rewards))]
    finish = more.get("finish", ["stop"] * len(rewards))
    samples = tuple(
        Sample(0, g, np.array(t, np.int32), np.zeros(len(t), np.float32), more.get("version", 0), f)
        for g, (t, f) in enumerate(zip(tokens, finish, strict=True))
    )
    right = np.array(correct if correct is not None else [float(r >= 1) for r in rewards])
    return Group(
        Prompt(0, (2, 3), "ba>", "ab"), samples, np.array(rewards), {"correct": right}, more.get("errors", 0), ("ab",)
    )


@pytest.fixture
def group() -> Callable[..., Group]:
    return make_group
