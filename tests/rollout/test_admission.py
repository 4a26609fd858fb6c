"""Prompts of different lengths, admitted at different times, give what they give together."""

from __future__ import annotations

import numpy as np

from lpexp import frontend
from lpexp.data import Prompt
from lpexp.model.decoder import initial_tensors
from lpexp.precision.wire import freeze, ship
from lpexp.rollout import Sampling
from lpexp.rollout.embedded import EmbeddedEngine


def test_a_group_that_is_admitted_in_two_parts_beside_a_shorter_prompt_gets_the_same_answers() -> None:
    exp = frontend.experiment("task=add", "cluster=inline", "task.max_prompt=9", "task.max_response=5")
    model = exp.model.sized()
    tensors = initial_tensors(model, 1)
    parts = {p.name: freeze(made) for p, made in ship(tensors, model.params(), exp.wire, moe=False)}
    prompts = [Prompt(i, tuple(range(2, 2 + length)), "", "") for i, length in enumerate((9, 3, 7, 4))]
    found = []
    for slots in (3, 64):  # 3 of 4 answers to a prompt fit: the fourth waits, its prompt computed beside longer ones
        engine = EmbeddedEngine(exp, slots, 1, "cpu")
        engine.load(parts, 0)
        engine.stop_id = -1  # all end together, so that several are admitted at once
        groups, _ = engine.sample(prompts, Sampling(samples=4), 0)
        found.append([sample for group in groups for sample in group.samples])
    for few, many in zip(*found, strict=True):
        assert np.array_equal(few.tokens_T, many.tokens_T) and np.array_equal(few.logprobs_T, many.logprobs_T)
