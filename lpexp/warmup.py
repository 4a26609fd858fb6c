"""Supervised warm-up from scratch: a policy that is right now and then, which is what RL needs to start from.

Always in bf16, whatever the experiment's precision: all precisions of a comparison start from the same weights, and
the result is cached under a hash of everything that decides it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lpexp import disk
from lpexp.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

    from lpexp.experiment import Experiment

log = logging.getLogger("lpexp")
FORMAT = 1  # raise when the meaning of the same config changes
CHECK_PROMPTS, CHECK_SAMPLES = 128, 2


def cache_dir() -> Path:
    return disk.cache_dir("warmup")


def content_hash(exp: Experiment) -> str:
    """16 hex digits over the model, the task, the seed and the torch build."""
    import torch

    facts: dict[str, Any] = {"format": FORMAT, "seed": exp.seed, "torch": torch.__version__}
    facts["model"], facts["task"] = exp.model.sized().dump(), exp.task.dump()
    del facts["task"]["prompts_per_step"]  # of the training that follows
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def cached(exp: Experiment) -> Path:
    """Where the start weights are kept."""
    return cache_dir() / f"{exp.task.name}-{content_hash(exp)}.safetensors"


def warmed_up(exp: Experiment) -> Path:
    """The start weights as a safetensors file, made once."""
    from lpexp.checkpoint import save_tensors

    path = cached(exp)
    if path.exists():
        return path
    tensors, facts = train(exp)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{path.name}.{os.getpid()}")
    save_tensors(made, tensors, {key: str(value) for key, value in facts.items()})
    made.replace(path)
    return path


def train(exp: Experiment) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Cross-entropy on the answers until sampled held-out accuracy reaches the target; RunError when it never does."""
    import torch

    from lpexp.fault import NoFault
    from lpexp.model.decoder import Decoder, TrainWeights, initial_tensors
    from lpexp.model.tokenizer import load_tokenizer
    from lpexp.precision.bf16 import Bf16
    from lpexp.precision.wire import freeze, ship
    from lpexp.rollout import Sampling
    from lpexp.rollout.embedded import EmbeddedEngine

    spec, model, task = exp.task.warmup, exp.model.sized(), exp.task
    assert spec is not None
    plain = Bf16(name="bf16")
    sound = {"precision": plain, "rollout": exp.rollout.model_copy(update={"precision": None})}
    exp = exp.model_copy(update=sound | {"fault": NoFault(name="none")})
    tokenizer, decoder = load_tokenizer(model), Decoder(model)
    engine = EmbeddedEngine(exp, CHECK_PROMPTS * CHECK_SAMPLES, exp.cluster.threads, "cpu")
    prompts = task.held_out(exp.seed, CHECK_PROMPTS, tokenizer)
    sampling = Sampling(temperature=1.0, samples=CHECK_SAMPLES)
    masters = {name: t.requires_grad_(True) for name, t in initial_tensors(model, exp.seed).items()}
    optimizer = torch.optim.AdamW([*masters.values()], lr=spec.lr, betas=(0.9, 0.95), weight_decay=0.0)
    begin, accuracy = time.perf_counter(), 0.0
    for step in range(1, spec.max_steps + 1):
        rounded = {name: plain.round(t.detach()) for name, t in masters.items()}
        weights = TrainWeights(model, plain, rounded, grad=True)
        pairs = task.examples(exp.seed, step, spec.batch_size, tokenizer)
        rows = [[*prompt.tokens, *tokenizer.encode(answer), tokenizer.stop_id] for prompt, answer in pairs]
        width = max(map(len, rows))
        tokens = np.zeros((len(rows), width), np.int64)
        mask = np.zeros((len(rows), width), bool)
        for i, (row, (prompt, _)) in enumerate(zip(rows, pairs, strict=True)):
            tokens[i, : len(row)], mask[i, len(prompt.tokens) : len(row)] = row, True
        tokens_BT, mask_BT = torch.from_numpy(tokens), torch.from_numpy(mask)
        hidden = decoder.hidden(weights, tokens_BT)
        logits = decoder.head(weights, hidden[:, :-1][mask_BT[:, 1:]])
        torch.nn.functional.cross_entropy(logits, tokens_BT[mask_BT]).backward()
        for name, master in masters.items():
            master.grad = weights.leaves[name].grad
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        optimizer.step()
        if step % spec.check_every:
            continue
        shipped = ship(
            {n: plain.round(t.detach()) for n, t in masters.items()}, model.params(), plain, model.moe is not None
        )
        engine.load({param.name: freeze(parts) for param, parts in shipped}, step)
        groups = task.score(engine.sample(prompts, sampling, step)[0], tokenizer)
        accuracy = float(np.mean([group.parts["correct"] for group in groups]))
        log.info("warm-up step %d: sampled accuracy %.3f of %.2f", step, accuracy, spec.target)
        if accuracy >= spec.target:
            facts = {"steps": step, "sampled_accuracy": accuracy, "seconds": round(time.perf_counter() - begin, 1)}
            return {name: t.detach().clone() for name, t in masters.items()}, facts
    raise RunError(
        f"task.warmup: sampled accuracy is {accuracy:.3f} after max_steps {spec.max_steps}, below the target "
        f"{spec.target}; raise task.warmup.max_steps or task.warmup.lr, or make the task easier"
    )
