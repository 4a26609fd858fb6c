"""`oversample`: more groups are sampled than learned from; and answers to held-out prompts of a length of their own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lpexp import frontend, record
from lpexp.data import Group, Prompt, Sample
from lpexp.rollout import Sampling
from lpexp.rollout.embedded import EmbeddedEngine
from tests.loop.conftest import Ran


def group(index: int, *rewards: float) -> Group:
    nothing = (np.zeros(1, np.int32), np.zeros(1, np.float32))
    samples = tuple(Sample(index, g, *nothing, 0, "stop") for g in range(len(rewards)))
    return Group(Prompt(index, (1,), "", ""), samples, np.array(rewards))


def test_groups_whose_rewards_differ_go_first_and_the_first_others_fill_up() -> None:
    exp = frontend.experiment("oversample=2", "task.prompts_per_step=4")
    told = {1, 3, 4, 6, 7}
    groups = [group(i, 0.0, 1.0 if i in told else 0.0) for i in range(8)]
    assert [one.prompt.id for one in exp.learned(groups)] == [1, 3, 4, 6]
    few = [group(i, 0.5, 1.0 if i in (2, 6) else 0.5) for i in range(8)]
    assert [one.prompt.id for one in exp.learned(few)] == [0, 1, 2, 6]
    assert frontend.experiment().learned(groups) == groups


def test_a_run_samples_twice_the_groups_and_learns_from_those_that_tell(inline: Callable[..., Ran]) -> None:
    run = inline("oversample=2", "steps=2", "task.warmup=null", "task.prompts_per_step=8", "trainer.micro_batches=2")
    assert run.code == 0
    for step, row in enumerate(run.rows):
        batch, _ = record.load(run.directory / "record" / f"{step:06d}.safetensors")
        ids = batch.prompt_ids_N.reshape(8, 8)[:, 0]
        assert set(ids.tolist()) <= set(range(step * 16, step * 16 + 16)) and list(ids) == sorted(ids)
        differ = batch.rewards_N.reshape(8, 8).std(axis=1) > 0
        assert differ.sum() == min(8, round(16 * (1 - row["reward/zero_std_group_frac"])))


def test_an_answer_has_the_length_that_is_asked_for_and_the_same_tokens_up_to_it() -> None:
    exp = frontend.experiment("cluster=inline", "task.warmup=null", "task.max_response=12", "rollout.slots=8")
    engine = EmbeddedEngine(exp, 8, 1, "cpu")
    from lpexp.model.decoder import initial_tensors
    from lpexp.precision.wire import freeze, ship

    tensors, params = initial_tensors(exp.model, 1), list(exp.model.params())
    engine.load({p.name: freeze(made) for p, made in ship(tensors, params, exp.wire, False)}, 0)
    prompts = [Prompt(1, (2, 3, 4), "abc", "abc")]
    long, _ = engine.sample(prompts, Sampling(samples=4), 0)
    short, _ = engine.sample(prompts, Sampling(samples=4, max_response=5), 0)
    assert max(len(one.tokens_T) for one in long[0].samples) > 5
    for one, other in zip(long[0].samples, short[0].samples, strict=True):
        assert other.tokens_T.tolist() == one.tokens_T[:5].tolist()
