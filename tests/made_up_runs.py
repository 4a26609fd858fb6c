"""Run directories that nobody ran: a real config, and made-up numbers whose truth the test chooses."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lpexp import checkpoint, disk, frontend, journal
from lpexp.experiment import Experiment
from lpexp.metric.mismatch import PROB_BINS

STEPS, PROMPTS, ANSWERS = 40, 64, 4


@functools.cache
def composed(*words: str) -> Experiment:
    return frontend.experiment("cluster=inline", f"steps={STEPS}", *words)


def run(
    at: Path,
    *words: str,
    seed: int = 1,
    accuracy: float = 0.7,
    gap: float = 0.0,
    done: int | None = None,
    finished: bool = True,
    events: tuple[dict[str, Any], ...] = (),
    crossed: bool = False,
    recorded: bool = True,
    **more: float,
) -> Path:
    """A run that ends at this true held-out accuracy, with a mismatch of mean |d| `gap`; `done` steps of it.

    Prompts differ by seed unless `crossed`; `recorded`: its evaluations tell of each prompt. `more` overwrites keys.
    """
    exp = composed(*words).model_copy(update={"seed": seed, "output_dir": str(at)})
    total = exp.steps
    done = total if done is None else done
    random = np.random.default_rng([seed, int(1e6 * accuracy), int(1e6 * gap)])
    at.mkdir(parents=True)
    (at / checkpoint.FOLDER).mkdir()
    disk.replace_json(
        at / checkpoint.FOLDER / checkpoint.EXPERIMENT,
        {"format": 1, "started": "2026-01-01", "config_hash": exp.hash(), "experiment": exp.dump()},
    )
    (at / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(exp.dump()))))
    (at / "contract.txt").write_text("0123456789abcdef\n")
    versions = {"python": "3.11", "torch": "2.13.0", "ray": "2.60", "numpy": "2.4", "git_commit": "a" * 40}
    (at / "versions.json").write_text(json.dumps(versions))
    (at / "hardware.json").write_text(json.dumps({"cpu": "made up", "cores": 2, "gpus": []}))
    told: list[dict[str, Any]] = [{"kind": "start", "step": 0, "overrides": [*words, f"seed={seed}"]}]
    for version in range(0, done + 1, 10):
        told.append(_evaluation(seed, version, accuracy * (0.3 + 0.7 * version / total), crossed, recorded))
    journal.write(at / journal.EVENTS, "".join(json.dumps(event) + "\n" for event in (*told, *events)))
    lines = [_line(step, done, accuracy, gap, random) | more for step in range(done)]
    journal.write(at / journal.METRICS, "".join(json.dumps(line) + "\n" for line in lines))
    if finished and done == total:
        (at / "finished.json").write_text("{}")
    return at


def _evaluation(seed: int, version: int, accuracy: float, crossed: bool, recorded: bool) -> dict[str, Any]:
    """The prompts' ease depends on the seed alone, so that arms are paired."""
    easy = np.random.default_rng(0 if crossed else seed).normal(0, 0.1, PROMPTS)
    chance = np.clip(accuracy + easy - easy.mean(), 0, 1)
    correct = np.random.default_rng([seed, version]).binomial(ANSWERS, chance)
    at = "eval/made_up"
    scores = {"greedy_acc": 0.9, "sampled_acc": float(correct.mean() / ANSWERS), "pass_at_k": 1.0, "mean_reward": 0.8}
    event: dict[str, Any] = {"kind": "eval", "set": "made_up", "version": version}
    event["metrics"] = {f"{at}/{key}": value for key, value in scores.items()}
    if recorded:
        event |= {"prompts": "same" if crossed else str(seed), "answers": ANSWERS, "correct": correct.tolist()}
    return event


def _line(step: int, steps: int, accuracy: float, gap: float, random: np.random.Generator) -> dict[str, Any]:
    noise = float(np.exp(0.1 * random.standard_normal()))
    line: dict[str, Any] = {
        "step": step,
        "reward/mean": accuracy * (0.3 + 0.7 * step / steps) + 0.01 * float(random.standard_normal()),
        "train/entropy": 1.5 - step / steps,
        "train/grad_norm": noise,
        "mismatch/logprob_abs_diff_mean": gap * noise,
        "mismatch/logprob_abs_diff_max": 40 * gap * noise,
        "mismatch/kl_k3": gap**2 * noise,
        "mismatch/mult_prob_error": 1 + gap * noise,
        "mismatch/ratio_extreme_frac": gap / 10,
        "correction/ess": 1 - gap,
        "correction/clip_frac": gap / 5,
        "correction/masked_token_frac": 0.0,
        "update/clip_frac_low_neg": 0.0,
        "update/clip_frac_high_pos": 0.0,
        "sync/quantized_param_frac": 0.5,
        "sync/bytes": 1000,
        "sync/seconds": 0.004,
        "quant/mlp_up/rel_error": 0.1,
        "quant/mlp_up/sqnr_db": 20.0,
        "time/step": 0.2 * noise,
        "time/rollout": 0.1 * noise,
        "time/learn": 0.08 * noise,
        "time/sync": 0.01,
        "time/unaccounted": 0.01,
        "throughput/rollout_tokens_per_s": 30000.0,
        "throughput/train_tokens_per_s": 20000.0,
        "memory/host_rss_bytes": 5e8,
    }
    for name in PROB_BINS if gap else ():
        line |= {f"mismatch/by_prob/{name}/kl_share": 1 / 6, f"mismatch/by_prob/{name}/token_frac": 1 / 6}
    return line
